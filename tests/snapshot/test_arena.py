"""Host memory of exactly the needed size, refused in time, and never pulled away under a tensor."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import platform
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dist_stability import SnapshotError
from dist_stability.snapshot import Arena, SlotRing, StatePlan, arena, numa
from dist_stability.snapshot.arena import LOCK_CHUNK, check_budget, limits
from dist_stability.snapshot.layout import ALIGNMENT, CHUNK, SMALL, Layout, alignment, cuts

MIB = 1 << 20


@pytest.mark.parametrize("nbytes", [0, 1, mmap.PAGESIZE, mmap.PAGESIZE + 1, 3 * MIB + 5])
def test_exact_bytes(nbytes: int) -> None:
    region = Arena(nbytes)
    assert region.data.numel() == nbytes
    assert nbytes <= region.nbytes <= nbytes + mmap.PAGESIZE and region.nbytes % mmap.PAGESIZE == 0
    assert not region.pinned and not region.data.any()
    region.data.fill_(7)
    assert region.data.data_ptr() % mmap.PAGESIZE == 0 or not nbytes
    region.close()
    region.close()
    assert region.nbytes == 0 and region.data.numel() == 0


def resident() -> int:
    """Bytes of this process's memory that have pages."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("populates", [True, False])
def test_pages_are_there_from_the_start(monkeypatch: pytest.MonkeyPatch, populates: bool) -> None:
    if not populates:  # an older kernel says EINVAL to what it does not know
        monkeypatch.setattr(arena, "_POPULATE_WRITE", 9999)
    before = resident()
    region = Arena(600 * MIB)
    assert resident() - before >= 590 * MIB
    region.close()
    assert resident() - before < 10 * MIB, "and gone after close"


def test_a_view_outlives_its_region() -> None:
    region = Arena(MIB)
    view = region.data[100:200]
    view.fill_(5)
    region.close()
    del region
    others = [Arena(MIB) for _ in range(4)]
    for other in others:
        other.data.fill_(9)
    assert view.tolist() == [5] * 100


def test_a_forked_child_leaves_it_alone() -> None:
    region = Arena(MIB)
    region.data.fill_(3)
    child = os.fork()
    if child == 0:
        region.close()
        del region
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert region.data.sum() == 3 * MIB
    region.data.fill_(4)
    assert region.data.sum() == 4 * MIB


def test_no_memory_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(SnapshotError, match=r"rank 0: no host memory for a snapshot of .* MiB .*fewer anchors"):
        Arena(1 << 62)


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = "MemTotal: 999999 kB\nMemAvailable: 1024 kB\n"


def test_limits_of_the_machine(tmp_path: Path) -> None:
    assert limits(tmp_path) == []
    check_budget(1 << 60, 2, tmp_path)
    machine(tmp_path, {"proc/meminfo": MEMINFO})
    assert limits(tmp_path) == [("the machine (MemAvailable)", MIB)]
    check_budget(MIB, 2, tmp_path)
    with pytest.raises(SnapshotError, match=r"rank 0: snapshots need 3 MiB .*\(4 slots\), but the machine .* 1 MiB\."):
        check_budget(3 * MIB, 4, tmp_path)


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """Version 2: the group and every one above it; cache that can be dropped is free."""
    machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/memory.max": str(10 * MIB),
            "sys/fs/cgroup/job/memory.current": str(8 * MIB),
            "sys/fs/cgroup/job/memory.stat": f"anon 1\ninactive_file {MIB}\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n",
            "sys/fs/cgroup/job/step/memory.current": "5\n",
        },
    )
    assert [limit.available for limit in limits(tmp_path)] == [3 * MIB]
    with pytest.raises(SnapshotError, match=r"control group .*cgroup/job \(memory.max\) leaves 3 MiB"):
        check_budget(4 * MIB, 2, tmp_path)


def test_limits_in_a_container_with_version_1(tmp_path: Path) -> None:
    """The path is the host's and not to be seen; the mount is the container's own group."""
    machine(
        tmp_path,
        {
            "proc/self/cgroup": "9:cpuset:/x\n4:cpu,memory:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(6 * MIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(4 * MIB),
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {MIB}\n",
        },
    )
    assert [limit.available for limit in limits(tmp_path)] == [3 * MIB]
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712")
    assert limits(tmp_path) == []


