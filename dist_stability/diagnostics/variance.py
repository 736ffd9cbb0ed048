"""Does rounding move the outcome of a training run as much as its seed does?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import parallel
from ..errors import StabilityError
from ..snapshot.rng import forked
from .perturbation import Perturbation
from .twins import Build, Twin, TwinRun, churn


@dataclass(frozen=True, slots=True)
class Variance:
    """Does rounding move the outcome as much as the seed does?

    Attributes:
        scores: By seed, then in the order of ``perturbations``.
        perturbations: Their names.
        std_perturbation: Population standard deviation over perturbations, mean over seeds.
        std_seed: Over seeds, mean over perturbations.
        ratio: Variance over perturbations / variance over seeds, of the means above; inf where seeds do not matter.
        churn: Mean fraction of predictions that differ from the first perturbation's, at one seed; None without.
    """

    scores: tuple[tuple[float, ...], ...]
    perturbations: tuple[str, ...]
    std_perturbation: float
    std_seed: float
    ratio: float
    churn: float | None


def variance_against_seeds(
    build: Build,
    score: Callable[[TwinRun], float],
    seeds: Sequence[int],
    perturbations: Sequence[Perturbation],
    steps: int,
) -> Variance:
    """Train once for each seed and perturbation and compare the spread of the final scores.

    Args:
        build: Makes a run from a seed.
        score: Of a finished run, for example its test accuracy; the same on every rank. Its draws are the same each
            time.
        seeds: At least two.
        perturbations: At least two, for example ``KScale(k)`` for k in 1, 3, 5.
        steps: Of each run.

    Collectives: those of the runs, and one all-reduce for each run after a seed's first.

    Raises:
        StabilityError: Fewer than two seeds or perturbations.
    """
    if len(seeds) < 2 or len(perturbations) < 2 or steps < 1:
        raise StabilityError(
            f"rank {parallel.this_rank()}: variance_against_seeds needs two seeds, two perturbations and one step at "
            f"least, got {len(seeds)}, {len(perturbations)} and {steps}"
        )
    table, churns = [], []
    for seed in seeds:
        row = []
        before: torch.Tensor | None = None
        for perturbation in perturbations:
            twin = Twin(build, seed, perturbation)
            for step in range(steps):
                twin.step(step)
            with forked(0):
                row.append(float(score(twin.run)))
            said = twin.predictions()
            if (different := churn(twin, before, said)) is not None:
                churns.append(different)
            before = said if before is None else before
        table.append(tuple(row))
    across = _mean([_std(row) for row in table])
    between = _mean([_std([row[i] for row in table]) for i in range(len(perturbations))])
    return Variance(
        tuple(table),
        tuple(each.name for each in perturbations),
        across,
        between,
        (across / between) ** 2 if between else math.inf,
        _mean(churns) if churns else None,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    centre = _mean(values)
    return math.sqrt(_mean([(value - centre) ** 2 for value in values]))
