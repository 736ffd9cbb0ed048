"""The arms of Table 3: clipping and spectral shaping on models without normalization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from dist_stability.diagnostics.kss import LOCAL, PAPER, Shaping, SpectralShaping
from dist_stability.experiments.spectral.runs import BATCH, WARMUP, Configuration, Run, is_diverged, worst
from dist_stability.experiments.spectral.tasks import loss_fn

LEARNED = 1.5
"""A run has learned the phrase when it did not diverge and its last loss is below this."""


@dataclass(frozen=True)
class Arm:
    """What is done against divergence.

    Attributes:
        clip: Gradient norm that is clipped to, None for no clipping.
        shaping: Settings of the penalty, None for no penalty.
        paper: Diverged runs of 24 in the paper's Table 3, None where it has no such arm.
    """

    clip: float | None = None
    shaping: Shaping | None = None
    paper: int | None = None


ARMS = {
    "none": Arm(paper=16),
    "clip-0.5": Arm(clip=0.5, paper=12),
    "clip-1.0": Arm(clip=1.0, paper=14),
    "kss-paper-0.15": Arm(shaping=PAPER, paper=3),
    "kss-local-0.15": Arm(shaping=LOCAL),
    "kss-local-0.15+clip-1.0": Arm(clip=1.0, shaping=LOCAL),
}

CONFIGURATIONS = tuple(Configuration("phrase", 64, 4, "none", "paper", seed) for seed in range(301, 313))
LRS = (0.010, 0.0125, 0.015, 0.020)
STEPS = 80
"""48 runs an arm: learning rates at which about two thirds of the unprotected runs diverged in the prototype."""


def train(subject: tuple[Run, str]) -> dict[str, Any]:
    """One run of an arm; the data and the schedule of ``runs.train``. The label looks at the norm before clipping."""
    run, name = subject
    arm, configuration = ARMS[name], run.configuration
    data, model = configuration.data(), configuration.model()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=run.lr)
    shaping = None if arm.shaping is None else SpectralShaping(model, preset=arm.shaping)
    losses, norms = [], []
    diverged = False
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.lr * min(1.0, (step + 1) / WARMUP)
        batch = data.batch(configuration.seed, step, BATCH)
        optimizer.zero_grad()
        loss = loss_fn(model, batch) if shaping is None else shaping(loss_fn, batch)
        loss.backward()
        penalty = 0.0 if shaping is None or shaping.last is None else shaping.last.penalty
        losses.append(float(loss.detach()) - penalty)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if arm.clip is None else arm.clip)))
        diverged = is_diverged(losses[-1], norms[-1])
        if diverged:
            break
        optimizer.step()
    return {
        "diverged": diverged,
        "step": len(losses) - 1 if diverged else None,
        "learned": not diverged and losses[-1] < LEARNED,
        "max_loss": worst(losses),
        "max_norm": worst(norms),
        "last_loss": losses[-1],
        "skips": {} if shaping is None else shaping.skips,
    }
