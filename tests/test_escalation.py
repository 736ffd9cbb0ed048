"""The ladder as arithmetic: which rung follows which refusals, and that every budget ends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dist_stability import Escalation
from dist_stability.escalation import Ladder
from dist_stability.rungs import ADVICE, Pattern, Refusal, Response, Rung

LOUD = {"signal": "gradient"}


def refuse(ladder: Ladder, attempts: range, **facts: Any) -> list[str]:
    return [str(ladder.refused(Refusal(t, **{"signal": "probe", **facts})).rung) for t in attempts]


def accept(ladder: Ladder, attempts: range, **facts: Any) -> list[Pattern | None]:
    return [ladder.accepted(t, **facts) for t in attempts]


def attenuate(ladder: Ladder, attempt: int, committed: bool) -> Response:
    response = ladder.refused(Refusal(attempt, "probe"))
    assert response.rung is Rung.ATTENUATE
    ladder.shortened(committed)
    return response


@pytest.mark.parametrize(
    "facts",
    [LOUD, {"signal": "error"}, {"signal": "replica"}, {"evidence": 0.1}, {"finite": False}, {"alone": False}],
    ids=str,
)
def test_what_the_probe_alone_did_not_refuse_is_skipped(facts: dict[str, Any]) -> None:
    assert refuse(Ladder(), range(60), **facts) == ["skip"] * 60


def test_shorter_steps_are_tried_after_four_quiet_refusals_and_then_less_and_less_often() -> None:
    ladder, tried = Ladder(), []
    for attempt in range(40):
        if ladder.refused(Refusal(attempt, "probe")).rung is Rung.ATTENUATE:
            tried.append(attempt)
            ladder.shortened(False)
    assert tried == [3, 5, 9, 17, 33]


def test_two_fruitless_tries_speak_against_the_direction_until_the_episode_is_over() -> None:
    ladder, allowed = Ladder(), []
    for attempt in range(40):
        if ladder.refused(Refusal(attempt, "probe")).rung is Rung.ATTENUATE:
            allowed.append(ladder.halvings)
            ladder.shortened(False)
    assert allowed == [5, 5, 0, 0, 0]
    accept(ladder, range(40, 71))
    assert ladder.halvings == 0
    accept(ladder, range(71, 72))
    assert ladder.halvings == 5


def test_where_a_shorter_step_passed_the_next_is_tried_at_once_and_then_the_rate_is_cut() -> None:
    ladder = Ladder()
    assert refuse(ladder, range(3)) == ["skip"] * 3
    for attempt in range(3, 7):
        attenuate(ladder, attempt, True)
    assert refuse(ladder, range(7, 9)) == ["cut_lr", "skip"]
    assert ladder.learning_rate_factor == 0.25


def test_steps_of_full_length_speak_for_the_learning_rate() -> None:
    ladder = Ladder()
    for attempt in range(0, 60, 6):
        refuse(ladder, range(attempt, attempt + 3))
        attenuate(ladder, attempt + 3, True)
        accept(ladder, range(attempt + 4, attempt + 6))
    assert ladder.learning_rate_factor == 1.0


def test_the_cut_is_held_and_ramped_back_to_exactly_one() -> None:
    ladder = Ladder(Escalation(cut_factor=0.5, cut_steps=3, ramp_steps=4, attenuate_after=1))
    for attempt in range(4):
        attenuate(ladder, attempt, True)
    assert refuse(ladder, range(4, 5)) == ["cut_lr"]
    factors = []
    for attempt in range(5, 14):
        factors.append(ladder.learning_rate_factor)
        accept(ladder, range(attempt, attempt + 1))
    assert factors == [0.5, 0.5, 0.5, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
    assert ladder.state_dict()["level"] == 1.0


def test_a_second_cut_starts_from_the_first_and_the_budget_ends_it() -> None:
    ladder = Ladder(Escalation(cut_factor=0.5, attenuate_after=1, max_cuts=2))
    found = []
    for attempt in range(60):
        rung = ladder.refused(Refusal(attempt, "probe")).rung
        found.append(rung)
        if rung is Rung.ATTENUATE:
            ladder.shortened(True)
    assert found.count(Rung.CUT_LR) == 2 and ladder.learning_rate_factor == 0.25
    first, second = (index for index, rung in enumerate(found) if rung is Rung.CUT_LR)
    assert second - first > 8


def test_older_states_are_asked_for_by_the_rule_or_by_the_count() -> None:
    ladder = Ladder(Escalation(deep_after=10, max_deep=2))
    facts = {"anchors": 2, **LOUD}
    assert refuse(ladder, range(3), wants_deep=True, **facts) == ["deep_rollback"] * 2 + ["skip"]
    ladder = Ladder(Escalation(deep_after=10, max_deep=2))
    assert refuse(ladder, range(9), **facts) == ["skip"] * 9
    assert refuse(ladder, range(9, 10), **facts) == ["deep_rollback"]
    assert refuse(ladder, range(10, 11), **{**facts, "anchors": 0}) == ["skip"], "nothing older is left"
    assert refuse(Ladder(Escalation(max_deep=0)), range(70), wants_deep=True, **facts) == ["skip"] * 70


def test_reload_comes_after_everything_in_memory_and_has_a_budget_for_the_whole_run() -> None:
    ladder = Ladder(Escalation(reload_after=5, max_reloads=2, window=100, max_refusals_in_window=100))
    found = refuse(ladder, range(30), can_reload=True, **LOUD)
    assert [index for index, rung in enumerate(found) if rung == "reload"] == [4, 9]
    accept(ladder, range(30, 1000))
    assert "reload" not in refuse(ladder, range(1000, 1030), can_reload=True, **LOUD)
    assert "reload" not in refuse(Ladder(Escalation(reload_after=5)), range(30), **LOUD), "nothing to reload"


def test_stops_after_so_many_in_a_row_and_stays_stopped() -> None:
    ladder = Ladder(Escalation(max_refusals_in_row=5))
    assert refuse(ladder, range(4), **LOUD) == ["skip"] * 4
    accept(ladder, range(4, 5))
    assert refuse(ladder, range(5, 12), **LOUD) == ["skip"] * 4 + ["stop"] * 3
    report = ladder.report()
    assert report["refusals_in_a_row"] == 7 and report["tried"] == {"skip": 8, "stop": 3}
    assert report["pattern"] == "structural" and report["signals"] == {"gradient": 11}
    json.dumps(report)


def test_stops_after_so_many_in_the_window_and_forgets_what_has_left_it() -> None:
    settings = Escalation(window=20, max_refusals_in_window=10)
    ladder, found = Ladder(settings), []
    for attempt in range(0, 100, 2):  # every second one is refused: never two in a row
        found += refuse(ladder, range(attempt, attempt + 1), **LOUD)
        accept(ladder, range(attempt + 1, attempt + 2))
    assert found.index("stop") == 9
    ladder = Ladder(settings)
    for attempt in range(0, 300, 3):
        assert refuse(ladder, range(attempt, attempt + 1), **LOUD) == ["skip"]
        accept(ladder, range(attempt + 1, attempt + 3))


def test_slow_divergence_is_warned_of_and_then_acted_on() -> None:
    ladder = Ladder(Escalation(trend_after=5))
    accept(ladder, range(4), alarm=True)
    accept(ladder, range(4, 8))  # attempts that nobody measured leave the count alone
    assert ladder.overdue() is None
    accept(ladder, range(8, 9), alarm=True)
    assert "5 commits" in (ladder.overdue() or "")
    response = ladder.refused(Refusal(9, "trend", anchors=1))
    assert response.rung is Rung.CUT_LR and response.deep and ladder.learning_rate_factor == 0.25
    assert ladder.overdue() is None, "it has been acted on"
    accept(ladder, range(10, 14), alarm=True)
    accept(ladder, range(14, 15), alarm=False)
    assert ladder.overdue() is None
    refused_too = Ladder(Escalation(trend_after=5))
    accept(refused_too, range(5), alarm=True)
    assert refuse(refused_too, range(5, 6), **LOUD) == ["skip"]
    assert refuse(refused_too, range(6, 8)) == ["cut_lr", "skip"], "a quiet refusal that comes first does as well"
    never = Ladder(Escalation(trend_after=0))
    accept(never, range(500), alarm=True)
    assert never.overdue() is None


def test_patterns() -> None:
    ladder = Ladder()
    refuse(ladder, range(3), **LOUD)
    ended = accept(ladder, range(3, 40))
    assert [pattern for pattern in ended if pattern] == [Pattern.TRANSIENT] and ended.index(Pattern.TRANSIENT) == 31
    assert not ladder.episode_open

    numerics = Ladder()
    assert numerics.refused(Refusal(0, "probe", finite=False)).pattern is Pattern.NUMERICS

    data = Ladder()
    for epoch in range(3):
        pattern = data.refused(Refusal(100 * epoch, "probe", batch=7)).pattern
        assert pattern is (Pattern.DATA if epoch else Pattern.TRANSIENT)
        accept(data, range(100 * epoch + 1, 100 * epoch + 100))

    structural = Ladder()
    response = structural.refused(Refusal(0, "probe", wants_deep=True, anchors=2))
    assert response.pattern is Pattern.TRANSIENT, "going back may help yet"
    assert structural.refused(Refusal(1, "probe")).pattern is Pattern.STRUCTURAL
    assert set(ADVICE) == set(Pattern)


def test_shaping_is_switched_on_once_where_the_risk_was_high_and_refusals_repeat() -> None:
    settings = Escalation(shape_after=3, attenuate_after=0)

    def rungs(risky: bool, **facts: Any) -> list[str]:
        ladder = Ladder(settings)
        ladder.warned(risky)
        return refuse(ladder, range(6), **facts)

    for facts in ({}, {"evidence": 3.0}, {"alone": False}):
        assert rungs(True, can_shape=True, **facts) == ["skip", "skip", "shape", "skip", "skip", "skip"]
    for facts in (LOUD, {"finite": False}, {"signal": "error"}):
        assert rungs(True, can_shape=True, **facts) == ["skip"] * 6, "says nothing about the length of steps"
    assert rungs(False, can_shape=True) == ["skip"] * 6 == rungs(True), "no risk, or nothing to switch on"
    ladder = Ladder(settings)
    ladder.warned(True)
    assert refuse(ladder, range(20), can_shape=True, finite=False) == ["skip"] * 20
    assert refuse(ladder, range(20, 21), can_shape=True) == ["skip"], "those do not count"
    ladder = Ladder(settings)
    ladder.warned(True)
    assert refuse(ladder, range(2), can_shape=True) == ["skip"] * 2 and not ladder.shaping
    accept(ladder, range(2, 40))
    assert refuse(ladder, range(40, 43), can_shape=True) == ["skip", "skip", "shape"], "a new episode counts anew"
    resumed = Ladder(settings)
    resumed.load_state_dict(json.loads(json.dumps(ladder.state_dict())))
    assert resumed.shaping and refuse(resumed, range(43, 50), can_shape=True) == ["skip"] * 7


def test_a_resumed_ladder_goes_on_where_it_was() -> None:
    def rungs(resumed_at: int | None) -> list[str]:
        ladder, found = Ladder(), []
        for attempt in range(120):
            if attempt == resumed_at:
                saved = json.loads(json.dumps(ladder.state_dict()))
                ladder = Ladder()
                ladder.load_state_dict(saved)
            if attempt % 11 < 8:
                facts = {"wants_deep": attempt % 40 == 7, "anchors": 1, "batch": attempt % 5}
                response = ladder.refused(Refusal(attempt, "probe", **facts))
                if response.rung is Rung.ATTENUATE:
                    ladder.shortened(attempt % 3 == 0)
                found.append(f"{response} {ladder.learning_rate_factor}")
            else:
                ladder.accepted(attempt, alarm=True)
        return [*found, str(ladder.report())]

    whole = rungs(None)
    assert all(rungs(attempt) == whole for attempt in range(1, 120, 7))


def test_a_run_that_had_stopped_may_try_again_once_it_is_resumed() -> None:
    ladder = Ladder(Escalation(max_refusals_in_row=5))
    refuse(ladder, range(5), **LOUD)
    assert ladder.stopped
    resumed = Ladder(Escalation(max_refusals_in_row=5))
    resumed.load_state_dict(ladder.state_dict())
    assert refuse(resumed, range(5, 10), **LOUD) == ["skip"] * 4 + ["stop"] and resumed.total == 10


def test_what_is_no_state_of_a_ladder_is_refused() -> None:
    ladder = Ladder()
    with pytest.raises(ValueError, match=r"missing keys.*'level'"):
        ladder.load_state_dict({"in_a_row": 3})
    with pytest.raises(TypeError, match="int"):
        ladder.load_state_dict(3)  # type: ignore[arg-type]
    assert ladder.in_a_row == 0


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"halvings": 0}, ValueError),
        ({"max_refusals_in_row": 0}, ValueError),
        ({"window": 100}, ValueError),
        ({"cut_factor": 1.0}, ValueError),
        ({"cut_factor": True}, TypeError),
        ({"attenuate_after": -1}, ValueError),
        ({"deep_after": 2.0}, TypeError),
    ],
    ids=str,
)
def test_wrong_settings_are_named(setting: dict[str, Any], error: type[Exception]) -> None:
    name = "max_refusals_in_window" if "window" in setting else next(iter(setting))
    with pytest.raises(error, match=name):
        Escalation(**setting)
