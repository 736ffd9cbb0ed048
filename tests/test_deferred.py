"""The deferred verdict: the vote on a step is begun there and read at the next, and every promise holds as before.

A refusal is known one step late: it takes back attempt t, whatever the loop did after it included, and drops batch
t + 1, whose gradients came from refused weights. So the golden twin skips both. Loaders draw nothing here: what one
draws for the batch after a refused one is outside the promise.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import harness
import pytest
import test_golden_twin
import test_rewind
import test_transparency
import torch
import zoo
from choice import in_thirds, often, slow, third_of
from test_golden_twin import FORMS, AlwaysDeep, Job
from zoo import Case

from dist_stability import AdaptiveCadence, GradientNormGuard, LossProbe, NonFiniteGuard
from dist_stability.parallel import this_rank
from dist_stability.signals import Gradients
from dist_stability.testing import FaultInjector, compare

DEFERRED = {"decision": "deferred"}
MODES = ["single", "ddp", "fsdp1", "fsdp2", "fsdp2-uneven", "fsdp2-empty", "fsdp2-keep", "tp"]
FLIP = "bit-flip:step={},rank={},where=parameter"


def deferred(
    case: Case, faults: tuple[str, ...], refused: tuple[int, ...], undone: tuple[int, ...], **options: Any
) -> Job:
    case = replace(case, draws=False)
    actions = options.pop("actions", ())
    return Job(case, faults, refused, undone, actions, {**DEFERRED, **options})


def one_late(case: Case, fault: str, attempt: int, **options: Any) -> Job:
    """A fault in one attempt, refused at the next; at the last one, by finish()."""
    last = attempt == case.steps - 1
    refused, undone = ((attempt,), ()) if last else ((attempt + 1,), (attempt,))
    return deferred(case, (fault.format(attempt, zoo.world_of(case) - 1),), refused, undone, **options)


# ---------------------------------------------------------------------- exact


@pytest.mark.parametrize("mode", often(MODES, ("single", "ddp", "fsdp1", "fsdp2-empty", "tp")))
def test_first_middle_and_last(mode: str) -> None:
    """Adam has no state before its first step, and no forward follows the last one."""
    fused = "adamw-loop" if mode == "tp" else "adamw-fused"
    cases = [Case(mode, scheduler=True, steps=7), Case(mode, optimizer=fused, scheduler=True, steps=7)]
    if mode != "tp":
        cases.append(Case(mode, "conv", "sgd", scheduler=True, steps=7))
    test_golden_twin.check(
        one_late(case, FLIP, attempt, actions=("rollback",)) for case in cases for attempt in (0, 3, 6)
    )


@pytest.mark.parametrize("mode", often(("single", "ddp", "fsdp2", "fsdp2-mixed"), ("single", "ddp", "fsdp2-mixed")))
def test_every_kind_of_no(mode: str) -> None:
    """Gradients, weights, the probe and a guard say no, on a rank of their own each."""
    last = zoo.MODES[mode] - 1
    probing = 0 if mode in ("single", "ddp") else last
    short, long = Case(mode, scheduler=True, steps=7), Case(mode, steps=13)
    bare = replace(short, guards=False, model="conv")
    jobs = [
        one_late(replace(short, optimizer=name), "nan:step={},rank={}", 4, actions=("rollback",))
        for name in ("adamw-foreach", "adam-fused", "sgd")
    ]
    jobs += [one_late(bare, "nan:step={},rank={}", 4), one_late(short, f"inf:step={{}},rank={last}", 0)]
    jobs += [
        one_late(short, f"raise:step={{}},phase=loss-{where}-forward,rank={probing}", 4)
        for where in ("before", "after")
    ]
    # Only the gradient norm betrays it, and that counts after eight commits; a guard sees it as well.
    scale = "gradient-scale:step={},factor=300"
    guards = (GradientNormGuard(), NonFiniteGuard())
    jobs += [one_late(long, scale, 9), one_late(long, scale, 10, guards=guards)]
    jobs += [one_late(replace(long, clip=1.0), scale, 10, guards=guards)]
    test_golden_twin.check(jobs)


class Reading(NonFiniteGuard):
    """Wants the norm before the step, so the host waits for it, and a veto is final at once."""

    reads_norm = True


class Raising(NonFiniteGuard):
    """Raises at its fifth look, on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank, self.looks = rank, 0

    def flag(self, gradients: Gradients) -> torch.Tensor:
        self.looks += 1
        if self.looks == 5 and self.rank == this_rank():
            raise ArithmeticError("in the guard")
        return super().flag(gradients)


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_guards_that_know_in_time_and_guards_that_raise(mode: str) -> None:
    last = zoo.MODES[mode] - 1
    case = Case(mode, scheduler=True, steps=7)
    jobs = []
    for optimizer in ("adamw-foreach", "adam-fused"):
        each = replace(case, optimizer=optimizer)
        nan = f"nan:step=4,rank={last}"
        jobs.append(deferred(each, (nan,), (4,), (), actions=("veto",), guards=(Reading(),)))
        jobs.append(deferred(each, (), (5,), (4,), actions=("rollback",), guards=(Raising(last),)))
    test_golden_twin.check(jobs)


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_several_faults(mode: str) -> None:
    """Two in a row, a fault in the dropped batch as well, one right after a refusal, and different ranks."""
    last = zoo.MODES[mode] - 1
    case = Case(mode, scheduler=True, steps=9)
    nan = f"nan:step={{}},rank={last}"
    flips = [FLIP.format(attempt, rank) for attempt, rank in ((2, last), (4, 0), (8, last))]
    jobs = [
        deferred(case, (FLIP.format(3, last), FLIP.format(5, 0)), (4, 6), (3, 5)),
        deferred(case, (FLIP.format(3, last), nan.format(4)), (4,), (3,)),
        deferred(replace(case, shape=3), (FLIP.format(3, last), nan.format(6)), (4, 7), (3, 6)),
        deferred(case, (nan.format(3), nan.format(4)), (4,), (3,)),
        deferred(case, tuple(nan.format(attempt) for attempt in (3, 4, 5)), (4, 6), (3, 5)),
        deferred(replace(case, model="conv"), tuple(flips), (3, 5, 8), (2, 4)),
        deferred(case, (FLIP.format(0, last), FLIP.format(2, last), FLIP.format(4, last)), (1, 3, 5), (0, 2, 4)),
    ]
    test_golden_twin.check(jobs)


