"""Promise 3, lockstep: one verdict on every rank for every step, or an error that names the rank and the reason."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import harness
import pytest
import test_golden_twin
import torch
import torch.distributed as dist
import zoo
from choice import slow
from harness import RankError
from test_golden_twin import Job
from zoo import Case

from dist_stability import Checkpoints, GradientNormGuard, NonFiniteGuard, StabilityController
from dist_stability.parallel import local
from dist_stability.testing import FaultInjector, Outcome, assert_golden_twin, flip_largest
from dist_stability.watch import is_transport_error

COLLECTIVES = [
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "broadcast_object_list"),
    *("reduce", "reduce_scatter_tensor", "gather", "scatter", "barrier", "monitored_barrier", "all_to_all_single"),
]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts every collective that Python code starts (DDP's own run in C++)."""
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def collectives(rank: int, world: int, case: Case, guards: tuple[Any, ...], give_norm: bool) -> list[dict[str, int]]:
    """The collectives inside each call of step(), counted."""
    setup = zoo.build(case, rank, world)
    controller = zoo.control(case, setup, guards=guards)
    counts = []
    with controller:
        for attempt in range(case.steps):
            for batch in zoo.fetch(case, setup, attempt):
                loss = zoo.loss_fn(setup.model, batch)
                (loss if setup.scaler is None else setup.scaler.scale(loss)).backward()
            # Under DDP the gradients are equal everywhere, so their norm is the global one.
            norm = torch.nn.utils.get_total_norm([p.grad for p in setup.model.parameters()]) if give_norm else None
            with counted() as calls:
                assert controller.step(grad_norm=norm, scaler=setup.scaler).accepted
            counts.append(dict(calls))
            for optimizer in setup.optimizers:
                optimizer.zero_grad()
    return counts


@pytest.mark.parametrize(
    ("guards", "norm", "expected"),
    [
        ((), False, 1),
        ((), True, 1),
        ((NonFiniteGuard(),), False, 2),
        ((NonFiniteGuard(),), True, 1),
        ((GradientNormGuard(),), False, 2),
        ((NonFiniteGuard(), GradientNormGuard()), True, 1),
    ],
    ids=lambda value: str([type(v).__name__ for v in value]) if isinstance(value, tuple) else str(value),
)
def test_one_collective_or_two(two: harness.Pool, guards: tuple[Any, ...], norm: bool, expected: int) -> None:
    for optimizer in ("adamw-foreach", "adamw-fused"):
        for counts in two.run(collectives, Case("ddp", optimizer=optimizer, steps=6), guards, norm):
            assert counts == [{"all_reduce": expected}] * 6


def test_unjudged_attempts_and_a_scaler(two: harness.Pool) -> None:
    for counts in two.run(collectives, Case("ddp", every=3, steps=6), (), False):
        assert counts == [{}, {}, {"all_reduce": 1}] * 2
    for counts in two.run(collectives, Case("ddp", every=3, steps=6), (NonFiniteGuard(),), False):
        assert counts == [{"all_reduce": 1}, {"all_reduce": 1}, {"all_reduce": 2}] * 2
    for counts in two.run(collectives, Case("ddp", scaler=True, steps=4), (), False):
        assert counts == [{"all_reduce": 2}] * 4


def test_sharded_the_rest_is_the_probes_forward(two: harness.Pool) -> None:
    for counts in two.run(collectives, Case("fsdp2", steps=4), (NonFiniteGuard(),), False):
        assert [count.pop("all_reduce") for count in counts] == [2] * 4
        assert all(set(count) <= {"all_gather_into_tensor"} for count in counts)


