"""Random faults on two ranks: no hang, no rank that disagrees, and one of three outcomes each.

* recovered: some attempts were refused, and the run is bit for bit its golden twin;
* stopped: every rank ends with an error, those of the healthy ranks name the faulty one (a rank that killed or stopped
  itself can say nothing);
* committed: nothing was refused, the verdicts are equal on all ranks, and the run is bit for bit the unguarded run
  with the same fault; replicas are equal.

The faults are drawn by kind, rank, step, phase and strength from the printed seed: 200 in the slow tests, the first 60
of them always. Many cases share one start of the worker processes; a case that stops the job costs a new start and the
rest goes on after it.
"""

from __future__ import annotations

import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import pytest
import torch.distributed as dist
import zoo
from harness import RankError
from zoo import Case

from dist_stability.testing import LOSS_PHASES, PHASES, Fault, FaultInjector, StateImage, compare
from dist_stability.testing.fault import DRAWN_KINDS

SEED = 20261122
FAULTS, FEW = 200, 48
STEPS = 13
# By kind: faults in numbers are the common case; one in three or four stops the job, which takes seconds each time.
KINDS = ("gradient-scale", "nan", "inf", "sleep", "kill", "stop", "exit") + ("bit-flip",) * 5 + ("raise",) * 3
CASES = [
    *(Case(mode, optimizer="sgd", steps=STEPS) for mode in ("ddp", "fsdp2")),
    *(Case(mode, optimizer="adamw-foreach", steps=STEPS, probe_on="mean") for mode in ("ddp", "fsdp2")),
    *(Case(mode, "conv", "adam-fused", steps=STEPS) for mode in ("ddp", "fsdp2")),
]

Job = tuple[int, Case, Fault]


def run_all(rank: int, world: int, jobs: list[Job], folder: str) -> None:
    """Run jobs until one stops this process; each leaves a file with its outcome."""
    for number, case, fault in jobs:
        outcome = one(rank, world, case, fault)
        Path(folder, f"{number}-{rank}.done").write_bytes(pickle.dumps(outcome))


def one(rank: int, world: int, case: Case, fault: Fault) -> tuple[str, list[str]]:
    """The outcome of one fault that stopped nobody: ("recovered" or "committed", what is wrong with that)."""
    injector = FaultInjector([fault])
    # A stopped rank is noticed by its silence only, so that is kept short.
    guarded = zoo.train(case, rank, world, injector=injector, timeout=4.0 if fault.kind == "stop" else 6.0)
    everyone = gather([repr(verdict) for verdict in guarded.verdicts])
    wrong = [f"the ranks disagree: {here} | {there}" for here, there in zip(*everyone, strict=True) if here != there]
    if guarded.dropped:
        twin = zoo.train(case, rank, world, skip=guarded.dropped, guarded=False)
        return "recovered", wrong + compare(guarded.image, twin.image)
    plain = zoo.train(case, rank, world, injector=FaultInjector([fault]), guarded=False)
    wrong += compare(guarded.image, plain.image)
    if case.mode == "ddp":
        here, there = gather(guarded.image.without("random", "buffer", "training"))
        wrong += [f"replicas differ: {line}" for line in compare(here, there)]
    return "committed", wrong


def gather(mine: Any) -> list[Any]:
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, mine)
    return everyone


def stopped(fault: Fault, results: list[Any]) -> list[str]:
    """What is wrong with the way in which a job stopped."""
    assert fault.rank is not None, "only a single rank can stop a job"
    culprit, peer = results[fault.rank], results[1 - fault.rank]
    wrong = []
    expected = {"kill": "Died", "exit": "Died", "stop": "Hung"}.get(fault.kind)
    if not isinstance(culprit, RankError) or (expected and culprit.type != expected):
        wrong.append(f"the faulty rank: {brief(culprit)}")
    elif not expected and not (culprit.is_a("StabilityError") or culprit.is_a("InjectedFault")):
        wrong.append(f"the faulty rank has no clean error: {brief(culprit)}")
    if not isinstance(peer, RankError) or not peer.is_a("StabilityError") or f"rank {fault.rank}" not in peer.message:
        wrong.append(f"the other rank's error does not name rank {fault.rank}: {brief(peer)}")
    return wrong


