"""Which attempts are judged: the same everywhere, never further apart than promised, and at once when restless."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_stability import MeasuredCadence
from dist_stability.cadence import LEARNING_RATE_JUMP, NORM_SCORE_RESTLESS, AdaptiveCadence, Cadence, FixedCadence

CALM: dict[str, Any] = {"accepted": True, "fraction": 0.1, "evidence": 0.0, "norm_score": 0.0}
NUMBER = st.floats(allow_nan=True, allow_infinity=True)
FACTS = st.fixed_dictionaries(
    {
        "accepted": st.sampled_from([True] * 9 + [False]),
        "fraction": st.one_of(st.none(), st.floats(-1, 0.6), NUMBER),
        "evidence": st.one_of(st.just(0.0), NUMBER),
        "norm_score": st.one_of(st.none(), st.floats(-1, 3.5), NUMBER),
        "learning_rate": st.one_of(st.none(), st.floats(0, 1e-3), NUMBER),
        "seconds": st.one_of(st.none(), st.floats(1e-3, 1.0), NUMBER),
    }
)
CADENCES = st.one_of(
    st.builds(FixedCadence, st.integers(1, 20)),
    st.builds(AdaptiveCadence, st.integers(1, 40), st.integers(1, 5), st.sampled_from([0.1, 0.5, 1.0])),
    st.builds(MeasuredCadence, st.sampled_from([1e-3, 0.02, 1.0]), st.integers(2, 40)),
)


def run(cadence: Cadence, facts: list[dict[str, Any]], start: int = 0) -> list[bool]:
    """Feed facts attempt by attempt; whether each was judged. An unjudged attempt has no fraction and no evidence."""
    judged = []
    for attempt, fact in enumerate(facts, start):
        judged.append(cadence.judged(attempt))
        assert cadence.judged(attempt) == judged[-1], "asking changes nothing"
        free = fact if judged[-1] else {**fact, "fraction": None, "evidence": 0.0}
        cadence.record(attempt=attempt, judged=judged[-1], **free)
    return judged


def calm_at(interval: int, most: int = 16, calm: int = 3) -> AdaptiveCadence:
    """A cadence that calm has brought to this interval, just after a judged commit."""
    cadence = AdaptiveCadence(most, calm)
    attempt = 0
    while cadence.interval < interval:
        cadence.record(attempt=attempt, judged=cadence.judged(attempt), **CALM)
        attempt += 1
    assert cadence.interval == interval
    return cadence


def measured_at(interval: int) -> MeasuredCadence:
    """A measured cadence at rest at this interval, just after a judged commit."""
    cadence = MeasuredCadence()
    cadence.load_state_dict({**cadence.state_dict(), "interval": interval, "chosen": True, "left": 10})
    return cadence


@pytest.mark.parametrize("every", [1, 2, 5, 16])
def test_fixed_judges_every_kth(every: int) -> None:
    restless = {**CALM, "accepted": False, "evidence": math.inf}
    judged = run(FixedCadence(every), [CALM, restless] * (2 * every))
    assert [t for t, yes in enumerate(judged) if yes] == list(range(every - 1, 4 * every, every))


def test_calm_doubles_the_interval_up_to_the_most() -> None:
    judged = run(AdaptiveCadence(most=6, calm=3), [CALM] * 40)
    at = [t for t, yes in enumerate(judged) if yes]
    assert [b - a for a, b in zip([-1, *at], at, strict=False)] == [1, 1, 1, 2, 2, 2, 4, 4, 4, 6, 6, 6]


@pytest.mark.parametrize(
    "restless",
    [
        {"accepted": False},
        {"fraction": 0.51},
        {"fraction": math.nan},
        {"evidence": 0.01},
        {"evidence": math.inf},
        {"evidence": math.nan},
        {"norm_score": NORM_SCORE_RESTLESS * 1.01},
        {"norm_score": math.inf},
        {"norm_score": math.nan},
        {"learning_rate": 1.01e-3 * LEARNING_RATE_JUMP},
    ],
    ids=str,
)
def test_each_sign_of_unrest_judges_the_next_attempt(restless: dict[str, Any]) -> None:
    cadence = calm_at(4)
    judged = run(cadence, [{**CALM, "learning_rate": 1e-3}] * 3 + [{**CALM, **restless}, CALM])
    assert judged == [False, False, False, True, True]


@pytest.mark.parametrize("restless", [{"accepted": False}, {"norm_score": 9.0}, {"learning_rate": 2e-3}], ids=str)
def test_unrest_between_two_probes_is_enough(restless: dict[str, Any]) -> None:
    cadence = calm_at(8)
    assert run(cadence, [{**CALM, "learning_rate": 1e-3}] * 3) == [False] * 3
    assert run(cadence, [{**CALM, **restless}, CALM, CALM], start=3) == [False, True, True]


@pytest.mark.parametrize(
    "harmless",
    [
        {"fraction": 0.5},
        {"fraction": -40.0},
        {"norm_score": None},
        {"norm_score": -50.0},
        {"learning_rate": 1e-3 * LEARNING_RATE_JUMP * 0.999},
        {"learning_rate": 0.0},
        {"learning_rate": None},
        {"learning_rate": math.nan},
    ],
    ids=str,
)
def test_what_is_no_unrest(harmless: dict[str, Any]) -> None:
    cadence = calm_at(4, calm=3)
    run(cadence, [{**CALM, "learning_rate": 1e-3}] * 4)
    assert run(cadence, [{**CALM, **harmless}] * 4) == [False, False, False, True]
    assert cadence.interval == 4


def test_an_unknown_fraction_is_not_calm() -> None:
    """While the rule warms up every attempt is judged, and later it ends a row of calm."""
    assert all(run(AdaptiveCadence(calm=2), [{**CALM, "fraction": None}] * 50))
    cadence = AdaptiveCadence(calm=2)
    run(cadence, [CALM, {**CALM, "fraction": None}, CALM])
    assert cadence.interval == 1
    run(cadence, [CALM])
    assert cadence.interval == 2


def test_the_row_of_calm_starts_anew() -> None:
    facts = [CALM, CALM, {**CALM, "norm_score": 9.0}, CALM, CALM, CALM, CALM]
    assert run(AdaptiveCadence(calm=3), facts) == [True] * 6 + [False]


def test_a_jump_is_seen_after_a_rate_that_is_no_number() -> None:
    cadence = calm_at(8)
    rates = [1e-3, math.nan, None, 2e-3, 2e-3]
    assert run(cadence, [{**CALM, "learning_rate": rate} for rate in rates]) == [False] * 4 + [True]


def test_a_judged_attempt_that_was_vetoed_is_made_up_for() -> None:
    """Nothing was measured of a proposal then, so the next attempt is judged."""
    cadence = calm_at(4)
    assert run(cadence, [CALM, CALM, CALM, {**CALM, "accepted": False}, CALM]) == [False, False, False, True, True]


@pytest.mark.parametrize(
    "make",
    [lambda: FixedCadence(16), lambda: calm_at(16), lambda: measured_at(16)],
    ids=["fixed", "adaptive", "measured"],
)
def test_hold(make: Any) -> None:
    cadence = make()
    cadence.hold(3)
    cadence.hold(2)  # does not shorten
    restored = make()
    restored.load_state_dict(cadence.state_dict())
    for each in (cadence, restored):
        assert run(each, [CALM] * 5) == [True, True, True, False, False]


@given(CADENCES, st.lists(FACTS, max_size=120), st.lists(st.tuples(st.integers(0, 119), st.integers(0, 9))))
@settings(max_examples=200, deadline=None)
def test_same_facts_same_choices(cadence: Cadence, facts: list[dict[str, Any]], holds: list[tuple[int, int]]) -> None:
    """On another rank, and on one that was restored from a checkpoint at every attempt."""
    arguments = {key: value for key, value in cadence.settings().items() if key != "cadence"}
    other, restored = (type(cadence)(**arguments) for _ in range(2))
    for attempt, fact in enumerate(facts):
        for each in (cadence, other, restored):
            for _, held in [hold for hold in holds if hold[0] == attempt]:
                each.hold(held)
        fresh = type(cadence)(**arguments)
        fresh.load_state_dict(json.loads(json.dumps(restored.state_dict())))
        restored = fresh
        assert cadence.judged(attempt) == other.judged(attempt) == restored.judged(attempt)
        for each in (cadence, other, restored):
            each.record(attempt=attempt, judged=each.judged(attempt), **fact)
    assert cadence.state_dict() == other.state_dict() == restored.state_dict()


@given(CADENCES, st.lists(FACTS, min_size=1, max_size=200))
@settings(max_examples=300, deadline=None)
def test_every_fault_is_noticed_within_one_interval(cadence: Cadence, facts: list[dict[str, Any]]) -> None:
    """Between any two judged attempts, and before the first, lie fewer than ``most`` others."""
    judged = [-1, *(t for t, yes in enumerate(run(cadence, facts)) if yes)]
    gaps = [b - a for a, b in zip(judged, [*judged[1:], len(facts)], strict=True)]
    assert max(gaps) <= cadence.most


@given(st.lists(FACTS, max_size=200), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_adaptive_never_waits_after_unrest(facts: list[dict[str, Any]], most: int, calm: int) -> None:
    judged = run(AdaptiveCadence(most, calm), facts)
    for before, now in zip(facts, judged[1:], strict=False):
        score = before["norm_score"]
        if not before["accepted"] or (score is not None and not score <= NORM_SCORE_RESTLESS):
            assert now


def test_all_are_cadences() -> None:
    assert all(isinstance(cadence, Cadence) for cadence in (FixedCadence(), AdaptiveCadence(), MeasuredCadence()))
    assert FixedCadence(4).settings() != FixedCadence(5).settings()
    assert AdaptiveCadence(4).settings() != AdaptiveCadence(4, restless=0.6).settings()


@pytest.mark.parametrize("make", [FixedCadence, AdaptiveCadence])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "4", None])
def test_bad_intervals(make: Any, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"every|most"):
        make(value)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="calm: expected at least 1, got 0"):
        AdaptiveCadence(calm=0)
    for value in (0, -0.1, 1.01, math.nan, math.inf):
        with pytest.raises(ValueError, match="restless"):
            AdaptiveCadence(restless=value)
    with pytest.raises(ValueError, match="attempts"):
        FixedCadence().hold(-1)


def test_a_bad_state_changes_nothing() -> None:
    cadence = calm_at(4)
    good = cadence.state_dict()
    for bad in ({}, {**good, "row": -1}, {**good, "row": 1.5}, {**good, "extra": 1}, FixedCadence(2).state_dict()):
        with pytest.raises(ValueError, match=r"AdaptiveCadence\.load_state_dict"):
            cadence.load_state_dict(bad)
    with pytest.raises((TypeError, ValueError), match="learning_rate"):
        cadence.load_state_dict({**good, "learning_rate": "high"})
    assert cadence.state_dict() == good
    with pytest.raises(ValueError, match=r"FixedCadence\.load_state_dict"):
        FixedCadence(2).load_state_dict(good)


def test_a_longer_interval_than_allowed_now_is_cut() -> None:
    cadence = AdaptiveCadence(most=2)
    cadence.load_state_dict(calm_at(16).state_dict())
    assert cadence.interval == 2
