"""A run with the monitor beside it, through a controller that only observes: what R8 and the calibration read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dist_stability import LossProbe, StabilityController
from dist_stability.diagnostics.edge import EdgeSettings
from dist_stability.diagnostics.monitor import EdgeOfStabilityMonitor
from dist_stability.diagnostics.sharpness import Sharpness
from dist_stability.signals import DirectionalRatio

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass
class Trace:
    """What was read, by step where it was not read at every one.

    Attributes:
        losses: Training loss before each step.
        norms: Gradient norm at each step.
        margins: Warm-started margins.
        rhos: Directional ratios; steps that went uphill have none.
        states: What the monitor said, after each step.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    margins: dict[int, float] = field(default_factory=dict)
    rhos: dict[int, float] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)


def watch(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    batch: Callable[[int], Any],
    steps: int,
    sharpness_batches: Sequence[Any],
    *,
    margin_every: int,
    rho_every: int,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Trace:
    """Train; ends early where a loss is not finite. In one process.

    Args:
        model: Stepped in place.
        optimizer: Its own.
        loss_fn: ``loss_fn(model, batch)``, deterministic.
        batch: Of a step.
        steps: Of the run.
        sharpness_batches: What margins are measured on.
        margin_every: Steps between margins.
        rho_every: Steps between directional ratios.
        before_step: Called with the step before its forward: a schedule.
        after_step: Called with the step after it.
    """
    trace, events = Trace(), [{}]  # type: ignore[var-annotated]
    current: list[Any] = [batch(0)]
    ratio = DirectionalRatio(model, loss_fn, lambda: current[0], every=rho_every, reuse_loss=True)
    edge = EdgeOfStabilityMonitor(
        Sharpness(model, optimizer, loss_fn, sharpness_batches), EdgeSettings(margin_every=margin_every), [ratio]
    )
    controller = StabilityController(
        model,
        optimizer,
        LossProbe(loss_fn, list(sharpness_batches)[:1]),
        mode="observe",
        edge=edge,
        trend=None,
        on_event=lambda event: events.append(event),
    )
    with controller:
        for step in range(steps):
            if before_step is not None:
                before_step(step)
            current[0] = batch(step)
            optimizer.zero_grad()
            loss = loss_fn(model, current[0])
            loss.backward()  # type: ignore[no-untyped-call]
            norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
            trace.losses.append(float(loss.detach()))
            trace.norms.append(norm)
            if not (math.isfinite(trace.losses[-1]) and math.isfinite(norm)):
                break
            controller.step(loss=loss)
            told, values = events[-1].get("edge") or {}, events[-1].get("signals") or {}
            if told.get("margin") is not None:
                trace.margins[step] = told["margin"]
            if "rho" in values:
                trace.rhos[step] = values["rho"]
            trace.states.append(told.get("state", ""))
            if after_step is not None:
                after_step(step)
    return trace
