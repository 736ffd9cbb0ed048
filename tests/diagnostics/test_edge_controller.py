"""The monitor of the edge of stability inside a controller: it changes no bit, and what it asks for is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import harness
import pytest
import torch
import zoo
from torch import nn
from zoo import Case

from dist_stability import Escalation, LossProbe, StabilityController
from dist_stability.diagnostics.edge import EdgeSettings
from dist_stability.diagnostics.monitor import EdgeOfStabilityMonitor
from dist_stability.diagnostics.sharpness import Sharpness
from dist_stability.escalation import Ladder
from dist_stability.rungs import Refusal, Rung
from dist_stability.signals import UpdateRms
from dist_stability.snapshot import HostWork, copier
from dist_stability.testing import FaultInjector, Outcome, capture_state, compare

OFTEN = EdgeSettings(first_margin=2, margin_every=3)
ALWAYS_PAST = replace(OFTEN, margin_every=1, patience=1, edge_margin=1e-9, overdriven_margin=2e-9, runaway_margin=1e9)
ALWAYS_POISONED = replace(OFTEN, patience=14, spike=1e-9, collapse=0.98)
FAULT = "gradient-scale:step=9,factor=300"


def train(
    case: Case, rank: int, world: int, settings: EdgeSettings | None, **options: Any
) -> tuple[Outcome, list[dict[str, Any]], EdgeOfStabilityMonitor | None]:
    """A guarded run, watched if there are settings; and what was told of each attempt."""
    setup = zoo.build(case, rank, world)
    events: list[dict[str, Any]] = []
    edge = None
    if settings is not None:
        optimizers = setup.optimizers if len(setup.optimizers) > 1 else setup.optimizers[0]
        batch = zoo.data(case, 10**5, setup.replica, size=32)
        edge = EdgeOfStabilityMonitor(Sharpness(setup.model, optimizers, zoo.loss_fn, [batch]), settings, [UpdateRms()])
    outcome = zoo.train(case, rank, world, setup=setup, edge=edge, on_event=events.append, **options)
    return outcome, events, edge


def watched(rank: int, world: int, cases: list[Case], work: HostWork) -> list[Any]:
    said: list[Any] = []
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(copier, "HOST_WORK", work)
            outcome, events, edge = train(case, rank, world, OFTEN, injector=FaultInjector.parse([FAULT]))
            plain, _, _ = train(case, rank, world, None, injector=FaultInjector.parse([FAULT]))
        assert edge is not None
        margins = [event["edge"]["margin"] for event in events if event["edge"] and event["edge"]["margin"]]
        wrong = compare(outcome.image, plain.image)
        same = [str(v.action) for v in outcome.verdicts] == [str(v.action) for v in plain.verdicts]
        refused = sum(not verdict.accepted for verdict in outcome.verdicts)
        wrong += [] if same and refused >= 1 and len(margins) >= 3 else [f"{same} {refused} {margins}"]
        said.append(([f"rank {rank}, {case}: {line}" for line in wrong[:5]], edge.machine.fingerprint(), margins))
    return said


@pytest.mark.parametrize("work", [HostWork.NONE, HostWork.ALL])
@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_a_watched_run_with_a_refusal_in_it_is_the_run_without_the_monitor(mode: str, work: HostWork) -> None:
    cases = [Case(mode), Case(mode, "conv", "sgd"), Case(mode, form="attach", scheduler=True)]
    found = harness.pool(zoo.MODES[mode]).run(watched, cases, work, timeout=300)
    for of_case in zip(*found, strict=True):
        for wrong, fingerprint, margins in of_case:
            assert not wrong, "\n".join(wrong)
            assert (fingerprint, margins) == of_case[0][1:], "the ranks must be in one state"


def cut(rank: int, world: int, mode: str) -> list[str]:
    """Past the edge by thresholds that are always passed: equal to a loop that halves its learning rate there."""
    case = Case(mode, optimizer="adamw-foreach", scheduler=False)
    outcome, events, _ = train(case, rank, world, ALWAYS_PAST)
    acted = [event["attempt"] for event in events if event["edge"] and event["edge"]["acted"]]
    said = (
        [] if [event["edge"]["rung"] for event in events if event["attempt"] in acted] == ["cut_lr"] else [f"{acted}"]
    )
    rates = {event["attempt"]: event["learning_rate_factor"] for event in events}
    said += [] if rates[acted[0]] == 1.0 and rates[acted[0] + 1] == 0.5 else [f"{rates}"]

    def by_hand(attempt: int, setup: zoo.Setup, controller: object) -> None:
        for optimizer in setup.optimizers:
            for group in optimizer.param_groups:
                if attempt == acted[0]:
                    group["lr"] *= 0.5
                elif attempt == case.steps - 1:
                    group["lr"] *= 2.0

    return said + compare(outcome.image, zoo.train(case, rank, world, guarded=False, after_step=by_hand).image)


@pytest.mark.parametrize("mode", ["single", "fsdp2"])
def test_past_the_edge_the_learning_rate_is_cut(mode: str) -> None:
    for said in harness.pool(zoo.MODES[mode]).run(cut, mode, timeout=120):
        assert not said, "\n".join(said)


def poisoned(rank: int, world: int, mode: str) -> list[str]:
    """The ladder goes back behind what the monitor took for a poisoning; equal to the run without those batches."""
    case = Case(mode, optimizer="adamw-foreach", steps=32, draws=False)  # they are taken back with the state
    outcome, events, _ = train(case, rank, world, ALWAYS_POISONED, escalation=Escalation(max_deep=1))
    deep = [verdict for verdict in outcome.verdicts if verdict.undone]
    if [str(verdict.action) for verdict in deep] != ["deep_rollback"] or deep[0].signal != "edge":
        return [f"{[(e['attempt'], e['edge']) for e in events]}"]
    skip = frozenset([*deep[0].undone, *(v.step for v in outcome.verdicts if not v.accepted)])
    return compare(outcome.image, zoo.train(case, rank, world, guarded=False, skip=skip).image)


@pytest.mark.parametrize("mode", ["single", "fsdp2"])
def test_behind_a_poisoning_an_older_state_is_restored(mode: str) -> None:
    for said in harness.pool(zoo.MODES[mode]).run(poisoned, mode, timeout=120):
        assert not said, "\n".join(said)


def test_the_ladder_follows_advice_within_its_budgets() -> None:
    ladder = Ladder(Escalation(max_cuts=1, max_deep=1))
    assert ladder.advise(5, Rung.CUT_LR, "past the edge", 0.7) and ladder.learning_rate_factor == 0.7
    assert not ladder.advise(500, Rung.CUT_LR, "past the edge", 0.7) and ladder.learning_rate_factor == 0.7
    assert not ladder.advise(501, Rung.SKIP, "nothing to skip between two steps")
    assert not ladder.advise(501, Rung.DEEP_ROLLBACK, "poisoned", anchors=0)
    assert ladder.overdue() is None and ladder.advise(502, Rung.DEEP_ROLLBACK, "poisoned", anchors=2)
    assert ladder.overdue() == ("edge", "poisoned")
    again = Ladder(Escalation(max_cuts=1, max_deep=1))
    again.load_state_dict(ladder.state_dict())
    for each in (ladder, again):
        response = each.refused(Refusal(503, "edge", anchors=2))
        assert response.rung is Rung.DEEP_ROLLBACK and response.deep and each.overdue() is None
        assert not each.advise(504, Rung.DEEP_ROLLBACK, "poisoned", anchors=2), "the budget is spent"


def test_the_memory_of_the_monitor_is_part_of_the_checkpoint() -> None:
    def make(edge: EdgeOfStabilityMonitor | None) -> StabilityController:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return StabilityController(model, optimizer, LossProbe(square, [torch.ones(8, 4)]), edge=edge)

    def square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    first = EdgeOfStabilityMonitor()
    with make(first) as controller:
        for _ in range(3):
            square(controller.model, torch.randn(8, 4)).backward()
            controller.step(loss=1.5)
        saved: Mapping[str, Any] = controller.state_dict()
    second = EdgeOfStabilityMonitor()
    with make(second) as controller:
        controller.load_state_dict(saved)
        assert (
            second.machine.fingerprint()
            == first.machine.fingerprint()
            != EdgeOfStabilityMonitor().machine.fingerprint()
        )
    with make(None) as controller:
        controller.load_state_dict(saved)  # a run may go on without it
        assert capture_state(controller.model, controller._optimizers)


def test_what_cannot_be_meant_is_refused() -> None:
    model = nn.Linear(2, 1)
    arguments = (
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        LossProbe(lambda m, x: m(x).mean(), [torch.ones(1, 2)]),
    )
    with pytest.raises(ValueError, match=r'edge: does not go with decision="deferred"'):
        StabilityController(*arguments, edge=EdgeOfStabilityMonitor(), decision="deferred")
    with pytest.raises(TypeError, match=r"edge: expected EdgeOfStabilityMonitor"):
        StabilityController(*arguments, edge=True)  # type: ignore[arg-type]
