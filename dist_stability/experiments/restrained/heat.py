"""R1: the heat equation by forward Euler, the textbook's step limit (the paper's Figure 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dist_stability.experiments.restrained.bisection import bisect
from dist_stability.experiments.restrained.parts import Outcome, Part, Result, Settings, close, every

POINTS, STEPS = 31, 4000
BOUNDED, GROWING = 0.4, 0.8
LIMIT = 0.5 / math.sin(math.pi * (POINTS - 2) / (2.0 * (POINTS - 1))) ** 2
"""1/2 on a fine grid; on this one the fastest wave is a little slower. Both ends are held at 0."""


def settings(quick: bool) -> list[Settings]:
    """One job."""
    return [{"name": "all", "points": POINTS, "steps": 50 if quick else STEPS}]


def work(settings: Settings) -> Result:
    """Growth at the two steps of the figure, and the limit."""

    def growth(step: float) -> float:
        return _growth(step, settings["points"], settings["steps"])

    return {
        "growth": {str(step): growth(step) for step in (BOUNDED, GROWING)},
        "limit": bisect(lambda step: growth(step) <= 1.0, BOUNDED, GROWING),
    }


def conclude(results: Sequence[Result]) -> Outcome:
    """Bounded, growing, and the limit between them."""
    (result,) = results
    limit, growth = result["limit"], result["growth"]
    checks = [
        every("bounded at 0.4, growing at 0.8", [growth[str(BOUNDED)] <= 1.0, growth[str(GROWING)] > 1.0]),
        close("limit", [limit], LIMIT, within_fraction=0.01),
    ]
    return Outcome(checks, ("paper", "this grid, exact", "bisection"), [[0.5, LIMIT, limit]])


def _growth(step: float, points: int, steps: int) -> float:
    """Largest value after so many steps over that before, of random values; infinite where it overflows."""
    heat = torch.randn(points, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heat[0] = heat[-1] = 0.0
    before = float(heat.abs().max())
    for _ in range(steps):
        heat[1:-1] += step * (heat[2:] - 2.0 * heat[1:-1] + heat[:-2])
    after = float(heat.abs().max())
    return after / before if math.isfinite(after) else math.inf


PART = Part("R1", "Heat equation (Figure 1)", settings, work, conclude)
