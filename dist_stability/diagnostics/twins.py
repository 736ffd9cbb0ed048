"""Two runs in one process, step by step on the same batches, and the distance between them.

Each twin has random streams of its own, which are put in place while it steps; those of the caller are as before
afterwards. Distances are sums over shards, the same numbers on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import parallel
from ..errors import StabilityError
from ..snapshot.rng import RandomState, forked
from .perturbation import Perturbation
from .scaling import noise
from .space import ShardSpace, ranks, total


@dataclass(slots=True)
class TwinRun:
    """One training run, ready for its first step.

    Attributes:
        model: Wrapped for its ranks.
        optimizer: One or several.
        loss: ``loss(step)`` is the training loss of a step on that step's batch, a 0-d tensor with a graph. The batch
            depends on the step alone (and on the rank), so that twins see the same ones.
        after_step: ``after_step(step)``: a scheduler's turn.
        predict: Class predictions of this rank's test examples, an integer tensor, for churn.
    """

    model: nn.Module
    optimizer: Optimizer | Iterable[Optimizer]
    loss: Callable[[int], Tensor]
    after_step: Callable[[int], Any] | None = None
    predict: Callable[[], Tensor] | None = None


Build = Callable[[int], TwinRun]
"""Makes a run from a seed: the same seed, the same run. On several ranks every rank calls it together."""


class Twin:
    """A run that is stepped under its own random streams, with a perturbation."""

    def __init__(self, build: Build, seed: int, perturbation: Perturbation) -> None:
        """Build it. Collectives: those of ``build``.

        Raises:
            StabilityError: ``build`` gave no :class:`TwinRun`.
        """
        self.perturbation = perturbation
        with forked(seed):
            self.run = perturbation.builder(build)(seed)
            if not isinstance(self.run, TwinRun):
                raise StabilityError(
                    f"rank {parallel.this_rank()}: build must return a TwinRun, got {type(self.run).__name__}"
                )
            self.space = ShardSpace(self.run.model, self.run.optimizer)
            self._random = RandomState.capture()

    def step(self, step: int) -> Tensor:
        """One training step. Collectives: those of the model.

        Returns:
            The loss, detached, 0-d float64 on the space's device.
        """
        outside = RandomState.capture()
        self._random.restore()
        try:
            parallel.reshard(self.run.model)
            self.perturbation.before_step(step, self.space)
            for optimizer in self.space.optimizers:
                optimizer.zero_grad()
            loss = self.run.loss(step)
            loss.backward()  # type: ignore[no-untyped-call]
            self.perturbation.step(self.space)
            if self.run.after_step is not None:
                self.run.after_step(step)
            parallel.reshard(self.run.model)
            self._random = RandomState.capture()
        finally:
            outside.restore()
        return parallel.local(loss).to(self.space.device, torch.float64).reshape(())

    def predictions(self) -> Tensor | None:
        """What ``predict`` says; its draws are the same each time."""
        if self.run.predict is None:
            return None
        with torch.no_grad(), forked(0):
            return self.run.predict()

    @property
    def learning_rate(self) -> float:
        """Largest over the groups."""
        return max(float(group["lr"]) for optimizer in self.space.optimizers for group in optimizer.param_groups)


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two twins are apart after a step; NaN where something was not finite.

    Attributes:
        relative_l1: 2 * mean(|a - b| / (|a| + |b|)) over all weights, 0 where both are 0.
        relative_l2: |a - b| / |a|, 2-norms.
        layers: ``relative_l1`` of each parameter, by name.
        shares: Share of each parameter in |a - b|^2; empty while the twins are equal.
        losses: Of both, mean over ranks.
        left_out: By parameter how many of its elements do not count, if any do not; see :func:`distance`.
    """

    relative_l1: float
    relative_l2: float
    layers: dict[str, float]
    shares: dict[str, float]
    losses: tuple[float, float]
    left_out: dict[str, int]


@torch.no_grad()
def distance(first: Twin, second: Twin, losses: tuple[Tensor, Tensor]) -> Distance:
    """Compare the weights of two twins.

    Elements without a true gradient (the bias of an attention's keys) do not count: Adam divides rounding errors by
    rounding errors there, and twins are far apart in them after one step, to no effect. See :func:`.scaling.noise`.

    Collectives: one all-reduce, two with an Adam. Waits for the device.

    Raises:
        StabilityError: Their parameters differ in name or local shape.
    """
    a, b = first.space, second.space
    here, there = a.live(), b.live()
    forms = [
        list(map(str, zip(space.names, (part.shape for part in live), strict=True)))
        for space, live in ((a, here), (b, there))
    ]
    if forms[0] != forms[1]:
        raise StabilityError(
            f"rank {parallel.this_rank()}: the twins have different parameters, or shard them differently: "
            f"{sorted(set(forms[0]) ^ set(forms[1]))[:4]}"
        )
    columns = []
    for one, other, weight, mask in zip(here, there, a.weights, noise(a), strict=True):
        out = torch.zeros((), device=one.device) if mask is None else mask.sum()
        if mask is not None:
            one, other = one.masked_fill(mask, 0.0), other.masked_fill(mask, 0.0)
        gap, size = (one - other).abs(), one.abs() + other.abs()
        ratio = torch.where(size > 0, gap / size, gap)  # 0 / 0 is 0, and a NaN stays one
        sums = [
            ratio.sum(dtype=torch.float64),
            one.numel() - out.double(),
            gap.double().square().sum(),
            one.double().square().sum(),
            out.double(),
        ]
        columns.append(torch.stack(sums).to(a.device) * weight)
    means = [loss / ranks() for loss in losses]
    flat = total(torch.cat([torch.stack(columns).flatten(), torch.stack(means)]))
    n = len(a.names)
    rows = {name: flat[5 * i : 5 * i + 5] for i, name in enumerate(a.names)}
    ratios, counts, gaps, squares = (sum(row[i] for row in rows.values()) for i in range(4))
    return Distance(
        relative_l1=2.0 * ratios / counts,
        relative_l2=math.sqrt(gaps / squares) if squares else (math.nan if math.isnan(gaps) else math.sqrt(gaps)),
        layers={name: 2.0 * row[0] / row[1] if row[1] else 0.0 for name, row in rows.items()},
        shares={name: row[2] / gaps for name, row in rows.items()} if gaps > 0.0 else {},
        losses=(flat[5 * n], flat[5 * n + 1]),
        left_out={name: round(row[4]) for name, row in rows.items() if row[4] > 0.0},
    )


def churn(twin: Twin, one: Tensor | None, other: Tensor | None) -> float | None:
    """Fraction of predictions that differ; None where there are none. Collectives: one all-reduce, if there are.

    Args:
        twin: Either of the two.
        one: Of this rank's examples.
        other: Of the same examples.
    """
    if one is None or other is None:
        return None
    different = (one != other).sum(dtype=torch.float64).to(twin.space.device)
    count = torch.full_like(different, float(one.numel()))
    summed, examples = total(torch.stack([different, count]))
    return summed / examples if examples else math.nan
