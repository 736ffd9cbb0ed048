"""The budget of refusals: it stops in time, never early, and is never rolled back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_stability.errors import StabilityStop
from dist_stability.escalation import RefusalBudget
from dist_stability.verdict import Action, Verdict


@given(st.lists(st.sampled_from(list(Action)), max_size=60), st.integers(1, 6))
@settings(deadline=None)
def test_stops_exactly_when_the_budget_is_spent(actions: list[Action], limit: int) -> None:
    budget, in_a_row = RefusalBudget(limit), 0
    for index, action in enumerate(actions):
        in_a_row = 0 if action.accepted else in_a_row + action.refused
        verdict = Verdict(action, index, signal="probe", reason="because")
        if in_a_row >= limit and action.refused:
            with pytest.raises(StabilityStop, match="because") as stop:
                budget.record(verdict)
            assert stop.value.report["refusals_in_a_row"] == limit
            json.dumps(stop.value.report)
            return
        budget.record(verdict)
        budget.load_state_dict(json.loads(json.dumps(budget.state_dict())))


def test_a_loss_scale_overflow_spends_nothing() -> None:
    budget = RefusalBudget(1)
    for index in range(10):
        budget.record(Verdict(Action.SCALER_SKIP, index))
    assert budget.total == 0
