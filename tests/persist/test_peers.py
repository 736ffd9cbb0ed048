"""Copies on another host: who has what, what is sent, and that nothing is used which is torn, foreign or flipped."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import torch.distributed as dist
import zoo
from choice import slow
from host_worker import whole
from test_resume_ranks import Killer
from zoo import Case

from dist_stability import Checkpoints, LossProbe, PeerCopies, SharedMemory, StabilityController
from dist_stability.snapshot.arena import HEAD
from dist_stability.snapshot.tiers import parcels, record
from dist_stability.snapshot.tiers.courier import Channel, Undelivered
from dist_stability.snapshot.tiers.parcels import Parcel, rounds, send
from dist_stability.snapshot.tiers.peers import Sources
from dist_stability.snapshot.tiers.shared_memory import files
from dist_stability.testing import FaultInjector, capture_state, compare

# ---------------------------------------------------------------------- who has what


def test_the_newest_moment_that_all_records_can_be_had_of() -> None:
    old, new, newest = (4, 3, 1), (6, 5, 2), (8, 7, 3)
    told = {0: {0: [newest, new, old], 1: [new, old]}, 1: {}, 2: {2: [new, old]}}
    sources = Sources(told, [0, 1, 2])
    assert sources.newest() == (new, {0: 0, 1: 0, 2: 2})
    sources.drop(new)
    assert sources.newest() == (old, {0: 0, 1: 0, 2: 2})
    sources.drop(old)
    assert sources.newest() is None


def test_an_own_record_comes_before_a_copy() -> None:
    key = (4, 3, 1)
    assert Sources({0: {0: [key], 1: [key]}, 1: {0: [key], 1: [key]}}, [0, 1]).newest() == (key, {0: 0, 1: 1})


def test_ranks_that_have_changed_places_send_each_other_theirs() -> None:
    key = (4, 3, 1)
    assert Sources({0: {1: [key]}, 1: {0: [key]}}, [0, 1]).newest() == (key, {0: 1, 1: 0})


def test_rounds_have_every_move_once_and_each_rank_once_on_either_side() -> None:
    draw = random.Random(0)
    for _ in range(200):
        ranks = range(draw.randrange(2, 9))
        pairs = [pair for pair in itertools.permutations(ranks, 2)]
        moves = draw.sample(pairs, draw.randrange(len(pairs)))
        found = rounds(moves)
        assert sorted(move for one in found for move in one.items()) == sorted(moves)
        assert all(len(set(one.values())) == len(one) for one in found)
    assert rounds([(0, 1), (1, 0)]) == [{0: 1, 1: 0}]


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_an_interval_that_is_none(every: Any) -> None:
    with pytest.raises(ValueError, match=r"PeerCopies\(every="):
        PeerCopies(every=every)


# ---------------------------------------------------------------------- what is sent


def content(source: int, target: int, size: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(100 * source + target)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=draw)


def sending(rank: int, world: int, moves: list[tuple[int, int]], size: int, full: int) -> Any:
    """What arrived, by source; or what was said where rank ``full`` had no room."""
    parcels.CHUNK = 1000
    channel = Channel(dist.new_group(list(range(world)), backend="gloo"), range(world), rank)
    taken: dict[int, torch.Tensor] = {}

    def give() -> dict[int, Parcel]:
        return {b: Parcel(f"{a}->{b}".encode(), content(a, b, size + 500 * b)) for a, b in moves if a == rank}

    def room(source: int, seal: bytes, nbytes: int) -> torch.Tensor:
        if rank == full:
            raise OSError("no room")
        assert seal == f"{source}->{rank}".encode()
        taken[source] = torch.zeros(nbytes, dtype=torch.uint8)
        return taken[source]

    try:
        send(channel, moves, give, room, lambda: None)
    except Undelivered as error:
        assert not any(each.any() for each in taken.values())
        return str(error)
    return {source: bool(torch.equal(data, content(source, rank, size + 500 * rank))) for source, data in taken.items()}


@pytest.mark.parametrize(
    ("world", "moves"), [(2, [(0, 1), (1, 0)]), (2, [(1, 0)]), (2, []), (3, [(0, 2), (1, 2), (2, 0)])]
)
def test_parcels_arrive_whole(world: int, moves: list[tuple[int, int]]) -> None:
    found = harness.pool(world).run(sending, moves, 2300, -1)
    assert found == [{a: True for a, b in sorted(moves) if b == rank} for rank in range(world)]


def test_a_receiver_without_room_is_named_on_all_ranks() -> None:
    found = harness.pool(2).run(sending, [(0, 1), (1, 0)], 2300, 1)
    assert found[0] == found[1] == "room for what is sent: rank 1: OSError: no room"


# ---------------------------------------------------------------------- runs on two hosts


def folder_of(folder: str, rank: int) -> Path:
    return Path(folder) / f"host{rank}"


def settings(folder: str, rank: int, every: int = 2) -> list[Any]:
    """Each rank as if it were alone on a host of its own."""
    folder_of(folder, rank).mkdir(exist_ok=True)
    return [SharedMemory("test", folder_of(folder, rank)), PeerCopies(every=every, host=f"host{rank}")]


def delivered(controller: StabilityController) -> None:
    """Wait until nothing is on its way: which moment is common is then no matter of speed."""
    courier = controller._persistence._courier if controller._persistence is not None else None
    while courier is not None and any(not job.done.is_set() for job in courier._under_way.values()):
        time.sleep(0.01)


def run(
    rank: int,
    world: int,
    case: Case,
    folder: str,
    kill: tuple[int, str, int, int] | None = None,
    places: tuple[int, ...] = (0, 1, 2, 3),
    every: int = 2,
    faults: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
) -> Any:
    """Resume if there is something, and train to the end: (final state, the line of resume, its attempt)."""
    parcels.CHUNK = 3000
    setup = zoo.build(case, rank, world)
    persist = settings(folder, places[rank], every) if folder else None
    injector = FaultInjector.parse(faults)
    with zoo.control(case, setup, injector=injector, persist=persist, timeout=10.0, **(options or {})) as controller:
        start = controller.resume() if folder else None
        if kill is not None and kill[0] == rank:
            controller.add_phase_listener(Killer(kill[1], kill[2], kill[3], "SIGKILL"))
        for attempt in range(start.attempt if start is not None else 0, case.steps):
            if every > 2:
                delivered(controller)
            zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, injector)
            assert controller.verdict is not None
            for scheduler in setup.extra_state.values() if controller.verdict.accepted else ():
                scheduler.step()
        controller.finish()
    image = capture_state(setup.model, setup.optimizers, setup.extra_state)
    return image, "" if start is None else start.line, 0 if start is None else start.attempt


_whole: dict[str, list[Any]] = {}
_told: dict[str, int] = {}


def resumed(case: Case, folder: Path, places: tuple[int, ...] = (0, 1, 2, 3), **options: Any) -> list[Any]:
    """To the end, from what is in the folders; asserts that it ends as a run that was never interrupted."""
    pool = harness.pool(zoo.world_of(case))
    rest = (options.get("every", 2), options.get("faults", ()), options.get("options"))
    known = f"{case} {rest[1:]}"
    if known not in _whole:
        _whole[known] = pool.run(run, case, "", None, places, *rest)
    again = pool.run(run, case, str(folder), None, places, *rest)
    for rank in range(pool.world_size):
        assert compare(_whole[known][rank][0], again[rank][0]) == [], again[rank][1]
        assert list(folder_of(str(folder), places[rank]).iterdir()) == []
    return again


def died(case: Case, folder: Path, *kill: Any, places: tuple[int, ...] = (0, 1, 2, 3), **options: Any) -> None:
    pool = harness.pool(zoo.world_of(case))
    rest = (options.get("every", 2), options.get("faults", ()), options.get("options"))
    found = pool.run(run, case, str(folder), kill, places, *rest, expect_failure=True, grace=5.0)
    assert isinstance(found[kill[0]], harness.RankError) and found[kill[0]].type == "Died", found[kill[0]]


def lose(folder: Path, rank: int) -> None:
    shutil.rmtree(folder_of(str(folder), rank))


@pytest.mark.parametrize(
    ("mode", "lost"), [("ddp", 1), ("fsdp2", 0), *(slow(each) for each in [("ddp", 0), ("fsdp2", 1), ("fsdp1", 1)])]
)
def test_a_rank_whose_host_is_lost_goes_on_from_its_copy(mode: str, lost: int, tmp_path: Path) -> None:
    case = Case(mode, scheduler=True)
    died(case, tmp_path, lost, "step", 9, 0)
    lose(tmp_path, lost)
    for _, line, attempt in resumed(case, tmp_path):
        assert attempt in (6, 8) and f"rank {lost}'s from rank {1 - lost}" in line, line


TORN = {"the seal": 0, "the bytes": -4, "the digest": -2, "sealed": -1}
"""What of a copy rank 1 dies in, as a number of that step of a delivery."""

FEW = {("the bytes", 0), ("the digest", 1)}
"""The few that tell most in every run of the tests, all of them in the slow ones."""


def steps_of_a_delivery(rank: int, world: int, case: Case, folder: str) -> int:
    """How often listeners hear of one delivery."""
    parcels.CHUNK = 3000
    heard: list[int] = []
    setup = zoo.build(case, rank, world)
    with zoo.control(case, setup, persist=settings(folder, rank), timeout=10.0) as controller:
        controller.add_phase_listener(lambda attempt, phase: heard.append(attempt) if phase == "delivery" else None)
        for attempt in range(7):
            zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, None)
    return heard.count(4)


@pytest.mark.parametrize(
    ("where", "lost"),
    [
        (where, lost) if (where, lost) in FEW else slow((where, lost))
        for where, lost in itertools.product(["the seal", "the bytes", "the digest", "sealed"], [0, 1])
    ],
)
def test_torn_on_either_side_leaves_the_older_generation(where: str, lost: int, tmp_path: Path) -> None:
    """Rank 1 dies in the middle of a copy; then its host, or the other, is lost."""
    case = Case("ddp")
    if "steps" not in _told:
        _told["steps"] = harness.pool(2).run(steps_of_a_delivery, case, str(tmp_path))[1]
        assert _told["steps"] > 6
    died(case, tmp_path, 1, "delivery", 8, TORN[where] % _told["steps"])
    lose(tmp_path, lost)
    for _, line, attempt in resumed(case, tmp_path):
        # When all bytes were there, the copy of the lost rank may have been sealed before anything was torn.
        assert attempt == 6 or (attempt == 8 and (where == "sealed" or (where == "the digest" and lost))), line
        assert f"rank {lost}'s from rank {1 - lost}" in line


def copies(folder: Path, keeper: int, rank: int) -> list[Path]:
    """The sealed copies of a rank that are kept on a host, newest first."""
    found = [file for file in files(folder_of(str(folder), keeper)) if file.rank == rank and file.keeper == keeper]
    seals = [(record.read(file.path)[0].made, file.slot) for file in found if file.sealing]
    return [slot for _, slot in sorted(seals, reverse=True)]


@pytest.mark.parametrize("ranks", [2, slow((1,))])
@pytest.mark.filterwarnings("ignore:persist=PeerCopies")
def test_a_flipped_byte_in_a_copy_is_named_and_not_used(ranks: int, tmp_path: Path) -> None:
    case = Case("fsdp2")
    states = harness.pool(2).run(until, case, str(tmp_path), 9)
    harness.pool(2).close()
    lose(tmp_path, 1)
    newest, _ = copies(tmp_path, 0, 1)
    data = bytearray(newest.read_bytes())
    data[HEAD + 40] ^= 1
    newest.write_bytes(data)
    for start, state, _ in harness.pool(ranks).run(taken_over, case, str(tmp_path)):
        assert re.search(r"attempt 8\b.* that is damaged: |attempt 8: .* rank 1: is damaged: ", start.line), start.line
        assert start.attempt == 6 and same(states[0][6], state)


def test_without_copies_the_reason_is_named(tmp_path: Path) -> None:
    case = Case("ddp")
    died(case, tmp_path, 1, "step", 1, 0)
    lose(tmp_path, 1)
    found = harness.pool(2).run(run, case, str(tmp_path))
    for _, line, attempt in found:
        assert attempt == 0 and "nothing to resume from in shared memory" in line and "is not on ranks [1]" in line


def test_hosts_that_come_back_in_another_order(tmp_path: Path) -> None:
    """Each rank finds the other's slot, and its own is on the other host."""
    case = Case("fsdp2")
    died(case, tmp_path, 1, "step", 9, 0)
    for _, line, attempt in resumed(case, tmp_path, places=(1, 0)):
        assert attempt == 9 and "rank 0's from rank 1" in line and "rank 1's from rank 0" in line


