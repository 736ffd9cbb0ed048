"""Where the host's time goes: every second of the guard in one part, and none of anybody else's."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from dist_stability import LossProbe, NonFiniteGuard, StabilityController

FORWARD, STEP, PROBE, GUARD, LISTENER, STATE, LOOP = 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7


class Clock:
    """Stands still unless somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def guarded(clock: Clock, events: list[dict[str, Any]], **options: Any) -> tuple[Any, Any, StabilityController]:
    class Optimizer(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            clock.work(STEP)
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)

    class Guard(NonFiniteGuard):
        def flag(self, gradients: Any) -> torch.Tensor:
            clock.work(GUARD)
            return super().flag(gradients)

    class Schedule:
        def state_dict(self) -> dict[str, Any]:
            clock.work(STATE)
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            clock.work(STATE)

    class Buffer(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock.work(FORWARD)
            return super().forward(x)

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        clock.work(PROBE)
        return model(batch).square().mean()

    def listener(event: dict[str, Any]) -> None:
        clock.work(LISTENER)
        events.append(event)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), Buffer(3))
    optimizer = Optimizer(model.parameters(), {})
    probe = LossProbe(loss_fn, [torch.ones(4, 3)])
    controller = StabilityController(
        model, optimizer, probe, guards=(Guard(),), extra_state={"s": Schedule()}, on_event=listener, **options
    )
    return model, optimizer, controller


def work(clock: Clock, model: nn.Module, poison: bool) -> None:
    clock.work(LOOP)
    model.zero_grad()
    model(torch.randn(4, 3)).square().mean().backward()
    if poison:
        next(model.parameters()).grad[0, 0] = float("nan")


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("decision", ["immediate", "deferred"])
def test_every_second_of_the_guard_is_in_one_part(clock: Clock, attached: bool, decision: str) -> None:
    events: list[dict[str, Any]] = []
    model, optimizer, controller = guarded(clock, events, decision=decision)
    if attached:
        controller.attach()
    begin, steps = clock.now, 6
    poisoned = {3} if decision == "immediate" else set()
    for step in range(steps):
        work(clock, model, step in poisoned)
        if attached:
            optimizer.step()
        else:
            controller.step()
    controller.finish()
    elapsed = clock.now - begin
    controller.close()
    assert len(events) == steps
    stepped = steps if attached else steps - len(poisoned)  # attached, the optimizer steps without gradients
    mine = sum(value for event in events for part, value in event["seconds"].items() if part != "step")
    assert mine == elapsed - steps * (LOOP + FORWARD + LISTENER) - stepped * STEP
    for event in events:
        seconds = dict(event["seconds"])
        vetoed = event["attempt"] in poisoned
        assert seconds.pop("guards") == GUARD
        assert seconds.pop("other") == STATE, "the state of the schedule, on entry"
        assert seconds.pop("probe") == PROBE + FORWARD
        assert seconds.pop("step", 0.0) == (0.0 if attached or vetoed else STEP)
        assert not any(seconds.values()), seconds


def test_a_capture_in_the_forward_has_a_part_of_its_own(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[dict[str, Any]] = []
    model, _, controller = guarded(clock, events)
    capture = controller._recovery.capture_forward

    def slow(*args: Any) -> None:
        clock.work(7.0)
        capture(*args)

    monkeypatch.setattr(controller._recovery, "capture_forward", slow)
    for _ in range(2):
        work(clock, model, False)
        controller.step()
    controller.close()
    assert [event["seconds"]["capture"] for event in events] == [7.0, 7.0]
    assert [event["seconds"]["other"] for event in events] == [STATE, STATE]
