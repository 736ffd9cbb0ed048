"""What a signal is: a few numbers per step that are computed on shards and become meaningful as sums over ranks.

Who calls what (a :class:`~dist_stability.signals.monitor.Monitor`, for each step, on every rank)::

    before_step(context)   after backward, unscaling and clipping, before any optimizer steps
    after_step(context)    the optimizers have stepped; left out when the step did not happen
    collect()              this rank's summands, on the device
    read(sums)             the sums over all ranks, on the host, as named numbers

Nothing before ``read`` waits for the device, and only what is documented on a signal enters a collective. Everything
is a sum, so that it can ride in an all-reduce that is made anyway; the monitor sees to it that no NaN enters one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from dist_stability.signals.gradients import Gradients


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a signal may look at.

    Attributes:
        gradients: This rank's gradients. Names, order and number of its parameters are the same on every rank.
        optimizers: They have exactly the parameters of ``gradients``, in this order.
        loss: Training loss of this step as the loop has it; None if unknown.
        scaler: GradScaler that has unscaled the gradients; None without one.
    """

    gradients: Gradients
    optimizers: Sequence[Optimizer]
    loss: object = None
    scaler: Any = None

    @property
    def groups(self) -> Iterator[tuple[Optimizer, dict[str, Any]]]:
        """Every parameter group with its optimizer, in order."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield optimizer, group


@dataclass(frozen=True, slots=True)
class SignalValues:
    """Named numbers of one step, the same on every rank.

    Attributes:
        values: By name. NaN stands for anything that was not finite on some rank. What could not be measured at this
            step (a ratio to 0, optimizer state before the first step, a loss that was not given) is left out.
        where: For values that are the largest over tensors: the name of the tensor.
    """

    values: dict[str, float] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)


@runtime_checkable
class Signal(Protocol):
    """Base of all signals: one without numbers. Derive from it and override what is needed.

    Attributes:
        name: Unique within a monitor, the same on every rank.
    """

    name: str

    def width(self, context: StepContext) -> int:
        """How many numbers ``collect`` gives; from facts that are the same on every rank, whatever was measured."""
        return 0

    def before_step(self, context: StepContext) -> None:
        """Look at gradients and at the state from which the optimizer will step."""
        return None

    def after_step(self, context: StepContext) -> None:
        """Look at what the optimizer made of it."""
        return None

    def collect(self) -> Tensor | None:
        """This rank's summands of the present step: 1-d float64, possibly not finite; None if it has none."""
        return None

    def read(self, sums: Sequence[float]) -> SignalValues:
        """What the sums over all ranks say; a sum is NaN if a summand was not finite. On the host, once per step."""
        return SignalValues()

    def settings(self) -> dict[str, Any]:
        """How the signal was built, JSON-able: compared over ranks."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What later readings depend on, JSON-able; empty for a signal without memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        return None
