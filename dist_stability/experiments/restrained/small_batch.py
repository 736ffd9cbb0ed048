"""Small-batch AdamW runs with the monitor beside them, at learning rates around those at which some fail.

A run *fails later* if, after a healthy start, its loss ends above where it was: see :func:`label`. What the monitor
and plain numbers said up to then are its features: see :func:`features`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from dist_stability.experiments.data import BatchOrder
from dist_stability.experiments.restrained.networks import small_digits
from dist_stability.experiments.restrained.parts import Result, Settings
from dist_stability.experiments.restrained.watched import Trace, watch
from dist_stability.experiments.spectral import tasks
from dist_stability.experiments.spectral.models import SmallGPT
from dist_stability.experiments.spectral.runs import is_diverged

WARMUP, DECIDED, STEPS = 10, 60, 240
"""Steps of linear warm-up; after how many the features are read; steps of a run."""

SPAN, FAILED = 20, 1.1
"""Losses in the means that are compared, and their ratio above which a run has failed."""

LATER = 20
"""The digits' margins and ratios count from this step on."""

BATCH, MARGIN_BATCHES, MARGIN_EVERY, RHO_EVERY = 8, 4, 5, 2

TASKS = {
    "english": (0.008, 0.012, 0.015, 0.02, 0.025, 0.03),
    "digits": (0.01, 0.02, 0.03, 0.05, 0.08, 0.12),
}
"""A GPT of two blocks without normalization, an MLP; learning rates from healthy ones to such at which runs fail."""

FEATURES = {
    "margin": "largest margin",
    "margin_median": "median margin",
    "rho": "median rho",
    "rho_high": "share of rho above 2",
    "lr": "learning rate",
    "loss": "mean loss before the decision",
    "norm": "largest gradient norm over the median",
}


def train(settings: Settings) -> Result:
    """One run: its features, and its label."""
    model, batch, measured, loss_fn = _task(settings["task"], settings["seed"])
    lr = settings["lr"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def warm_up(step: int) -> None:
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / WARMUP)

    trace = watch(
        model,
        optimizer,
        loss_fn,
        batch,
        min(DECIDED, settings["steps"]),
        measured,
        margin_every=MARGIN_EVERY,
        rho_every=RHO_EVERY,
        before_step=warm_up,
    )
    losses, norms = list(trace.losses), list(trace.norms)
    while len(losses) < settings["steps"] and not is_diverged(losses[-1], norms[-1]):
        optimizer.zero_grad()
        loss = loss_fn(model, batch(len(losses)))
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        optimizer.step()
    diverged = is_diverged(losses[-1], norms[-1])
    return {
        "label": label(losses, diverged),
        "features": features(trace) | {"lr": lr},
        "states": trace.states,
        "losses": losses,
    }


def label(losses: Sequence[float], diverged: bool) -> str:
    """One of "failed early" (before the decision), "fails later" and "healthy".

    Early: it diverged by then, or the loss before the decision is not below the first one. Later: it diverged, or the
    mean of the last losses is more than a tenth above that before the decision.
    """
    before = losses[DECIDED - SPAN : DECIDED]
    if len(losses) <= DECIDED or not fmean(before) < losses[0]:
        return "failed early"
    return "fails later" if diverged or fmean(losses[-SPAN:]) > FAILED * fmean(before) else "healthy"


def features(trace: Trace) -> dict[str, float | None]:
    """What was known when the decision was taken; None where nothing was measured."""
    margins = [value for step, value in trace.margins.items() if LATER <= step < DECIDED]
    rhos = [value for step, value in trace.rhos.items() if LATER <= step < DECIDED]
    losses, norms = trace.losses[:DECIDED], trace.norms[:DECIDED]
    return {
        "margin": max(margins, default=None),
        "margin_median": median(margins) if margins else None,
        "rho": median(rhos) if rhos else None,
        "rho_high": fmean(value > 2.0 for value in rhos) if rhos else None,
        "loss": fmean(losses[-SPAN:]),
        "norm": max(norms[LATER:], default=0.0) / median(norms),
    }


Made = tuple[nn.Module, Callable[[int], Any], list[Any], Callable[[nn.Module, Any], Tensor]]


def _task(name: str, seed: int) -> Made:
    """Model, training batches, batches for the margin, loss."""
    if name == "english":
        data = tasks.task(name)
        model = SmallGPT(data.vocabulary, data.context, width=32, layers=2, norm="none", init="paper", seed=seed)
        held = [data.batch(seed, -1 - number, BATCH) for number in range(MARGIN_BATCHES)]
        return model, lambda step: data.batch(seed, step, BATCH), held, tasks.loss_fn
    images = small_digits()
    order = BatchOrder(1437, BATCH, seed=seed)
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, 128, 128):
        layers += [nn.Linear(inputs, 128), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(128, 10))
    held = [images.batch(torch.arange(1437 + BATCH * n, 1437 + BATCH * (n + 1))) for n in range(MARGIN_BATCHES)]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return network, lambda step: images.batch(order.global_batch(step)), held, loss_fn
