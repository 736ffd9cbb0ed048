"""Synthetic series in which nothing is wrong: how often does a rule refuse, and does it ever come back?

A series is a level with noise, ``y = level + 0.01 u`` with ``level = 2 + exp(-t / 300)``, where ``u`` is of one of the
families below. For a rule on the gradient norm the same ``u`` moves the logarithm, ``g = exp(0.2 u)``. Every value is
independent of what was refused before, so a lasting change is one of the *yardstick*: the same weights measure
differently. The ladder offers a rule that can follow its yardstick the chance to: after eight refusals in a row the
standing state is measured again, and if that differs, ``rebase`` is called. The replay does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from dist_stability.bench.detection.contestants import Contestant, Judge, contestants

REBASE_AFTER = 8
"""Refusals in a row after which the standing state is measured again."""

COMES_BACK_WITHIN = 30
"""Steps after a tenfold scale within which a rule must commit again."""

SHIFT, SCALE = 25.0, 10.0
"""The level shift, in units of the noise, and the factor of the scale shift; both at half time, for good."""

_NOISE, _NORM_NOISE = 0.01, 0.2


def _normal(generator: Generator, count: int, steps: int) -> Tensor:
    return torch.randn(count, steps, generator=generator, dtype=torch.float64)


def _schedule(generator: Generator, count: int, steps: int) -> Tensor:
    """The standard deviation rises tenfold over the first half and falls back over the second."""
    rise = 1 - (torch.linspace(-1, 1, steps, dtype=torch.float64)).abs()
    return _normal(generator, count, steps) * SCALE**rise


def _student(freedom: int) -> Callable[[Generator, int, int], Tensor]:
    def draw(generator: Generator, count: int, steps: int) -> Tensor:
        square = torch.stack([_normal(generator, count, steps) for _ in range(freedom)]).square().mean(0)
        return _normal(generator, count, steps) / square.sqrt()

    return draw


def _laplace(generator: Generator, count: int, steps: int) -> Tensor:
    pair = torch.empty(2, count, steps, dtype=torch.float64).exponential_(generator=generator)
    return (pair[0] - pair[1]) / math.sqrt(2)


def _garch(generator: Generator, count: int, steps: int) -> Tensor:
    """Clusters: variance 0.05 + 0.1 u^2 + 0.85 variance, whose mean is 1."""
    noise = _normal(generator, count, steps)
    variance = torch.ones(count, dtype=torch.float64)
    for step in range(steps):
        noise[:, step] *= variance.sqrt()
        variance = 0.05 + 0.1 * noise[:, step] ** 2 + 0.85 * variance
    return noise


def _shifted(generator: Generator, count: int, steps: int) -> Tensor:
    noise = _normal(generator, count, steps)
    noise[:, steps // 2 :] += SHIFT
    return noise


def _scaled(generator: Generator, count: int, steps: int) -> Tensor:
    noise = _normal(generator, count, steps)
    noise[:, steps // 2 :] *= SCALE
    return noise


FAMILIES: dict[str, Callable[[Generator, int, int], Tensor]] = {
    "Gaussian": _normal,
    "variance schedule": _schedule,
    "Student t3": _student(3),
    "Student t4": _student(4),
    "Laplace": _laplace,
    "GARCH": _garch,
    "level shift": _shifted,
    "scale shift x10": _scaled,
}
"""By name, what draws ``u``: (generator, number of series, steps) to a float64 tensor (series, steps)."""


@dataclass(frozen=True)
class Job:
    """Some series of one family for one rule; small enough to be sent to another process.

    Attributes:
        contestant: Name of the rule.
        threshold: Its threshold; None for the one it comes with.
        family: One of :data:`FAMILIES`.
        seed: Of the series.
        count: Number of independent series.
        steps: Length of each.
    """

    contestant: str
    threshold: float | None
    family: str
    seed: int
    count: int
    steps: int


def run(job: Job) -> dict[str, Any]:
    """Replay one job.

    Returns:
        ``steps`` judged, ``refused`` of them, ``longest`` streak, ``rebased`` (times the yardstick was followed) and
        ``came_back``: the largest number of steps after half time until the first commit, None if there was none.
    """
    torch.set_num_threads(1)
    contestant = contestants()[job.contestant]
    units = FAMILIES[job.family](torch.Generator().manual_seed(job.seed), job.count, job.steps)
    offset = SHIFT if job.family == "level shift" else 0.0
    total = {"steps": 0, "refused": 0, "longest": 0, "rebased": 0, "came_back": 0}
    came_back: list[int | None] = []
    for row in units:
        refused, rebased = _replay(contestant, job.threshold, _values(row, contestant), _NOISE * offset)
        total["steps"] += job.steps - 1
        total["refused"] += sum(refused)
        total["longest"] = max(total["longest"], _longest(refused))
        total["rebased"] += rebased
        late = refused[job.steps // 2 - 1 :]
        came_back.append(late.index(False) if False in late else None)
    worst = None if None in came_back else max(index for index in came_back if index is not None)
    return {**total, "came_back": worst}


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several jobs on the same family as one."""
    backs = [part["came_back"] for part in parts]
    return {
        **{key: sum(part[key] for part in parts) for key in ("steps", "refused", "rebased")},
        "longest": max(part["longest"] for part in parts),
        "came_back": None if None in backs else max(backs),
        "per_10k": 1e4 * sum(part["refused"] for part in parts) / sum(part["steps"] for part in parts),
    }


