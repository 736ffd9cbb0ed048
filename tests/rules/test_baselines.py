"""The field's rules: each against its formula written a second time, NaN, state, settings."""

from __future__ import annotations

import json
import math
import random
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dist_stability.rules import DeepRule, Rule, settings_of, supports_deep
from dist_stability.rules.baselines import BASELINES, RobustTrend, SixSigma, ZClip

NAMES = list(BASELINES)


def stream(seed: int, steps: int = 500) -> list[float]:
    """A falling level with noise, spikes of all sizes, and a lasting rise at the end."""
    draw = random.Random(seed)
    values = []
    for step in range(steps):
        value = 2 + math.exp(-step / 60) + 0.02 * draw.gauss(0, 1)
        if draw.random() < 0.1:
            value *= 1 + 10 ** draw.uniform(-2, 1.6)
        values.append(value + 3.0 * (step > 0.8 * steps))
    return values


def decide(rule: Rule, values: list[float]) -> list[bool]:
    """The same number is given as measurement and norm, so that every rule finds what it watches."""
    decisions = []
    for value in values:
        decisions.append(rule.judge(value, abs(value)).accepted)
        (rule.commit if decisions[-1] else rule.reject)(value, abs(value))
    return decisions


def six_sigma(values: list[float], threshold: float) -> list[bool]:
    decisions = []
    for index, value in enumerate(values):
        window = torch.tensor(values[max(0, index - 128) : index], dtype=torch.float64)
        if len(window) < 64:
            decisions.append(True)
            continue
        std, mean = torch.std_mean(window)
        decisions.append(bool(value - mean <= threshold * std))
    return decisions


def zclip(values: list[float], threshold: float) -> list[bool]:
    decisions: list[bool] = []
    mean = var = 0.0
    for index, norm in enumerate(values):
        if index < 25:
            decisions.append(True)
            if index == 24:
                mean, var = float(np.mean(values[:25])), float(np.var(values[:25]))
            continue
        z = (norm - mean) / (math.sqrt(var) + 1e-6)
        decisions.append(z <= threshold)
        effective = norm if z <= threshold else mean + (threshold * math.sqrt(var)) / (z / threshold)
        mean = 0.97 * mean + (1 - 0.97) * effective
        var = 0.97 * var + (1 - 0.97) * (effective - mean) ** 2
    return decisions


def lightning(values: list[float], threshold: float) -> list[bool]:
    decisions, window, last = [], deque([values[0]], maxlen=10), values[0]
    for value in values[1:]:
        mean = float(np.mean(window))
        spike = value - last > 0 and abs(value - mean) >= abs(threshold * mean)
        decisions.append(not spike)
        if not spike:
            window.append(value)
            last = value
    return [True, *decisions]


def metaseq(values: list[float], threshold: float) -> list[bool]:
    decisions, average = [], values[0]
    for value in values:
        decisions.append(value / average <= threshold)
        if decisions[-1]:
            average = 0.8 * average + 0.2 * value
    return decisions


def megatron(values: list[float], threshold: float) -> list[bool]:
    largest = max(values[:100])
    return [index < 100 or value < threshold * largest for index, value in enumerate(values)]


def llm_foundry(values: list[float], threshold: float) -> list[bool]:
    decisions, window, outliers = [], deque(maxlen=100), 0
    for value in values:
        fired = False
        if len(window) == 100:
            if value >= float(np.mean(window)) * threshold:
                outliers += 1
                fired = outliers > 4
            else:
                outliers = 0
        decisions.append(not fired)
        window.append(value)
    return decisions


def slope_score(values: np.ndarray) -> float:
    x = np.arange(len(values))
    (slope, _), covariance = np.polyfit(x, values, 1, cov="unscaled")
    residual = values - np.polyval(np.polyfit(x, values, 1), x)
    return float(slope / math.sqrt(residual @ residual / (len(values) - 2) * covariance[0, 0]))


def dlib(values: list[float], threshold: float) -> list[bool]:
    decisions: list[bool] = []
    window: list[float] = []
    tail = 0.5 * math.erfc(threshold / math.sqrt(2))
    for value in values:
        data = np.array([*window, value][-60:])
        refuse = False
        if len(data) >= 30:
            kept = data[data <= np.sort(data)[round((len(data) - 1) * 0.9)]]
            score = max(slope_score(data), slope_score(kept))
            refuse = 0.5 * math.erfc(score / math.sqrt(2)) < tail
        decisions.append(not refuse)
        if refuse:
            window, tail = [], 0.9 * tail
        else:
            window = [*window, value][-59:]
    return decisions


