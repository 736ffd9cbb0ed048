"""A look ahead from within the controller changes no bit of the run, and is told; spectral shaping through the ladder.

Golden twins as everywhere: a run with a preflight is the run without; a run whose ladder never switches shaping on is
the run without shaping; and one where it does is the loop that switches it on there by itself and drops what was
refused.
"""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
import zoo
from zoo import Case

from dist_stability import Escalation, FixedInnovation
from dist_stability.diagnostics.kss import SpectralShaping
from dist_stability.diagnostics.preflight import Level
from dist_stability.testing import FaultInjector, StateImage, capture_state, compare

CASES = {
    mode: [Case(mode, scheduler=True, clip=1.0), Case(mode, optimizer="adam-fused", every=3), Case(mode, form="attach")]
    for mode in ("single", "ddp", "fsdp2")
}
FAST = Escalation(shape_after=2, attenuate_after=0)


def looked(setup: zoo.Setup, controller: Any, case: Case, lr: float | None = None) -> Any:
    batches = [zoo.data(case, number, setup.replica) for number in range(2)]
    return controller.preflight(batches, lr=lr, blocks=["block"])


def transparent(rank: int, world: int, cases: list[Case], decision: str) -> list[str]:
    said = []
    for case in cases:
        events: list[dict[str, Any]] = []
        reports: list[Any] = []

        def before(setup: zoo.Setup, controller: Any, case: Case = case, reports: list[Any] = reports) -> None:
            reports.append(looked(setup, controller, case, lr=1e4))

        found = zoo.train(case, rank, world, at_start=before, on_event=events.append, decision=decision)
        wrong = compare(found.image, zoo.train(case, rank, world, guarded=False).image)
        told = [event for event in events if event["action"] == "preflight"]
        wrong += [] if len(told) == 1 and events[0] is told[0] and told[0]["attempt"] == -1 else [f"told {told}"]
        wrong += [] if told and told[0]["level"] == "high" == reports[0].level else [f"{reports[0].verdict}"]
        said += [f"rank {rank}, {case}: {line}" for line in wrong[:5]]
    return said


@pytest.mark.parametrize("decision", ["immediate", "deferred"])
@pytest.mark.parametrize("mode", list(CASES))
def test_training_after_a_preflight_is_training_without(mode: str, decision: str) -> None:
    cases = CASES[mode] if decision == "immediate" else CASES[mode][:1]
    for said in harness.pool(zoo.MODES[mode]).run(transparent, cases, decision, timeout=300):
        assert not said, "\n".join(said)


def same(rank: int, world: int) -> list[Any]:
    case = Case("fsdp2")
    setup = zoo.build(case, rank, world)
    with zoo.control(case, setup) as controller:
        found = looked(setup, controller, case)
    return [repr(found), found.lr]


def test_every_rank_has_the_same_report(two: harness.Pool) -> None:
    first, second = two.run(same)
    assert first == second and first[1] == 0.01


def test_the_largest_rate_is_the_schedules() -> None:
    case = Case()
    setup = zoo.build(case, 0, 1)
    torch.optim.lr_scheduler.LambdaLR(setup.optimizers[0], lambda step: (step + 1) / 100)
    assert setup.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    with zoo.control(case, setup) as controller:
        assert looked(setup, controller, case).lr == 0.01


def test_sgd_gets_no_verdict_and_later_is_too_late() -> None:
    case = Case(optimizer="sgd", steps=2)
    late: list[str] = []

    def after(attempt: int, setup: zoo.Setup, controller: Any) -> None:
        with pytest.raises(RuntimeError, match=r"attempt 1 has begun.*right after construction") as raised:
            looked(setup, controller, case)
        late.append(str(raised.value))

    setup = zoo.build(case, 0, 1)
    with zoo.control(case, setup) as controller:
        assert looked(setup, controller, case).level is Level.UNKNOWN
    zoo.train(Case(optimizer="sgd", steps=1), 0, 1, after_step=after)
    assert len(late) == 1
    with zoo.control(case, zoo.build(case, 0, 1)) as controller:
        zoo.loss_fn(controller.model, zoo.data(case, 0, 0))
        with pytest.raises(RuntimeError, match="before the first training forward"):
            looked(setup, controller, case)


# ---------------------------------------------------------------------- spectral shaping through the ladder


