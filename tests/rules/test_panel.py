"""The rule, its second opinion and the trend, asked in the right order."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest

from dist_stability import FixedInnovation, PredictiveInnovation
from dist_stability.rules.panel import Panel


class Recorder(FixedInnovation):
    """Algorithm 1 that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__(1.0, 0.5)
        self.told: list[tuple[Any, ...]] = []

    def expect(self, *, steps: int = 1, learning_rate: float | None = None, training_loss: float | None = None) -> None:
        self.told.append(("expect", steps, learning_rate, training_loss))

    def rebase(self, measurement: float) -> None:
        self.told.append(("rebase", measurement))

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        self.told.append(("commit", measurement, gradient_norm))
        super().commit(measurement, gradient_norm)

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        self.told.append(("reject", measurement, gradient_norm))


class Alarm:
    """Alarms at every rise."""

    def __init__(self) -> None:
        self.last = math.inf
        self.restarts = 0

    def commit(self, measurement: float, steps: int = 1) -> str | None:
        rose, self.last = measurement > self.last, measurement
        return f"rose in {steps}" if rose else None

    def restart(self) -> None:
        self.restarts += 1

    def settings(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last = state["last"]


def test_a_step_is_refused_only_if_both_probes_refuse_it() -> None:
    panel = Panel(FixedInnovation(1.0, 0.5), confirmed=True)
    panel.start(5.0, 50.0)
    assert panel.judge(5.5, 90.0).accepted, "the first rule has no doubt, the second is not asked"
    overruled = panel.judge(9.0, 50.5)
    assert overruled.accepted and overruled.bound == math.inf and "not shared" in overruled.reason
    assert overruled.innovation == 4.0
    refused = panel.judge(9.0, 52.0)
    assert not refused.accepted and refused.bound == 1.0 and "second probe" in refused.reason
    assert not panel.judge(9.0, math.nan).accepted
    assert not panel.judge(math.nan, 50.0).accepted, "a value that is no number needs no second opinion"
    assert not Panel(FixedInnovation(1.0, 0.5)).second


def test_each_probe_has_its_own_history() -> None:
    panel = Panel(Recorder(), confirmed=True)
    panel.start(5.0, 50.0)
    panel.expect(steps=3, learning_rate=0.1, training_loss=7.0)
    panel.commit(4.0, 40.0, 2.0)
    panel.reject(9.0, 90.0, 3.0)
    panel.rebase(4.5, 45.0)
    assert isinstance(panel.rule, Recorder) and isinstance(panel.second, Recorder)
    assert panel.rule.told == [
        ("commit", 5.0, None),
        ("expect", 3, 0.1, 7.0),
        ("commit", 4.0, 2.0),
        ("reject", 9.0, 3.0),
        ("rebase", 4.5),
    ]
    assert [told[1] for told in panel.second.told] == [50.0, 3, 40.0, 90.0, 45.0]


def test_the_trend_hears_of_commits_only_and_starts_again_elsewhere() -> None:
    trend = Alarm()
    panel = Panel(Recorder(), trend=trend)
    panel.start(5.0)
    panel.expect(steps=2, learning_rate=None)
    assert panel.commit(4.0) is None
    panel.reject(9.0)
    assert panel.commit(4.5) == "rose in 2"
    panel.rebase(3.0)
    panel.deep(None)
    assert trend.restarts == 2


def test_an_announced_jump_of_the_learning_rate_is_no_divergence() -> None:
    trend = Alarm()
    panel = Panel(Recorder(), trend=trend)
    panel.start(5.0)
    for rate, restarts in ((0.1, 0), (None, 0), (0.15, 0), (0.3, 1), (0.1, 1), (None, 1), (1.0, 2)):
        panel.expect(steps=1, learning_rate=rate)
        assert trend.restarts == restarts, rate


def test_rules_that_know_less_are_asked_less() -> None:
    panel = Panel(FixedInnovation(1.0, 0.5))
    panel.start(5.0)
    panel.expect(steps=2, learning_rate=1.0)
    assert panel.anchor() is None and not panel.supports_deep
    assert panel.rebase(1.0) is False


def test_anchors_and_state_go_through_json() -> None:
    panel = Panel(PredictiveInnovation(), confirmed=True, trend=Alarm())
    panel.start(5.0, 50.0)
    for step in range(20):
        panel.expect(steps=1, learning_rate=0.1)
        panel.commit(5.0 - 0.1 * step + 0.01 * (step % 3), 50.0 - step, 1.0)
    anchor = json.loads(json.dumps(panel.anchor()))
    saved = json.loads(json.dumps(panel.state_dict()))
    other = Panel(PredictiveInnovation(), confirmed=True, trend=Alarm())
    other.load_state_dict(saved)
    assert other.judge(3.0, 30.0, 1.0) == panel.judge(3.0, 30.0, 1.0)
    assert other.judge(30.0, 300.0, 1.0) == panel.judge(30.0, 300.0, 1.0)
    panel.commit(2.0, 20.0, 1.0)
    panel.deep(anchor)
    assert panel.judge(3.0, 30.0).innovation == other.judge(3.0, 30.0).innovation


def test_a_checkpoint_of_other_parts_is_refused() -> None:
    saved = Panel(PredictiveInnovation(), confirmed=True).state_dict()
    with pytest.raises(ValueError, match="second"):
        Panel(PredictiveInnovation()).load_state_dict(saved)
    with pytest.raises(ValueError, match="trend"):
        Panel(PredictiveInnovation(), confirmed=True, trend=Alarm()).load_state_dict(saved)
