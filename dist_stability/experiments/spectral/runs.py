"""One small training run: its configuration, its label by the paper's thresholds, and its raw maxima."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dist_stability.experiments.spectral.models import SmallGPT
from dist_stability.experiments.spectral.tasks import Batch, Task, loss_fn, task

WARMUP = 10
BATCH = 8
LOSS_LIMIT, NORM_LIMIT = 50.0, 500.0
"""Diverged, by the paper: a loss or a gradient norm above these at any step; or, added here, one that is not finite."""

PROBE_BATCHES = 4
"""Batches that scores may look at; none of them is trained on."""


@dataclass(frozen=True, order=True)
class Configuration:
    """All but the learning rate: what scores see."""

    task: str
    width: int
    layers: int
    norm: str
    init: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}-w{self.width}-l{self.layers}-{self.norm}-{self.init}-s{self.seed}"

    def data(self) -> Task:
        """The task."""
        return task(self.task)

    def model(self) -> SmallGPT:
        """The model before training."""
        data = self.data()
        return SmallGPT(
            data.vocabulary,
            data.context,
            width=self.width,
            layers=self.layers,
            norm=self.norm,
            init=self.init,
            seed=1000 + self.seed,
        )

    def probe_batches(self) -> list[Batch]:
        """What scores look at: batches of their own, as large as those of training."""
        return [self.data().batch(self.seed, -1 - number, BATCH) for number in range(PROBE_BATCHES)]


@dataclass(frozen=True, order=True)
class Run:
    """One training run."""

    configuration: Configuration
    lr: float
    steps: int

    def __str__(self) -> str:
        return f"{self.configuration}-lr{self.lr:.4g}-{self.steps}"

    def to_dict(self) -> dict[str, Any]:
        """The settings, flat."""
        return {**asdict(self.configuration), "lr": self.lr, "steps": self.steps}


def train(run: Run) -> dict[str, Any]:
    """Train with AdamW, 10 steps of warmup, no clipping; stops at the first step that is diverged.

    Returns:
        "diverged", "step" (at which it diverged, or None), "max_loss", "max_norm", "first_loss", "last_loss", "losses".
        The maxima are those up to the step at which it diverged.
    """
    configuration, data = run.configuration, run.configuration.data()
    model = configuration.model()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=run.lr)
    losses, norms = [], []
    diverged = False
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.lr * min(1.0, (step + 1) / WARMUP)
        loss = loss_fn(model, data.batch(configuration.seed, step, BATCH))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        losses.append(float(loss.detach()))
        norms.append(float(norm))
        diverged = is_diverged(losses[-1], norms[-1])
        if diverged:
            break
        optimizer.step()
    return {
        "diverged": diverged,
        "step": len(losses) - 1 if diverged else None,
        "max_loss": worst(losses),
        "max_norm": worst(norms),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "losses": losses,
    }


def is_diverged(loss: float, norm: float) -> bool:
    """The label, of one step."""
    return not (loss <= LOSS_LIMIT and norm <= NORM_LIMIT)


def worst(values: Sequence[float]) -> float:
    """The largest, infinite if one is not a number."""
    return max(math.inf if math.isnan(value) else value for value in values)


def run_of(settings: Mapping[str, Any]) -> Run:
    """Undo :meth:`Run.to_dict`."""
    names = ("task", "width", "layers", "norm", "init", "seed")
    return Run(Configuration(**{name: settings[name] for name in names}), settings["lr"], settings["steps"])
