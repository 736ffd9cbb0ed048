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

WALK, RAY = 16, 20
"""Virtual steps, and distances along the ray, that candidates for the probe were chosen from."""

LIMITS = lr_probe.Limits(LOSS_LIMIT, NORM_LIMIT)


def spectral(configuration: Configuration) -> dict[str, Any]:
    """Scores that do not know the learning rate: the profile's and its baselines'."""
    model = configuration.model()
    ids, count = profiled_tokens(configuration)
    found = rksp.profile(model, None, ids, max_tokens=count)
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


def profiled_tokens(configuration: Configuration) -> tuple[torch.Tensor, int]:
    """Random tokens for a profile, int64 of (examples, context), and how many of them are looked at: 8 a dimension."""
    data, count = configuration.data(), max(8 * configuration.width, 512)
    draw = torch.Generator().manual_seed(configuration.seed)
    return torch.randint(data.vocabulary, (-(-count // data.context), data.context), generator=draw), count


def aware(configuration: Configuration, lrs: Sequence[float]) -> dict[str, Any]:
    """Scores of each learning rate: the probe's, and the simpler one's."""
    model, batches = configuration.model(), configuration.probe_batches()
    risks = [lr_probe.risk(model, loss_fn, batches, lr, limits=LIMITS).score for lr in lrs]
    losses, _ = _along_ray(model, batches[0], [SIGN_STEP * lr for lr in lrs])
    return {"lrs": list(lrs), "risk": risks, "sign_step": losses}


def curves(subject: tuple[Configuration, tuple[float, ...]]) -> dict[str, Any]:
    """What the candidates for the probe see: losses and gradient norms on two ways from the start, for each rate.

    Returns:
        "walk": of virtual Adam steps, the start first, fewer where they blew up; "ray": at 1, 2, .. times the rate
        along the sign of the first gradient.
    """
    configuration, lrs = subject
    model, batches = configuration.model(), configuration.probe_batches()
    found: dict[str, Any] = {"lrs": list(lrs), "walk": [], "ray": []}
    for lr in lrs:
        risk = lr_probe.risk(model, loss_fn, batches, lr, steps=WALK, limits=LIMITS)
        found["walk"].append([list(risk.losses), list(risk.gradient_norms)])
        losses, norms = _along_ray(model, batches[0], [distance * lr for distance in range(RAY + 1)])
        found["ray"].append([losses, norms])
    return found


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


def _along_ray(model: nn.Module, batch: Batch, distances: Sequence[float]) -> tuple[list[float], list[float]]:
    """Loss and gradient norm after one step of each length along the sign of the gradient; infinite if not finite."""
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    start = [matrix.detach().clone() for matrix in matrices]
    losses, norms = [], []
    with quiet(model, 0):
        with torch.enable_grad():
            direction = [gradient.sign() for gradient in torch.autograd.grad(loss_fn(model, batch), matrices)]
        for distance in distances:
            for matrix, before, sign in zip(matrices, start, direction, strict=True):
                matrix.copy_(before - distance * sign)
            with torch.enable_grad():
                loss = loss_fn(model, batch)
                gradients = torch.autograd.grad(loss, parameters)
            losses.append(_or_infinite(float(loss.detach())))
            norms.append(_or_infinite(float(torch.nn.utils.get_total_norm(gradients))))
        for matrix, before in zip(matrices, start, strict=True):
            matrix.copy_(before)
    return losses, norms


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