def test_the_whole_ring_is_paid_for_before_anything_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """And memory that slots hold already is not asked for again."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("dist_stability.snapshot.arena.check_budget", lambda need, slots: asked.append((need, slots)))
    model = nn.Linear(mmap.PAGESIZE // 4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = StatePlan.build(model, [optimizer], 1)
    ring = SlotRing(1)
    for attempt in range(3):
        slot = ring.begin()
        slot.fill(plan, attempt)
        slot.publish()
        ring.commit(slot, as_anchor=attempt == 0)
    assert asked == [(count * mmap.PAGESIZE, 3) for count in (3, 2, 1)]
    optimizer.state[model.weight]["momentum_buffer"] = torch.zeros_like(model.weight)
    slot = ring.begin()
    slot.fill(StatePlan.build(model, [optimizer], 1), 3)
    assert asked[-1] == ((2 + 1 + 1) * mmap.PAGESIZE, 3)


def test_too_little_memory_is_told_before_it_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(tmp_path, {"proc/meminfo": "MemAvailable: 12 kB\n"})
    monkeypatch.setattr("dist_stability.snapshot.arena.limits.__defaults__", (tmp_path,))
    monkeypatch.setattr("dist_stability.snapshot.arena.check_budget.__defaults__", (tmp_path,))
    made: list[Any] = []
    monkeypatch.setattr("dist_stability.snapshot.arena.Arena", lambda *args: made.append(args))
    model = nn.Linear(1024, 2, bias=False)
    plan = StatePlan.build(model, [torch.optim.SGD(model.parameters(), lr=0.1)], 1)
    with pytest.raises(SnapshotError, match="anchors=0 needs two slots"):
        SlotRing(0).begin().fill(plan, 0)
    assert made == []


# ---------------------------------------------------------------------- layout

CPU, CUDA, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)

entries = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 300), st.integers(SMALL - 3, SMALL + 3), st.integers(0, 3 * CHUNK)),
        st.sampled_from([1, 2, 4, 8, 16]),
        st.sampled_from([CPU, CUDA, OTHER]),
    ),
    max_size=40,
)


@given(entries)
def test_every_entry_has_a_place_of_its_own(given_entries: list[tuple[int, int, torch.device]]) -> None:
    sizes = [count * item for count, item, _ in given_entries]
    items = [item for _, item, _ in given_entries]
    devices = [device for _, _, device in given_entries]
    layout = Layout.of(sizes, items, devices)
    assert layout == Layout.of(sizes, items, devices), "the same on every call"
    spans = sorted((start, start + size) for start, size in zip(layout.starts, sizes, strict=True) if size)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(start % item == 0 for start, item in zip(layout.starts, items, strict=True))
    assert max([end for _, end in spans], default=0) <= layout.nbytes <= sum(sizes) * 1.01 + 6 * ALIGNMENT
    sent = [*layout.host]
    for device in layout.large:
        assert all(devices[index] == device and sizes[index] >= SMALL for index in layout.large[device])
        sent += layout.large[device]
        for batch in layout.batches[device]:
            assert batch.end - batch.start <= CHUNK
            assert all(batch.start <= layout.starts[i] <= batch.end - sizes[i] for i in batch.members)
            assert all(devices[index] == device and sizes[index] < SMALL for index in batch.members)
            inside = [i for i, s in enumerate(layout.starts) if sizes[i] and batch.start <= s < batch.end]
            assert set(inside) <= set(batch.members), "a batch is sent whole: nothing else may lie in it"
            sent += batch.members
    assert sorted(sent) == list(range(len(sizes)))


def test_1200_small_tensors_cost_what_they_hold() -> None:
    """Adam's: 300 weights with two moments each, and 300 step counters of 4 bytes."""
    sizes = [size for _ in range(300) for size in (1028, 4, 1028, 1028)]
    layout = Layout.of(sizes, [4] * 1200, [CPU] * 1200)
    assert sum(sizes) <= layout.nbytes <= sum(sizes) * 1.01


