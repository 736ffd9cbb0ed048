"""The rivals by themselves: the naive rollback's test and memory, and ZClip against its formula by hand."""

from __future__ import annotations

import json
import math
from statistics import fmean, stdev

import pytest
import torch
from torch import nn

from dist_stability.experiments.norms import GlobalNorm
from dist_stability.experiments.rivals import LossRollback, ZClipper, zclip_limit
from dist_stability.rules import DeepRule, settings_of, supports_deep
from dist_stability.rules.base import ExpectingRule
from dist_stability.rules.baselines import ZClip

LOSSES = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.1, 1.9, 2.0]


def committed(losses: list[float], **settings: float) -> LossRollback:
    rule = LossRollback(**settings)  # type: ignore[arg-type]
    rule.commit(5.0)  # the probe of the starting weights
    for loss in losses:
        rule.expect(training_loss=loss)
        assert rule.judge(1.0).accepted
        rule.commit(1.0)
    return rule


def test_a_spike_is_what_lies_beyond_six_deviations_of_the_committed_losses() -> None:
    rule = committed(LOSSES)
    highest = fmean(LOSSES) + 6 * stdev(LOSSES)
    for loss, accepted in ((highest, True), (math.nextafter(highest, math.inf), False), (-50.0, True)):
        rule.expect(training_loss=loss)
        assert rule.judge(1.0, 3.0).accepted is accepted
    rule.expect(training_loss=None)
    assert rule.judge(1.0).accepted, "a loss that nobody knows is no spike"


def test_refused_losses_are_not_learned_and_eight_are_needed() -> None:
    rule = committed(LOSSES[:7])
    rule.expect(training_loss=1e9)
    assert rule.judge(1.0).accepted
    rule.expect(training_loss=LOSSES[7])
    rule.commit(1.0)
    for _ in range(200):
        rule.expect(training_loss=50.0)
        assert not rule.judge(1.0).accepted
        rule.reject(1.0)


def test_only_the_last_losses_count() -> None:
    short, full = committed([100.0, *LOSSES], window=10), committed([100.0, *LOSSES])
    for rule, accepted in ((short, False), (full, True)):
        rule.expect(training_loss=50.0)
        assert rule.judge(1.0).accepted is accepted
    assert len(committed([2.0 + i % 3 for i in range(200)]).state_dict()["losses"]) == 128


def test_a_spike_goes_back_to_the_older_anchor_once_there_are_two() -> None:
    rule = committed(LOSSES)
    assert isinstance(rule, DeepRule) and isinstance(rule, ExpectingRule) and supports_deep(rule)

    def spike() -> tuple[bool, bool]:
        rule.expect(training_loss=50.0)
        judgement = rule.judge(1.0)
        return judgement.accepted, judgement.deep

    assert spike() == (False, False)
    older = rule.anchor()
    assert spike() == (False, False), "one anchor may be the spike's own commit"
    rule.expect(training_loss=40.0)  # committed by somebody else's decision, as in observe mode
    rule.commit(1.0)
    rule.anchor()
    assert rule.judge(1.0).accepted, "the loss that was expected belongs to the commit before"
    rule.expect(training_loss=500.0)
    assert rule.judge(1.0).deep
    rule.deep(json.loads(json.dumps(older)))
    assert rule.state_dict()["losses"] == LOSSES, "the losses that led to the anchor"
    assert spike() == (False, True), "both anchors are now this one"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e200])
def test_numbers_that_are_none_are_refused_and_teach_nothing(loss: float) -> None:
    rule = committed(LOSSES)
    rule.expect(training_loss=loss)
    assert not rule.judge(1.0).accepted
    rule.commit(1.0)  # observe mode commits all the same
    assert rule.state_dict()["losses"] == LOSSES
    fresh = committed([])
    fresh.expect(training_loss=loss)
    assert not fresh.judge(1.0).accepted, "from the first loss on"


@pytest.mark.parametrize("measurement", [math.nan, math.inf])
def test_a_probe_that_is_no_number_is_undone_by_an_ordinary_restore(measurement: float) -> None:
    rule = committed(LOSSES)
    rule.anchor(), rule.anchor()
    rule.expect(training_loss=2.0)
    judgement = rule.judge(measurement)
    assert not judgement.accepted and not judgement.deep


def test_it_promises_nothing_about_the_probe() -> None:
    rule = committed(LOSSES)
    rule.expect(training_loss=2.0)
    usual = rule.judge(1e6)
    rule.expect(training_loss=50.0)
    spike = rule.judge(0.0)
    assert (usual.accepted, usual.bound) == (True, math.inf) and math.isnan(usual.innovation)
    assert (spike.accepted, spike.bound) == (False, -math.inf) and math.isnan(spike.innovation)


