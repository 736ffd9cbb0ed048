"""The learning rate of the step that was taken."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dist_stability.signals.base import Signal, SignalValues, StepContext
from dist_stability.signals.sums import row


class LearningRate(Signal):
    """``learning_rate``: the largest over all parameter groups, as it stands when the optimizer steps.

    Read from the groups, whoever wrote it there: unlike the rate a scheduler announces, it can itself be the fault.
    """

    name = "learning_rate"

    def __init__(self) -> None:
        """There is nothing to set."""
        self._mine: Tensor | None = None

    def width(self, context: StepContext) -> int:
        """The rate, and 1 if some group has one."""
        return 2

    def before_step(self, context: StepContext) -> None:
        """Look at the groups; a rate that is a tensor stays on its device."""
        rates = [group["lr"] for _, group in context.groups if "lr" in group]
        self._mine = None
        if rates:
            device = context.gradients.device
            known = not any(isinstance(rate, Tensor) for rate in rates)
            self._mine = row(device, max(rates) if known else row(device, *rates).max(), 1.0)

    def collect(self) -> Tensor | None:
        """See :meth:`Signal.collect`."""
        return self._mine

    def read(self, sums: Sequence[float]) -> SignalValues:
        """See the class."""
        total, count = sums
        return SignalValues({self.name: total / count} if count else {})
