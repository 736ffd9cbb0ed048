"""One bad step, on purpose: eight kinds, drawn over wide ranges so that all sizes of damage occur."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_stability.experiments.data import Batch
from dist_stability.testing.fault import BITS
from dist_stability.testing.faults import flip_largest

RANGES: dict[str, tuple[float, float]] = {
    "lr spike": (3, 160),
    "gradient flip": (1, 100),
    "gradient scale": (3, 1000),
    "weight row": (3, 300),
    "shuffled labels": (1, 1),
    "repeated token": (1, 1),
    "bit flip": (1, 1),
    "nan": (1, 1),
}
"""Kinds of events, with the range of their factor (drawn on the logarithm)."""

HARM = 0.02
"""Nats from which a rise counts as damage."""

SIZES = {"mild": (HARM, 0.1), "moderate": (0.1, 0.5), "severe": (0.5, math.inf)}
"""Sizes of the damage of one step: from (inclusive) and to, in nats of rise on data that no rule sees."""

NAMES = ("benign", "delayed", *SIZES, "non-finite")
"""All names that :func:`size` gives."""


def size(now: float, later: float) -> str:
    """The name of what an event did.

    Args:
        now: Rise through the step itself.
        later: Rise over the run without the event, after some ordinary steps.

    Returns:
        "non-finite" for what a check for NaN finds, one of :data:`SIZES` by the damage of the step itself, "delayed"
        if there was none but some came later (under Adam an enormous gradient does its harm out of the moments), else
        "benign".
    """
    if not math.isfinite(now):
        return "non-finite"
    if now < HARM:
        return "benign" if later < HARM else "delayed"
    return next(name for name, (low, high) in SIZES.items() if low <= now < high)


@dataclass(frozen=True)
class Event:
    """What is done to one step.

    Attributes:
        kind: One of :data:`RANGES`.
        factor: By how much, where that means something.
        seed: Of everything else that is drawn: which row, which bit, which order.
    """

    kind: str
    factor: float
    seed: int

    @property
    def learning_rate(self) -> float:
        """What the learning rate is multiplied by for this step."""
        return self.factor if self.kind == "lr spike" else 1.0

    def batch(self, batch: Batch) -> Batch:
        """The batch that is trained on instead."""
        inputs, targets = batch
        if self.kind == "shuffled labels":
            order = torch.randperm(targets.numel(), generator=torch.Generator().manual_seed(self.seed))
            return inputs, targets.flatten()[order].view_as(targets)
        if self.kind == "repeated token":  # one character throughout; for images, one image with its label
            at = self.seed % targets.numel()
            if inputs.dtype == torch.int64:
                token = targets.flatten()[at]
                return torch.full_like(inputs, int(token)), torch.full_like(targets, int(token))
            return inputs[at : at + 1].expand_as(inputs), targets[at : at + 1].expand_as(targets)
        return batch

    def gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Spoil the gradients, in place, before their norm is taken."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.kind in ("gradient flip", "gradient scale"):
            torch._foreach_mul_(gradients, -self.factor if self.kind == "gradient flip" else self.factor)
        elif self.kind == "nan":
            gradients[self.seed % len(gradients)].view(-1)[0] = math.nan
        elif self.kind == "bit flip" and self.seed % 2:
            self._flip(gradients)

    def weights(self, parameters: Sequence[nn.Parameter]) -> None:
        """Spoil the weights, in place, after the optimizer step."""
        if self.kind == "weight row":
            matrices = [p for p in parameters if p.dim() >= 2]
            matrix = matrices[self.seed % len(matrices)]
            with torch.no_grad():
                matrix[(self.seed // 7) % matrix.shape[0]].mul_(self.factor)
        elif self.kind == "bit flip" and not self.seed % 2:
            self._flip([p.detach() for p in parameters])

    def _flip(self, tensors: Sequence[Tensor]) -> None:
        """A bit of the largest element of one tensor."""
        flip_largest([tensors[(self.seed // 2) % len(tensors)]], BITS[(self.seed // 3) % len(BITS)])


def draw(kind: str, source: random.Random) -> Event:
    """An event of one kind, with a factor from its range."""
    low, high = RANGES[kind]
    factor = math.exp(source.uniform(math.log(low), math.log(high)))
    return Event(kind, factor, source.randrange(1 << 30))
