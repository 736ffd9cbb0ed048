"""How the controller probes: how often, with how many probes, and what it does when the probe itself moves."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import harness
import pytest
import torch
import zoo
from torch import Tensor, nn
from zoo import Case

from dist_stability import AdaptiveCadence, Escalation, FixedInnovation, LossProbe, StabilityController
from dist_stability.rules import GuaranteeViolation
from dist_stability.rules.baselines import BASELINES
from dist_stability.signals import GroupNorms, Signal, StepContext, UpdateRatio, UpdateRms
from dist_stability.testing import FaultInjector, compare
from dist_stability.verdict import Judgement

# ---------------------------------------------------------------------- cadence


def adaptive(rank: int, world: int, mode: str) -> list[Any]:
    """Calm stretches are probed ever more seldom, a fault is found within one interval, then every step is probed."""
    case = Case(mode, ranks=world, steps=60, draws=False)
    events: list[dict[str, Any]] = []
    fault = FaultInjector.parse(["bit-flip:step=40,where=parameter"])
    options = {"every": AdaptiveCadence(most=4, calm=4), "replica_check_every": 0, "rule": FixedInnovation(1.0, 1.0)}
    zoo.train(case, rank, world, injector=fault, on_event=events.append, **options)
    return [(event["attempt"], event["action"], event["undone"]) for event in events]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_an_adaptive_cadence_is_the_same_on_all_ranks(two: harness.Pool, mode: str) -> None:
    first, second = two.run(adaptive, mode)
    assert first == second
    judged = [attempt for attempt, action, _ in first if action != "unjudged"]
    gaps = [b - a for a, b in itertools.pairwise(judged)]
    (refused,) = [(attempt, undone) for attempt, action, undone in first if action == "rollback"]
    before = max(attempt for attempt, action, _ in first if action == "commit" and attempt < refused[0])
    assert max(gaps[: judged.index(before)]) == 4 and 40 <= refused[0] < 44
    # The gradients of the damaged weights may be vetoed first, which also makes the cadence restless.
    assert refused[1] == [attempt for attempt, action, _ in first[before:40] + first[40:43] if action == "unjudged"]
    assert judged[judged.index(refused[0]) :][:5] == list(range(refused[0], refused[0] + 5))


# ---------------------------------------------------------------------- two probes


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.sum(1, keepdim=True)).square().mean()


def test_a_refusal_needs_both_probes() -> None:
    """Noise that moves one probe only is not held against the step; what moves both is."""
    offset = {"first": 0.0, "second": 0.0}

    def probe(name: str, seed: int) -> LossProbe:
        data = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        return LossProbe(lambda model, batch: loss_fn(model, batch) + offset[name], [data])

    model, optimizer = net()
    rule = FixedInnovation(0.5, 1.0)
    with StabilityController(model, optimizer, probe("first", 1), rule, confirm=probe("second", 2)) as controller:
        actions = []
        for attempt in range(6):
            offset["first"] = 5.0 if attempt in (2, 4) else 0.0
            offset["second"] = 5.0 if attempt in (4, 5) else 0.0
            loss_fn(model, torch.randn(8, 4)).backward()
            actions.append(str(controller.step().action))
            optimizer.zero_grad()
    # At 5 the first probe sees nothing wrong, so the second is not asked; it then learns its own rise.
    assert actions == ["commit"] * 4 + ["rollback", "commit"]


# ---------------------------------------------------------------------- a probe that moves


def test_when_the_probe_itself_moves_the_rule_follows_it() -> None:
    """From some step on the same weights measure 3 more: not one step of it is damage, and training goes on."""
    model, optimizer = net()
    shift = 0.0
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    probe = LossProbe(lambda model, batch: loss_fn(model, batch) + shift, [data])
    events: list[dict[str, Any]] = []
    with StabilityController(model, optimizer, probe, on_event=events.append) as controller:
        for attempt in range(60):
            shift = 3.0 if attempt >= 30 else 0.0
            loss_fn(model, torch.randn(8, 4)).backward()
            controller.step()
            optimizer.zero_grad()
    refused = [event["attempt"] for event in events if event["rung"]]
    assert refused == [30, 31, 32, 33]
    assert "the probe has moved, and the rule's level with it" in events[33]["reason"]
    assert all(event["action"] == "commit" for event in events[34:])


def test_a_probe_that_moves_to_nowhere_is_reported() -> None:
    model, optimizer = net()
    broken = False
    probe = LossProbe(
        lambda model, batch: loss_fn(model, batch) * (float("nan") if broken else 1.0), [torch.ones(2, 4)]
    )
    options = {"escalation": Escalation(attenuate_after=1)}
    with StabilityController(model, optimizer, probe, FixedInnovation(1.0, 1.0), **options) as controller:
        for attempt in range(4):
            broken = attempt >= 2
            loss_fn(model, torch.randn(8, 4)).backward()
            verdict = controller.step()
            optimizer.zero_grad()
    assert verdict.pattern == "numerics" and "the probe's forward that overflows" in verdict.reason


class OtherUnits(FixedInnovation):
    """Accepts everything, and says so in numbers that have nothing to do with the measurement."""

    bounded = False

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        return Judgement(True, 0.0, 0.0, "as always")


def rising(rule: FixedInnovation) -> bool:
    """Whether a run whose probe rises is let go on."""
    model, optimizer = net()
    values = itertools.count(5)
    probe = LossProbe(lambda model, batch: model(batch).sum() * 0.0 + next(values), [torch.ones(2, 4)])
    with StabilityController(model, optimizer, probe, rule) as controller:
        loss_fn(model, torch.randn(8, 4)).backward()
        return controller.step().accepted


def test_a_rule_that_promises_nothing_is_not_held_to_it() -> None:
    rule = OtherUnits(1.0, 1.0)
    assert rising(rule)
    rule.bounded = True
    with pytest.raises(GuaranteeViolation, match=r"Proposition 7\.5"):
        rising(rule)
    assert not any(build().bounded for build in BASELINES.values())


# ---------------------------------------------------------------------- announced learning rates


class Listening(FixedInnovation):
    """Accepts everything and remembers what it was told to expect."""

    def __init__(self) -> None:
        super().__init__(1e6, 1.0)
        self.heard: list[tuple[int, float | None, float | None]] = []

    def expect(self, *, steps: int = 1, learning_rate: float | None = None, training_loss: float | None = None) -> None:
        self.heard.append((steps, learning_rate, training_loss))


def test_what_a_rule_is_told_to_expect() -> None:
    model, optimizer = net()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 10.0 if step >= 4 else 1.0)
    rule = Listening()
    probe = LossProbe(loss_fn, [torch.ones(2, 4)])
    extra = {"scheduler": scheduler}
    with StabilityController(model, optimizer, probe, rule, extra_state=extra, every=2) as controller:
        for attempt in range(12):
            if attempt == 8:
                optimizer.param_groups[0]["lr"] = 7.0  # nobody vouches for it
            if attempt == 10:
                controller.announce(0.5)
            loss_fn(model, torch.randn(8, 4)).backward()
            controller.step(loss=None if attempt < 6 else float(attempt))
            optimizer.zero_grad()
            if attempt < 8:
                scheduler.step()
    rates = [0.01, 0.01, 0.1, 0.1, None, 0.5]
    assert rule.heard == list(zip([2] * 6, rates, [None, None, None, 7.0, 9.0, 11.0], strict=True))


# ---------------------------------------------------------------------- signals


def watched(rank: int, world: int, mode: str) -> tuple[list[Any], list[str]]:
    """Signals ride in the vote: they change no bit of the run, and are the same on every rank."""
    case = Case(mode, ranks=world, steps=6, clip=1.0)
    events: list[dict[str, Any]] = []
    signals = (UpdateRms(), UpdateRatio(), GroupNorms())
    seen = zoo.train(case, rank, world, signals=signals, on_event=events.append)
    plain = zoo.train(replace(case), rank, world)
    return [(event["signals"], event["where"]) for event in events], compare(seen.image, plain.image)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_signals_ride_in_the_vote_and_change_nothing(two: harness.Pool, mode: str) -> None:
    (first, same), (second, _) = two.run(watched, mode)
    assert same == []
    assert repr(first) == repr(second)
    values, where = first[-1]
    assert {"learning_rate", "gradient_norm", "bar_fraction"} <= set(values)
    assert any(name.startswith("update_rms") for name in values) and where
    assert any(name.startswith("gradient_norm/") or name.startswith("group") for name in values), sorted(values)


class Broken(Signal):
    """A signal of a user's own with a bug, on one rank."""

    name = "broken"

    def width(self, context: StepContext) -> int:
        return 1

    def before_step(self, context: StepContext) -> None:
        raise ZeroDivisionError("by zero")


def test_a_signal_that_fails_is_reported_and_costs_nothing_else() -> None:
    model, optimizer = net()
    probe = LossProbe(loss_fn, [torch.ones(2, 4)])
    events: list[dict[str, Any]] = []
    with StabilityController(model, optimizer, probe, signals=(Broken(),), every=2, on_event=events.append) as guard:
        for _ in range(4):
            loss = loss_fn(model, torch.randn(8, 4))
            loss.backward()
            assert guard.step(loss=float(loss.detach())).accepted
    assert [event["signal_errors"] for event in events[1::2]] == [{"broken": "ZeroDivisionError: by zero"}] * 2
    assert all({"learning_rate", "training_loss"} <= set(event["signals"]) for event in events), "free at every step"