def test_lost_again_before_there_is_a_new_copy(tmp_path: Path) -> None:
    """What the first loss was answered with stays until all ranks have newer copies."""
    case = Case("ddp", steps=21)
    died(case, tmp_path, 1, "step", 11, 0, every=10)
    lose(tmp_path, 1)
    died(case, tmp_path, 0, "step", 19, 0, every=10)
    lose(tmp_path, 1)
    for _, line, attempt in resumed(case, tmp_path, every=10):
        assert attempt == 10, line


def test_refusals_after_a_copy_leave_its_moment_on_the_other_ranks(tmp_path: Path) -> None:
    """A slot is sealed again at every refusal, twice as often as it has seals."""
    case, faults = Case("ddp", scheduler=True), ("gradient-scale:step=8,factor=inf,length=3",)
    died(case, tmp_path, 1, "gradients", 11, 0, every=4, faults=faults)
    lose(tmp_path, 1)
    for _, line, attempt in resumed(case, tmp_path, every=4, faults=faults):
        assert attempt == 8, line


STEPPING: dict[str, tuple[Case, dict[str, Any], tuple[int, ...]]] = {
    "deferred": (Case("fsdp2", draws=False, scheduler=True, steps=17), {"decision": "deferred"}, (8,)),
    "every third": (Case("fsdp2", scheduler=True, steps=17), {"every": 3}, (9,)),
    "shadow": (Case("ddp", scheduler=True, steps=17), {"shadow": True}, (8,)),
}
"""Case, settings, and the moments that may be the newest good one when rank 1 dies in the step of attempt 11."""


