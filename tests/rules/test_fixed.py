"""FixedInnovation is Algorithm 1 of the controller paper, to the letter."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_stability.rules import DeepRule, FixedInnovation, Rule, supports_deep

finite = st.floats(-1e6, 1e6)


def algorithm_1(values: list[float], epsilon: float, alpha: float) -> list[bool]:
    """The paper's pseudocode: y_hat is moved by commits only."""
    decisions, y_hat = [], values[0]
    for y in values[1:]:
        decisions.append(y - y_hat <= epsilon)
        if decisions[-1]:
            y_hat = (1 - alpha) * y_hat + alpha * y
    return decisions


def run(rule: FixedInnovation, values: list[float]) -> list[bool]:
    decisions = []
    rule.commit(values[0])
    for y in values[1:]:
        decisions.append(rule.judge(y).accepted)
        (rule.commit if decisions[-1] else rule.reject)(y)
    return decisions


class TestAlgorithm1:
    @settings(max_examples=300, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        epsilon=st.floats(0.001, 3),
        alpha=st.floats(0.001, 1),
        spread=st.sampled_from([0.01, 1.0, 30.0]),
    )
    def test_random_streams(self, seed: int, epsilon: float, alpha: float, spread: float) -> None:
        draw = random.Random(seed)
        values = [2 * math.exp(-t / 40) + spread * draw.gauss(0, 1) for t in range(150)]
        assert run(FixedInnovation(epsilon, alpha), values) == algorithm_1(values, epsilon, alpha)

    def test_a_worked_example(self) -> None:
        rule = FixedInnovation(epsilon=0.5, alpha=0.5)
        rule.commit(2.0)  # y_hat = 2
        assert rule.judge(2.5).accepted and rule.judge(2.5).innovation == 0.5  # "<=": the threshold itself is committed
        rule.commit(2.5)  # y_hat = 2.25
        judgement = rule.judge(2.7500001)
        assert not judgement.accepted and judgement.bound == 0.5 and "above epsilon 0.5" in judgement.reason
        rule.reject(2.7500001)
        assert rule.state_dict()["reference"] == 2.25  # a refusal leaves y_hat alone
        assert not judgement.deep

    def test_a_falling_loss_hides_damage_below_a_lagging_reference(self) -> None:
        """Why it is not the default: y_hat lags above the probe, so a rise larger than epsilon is committed."""
        rule, y = FixedInnovation(epsilon=0.5, alpha=0.1), 3.0
        rule.commit(y)
        for _ in range(20):
            y -= 0.1
            rule.commit(y)
        assert rule.judge(y + 1.0).accepted

    @given(norm=st.one_of(st.none(), st.floats()))
    def test_the_gradient_norm_is_not_looked_at(self, norm: float | None) -> None:
        rule = FixedInnovation(0.5)
        rule.commit(1.0)
        assert rule.judge(1.2, norm) == rule.judge(1.2)
        assert rule.judge(1.6, norm) == rule.judge(1.6)


class TestAnyFloat:
    @settings(max_examples=200, deadline=None)
    @given(values=st.lists(st.floats(), max_size=30), alpha=st.floats(0, 1, exclude_min=True))
    def test_never_raises_never_holds_a_non_finite_number(self, values: list[float], alpha: float) -> None:
        rule = FixedInnovation(0.5, alpha)
        for index, y in enumerate(values):
            judgement = rule.judge(y)
            assert math.isfinite(y) or not judgement.accepted
            # Every third value is committed whatever the judgement, as in observe mode.
            (rule.commit if judgement.accepted or index % 3 == 0 else rule.reject)(y)
            assert rule.state_dict()["reference"] is None or math.isfinite(rule.state_dict()["reference"])

    @given(before=finite, refused=st.lists(st.floats(), max_size=10))
    def test_refused_values_change_nothing(self, before: float, refused: list[float]) -> None:
        rule = FixedInnovation(0.5)
        rule.commit(before)
        state = rule.state_dict()
        for y in refused:
            rule.judge(y)
            rule.reject(y)
        assert rule.state_dict() == state

    def test_nan_at_the_start_leaves_no_reference(self) -> None:
        rule = FixedInnovation(0.5)
        rule.commit(math.nan)
        judgement = rule.judge(7.0)
        assert judgement.accepted and judgement.bound == math.inf and math.isnan(judgement.innovation)
        assert not rule.judge(math.nan).accepted
        rule.commit(7.0)
        assert not rule.judge(8.0).accepted

    @settings(max_examples=200, deadline=None)
    @given(start=finite, value=finite, alpha=st.floats(1e-9, 1))
    def test_the_reference_stays_between_what_was_committed(self, start: float, value: float, alpha: float) -> None:
        rule = FixedInnovation(0.5, alpha)
        rule.commit(start)
        for _ in range(50):
            rule.commit(value)
            assert min(start, value) <= rule.state_dict()["reference"] <= max(start, value)


class TestStateAndSettings:
    @given(values=st.lists(finite, min_size=2, max_size=40), cut=st.integers(1, 39))
    def test_a_round_trip_in_mid_stream_changes_no_later_judgement(self, values: list[float], cut: int) -> None:
        original, copy = FixedInnovation(0.5), FixedInnovation(0.5)
        run(original, values[:cut])
        copy.load_state_dict(json.loads(json.dumps(original.state_dict())))
        for y in values[cut:]:
            assert original.judge(y) == copy.judge(y)
            if original.judge(y).accepted:
                original.commit(y), copy.commit(y)

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"rule": "PredictiveInnovation", "reference": 1.0}, "key 'rule' is 'PredictiveInnovation'"),
            ({"reference": 1.0}, "key 'rule' is None, expected 'FixedInnovation'"),
            ({"rule": "FixedInnovation"}, r"missing keys \['reference'\]"),
            ({"rule": "FixedInnovation", "reference": math.inf}, "'reference' is inf"),
        ],
    )
    def test_a_foreign_or_damaged_state_is_named_and_changes_nothing(self, state: dict, message: str) -> None:
        rule = FixedInnovation(0.5)
        rule.commit(3.0)
        with pytest.raises(ValueError, match=message):
            rule.load_state_dict(state)
        assert rule.state_dict()["reference"] == 3.0

    @pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
    def test_epsilon_outside_its_range(self, bad: float) -> None:
        with pytest.raises(ValueError, match="FixedInnovation epsilon must be a finite number >= 0, got"):
            FixedInnovation(bad)

    @pytest.mark.parametrize("bad", [0, -0.1, 1.1, math.nan])
    def test_alpha_outside_its_range(self, bad: float) -> None:
        with pytest.raises(ValueError, match="FixedInnovation alpha must be a number with 0 < alpha <= 1, got"):
            FixedInnovation(0.5, bad)

    @pytest.mark.parametrize("bad", ["0.5", None, True])
    def test_wrong_types(self, bad: object) -> None:
        with pytest.raises(TypeError, match="epsilon"):
            FixedInnovation(bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="alpha"):
            FixedInnovation(0.5, bad)  # type: ignore[arg-type]

    def test_protocols(self) -> None:
        rule = FixedInnovation(0.5)
        assert isinstance(rule, Rule) and not isinstance(rule, DeepRule) and not supports_deep(rule)
        assert rule.settings() == {"epsilon": 0.5, "alpha": 0.1}
        assert repr(rule) == "FixedInnovation(epsilon=0.5, alpha=0.1; reference=None)"
