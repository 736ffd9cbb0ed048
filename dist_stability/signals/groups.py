"""The gradient norm of each parameter group: which part of the model a spike of the global norm comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_stability.signals.base import Signal, SignalValues, StepContext


class GroupNorms(Signal):
    """``gradient_norm/GROUP`` for each parameter group of all optimizers, as the optimizer gets it (after clipping).

    A group is called by its ``name`` entry, ``{"params": ..., "name": "embedding"}``, or else by its number, counted
    through all optimizers. Costs one pass over the gradients, which a controller without a caller's norm makes anyway.

    Collectives: those of :attr:`Gradients.local`.
    """

    name = "group_norms"

    def __init__(self) -> None:
        """There is nothing to set."""
        self._labels: list[str] = []
        self._mine: Tensor | None = None

    def width(self, context: StepContext) -> int:
        """One sum of squares for each group."""
        return sum(1 for _ in context.groups)

    def before_step(self, context: StepContext) -> None:
        """Add up the squares of this rank's shards."""
        self._labels = _labels(context)
        self._mine = group_squares(context)

    def collect(self) -> Tensor | None:
        """See :meth:`Signal.collect`."""
        return self._mine

    def read(self, sums: Sequence[float]) -> SignalValues:
        """See the class."""
        return SignalValues(
            {f"gradient_norm/{label}": math.sqrt(total) for label, total in zip(self._labels, sums, strict=True)}
        )


def group_squares(context: StepContext) -> Tensor:
    """This rank's summands of the squared gradient norm of each parameter group, 1-d float64.

    Collectives: those of :attr:`Gradients.local`; summing over ranks is left to the caller.
    """
    squares = context.gradients.squares
    single = {
        id(entry[1]): square for entry, square in zip(context.gradients.parameters, squares.unbind(), strict=True)
    }
    zero = squares.new_zeros(())
    return torch.stack(
        [torch.stack([zero, *(single[id(p)] for p in group["params"])]).sum() for _, group in context.groups]
    )


def _labels(context: StepContext) -> list[str]:
    names = [group.get("name") for _, group in context.groups]
    return [
        name if isinstance(name, str) and names.count(name) == 1 else str(number) for number, name in enumerate(names)
    ]
