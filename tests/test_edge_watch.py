"""The monitor of the edge of stability in the controller: it leaves no trace, and what it asks for is done exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import harness
import pytest
import torch
import zoo
from choice import slow
from zoo import Case, Setup

from dist_stability import FixedInnovation, LockstepError
from dist_stability.diagnostics.edge import EdgeOfStability, EdgeReading, EdgeSettings, EdgeState
from dist_stability.diagnostics.monitor import EdgeOfStabilityMonitor
from dist_stability.diagnostics.sharpness import Sharpness
from dist_stability.errors import StabilityError
from dist_stability.escalation import Ladder
from dist_stability.rungs import Escalation, Refusal, Rung
from dist_stability.snapshot import HostWork, Slot, SlotRing, StatePlan, copier
from dist_stability.testing import FaultInjector, Outcome, assert_golden_twin, capture_state, compare
from dist_stability.verdict import Judgement

OFTEN = EdgeSettings(margin_every=2, remeasure_every=1)
ALWAYS_OVER = replace(OFTEN, edge_margin=1e-9, overdriven_margin=2e-9, runaway_margin=1e9, repeat=10, cuts=True)


def monitor_of(case: Case, setup: Setup, settings: EdgeSettings | None = OFTEN) -> EdgeOfStabilityMonitor:
    """On one batch that is always the same: its values do not matter where only traces do."""
    batch = zoo.data(case, 5, setup.replica)
    return EdgeOfStabilityMonitor.of(
        setup.model, setup.optimizers, zoo.loss_fn, [batch], lambda: batch, settings=settings, ratio_every=2
    )


def watched(
    case: Case, rank: int, world: int, settings: EdgeSettings | None = OFTEN, **options: Any
) -> tuple[Outcome, list[dict[str, Any]]]:
    """A guarded run with a monitor, and its events."""
    setup, events = zoo.build(case, rank, world), []
    edge = monitor_of(case, setup, settings)
    outcome = zoo.train(case, rank, world, setup=setup, edge=edge, on_event=events.append, **options)
    return outcome, events


def told(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the monitor said, at each judged attempt."""
    return [event["edge"] for event in events if event["edge"] is not None]


# ---------------------------------------------------------------------- no trace


def transparent(rank: int, world: int, cases: list[Case], mode: str) -> list[str]:
    """Without a fault: the monitor's run is the run of nobody."""
    said = []
    for case in cases:
        guarded, events = watched(case, rank, world, mode=mode)
        plain = zoo.train(case, rank, world, guarded=False)
        wrong = [str(verdict) for verdict in guarded.verdicts if not verdict.accepted]
        measured = [one["margin"] for one in told(events) if one["margin"] is not None]
        # From the sixth attempt on at every second, if all are judged.
        wrong += [] if len(measured) >= (4 if case.every == 1 else 2) else [f"margins {measured}"]
        wrong += [f"acted: {one}" for one in told(events) if one["acted"]]
        wrong += compare(guarded.image, plain.image)
        said += [f"rank {rank}, {case}: {line}" for line in wrong[:5]]
    return said


CASES = (
    Case(clip=1.0, scheduler=True),
    Case(optimizer="sgd", form="attach"),
    Case(model="conv", optimizer="adamw-loop", tensor_lr=True, accumulation=2),
    Case(form="closure", every=2, optimizer="adam-fused"),
    Case(optimizers=2, scaler=True),
)


@pytest.mark.parametrize("mode", ["single", slow("ddp"), "fsdp2"])
def test_a_monitor_that_does_not_intervene_changes_no_bit(mode: str) -> None:
    cases = [replace(case, mode=mode) for case in CASES]
    for said in harness.pool(zoo.MODES[mode]).run(transparent, cases, "enforce", timeout=300):
        assert not said, "\n".join(said)


def test_nor_in_observe_mode(two: harness.Pool) -> None:
    for said in two.run(transparent, [Case("ddp", scheduler=True)], "observe", timeout=100):
        assert not said, "\n".join(said)