def test_a_saved_rule_goes_on_exactly_and_without_anchors() -> None:
    rule = committed([2.0 + 0.1 * math.sin(i) for i in range(150)], sigmas=2.0)
    rule.anchor(), rule.anchor()
    again = LossRollback(2.0)
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert settings_of(again) == settings_of(rule)
    for i in range(150):
        loss = 2.0 + 0.25 * math.sin(1.7 * i)
        verdicts = []
        for each in (rule, again):
            each.expect(training_loss=loss)
            verdicts.append(each.judge(1.0))
            (each.commit if verdicts[-1].accepted else each.reject)(1.0)
        assert verdicts[0].accepted == verdicts[1].accepted and not verdicts[1].deep
    assert again.state_dict() == rule.state_dict()
    with pytest.raises(ValueError, match="another rule"):
        again.load_state_dict({"rule": "FixedInnovation", "losses": []})
    with pytest.raises(ValueError, match="losses"):
        again.load_state_dict({"rule": "LossRollback", "losses": [math.nan]})
    assert again.state_dict() == rule.state_dict()


def test_settings_are_checked() -> None:
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigmas"):
            LossRollback(bad)
    with pytest.raises(ValueError, match="window must be an int >= 8, got 7"):
        LossRollback(6.0, 7)
    with pytest.raises(TypeError, match="window"):
        LossRollback(6.0, 12.0)  # type: ignore[arg-type]


class Vector:
    """One parameter, whose gradient is given a norm; the second parameter never has one."""

    def __init__(self) -> None:
        self.model = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))])
        self.clip = ZClipper(self.model, self.model.parameters())

    def __call__(self, norm: float) -> float:
        """The norm of the gradient after clipping."""
        self.model[0].grad = torch.tensor([0.6, 0.8], dtype=torch.float32) * norm
        before = self.clip()
        assert before == pytest.approx(norm, rel=1e-6, nan_ok=True)
        gradient = self.model[0].grad
        assert torch.isnan(gradient).any() or gradient[1] / gradient[0] == pytest.approx(4 / 3, rel=1e-6)
        return float(gradient.norm())


def test_zclip_by_hand() -> None:
    vector = Vector()
    for i in range(25):
        norm = 3.0 if i % 2 else 1.0
        assert vector(norm) == pytest.approx(norm, rel=1e-6), "nothing is clipped during warm-up"
    # 13 ones and 12 threes: mean 49 / 25, variance 121 / 25 - mean^2
    mean, variance = 1.96, 4.84 - 1.96**2
    assert vector(4.0) == pytest.approx(4.0, rel=1e-6), "z = 2.04 is usual"
    mean, variance = 0.97 * mean + 0.03 * 4.0, variance
    variance = 0.97 * variance + 0.03 * (4.0 - mean) ** 2
    z = (50.0 - mean) / (math.sqrt(variance) + 1e-6)
    limit = mean + 2.5**2 / z * math.sqrt(variance)
    assert vector(50.0) == pytest.approx(limit, rel=1e-5) and 2.0 < limit < 2.3
    mean = 0.97 * mean + 0.03 * limit  # it learns what it has made of the norm
    variance = 0.97 * variance + 0.03 * (limit - mean) ** 2
    z = (50.0 - mean) / (math.sqrt(variance) + 1e-6)
    assert vector(50.0) == pytest.approx(mean + 2.5**2 / z * math.sqrt(variance), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_zclip_lets_a_norm_that_is_none_pass_and_does_not_learn_it(bad: float) -> None:
    touched, spared = Vector(), Vector()
    for i in range(30):
        for vector in (touched, spared):
            vector(1.0 + 0.1 * (i % 3))
        if i in (3, 28):
            gradient = torch.tensor([bad, 2.0])
            touched.model[0].grad = gradient.clone()
            assert not math.isfinite(touched.clip())
            assert torch.equal(touched.model[0].grad.isfinite(), gradient.isfinite())
            assert touched.model[0].grad[1] == 2.0, "the other gradients are not poisoned by clipping"
    assert touched(9.0) == spared(9.0) < 2.0


def test_gradients_that_were_all_zero_leave_nothing_to_clip_to() -> None:
    statistics = ZClip()
    for _ in range(25):
        statistics.commit(0.0, 0.0)
    assert zclip_limit(statistics, 1.0) is None


def test_the_global_norm_of_one_process() -> None:
    model = nn.Linear(3, 2)
    norm = GlobalNorm(model, model.parameters())
    expected = torch.cat([p.detach().flatten() for p in model.parameters()]).double().norm()
    assert norm.of_parameters() == pytest.approx(float(expected), rel=1e-12)
    assert norm.of_gradients() == 0.0
    model.bias.grad = torch.tensor([3e30, 4e30])
    assert norm.of_gradients() == pytest.approx(5e30, rel=1e-6)  # squares overflow float32
