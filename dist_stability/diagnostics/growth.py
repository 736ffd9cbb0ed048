"""How fast two nearly equal runs part, and what that says: pure functions of the distances, one per step.

The first steps are a jump, not growth: under Adam one changed ulp becomes a difference of about learning rate * 1e-4 in
a single step, because tiny gradients are normalized. Growth is what comes after, up to the first distance above the
level at which the runs count as different.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

BENIGN_BELOW = 1e-4
"""A distance (relative 2-norm) that never passes this is rounding."""

APART = 1e-2
"""Runs above this distance are different runs: growth is measured up to here."""

SPREAD = 0.5
"""What levels off below this is restrained; two unrelated weight vectors of one length are 1.4 apart."""

LEVEL = math.log(2.0)
"""Over its last quarter a run that has levelled off changes by less than a factor of 2."""


class Verdict(StrEnum):
    """What rounding does to a run."""

    BENIGN = "benign"
    RESTRAINED = "restrained"
    UNRESTRAINED = "unrestrained"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Growth:
    """An exponential fit of the distance.

    Attributes:
        rate: Finite-time Lyapunov exponent: slope of ln(distance), per step. NaN with fewer than 3 points.
        points: Number of distances fitted.
        r_squared: Share of their variance that the line explains; 1 for a perfect exponential, NaN without a fit.
        jump: Largest distance during the jump.
        saturation: Index of the first distance above ``APART``; None if none is.
        plateau: Median distance over the last quarter.
    """

    rate: float
    points: int
    r_squared: float
    jump: float
    saturation: int | None
    plateau: float


def fit_growth(distances: Sequence[float], jump_steps: int = 4, apart: float = APART) -> Growth:
    """Take jump and growth apart.

    Args:
        distances: Relative 2-norm after each step, from the first perturbed one on.
        jump_steps: How many of them belong to the jump, >= 1.
        apart: Level at which growth ends.
    """
    finite = [value for value in distances if math.isfinite(value)]
    saturation = next((index for index, value in enumerate(distances) if not value <= apart), None)
    begin = min(jump_steps, len(distances))
    end = len(distances) if saturation is None else max(saturation, 0)
    points = [(index, math.log(distances[index])) for index in range(begin, end) if distances[index] > 0.0]
    rate, r_squared = _line(points)
    quarter = sorted(finite[-max(1, len(finite) // 4) :])
    return Growth(
        rate=rate,
        points=len(points),
        r_squared=r_squared,
        jump=max(finite[:begin], default=math.nan),
        saturation=saturation,
        plateau=quarter[len(quarter) // 2] if quarter else math.nan,
    )


def judge(distances: Sequence[float], losses: Sequence[float], other: Sequence[float]) -> tuple[Verdict, str]:
    """What the distances and both runs' losses add up to, with a reason for people.

    BENIGN: never above ``BENIGN_BELOW``, or levelled off before the runs were different. RESTRAINED: different
    (``APART``), but levelled off below ``SPREAD`` with finite losses that are not above where they began. UNRESTRAINED:
    still growing, spread everywhere, or a loss diverges.
    """
    both = [*losses, *other, *distances]
    if not both or not all(math.isfinite(value) for value in both):
        return Verdict.UNRESTRAINED, "a loss or a weight is not finite"
    for run in (losses, other):
        tail = run[-max(1, len(run) // 4) :]
        if sum(tail) / len(tail) > run[0] + abs(run[0]):
            return Verdict.UNRESTRAINED, f"the loss has risen from {run[0]:.3g} to {sum(tail) / len(tail):.3g}"
    highest = max(distances)
    if highest < BENIGN_BELOW:
        return Verdict.BENIGN, f"the distance never passed {highest:.2g}"
    quarter = distances[-max(3, len(distances) // 4) :]
    rate, _ = _line([(index, math.log(value)) for index, value in enumerate(quarter) if value > 0.0])
    change = 0.0 if math.isnan(rate) else rate * (len(quarter) - 1)
    plateau = sorted(quarter)[len(quarter) // 2]
    if change >= LEVEL:
        return Verdict.UNRESTRAINED, (
            f"still growing at {plateau:.2g}, by a factor of {math.exp(change):.2g} over the last {len(quarter)} "
            "steps; a longer run would tell whether it levels off"
        )
    if highest <= APART:
        return Verdict.BENIGN, f"levelled off at {plateau:.2g}, before the runs were different"
    if plateau < SPREAD:
        return Verdict.RESTRAINED, f"levelled off at {plateau:.2g}"
    return Verdict.UNRESTRAINED, f"spread over all weights: levelled off at {plateau:.2g}"


@dataclass(frozen=True, slots=True)
class Horizon:
    """Up to which step two runs that differ in rounding may be compared.

    Attributes:
        steps: Steps for which the distance stays within ``tolerance``; None if no growth was found to end them.
        measured: Seen in the runs, not extrapolated from their growth.
        tolerance: Relative 2-norm of the weights' difference.
    """

    steps: int | None
    measured: bool
    tolerance: float


def divergence_horizon(distances: Sequence[float], tolerance: float = APART, jump_steps: int = 4) -> Horizon:
    """Where comparisons of trajectories must end, unless every kernel and reduction order is fixed.

    Tests of replay, of a restart at another world size, and across ranks may compare weights only up to here.

    Args:
        distances: Relative 2-norm after each step, of a run against its perturbed twin.
        tolerance: What still counts as equal, > 0.
        jump_steps: See :func:`fit_growth`.
    """
    if not tolerance > 0.0:
        raise ValueError(f"divergence_horizon tolerance: expected a positive number, got {tolerance!r}")
    over = next((index for index, value in enumerate(distances) if not value <= tolerance), None)
    if over is not None:
        return Horizon(over, True, tolerance)
    rate = fit_growth(distances, jump_steps, math.inf).rate
    if not distances or not rate > 0.0 or distances[-1] == 0.0:
        return Horizon(None, False, tolerance)
    return Horizon(len(distances) + math.floor(math.log(tolerance / distances[-1]) / rate), False, tolerance)


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Slope and R^2 of a least-squares line; NaN with fewer than 3 points."""
    if len(points) < 3:
        return math.nan, math.nan
    n = len(points)
    middle, level = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - middle) ** 2 for x, _ in points)
    slope = sum((x - middle) * (y - level) for x, y in points) / spread
    total = sum((y - level) ** 2 for _, y in points)
    left = sum((y - level - slope * (x - middle)) ** 2 for x, y in points)
    return slope, 1.0 - left / total if total else 1.0