def gradient_mad(values: list[float], threshold: float) -> list[bool]:
    decisions, window = [], deque(maxlen=50)
    for value in values:
        ok = True
        if len(window) >= 20:
            middle = np.median(window)
            scale = max(1.4826 * np.median(np.abs(np.array(window) - middle)), 1e-3)
            ok = bool((math.log(value) - middle) / scale <= threshold)
        decisions.append(ok)
        if ok:
            window.append(math.log(value))
    return decisions


def holt(values: list[float], threshold: float) -> list[bool]:
    decisions, level, slope, variance, seen = [True], values[0], 0.0, 0.0, 1
    for value in values[1:]:
        error = value - level - slope
        decisions.append(seen < 20 or error <= threshold * math.sqrt(variance))
        if decisions[-1]:
            seen += 1
            new = 0.5 * value + 0.5 * (level + slope)
            variance += max(0.1, 1 / seen) * (error**2 - variance)
            slope, level = 0.9 * slope + 0.1 * (new - level), new
    return decisions


REFERENCES: dict[str, Callable[[list[float], float], list[bool]]] = {
    "olmo-loss": six_sigma,
    "olmo-gradient": six_sigma,
    "zclip": zclip,
    "lightning": lightning,
    "metaseq": metaseq,
    "megatron": megatron,
    "llm-foundry": llm_foundry,
    "dlib": dlib,
    "gradient-mad": gradient_mad,
    "holt": holt,
}
ORIGINALS = {
    "olmo-loss": 6.0,
    "olmo-gradient": 6.0,
    "zclip": 2.5,
    "lightning": 2.0,
    "metaseq": 1.25,
    "megatron": 10.0,
    "llm-foundry": 2.0,
    "dlib": 2.3263,
    "gradient-mad": 6.0,
    "holt": 6.0,
}

SENSITIVE = {"metaseq": 1.08, "megatron": 0.5}
"""Where 0.6 times the original's threshold would mean nothing."""


class TestFormulas:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("sensitive", [True, False])
    def test_the_formula_written_a_second_time(self, name: str, sensitive: bool) -> None:
        threshold = SENSITIVE.get(name, 0.6 * ORIGINALS[name]) if sensitive else ORIGINALS[name]
        refused = 0
        for seed in range(5):
            values = stream(seed)
            decisions = decide(BASELINES[name](threshold=threshold), values)
            assert decisions == REFERENCES[name](values, threshold)
            refused += decisions.count(False)
        # Ten times the largest of a hundred is out of these streams' reach.
        assert refused or (name, sensitive) == ("megatron", False)

    def test_the_bound_of_six_sigma_in_full_precision(self) -> None:
        rule, values = SixSigma(), stream(5)
        for index, value in enumerate(values):
            if index >= 64:
                std, mean = torch.std_mean(torch.tensor(values[max(0, index - 128) : index], dtype=torch.float64))
                judgement = rule.judge(value)
                assert judgement.bound == pytest.approx(6 * float(std), rel=1e-9)
                assert judgement.innovation == pytest.approx(value - float(mean), rel=1e-6, abs=1e-9)
            rule.commit(value)

    @pytest.mark.parametrize("name", NAMES)
    def test_the_default_is_the_original_s(self, name: str) -> None:
        values = stream(7)
        assert decide(BASELINES[name](), values) == decide(BASELINES[name](threshold=ORIGINALS[name]), values)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_larger_threshold_refuses_no_more_at_the_same_history(self, name: str) -> None:
        history = [2 + 0.01 * math.sin(7 * step) for step in range(150)]
        if name == "llm-foundry":
            history += [50.0] * 4
        for value in (2.05, 2.5, 4.0, 9.0, 100.0, 1e5):
            accepted = []
            for threshold in (1.1, 2.0, 5.0, 20.0):
                rule = BASELINES[name](threshold=threshold)
                for past in history:
                    rule.commit(past, past)
                accepted.append(rule.judge(value, value).accepted)
            assert accepted == sorted(accepted)


