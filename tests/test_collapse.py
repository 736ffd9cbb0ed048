"""A poisoned second moment: nothing rises, the run just stands still; the effective step shows it at once."""

from __future__ import annotations

import json
import math
from typing import Any

import harness
import pytest
import zoo
from zoo import Case

from dist_stability.collapse import StepCollapse
from dist_stability.parallel import local
from dist_stability.signals import Signal, UpdateRatio
from dist_stability.testing import compare

BAD = 20


def fed(collapse: StepCollapse, steps: list[float]) -> list[int]:
    refused = []
    for index, step in enumerate(steps):
        if collapse.judge(step) is None:
            collapse.commit(step)
        else:
            collapse.reject(step)
            refused.append(index)
    return refused


def usual(count: int) -> list[float]:
    return [0.5 * math.exp(0.2 * math.sin(7 * index)) for index in range(count)]


def test_a_fall_is_refused_and_a_rise_is_not() -> None:
    assert fed(StepCollapse(), [*usual(40), 0.05, *usual(5), 50.0, *usual(5)]) == [40]
    assert fed(StepCollapse(), [0.5 * 0.97**index for index in range(200)]) == [], "a slow fall is ordinary"


def test_what_is_unknown_says_nothing() -> None:
    collapse = StepCollapse()
    fed(collapse, usual(20))
    for value in (None, 0.0, math.nan, math.inf, -1.0):
        assert collapse.judge(value) is None
        collapse.commit(value)
        collapse.reject(value)
    assert "usually 0.5" in (collapse.judge(1e-3) or "")


def test_it_gives_in_to_what_lasts_and_resumes_exactly() -> None:
    collapse = StepCollapse(patience=8)
    refused = fed(collapse, [*usual(40), *([0.01] * 30)])
    assert refused == list(range(40, 40 + len(refused))) and 1 < len(refused) <= 8
    other = StepCollapse(patience=8)
    other.load_state_dict(json.loads(json.dumps(collapse.state_dict())))
    assert [other.judge(step) for step in (0.01, 1e-4)] == [collapse.judge(step) for step in (0.01, 1e-4)]


class Silent(Signal):
    """In the place of the free signal: measures nothing."""

    name = "effective_step"


def poisoned(rank: int, world: int, mode: str, signal: str) -> tuple[list[Any], list[str]]:
    """The second moment grows 10,000-fold just before a step; the twin never took that step."""
    case = Case(mode, optimizer="adamw-foreach", ranks=world, steps=30, draws=False)
    setup = zoo.build(case, rank, world)
    events: list[dict[str, Any]] = []

    def poison(optimizer: Any, *_: Any) -> None:
        if len(events) == BAD:
            for state in optimizer.state.values():
                local(state["exp_avg_sq"]).mul_(1e4)

    setup.optimizers[0].register_step_pre_hook(poison)
    signals = {"free": (), "weights": (UpdateRatio(),), "none": (Silent(),)}[signal]
    seen = zoo.train(case, rank, world, setup=setup, signals=signals, on_event=events.append)
    twin = zoo.train(case, rank, world, guarded=False, skip=frozenset({BAD}))
    refused = [(event["attempt"], event["rung"], event["reason"]) for event in events if event["rung"]]
    return refused, compare(seen.image, twin.image)


@pytest.mark.parametrize("signal", ["free", "weights"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp2-uneven"])
def test_a_poisoned_second_moment_is_refused_and_undone(two: harness.Pool, mode: str, signal: str) -> None:
    for refused, wrong in two.run(poisoned, mode, signal):
        ((attempt, rung, reason),) = refused
        assert (attempt, rung) == (BAD, "skip") and "second moment may be poisoned" in reason
        assert wrong == []


def test_without_the_signal_nobody_sees_it(two: harness.Pool) -> None:
    for refused, wrong in two.run(poisoned, "ddp", "none"):
        assert refused == [] and wrong, "otherwise the signal would be worth nothing"
