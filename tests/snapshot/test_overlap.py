"""Copies that are under way while the program goes on: the barrier, and what is left when one fails."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import harness
import pytest
import torch
import zoo
from choice import slow
from test_golden_twin import BAD, Job, twins
from test_slot import OPTIMIZERS, Stop, Training, adam, stopping
from torch import nn
from zoo import MODES, Case

from dist_stability import SnapshotError
from dist_stability.snapshot import Copier, Digests, HostWork, Slot, SlotRing, SlotState, StatePlan, copier
from dist_stability.testing.oracle import compare

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Gate:
    """Keeps the copier's thread busy until it is opened."""

    def __init__(self, mover: Copier) -> None:
        self._event = threading.Event()
        mover.submit(lambda: self._event.wait(60) and None, copies=False)

    def open(self) -> None:
        self._event.set()

    def open_later(self) -> None:
        threading.Timer(0.2, self._event.set).start()


@pytest.fixture
def mover() -> Iterator[Copier]:
    found = Copier(HostWork.ALL)
    yield found
    found.close()


def commit(ring: SlotRing, run: Training, attempt: int, as_anchor: bool = False, **options: Any) -> Slot:
    slot = ring.begin()
    slot.fill(run.plan(), attempt, **options)
    slot.publish()
    ring.commit(slot, as_anchor)
    return slot


# ---------------------------------------------------------------------- the barrier


def test_a_fill_returns_before_its_copy_is_there(mover: Copier) -> None:
    run, gate, slot = Training(adam), Gate(mover), Slot(mover)
    run.step()
    slot.fill(run.plan(), 3)
    assert slot.state is SlotState.FILLING and not slot.landed()
    slot.publish()
    assert slot.state is SlotState.FILLING and slot.published, "a promise for when the bytes are there"
    gate.open()
    slot.wait()
    assert slot.state is SlotState.VALID and slot.landed() and slot.published and slot.verify() == []


def test_what_comes_after_the_barrier_is_not_in_the_copy(mover: Copier) -> None:
    """A long computation is queued before the copy, and the state changes right after the barrier."""
    run, slot = Training(adam), Slot(mover)
    run.step(2)
    gate, before = Gate(mover), run.image()
    slot.fill(run.plan(), 1)
    gate.open_later()
    slot.order()
    run.step(3)
    assert slot.verify() == []
    slot.restore()
    assert compare(run.image(), before) == []


def test_a_restore_waits_for_the_copy_of_another_slot(mover: Copier) -> None:
    """What is being copied must not be overwritten meanwhile."""
    run, ring = Training(adam), SlotRing(0, mover)
    run.step()
    safe = commit(ring, run, 1)
    ring.order()
    run.step()
    proposal = run.image()
    gate, other = Gate(mover), ring.begin()
    other.fill(run.plan(), 2)
    gate.open_later()
    safe.restore()
    assert other.verify() == []
    other.restore()
    assert compare(run.image(), proposal) == []


@pytest.mark.parametrize("work", HostWork)
def test_golden_twin_with_every_way_to_copy(work: HostWork) -> None:
    run, twin, ring = Training(adam), Training(adam), SlotRing(1, Copier(work))
    for attempt in range(12):
        run.step()
        twin.step()
        commit(ring, run, attempt, as_anchor=attempt % 4 == 0)
        ring.order()
        if attempt % 3 == 0:
            run.step()
            ring.safe.restore()
        if attempt == 6:
            run.step()
            for back in (ring.anchors[0], ring.safe):
                back.restore()
        assert compare(run.image(), twin.image()) == []
    ring.close()


def test_without_the_thread_nobody_has_to_wait(mover: Copier) -> None:
    """The state may be changed right after the fill; only the digest is still being made, from the slot's own bytes."""
    mover.host_work = HostWork.DIGEST
    run, slot = Training(adam), Slot(mover)
    run.step()
    gate, before = Gate(mover), run.image()
    slot.fill(run.plan(), 0)
    assert not slot.landed()
    slot.order()
    run.step(2)
    gate.open()
    assert slot.verify() == []
    slot.restore()
    assert compare(run.image(), before) == []