@pytest.mark.parametrize("mode", often(("single", "ddp", "fsdp2-uneven"), ("single", "ddp")))
def test_every_way_to_use_it(mode: str) -> None:
    """Hooks, closures, several optimizers, accumulation, clipping: a flip in 4, a NaN in 6."""
    last = zoo.MODES[mode] - 1
    faults = (FLIP.format(4, last), f"nan:step=6,rank={last}")
    test_golden_twin.check(
        deferred(replace(case, mode=mode, steps=8), faults, (5, 7), (4, 6), actions=("rollback",) * 2)
        for case in FORMS.values()
    )


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_every_third_attempt_is_judged(mode: str) -> None:
    """The vote of attempt 5 is read at 6, which is not judged. Guards act in time where others would be undone, too."""
    last = zoo.MODES[mode] - 1
    case = Case(mode, "conv", every=3, scheduler=True, steps=14)
    nan = f"nan:step={{}},rank={last}"
    jobs = [
        deferred(replace(case, guards=False), (FLIP.format(4, last),), (6,), (3, 4, 5)),
        # The bad weights give gradients of NaN: the guard says so in time, and what stands is measured at once.
        deferred(case, (FLIP.format(4, last),), (5,), (3, 4)),
        deferred(case, (FLIP.format(5, last),), (6,), (3, 4, 5)),
        deferred(case, (FLIP.format(11, last),), (12,), (9, 10, 11)),
        deferred(replace(case, steps=12), (FLIP.format(10, last),), (11,), (9, 10)),
        deferred(case, (nan.format(3),), (3,), (), actions=("veto",)),
        deferred(case, (nan.format(6),), (6,), (), actions=("veto",)),
        deferred(replace(case, optimizer="adam-fused"), (nan.format(5),), (5,), (), actions=("veto",)),
        deferred(replace(case, form="attach"), (FLIP.format(5, last),), (6,), (3, 4, 5)),
    ]
    test_golden_twin.check(jobs)


