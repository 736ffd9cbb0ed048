"""Checkpoints of several ranks: the same ranks go on bit for bit, others take them over with equal values."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import zoo
from torch import Tensor
from torch.distributed.tensor import DTensor
from zoo import Case

from dist_stability import Checkpoints, SharedMemory, parallel
from dist_stability.snapshot.plan import bare
from dist_stability.snapshot.tiers.manifest import attempts, read_manifest
from dist_stability.testing import FaultInjector, StateImage, capture_state, compare

FAULT = "gradient-scale:step=8,factor=300"
"""A step that is refused, after what is resumed."""


class Killer:
    """Ends this process in the ``count``-th call of a phase, from an attempt on."""

    def __init__(self, phase: str, attempt: int, count: int) -> None:
        self.phase, self.attempt, self.count = phase, attempt, count

    def __call__(self, attempt: int, phase: str) -> None:
        if phase == self.phase and attempt >= self.attempt:
            self.count -= 1
            if self.count < 0:
                os.kill(os.getpid(), signal.SIGKILL)


def whole(setup: zoo.Setup) -> dict[str, Tensor]:
    """Every parameter and its state as full tensors, by name, and the learning rates. All ranks together."""
    parallel.reshard(setup.model)
    names = {id(parameter): bare(name) for name, parameter in setup.model.named_parameters()}
    found: dict[str, Tensor] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if isinstance(value, Tensor):
            found[name] = value.detach().clone()

    for number, optimizer in enumerate(setup.optimizers):
        for place, group in enumerate(optimizer.param_groups):
            found[f"lr {number} {place}"] = torch.tensor(float(group["lr"]))
            for parameter in group["params"]:
                put(names[id(parameter)], parameter)
                for key, value in optimizer.state[parameter].items():
                    put(f"{key} of {names[id(parameter)]}", value)
    for name, buffer in setup.model.named_buffers():
        found[f"buffer {bare(name)}"] = buffer.clone()
    return found


def run(
    rank: int,
    world: int,
    case: Case,
    folder: str,
    shared: str = "",
    until: int | None = None,
    kill: tuple[int, str, int, int] | None = None,
    look_at: int = 6,
    options: dict[str, Any] | None = None,
) -> tuple[StateImage, list[tuple[int, str]], Any, dict[str, Tensor]]:
    """Build, resume, train to the end, or until an attempt and then leave as a death would.

    Returns the final state, the verdicts, what resume() said, and the whole state when attempt ``look_at`` begins.
    """
    setup = zoo.build(case, rank, world)
    injector = FaultInjector.parse((FAULT,))
    persist: list[Any] = [Checkpoints(folder, every=3)] if folder else []
    if shared:
        persist.append(SharedMemory("test", Path(shared) / f"host{rank}"))
    controller = zoo.control(case, setup, injector=injector, persist=persist, timeout=10.0, **(options or {}))
    if kill is not None and kill[0] == rank:
        controller.add_phase_listener(Killer(*kill[1:]))
    verdicts, seen = [], {}
    with controller:
        start = controller.resume(setup.scaler) if persist else None
        for attempt in range(start.attempt if start else 0, case.steps if until is None else until):
            if attempt == look_at:
                seen = whole(setup)
            zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, injector)
            assert controller.verdict is not None
            verdicts.append((controller.verdict.step, str(controller.verdict.action)))
            for scheduler in setup.extra_state.values() if controller.verdict.accepted else ():
                scheduler.step()
        if until is not None:
            for job in controller._persistence._courier._under_way.values():
                assert job.done.wait(60)
            controller._close(failed=True)
    return capture_state(setup.model, setup.optimizers, setup.extra_state, setup.scaler), verdicts, start, seen


_uninterrupted: dict[str, list[Any]] = {}


def uninterrupted(case: Case, **options: Any) -> list[Any]:
    """What a case comes to without persistence."""
    known = f"{case} {options}"
    if known not in _uninterrupted:
        _uninterrupted[known] = harness.pool(zoo.world_of(case)).run(run, case, "", "", None, None, 6, options)
    return _uninterrupted[known]


def assert_same(case: Case, again: list[Any], **options: Any) -> None:
    for rank, through in enumerate(uninterrupted(case, **options)):
        assert compare(through[0], again[rank][0]) == [], f"rank {rank}: {again[rank][2]}"
        verdicts = again[rank][1]
        assert verdicts == through[1][len(through[1]) - len(verdicts) :]


def assert_sound(folder: Path) -> None:
    """Nothing half written under a good name, nothing else left."""
    assert all(read_manifest(path).damaged() == [] for path in attempts(folder))
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


CASES = {
    "ddp": (Case("ddp", scheduler=True), {}),
    "fsdp2": (Case("fsdp2", scheduler=True), {}),
    "uneven": (Case("fsdp2-uneven"), {}),
    "empty": (Case("fsdp2-empty", optimizer="adamw-fused"), {}),
    "buffers": (Case("ddp", model="conv", optimizer="sgd"), {}),
    "scaler": (Case("ddp", model="bf16", scaler=True, accumulation=2), {}),
    "several": (Case("fsdp2", optimizers=2, scheduler=True, clip=1.0), {}),
    "tp": (Case("tp"), {}),
    "deferred": (Case("fsdp2", draws=False), {"decision": "deferred"}),
    "whole replicas": (Case("ddp"), {"split_replicas": False}),
    "every third": (Case("ddp"), {"every": 3}),
}
FEW = ("ddp", "fsdp2", "deferred")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in CASES])
def test_the_same_ranks_go_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    case, options = CASES[name]
    pool = harness.pool(zoo.world_of(case))
    pool.run(run, case, str(tmp_path), "", 8, None, 6, options)
    again = pool.run(run, case, str(tmp_path), "", None, None, 6, options)
    assert again[0][2].attempt == 6 and again[0][2].exact
    assert f"from checkpoints in {tmp_path}" in again[1][2].line
    assert_same(case, again, **options)
    assert_sound(tmp_path)


CHANGES = {
    "ddp to fsdp2": (Case("ddp"), Case("fsdp2")),
    "fsdp2 to ddp": (Case("fsdp2"), Case("ddp")),
    "fsdp2 to one": (Case("fsdp2"), Case("single")),
    "one to fsdp2": (Case("single"), Case("fsdp2")),
    "buffers": (Case("ddp", model="conv", optimizer="sgd"), Case("single", model="conv", optimizer="sgd")),
    "three to two": (Case("fsdp2", ranks=3), Case("fsdp2")),
    "two to three": (Case("ddp"), Case("fsdp2", ranks=3)),
    "hsdp to fsdp2": (Case("hsdp"), Case("fsdp2")),
    "fsdp2 to hsdp": (Case("fsdp2"), Case("hsdp")),
}
FIRST = ("ddp to fsdp2", "fsdp2 to ddp", "fsdp2 to one")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FIRST else pytest.mark.slow) for n in CHANGES])
def test_another_kind_of_parallelism_takes_over_equal_values(name: str, tmp_path: Path) -> None:
    old, new = (replace(case, scheduler=True) for case in CHANGES[name])
    before = harness.pool(zoo.world_of(old)).run(run, old, str(tmp_path), "", 8)
    after = harness.pool(zoo.world_of(new)).run(run, new, str(tmp_path))
    start = after[0][2]
    assert start.attempt == 6 and not start.exact
    assert f"written by {zoo.world_of(old)} ranks (" in start.line and "values are equal" in start.line
    assert ("random streams begin anew" in start.line) == (zoo.world_of(old) != zoo.world_of(new))
    for _, verdicts, _, seen in after:
        assert seen.keys() == before[0][3].keys()
        assert [key for key in seen if not torch.equal(seen[key], before[0][3][key])] == []
        assert verdicts[0][0] == 6 and len(verdicts) == 6 and verdicts[2] == (8, "rollback")
    assert_sound(tmp_path)


KILLS = [  # rank, calls of the phase before, where it is gone on
    (1, 0, 3),
    (1, 1, 3),
    (1, 2, 3),  # its own file is half written
    (0, 4, 3),
    (0, 5, 3),  # all is there but the name
    (0, 6, 6),  # the name is there, and nobody else knows
    (1, 5, 6),
]


@pytest.mark.parametrize(
    "kill", [pytest.param(k, marks=() if k in (KILLS[2], KILLS[4]) else pytest.mark.slow) for k in KILLS]
)
@pytest.mark.parametrize("mode", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_killed_while_it_writes(mode: str, kill: tuple[int, int, int], tmp_path: Path) -> None:
    case, (rank, count, made) = Case(mode, scheduler=True), kill
    pool = harness.pool(2)
    died = pool.run(run, case, str(tmp_path), "", None, (rank, "delivery", 6, count), expect_failure=True, grace=5.0)
    assert isinstance(died[rank], harness.RankError) and died[rank].type == "Died", died[rank]
    again = pool.run(run, case, str(tmp_path))
    assert again[0][2].attempt == made, again[0][2].line
    assert_same(case, again)
    assert_sound(tmp_path)


def test_the_newest_is_damaged(tmp_path: Path) -> None:
    """In the file of one rank: no rank uses it, and all say so."""
    case, pool = Case("fsdp2", scheduler=True), harness.pool(2)
    pool.run(run, case, str(tmp_path), "", 8)
    path = tmp_path / "attempt-00000006" / "__1_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    again = pool.run(run, case, str(tmp_path))
    for _, _, start, _ in again:
        assert start.attempt == 3
        assert "attempt 6 on rank 1: is damaged: __1_0.distcp has other bytes than were written" in start.line
    assert_same(case, again)


def test_each_rank_from_where_it_has_it(tmp_path: Path) -> None:
    """Rank 1 lost what was in its memory; the newest common moment is that of the checkpoint."""
    case, pool = Case("ddp", scheduler=True), harness.pool(2)
    folder, hosts = tmp_path / "disk", [tmp_path / "shared" / f"host{rank}" for rank in range(2)]
    for host in hosts:
        host.mkdir(parents=True)
    # Left right after the seal of attempt 6, so that the others have it in memory still.
    pool.run(run, case, str(folder), str(tmp_path / "shared"), 7)
    for path in hosts[1].iterdir():
        path.unlink()
    again = pool.run(run, case, str(folder), str(tmp_path / "shared"))
    start = again[0][2]
    assert start.attempt == 6
    assert start.source == f"shared memory (ranks [0]) and checkpoints in {folder} (ranks [1])"
    assert_same(case, again)
    assert [list(host.iterdir()) for host in hosts] == [[], []]


def refused(rank: int, world: int, case: Case, folder: str) -> str:
    setup = zoo.build(case, rank, world)
    with pytest.raises(ValueError) as caught:
        zoo.control(case, setup, persist=Checkpoints(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("fsdp1", "FSDP1 keeps pieces of flattened parameters"),
        pytest.param("fsdp2+tp", "FSDP2 over tensor parallelism", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(mode: str, why: str, tmp_path: Path) -> None:
    case = Case(mode)
    for rank, said in enumerate(harness.pool(zoo.world_of(case)).run(refused, case, str(tmp_path))):
        assert f"rank {rank}: persist=Checkpoints(...): " in said and why in said