def test_a_slot_is_filled_again_while_its_digest_is_made(mover: Copier) -> None:
    """An older digest must not arrive after the newer one."""
    mover.host_work = HostWork.DIGEST
    run, slot = Training(adam), Slot(mover)
    run.step()
    gate, plan = Gate(mover), run.plan()
    slot.fill(plan, 0)
    run.step()
    gate.open_later()
    slot.fill(plan, 1, plan.digests(plan.tensors()))
    assert slot.state is SlotState.COMPLETE
    slot._views[0][0, 0] += 1
    mover.submit(lambda: None, copies=False).wait()
    assert slot.verify() == ["0.weight"]


def test_a_slot_is_filled_again_while_its_copy_is_made(mover: Copier) -> None:
    """An older copy must not arrive after the newer one."""
    run, slot = Training(adam), Slot(mover)
    run.step()
    gate = Gate(mover)
    slot.fill(run.plan(), 0)
    mover.overlap = False
    run.step()
    gate.open_later()
    slot.fill(run.plan(), 1)
    before = run.image()
    run.step()
    mover.submit(lambda: None, copies=False).wait()
    assert slot.verify() == []
    slot.restore()
    assert compare(run.image(), before) == []


# ---------------------------------------------------------------------- the ring


def test_the_last_valid_slot_stays_until_the_next_is_there(mover: Copier) -> None:
    run, ring = Training(adam), SlotRing(0, mover)
    first = commit(ring, run, 0)
    first.wait()
    gate, second = Gate(mover), commit(ring, run, 1)
    assert ring.safe is second and second.state is SlotState.FILLING and first.state is SlotState.VALID
    gate.open_later()
    third = ring.begin()  # only two slots: waits for the second before it gives up the first
    assert third is first and third.state is SlotState.FREE and second.state is SlotState.VALID


def test_the_barrier_leaves_a_slot_that_is_held_back(mover: Copier) -> None:
    """One that was filled and not committed: its owner decides."""
    run, ring = Training(adam), SlotRing(0, mover)
    commit(ring, run, 0)
    ring.order()
    held = ring.begin()
    held.fill(run.plan(), 1)
    ring.order()
    held.wait()
    assert held.state is SlotState.COMPLETE
    held.publish()
    ring.commit(held)
    assert ring.safe is held


