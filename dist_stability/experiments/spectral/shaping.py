"""One run of an arm of Table 3: the data, the schedule and the label of ``runs.train``, with a protection."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dist_stability import LossProbe, StabilityController
from dist_stability.diagnostics import rksp
from dist_stability.diagnostics.kss import SpectralShaping
from dist_stability.errors import StabilityStop
from dist_stability.experiments.spectral import protection
from dist_stability.experiments.spectral.arms import ARMS, BASELINE, CONFIGURATIONS, LRS, Arm
from dist_stability.experiments.spectral.runs import BATCH, LOSS_LIMIT, WARMUP, Configuration, Run, is_diverged, worst
from dist_stability.experiments.spectral.scores import profiled_tokens
from dist_stability.experiments.spectral.tasks import loss_fn

LEARNED = 1.5
"""A run has learned the phrase when it did not blow up and its last loss is below this."""

PROBES = 2
"""Held-out batches of the controller's probe: 16 examples, as in the other experiments."""

COST_STEPS, COST_PAIRS = 20, 5
"""Steps of a run whose time is taken (two applications of the paper's schedule), and pairs of such runs."""

FITS = {"leading": rksp.Fit("pca", 32), "all": rksp.Fit()}
"""Where spectra are looked at in the end: the directions that shaping fits, and all."""


def train(subject: tuple[Run, str]) -> dict[str, Any]:
    """One run of an arm.

    The label looks, at every attempted step, at the loss of the task and at the norm of the gradient of what is
    minimised, before clipping. Where a penalty is minimised, too, its gradient is in that norm, so a second label
    looks at the gradient of the task alone, and the run goes on until that one is given, or a gradient is not finite.
    Under the controller both look at the weights it committed, as they do elsewhere at those of the last step.

    Returns:
        "diverged" and "step", the label; "task_diverged" and "task_step", the second; "by_loss": the loss went over its
        limit; "learned"; "stopped": the controller gave up; "refusals" by rung of the ladder; "skips" of the shaping;
        "step_seconds": CPU time of a step, the mean; "spectra" of a run that came to its end: M>1 and rho by fit.
    """
    run, name = subject
    arm, configuration = ARMS[name], run.configuration
    data, model = configuration.data(), configuration.model()
    if arm.spectral_norm:
        protection.normalize_spectra(model.blocks, configuration.seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=run.lr)
    scheduler = LambdaLR(optimizer, lambda accepted: min(1.0, (accepted + 1) / WARMUP))
    shaping = None if arm.shaping is None else SpectralShaping(model, preset=arm.shaping)
    objective = _objective(arm, model, shaping)
    limit = math.inf if arm.clip is None else arm.clip
    losses: list[float] = []
    norms: list[float] = []
    seconds: list[float] = []
    refusals: Counter[str] = Counter()
    labels: dict[str, int] = {}
    stopped = False
    with _controller(arm, configuration, model, optimizer, scheduler, shaping) as controller:
        for step in range(run.steps):
            batch = data.batch(configuration.seed, step, BATCH)
            begin = time.process_time()
            optimizer.zero_grad()
            task, total = objective(batch)
            paused = time.process_time()
            task_norm = None if total is task else protection.task_gradient_norm(task, parameters)
            resumed = time.process_time()
            total.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
            losses.append(float(task.detach()))
            norms.append(norm)
            if is_diverged(losses[-1], norm):
                labels.setdefault("step", step)
            if is_diverged(losses[-1], norm if task_norm is None else task_norm):
                labels["task_step"] = step
            if "task_step" in labels or not math.isfinite(norm):
                break
            if controller is None:
                optimizer.step()
                scheduler.step()
            else:
                try:
                    verdict = controller.step(grad_norm=norm, loss=losses[-1])
                except StabilityStop:
                    stopped = True
                    break
                if verdict.accepted:
                    scheduler.step()
                if verdict.rung:
                    refusals[verdict.rung] += 1
            seconds.append(time.process_time() - resumed + paused - begin)
    finished = not stopped and not labels
    return {
        "diverged": "step" in labels,
        "step": labels.get("step"),
        "task_diverged": "task_step" in labels,
        "task_step": labels.get("task_step"),
        "by_loss": not worst(losses) <= LOSS_LIMIT,
        "learned": len(losses) == run.steps and "task_step" not in labels and losses[-1] < LEARNED,
        "stopped": stopped,
        "refusals": dict(refusals),
        "skips": {} if shaping is None else shaping.skips,
        "max_loss": worst(losses),
        "max_norm": worst(norms),
        "last_loss": losses[-1],
        "step_seconds": statistics.fmean(seconds) if seconds else None,
        "spectra": _spectra(configuration, model) if finished else None,
    }


def cost(name: str) -> dict[str, Any]:
    """CPU time of a step of an arm as a ratio to one without protection: "ratio", the median of "ratios".

    Each ratio is of two short runs one after the other, so that what else the machine does slows both.
    """
    run = Run(CONFIGURATIONS[0], LRS[0], COST_STEPS)
    ratios = []
    for _ in range(COST_PAIRS):
        ours, bare = (train((run, each))["step_seconds"] for each in (name, BASELINE))
        ratios.append(ours / bare)
    return {"ratio": statistics.median(ratios), "ratios": ratios}


def _objective(arm: Arm, model: nn.Module, shaping: SpectralShaping | None) -> protection.Objective:
    if shaping is not None:
        return protection.shaped(shaping)
    if arm.gradient_penalty is not None:
        return protection.gradient_penalized(model, arm.gradient_penalty)
    return protection.bare(model)


def _controller(
    arm: Arm,
    configuration: Configuration,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    shaping: SpectralShaping | None,
) -> StabilityController | nullcontext[None]:
    """All defaults: the rule, no guards, the ladder."""
    if not arm.controller:
        return nullcontext()
    extra = {"scheduler": scheduler, **({} if shaping is None else {"shaping": shaping})}
    probe = LossProbe(loss_fn, configuration.probe_batches()[:PROBES])
    return StabilityController(model, optimizer, probe, extra_state=extra)


def _spectra(configuration: Configuration, model: nn.Module) -> dict[str, dict[str, float]]:
    ids, count = profiled_tokens(configuration)
    found = {}
    for name, fit in FITS.items():
        means = rksp.profile(model, None, ids, max_tokens=count, fit=fit).aggregates
        found[name] = {"unstable": means["unstable"].mean, "radius": means["radius"].mean}
    return found
