"""Training that undoes its own bad updates.

A layer above the optimizer for DDP and FSDP training: after ``optimizer.step()`` has proposed new weights, a probe the
optimizer never trains on measures them, all ranks vote, and the whole job commits, or goes back in lockstep to exactly
the state it had. Start with :class:`StabilityController`.
"""

from .cadence import AdaptiveCadence
from .controller import StabilityController
from .errors import LockstepError, SnapshotError, StabilityError, StabilityStop
from .guards import GradientNormGuard, NonFiniteGuard
from .measured_cadence import MeasuredCadence
from .resume import Resumed
from .rules import FixedInnovation, PredictiveInnovation
from .rules.trend import SlowDivergence
from .rungs import Escalation
from .signals import LossProbe
from .snapshot.tiers.checkpoints import Checkpoints
from .snapshot.tiers.shared_memory import SharedMemory
from .verdict import Action, Judgement, Verdict

__all__ = [
    "Action",
    "AdaptiveCadence",
    "Checkpoints",
    "Escalation",
    "FixedInnovation",
    "GradientNormGuard",
    "Judgement",
    "LockstepError",
    "LossProbe",
    "MeasuredCadence",
    "NonFiniteGuard",
    "PredictiveInnovation",
    "Resumed",
    "SharedMemory",
    "SlowDivergence",
    "SnapshotError",
    "StabilityController",
    "StabilityError",
    "StabilityStop",
    "Verdict",
]
