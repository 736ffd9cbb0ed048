"""Vetoes that stay on the device: a fused optimizer is told by ``found_inf`` and the host learns of it afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_stability import GradientNormGuard, LossProbe, NonFiniteGuard, StabilityController
from dist_stability.guards import Guard
from dist_stability.testing import capture_state, compare
from dist_stability.verdict import Action

FUSED = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
}


class ReadsNorm(Guard):
    reads_norm = True


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def build(optimizer: str, **options: Any) -> tuple[nn.Module, Any, StabilityController]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    made = FUSED[optimizer](model.parameters())
    options.setdefault("guards", (NonFiniteGuard(),))
    return model, made, StabilityController(model, made, LossProbe(loss_fn, [torch.ones(8, 4)]), **options)


def backward(model: nn.Module, poison: bool = False, batch: torch.Tensor | None = None) -> None:
    model.zero_grad()
    loss_fn(model, torch.randn(8, 4) if batch is None else batch).backward()
    if poison:
        next(model.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]


@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("before", [0, 3])
def test_a_device_veto_leaves_nothing_behind(optimizer: str, before: int) -> None:
    """Also before the optimizer has state, where ``found_inf`` would create it."""
    model, made, controller = build(optimizer)
    for _ in range(before):
        backward(model)
        assert controller.step().accepted
    batch = torch.randn(8, 4)  # drawn by the loader: not undone
    image = capture_state(model, made)
    backward(model, poison=True, batch=batch)
    verdict = controller.step()
    assert verdict.action is Action.VETO and "0.weight" in verdict.reason
    assert compare(image, capture_state(model, made)) == []
    assert not hasattr(made, "found_inf")


def test_the_flag_stays_on_the_device_only_where_that_is_exact() -> None:
    """The optimizer's own step runs on a device veto, and is not called on a host veto."""
    for optimizer, guards, runs in (
        ("adamw", (NonFiniteGuard(),), True),
        ("adamw", (NonFiniteGuard(), GradientNormGuard()), True),
        ("adamw", (NonFiniteGuard(), ReadsNorm()), False),  # needs the norm on the host before the step
    ):
        model, made, controller = build(optimizer, guards=guards)
        backward(model)
        controller.step()
        stepped: list[float] = []
        made.register_step_pre_hook(lambda o, *_, seen=stepped: seen.append(float(o.found_inf)))
        backward(model, poison=True)
        assert controller.step().action is Action.VETO
        assert stepped == ([1.0] if runs else [])


@pytest.mark.parametrize("given", [False, True])
def test_a_norm_beyond_the_limit_is_vetoed_on_the_device(given: bool) -> None:
    """With a caller's norm and without; the host learns of it only after the optimizer's no-op."""
    model, made, controller = build("adamw", guards=(GradientNormGuard(),))
    stepped: list[float] = []
    made.register_step_pre_hook(lambda o, *_: stepped.append(float(getattr(o, "found_inf", 0.0))))
    actions = []
    for attempt in range(12):
        backward(model)
        if attempt == 10:
            image = capture_state(model, made)
            for parameter in model.parameters():
                parameter.grad.mul_(1e4)  # type: ignore[union-attr]
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        verdict = controller.step(grad_norm=norm if given else None)
        actions.append(verdict.action)
        if attempt == 10:
            assert "gradient norm" in verdict.reason and "scales above" in verdict.reason
            weights = [line for line in compare(image, capture_state(model, made)) if line.startswith("parameter")]
            assert not weights
    assert actions == [Action.COMMIT] * 10 + [Action.VETO, Action.COMMIT]
    # The first step has no optimizer state yet, so there the host waits.
    assert stepped[-2:] == [1.0, 0.0] and not any(stepped[:-2])


def test_a_found_inf_that_is_already_there_is_kept() -> None:
    model, made, controller = build("adamw")
    backward(model)
    controller.step()
    made.found_inf = torch.tensor(1.0)
    image = capture_state(model, made)
    backward(model)
    controller.step()
    assert made.found_inf.item() == 1.0
    assert [line for line in compare(image, capture_state(model, made)) if line.startswith("parameter")] == []


def test_a_callers_norm_vetoes_without_a_vote_before_the_step() -> None:
    model, made, controller = build("adamw")
    seen: list[str] = []
    controller.add_phase_listener(lambda _, phase: seen.append(phase))
    for norm, action in ((1.0, Action.COMMIT), (float("nan"), Action.VETO), (float("inf"), Action.VETO)):
        batch = torch.randn(8, 4)
        image = capture_state(model, made)
        backward(model, batch=batch)
        assert controller.step(grad_norm=norm).action is action
        assert bool(compare(image, capture_state(model, made))) == (action is Action.COMMIT)
    assert "veto vote" not in seen


def test_resuming_from_a_checkpoint_goes_on_as_if_never_stopped() -> None:
    def losses(stop: int | None) -> tuple[Any, list[Any]]:
        model, made, controller = build("adamw")
        verdicts = []
        for attempt in range(24):
            if attempt == stop:
                saved = [thing.state_dict() for thing in (model, made, controller)]
                random = torch.get_rng_state()
                controller.close()
                model, made, controller = build("adamw")
                for thing, state in zip((model, made, controller), saved, strict=True):
                    thing.load_state_dict(state)
                torch.set_rng_state(random)
            backward(model, poison=attempt == 15)
            if attempt in (18, 19):
                for parameter in model.parameters():
                    parameter.grad.mul_(300)  # type: ignore[union-attr]
            verdicts.append(controller.step())
        return capture_state(model, made), verdicts

    image, verdicts = losses(None)
    resumed, again = losses(12)
    assert compare(image, resumed) == []
    assert verdicts == again
    assert [v.step for v in verdicts if v.action.refused] == [15, 18, 19]
