"""What is measured: the probe's loss on the proposed weights, the gradients before the step, and what else foretells.

:class:`LossProbe` and :class:`Gradients` are what verdicts are made of. The rest are signals: named numbers that are
logged at every step and ride in the vote's all-reduce (:class:`Monitor`), or are read alone (:func:`measure`).
"""

from .agreement import GradientAgreement, RankAgreement
from .base import Signal, SignalValues, StepContext
from .directional import DirectionalRatio
from .effective_step import EffectiveStep
from .gradients import Gradients
from .groups import GroupNorms, group_squares
from .learning_rate import LearningRate
from .loss import TrainingLoss
from .loss_scale import LossScale
from .monitor import Monitor, host_values, measure, step_context, verdict_values
from .period import JudgedPeriod
from .probe import LossProbe, Reading
from .updates import UpdateRatio, UpdateRms

__all__ = [
    "DirectionalRatio",
    "EffectiveStep",
    "GradientAgreement",
    "Gradients",
    "GroupNorms",
    "JudgedPeriod",
    "LearningRate",
    "LossProbe",
    "LossScale",
    "Monitor",
    "RankAgreement",
    "Reading",
    "Signal",
    "SignalValues",
    "StepContext",
    "TrainingLoss",
    "UpdateRatio",
    "UpdateRms",
    "group_squares",
    "host_values",
    "measure",
    "step_context",
    "verdict_values",
]
