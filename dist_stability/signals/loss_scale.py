"""The loss scale of a GradScaler, whose fall under fp16 came some 30 steps before GLM-130B's loss exploded."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dist_stability.signals.base import Signal, SignalValues, StepContext
from dist_stability.signals.sums import row


class LossScale(Signal):
    """How far the loss scale has fallen.

    Values::

        loss_scale         the scale with which this step's loss was multiplied
        loss_scale_drop    log2 of the largest scale of the last ``window`` steps over this one: halvings, 0 at its top

    A healthy run shows 0 and 1: the scaler tries a doubling now and then and takes it back. (The observation on
    GLM-130B is from its training log: the scale fell from step 33710 on, the loss exploded at 33740.)

    Alone, on one process: ``LossScale().update(scaler.get_scale())``.
    """

    name = "loss_scale"

    def __init__(self, window: int = 100) -> None:
        """Set the memory.

        Args:
            window: Steps, >= 1.

        Raises:
            TypeError, ValueError: It is not such an int.
        """
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"LossScale window must be an int >= 1, got {window!r}")
        if window < 1:
            raise ValueError(f"LossScale window must be an int >= 1, got {window}")
        self.window = window
        self._recent: deque[float] = deque(maxlen=window)
        self._mine: Tensor | None = None

    def update(self, scale: float) -> dict[str, float]:
        """Take note of the present scale."""
        if not 0.0 < scale < math.inf:
            return {"loss_scale": scale}
        self._recent.append(scale)
        return {"loss_scale": scale, "loss_scale_drop": math.log2(max(self._recent) / scale)}

    def width(self, context: StepContext) -> int:
        """The scale, and 1 if there is one."""
        return 2

    def before_step(self, context: StepContext) -> None:
        """Keep the scale as it is now, on its device: ``scaler.update()`` will change it in place."""
        self._mine = None
        scale = _scale(context.scaler)
        if scale is not None:
            self._mine = row(context.gradients.device, scale, 1.0)

    def collect(self) -> Tensor | None:
        """See :meth:`Signal.collect`."""
        return self._mine

    def read(self, sums: Sequence[float]) -> SignalValues:
        """See the class."""
        total, count = sums
        return SignalValues(self.update(total / count)) if count else SignalValues()

    def settings(self) -> dict[str, Any]:
        """The window."""
        return {"window": self.window}

    def state_dict(self) -> dict[str, Any]:
        """The last scales."""
        return {"recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a saved state."""
        self._recent = deque(map(float, state["recent"]), maxlen=self.window)


def _scale(scaler: Any) -> Tensor | None:
    """The scale where it lies: the public ``get_scale()`` waits for the device. None while nothing was scaled."""
    return None if scaler is None or not scaler.is_enabled() else scaler._scale