@pytest.mark.parametrize("lost", [1, slow((0,))])
@pytest.mark.parametrize("name", list(STEPPING))
def test_with_each_way_of_stepping(name: str, lost: int, tmp_path: Path) -> None:
    """A step is refused before what is gone on from, and another one after it."""
    case, options, good = STEPPING[name]
    rest: dict[str, Any] = {
        "every": 4,
        "options": options,
        "faults": ("gradient-scale:step=5,factor=300", "gradient-scale:step=14,factor=300"),
    }
    died(case, tmp_path, 1, "step", 11, 0, **rest)
    lose(tmp_path, lost)
    for _, line, attempt in resumed(case, tmp_path, **rest):
        assert attempt in good and f"rank {lost}'s from rank {1 - lost}" in line, line


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hsdp", "fsdp2+tp"])
@pytest.mark.parametrize("lost", [0, 1])
def test_two_ranks_on_each_host(mode: str, lost: int, tmp_path: Path) -> None:
    case = Case(mode)
    died(case, tmp_path, 3, "step", 9, 0, places=(0, 0, 1, 1))
    lose(tmp_path, lost)
    for _, line, attempt in resumed(case, tmp_path, places=(0, 0, 1, 1)):
        assert attempt in (6, 8) and f"rank {2 * lost}'s from rank {2 - 2 * lost}" in line


