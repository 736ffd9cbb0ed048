"""Learning rates as the guarded step sees them: which one was announced, and a cut that no scheduler notices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from . import parallel


class RateCut:
    """Multiplies the learning rates for one optimizer step and puts them back.

    Schedulers compute the next learning rate from the present one (``ExponentialLR``) or from their own formula
    (``LambdaLR``). Because the cut is in force only while the optimizer steps, neither kind sees it, and when the
    ladder's factor is back at 1 the learning rate is the scheduler's to the bit.

    Args:
        optimizers: All that make the proposal.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        """Nothing is cut."""
        self._optimizers = tuple(optimizers)
        self._saved: list[tuple[dict[str, Any], Any]] = []

    def apply(self, factor: float) -> None:
        """Multiply every group's learning rate by ``factor``; a tensor in place, since compiled optimizers hold it."""
        if factor == 1.0:
            return
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                rate = group["lr"]
                if isinstance(rate, torch.Tensor):
                    self._saved.append((group, rate.detach().clone()))
                    with torch.no_grad():
                        rate.mul_(factor)
                else:
                    self._saved.append((group, rate))
                    group["lr"] = rate * factor

    def undo(self) -> None:
        """Put every learning rate back. Idempotent."""
        for group, rate in self._saved:
            if isinstance(rate, torch.Tensor):
                with torch.no_grad():
                    parallel.local(group["lr"]).copy_(parallel.local(rate))
            else:
                group["lr"] = rate
        self._saved = []


def announced(optimizers: Sequence[Optimizer], others: Iterable[Any]) -> float | None:
    """Largest learning rate that a scheduler vouches for; None where there is none.

    A learning rate in a parameter group that its scheduler does not report was set by somebody else, and may be the
    fault itself.

    Args:
        optimizers: All that make the proposal.
        others: Objects among which schedulers are found: they have ``optimizer`` and ``get_last_lr()``.
    """
    largest = None
    for scheduler in others:
        owner, last = getattr(scheduler, "optimizer", None), getattr(scheduler, "get_last_lr", None)
        if owner is None or not callable(last) or not any(owner is optimizer for optimizer in optimizers):
            continue
        for group, said in zip(owner.param_groups, last(), strict=False):
            used, said = _number(group["lr"]), _number(said)
            if used is not None and said is not None and math.isclose(used, said, rel_tol=1e-5):
                largest = said if largest is None else max(largest, said)
    return largest


def _number(rate: Any) -> float | None:
    """A learning rate as a float; None for a tensor on an accelerator, which the host would have to wait for."""
    if isinstance(rate, torch.Tensor):
        return float(rate) if rate.device.type == "cpu" else None
    return float(rate)