def test_work_that_never_ends_does_not_hold_up_the_end(mover: Copier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_stability.snapshot.slot._STUCK", 0.05)
    run, slot, gate = Training(adam), Slot(mover), Gate(mover)
    slot.fill(run.plan(), 0)
    slot.close()
    assert slot.nbytes, "its memory is still being written to"
    gate.open()
    slot.wait()
    slot.close()
    assert not slot.nbytes


def test_the_barrier_lets_go_of_the_older_one(mover: Copier) -> None:
    run, ring = Training(adam), SlotRing(0, mover)
    first = commit(ring, run, 0)
    ring.order()
    second = commit(ring, run, 1)
    ring.order()
    assert (first.state, second.state) == (SlotState.FREE, SlotState.VALID)


def test_reset_and_close_wait_for_what_is_under_way(mover: Copier) -> None:
    run, ring = Training(adam), SlotRing(0, mover)
    gate, slot = Gate(mover), commit(ring, run, 0)
    gate.open_later()
    ring.reset()
    with pytest.raises(SnapshotError, match="nothing was committed"):
        _ = ring.safe
    assert slot.nbytes
    commit(ring, run, 1)
    ring.close()
    assert slot.nbytes == 0 and all(kept.landed() for kept in ring._slots)
    again = commit(ring, run, 2)
    assert again.verify() == [], "it can be used again"
    ring.close()


# ---------------------------------------------------------------------- interruptions


def chunks_of(run: Training) -> int:
    calls: list[int] = []
    Slot().fill(run.plan(), 0, on_chunk=lambda: calls.append(1))
    return len(calls)


@pytest.mark.parametrize("work", [HostWork.NONE, HostWork.ALL])
def test_interrupted_at_any_chunk_an_older_valid_slot_is_left(work: HostWork) -> None:
    run = Training(adam)
    run.step()
    count = chunks_of(run)
    assert count >= 3
    for after in range(count):
        ring = SlotRing(0, Copier(work))
        older = commit(ring, run, 7)
        ring.order()
        before = run.image()
        run.step()
        if work is HostWork.NONE:
            with pytest.raises(Stop):
                commit(ring, run, 8, on_chunk=stopping(after))
            assert ring.safe is older
        else:
            with pytest.raises(SnapshotError, match=r"rank 0: the snapshot of attempt 8 was interrupted at "):
                commit(ring, run, 8, on_chunk=stopping(after))
                ring.order()
        newer = next(slot for slot in ring._slots if slot is not older)
        assert newer.state is SlotState.FILLING and newer.verify() == ["the slot itself, which is filling"]
        assert older.state is SlotState.VALID and older.verify() == []
        older.restore()
        assert compare(run.image(), before) == []
        ring.close()


def test_the_error_names_rank_attempt_and_entry(mover: Copier) -> None:
    run, slot, gate = Training(OPTIMIZERS["sgd"]), Slot(mover), Gate(mover)
    slot.fill(run.plan(), 5, on_chunk=stopping(1))
    gate.open()
    with pytest.raises(SnapshotError, match=r"^rank 0: the snapshot of attempt 5 was interrupted at 2\.weight \(Stop"):
        slot.order()
    slot.fill(run.plan(), 6)
    assert slot.verify() == [], "it can be filled again"


# ---------------------------------------------------------------------- changes by others


def test_a_change_while_the_copy_is_made_is_noticed(mover: Copier) -> None:
    """Such a copy is of no single moment. From then on there is no overlap, and changes are allowed."""
    run, slot, gate = Training(adam), Slot(mover), Gate(mover)
    run.step()
    slot.fill(run.plan(), 4)
    with torch.no_grad():
        run.model[0].bias.clamp_(-1, 1)
        run.model[2].bias.clamp_(-1, 1)
    gate.open()
    with pytest.warns(RuntimeWarning, match=r"rank 0: 0\.bias and 1 more were written to .* attempt 4"):
        slot.order()
    assert set(slot.verify()) >= {"0.bias", "2.bias"}
    gate, before = Gate(mover), run.image()
    slot.fill(run.plan(), 5)
    run.step()
    gate.open()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slot.order()
    assert slot.verify() == []
    slot.restore()
    assert compare(run.image(), before) == []


def test_an_optimizer_step_after_the_barrier_is_no_such_change(mover: Copier) -> None:
    run, slot = Training(adam), Slot(mover)
    run.step()
    for attempt in range(3):
        slot.fill(run.plan(), attempt)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            slot.order()
            run.step()
            assert slot.verify() == []


# ---------------------------------------------------------------------- integrity


@pytest.mark.parametrize("work", HostWork)
def test_every_flipped_byte_of_a_small_slot_is_found(work: HostWork) -> None:
    run, slot = Training(adam), Slot(Copier(work))
    run.step()
    slot.fill(run.plan(), 0)
    assert slot.verify() == []
    inside: dict[int, str] = {}
    for entry, start in zip(slot.plan.entries, slot._layout.starts, strict=True):
        inside |= {place: entry.name for place in range(start, start + entry.nbytes)}
    for place in range(slot._data.numel()):
        slot._data[place] ^= 255
        assert slot.verify() == ([inside[place]] if place in inside else [])
        slot._data[place] ^= 255
    assert slot.verify() == [] and len(inside) == slot.plan.nbytes


@pytest.mark.parametrize("work", HostWork)
def test_flipped_bits_of_a_large_slot_are_found(work: HostWork) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1500, 1000), nn.Linear(1000, 3))
    slot = Slot(Copier(work))
    slot.fill(StatePlan.build(model, [torch.optim.SGD(model.parameters(), lr=0.1)], 1), 0)
    draw = random.Random(0)
    places = {0, slot._data.numel() - 1, *(draw.randrange(slot.plan.nbytes) for _ in range(20))}
    starts = sorted(zip(slot._layout.starts, slot.plan.entries, strict=True), key=lambda pair: pair[0])
    for place in places:
        slot.wait()
        slot._data[place] ^= 1 << draw.randrange(8)
        name = next(entry.name for start, entry in reversed(starts) if start <= place)
        assert slot.verify() == [name]
        slot.fill(slot.plan, 0)


