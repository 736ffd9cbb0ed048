"""Attached to somebody else's loop: what the hooks do to closures, schedulers, and loops that step out of turn."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from dist_stability import LossProbe, NonFiniteGuard, StabilityController
from dist_stability.verdict import Action


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


PROBE = LossProbe(loss_fn, [torch.ones(4, 3)])


def build() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t / 100)


def backward(model: nn.Module, poison: bool = False) -> torch.Tensor:
    model.zero_grad()
    loss = loss_fn(model, torch.randn(4, 3))
    loss.backward()
    if poison:
        model.weight.grad[0, 0] = float("nan")
    return loss


def attached(model: nn.Module, optimizer: Any, **options: Any) -> StabilityController:
    return StabilityController(model, optimizer, PROBE, guards=(NonFiniteGuard(),), **options).attach()


def test_a_scheduler_skips_the_one_call_after_a_refusal() -> None:
    model, optimizer, scheduler = build()
    attached(model, optimizer, extra_state={"scheduler": scheduler})
    rates = []
    for poison in (False, True, True, False):
        backward(model, poison)
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.005, 0.005, 0.005, 0.0025]


def test_a_scheduler_that_is_stepped_once_an_epoch_keeps_its_step() -> None:
    model, optimizer, scheduler = build()
    attached(model, optimizer, extra_state={"scheduler": scheduler})
    for poison in (False, True, False):
        backward(model, poison)
        optimizer.step()
    scheduler.step()
    assert scheduler.last_epoch == 1


def test_a_scheduler_can_still_be_saved_and_is_itself_again_after_close() -> None:
    model, optimizer, _ = build()
    plain = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    state, kind = copy.deepcopy(plain.state_dict()), type(plain)
    controller = attached(model, optimizer, extra_state={"plain": plain})
    assert isinstance(plain, kind)
    assert pickle.loads(pickle.dumps(plain.state_dict())) == state
    controller.close()
    controller.close()
    assert type(plain) is kind
    optimizer.step()  # nobody listens any more
    assert controller.verdict is None


def test_a_closure_is_guarded_and_called_once() -> None:
    model, optimizer, _ = build()
    controller = attached(model, optimizer)
    calls: list[int] = []

    def closure() -> torch.Tensor:
        calls.append(1)
        return backward(model, poison=len(calls) == 2)

    for expected in (Action.COMMIT, Action.VETO, Action.COMMIT):
        weight = model.weight.detach().clone()
        assert isinstance(optimizer.step(closure), torch.Tensor)
        assert controller.verdict is not None and controller.verdict.action is expected
        assert torch.equal(weight, model.weight) == (expected is Action.VETO)
    assert len(calls) == 3


def test_an_optimizer_that_calls_its_closure_again_is_refused() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    model, _, _ = build()
    optimizer = Twice(model.parameters(), lr=0.1)
    attached(model, optimizer)
    with pytest.raises(TypeError, match="more than once"):
        optimizer.step(lambda: backward(model))


def test_a_veto_gives_the_gradients_back() -> None:
    model, optimizer, _ = build()
    attached(model, optimizer)
    backward(model, poison=True)
    optimizer.step()
    assert model.weight.grad is not None and model.weight.grad.isnan().any()


def test_several_optimizers_make_one_proposal() -> None:
    model, _, _ = build()
    first = torch.optim.SGD([model.weight], lr=0.01)
    second = torch.optim.SGD([model.bias], lr=0.01)
    controller = attached(model, [first, second])
    backward(model)
    first.step()
    assert controller.verdict is None
    second.step()
    assert controller.verdict is not None and controller.verdict.accepted
    backward(model)
    first.step()
    with pytest.raises(RuntimeError, match="stepped twice"):
        first.step()


def test_attached_is_attached_and_step_says_so() -> None:
    model, optimizer, _ = build()
    controller = attached(model, optimizer)
    assert controller.attach() is controller
    backward(model)
    with pytest.raises(RuntimeError, match="attached"):
        controller.step()
    optimizer.step()
    assert controller.verdict is not None and controller.verdict.step == 0


def test_hooks_that_run_in_two_classes_are_found_out() -> None:
    class Louder(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    model, _, _ = build()  # SGD has an instance, so torch runs the hooks in its step as well
    louder = Louder(model.parameters(), lr=0.1)
    with attached(model, louder):
        backward(model)
        with pytest.raises(
            RuntimeError, match=r"Louder\.step\(\) began again .* it calls SGD\.step\(\).* call its step"
        ):
            louder.step()
    model, _, _ = build()
    louder = Louder(model.parameters(), lr=0.1)
    with StabilityController(model, louder, PROBE) as controller:
        backward(model)
        assert controller.step().accepted
