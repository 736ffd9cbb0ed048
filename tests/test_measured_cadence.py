"""``every="auto"``: the interval follows what judging costs, keeps the bound, and is the same on all ranks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import harness
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dist_stability import FixedInnovation, LossProbe, MeasuredCadence, StabilityController
from dist_stability.measured_cadence import LONG, REST, SAMPLES, SLACK, WARM_UP
from dist_stability.testing import compare

Times = Callable[[int, int], float]
"""(attempt, length of the period that ended there) -> seconds."""


class Machine:
    """What a controller tells a cadence, with times given: the time of a period comes with the judged attempt after."""

    def __init__(
        self, cadence: MeasuredCadence, times: Times, refused: Callable[[int], bool] = lambda t: False
    ) -> None:
        self.cadence, self.times, self.refused = cadence, times, refused
        self.judged: list[int] = []
        self.notes: list[tuple[int, str]] = []
        self.attempt = 0
        self._last: float | None = None

    def run(self, attempts: int) -> Machine:
        for t in range(self.attempt, self.attempt + attempts):
            judged = self.cadence.judged(t)
            seconds = self._last if judged else None
            if judged:
                before = self.judged[-1] if self.judged else None
                self._last = None if before is None else self.times(t, t - before)
                self.judged.append(t)
            note = self.cadence.record(attempt=t, judged=judged, accepted=not self.refused(t), seconds=seconds)
            self.notes += [(t, note)] if note else []
        self.attempt += attempts
        return self


def steady(plain: float, cost: float) -> Times:
    return lambda attempt, length: plain * length + cost


def rounds(cadence: MeasuredCadence) -> int:
    """More attempts than one rest and one round take."""
    return (REST + 2 * SAMPLES + WARM_UP + 4) * max(LONG, cadence.most)


def lowest(ratio: float, bound: float, most: int) -> int:
    """By brute force: the smallest interval whose judged attempts, those of the rounds included, keep the bound."""
    for k in range(1, most):
        periods = [k] * REST + [1, min(max(LONG, k), most)] * SAMPLES
        if ratio * len(periods) / sum(periods) <= bound:
            return k
    return most


@pytest.mark.parametrize(
    ("cost", "interval"), [(0.0, 1), (0.015, 1), (0.1, 6), (0.5, 28), (0.9, 50), (5.0, 64)], ids=lambda x: f"{x:g}"
)
def test_the_interval_follows_the_cost(cost: float, interval: int) -> None:
    machine = Machine(MeasuredCadence(), steady(1.0, cost)).run(400)
    assert machine.cadence.interval == interval == lowest(cost, 0.02, 64)
    assert len(machine.notes) >= 1


@given(
    st.floats(1e-4, 10.0),
    st.floats(0.0, 3.0),
    st.sampled_from([0.005, 0.02, 0.1, 1.0]),
    st.integers(2, 64),
    st.floats(0, 0.001),
)
@settings(max_examples=150, deadline=None)
def test_the_bound_is_kept_over_whole_cycles(plain: float, ratio: float, bound: float, most: int, noise: float) -> None:
    """Counted, not computed: what the judged attempts of several cycles cost, over what the steps cost."""

    def times(attempt: int, length: int) -> float:
        return plain * (length + ratio) * (1 + noise * ((attempt * 7919) % 11 - 5) / 5)

    cadence = MeasuredCadence(bound, most)
    machine = Machine(cadence, times).run(WARM_UP + SAMPLES * (2 + LONG) + 8)
    start = next(t for t, _ in machine.notes) + 1
    machine.run(3 * rounds(cadence))
    ends = [t for t, _ in machine.notes]
    cycle = [t for t in machine.judged if start <= t <= ends[-1]]
    overhead = ratio * len(cycle) / (ends[-1] + 1 - start)
    # The times are off by up to 2 * noise of a long period, and so is the cost that is derived from them.
    margin = 1 + 2 * noise * (most + ratio) / max(ratio, 1e-9)
    assert overhead <= bound * margin * 1.02 or cadence.interval == most
    assert cadence.interval <= most
    if noise == 0:
        assert (
            abs(cadence.interval - lowest(ratio, bound, most)) <= 1
        )  # one off where the bound falls on a whole number


def test_the_note_says_what_was_measured() -> None:
    machine = Machine(MeasuredCadence(bound=0.05), steady(0.2, 0.03)).run(60)
    (attempt, note), *_ = machine.notes
    assert note == (
        "judging every 4th attempt costs 4 % (bound 5 %): probe, vote and snapshot take 30 ms, a plain step 200 ms"
    )
    assert attempt < (WARM_UP + 2 * SAMPLES) * LONG
    too_much = Machine(MeasuredCadence(most=3), steady(1.0, 1.0)).run(60).notes[0][1]
    assert too_much.endswith("the bound would need a longer interval than most=3") and "every 3rd" in too_much
    assert "every single attempt" in Machine(MeasuredCadence(), steady(1.0, 0.0)).run(60).notes[0][1]


def test_between_rounds_the_interval_stands() -> None:
    machine = Machine(MeasuredCadence(), steady(1.0, 0.1)).run(2000)
    gaps = [b - a for a, b in zip(machine.judged, machine.judged[1:], strict=False)]
    assert set(gaps) == {1, LONG, 6} and gaps.count(1) < 0.2 * len(gaps)
    start = machine.judged.index(machine.notes[0][0])
    assert gaps[start : start + REST] == [6] * REST


def test_a_higher_cost_is_followed_at_once_and_a_lower_one_with_a_margin() -> None:
    cost = {"now": 0.2}
    machine = Machine(MeasuredCadence(), lambda t, n: n + cost["now"])
    assert machine.run(rounds(machine.cadence)).cadence.interval == 11
    cost["now"] = 0.21
    assert machine.run(rounds(machine.cadence)).cadence.interval == 12
    cost["now"] = 0.21 / (1 + SLACK) + 0.01  # within the margin
    assert machine.run(rounds(machine.cadence)).cadence.interval == 12
    cost["now"] = 0.1
    assert machine.run(rounds(machine.cadence)).cadence.interval == lowest(0.1 * (1 + SLACK), 0.02, 64) == 7


def test_outliers_and_the_warm_up_do_not_count() -> None:
    def times(attempt: int, length: int) -> float:
        if attempt < WARM_UP:
            return 100.0
        return length + 0.1 + (50.0 if attempt % 6 == 0 else 0.0)  # fewer than half, in either kind

    assert Machine(MeasuredCadence(), times).run(60).cadence.interval == 6


def test_periods_with_a_refusal_do_not_count() -> None:
    """A refused attempt, and what its restore takes after it, would make the steps look long."""
    refused = {t for t in range(4000) if t % 13 == 0}
    spoiled: list[int] = []

    def times(attempt: int, length: int) -> float:
        touched = any(t in refused for t in range(attempt - length, attempt + 1))
        spoiled.append(attempt) if touched else None
        return 1000.0 if touched else length + 0.1

    machine = Machine(MeasuredCadence(), times, refused.__contains__).run(300)
    assert machine.cadence.interval == 6 and spoiled


def test_unknown_and_impossible_times_are_passed_over() -> None:
    machine = Machine(MeasuredCadence(), lambda t, n: [math.nan, math.inf, 0.0, -1.0][t % 4]).run(300)
    assert machine.cadence.interval == 1 and not machine.notes
    # No step takes no time: nothing can be chosen, and the next round tries again.
    machine = Machine(MeasuredCadence(), lambda t, n: 1.0 if n == LONG else 1.5).run(60)
    assert machine.cadence.interval == 1 and "nothing can be said" in machine.notes[0][1]
    machine.times = steady(1.0, 0.1)
    assert machine.run(400).cadence.interval == 6


def test_resumed_anywhere_it_goes_on_alike() -> None:
    whole = Machine(MeasuredCadence(), steady(1.0, 0.07)).run(700)
    pieces = Machine(MeasuredCadence(), steady(1.0, 0.07))
    for size in [1, 2, 3, 5, 11, 40] * 11 + [18]:
        pieces.run(size)
        fresh = MeasuredCadence()
        fresh.load_state_dict(json.loads(json.dumps(pieces.cadence.state_dict())))
        pieces.cadence = fresh
    assert pieces.attempt == whole.attempt
    assert pieces.judged == whole.judged and pieces.cadence.state_dict() == whole.cadence.state_dict()


def test_a_longer_interval_than_allowed_now_is_cut_and_measured_anew() -> None:
    saved = Machine(MeasuredCadence(), steady(1.0, 0.3)).run(200).cadence
    cadence = MeasuredCadence(most=4)
    cadence.load_state_dict(saved.state_dict())
    assert saved.interval > 4 and cadence.interval == 4
    machine = Machine(cadence, steady(1.0, 0.01))
    assert machine.run(60).cadence.interval == 1 and len(machine.notes) == 1


@pytest.mark.parametrize("bound", [0, -0.1, 1.01, math.nan, math.inf, True, "2 %"])
def test_bad_bounds(bound: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="bound must be a number above 0, at most 1"):
        MeasuredCadence(bound)


@pytest.mark.parametrize("most", [0, 1, 2.0, True, None])
def test_bad_mosts(most: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="most: expected"):
        MeasuredCadence(most=most)


@pytest.mark.parametrize("every", ["always", "Auto", ""])
def test_another_word_than_auto(every: str) -> None:
    model = nn.Linear(1, 1)
    probe = LossProbe(lambda model, batch: model(batch).sum(), [torch.ones(1, 1)])
    with pytest.raises(TypeError, match=f'every: expected a whole number, got {every!r} .or give "auto"'):
        StabilityController(model, torch.optim.SGD(model.parameters(), 0.1), probe, every=every)  # type: ignore[arg-type]


def test_bad_states_change_nothing() -> None:
    cadence = Machine(MeasuredCadence(), steady(1.0, 0.1)).run(9).cadence
    good = cadence.state_dict()
    wrong = [{"interval": 0}, {"since": -1}, {"left": 1.0}, {"clean": 1}, {"short": [math.nan]}, {"long": ["1"]}]
    for bad in ({}, {**good, "extra": 1}, *({**good, **each} for each in wrong)):
        with pytest.raises(ValueError, match=r"MeasuredCadence\.load_state_dict"):
            cadence.load_state_dict(bad)
    assert cadence.state_dict() == good


# ---------------------------------------------------------------------- in a controller


def slow_rank(rank: int, world: int, mode: str) -> tuple[Any, ...]:
    """Rank 1 sleeps in every step. What each rank chose, from which numbers, and its events."""
    case = zoo.Case(mode, ranks=world, steps=60, guards=False)
    setup = zoo.build(case, rank, world)
    events: list[dict[str, Any]] = []
    cadence = MeasuredCadence(bound=0.05, most=8)
    probe = LossProbe(zoo.probe_loss, [zoo.data(case, 10**6, 0, size=64)])
    with StabilityController(
        setup.model, setup.optimizers, probe, FixedInnovation(100.0, 1.0), every=cadence, on_event=events.append
    ) as controller:
        for attempt in range(case.steps):
            zoo.loss_fn(setup.model, zoo.data(case, attempt, setup.replica)).backward()
            time.sleep(0.002 * rank)
            controller.step()
            setup.optimizers[0].zero_grad()
        saved = json.dumps(controller.state_dict()["cadence"])
    judged = [event["attempt"] for event in events if event["action"] == "commit"]
    periods = [event["signals"].get("judged_period") for event in events]
    return judged, saved, [event["cadence"] for event in events], periods


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_ranks_of_different_speed_choose_alike(two: harness.Pool, mode: str) -> None:
    first, second = two.run(slow_rank, mode)
    assert first == second
    judged, saved, notes, periods = first
    assert [note for note in notes if note], "a round was finished"
    assert json.loads(saved)["chosen"] and len(judged) > WARM_UP + SAMPLES
    # Absent at the first two judged attempts and at unjudged ones, measured at all others.
    known = [attempt for attempt, period in enumerate(periods) if period is not None]
    assert known == judged[2:] and all(periods[attempt] > 0 for attempt in known)


def alike(rank: int, world: int, mode: str) -> list[str]:
    """Auto on a clean run, bit for bit the run without a controller."""
    case = zoo.Case(mode, ranks=world, steps=30, scheduler=True, clip=1.0)
    guarded = zoo.train(case, rank, world, every="auto")
    wrong = compare(guarded.image, zoo.train(case, rank, world, guarded=False).image)
    return wrong + [str(verdict) for verdict in guarded.verdicts if not verdict.accepted]


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_measuring_changes_nothing(mode: str) -> None:
    for said in harness.pool(zoo.MODES[mode]).run(alike, mode):
        assert not said, "\n".join(said)


def settings_differ(rank: int, world: int) -> str:
    case = replace(zoo.Case("ddp"), ranks=world)
    setup = zoo.build(case, rank, world)
    probe = LossProbe(zoo.probe_loss, [zoo.data(case, 10**6, 0)])
    StabilityController(setup.model, setup.optimizers, probe, every=MeasuredCadence(bound=0.02 + 0.01 * rank))
    return "built"


def test_different_bounds_are_refused(two: harness.Pool) -> None:
    for error in two.run(settings_differ, expect_failure=True):
        assert error.is_a("LockstepError") and "different every" in error.message and "0.03" in error.message