# ---------------------------------------------------------------------- allocations


def allocated(body: Callable[[], object]) -> int:
    """Bytes of tensors, counted by torch's own profiler, on all threads."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        body()
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())


@pytest.mark.parametrize("work", [HostWork.NONE, HostWork.DIGEST, HostWork.ALL])
def test_filling_again_allocates_nothing(work: HostWork) -> None:
    """Nor do its digests, whether they are made or given."""
    run = Training(adam)
    run.step()
    plan, slot = run.plan(), Slot(Copier(work))
    digests = plan.digests(plan.tensors())
    assert allocated(lambda: torch.empty(1000).zero_()) and allocated(lambda: plan.digests(plan.tensors()))

    def fill(attempt: int, *given: Digests) -> None:
        slot.fill(plan, attempt, *given)
        slot.wait()

    fill(0)
    data = slot._data.data_ptr()
    for attempt in (1, 2):
        run.step()
        assert allocated(lambda attempt=attempt: fill(attempt)) == 0  # type: ignore[misc]
        assert slot.digests[(0,)] == plan.digests(plan.tensors())[(0,)] != digests[(0,)]
    assert slot._data.data_ptr() == data and slot.verify() == []
    assert allocated(lambda: fill(3, digests)) == 0
    slot._copier.close()


def test_slots_have_digests_of_their_own() -> None:
    """They are overwritten by the next fill of the same slot, and by nothing else."""
    run, first, second = Training(adam), Slot(), Slot()
    run.step()
    plan = run.plan()
    first.fill(plan, 0)
    kept = int(first.digests[(0,)])
    run.step()
    second.fill(plan, 1)
    assert int(first.digests[(0,)]) == kept != int(second.digests[(0,)])
    assert first.verify() == [] and int(first.digests[(0,)]) == kept
    first.fill(plan, 2)
    assert int(first.digests[(0,)]) == int(second.digests[(0,)]) and first.verify() == []


# ---------------------------------------------------------------------- copies on the host


PATTERNS = {  # what may lie beside what: (dtype, shape) of each
    "alike": [(torch.float32, (3, 4))] * 40,
    "scalars": [(torch.float32, ())] * 40,
    "of many sizes": [(torch.float32, (size % 5, 3)) for size in range(40)],
    "of many types": [(dtype, (4,)) for dtype in (torch.bfloat16, torch.int16, torch.bool, torch.float8_e4m3fn)] * 10,
    "long": [(torch.float64, (50_000,))] * 9,
    "turned": [(torch.float32, (3, 4)), (torch.float32, (4, 3))] * 20,
    "complex": [(torch.complex64, (5,))] * 20,
    "one": [(torch.float32, (2,))],
    "none": [],
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("spread", [False, True])
def test_copies_on_the_host_are_exact(pattern: str, spread: bool) -> None:
    """Every bit, NaNs included, in whatever order the places lie; a chunk is never half told."""
    draw = random.Random(0)
    live, places, data = [], [], torch.zeros(8_000_000, dtype=torch.uint8)
    start = 0
    for dtype, shape in PATTERNS[pattern]:
        count = torch.Size(shape).numel()
        bits = torch.randint(0, 2 if dtype is torch.bool else 256, (2 * count * dtype.itemsize,), dtype=torch.uint8)
        tensor = bits.view(dtype)
        live.append((tensor[::2] if spread else tensor[:count]).view(shape))
        places.append(data[start : start + count * dtype.itemsize].view(dtype).view(shape))
        start += count * dtype.itemsize + (4 if draw.random() < 0.1 else 0) * dtype.itemsize
    order = list(range(len(live)))
    draw.shuffle(order)
    live, places = [live[index] for index in order], [places[index] for index in order]
    copy = copier.HostCopy(places, [index for index in range(len(places)) if index % 7])
    done: list[int] = []
    copy.run(live, done.append)
    for index, (tensor, place) in enumerate(zip(live, places, strict=True)):
        expected = tensor.contiguous().view(-1).view(torch.uint8) if index % 7 else torch.zeros(0)
        assert torch.equal(place.view(-1).view(torch.uint8), expected) if index % 7 else not place.any()
    assert sorted(copy.order) == [index for index in range(len(places)) if index % 7]
    assert done == sorted(set(done)) and all(0 < count < len(copy.order) for count in done)
    assert len(done) >= 3 or len(live) < 9
    copied: list[int] = []
    data.zero_()
    with pytest.raises(Stop) if len(done) > 1 else contextlib.nullcontext():
        copy.run(live, lambda count: copied.append(count) or (stop() if len(copied) == 2 else None))
    if len(done) > 1:  # those before the chunk are there, the others are not
        there = [bool(places[index].view(-1).view(torch.uint8).any()) for index in copy.order]
        assert not any(there[copied[-1] :])


def stop() -> None:
    raise Stop


def test_equal_neighbours_are_copied_in_one_call() -> None:
    data = torch.zeros(40, 12)
    copy = copier.HostCopy(list(data.unbind()), range(40))
    assert sum(len(chunk.joined) for chunk in copy._chunks) == len(copy._chunks) == 8
    assert not any(chunk.alone for chunk in copy._chunks)


def test_equal_tensors_of_a_state_are_neighbours_in_a_slot() -> None:
    """Small ones of all kinds: parameters, moments, step counters."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    optimizer = adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    slot = Slot()
    slot.fill(StatePlan.build(model, [optimizer], 1), 0)
    assert [(part.size, len(part.members)) for _, part in slot._bytes._parts] == [(64, 60), (4, 40), (16, 60)]
    assert all(part.rows is not None for _, part in slot._bytes._parts)
    assert not any(chunk.alone for chunk in slot._host_copy._chunks)