def brief(result: Any) -> str:
    """The type and message, and the traceback where it is not one of ours."""
    if not isinstance(result, RankError) or result.is_a("StabilityError"):
        return f"{result.type}: {result.message}" if isinstance(result, RankError) else str(result)
    return str(result)


def drawn(faults: int) -> list[Job]:
    jobs = []
    for number in range(faults):
        # Not in the last step: once that is done no rank has anything to learn of another from the controller.
        (fault,) = FaultInjector.random(SEED + number, 2, STEPS - 1, start=1, kinds=KINDS).faults
        jobs.append((number, CASES[number % len(CASES)], fault))
    return jobs


@pytest.mark.parametrize("faults", [FEW, pytest.param(FAULTS, marks=pytest.mark.slow)])
def test_random_faults(two: harness.Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str], faults: int) -> None:
    jobs = drawn(faults)
    with capsys.disabled():
        print(f"\n{faults} random faults, seed {SEED}")
    # A stopped job is mostly waited for, so two pools work side by side.
    other = harness.Pool(2)
    try:
        with ThreadPoolExecutor() as both:
            halves = both.map(outcomes_of, (two, other), (jobs[::2], jobs[1::2]), (tmp_path, tmp_path))
            said, outcomes = map(sum, zip(*halves, strict=True), ([], Counter()))
    finally:
        other.close()
    with capsys.disabled():
        print(dict(outcomes))
    assert not said, "\n".join(said)
    assert sum(outcomes.values()) == faults
    assert all(outcomes[kind] >= 10 for kind in ("recovered", "committed", "stopped")), outcomes


def outcomes_of(pool: harness.Pool, jobs: list[Job], folder: Path) -> tuple[list[str], Counter[str]]:
    """What is wrong, and how many jobs ended in which way."""
    said: list[str] = []
    outcomes: Counter[str] = Counter()
    while jobs:
        results = pool.run(run_all, jobs, str(folder), expect_failure=True, timeout=240, group_timeout=15)
        done = 0
        for number, case, fault in jobs:
            files = [folder / f"{number}-{rank}.done" for rank in (0, 1)]
            if not all(file.exists() for file in files):
                break
            done += 1
            found = [pickle.loads(file.read_bytes()) for file in files]
            outcomes[found[0][0]] += 1
            wrong = [f"rank {rank}: {line}" for rank, (_, lines) in enumerate(found) for line in lines[:3]]
            said += [f"{number}: {case} [{fault}]: {line}" for line in wrong]
        if done < len(jobs):
            number, case, fault = jobs[done]
            outcomes["stopped"] += 1
            said += [f"{number}: {case} [{fault}]: {line}" for line in stopped(fault, results)]
            done += 1
        jobs = jobs[done:]
    return said, outcomes


def test_the_draw_covers_what_it_should() -> None:
    faults = [fault for _, _, fault in drawn(FAULTS)]
    assert {fault.kind for _, _, fault in drawn(FEW)} == set(KINDS)
    assert {fault.kind for fault in faults} == set(DRAWN_KINDS) == set(KINDS)
    assert {fault.rank for fault in faults} == {0, 1, None}
    assert {fault.phase for fault in faults} == {*PHASES, *LOSS_PHASES}
    assert {fault.step for fault in faults} == set(range(1, STEPS - 1))


def test_it_can_fail() -> None:
    fault = Fault("raise", 3, "vote", 1)
    silent = RankError(0, "Hung", "no reply")
    assert stopped(fault, [silent, RankError(1, "InjectedFault", "", "", ("InjectedFault",))])
    assert compare(StateImage({"x": 1.0}), StateImage({"x": 2.0}))