class TestStreams:
    @pytest.mark.parametrize("name", NAMES)
    def test_each_watches_one_number(self, name: str) -> None:
        rule = BASELINES[name]()
        for step in range(200):
            # The other number jumps about and must not matter.
            own, other = 2 + 0.01 * math.sin(step), float(10 ** (step % 9))
            pair = (other, own) if rule.watches == "gradient" else (own, other)  # type: ignore[attr-defined]
            assert rule.judge(*pair).accepted
            rule.commit(*pair)

    def test_a_gradient_rule_without_a_norm_accepts(self) -> None:
        rule = SixSigma(watches="gradient")
        for _ in range(200):
            rule.commit(1.0, 1.0)
        assert rule.judge(1e9).accepted and not rule.judge(1.0, 1e9).accepted

    def test_which_watches_what(self) -> None:
        watches = {name: BASELINES[name]().watches for name in NAMES}  # type: ignore[attr-defined]
        assert {name for name in NAMES if watches[name] == "gradient"} == {"olmo-gradient", "zclip", "gradient-mad"}
        assert {name for name in NAMES if watches[name] == "probe"} == {"holt"}


class TestAnyFloat:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e200])
    def test_not_finite_is_refused_and_teaches_nothing(self, name: str, odd: float) -> None:
        values = stream(3)
        clean, spoilt = BASELINES[name](), BASELINES[name]()
        assert decide(clean, values[:150]) == decide(spoilt, values[:150])
        for _ in range(3):
            assert not spoilt.judge(odd, 1.0).accepted
            assert not spoilt.judge(1.0, odd).accepted
        spoilt.reject(odd, odd)
        spoilt.commit(odd, odd)  # observe mode
        assert spoilt.state_dict() == clean.state_dict()
        assert decide(clean, values[150:]) == decide(spoilt, values[150:])

    @pytest.mark.parametrize("name", NAMES)
    def test_judging_changes_nothing(self, name: str) -> None:
        rule = BASELINES[name]()
        decide(rule, stream(1)[:200])
        before = rule.state_dict()
        assert rule.judge(2.0, 2.0) == rule.judge(2.0, 2.0)
        rule.judge(1e6, 1e6)
        assert rule.state_dict() == before

    @pytest.mark.parametrize("name", NAMES)
    def test_a_constant_stream_is_never_refused(self, name: str) -> None:
        assert all(decide(BASELINES[name](), [1.3] * 300))


class TestState:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("cut", [0, 1, 24, 70, 150, 390])
    def test_a_round_trip_changes_no_later_decision(self, name: str, cut: int) -> None:
        values = stream(11)
        original, copy = BASELINES[name](), BASELINES[name]()
        decide(original, values[:cut])
        copy.load_state_dict(json.loads(json.dumps(original.state_dict())))
        assert decide(copy, values[cut:]) == decide(original, values[cut:])
        assert copy.state_dict() == original.state_dict()

    @pytest.mark.parametrize("name", NAMES)
    def test_a_saved_state_does_not_move_on(self, name: str) -> None:
        rule = BASELINES[name]()
        decide(rule, stream(2)[:150])
        saved = rule.state_dict()
        kept = json.dumps(saved)
        decide(rule, stream(2)[150:])
        assert json.dumps(saved) == kept

    def test_a_foreign_state_changes_nothing(self) -> None:
        rule = ZClip()
        decide(rule, stream(2)[:50])
        before = rule.state_dict()
        with pytest.raises(ValueError, match="key 'rule' is 'SixSigma', expected 'ZClip'"):
            rule.load_state_dict(SixSigma().state_dict())
        with pytest.raises(ValueError, match="'variance' is inf"):
            rule.load_state_dict({**before, "variance": math.inf})
        assert rule.state_dict() == before


class TestSettings:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
    def test_out_of_range(self, name: str, bad: float) -> None:
        with pytest.raises(ValueError, match="threshold must be a finite number > 0, got"):
            BASELINES[name](threshold=bad)

    @pytest.mark.parametrize("name", NAMES)
    def test_wrong_type(self, name: str) -> None:
        with pytest.raises(TypeError, match="threshold"):
            BASELINES[name](threshold="6")

    def test_a_trend_beyond_what_floats_can_tell(self) -> None:
        with pytest.raises(ValueError, match="RobustTrend threshold must be at most 37 standard errors"):
            RobustTrend(38)

    @pytest.mark.parametrize("name", NAMES)
    def test_protocols(self, name: str) -> None:
        rule = BASELINES[name](threshold=3)
        assert isinstance(rule, Rule) and not isinstance(rule, DeepRule) and not supports_deep(rule)
        assert settings_of(rule)["threshold"] == 3.0 and "threshold=3" in repr(rule)
