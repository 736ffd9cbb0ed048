"""How long it took from one vote to the next."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_stability.signals.base import Signal, SignalValues, StepContext
from dist_stability.signals.sums import row


class JudgedPeriod(Signal):
    """``judged_period``: seconds of wall time between the last two readings of a vote, averaged over ranks.

    A vote that was read is a moment at which the host knows the device to be done with everything before it. The time
    is known only after the vote it ends with, so it rides in the one after that: the value at a judged attempt is about
    the period that ended with the judged attempt before it. Absent at the first two.
    """

    name = "judged_period"

    def __init__(self) -> None:
        """Nothing was read yet."""
        self._device = torch.device("cpu")
        self._read_at: float | None = None
        self._seconds: float | None = None

    def width(self, context: StepContext) -> int:
        """Seconds, and how many ranks know theirs."""
        return 2

    def before_step(self, context: StepContext) -> None:
        """Remember where the vector lies."""
        self._device = context.gradients.device

    def collect(self) -> Tensor | None:
        """See :meth:`Signal.collect`."""
        return None if self._seconds is None else row(self._device, self._seconds, 1.0)

    def read(self, sums: Sequence[float]) -> SignalValues:
        """See the class. Looks at the clock."""
        now = time.perf_counter()
        self._seconds = None if self._read_at is None else now - self._read_at
        self._read_at = now
        total, count = sums
        return SignalValues({self.name: total / count} if count else {})