@pytest.mark.parametrize("mode", ["single", slow("ddp"), "fsdp2"])
def test_with_a_grad_scaler(mode: str) -> None:
    """The scaler is updated after a provisional verdict, and goes back with a refusal; a veto is known in time."""
    last = zoo.MODES[mode] - 1
    jobs = []
    for optimizer, clip in (("adamw-foreach", 1.0), ("adam-fused", None), ("sgd", 1.0)):
        case = Case(mode, optimizer=optimizer, scaler=True, clip=clip, scheduler=True, steps=9)
        jobs += [one_late(case, FLIP, attempt) for attempt in (3, 5, 8)]
    jobs.append(deferred(case, (FLIP.format(3, last), FLIP.format(5, last)), (4, 6), (3, 5)))
    test_golden_twin.check(jobs)


def overflow(rank: int, world: int, case: Case) -> list[str]:
    plain = zoo.train(case, rank, world, injector=FaultInjector.parse(["inf:step=5"]), guarded=False)
    one = FaultInjector.parse([f"inf:step=5,rank={world - 1}"])
    guarded = zoo.train(case, rank, world, injector=one, **DEFERRED)
    said = [(str(v.action), v.final) for v in guarded.verdicts]
    expected = [("commit", False)] * 5 + [("scaler_skip", True)] + [("commit", False)] * 2 + [("commit", True)]
    return compare(guarded.image, plain.image) + ([] if said == expected else [str(said)])


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_an_overflow_is_no_refusal(mode: str) -> None:
    case = Case(mode, scaler=True, steps=8)
    assert not any(harness.pool(zoo.MODES[mode]).run(overflow, case))


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_deep_rollback(mode: str) -> None:
    fault = "bit-flip:step=20,where=parameter" if mode == "ddp" else FLIP.format(20, zoo.MODES[mode] - 1)
    case = Case(mode, steps=24, scheduler=True)
    options = {"rule": AlwaysDeep(5.0), "replica_check_every": 0, "actions": ("deep_rollback",)}
    test_golden_twin.check([deferred(case, (fault,), (21,), tuple(range(8, 21)), **options)])


def test_four_ranks(four: harness.Pool) -> None:
    """A drifted replica that rank 0's probe cannot see, and a NaN on a rank of its own."""
    flip = "bit-flip:step={},rank=2,where=parameter,bit=low-mantissa"
    jobs = [one_late(Case(mode, ranks=4, steps=7), flip, 4) for mode in ("ddp", "hsdp", "fsdp2+tp")]
    jobs += [one_late(Case("fsdp2-empty", ranks=4, steps=7), "nan:step={},rank={}", 4)]
    test_golden_twin.check(jobs)


# ---------------------------------------------------------------------- transparent


def transparent(rank: int, world: int, cases: list[Case]) -> list[str]:
    said = []
    for case in cases:
        guarded = zoo.train(case, rank, world, **DEFERRED)
        finals = [verdict.final for verdict in guarded.verdicts]
        wrong = [f"{verdict}" for verdict in guarded.verdicts if not verdict.accepted or verdict.undone]
        if case.every == 1 and finals != [False] * case.steps + [True]:
            wrong.append(f"final: {finals}")
        wrong += compare(guarded.image, zoo.train(case, rank, world, guarded=False).image)
        said += [f"rank {rank}, {case}: {line}" for line in wrong[:5]]
    return said


@in_thirds(2)
def test_with_and_without_the_controller(mode: str, third: int | None) -> None:
    cases = third_of(zoo.matrix_of(mode), third)
    for said in harness.pool(zoo.MODES[mode]).run(transparent, cases, timeout=300):
        assert not said, "\n".join(said)


@pytest.mark.parametrize("mode", often(("single", "ddp", "fsdp2"), ("single", "ddp")))
def test_transparent_in_every_way_to_use_it(mode: str) -> None:
    cases = [replace(case, mode=mode) for case in test_transparency.OPTIONS.values()]
    cases += [Case(mode, scaler=True, clip=1.0), Case(mode, optimizer="adam-fused", scaler=True)]
    for said in harness.pool(zoo.MODES[mode]).run(transparent, cases, timeout=300):
        assert not said, "\n".join(said)


