"""SlowDivergence: sees a rise that no single commit shows, and stays silent on healthy runs."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_stability.rules.trend import SlowDivergence


def alarms(values: Iterable[float], trend: SlowDivergence | None = None) -> list[int]:
    trend = SlowDivergence() if trend is None else trend
    return [index for index, value in enumerate(values) if trend.commit(value)]


def noisy(length: int, level: Callable[[int], float], sigma: float = 0.01, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [level(t) + sigma * draw.gauss(0, 1) for t in range(length)]


class TestAlarm:
    @pytest.mark.parametrize("seed", range(5))
    def test_a_rise_of_half_a_scale_per_commit(self, seed: int) -> None:
        values = noisy(400, lambda t: 1 + 0.006 * max(0, t - 200), seed=seed)
        first = alarms(values)[0]
        assert 210 < first < 260  # 0.006 per commit, sigma 0.01: no single step is above 4 scales
        assert all(b - a < 0.05 for a, b in pairwise(values[200:first]))

    def test_the_reason_says_from_where_to_where(self) -> None:
        trend = SlowDivergence()
        for value in noisy(100, lambda t: 2.0):
            trend.commit(value)
        reason = trend.commit(3.0)
        assert reason is not None and "to 3 within 48 commits" in reason and "threshold 14" in reason
        assert re.search(r"rose from (1\.9|2|2\.0)\d* to 3", reason)

    def test_it_goes_on_while_the_rise_is_within_the_window_and_then_stops(self) -> None:
        values = [*noisy(150, lambda t: 1.0), *noisy(150, lambda t: 1.5, seed=1)]
        found = alarms(values)
        assert found[0] == 150 and 190 <= found[-1] <= 210  # a new level is no divergence
        assert found == list(range(found[0], found[-1] + 1))

    def test_the_scale_is_that_of_before_the_rise(self) -> None:
        """A run that diverges gets noisier; measured by its present noise the rise would be small."""
        draw = random.Random(2)
        values = [1 + 0.01 * draw.gauss(0, 1) for _ in range(150)]
        values += [1 + 0.01 * t + 0.01 * t * abs(draw.gauss(0, 1)) for t in range(1, 40)]
        assert alarms(values)[0] < 175

    def test_a_larger_threshold_alarms_later(self) -> None:
        values = noisy(400, lambda t: 1 + 0.006 * max(0, t - 200))
        firsts = [alarms(values, SlowDivergence(threshold))[0] for threshold in (5, 10, 20)]
        assert firsts == sorted(firsts) and firsts[0] < firsts[2]


class TestSilence:
    @pytest.mark.parametrize(
        ("name", "level"),
        [
            ("plateau", lambda t: 1.0),
            ("descent", lambda t: 1 + 3 * math.exp(-t / 300)),
            ("slow overfitting, a tenth of the noise in 48 commits", lambda t: 1 + 1e-3 * t / 48),
            ("slow overfitting, four times the noise in 48 commits", lambda t: 1 + 4e-2 * t / 48),
            ("ripple", lambda t: 1 + 3 * math.exp(-t / 300) + 0.02 * math.sin(t / 12)),
        ],
    )
    def test_healthy_runs(self, name: str, level: Callable[[int], float]) -> None:
        for seed in range(5):
            assert not alarms(noisy(4000, level, seed=seed)), name

    def test_needs_56_commits(self) -> None:
        values = [*noisy(55, lambda t: 1.0), 5.0]
        assert not alarms(values)
        values = [*noisy(56, lambda t: 1.0), 5.0]
        assert alarms(values) == [56]

    def test_restart_forgets(self) -> None:
        trend = SlowDivergence()
        alarms(noisy(200, lambda t: 1.0), trend)
        trend.restart()
        assert not alarms(noisy(200, lambda t: 2.0), trend)
        assert trend.settings() == {"threshold": 14.0}

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e201])
    def test_what_is_no_measurement_is_left_out(self, bad: float) -> None:
        trend, clean = SlowDivergence(), SlowDivergence()
        for value in noisy(100, lambda t: 1.0):
            trend.commit(value), clean.commit(value)
            assert trend.commit(bad) is None
        assert trend.state_dict() == clean.state_dict()

    def test_equal_measurements_teach_nothing(self) -> None:
        trend = SlowDivergence()
        alarms(noisy(100, lambda t: 1.0), trend)
        before = trend.state_dict()
        for _ in range(100):
            trend.commit(before["last"])
        assert trend.state_dict() == before


class TestSteps:
    def test_commits_that_are_further_apart_may_rise_by_the_root(self) -> None:
        """A random walk seen at every fourth step scatters twice as much; the bar follows when the cadence changes."""

        def reach(steps: int) -> float:
            trend = SlowDivergence()
            alarms(noisy(200, lambda t: 1.0), trend)
            low, high = 1.0, 2.0
            for _ in range(40):
                middle = (low + high) / 2
                copy = SlowDivergence()
                copy.load_state_dict(trend.state_dict())
                low, high = (low, middle) if copy.commit(middle, steps) else (middle, high)
            return low - 1

        assert reach(145) == pytest.approx(2 * reach(1), rel=0.05)  # 47 + 145 = 4 x 48 steps


class TestAnyFloat:
    @settings(max_examples=100, deadline=None)
    @given(values=st.lists(st.one_of(st.floats(), st.floats(-1, 1)), max_size=120), steps=st.integers(1, 10**6))
    def test_never_raises_never_holds_a_non_finite_number(self, values: list[float], steps: int) -> None:
        trend = SlowDivergence()
        for value in values:
            trend.commit(value, steps)
        json.dumps(trend.state_dict(), allow_nan=False)
        assert repr(trend)

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 10_000), power=st.integers(-60, 60))
    def test_a_power_of_two_changes_nothing(self, seed: int, power: int) -> None:
        values = noisy(300, lambda t: 1 + 0.01 * max(0, t - 150), seed=seed)
        assert alarms(values) == alarms([math.ldexp(value, power) for value in values])


class TestState:
    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 10_000), cut=st.integers(0, 299))
    def test_a_round_trip_in_mid_stream_changes_nothing(self, seed: int, cut: int) -> None:
        values = noisy(300, lambda t: 1 + 0.01 * max(0, t - 150), seed=seed)
        original, copy = SlowDivergence(), SlowDivergence()
        for value in values[:cut]:
            original.commit(value)
        copy.load_state_dict(json.loads(json.dumps(original.state_dict())))
        assert [original.commit(v) for v in values[cut:]] == [copy.commit(v) for v in values[cut:]]
        assert original.state_dict() == copy.state_dict()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rule": "Other"}, "key 'rule' is 'Other', expected 'SlowDivergence'"),
            ({"level": math.nan}, "'level' is nan"),
            ({"levels": [1.0]}, "equally long"),
            ({"commits": -1}, "'commits' is -1"),
        ],
    )
    def test_a_damaged_state_is_named_and_changes_nothing(self, change: dict[str, Any], message: str) -> None:
        trend = SlowDivergence()
        alarms(noisy(100, lambda t: 1.0), trend)
        before = trend.state_dict()
        with pytest.raises(ValueError, match=message):
            trend.load_state_dict({**before, **change})
        assert trend.state_dict() == before

    @pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
    def test_threshold_outside_its_range(self, bad: float) -> None:
        with pytest.raises(ValueError, match=r"SlowDivergence threshold must be a finite number > 0"):
            SlowDivergence(bad)