def with_nan(rank: int, world: int, case: Case) -> list[str]:
    """Non-finite gradients and measurements all around: what our all-reduces are given, if it is not finite."""
    seen: list[str] = []
    original = dist.all_reduce

    def checking(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.float64 and not tensor.isfinite().all():
            seen.append(str(tensor.tolist()))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = checking
    try:
        injector = FaultInjector.parse(["nan:step=3,rank=0", "inf:step=5,rank=1"])
        outcome = zoo.train(case, rank, world, injector=injector)
    finally:
        dist.all_reduce = original
    return seen if outcome.refused == {3, 5} else [f"refused {sorted(outcome.refused)}"]


def test_nothing_that_is_not_finite_enters_a_vote(two: harness.Pool) -> None:
    for mode in ("ddp", "fsdp2"):
        for guards in (False, True):
            assert two.run(with_nan, Case(mode, guards=guards, steps=7, probe_on="mean")) == [[], []]


# ---------------------------------------------------------------------- disagreement


def disagree(rank: int, world: int, bad: int, abouts: list[str]) -> list[tuple[Any, ...]]:
    """For each subject: a few good attempts, then one rank holds another opinion. The error of this rank."""
    return [error_of(lambda about=about: disagree_about(about, rank, world, bad)) for about in abouts]


def error_of(run: Callable[[], Any]) -> tuple[Any, ...]:
    """(type, ranks, step, message). All ranks fail at the same point, so that the processes can go on."""
    try:
        run()
    except Exception as error:
        return type(error).__name__, getattr(error, "ranks", ()), getattr(error, "step", None), str(error)
    return ("nothing", (), None, "")


def disagree_about(about: str, rank: int, world: int, bad: int) -> None:
    case = Case("fsdp2", optimizer="sgd", steps=8)
    setup = zoo.build(case, rank, world)
    with zoo.control(case, setup, timeout=20.0) as controller:
        for attempt in range(case.steps):
            if attempt == 5 and about == "loaded checkpoint":
                state = controller.state_dict()
                state["panel"]["rule"]["level"] += 1e-9 * (rank == bad)
                controller.load_state_dict(state)
            zoo.loss_fn(setup.model, zoo.fetch(case, setup, attempt)[0]).backward()
            norm: Any = None
            if attempt == 5 and about == "step" and rank == bad:
                controller._ledger.attempt = 7  # as after a step() that the others did not call
            if attempt == 5 and about == "plan" and rank == bad:
                setup.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
            if attempt == 4 and about == "history of verdicts" and rank == bad:
                controller.rule._learned.level += 1e-9  # judges alike, from other numbers
            if about == "gradient norm":
                norm = 1.0 if attempt < 5 or rank != bad else 1.0 + 1e-15
            if about == "gradient norm, NaN":
                norm = torch.tensor(1.0 if attempt < 5 or rank != bad else float("nan"))
            controller.step(grad_norm=norm)


SUBJECTS = ["step", "plan", "gradient norm", "gradient norm, NaN", "loaded checkpoint", "history of verdicts"]


def test_disagreement_stops_every_rank_by_name(four: harness.Pool) -> None:
    for errors in four.run(disagree, 2, SUBJECTS, timeout=100):
        for about, (kind, ranks, step, message) in zip(SUBJECTS, errors, strict=True):
            assert kind == "LockstepError" and ranks == (2,) and step in (5, 6, 7), (about, kind, ranks, step, message)
            assert "rank" in message and about.split(",")[0] in message, message


def test_without_a_majority_every_rank_is_named(two: harness.Pool) -> None:
    for ((kind, ranks, _, message),) in two.run(disagree, 1, ["gradient norm"], timeout=60):
        assert kind == "LockstepError" and ranks == (0, 1), message


def construct(rank: int, world: int, whats: list[str]) -> list[tuple[Any, ...]]:
    return [error_of(lambda what=what: construct_with(what, rank, world)) for what in whats]


def construct_with(what: str, rank: int, world: int) -> None:
    case = Case("ddp", steps=1)
    setup = zoo.build(case, rank, world)
    odd = rank == 1
    if what == "replicas":
        setup = zoo.build(Case("single"), rank, world)
        if odd:
            flip_largest(setup.model.parameters(), "low-mantissa")
    if what == "model and optimizer" and odd:
        setup.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    if what == "probe" and odd:
        case = Case("ddp", probes=2)
    if what == "every" and odd:
        case = Case("ddp", every=3)
    options: dict[str, Any] = {"timeout": 10.0}
    others = {"timeout": 11.0, "anchors": 1, "mode": "observe", "replica_check_every": 0}
    if what in others and odd:
        options[what] = others[what]
    if what == "guards":
        options["guards"] = (NonFiniteGuard(),) if odd else ()
    with tempfile.TemporaryDirectory() as folder:
        if what == "persist" and odd:
            options["persist"] = Checkpoints(folder)
        zoo.control(case, setup, **options).close()


SETTINGS = [
    "every",
    "mode",
    "timeout",
    "anchors",
    "replica_check_every",
    "guards",
    "probe",
    "persist",
    "model and optimizer",
    "replicas",
]


def test_ranks_that_were_given_different_things_do_not_start(two: harness.Pool) -> None:
    for errors in two.run(construct, SETTINGS, timeout=100):
        for what, (kind, ranks, _, message) in zip(SETTINGS, errors, strict=True):
            assert kind == "LockstepError" and 1 in ranks, (what, kind, ranks, message)
            assert (what if what != "replicas" else "bits differ") in message, message


# ---------------------------------------------------------------------- replicas


def drift(rank: int, world: int, mode: str, where: str) -> list[Any]:
    """Between two steps one bit changes on one replica, in a weight or a moment; the next attempt takes it back."""
    case = Case(mode, ranks=world, steps=9)

    def run(skip: frozenset[int], guarded: bool) -> Outcome:
        def flip(attempt: int, setup: zoo.Setup, controller: StabilityController | None) -> None:
            if guarded and attempt == 5 and rank == 2:
                parameter = setup.optimizers[0].param_groups[0]["params"][0]
                state = setup.optimizers[0].state[parameter]
                tensor = parameter if where == "weight" else state[where]
                flip_largest([local(tensor)], "low-mantissa")

        return zoo.train(case, rank, world, skip=skip, guarded=guarded, after_step=flip)

    outcome = assert_golden_twin(run, refused=[6])
    verdict = outcome.verdicts[6]
    return [verdict.signal, str(verdict.action), verdict.reason]


@pytest.mark.parametrize("where", ["weight", "exp_avg_sq"])
def test_one_bit_on_one_replica_is_found_and_restored(four: harness.Pool, where: str) -> None:
    for signal, action, reason in four.run(drift, "ddp", where):
        assert (signal, action) == ("replica", "rollback") and "ranks [2]" in reason, reason
    for signal, _, reason in four.run(drift, "hsdp", where):
        # Two replicas of a shard: nobody knows which one is right, so both are named (and both restored).
        assert signal == "replica" and "ranks [0, 2]" in reason, reason


# ---------------------------------------------------------------------- ranks that stop, and those that wait for them


def faulty(rank: int, world: int, case: Case, faults: list[str], timeout: float) -> Outcome:
    begun = time.monotonic()
    try:
        return zoo.train(case, rank, world, injector=FaultInjector.parse(faults), timeout=timeout)
    except Exception as error:
        error.seconds = time.monotonic() - begun  # type: ignore[attr-defined]
        raise


def peers_of(two: harness.Pool, case: Case, fault: str, timeout: float = 5.0) -> tuple[RankError, RankError]:
    """Rank 0, which must stop with a LockstepError that names rank 1, and rank 1."""
    results = two.run(faulty, case, [fault], timeout, expect_failure=True, timeout=60, grace=timeout / 2)
    peer, culprit = results
    assert isinstance(peer, RankError) and peer.is_a("LockstepError"), str(peer)
    assert peer.facts["ranks"] == (1,) and "rank 1" in peer.message, peer.message
    return peer, culprit


@pytest.mark.parametrize("phase", [slow("gradients"), "vote", "loss before forward"])
def test_a_rank_that_never_arrives_is_named(two: harness.Pool, phase: str) -> None:
    case = Case("fsdp2", steps=6)
    peer, culprit = peers_of(two, case, f"stop:step=3,phase={phase.replace(' ', '-')},rank=1")
    assert culprit.type == "Hung"
    assert peer.facts["step"] == 3 and "waited for rank 1" in peer.message and "silent" in peer.message
    assert peer.facts["seconds"] < 15, "the timeout is 5 s; the rest is slack for a busy machine"


def test_a_rank_that_sleeps_is_told_from_one_that_died(two: harness.Pool) -> None:
    peer, _ = peers_of(two, Case("ddp", steps=6), "sleep:step=3,phase=step,rank=1,seconds=30")
    assert "waited for rank 1 (last seen at attempt 3, step)" in peer.message and "silent" not in peer.message


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_short_sleep_harms_nobody(two: harness.Pool, mode: str) -> None:
    for outcome in two.run(faulty, Case(mode, steps=6), ["sleep:step=3,phase=vote,rank=1,seconds=1"], 20.0):
        assert len(outcome.verdicts) == 6 and not outcome.dropped


@pytest.mark.parametrize("phase", ["gradients", "vote", "copy"])
def test_a_rank_that_dies_is_named(two: harness.Pool, phase: str) -> None:
    kind = "kill" if phase == "vote" else "exit"
    _, culprit = peers_of(two, Case("ddp", steps=6), f"{kind}:step=3,phase={phase.replace(' ', '-')},rank=1")
    assert culprit.type == "Died"


@pytest.mark.parametrize("phase", ["veto vote", "step", "probe", "copy", "done"])
def test_a_rank_that_raises_is_named_with_its_reason(two: harness.Pool, phase: str) -> None:
    """At any point of the step: not a vote, since the step cannot go on there, but never silence."""
    fault = f"raise:step=3,phase={phase.replace(' ', '-')},rank=1"
    peer, culprit = peers_of(two, Case("ddp", steps=6), fault)
    assert culprit.is_a("InjectedFault")
    assert "rank 1 stopped at attempt 3" in peer.message and "InjectedFault" in peer.message, peer.message


def test_a_rank_that_raises_in_a_restore_is_named(two: harness.Pool) -> None:
    faults = ["nan:step=3,rank=1", "raise:step=3,phase=restore,rank=1"]
    case = Case("fsdp2", steps=6, guards=False)
    for error in two.run(faulty, case, faults, 5.0, expect_failure=True, timeout=60):
        assert error.is_a("LockstepError") or error.is_a("InjectedFault"), str(error)
        assert "rank 1" in error.message and "InjectedFault" in str(error)


@pytest.mark.parametrize("mode", ["fsdp1", "fsdp2", "fsdp2-keep", "tp"])
def test_raising_inside_a_forward_with_collectives_stops_all_by_name(two: harness.Pool, mode: str) -> None:
    for bad in (0, 1) if mode == "fsdp2" else (1,):
        fault = f"raise:step=3,phase=loss-in-forward,rank={bad}"
        for error in two.run(faulty, Case(mode, steps=6), [fault], 5.0, expect_failure=True, timeout=60):
            assert isinstance(error, RankError) and error.is_a("LockstepError"), str(error)
            assert error.facts["ranks"] == (bad,) and error.facts["step"] == 3, error.facts
            assert f"rank {bad} stopped at attempt 3" in error.message, error.message
            assert "forward" in error.message and "InjectedFault" in error.message, error.message


def test_four_ranks_stop_when_one_raises_inside(four: harness.Pool) -> None:
    for mode in ("hsdp", "fsdp2+tp"):
        fault = "raise:step=3,phase=loss-in-forward,rank=2"
        for error in four.run(faulty, Case(mode, steps=6), [fault], 5.0, expect_failure=True, timeout=90):
            assert isinstance(error, RankError) and error.is_a("LockstepError"), str(error)
            assert error.facts["ranks"] == (2,), error.message


@pytest.mark.parametrize("fault", ["kill:step=3,phase=probe,rank=2", "stop:step=3,phase=gradients,rank=2"])
def test_all_the_others_name_the_same_rank(four: harness.Pool, fault: str) -> None:
    """Not the first one that noticed, whose own error comes second-hand."""
    results = four.run(faulty, Case("ddp", ranks=4, steps=6), [fault], 6.0, expect_failure=True, timeout=60)
    assert results.pop(2).type in ("Died", "Hung")
    for error in results:
        assert error.is_a("LockstepError") and error.facts["ranks"] == (2,), f"{error.message} {error.facts}"


def lose_two_at_once(rank: int, world: int) -> list[Exception]:
    """The errors of three broadcasts from a rank that sends none: two in flight together, one begun after those."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
    if rank == 0:
        time.sleep(4)
        return []
    works = [dist.broadcast(torch.zeros(n), 0, group=group, async_op=True) for n in (3, 5)]
    errors = []
    for wait in (*(work.wait for work in works), lambda: dist.broadcast(torch.zeros(2), 0, group=group)):
        try:
            wait()
        except Exception as error:
            errors.append(error)
    return errors


def test_every_collective_that_lost_its_peers_is_known_for_one(two: harness.Pool) -> None:
    """DDP has several in flight: one times out, the others say something else, and any of them may be raised."""
    errors = two.run(lose_two_at_once)[1]
    assert len(errors) == 3
    assert all(is_transport_error(error) for error in errors), errors
    assert not is_transport_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"))


def leave_the_loop(rank: int, world: int) -> None:
    case = Case("ddp", steps=6)
    setup = zoo.build(case, rank, world)
    with zoo.control(case, setup, timeout=5.0) as controller:
        for attempt in range(case.steps):
            zoo.loss_fn(setup.model, zoo.fetch(case, setup, attempt)[0]).backward()
            if attempt == 3 and rank == 1:
                raise OSError("disk full")
            controller.step()


def test_an_exception_in_the_loop_of_one_rank_reaches_the_others_by_name(two: harness.Pool) -> None:
    peer, culprit = two.run(leave_the_loop, expect_failure=True, timeout=60)
    assert culprit.type == "OSError"
    assert peer.is_a("LockstepError") and peer.facts["ranks"] == (1,), str(peer)
    assert "OSError: disk full" in peer.message


# ---------------------------------------------------------------------- damaged snapshots


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_damaged_snapshot_is_never_restored(two: harness.Pool, mode: str) -> None:
    """Without an older one the job stops, on every rank, with the name of what is damaged."""
    faults = ["bit-flip:step=5,rank=1,where=snapshot,bit=low-mantissa", "nan:step=5,rank=0"]
    for error in two.run(faulty, Case(mode, steps=8, guards=False), faults, 5.0, expect_failure=True, timeout=60):
        assert isinstance(error, RankError) and error.is_a("SnapshotError"), str(error)
        assert "rank 1: snapshot of attempt 4: damaged" in error.message, error.message


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_with_an_anchor_every_rank_goes_back_to_that(two: harness.Pool, mode: str) -> None:
    faults = ("bit-flip:step=20,rank=1,where=snapshot", "nan:step=20,rank=0")
    case = Case(mode, steps=24, guards=False, draws=False)
    test_golden_twin.check([Job(case, faults, (20,), tuple(range(16, 20)), ("deep_rollback",))])