def observing(rank: int, world: int, case: Case) -> list[str]:
    events: list[dict[str, Any]] = []
    specs = ["gradient-scale:step=9,factor=300", "bit-flip:step=11,rank=0,where=parameter"]
    guarded = zoo.train(
        case, rank, world, injector=FaultInjector.parse(specs), mode="observe", on_event=events.append, **DEFERRED
    )
    plain = zoo.train(case, rank, world, injector=FaultInjector.parse(specs), guarded=False)
    would = [event["would"] for event in events]
    wrong = [str(verdict) for verdict in guarded.verdicts if not verdict.accepted or verdict.undone]
    wrong += [] if would[9] == would[11] == "rollback" and set(would[:9]) == {"commit"} else [f"would {would}"]
    wrong += [] if [event["attempt"] for event in events] == [*range(12)] else ["an event is missing"]
    return wrong + compare(guarded.image, plain.image)


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_observe_mode_acts_on_nothing(mode: str) -> None:
    assert not any(harness.pool(zoo.MODES[mode]).run(observing, Case(mode, optimizer="sgd")))


def everything(rank: int, world: int, mode: str) -> list[str]:
    """All that can be switched on at once, under both decisions: the same verdicts on the same attempts."""
    case = Case(mode, ranks=world, steps=20, scheduler=True, clip=1.0, draws=False)
    second = [zoo.data(case, 10**7 + i, 0, size=16) for i in range(2)]

    def run(specs: list[str], decision: str) -> tuple[zoo.Outcome, list[dict[str, Any]]]:
        events: list[dict[str, Any]] = []
        outcome = zoo.train(
            case,
            rank,
            world,
            injector=FaultInjector.parse(specs),
            confirm=LossProbe(zoo.probe_loss, second),
            guards=(NonFiniteGuard(), GradientNormGuard()),
            every=AdaptiveCadence(most=3, calm=100),
            anchors=3,
            decision=decision,
            on_event=events.append,
        )
        return outcome, events

    numbers = ("attempt", "step", "measurement", "innovation", "bound", "gradient_norm", "action", "signals")
    (late, of_late), (now, of_now) = run([], "deferred"), run([], "immediate")
    wrong = compare(late.image, now.image)
    for a, b in zip(of_late, of_now, strict=True):
        wrong += [f"{name}: {a[name]} != {b[name]}" for name in numbers if a[name] != b[name]]
    # In replicas alike, or their checksums would refuse it before a probe does.
    faulty, _ = run(["bit-flip:step=12,where=parameter", "gradient-scale:step=15,factor=3e4"], "deferred")
    actions = {verdict.step: str(verdict.action) for verdict in faulty.verdicts if not verdict.accepted}
    wrong += [] if actions == {13: "rollback", 16: "rollback"} else [f"refused {actions}"]
    wrong += compare(faulty.image, zoo.train(case, rank, world, skip=frozenset({12, 13, 15, 16}), guarded=False).image)
    return [f"rank {rank}: {line}" for line in wrong[:6]]


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2-uneven"])
def test_everything_switched_on(mode: str) -> None:
    for said in harness.pool(zoo.MODES[mode]).run(everything, mode, timeout=200):
        assert not said, "\n".join(said)


# ---------------------------------------------------------------------- replay


@pytest.mark.parametrize(("mode", "every"), often(product(("ddp", "fsdp2"), (1, 3)), [("ddp", 1)]))
def test_with_replay_only_the_guilty_batch_is_lost(mode: str, every: int) -> None:
    """The batch after the guilty one was trained on with refused weights: it is shown again."""
    case = Case(mode, every=every, scheduler=True, steps=9)
    jobs = [test_rewind.Job(case, (guilty,), decision="deferred") for guilty in (0, 3, 4, 5, 7)]
    jobs += [
        test_rewind.Job(case, (3, 4), decision="deferred"),
        test_rewind.Job(case, (3, 5), decision="deferred"),
        test_rewind.Job(replace(case, optimizer="sgd", model="conv"), (4,), "gradient", decision="deferred"),
        test_rewind.Job(replace(case, accumulation=3, steps=8), (4, 14), decision="deferred"),
        test_rewind.Job(replace(case, form="attach"), (3, 6), decision="deferred"),
        test_rewind.Job(replace(case, steps=10), (4,), epochs=2, decision="deferred"),
        test_rewind.Job(case, (), refusals=0, decision="deferred"),
        *(test_rewind.Job(replace(case, every=8, steps=30), (n,), adaptive=True, decision="deferred") for n in (9, 17)),
        # The last batch of the loader: its verdict is read when the loader is at its end.
        test_rewind.Job(case, (8,), decision="deferred"),
        test_rewind.Job(replace(case, steps=10), (8,), decision="deferred"),
    ]
    test_rewind.check(jobs)