def test_a_parameter_that_gets_other_data_while_it_is_copied(mover: Copier) -> None:
    """The copy is of what it stood for at the commit."""
    run, gate, slot = Training(OPTIMIZERS["sgd"]), Gate(mover), Slot(mover)
    before = run.image()
    slot.fill(run.plan(), 0)
    for parameter in run.model.parameters():
        parameter.data = torch.zeros_like(parameter)
    gate.open()
    slot.wait()
    slot.restore()
    assert compare(run.image(), before) == []


# ---------------------------------------------------------------------- the way to a device, on the CPU


class Streams:
    """Stands for a device module where there is no device: everything queued is done at once."""

    class Event:
        def record(self, stream: Any) -> None: ...

        def query(self) -> bool:
            return True

        def synchronize(self) -> None: ...

    class Stream:
        def __init__(self, **options: Any) -> None: ...

        def wait_event(self, event: Any) -> None: ...

        def synchronize(self) -> None: ...

    def current_stream(self, device: Any) -> Streams.Stream:
        return self.Stream()

    def stream(self, stream: Any) -> Any:
        return warnings.catch_warnings()

    device = stream


@pytest.mark.parametrize("chunk", [64, 4096])
def test_small_tensors_go_through_the_bucket_and_large_ones_in_pieces(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: Streams())
    monkeypatch.setattr("dist_stability.snapshot.layout.CHUNK", chunk)
    monkeypatch.setattr("dist_stability.snapshot.layout.SMALL", 64)
    device, host = torch.device("cuda", 0), torch.device("cpu")
    torch.manual_seed(0)
    live = [torch.randn(count) for count in (3, 40, 0, 15, 1, 500, 7)]
    live += [torch.randn(8, 9).t(), torch.randn(60)[::2], torch.randn(5).to(torch.bfloat16), torch.tensor(1.5)]
    live += [
        torch.randn(30, dtype=torch.complex64).conj(),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ]
    sizes = [tensor.numel() * tensor.element_size() for tensor in live]
    layout = copier.Layout.of(sizes, [tensor.element_size() for tensor in live], [device] * len(live))
    layout = copier.Layout(
        layout.starts,
        layout.nbytes,
        layout.devices,
        (),
        {host: layout.large[device]},
        {host: layout.batches[device]},
    )
    assert layout.large[host] and len(layout.batches[host]) == (1 if chunk == 4096 else 3)
    arena = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views = [copier.view_in(arena, start, like) for start, like in zip(layout.starts, live, strict=True)]
    lane, calls = copier.Lane(host), itertools.count()
    buckets = lane.buckets(layout, views)
    before = [tensor.clone() for tensor in live]
    lane.save(layout, arena, buckets, views, live, lambda: next(calls), lambda: None)
    assert all(torch.equal(view, kept) for view, kept in zip(views, before, strict=True))
    assert next(calls) >= len(layout.large[host]) + len(layout.batches[host])
    for tensor in live:
        tensor.zero_()
    lane.load(layout, arena, buckets, views, {i: [t] for i, t in enumerate(live) if i != 1}, lambda: None)
    assert not live[1].any()
    del live[1], before[1]
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(live, before, strict=True))