@given(st.integers(0, 4 * CHUNK), st.integers(0, 4 * CHUNK))
def test_transfers_are_cut_at_every_chunk(start: int, size: int) -> None:
    pieces = list(cuts(start, start + size))
    assert sum(stop - first for first, stop in pieces) == size
    assert all(first // CHUNK == (stop - 1) // CHUNK for first, stop in pieces)
    assert LOCK_CHUNK % CHUNK == 0, "so no transfer crosses from one page-locked chunk to the next"


def test_alignment() -> None:
    assert [alignment(size, 4) for size in (0, 4, 1023, 1024, 8191, 8192, 1 << 30)] == [4, 4, 4, 8, 32, 64, 64]
    assert alignment(16, 16) == 16


# ---------------------------------------------------------------------- page-locking


class Runtime:
    """Stands for the CUDA runtime where there is none: remembers what is page-locked, and fails when told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.locked: dict[int, int] = {}
        self.calls = 0
        self._fail_at = fail_at

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 1
        self.calls += 1
        if self.calls - 1 == self._fail_at:
            return 2
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    monkeypatch.setattr(arena, "_take_blame", lambda device: None)
    monkeypatch.setattr(arena, "node_of", lambda device: None)
    monkeypatch.setattr(arena, "LOCK_CHUNK", MIB)
    monkeypatch.setattr(arena, "_said_pageable", False)
    return found


def test_page_locking_in_chunks(runtime: Runtime) -> None:
    region = Arena(5 * MIB // 2, CUDA)
    assert region.pinned and not region.why_pageable
    assert list(runtime.locked.values()) == [MIB, MIB, MIB // 2]
    region.close()
    assert runtime.locked == {}
    region = Arena(MIB, CUDA)
    del region
    assert runtime.locked == {}, "also when nobody closes it"


def test_what_cannot_be_page_locked_says_so_once(runtime: Runtime) -> None:
    runtime._fail_at = 2
    with pytest.warns(RuntimeWarning, match=r"rank 0: 4 MiB .*page-locked .*error 2 at 2 of 4 MiB.*slow"):
        region = Arena(4 * MIB, CUDA)
    assert not region.pinned and "error 2" in region.why_pageable
    assert runtime.locked == {}, "half of a region is none"
    region.data.fill_(1)
    runtime._fail_at = runtime.calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Arena(MIB, CUDA).pinned


def test_a_forked_child_does_not_touch_the_runtime(runtime: Runtime) -> None:
    region = Arena(MIB, CUDA)
    arena._unlock(os.getpid() + 1, [1234])
    region.close()


# ---------------------------------------------------------------------- the nearest part of the memory


@pytest.mark.parametrize(("said", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("", None), (None, None)], ids=repr)
def test_where_a_device_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None, node: int | None) -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0x1F)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    if said is not None:
        machine(tmp_path, {"sys/bus/pci/devices/0000:c1:1f.0/numa_node": said})
    assert numa.node_of(CUDA, tmp_path) == node
    del properties.pci_bus_id  # as in an older torch
    assert numa.node_of(CUDA, tmp_path) is None


def policy(address: int) -> tuple[int, int]:
    """How the system chooses the node of a page: the mode, and the nodes as a mask."""
    number = {"x86_64": 239, "aarch64": 236}.get(platform.machine(), -1)
    mode, mask = ctypes.c_int(-1), ctypes.c_ulong()
    where = (ctypes.c_void_p(address), ctypes.c_ulong(2))  # MPOL_F_ADDR
    libc = ctypes.CDLL(None)
    if libc.syscall(ctypes.c_long(number), ctypes.byref(mode), ctypes.byref(mask), ctypes.c_ulong(64), *where):
        pytest.skip("this system has no memory policies")
    return mode.value, mask.value


def test_pages_are_asked_from_the_nearest_node(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are made: where they lie afterwards is not changed any more."""
    region = Arena(MIB, CUDA)
    assert region.node is None and policy(region.data.data_ptr()) == (0, 0)
    monkeypatch.setattr(arena, "node_of", lambda device: 0)
    seen: list[tuple[int, int]] = []
    make = arena._make_pages
    monkeypatch.setattr(arena, "_make_pages", lambda data: (seen.append(policy(data.data_ptr())), make(data)))
    region = Arena(MIB, CUDA)
    last = region.data.data_ptr() + MIB - 1
    assert region.node == 0 and seen == [(1, 1)] == [policy(last)], "preferred, node 0"
    assert Arena(MIB).node is None, "memory for no device may lie anywhere"


@pytest.mark.parametrize("node", [63, 64, 1000])
def test_a_node_that_is_not_there_changes_nothing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, node: int) -> None:
    monkeypatch.setattr(arena, "node_of", lambda device: node)
    region = Arena(MIB, CUDA)
    assert region.node is None and region.pinned and policy(region.data.data_ptr()) == (0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_page_locked_on_a_gpu() -> None:
    region = Arena(5 * MIB, torch.device("cuda", torch.cuda.current_device()))
    assert region.pinned and region.data.is_pinned()
    source = torch.arange(5 * MIB, device="cuda", dtype=torch.int32).to(torch.uint8)
    region.data.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(region.data, source.cpu())
    view = region.data[:10]
    region.close()
    assert not view.is_pinned() and view.tolist() == list(range(10))
