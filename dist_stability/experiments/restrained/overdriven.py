"""R3: the one-layer network at eight learning rates: it converges, stays bounded, or blows up (Figure 4, left)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_stability.experiments.restrained.bisection import bisect
from dist_stability.experiments.restrained.one_layer import DECAY, Network, curvature, next_number
from dist_stability.experiments.restrained.parts import Outcome, Part, Result, Settings, close, every, told

EXPECTED = {
    0.01: "converges",
    0.03: "converges",
    0.05: "bounded",
    0.07: "bounded",
    0.09: "bounded",
    0.11: "blows up",
    0.13: "blows up",
}
STEPS, LAST = 1000, 200
STARTS = tuple(0.5 + 0.25 * place for place in range(20))
WHOLE_LR, WHOLE_STEPS = 0.07, 40
"""The 1,024-dimensional network is run in the chaotic case: it agrees with the map until rounding takes over."""


def settings(quick: bool) -> list[Settings]:
    """The map, and the network."""
    return [{"name": "map", "steps": STEPS}, {"name": "network", "steps": 3 if quick else WHOLE_STEPS}]


def work(settings: Settings) -> Result:
    """One of the two."""
    return _map(settings["steps"]) if settings["name"] == "map" else _network(settings["steps"])


def conclude(results: Sequence[Result]) -> Outcome:
    """Kinds, curvatures, limit, and that map and network agree."""
    checks, rows = [], []
    for result in results:
        if "gaps" in result:
            agree = next((n for n, gap in enumerate(result["gaps"]) if gap > 1e-6), len(result["gaps"]))
            checks.append(told("steps for which network and map agree to 1e-6", [agree], "notes: about 20"))
            continue
        kinds = result["kinds"]
        rows = [[lr, expected, ", ".join(sorted(set(kinds[str(lr)])))] for lr, expected in EXPECTED.items()]
        checks += [
            every("learning rates that do from every start as published", [row[1] == row[2] for row in rows]),
            close("fixed point", [result["fixed"]], 3.865, within_fraction=1e-3),
            close("curvature there", [result["curvature"]], 62.0, within_fraction=1e-3),
            close("curvature at 0", [result["at_zero"]], -236.0, within_fraction=1e-3),
            close("largest curvature", [result["largest"]], 92.6, within_fraction=1e-3),
            close("learning rate of the first loss of stability", [result["limit"]], 0.0323, within_fraction=0.01),
        ]
    note = f"Weight decay {DECAY:g}, {len(STARTS)} starts, {STEPS} steps each."
    return Outcome(checks, ("learning rate", "published", "found"), rows, note)


def orbit(start: float, lr: float, steps: int) -> list[float]:
    """The number after each step; ends where it is beyond 1e6."""
    found = [start]
    while len(found) <= steps and abs(found[-1]) < 1e6:
        found.append(next_number(found[-1], lr))
    return found[1:]


def _kind(start: float, lr: float, steps: int) -> str:
    found = orbit(start, lr, steps)
    if len(found) < steps or abs(found[-1]) >= 1e6:
        return "blows up"
    tail = found[-LAST:]
    return "converges" if max(tail) - min(tail) < 1e-6 else "bounded"


def _map(steps: int) -> Result:
    fixed = orbit(3.0, 0.02, steps)[-1]

    def contracts(lr: float) -> bool:
        return abs(orbit(fixed + 1e-3, lr, 5 * steps)[-1] - fixed) < 1e-3

    return {
        "kinds": {str(lr): [_kind(start, lr, steps) for start in STARTS] for lr in EXPECTED},
        "orbits": {str(lr): orbit(STARTS[0], lr, 60) for lr in EXPECTED},
        "fixed": fixed,
        "curvature": curvature(fixed),
        "at_zero": curvature(0.0),
        "largest": max(curvature(0.001 * place) for place in range(20_000)),
        "limit": bisect(contracts, 0.02, 0.045, 25),
    }


def _network(steps: int) -> Result:
    network = Network(STARTS[0])
    optimizer = torch.optim.SGD(network.parameters(), lr=WHOLE_LR, weight_decay=DECAY)
    expected, gaps = orbit(STARTS[0], WHOLE_LR, steps), []
    for step in range(steps):
        optimizer.zero_grad()
        network().backward()
        optimizer.step()
        gaps.append(abs(network.number - expected[step]) / abs(expected[step]))
    return {"gaps": gaps}


PART = Part("R3", "One-layer network, over-driven (Figure 4, left)", settings, work, conclude)
