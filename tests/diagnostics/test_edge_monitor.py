"""The monitor on real runs: at the edge it keeps still, and it sees a poisoned optimizer that the probe does not."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from edge_models import build, data, loss_fn
from torch import Tensor, nn

from dist_stability import FixedInnovation, LossProbe, StabilityController
from dist_stability.diagnostics.edge import EdgeReading, EdgeSettings, EdgeState
from dist_stability.diagnostics.monitor import EdgeOfStabilityMonitor
from dist_stability.diagnostics.sharpness import Sharpness
from dist_stability.parallel import clip_grad_norm_
from dist_stability.rungs import Rung
from dist_stability.signals import DirectionalRatio, EffectiveStep, UpdateRms, measure, step_context
from dist_stability.testing import capture_state


class Point(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(values.clone())

    def forward(self) -> Tensor:
        return self.x


@pytest.mark.parametrize(("clip", "reuse"), [(None, False), (0.5, False), (0.5, True)])
def test_the_ratio_is_what_curvature_took_back(clip: float | None, reuse: bool) -> None:
    """On a quadratic rho = D'HD / (-g'D), with the gradient before clipping."""
    torch.manual_seed(0)
    matrix = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    model = Point(torch.randn(3, dtype=torch.float64))
    forwards = 0

    def loss(m: Any, _: object) -> Tensor:
        nonlocal forwards
        forwards += 1
        return 0.5 * m() @ matrix @ m()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.15, momentum=0.5)
    signal = DirectionalRatio(model, loss, lambda: None, every=2, reuse_loss=reuse)
    for step in range(6):
        optimizer.zero_grad()
        now = loss(model, None)
        now.backward()
        gradient, before = model.x.grad.clone(), model.x.detach().clone()
        norm = None if clip is None else nn.utils.clip_grad_norm_(model.parameters(), clip)
        found = measure(step_context(model, optimizer, grad_norm=norm, loss=now), signal, step=optimizer.step).values
        moved = model.x.detach() - before
        if step % 2:
            assert found == {}
        elif gradient @ moved >= 0:
            assert found == {"rho_uphill": 1.0}
        else:
            # torch's clipping divides by norm + 1e-6
            assert found["rho"] == pytest.approx(float(moved @ matrix @ moved / -(gradient @ moved)), rel=1e-4)
    assert forwards == 6 + (3 if reuse else 6)


def test_full_batch_descent_sits_at_the_edge_and_is_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Dropout(0.0), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    x = torch.randn(48, 6)
    y = torch.sin(2.0 * x.sum(1, keepdim=True))

    def loss(model: Any, _: object) -> Tensor:
        return ((model(x) - y) ** 2).mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    monitor = EdgeOfStabilityMonitor(Sharpness(model, optimizer, loss, [None]))
    signal = DirectionalRatio(model, loss, lambda: None)
    seen = set()
    for step in range(900):
        optimizer.zero_grad()
        now = loss(model, None)
        now.backward()
        values = measure(step_context(model, optimizer), signal, step=optimizer.step).values
        found = monitor.after_step(step, {**values, "training_loss": now.item(), "learning_rate": 0.25})
        assert found.rung is None
        seen.add(found.state)
    assert found.state is EdgeState.EDGE and seen == {EdgeState.STABLE, EdgeState.EDGE}
    assert monitor.machine.rho == pytest.approx(2.0, abs=0.1)
    ends = monitor.ends(10)
    assert ends is not None and ends.upper.value / 2 == pytest.approx(1.0, abs=0.2)


def test_a_poisoned_adam_is_seen_although_the_loss_looks_fine() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = EdgeOfStabilityMonitor()
    effective, rms = EffectiveStep(), UpdateRms()
    held = torch.randn(64, 8)
    losses, found = [], []
    for step in range(150):
        x = torch.randn(32, 8)
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        if 100 <= step < 110:
            for parameter in model.parameters():
                parameter.grad *= 300.0
        values = measure(step_context(model, optimizer), effective, rms, step=optimizer.step).values
        found.append(monitor.after_step(step, {**values, "learning_rate": 1e-3}))
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(held), held[:, :3].argmax(1))))
    assert {each.state for each in found[:110]} == {EdgeState.STABLE}
    poisoned = next(step for step, each in enumerate(found) if each.state is EdgeState.POISONED)
    assert poisoned < 145 and found[poisoned].rung is Rung.DEEP_ROLLBACK
    assert max(losses[100:]) < losses[99] + 0.5  # the bar of the published controller


def watched(rank: int, world: int, mode: str) -> tuple[list[float], int, int]:
    """A few steps with everything on; the state of the run must be what it is without."""
    images, rhos, print_ = [], [], 0
    for watching in (False, True):
        job = build(mode, rank, world, "sgd", noise=world > 1 and mode != "tp")
        sharpness = Sharpness(job.model, job.optimizer, loss_fn, [job.batch])
        monitor = EdgeOfStabilityMonitor(sharpness, EdgeSettings(first_margin=1))
        signal = DirectionalRatio(job.model, loss_fn, partial(getattr, job, "batch"), every=2)
        for step in range(4):
            job.optimizer.zero_grad()
            loss_fn(job.model, job.batch).backward()
            norm = clip_grad_norm_(job.model, list(job.model.parameters()), 0.5)
            if not watching:
                job.optimizer.step()
                continue
            context = step_context(job.model, job.optimizer, grad_norm=norm)
            values = measure(context, signal, step=job.optimizer.step).values
            rhos += [value for name, value in values.items() if name == "rho"]
            monitor.after_step(step, values)
        images.append({k: v for k, v in job.image().items() if not k.startswith("gradient object")})
        print_ = monitor.machine.fingerprint()
    for name, value in images[0].items():
        other = images[1][name]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name
    assert monitor.last is not None and len(rhos) == 2
    return rhos, print_, monitor.last.products


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_ranks_are_in_one_state_and_the_run_is_untouched(two: Any, mode: str) -> None:
    first, second = two.run(watched, mode)
    assert first == second


def ratio(rank: int, world: int, mode: str) -> float:
    job = build(mode, rank, world, "sgd")
    for _ in range(3):
        job.step()
    job.optimizer.zero_grad()
    loss_fn(job.model, job.batch).backward()
    for group in job.optimizer.param_groups:
        group["lr"] = 0.5
    signal = DirectionalRatio(job.model, loss_fn, lambda: job.batch)
    return measure(step_context(job.model, job.optimizer), signal, step=job.optimizer.step).values["rho"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "tp"])
def test_the_ratio_does_not_depend_on_the_wrapper(two: Any, mode: str) -> None:
    alone = ratio(0, 1, "single")
    assert two.run(ratio, mode) == pytest.approx([alone, alone], rel=1e-3)


def guarded(rank: int, world: int, mode: str) -> list[list[str]]:
    """A guarded run with a refusal in it, with and without the signal: the same verdicts, the same bits."""
    images, actions = [], []
    for watching in (False, True):
        job = build(mode, rank, world, "sgd", noise=True)
        signal = DirectionalRatio(job.model, loss_fn, partial(getattr, job, "batch"), every=2)
        controller = StabilityController(
            job.model,
            job.optimizer,
            LossProbe(loss_fn, [data()]),
            FixedInnovation(0.3, 0.5),
            signals=(signal,) if watching else (),
        )
        with controller:
            actions.append([])
            for step in range(7):
                job.optimizer.zero_grad()
                loss_fn(job.model, job.batch).backward()
                for parameter in job.model.parameters() if step == 4 else ():
                    if parameter.grad is not None:
                        parameter.grad.mul_(3000.0)
                actions[-1].append(controller.step().action.value)
        images.append(capture_state(job.model, job.optimizer).entries)
    for name, value in images[0].items():
        other = images[1][name]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name
    return actions


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_in_a_controller_the_signal_changes_no_bit(two: Any, mode: str) -> None:
    for without, with_it in two.run(guarded, mode):
        assert without == with_it and without.count("rollback") == 1, without


def test_bad_settings_are_named() -> None:
    model = Point(torch.ones(2))
    with pytest.raises(ValueError, match="DirectionalRatio every"):
        DirectionalRatio(model, loss_fn, lambda: None, every=0)
    raw = Sharpness(model, torch.optim.SGD(model.parameters()), loss_fn, [None], scaled=False)
    with pytest.raises(ValueError, match="scaled=True"):
        EdgeOfStabilityMonitor(raw)
    assert EdgeReading(0).finite
