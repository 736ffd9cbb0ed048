"""Theorem 7.3 and Propositions 7.4 and 7.5 hold for both rules, and a broken rule or restore is caught."""

from __future__ import annotations

import json
import math
import pickle
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_stability.errors import StabilityError
from dist_stability.rules import FixedInnovation, Guarantees, GuaranteeViolation, PredictiveInnovation, supports_deep
from dist_stability.verdict import Judgement

RULES = [
    lambda: FixedInnovation(0.3, 0.1),
    lambda: FixedInnovation(0.0, 1e-6),
    PredictiveInnovation,
    lambda: PredictiveInnovation(0.05, gradient_patience=2.0),
]


def trace(seed: int, length: int) -> list[tuple[float, float | None]]:
    """Measurements of every kind a guarded run can meet, with gradient norms."""
    draw = random.Random(seed)
    sigma, offset, tau = draw.choice([0.0, 1e-3, 0.05]), draw.choice([0.0, -40.0, 1e3]), draw.choice([20, 200, 1e6])
    unit, level, rows = 10 ** draw.uniform(-6, 6), 0.0, []
    for t in range(length):
        if draw.random() < 0.02:
            level += draw.choice([-1, 1, 1]) * draw.choice([0.01, 0.3, 5.0])
        y = unit * (offset + level + 2 * math.exp(-t / tau) + sigma * draw.gauss(0, 1) * draw.choice([1, 1, 1, 6]))
        y = draw.choice([math.nan, math.inf, -math.inf, 1e250]) if draw.random() < 0.01 else y
        g = math.exp(draw.gauss(0, 0.4)) * (300 if draw.random() < 0.03 else 1)
        rows.append((y, draw.choice([g, g, g, None])))
    return rows


def guarded(rule: Any, rows: list[tuple[float, float | None]], guarantees: Guarantees) -> dict[str, int]:
    """The controller's use of a rule, its anchors and the guarantees; checks the bound on ``level`` by hand as well."""
    counts = {"commits": 0, "refused": 0, "deep": 0}
    anchors: list[dict] = []
    rule.commit(rows[0][0])
    guarantees.committed(rows[0][0])
    for y, g in rows[1:]:
        judgement = rule.judge(y, g)
        if judgement.accepted:
            guarantees.committed(y, judgement, getattr(rule, "envelope", None))
            rule.commit(y, g)
            counts["commits"] += 1
            if supports_deep(rule) and counts["commits"] % 8 == 0:
                anchors = [*anchors, rule.anchor()][-2:]
        else:
            rule.reject(y, g)
            counts["refused"] += 1
            if judgement.deep:
                rule.deep(anchors[0])
                anchors = [anchors[0]] * 2
                counts["deep"] += 1
        state = rule.state_dict()
        if state.get("first", state.get("reference")) is not None:
            # The lemma behind Proposition 7.5, exactly as floats.
            assert state.get("level", state.get("reference")) <= guarantees.highest
    return counts


class TestBothRulesKeepThem:
    @pytest.mark.parametrize("make", RULES)
    def test_on_recorded_traces(self, make: Any) -> None:
        totals = {"commits": 0, "refused": 0, "deep": 0}
        for seed in range(25):
            counts = guarded(make(), trace(seed, 600), Guarantees())
            totals = {key: totals[key] + counts[key] for key in totals}
        assert totals["commits"] > 1000 and totals["refused"] > 200
        assert totals["deep"] > 5 or not supports_deep(make())

    @settings(max_examples=150, deadline=None)
    @given(
        make=st.sampled_from(RULES),
        rows=st.lists(
            st.tuples(
                st.one_of(st.floats(-1e3, 1e3), st.floats(), st.sampled_from([5e-324, 1e-310, 0.0, 1.7e308, -1.7e308])),
                st.one_of(st.none(), st.floats()),
            ),
            min_size=1,
            max_size=80,
        ),
    )
    def test_on_any_floats(self, make: Any, rows: list[tuple[float, float | None]]) -> None:
        guarded(make(), rows, Guarantees())

    def test_a_constant_bound_limits_the_whole_run(self) -> None:
        """Proposition 7.5, second half: max_{k<=t} y_k <= y_0 + t epsilon, against a stream that creeps up at will."""
        rule, epsilon, y0 = FixedInnovation(0.25, 1.0), 0.25, 1.0
        rule.commit(y0)
        highest, commits, draw = y0, 0, random.Random(0)
        for _ in range(2000):
            y = highest + draw.uniform(-0.1, 0.5)
            if rule.judge(y).accepted:
                rule.commit(y)
                commits += 1
                highest = max(highest, y)
                assert highest <= y0 + commits * epsilon + 1e-9
        assert 100 < commits < 2000


class Lying:
    """A rule with one broken promise."""

    def __init__(self, what: str) -> None:
        self.rule, self.what = PredictiveInnovation(), what

    def judge(self, y: float, g: float | None = None) -> Judgement:
        true = self.rule.judge(y, g)
        if self.what == "accepts everything":
            return Judgement(True, true.innovation, true.bound, "", False)
        if self.what == "predicts what it sees":  # innovation 0 always: a jump looks expected
            return Judgement(True, 0.0, true.bound, "", False)
        if self.what == "accepts NaN":
            return Judgement(True, math.nan, math.inf, "", False)
        return Judgement(y <= self.rule._learned.level + 1.0, true.innovation, true.bound, "", False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)