def with_a_refusal(rank: int, world: int, case: Case, work: HostWork) -> list[str]:
    """With one: it is that of the controller alone. Copies in another thread, or at once."""
    injector = FaultInjector.parse(["gradient-scale:step=9,factor=300"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copier, "HOST_WORK", work)
        guarded, events = watched(case, rank, world, injector=injector)
        alone = zoo.train(case, rank, world, injector=FaultInjector.parse(["gradient-scale:step=9,factor=300"]))
    wrong = [] if guarded.refused == alone.refused == {9} else [f"refused {guarded.refused} {alone.refused}"]
    wrong += [] if len([one for one in told(events) if one["margin"] is not None]) >= 3 else ["not measured"]
    return wrong + compare(guarded.image, alone.image)


@pytest.mark.parametrize("work", [HostWork.NONE, HostWork.ALL])
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_nor_where_something_is_refused(two: harness.Pool, mode: str, work: HostWork) -> None:
    assert two.run(with_a_refusal, Case(mode, "transformer", "sgd"), work, timeout=100) == [[], []]


# ---------------------------------------------------------------------- past the edge


def overdriven(rank: int, world: int, mode: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Every margin counts as past the edge. The twin has no controller, and learning rates that are as small."""
    case = Case(mode, scheduler=True, clip=1.0, steps=24)
    # Any measurement is accepted: a refusal would not be the monitor's.
    guarded, events = watched(case, rank, world, ALWAYS_OVER, rule=FixedInnovation(epsilon=1e9), trend=None)
    factors = [event["learning_rate_factor"] for event in events]
    twin = zoo.build(case, rank, world)
    for attempt, factor in enumerate(factors):
        batches = zoo.fetch(case, twin, attempt)
        groups = [group for optimizer in twin.optimizers for group in optimizer.param_groups]
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= factor
        zoo._attempt(case, twin, attempt, batches, None, None)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        for scheduler in twin.extra_state.values():
            scheduler.step()
    return events, compare(guarded.image, capture_state(twin.model, twin.optimizers, twin.extra_state))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_past_the_edge_the_learning_rate_is_cut(two: harness.Pool, mode: str) -> None:
    results = two.run(overdriven, mode, timeout=200)
    events = results[0][0]
    assert [difference for _, difference in results] == [[], []]
    assert told(events) == told(results[1][0]), "the ranks were in different states"
    cuts = [event["attempt"] for event in events if event["edge"]["acted"]]
    # The third margin is that of attempt 9; repeated after ten more, for the state lasts.
    assert cuts == [9, 19]
    factors = [event["learning_rate_factor"] for event in events]
    assert factors == [1.0] * 10 + [0.5] * 10 + [0.25] * 4
    assert {one["state"] for one in told(events)[10:]} == {EdgeState.OVERDRIVEN}


def test_the_margin_is_that_of_the_steps_taken() -> None:
    """Weights that hardly move: the margin of SGD halves with the learning rate, not with the schedule's."""
    case = Case(optimizer="sgd", lr=1e-7, steps=60, draws=False)
    settings = replace(ALWAYS_OVER, edge_margin=1e-12, overdriven_margin=2e-12, repeat=1000)
    _, events = watched(case, 0, 1, settings, rule=FixedInnovation(epsilon=1e9), trend=None)
    margins = {event["learning_rate_factor"]: event["edge"]["margin"] for event in events if event["edge"]["margin"]}
    assert set(margins) == {1.0, 0.5} and margins[0.5] == pytest.approx(0.5 * margins[1.0], rel=0.2)


def test_past_the_edge_is_reported_only_unless_told_otherwise() -> None:
    settings = replace(ALWAYS_OVER, cuts=False)
    _, events = watched(Case(steps=24), 0, 1, settings, rule=FixedInnovation(epsilon=1e9), trend=None)
    assert {one["state"] for one in told(events)[10:]} == {EdgeState.OVERDRIVEN}
    assert not any(one["acted"] or one["rung"] for one in told(events))
    assert {event["learning_rate_factor"] for event in events} == {1.0}


def test_at_the_edge_nothing_is_done_ever() -> None:
    settings = replace(OFTEN, edge_margin=1e-9, overdriven_margin=1e9, runaway_margin=1e9, edge_rho=1e-9)
    settings = replace(settings, rising_rho=1e9, overdriven_rho=1e9, repeat=1)
    _, events = watched(Case(steps=20), 0, 1, settings)
    assert {one["state"] for one in told(events)[10:]} == {EdgeState.EDGE}
    assert not any(one["acted"] or one["rung"] for one in told(events))


# ---------------------------------------------------------------------- poisoned

SPIKE = range(40, 50)


def poisoned(
    rank: int, world: int, mode: str, scheduler: bool, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[int]]:
    case = Case(mode, steps=110, lr=1e-3, draws=False, scheduler=scheduler)
    kept: list[dict[str, Any]] = []

    def run(skip: frozenset[int], guarded: bool) -> Outcome:
        if not guarded:
            return zoo.train(case, rank, world, skip=skip, guarded=False)
        injector = FaultInjector.parse([f"gradient-scale:step={step},factor=300" for step in SPIKE])
        # The bar of the published controller: it lets the spike in.
        rule = FixedInnovation(epsilon=0.5, alpha=0.1)
        outcome, events = watched(case, rank, world, EdgeSettings(), rule=rule, injector=injector, **options)
        kept.extend(events)
        return outcome

    outcome = assert_golden_twin(run)
    return kept, sorted(outcome.dropped)


@pytest.mark.parametrize(
    ("mode", "scheduler", "options"),
    # A schedule moves the learning rate all the time, which is no new regime.
    [("ddp", False, {}), ("fsdp2", True, {"shadow": True})],
)
def test_a_poisoned_optimizer_goes_back_behind_the_spike(
    two: harness.Pool, mode: str, scheduler: bool, options: dict[str, Any]
) -> None:
    first, second = two.run(poisoned, mode, scheduler, options, timeout=300)
    events, dropped = first
    assert told(events) == told(second[0]) and dropped == second[1]
    back = [event for event in events if event["edge"] is not None and event["edge"]["acted"]]
    assert len(back) == 1
    at = back[0]["attempt"]
    assert (back[0]["action"], back[0]["signal"], back[0]["rung"]) == ("deep_rollback", "edge", "deep_rollback")
    assert back[0]["edge"]["state"] == EdgeState.POISONED and at > SPIKE[-1]
    # All of the spike and what came after it, and nothing from before.
    assert dropped == list(range(SPIKE[0], at + 1))
    size = {event["attempt"]: event["signals"].get("effective_step") for event in events}
    assert size[at] < 0.2 * size[SPIKE[0] - 1] and size[at + 1] > 0.5 * size[SPIKE[0] - 1]
    assert told(events)[-1]["state"] != EdgeState.POISONED
    assert not any(event["action"] != "commit" for event in events if event["attempt"] > at)


class RefusesAfter:
    """Lets so many steps pass and none after them: refusals come in the way of a collapse that has begun."""

    bounded = False

    def __init__(self, commits: int) -> None:
        self.commits, self.most = 0, commits

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        return Judgement(self.commits < self.most, 0.0, math.inf, "so many", evidence=math.inf)

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        self.commits += 1

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"commits": self.commits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.commits = state["commits"]


def test_a_collapse_is_seen_in_steps_that_are_refused_too() -> None:
    injector = FaultInjector.parse([f"gradient-scale:step={step},factor=300" for step in SPIKE])
    settings = EdgeSettings(collapse=0.4, patience=12)
    case = Case(steps=80, lr=1e-3, draws=False)
    _, events = watched(case, 0, 1, settings, rule=RefusesAfter(67), injector=injector, trend=None)
    back = [event for event in events if event["edge"]["acted"]]
    assert [(event["action"], event["rung"]) for event in back] == [("deep_rollback", "deep_rollback")]
    refused = [event["attempt"] for event in events if event["action"] == "rollback"]
    assert refused and refused[-1] + 1 == back[0]["attempt"], "some of the evidence was in refused steps"
    # What the rule knew then holds again: it lets steps pass.
    assert {event["action"] for event in events if event["attempt"] > back[0]["attempt"]} == {"commit"}


# ---------------------------------------------------------------------- agreement and checkpoints


def diverging(rank: int, world: int) -> None:
    case = Case("ddp")
    setup = zoo.build(case, rank, world)
    edge = monitor_of(case, setup)

    def meddle(attempt: int, *_: object) -> None:
        if attempt == 5 and rank == 1:
            edge.machine._rhos = [3.0] * 20

    zoo.train(case, rank, world, setup=setup, edge=edge, after_step=meddle)


def test_ranks_in_different_states_are_found_out(two: harness.Pool) -> None:
    with pytest.raises(harness.RanksFailed) as failed:
        two.run(diverging, timeout=60)
    assert {error.type for error in failed.value.results} == {LockstepError.__name__}
    assert "edge of stability" in str(failed.value)


def resumed(rank: int, world: int) -> list[str]:
    """A checkpoint in the middle, loaded into new objects: the same bits at the end, and the same state machine."""
    case = Case("fsdp2", steps=14, draws=False)
    whole = zoo.build(case, rank, world)
    whole_edge = monitor_of(case, whole)
    expected = zoo.train(case, rank, world, setup=whole, edge=whole_edge)

    saved: dict[str, Any] = {}
    half = zoo.build(case, rank, world)

    def save(attempt: int, setup: Setup, controller: Any) -> None:
        if attempt == 7:
            saved["controller"] = controller.state_dict()

    edge = monitor_of(case, half)
    zoo.train(replace(case, steps=8), rank, world, setup=half, edge=edge, after_step=save)
    # The tensors are handed on as they are; what the controller knew goes through its state_dict.
    other = monitor_of(case, half)
    other.last = edge.last
    assert other.sharpness is not None and edge.sharpness is not None
    other.sharpness._direction, other.sharpness._shift = edge.sharpness._direction, edge.sharpness._shift
    controller = zoo.control(case, half, edge=other)
    with controller:
        controller.load_state_dict(saved["controller"])
        wrong = [] if other.machine.fingerprint() == edge.machine.fingerprint() else ["the state was not loaded"]
        for attempt in range(8, case.steps):
            zoo._attempt(case, half, attempt, zoo.fetch(case, half, attempt), controller, None)
    wrong += compare(expected.image, capture_state(half.model, half.optimizers, half.extra_state, half.scaler))
    if other.machine.fingerprint() != whole_edge.machine.fingerprint():
        wrong.append("the state machine went another way")
    return wrong


def test_a_checkpoint_has_the_monitor(two: harness.Pool) -> None:
    assert two.run(resumed, timeout=100) == [[], []]


def test_a_run_may_go_on_without_its_monitor() -> None:
    case, setup = Case(steps=4), zoo.build(Case(), 0, 1)
    with zoo.control(case, setup, edge=monitor_of(case, setup)) as controller:
        saved = controller.state_dict()
    assert saved["edge"] is not None
    with zoo.control(case, setup) as controller:
        controller.load_state_dict(saved)
        assert controller.state_dict()["edge"] is None
        without = controller.state_dict()
    with zoo.control(case, setup, edge=monitor_of(case, setup)) as controller:
        controller.load_state_dict(without)


# ---------------------------------------------------------------------- the ladder, the ring, the machine


def test_the_ladder_gives_within_its_budgets() -> None:
    ladder = Ladder(Escalation(max_cuts=1, max_deep=1))
    assert ladder.cut(5, 0.7) and ladder.learning_rate_factor == 0.7
    assert not ladder.cut(500, 0.7) and ladder.learning_rate_factor == 0.7
    assert ladder.may_go_back(501)
    response = ladder.refused(Refusal(501, "edge", anchors=0))
    assert response.rung is Rung.DEEP_ROLLBACK and response.deep
    assert not ladder.may_go_back(502), "the budget is spent"
    assert ladder.may_go_back(502 + ladder.settings.window), "until the window has passed"


def test_what_is_pinned_stays_until_a_restore_goes_behind_it() -> None:
    model = torch.nn.Linear(2, 2)
    plan = StatePlan.build(model, [torch.optim.SGD(model.parameters(), lr=0.1)], 1)
    ring = SlotRing(1, spare=1)

    def commit(attempt: int, as_anchor: bool = False) -> Slot:
        slot = ring.begin()
        slot.fill(plan, attempt)
        slot.publish()
        ring.commit(slot, as_anchor)
        return slot

    anchor = commit(0, as_anchor=True)
    kept = commit(1)
    assert ring.pin() is kept
    for attempt in range(2, 9):
        assert commit(attempt) is not kept
    assert ring.pinned is kept and kept.attempt == 1 and not kept.verify() and ring.oldest == 0
    ring.fall_back(kept)
    assert ring.safe is kept and ring.pinned is kept
    commit(9)
    ring.fall_back(anchor)
    assert ring.pinned is None and ring.safe is anchor
    ring.pin()
    ring.unpin()
    ring.pin()
    ring.reset()
    assert ring.pinned is None


def test_a_burst_begins_with_its_first_spike() -> None:
    machine = EdgeOfStability(EdgeSettings(warmup=5, burst=10, spike_steps=30))
    step = 0

    def see(norm: float, size: float, **more: Any) -> None:
        nonlocal step
        machine.observe(EdgeReading(step, gradient_norm=norm, effective_step=size, **more))
        step += 1

    see(100.0, 0.4)
    see(1.0, 0.4)
    see(100.0, 0.4)
    assert machine.burst is None, "what is usual is not known yet"
    for _ in range(10):
        see(1.0, 0.4)
    first = step
    for _ in range(4):
        see(300.0, 0.8)
    assert machine.burst == first and machine.suspects(step)
    for _ in range(11):
        see(1.0, 0.15)
    see(300.0, 0.15)
    assert machine.burst == first, "the step is short already: the same harm"
    for _ in range(11):
        see(1.0, 0.4)
    second = step
    see(300.0, 0.4)
    assert machine.burst == second
    for _ in range(31):
        see(1.0, 0.4)
    assert not machine.suspects(step)
    for size in (0.05, 0.05, 0.05):
        see(1.0, size, refused=True)
    assert machine.state is EdgeState.STABLE, "no spike to blame"


# ---------------------------------------------------------------------- bad input


def test_what_cannot_be_watched_is_refused() -> None:
    case = Case()
    setup = zoo.build(case, 0, 1)
    edge = monitor_of(case, setup)
    with pytest.raises(ValueError, match='rank 0: edge: does not go with decision="deferred"'):
        zoo.control(case, setup, edge=edge, decision="deferred")
    with pytest.raises(TypeError, match="rank 0: edge: expected EdgeOfStabilityMonitor"):
        zoo.control(case, setup, edge=edge.machine)
    other = zoo.build(case, 0, 1)
    with pytest.raises(ValueError, match="another model or optimizer"):
        zoo.control(case, other, edge=edge)
    with pytest.raises(ValueError, match="directional_ratio, update_rms given more than once"):
        zoo.control(case, setup, edge=edge, signals=edge.signals)
    setup.optimizers = [torch.optim.RMSprop(setup.model.parameters())]
    batch = zoo.data(case, 0, 0)
    unknown = EdgeOfStabilityMonitor(Sharpness(setup.model, setup.optimizers, zoo.loss_fn, [batch]))
    with pytest.raises(StabilityError, match="no stability limit is known for RMSprop"):
        zoo.control(case, setup, edge=unknown)
