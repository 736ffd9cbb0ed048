"""Which runs there are. Fixed before they were made: nothing here was chosen by looking at their outcome."""

from __future__ import annotations

from dataclasses import dataclass

from dist_stability.experiments.spectral.models import INITS, NORMS
from dist_stability.experiments.spectral.runs import Configuration, Run


@dataclass(frozen=True)
class Grid:
    """Configurations by learning rates.

    Attributes:
        name: For folders and pages.
        configurations: All of them.
        lrs: Learning rates, each for every configuration.
        steps: Of a run.
    """

    name: str
    configurations: tuple[Configuration, ...]
    lrs: tuple[float, ...]
    steps: int

    def runs(self, configuration: Configuration) -> list[Run]:
        """Those of one configuration, by rising learning rate."""
        return [Run(configuration, lr, self.steps) for lr in self.lrs]


PAPER = Grid(
    "paper",
    tuple(
        Configuration("phrase", 64, layers, norm, "paper", seed)
        for seed in (42, 123)
        for layers in (4, 8)
        for norm in NORMS
    ),
    (1e-3, 5e-3, 1e-2, 3e-2),
    60,
)
"""The paper's comparison in the small: one initialization, six norms. What the score M~1 is measured on."""

DESIGN = Grid(
    "design",
    tuple(
        Configuration("phrase", 32, layers, norm, init, seed)
        for seed, layers, norms in (
            (0, 4, ("none", "pre", "post", "deep", "rms", "sub")),
            (1, 8, ("none", "pre", "post", "deep")),
            (2, 2, ("none", "post")),
        )
        for norm in norms
        for init in INITS
    ),
    tuple(1e-3 * 10 ** (place / 2) for place in range(8)),
    60,
)
"""What the learning-rate probe was designed on, and nothing else: one task, one width, seeds 0 to 2."""

HELD_OUT = Grid(
    "held-out",
    tuple(
        Configuration(task, width, layers, norm, init, 101 + layers)
        for task, width, layers in (("recall", 24, 6), ("english", 48, 3), ("synthetic", 40, 4))
        for norm in NORMS
        for init in INITS
    ),
    (3e-3, 1e-2, 2e-2, 4e-2, 8e-2, 2e-1, 4e-1, 8e-1, 1.6),
    60,
)
"""Other tasks, widths, depths and seeds: looked at once, after the probe was frozen."""

_SIZES = (
    ("recall", 24, 2),
    ("recall", 64, 8),
    ("english", 32, 8),
    ("english", 64, 2),
    ("synthetic", 24, 8),
    ("synthetic", 64, 3),
)

NEAR_NONE = Grid(
    "near-none",
    tuple(Configuration(task, width, layers, "none", init, 301) for task, width, layers in _SIZES for init in INITS),
    tuple(0.006 * 1.5**place for place in range(8)),
    60,
)
"""Models without normalization of many sizes, learning rates close together where their edges lie: the hard question
within a family, where the learning rate alone has less to say. Added after HELD_OUT was looked at, before its own runs
were made."""

NEAR_NORM = Grid(
    "near-norm",
    tuple(
        Configuration(task, width, layers, norm, init, 302)
        for task, width, layers in _SIZES[:1] + _SIZES[2:3] + _SIZES[-1:]
        for norm in ("pre", "post", "sub")
        for init in INITS
    ),
    tuple(0.3 * 1.5**place for place in range(5)),
    60,
)
"""The same with normalization."""

GRIDS = {grid.name: grid for grid in (PAPER, DESIGN, HELD_OUT, NEAR_NONE, NEAR_NORM)}

_KINDS = (("none", "paper"), ("none", "torch"), ("pre", "xavier"), ("post", "paper"), ("sub", "torch"))

EDGES = {
    "design": DESIGN.configurations,
    "first": tuple(
        Configuration(task, width, layers, norm, init, 201)
        for task, width, layers in (("recall", 40, 3), ("english", 24, 5), ("synthetic", 32, 2))
        for norm, init in _KINDS
    ),
    "second": tuple(
        Configuration(task, width, layers, norm, init, 202)
        for task, width, layers in (("recall", 28, 4), ("english", 56, 3), ("synthetic", 24, 6))
        for norm, init in _KINDS
    ),
}
"""Configurations whose true edge is found by training, for the stable-learning-rate search. The first 15 were
looked at with searches of 8 virtual steps; then, by the spread on the design grid, 16 became their default; the second
were made after that. "design" is the grid that this was chosen on."""

EDGE_STEPS = 60
