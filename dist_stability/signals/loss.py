"""The training loss: free, noisy, and one step late, because it was computed before the update that it would judge."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dist_stability.signals.base import Signal, SignalValues, StepContext
from dist_stability.signals.scalar import as_scalar
from dist_stability.signals.sums import row

_FEWEST = 8  # losses before a standard deviation means something


class TrainingLoss(Signal):
    """Statistics of the loss the loop has anyway, meant to be looked at and not to be judged by.

    Each loss is compared with those before it, and enters the statistics afterwards. What is not finite is reported and
    never enters; outliers do, as in the rules this follows, so a spike widens its own bar for ``window`` steps.

    Values::

        training_loss          mean over the ranks that gave one (a DDP rank has the loss of its own part of the batch)
        training_loss_mean     of the last ``window`` finite losses before this one (OLMo-core uses 128)
        training_loss_std      their standard deviation (n - 1), from the eighth loss on
        training_loss_z        (loss - mean) / std
        training_loss_ratio    loss over its exponential mean of span 9 (metaseq's rule), while that is positive

    Alone, on one process: ``TrainingLoss().update(loss)``.
    """

    name = "training_loss"

    def __init__(self, window: int = 128, *, span: int = 9) -> None:
        """Set the memory.

        Args:
            window: Losses in mean and standard deviation, >= 8.
            span: Of the exponential mean, whose gain is 2 / (span + 1); >= 1.

        Raises:
            TypeError, ValueError: A setting is not such an int.
        """
        for setting, value, least in (("window", window, _FEWEST), ("span", span, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"TrainingLoss {setting} must be an int >= {least}, got {value!r}")
            if value < least:
                raise ValueError(f"TrainingLoss {setting} must be an int >= {least}, got {value}")
        self.window, self.span = window, span
        self._recent: deque[float] = deque(maxlen=window)
        self._average: float | None = None
        self._mine: Tensor | None = None

    def update(self, loss: Tensor | float) -> dict[str, float]:
        """Compare one loss with those before it, then learn it. Waits for the device if the loss is on one.

        Args:
            loss: Float or 0-d tensor; may be NaN or infinite.

        Raises:
            TypeError, ValueError: It is no number, or has several.
        """
        value = loss if isinstance(loss, float) else float(as_scalar(loss, "the training loss"))
        values = {f"{self.name}": value, **self._statistics(value)}
        if math.isfinite(value):
            self._recent.append(value)
            gain = 2.0 / (self.span + 1)
            self._average = value if self._average is None else self._average + gain * (value - self._average)
        return values

    def width(self, context: StepContext) -> int:
        """The loss, and 1 if there is one."""
        return 2

    def before_step(self, context: StepContext) -> None:
        """Keep the loss, on its device."""
        self._mine = None
        if context.loss is not None:
            loss = as_scalar(context.loss, "the training loss")
            self._mine = row(context.gradients.device, loss, 1.0)

    def collect(self) -> Tensor | None:
        """See :meth:`Signal.collect`."""
        return self._mine

    def read(self, sums: Sequence[float]) -> SignalValues:
        """See the class."""
        total, count = sums
        return SignalValues(self.update(total / count)) if count else SignalValues()

    def settings(self) -> dict[str, Any]:
        """Window and span."""
        return {"window": self.window, "span": self.span}

    def state_dict(self) -> dict[str, Any]:
        """The last losses and the exponential mean."""
        return {"recent": list(self._recent), "average": self._average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a saved state; of a longer window, the last losses."""
        self._recent = deque(map(float, state["recent"]), maxlen=self.window)
        self._average = None if state["average"] is None else float(state["average"])

    def _statistics(self, value: float) -> dict[str, float]:
        values: dict[str, float] = {}
        count = len(self._recent)
        if count:
            mean = math.fsum(self._recent) / count
            values[f"{self.name}_mean"] = mean
            if count >= _FEWEST:
                std = math.sqrt(math.fsum((loss - mean) ** 2 for loss in self._recent) / (count - 1))
                values[f"{self.name}_std"] = std
                if std > 0.0:
                    values[f"{self.name}_z"] = (value - mean) / std
        if self._average is not None and self._average > 0.0:
            values[f"{self.name}_ratio"] = value / self._average
        return values