def locked_out(contestant: Contestant, threshold: float | None, *, series: int = 10) -> bool:
    """Whether a lasting change shuts a rule: more than 30 refusals in a row after a tenfold scale, or no way back.

    The way back from a level shift may be ``rebase``; what counts is that one of the last steps is committed.
    """
    for family, most in (("scale shift x10", COMES_BACK_WITHIN), ("level shift", 999)):
        outcome = run(Job(contestant.name, threshold, family, 7, series, 2000))
        if outcome["came_back"] is None or outcome["longest"] > most:
            return True
    return False


def survives_nan(contestant: Contestant, threshold: float | None) -> bool:
    """Whether NaN and infinities are refused, and the ordinary values after them are not.

    The rule sees 200 ordinary values, then every non-finite one three times, then 100 ordinary values, of which it may
    refuse two more than a twin that saw nothing else. What only warns need not refuse.
    """
    values = _values(_normal(torch.Generator().manual_seed(7), 1, 300)[0], contestant)
    only_norm = contestant.watches == "gradient"
    bad: list[tuple[float, float | None]] = []
    for odd in (math.nan, math.inf, -math.inf):
        bad += 3 * [(0.0, odd) if only_norm else (odd, None)]
        if contestant.watches == "probe" and contestant.sees_norm:
            bad += 3 * [(values[0][0], odd)]
    rule, twin = contestant.build(threshold), contestant.build(threshold)
    for measurement, norm in values[:200]:
        _judge(rule, measurement, norm)
        _judge(twin, measurement, norm)
    spoilt = [_judge(rule, *value) for value in bad]
    after = [_judge(rule, *value) for value in values[200:]]
    usual = [_judge(twin, *value) for value in values[200:]]
    return (contestant.warns or not any(spoilt)) and after.count(False) <= usual.count(False) + 2


def _values(units: Tensor, contestant: Contestant) -> list[tuple[float, float | None]]:
    if contestant.watches == "gradient":
        return [(0.0, norm) for norm in torch.exp((_NORM_NOISE * units).clamp(-200, 200)).tolist()]
    level = 2 + torch.exp(-torch.arange(len(units), dtype=torch.float64) / 300)
    return [(value, None) for value in (level + _NOISE * units).tolist()]


def _replay(
    contestant: Contestant, threshold: float | None, values: Sequence[tuple[float, float | None]], offset: float
) -> tuple[list[bool], int]:
    """Judge a series after its first value: what was refused, and how often the yardstick was followed."""
    rule = contestant.build(threshold)
    rebase = getattr(rule, "rebase", None)
    rule.commit(*values[0])
    standing, half = values[0][0], len(values) // 2
    moved, rebased, in_row = False, 0, 0  # whether what stands was measured with the yardstick of the second half
    refused = []
    for index, value in enumerate(values[1:], start=1):
        accepted = _judge(rule, *value)
        refused.append(not accepted)
        in_row = 0 if accepted else in_row + 1
        if accepted:
            standing, moved = value[0], index >= half
        elif offset and in_row == REBASE_AFTER and index >= half and not moved and rebase is not None:
            standing, moved = standing + offset, True
            rebase(standing)
            rebased, in_row = rebased + 1, 0
    return refused, rebased


def _judge(rule: Judge, measurement: float, norm: float | None) -> bool:
    accepted = rule.judge(measurement, norm).accepted
    (rule.commit if accepted else rule.reject)(measurement, norm)
    return accepted


def _longest(refused: Sequence[bool]) -> int:
    longest = streak = 0
    for each in refused:
        streak = streak + 1 if each else 0
        longest = max(longest, streak)
    return longest