# ---------------------------------------------------------------------- in a guarded run


def slowly(attempt: int, setup: Any, controller: Any) -> None:
    """From the first commit on, every copy takes longer than a training step; it must not run in the main thread."""

    def listener(number: int, phase: str) -> None:
        if phase == "copy" and threading.current_thread() is not threading.main_thread():
            time.sleep(0.01)
            seen.append(number)

    if attempt == 0 and controller is not None:
        controller.add_phase_listener(listener)


seen: list[int] = []


def overlapped(rank: int, world: int, jobs: list[Job]) -> list[str]:
    """Golden twins whose copies are slow and in the background."""
    copier.HOST_WORK = HostWork.ALL
    seen.clear()
    try:
        said = twins(rank, world, jobs)
    finally:
        copier.HOST_WORK = None
    assert len(set(seen)) > 3, f"copies of attempts {sorted(set(seen))} were made in the background"
    return said


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2", slow("fsdp1")])
def test_golden_twin_with_slow_copies(mode: str) -> None:
    faults = [f"gradient-scale:step={BAD},factor=300,length=1", f"nan:step={BAD},rank=0"]
    jobs = [
        Job(Case(mode, model, name, guards=False), (fault,), options={"after_step": slowly})
        for (model, name), fault in itertools.product([("transformer", "adamw-foreach"), ("conv", "sgd")], faults)
    ]
    said = harness.pool(MODES[mode]).run(overlapped, jobs, timeout=300)
    assert not any(said), "\n".join(line for lines in said for line in lines)


def broken_copy(rank: int, world: int) -> str:
    copier.HOST_WORK = HostWork.ALL

    def fail(attempt: int, setup: Any, controller: Any) -> None:
        def listener(number: int, phase: str) -> None:
            if rank == 1 and phase == "copy" and number == 3 and threading.current_thread().name != "MainThread":
                raise OSError("the memory is gone")

        if attempt == 0:
            controller.add_phase_listener(listener)

    try:
        zoo.train(Case("ddp", "transformer", "sgd"), rank, world, after_step=fail, timeout=10.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        copier.HOST_WORK = None
    return ""


def test_a_copy_that_fails_on_one_rank_stops_all_by_name(two: harness.Pool) -> None:
    other, failed = two.run(broken_copy)
    said = "rank 1: the snapshot of attempt 3 was interrupted at "
    assert failed.startswith(f"SnapshotError: {said}") and "the memory is gone" in failed
    assert other.startswith("LockstepError") and said in other, other


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("large", [False, True])
def test_the_device_waits_and_the_host_does_not(large: bool) -> None:
    """Long compute before the copy, and a change right after the barrier; without the barrier the copy is torn."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(20 << 20 if large else 1000, device="cuda")) for _ in range(20)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan, ring = StatePlan.build(model, [optimizer], 1), SlotRing(0)

    def add(value: float) -> None:
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), value)

    def one(attempt: int) -> Slot:
        slot = ring.begin()
        slot.fill(plan, attempt)
        slot.publish()
        ring.commit(slot)
        return slot

    for attempt in range(3):  # warm up
        one(attempt)
        ring.order()
    torch.cuda.synchronize()
    ring.order()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(500_000_000)
        add(1.0)
        slot = one(3)
        assert slot.state is SlotState.FILLING, "the host has not waited"
        ring.order()
        add(1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
    assert slot.verify() == [] and slot.pinned
    assert all(view.eq(1).all() for view in slot._views)
    slot.restore()
    assert all(parameter.eq(1).all() for parameter in model.parameters())
    ring.close()
