"""What is computed for a configuration before it is trained: the paper's scores, the baselines, the probe."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dist_stability.diagnostics import lr_probe, rksp
from dist_stability.diagnostics.quiet import quiet
from dist_stability.experiments.spectral.models import HEADS
from dist_stability.experiments.spectral.runs import (
    LOSS_LIMIT,
    NORM_LIMIT,
    Configuration,
    Run,
    train,
)
from dist_stability.experiments.spectral.tasks import Batch, loss_fn

SIGN_STEP = 10.0
"""Of the simpler probe measured beside ours: the loss after one step of 10 lr along the sign of the gradient."""

EDGE_PROBES = (8, 16)

LIMITS = lr_probe.Limits(LOSS_LIMIT, NORM_LIMIT)


def spectral(configuration: Configuration) -> dict[str, Any]:
    """Scores that do not know the learning rate: the profile's and its baselines'."""
    model, data = configuration.model(), configuration.data()
    rows = -(-max(8 * configuration.width, 512) // data.context)
    draw = torch.Generator().manual_seed(configuration.seed)
    ids = torch.randint(data.vocabulary, (rows, data.context), generator=draw)
    found = rksp.profile(model, None, ids, max_tokens=max(8 * configuration.width, 512))
    means = {name: summary.mean for name, summary in found.aggregates.items()}
    loss, norm = _initial(model, configuration.probe_batches()[0])
    return {
        "near_unit": means["near_unit"],
        "unstable": means["unstable"],
        "radius": means["radius"],
        "condition": means["condition"],
        "near_unit_log_condition": means["near_unit"] * math.log10(max(1.0, means["condition"])),
        "relative_update": means["relative_update"],
        "degenerate": found.degenerate,
        "has_norm": found.baselines.has_norm,
        "gradient_norm": norm,
        "loss": loss,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "heads": HEADS,
    }


def aware(configuration: Configuration, lrs: Sequence[float]) -> dict[str, Any]:
    """Scores of each learning rate: the probe's, and the simpler one's."""
    model, batches = configuration.model(), configuration.probe_batches()
    risks = [lr_probe.risk(model, loss_fn, batches, lr, limits=LIMITS).score for lr in lrs]
    return {"lrs": list(lrs), "risk": risks, "sign_step": _sign_steps(model, batches[0], lrs)}


def grid_point(subject: tuple[Configuration, tuple[Run, ...]]) -> dict[str, Any]:
    """All of a configuration: its scores, then its runs."""
    configuration, runs = subject
    scores = {**spectral(configuration), **aware(configuration, [run.lr for run in runs])}
    return {"scores": scores, "runs": [{key: v for key, v in train(run).items() if key != "losses"} for run in runs]}


def edge(subject: tuple[Configuration, int]) -> dict[str, Any]:
    """The true edge of a configuration, by training, and what searches with 8 and 16 virtual steps find without.

    Learning rates double from 0.002 until a run diverges; the bracket is then halved three times on a logarithmic
    scale, to a ratio of 1.09. The edge is its geometric middle.
    """
    configuration, steps = subject
    model, batches = configuration.model(), configuration.probe_batches()
    found = {}
    for length in EDGE_PROBES:
        begin = time.perf_counter()
        search = lr_probe.stable_learning_rate(model, loss_fn, batches, limits=LIMITS, steps=length)
        found[str(length)] = {"lr": search.lr, "tried": len(search.tried), "seconds": time.perf_counter() - begin}
    runs: list[tuple[float, bool]] = []

    def diverges(lr: float) -> bool:
        runs.append((lr, train(Run(configuration, lr, steps))["diverged"]))
        return runs[-1][1]

    low, high = 0.001, 0.002
    while not diverges(high) and high < 10:
        low, high = high, 2 * high
    for _ in range(3):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if diverges(middle) else (middle, high)
    return {"edge": math.sqrt(low * high), "bracket": [low, high], "found": found, "runs": runs}


def _initial(model: nn.Module, batch: Batch) -> tuple[float, float]:
    with quiet(model, 0), torch.enable_grad():
        loss = loss_fn(model, batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients))


def _sign_steps(model: nn.Module, batch: Batch, lrs: Sequence[float]) -> list[float]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    start = [matrix.detach().clone() for matrix in matrices]
    with quiet(model, 0):
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss_fn(model, batch), matrices)
        losses = []
        for lr in lrs:
            for matrix, before, gradient in zip(matrices, start, gradients, strict=True):
                matrix.copy_(before - SIGN_STEP * lr * gradient.sign())
            loss = float(loss_fn(model, batch))
            losses.append(loss if math.isfinite(loss) else math.inf)
        for matrix, before in zip(matrices, start, strict=True):
            matrix.copy_(before)
    return losses