def alone(rank: int, world: int, folder: str) -> tuple[int, int]:
    """One host for both ranks: how many warnings there were, and files of copies."""
    case = Case("ddp", steps=6)
    setup = zoo.build(case, rank, world)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        persist = [SharedMemory("test", folder), PeerCopies(every=2)]
        with zoo.control(case, setup, persist=persist, timeout=10.0) as controller:
            for attempt in range(case.steps):
                zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, None)
            kept = sum(file.keeper is not None for file in files(Path(folder)))
    return sum("there is one host only" in str(each.message) for each in caught), kept


def test_on_one_host_nothing_is_copied_and_one_rank_says_so(tmp_path: Path) -> None:
    assert harness.pool(2).run(alone, str(tmp_path)) == [(1, 0), (0, 0)]


def test_copies_need_shared_memory_to_be_copied_from(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    probe = LossProbe(lambda model, batch: model(batch).square().mean(), [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="SharedMemory"):
        StabilityController(model, torch.optim.SGD(model.parameters(), lr=0.1), probe, persist=PeerCopies())


# ---------------------------------------------------------------------- another number of ranks


def moments(rank: int, world: int, folder: str, resume: bool) -> Any:
    """Copies and checkpoints of the same moments: (what was resumed, the whole state at each attempt, or then)."""
    case = Case("fsdp2")
    setup = zoo.build(case, rank, world)
    persist = [*settings(folder, rank), Checkpoints(Path(folder) / "disk", every=2)]
    controller = zoo.control(case, setup, persist=persist, timeout=10.0)
    start = controller.resume() if resume else None
    states = [whole(setup)]
    for attempt in range(0 if resume else 9):
        delivered(controller)
        zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, None)
        states.append(whole(setup))
    delivered(controller)
    controller._close(failed=True)
    return start, states


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damaged", ["copy", "checkpoint", "both"])
@pytest.mark.filterwarnings("ignore:persist=PeerCopies", "ignore:.*set aside")
def test_a_moment_that_two_tiers_have_is_taken_from_the_sound_one(damaged: str, tmp_path: Path) -> None:
    states = harness.pool(2).run(moments, str(tmp_path), False)[0][1]
    harness.pool(2).close()
    lose(tmp_path, 1)
    if damaged != "checkpoint":
        flip(copies(tmp_path, 0, 1)[0], HEAD + 40)
    if damaged != "copy":
        [data, *_] = sorted((tmp_path / "disk" / "attempt-00000008").glob("*.distcp"))
        flip(data, data.stat().st_size // 2)
    [(start, [state])] = harness.pool(1).run(moments, str(tmp_path), True)
    assert start.attempt == (6 if damaged == "both" else 8), start.line
    assert start.source.startswith("checkpoints in" if damaged == "copy" else "peer copies"), start.line
    assert ("attempt 8 in peer copies on rank 0: has a record of rank 1 that is damaged" in start.line) is (
        damaged != "checkpoint"
    ), start.line
    assert (f"attempt 8 in checkpoints in {tmp_path}" in start.line) is (damaged == "both"), start.line
    assert same(states[start.attempt], state)


def until(rank: int, world: int, case: Case, folder: str, last: int, split: bool | None = None) -> Any:
    """Train from the beginning: the whole state at the beginning of each attempt; leaves as a death would."""
    setup = zoo.build(case, rank, world)
    controller = zoo.control(case, setup, persist=settings(folder, rank), timeout=10.0, split_replicas=split)
    states = []
    for attempt in range(last):
        states.append(whole(setup))
        zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, None)
        for scheduler in setup.extra_state.values():
            scheduler.step()
    controller._close(failed=True)
    return states


def taken_over(rank: int, world: int, case: Case, folder: str) -> Any:
    """Resume as another number of ranks: (what was resumed, the whole state then); and train to the end."""
    setup = zoo.build(case, rank, world)
    with zoo.control(case, setup, persist=settings(folder, rank), timeout=10.0) as controller:
        start = controller.resume()
        state = whole(setup)
        rates = [group["lr"] for optimizer in setup.optimizers for group in optimizer.param_groups]
        for attempt in range(start.attempt, case.steps):
            zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, None)
        controller.finish()
    return start, state, rates


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("mode", "split"),
    [("ddp", False), ("fsdp2-uneven", None), *(slow((mode, None)) for mode in ("ddp", "fsdp2", "fsdp2-empty"))],
)
@pytest.mark.filterwarnings("ignore:persist=PeerCopies")
def test_one_rank_goes_on_with_what_two_had(mode: str, split: bool | None, tmp_path: Path) -> None:
    case = Case(mode, scheduler=True)
    states = harness.pool(2).run(until, case, str(tmp_path), 9, split)
    harness.pool(2).close()
    lose(tmp_path, 1)
    [(start, state, rates)] = harness.pool(1).run(taken_over, case, str(tmp_path))
    assert start.attempt in (6, 8) and not start.exact and "2 ranks" in start.line, start.line
    assert same(states[0][start.attempt], state)
    assert rates == pytest.approx([0.01 * 0.97**start.attempt])
    assert list(folder_of(str(tmp_path), 0).iterdir()) == []


@pytest.mark.parametrize("mode", ["fsdp2", slow(("ddp",))])
@pytest.mark.filterwarnings("ignore:persist=PeerCopies")
def test_three_ranks_go_on_with_what_two_of_them_have(mode: str, tmp_path: Path) -> None:
    """Two hosts are left of three, so what is put together lies on both."""
    case = Case(mode)
    states = harness.pool(3).run(until, case, str(tmp_path), 9)
    harness.pool(3).close()
    lose(tmp_path, 2)
    (start, state, _), (_, other, _) = harness.pool(2).run(taken_over, case, str(tmp_path))
    assert start.attempt in (6, 8) and "3 ranks" in start.line, start.line
    assert same(states[0][start.attempt], state) and same(state, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:persist=PeerCopies")
def test_a_host_that_joins_takes_its_part(tmp_path: Path) -> None:
    case = Case("fsdp2")
    [states] = harness.pool(1).run(until, case, str(tmp_path), 5)
    harness.pool(1).close()
    for start, state, _ in harness.pool(2).run(taken_over, case, str(tmp_path)):
        assert start.attempt == 4 and "1 ranks" in start.line, start.line
        assert same(states[4], state)