def trained(
    case: Case,
    rank: int,
    world: int,
    *,
    given: bool = True,
    risky: bool = True,
    specs: tuple[str, ...] = (),
    guarded: bool = True,
    skip: tuple[int, ...] = (),
    on_from: int | None = None,
) -> tuple[StateImage, list[str]]:
    """A loop that takes its loss through shaping, and what the ladder did; ``on_from`` switches it on by hand."""
    setup = zoo.build(case, rank, world)
    # At every second call: a call that a refused step has made and that is not taken back would show.
    shaping = SpectralShaping(setup.model, ["block"], every=2) if given else None
    attempt = 0
    if shaping is not None and not guarded:
        shaping.follow(lambda: on_from is not None and attempt >= on_from)
    injector = FaultInjector.parse(specs)
    controller = None
    if guarded:
        rule = FixedInnovation(0.3, 0.5)
        controller = zoo.control(case, setup, injector=injector, rule=rule, escalation=FAST, shaping=shaping)
        if given:
            looked(setup, controller, case, lr=1e4 if risky else 1e-5)
    rungs = []
    for attempt in range(case.steps):
        (batch,) = zoo.fetch(case, setup, attempt)
        if attempt in skip:
            continue
        loss = shaping(zoo.loss_fn, batch) if shaping is not None else zoo.loss_fn(setup.model, batch)
        setup.optimizers[0].zero_grad()
        loss.backward()
        if controller is None:
            setup.optimizers[0].step()
        else:
            rungs.append(controller.step().rung)
    if controller is not None:
        controller.close()
    assert shaping is None or (shaping.last is not None) == ("shape" in rungs or on_from is not None)
    counted = None if shaping is None else {"shaping": shaping}
    return capture_state(
        setup.model, setup.optimizers, counted if on_from is not None or "shape" in rungs else None
    ), rungs


def shaped(rank: int, world: int, mode: str) -> list[str]:
    case = Case(mode, steps=16)
    clean, rungs = trained(case, rank, world)
    plain, _ = trained(case, rank, world, given=False, guarded=False)
    wrong = [f"never switched on: {line}" for line in compare(clean, plain)] + [rung for rung in rungs if rung]

    # A step 300 times too long, three times, which only the probe sees.
    specs = ("learning-rate:step=8,factor=300,length=3",)
    found, rungs = trained(case, rank, world, specs=specs)
    wrong += [] if rungs[8:12] == ["skip", "shape", "skip", ""] else [f"rungs {rungs}"]
    twin, _ = trained(case, rank, world, guarded=False, skip=(8, 9, 10), on_from=10)
    wrong += [f"switched on: {line}" for line in compare(found, twin)]
    other, _ = trained(case, rank, world, given=False, guarded=False, skip=(8, 9, 10))
    wrong += [] if compare(found, other) else ["shaping changed nothing"]

    calm, rungs = trained(case, rank, world, specs=specs, risky=False)
    wrong += [] if rungs[8:12] == ["skip", "skip", "skip", ""] else [f"the risk was not high: {rungs}"]
    wrong += [f"the risk was not high: {line}" for line in compare(calm, other)]
    return [f"rank {rank}, {mode}: {line}" for line in wrong[:6]]


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_the_ladder_switches_shaping_on_where_the_risk_was_high(mode: str) -> None:
    for said in harness.pool(zoo.MODES[mode]).run(shaped, mode, timeout=300):
        assert not said, "\n".join(said)


def test_a_resumed_run_goes_on_shaping() -> None:
    case = Case()
    setup = zoo.build(case, 0, 1)
    shaping = SpectralShaping(setup.model, ["block"])
    with zoo.control(case, setup, shaping=shaping) as controller:
        state = controller.state_dict()
        shaping(zoo.loss_fn, zoo.data(case, 0, 0))
        assert shaping.last is None
        state["ladder"]["shaping"] = True
        controller.load_state_dict(state)
        shaping(zoo.loss_fn, zoo.data(case, 0, 0))
        assert shaping.last is not None and shaping.last.blocks == ("block",)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shaping": 3}, TypeError, r"shaping: expected SpectralShaping\(model, ...\) or None, got int"),
        ({"mode": "observe"}, ValueError, "mode='observe' never acts"),
        ({"extra_state": {"mine": "itself"}}, ValueError, "leave out 'spectral shaping'"),
        ({"shaping": "another"}, ValueError, "made for another model"),
    ],
)
def test_wrong_shaping_is_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    case = Case()
    setup = zoo.build(case, 0, 1)
    shaping = SpectralShaping(setup.model, ["block"])
    given: dict[str, Any] = {"shaping": shaping, **options}
    if given["shaping"] == "another":
        given["shaping"] = SpectralShaping(zoo.build(case, 0, 1).model, ["block"])
    if "extra_state" in given:
        setup.extra_state, given = {"mine": shaping}, {"shaping": shaping}
    with pytest.raises(error, match=words):
        zoo.control(case, setup, **given)
