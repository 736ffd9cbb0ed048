"""No sequence of verdicts can exceed a budget of the ladder, loop on it, or get past its stop; hypothesis tries.

The machine below keeps its own record of what was asked and answered, and checks every answer against the settings by
counting in that record. At every event a second ladder, made from the first one's saved state, must answer the same.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dist_stability.escalation import Ladder
from dist_stability.rungs import Escalation, Pattern, Refusal, Response, Rung

SETTINGS = st.builds(
    Escalation,
    attenuate_after=st.integers(0, 4),
    halvings=st.integers(1, 5),
    max_cuts=st.integers(0, 2),
    cut_factor=st.sampled_from([0.25, 0.5, 0.9]),
    cut_steps=st.integers(0, 5),
    ramp_steps=st.integers(1, 5),
    shape_after=st.integers(0, 5),
    trend_after=st.integers(0, 4),
    deep_after=st.integers(0, 6),
    max_deep=st.integers(0, 3),
    reload_after=st.integers(0, 5),
    max_reloads=st.integers(0, 2),
    max_refusals_in_row=st.integers(1, 14),
    max_refusals_in_window=st.integers(4, 20),
    window=st.integers(20, 40),
)
NUMBER = st.floats(allow_nan=True, allow_infinity=True)
FACTS: dict[str, Any] = {
    "signal": st.sampled_from(["probe", "probe", "probe", "gradient", "error", "replica", "trend"]),
    "measurement": st.one_of(st.none(), NUMBER),
    "evidence": st.one_of(st.just(0.0), NUMBER),
    "finite": st.booleans(),
    "wants_deep": st.sampled_from([False, False, False, True]),
    "alone": st.sampled_from([True, True, True, False]),
    "anchors": st.sampled_from([0, 1, 2, 2, 2]),
    "can_reload": st.booleans(),
    "can_shape": st.booleans(),
    "batch": st.one_of(st.none(), st.integers(0, 3)),
}
QUIET = {"signal": "probe", "evidence": 0.0, "finite": True, "wants_deep": False}


class AnyVerdicts(RuleBasedStateMachine):
    """Attempts in any order of outcomes, each told to the ladder as the settlement tells it."""

    @initialize(chosen=SETTINGS, risky=st.booleans())
    def start(self, chosen: Escalation, risky: bool) -> None:
        self.settings = chosen
        self.ladder = Ladder(chosen)
        self.ladder.warned(risky)
        self.risky = risky
        self.attempt = 0
        self.answers: list[tuple[int, Response]] = []  # every refusal
        self.in_a_row = 0
        self.total = 0
        self.alarms = 0
        self.cuts_in_force = 0
        self.since_cut = 0
        self.ended = False
        self.since = 0

    # ------------------------------------------------------------------ what may happen

    @precondition(lambda self: not self.ended)
    @rule(alarm=st.sampled_from([None, False, True, True, True]), times=st.integers(1, 3))
    def accept(self, alarm: bool | None, times: int) -> None:
        for _ in range(times):
            if self.ladder.overdue():
                return  # the controller refuses the attempt then, if nothing else does
            before = self.ladder.learning_rate_factor
            self.both(lambda ladder: ladder.accepted(self.attempt, alarm=alarm))
            if alarm is not None:
                self.alarms = self.alarms + 1 if alarm else 0
            self.stands(before)

    @precondition(lambda self: not self.ended)
    @rule(facts=st.fixed_dictionaries(FACTS), shorter=st.booleans())
    def refuse(self, facts: dict[str, Any], shorter: bool) -> None:
        self.ask(facts, shorter)

    @precondition(lambda self: not self.ended)
    @rule(facts=st.fixed_dictionaries(FACTS), shorter=st.booleans(), times=st.integers(2, 8))
    def refuse_again_and_again(self, facts: dict[str, Any], shorter: bool, times: int) -> None:
        for _ in range(times):
            self.ask({**facts, **QUIET}, shorter)

    @precondition(lambda self: not self.ended)
    @rule()
    def overflow(self) -> None:
        """A loss-scale overflow: the ladder is told nothing."""
        self.attempt += 1

    @precondition(lambda self: not self.ended)
    @rule(times=st.integers(1, 60))
    def calm(self, times: int) -> None:
        for _ in range(times):
            self.accept(False, 1)

    @precondition(lambda self: not self.ended)
    @rule(gap=st.integers(8, 12), times=st.integers(1, 4), anchors=st.integers(0, 2))
    def diverge_now_and_then(self, gap: int, times: int, anchors: int) -> None:
        for _ in range(times):
            self.ask({"signal": "trend", "anchors": anchors}, False)
            if not self.ended:
                self.accept(False, gap)

    @precondition(lambda self: self.ended)
    @rule(facts=st.fixed_dictionaries(FACTS), ignored=st.integers(0, 45))
    def past_the_stop(self, facts: dict[str, Any], ignored: int) -> None:
        """Also for a loop that goes on all the same, so that every budget is free again."""
        for _ in range(ignored):
            factor = self.ladder.learning_rate_factor
            self.ladder.accepted(self.attempt, alarm=False)
            self.alarms = 0
            self.stands(factor)
        answer = self.ladder.refused(Refusal(self.attempt, **facts))
        assert answer.rung is Rung.STOP
        self.answers.append((self.attempt, answer))
        self.total += 1
        self.in_a_row += 1
        self.attempt += 1

    @precondition(lambda self: self.ended)
    @rule()
    def start_again_from_a_checkpoint(self) -> None:
        """A run that had stopped may try again with a new budget of refusals; the other budgets stay spent."""
        self.ladder = self.loaded()
        self.ended, self.in_a_row, self.since = False, 0, self.attempt

    # ------------------------------------------------------------------ what must hold

    def ask(self, facts: dict[str, Any], shorter: bool) -> None:
        if self.ended:
            return
        refusal = Refusal(self.attempt, **facts)
        diverges = refusal.signal == "trend" or (refusal.quiet and self.ladder.overdue() is not None)
        before = self.ladder.learning_rate_factor
        answer = self.both(lambda ladder: ladder.refused(refusal))
        self.in_a_row += 1
        self.total += 1
        self.check(refusal, answer, before, diverges)
        self.answers.append((self.attempt, answer))
        if answer.deep or answer.rung is Rung.RELOAD or (diverges and answer.rung is not Rung.STOP):
            self.alarms = 0
            assert self.ladder.overdue() is None, "acted on"
        if answer.rung is Rung.CUT_LR:
            self.cuts_in_force += 1
            self.since_cut = 0
        if answer.rung is Rung.ATTENUATE:
            factor = self.ladder.learning_rate_factor
            shorter = shorter and self.ladder.halvings > 0
            self.both(lambda ladder: ladder.shortened(shorter))
            if shorter:
                self.stands(factor)
                return
        self.ended = answer.rung is Rung.STOP
        self.attempt += 1

    def check(self, refusal: Refusal, answer: Response, factor: float, diverges: bool) -> None:
        """The answer against the record so far, which does not have it yet."""
        limits, rung = self.settings, answer.rung
        recent = [past for attempt, past in self.answers if attempt > refusal.attempt - limits.window] + [answer]
        since = [
            past for attempt, past in self.answers if attempt >= max(self.since, refusal.attempt - limits.window + 1)
        ]
        spent = self.in_a_row >= limits.max_refusals_in_row or len(since) + 1 >= limits.max_refusals_in_window
        assert (rung is Rung.STOP) == spent, "it stops exactly when a budget is spent"
        assert sum(past.deep for past in recent) <= limits.max_deep
        assert sum(past.rung is Rung.CUT_LR for past in recent) <= limits.max_cuts
        reloads = [past for _, past in self.answers if past.rung is Rung.RELOAD]
        if rung is Rung.RELOAD:
            assert len(reloads) < limits.max_reloads and refusal.can_reload
            assert 0 < limits.reload_after <= self.in_a_row
        if answer.deep:
            assert refusal.anchors > 0 and rung in (Rung.DEEP_ROLLBACK, Rung.CUT_LR)
            asked = refusal.wants_deep or diverges or 0 < limits.deep_after <= self.in_a_row
            assert asked
        assert answer.deep or rung is not Rung.DEEP_ROLLBACK
        if rung is Rung.ATTENUATE:
            assert refusal.quiet and refusal.alone and limits.attenuate_after
        if rung is Rung.SHAPE:
            assert self.risky and refusal.can_shape and refusal.signal == "probe" and refusal.finite
            assert limits.shape_after
            assert all(past.rung is not Rung.SHAPE for _, past in self.answers), "once in a run"
        assert self.ladder.shaping == any(past.rung is Rung.SHAPE for past in [*dict(self.answers).values(), answer])
        if rung is Rung.STOP:
            assert not answer.deep and self.ladder.stopped
            assert answer.pattern is not Pattern.TRANSIENT
            json.dumps(self.ladder.report())
        after = self.ladder.learning_rate_factor
        assert after == (factor * limits.cut_factor if rung is Rung.CUT_LR else factor)

    def stands(self, factor: float) -> None:
        """A step was accepted, whole or in part."""
        self.in_a_row = 0
        self.attempt += 1
        self.since_cut += 1
        after = self.ladder.learning_rate_factor
        assert after >= factor, "a cut is only ever taken back by accepted steps"
        if self.since_cut >= self.settings.cut_steps + self.settings.ramp_steps:
            assert after == 1.0
            self.cuts_in_force = 0
        elif self.since_cut <= self.settings.cut_steps:
            assert after == factor

    @invariant()
    def counts_and_bounds(self) -> None:
        if not hasattr(self, "ladder"):
            return
        assert (self.ladder.in_a_row, self.ladder.total) == (self.in_a_row, self.total)
        lowest = self.settings.cut_factor**self.cuts_in_force
        assert lowest * (1 - 1e-9) <= self.ladder.learning_rate_factor <= 1.0
        assert self.ladder.state_dict()["alarms"] == self.alarms
        after = self.settings.trend_after
        assert (self.ladder.overdue() is not None) == (0 < after <= self.alarms)

    def both(self, event: Any) -> Any:
        """Give an event to the ladder and to one that was loaded just before; they must agree from then on."""
        other = self.loaded()
        answer = event(self.ladder)
        assert event(other) == answer
        assert json.dumps(other.state_dict()) == json.dumps(self.ladder.state_dict())
        return answer

    def loaded(self) -> Ladder:
        other = Ladder(self.settings)
        other.load_state_dict(json.loads(json.dumps(self.ladder.state_dict())))
        return other

    def teardown(self) -> None:
        """From wherever it is, refusals without end are stopped within the budget: nothing loops."""
        if not hasattr(self, "ladder") or self.ended:
            return
        left = max(1, self.settings.max_refusals_in_row - self.in_a_row)
        for _ in range(left):
            self.ask(QUIET, False)
            if self.ended:
                return
        raise AssertionError(f"not stopped after {left} more refusals")


TestAnyVerdicts = AnyVerdicts.TestCase
TestAnyVerdicts.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def test_every_rung_is_within_reach_of_the_machine() -> None:
    """What the machine checks would be worth little if the rungs were never taken."""
    chosen = Escalation(
        attenuate_after=2,
        max_cuts=1,
        shape_after=5,
        deep_after=8,
        max_deep=1,
        reload_after=10,
        max_reloads=1,
        max_refusals_in_row=12,
        max_refusals_in_window=40,
        window=64,
    )
    ladder = Ladder(chosen)
    ladder.warned(True)
    taken = []
    for attempt in range(60):
        quiet = Refusal(attempt, "probe", anchors=2, can_reload=True, can_shape=True)
        answer = ladder.refused(quiet if attempt % 2 else replace(quiet, signal="probe"))
        taken.append(answer.rung)
        if answer.rung is Rung.ATTENUATE:
            ladder.shortened(committed=attempt < 20)
        if answer.rung is Rung.STOP:
            break
    assert set(taken) == set(Rung)