class TestBrokenOnesAreCaught:
    def rows(self, last: float) -> list[tuple[float, None]]:
        draw = random.Random(0)
        return [(1 + 0.01 * draw.gauss(0, 1), None) for _ in range(50)] + [(last, None)]

    @pytest.mark.parametrize(
        ("what", "last", "guarantee"),
        [
            ("accepts everything", 5.0, "Theorem 7.3"),
            ("another threshold", 1.8, "Theorem 7.3"),
            ("accepts NaN", math.nan, "Theorem 7.3"),
            ("predicts what it sees", 5.0, "Proposition 7.5"),
        ],
    )
    def test_a_broken_rule(self, what: str, last: float, guarantee: str) -> None:
        with pytest.raises(GuaranteeViolation, match=guarantee) as caught:
            guarded(Lying(what), self.rows(last), Guarantees())
        assert caught.value.guarantee == guarantee and isinstance(caught.value, StabilityError)
        assert repr(caught.value.numbers["measurement"]) == repr(last)
        assert repr(last) in str(caught.value) and "bound" in str(caught.value)

    def test_a_refused_proposal_that_was_committed(self) -> None:
        guarantees = Guarantees()
        guarantees.committed(1.0)
        with pytest.raises(GuaranteeViolation, match=r"Theorem 7\.3.*must be refused was committed"):
            guarantees.committed(0.5, Judgement(False, -0.5, 0.1, "refused for another reason"))

    def test_a_commit_that_nobody_measured_before(self) -> None:
        with pytest.raises(GuaranteeViolation, match=r"Proposition 7\.5"):
            Guarantees().committed(1.0, Judgement(True, 0.0, 0.1, ""))

    def test_rounding_of_the_sum_is_forgiven_and_no_more(self) -> None:
        rule, guarantees = FixedInnovation(1.0, 1.0), Guarantees()
        rule.commit(-1.0)
        guarantees.committed(-1.0)
        y = 1e-17
        assert rule.judge(y).accepted and y > -1.0 + 1.0  # the rule is exact in y - y_hat, the sum is not
        guarantees.committed(y, rule.judge(y))
        with pytest.raises(GuaranteeViolation):
            guarantees.committed(1.0 + 1e-12, Judgement(True, 1.0, 1.0, ""))

    def test_a_restore_that_lost_a_bit(self) -> None:
        guarantees = Guarantees()
        guarantees.restored((7, -3), (7, -3))
        with pytest.raises(GuaranteeViolation, match=r"Proposition 7\.4.*parts that differ \[1\]") as caught:
            guarantees.restored((7, -3), (7, -4))
        assert caught.value.numbers["committed digests"] == (7, -3)
        with pytest.raises(GuaranteeViolation):
            guarantees.restored((7, -3), (7,))


class TestWhatIsOutside:
    def test_unjudged_commits_are_only_remembered(self) -> None:
        """Observe mode: a refused proposal stands, and raises what later commits may reach."""
        guarantees = Guarantees()
        for y in (1.0, 50.0, math.nan, 2.0):
            guarantees.committed(y)
        assert guarantees.highest == 50.0
        guarantees.committed(49.0, Judgement(True, 0.0, 0.1, ""))

    def test_first_commits_have_no_bound(self) -> None:
        guarantees, rule = Guarantees(), PredictiveInnovation()
        guarantees.committed(1.0)
        rule.commit(1.0)
        for y in (100.0, 10_000.0, -5.0):
            guarantees.committed(y, rule.judge(y))
            rule.commit(y)

    @pytest.mark.parametrize("make", RULES)
    def test_a_resumed_run_goes_on_with_what_it_knew(self, make: Any) -> None:
        rule, guarantees = make(), Guarantees()
        rows = [(y if math.isfinite(y) else 1.0, g) for y, g in trace(4, 400)]
        guarded(rule, rows[:200], guarantees)
        resumed_rule, resumed = make(), Guarantees()
        resumed_rule.load_state_dict(json.loads(json.dumps(rule.state_dict())))
        resumed.load_state_dict(json.loads(json.dumps(guarantees.state_dict())))
        assert resumed.highest == guarantees.highest
        for y, g in rows[200:]:
            judgement = resumed_rule.judge(y, g)
            if judgement.accepted:
                resumed.committed(y, judgement)
                resumed_rule.commit(y, g)
            else:
                resumed_rule.reject(y, g)


def test_the_envelope_is_checked_where_a_bound_counted() -> None:
    guarantees = Guarantees()
    guarantees.committed(5.0)
    fine = Judgement(True, innovation=0.5, bound=1.0, reason="")
    guarantees.committed(5.5, fine, envelope=5.5)
    guarantees.committed(5.6, replace(fine, bound=math.inf), envelope=5.5)
    with pytest.raises(GuaranteeViolation, match="Envelope") as violated:
        guarantees.committed(5.6, fine, envelope=5.5)
    assert violated.value.guarantee == "Envelope" and violated.value.numbers["envelope"] == 5.5


def test_a_moved_yardstick_moves_what_a_commit_is_compared_with() -> None:
    guarantees = Guarantees()
    guarantees.committed(5.0)
    shifted = Judgement(True, innovation=0.5, bound=0.5, reason="")
    with pytest.raises(GuaranteeViolation, match=r"Proposition 7\.5"):
        guarantees.committed(8.5, shifted)
    guarantees.rebased(3.0)
    guarantees.committed(8.5, shifted)
    for nothing in (-2.0, math.nan, math.inf):
        guarantees.rebased(nothing)
    assert guarantees.highest == 8.5


def test_it_goes_from_one_process_to_another() -> None:
    error = GuaranteeViolation("Envelope", "too high", {"measurement": 1.0})
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is GuaranteeViolation and str(other) == str(error)
    assert (other.guarantee, other.numbers) == ("Envelope", {"measurement": 1.0})
