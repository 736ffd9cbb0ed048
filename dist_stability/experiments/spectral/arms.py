"""The arms of Table 3: what is done against divergence, and on which runs. Fixed before the runs were made."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dist_stability.diagnostics.kss import BROAD, LOCAL, PAPER, Shaping
from dist_stability.experiments.spectral.runs import Configuration

PENALTY_WEIGHT = 0.001
"""Of the squared gradient norm. The paper does not give its own; this one is the best of 0.001, 0.01 and 0.1 on the
tuning seeds."""


@dataclass(frozen=True)
class Arm:
    """What is done against divergence.

    Attributes:
        clip: Gradient norm that is clipped to, None for no clipping.
        shaping: Settings of the spectral penalty, None for none.
        spectral_norm: The matrices of the blocks are divided by their largest singular value.
        gradient_penalty: Weight of the squared gradient norm in the loss, None for none.
        controller: A :class:`~dist_stability.StabilityController` with its defaults takes the steps.
        paper: Diverged runs of 24 in the paper's Tables 3 and 4, None where they have no such arm.
    """

    clip: float | None = None
    shaping: Shaping | None = None
    spectral_norm: bool = False
    gradient_penalty: float | None = None
    controller: bool = False
    paper: int | None = None


BASELINE = "none"
ARMS = {
    BASELINE: Arm(paper=16),
    "clip-0.5": Arm(clip=0.5, paper=12),
    "clip-1.0": Arm(clip=1.0, paper=14),
    "spectral-norm": Arm(spectral_norm=True, paper=10),
    "gradient-penalty": Arm(gradient_penalty=PENALTY_WEIGHT, paper=11),
    "kss-paper-0.10": Arm(shaping=replace(PAPER, alpha=0.10), paper=6),
    "kss-paper-0.15": Arm(shaping=PAPER, paper=3),
    "kss-paper-0.20": Arm(shaping=replace(PAPER, alpha=0.20), paper=2),
    "kss-paper-0.15+clip-1.0": Arm(clip=1.0, shaping=PAPER),
    "kss-local-0.10": Arm(shaping=replace(LOCAL, alpha=0.10)),
    "kss-local-0.15": Arm(shaping=LOCAL),
    "kss-local-0.20": Arm(shaping=replace(LOCAL, alpha=0.20)),
    "kss-local-0.15+clip-1.0": Arm(clip=1.0, shaping=LOCAL),
    "kss-broad-0.15": Arm(shaping=BROAD),
    "kss-broad-0.15+clip-1.0": Arm(clip=1.0, shaping=BROAD),
    "controller": Arm(controller=True),
    "controller+clip-1.0": Arm(clip=1.0, controller=True),
    "controller+kss-local-0.15": Arm(shaping=LOCAL, controller=True),
}

COMPARISONS = (
    ("kss-local-0.15", BASELINE),
    ("kss-local-0.15+clip-1.0", "clip-1.0"),
    ("kss-broad-0.15", BASELINE),
    ("kss-broad-0.15+clip-1.0", "clip-1.0"),
    ("controller", BASELINE),
    ("controller", "kss-local-0.15"),
    ("controller", "kss-broad-0.15"),
    ("controller", "clip-1.0"),
    ("controller+kss-local-0.15", "controller"),
    ("controller+clip-1.0", "clip-1.0"),
)
"""Pairs of arms whose counts are compared by Fisher's test."""

CONFIGURATIONS = tuple(Configuration("phrase", 64, 4, "none", "paper", seed) for seed in range(301, 313))
LRS = (0.010, 0.0125, 0.015, 0.020)
STEPS = 80
"""48 runs an arm: learning rates at which about two thirds of the unprotected runs diverged in the prototype. Settings
were tried on seeds 401 to 404 only."""
