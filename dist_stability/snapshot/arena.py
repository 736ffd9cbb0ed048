"""Host memory for snapshots: one region per slot, of exactly the size it needs, there before the first copy.

The region is anonymous shared memory from ``mmap``. It is written to once when it is made, so that no copy ever waits
for a page. If the state lies on a CUDA device it is page-locked, so that copies run beside everything else, and lies in
the part of the machine's memory that is nearest to it, where the system tells and lets us choose (numa.py). Not the
caching host allocator of torch: it rounds every request up to a power of two and keeps what is given back.

Shared and not private, because of ``fork`` (data loaders): pages of a private region would be copied, one by one, at
the first fill after it, and the old ones kept as long as any child lives. A child sees the same pages and leaves them
alone. Page-locking belongs to the process that did it.

A region may lie in a file instead (tiers/shared_memory.py), and then outlives the process. Its first page is not part
of the data: it holds a mark and the number of the fill the data is of, which moves on before a fill writes anything.

A tensor that views the region keeps it mapped: :meth:`Arena.close` gives back the page-locking at once, and the memory
goes with the last such tensor. Nothing is left dangling.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from .. import parallel
from ..errors import SnapshotError
from .numa import node_of, prefer

LOCK_CHUNK = 1 << 30
"""Bytes page-locked in one call: a single call for everything would hold up other users of the driver for seconds. No
copy may cross from one such chunk to the next (layout.py cuts them there)."""

HEAD = mmap.PAGESIZE
"""Bytes before the data of a region in a file."""

MARK = b"DSTSLOT1"
"""What such a file begins with; then the number of the fill, 8 bytes, lowest first."""

_PAGE = mmap.PAGESIZE
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
_SHARE = 256 << 20  # bytes worth a thread of their own when pages are made
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device
_said_pageable = False


class Arena:
    """One region of host memory.

    Attributes:
        data: Its bytes, uint8; exactly as many as were asked for.
        nbytes: Bytes held: those of ``data``, rounded up to whole pages.
        path: The file it lies in, if any. Removing that is left to whoever named it.
        node: The part of the machine's memory that its pages were asked from, the nearest to the device; None: any.
        pinned: Page-locked.
        why_pageable: Why page-locking failed, if it did.
    """

    def __init__(self, nbytes: int, device: torch.device | None = None, path: Path | None = None) -> None:
        """Reserve the region, make its pages, and page-lock them.

        Args:
            nbytes: Bytes needed, >= 0.
            device: The CUDA device it is page-locked for; None for pageable memory.
            path: A file to be made for it; None for memory without a name.

        Raises:
            SnapshotError: There is not that much memory.
        """
        held = max(-(-nbytes // _PAGE), 1) * _PAGE
        head = 0 if path is None else HEAD
        try:
            memory = mmap.mmap(-1, held) if path is None else _new_file(path, head + held)
            whole = torch.frombuffer(memory, dtype=torch.uint8)
            self.node = _near(whole, device)
            _make_pages(whole)
        except (OSError, ValueError, RuntimeError) as error:
            raise SnapshotError(
                f"rank {parallel.this_rank()}: no host memory for a snapshot of {nbytes / 2**20:.0f} MiB"
                f"{'' if path is None else f' in {path.parent}'} ({error}). "
                "Keep fewer anchors, shard the state over more ranks, or give the job more memory"
            ) from error
        self._hold(whole, head, nbytes, path)
        if device is not None:
            self.lock(device)

    def _hold(self, whole: torch.Tensor, head: int, nbytes: int, path: Path | None) -> None:
        """The region is there, and its data begins at this byte of it."""
        self.data, self.path, self.nbytes = whole[head : head + nbytes], path, whole.numel() - head
        self._first = whole.data_ptr() + head
        self._fill = None if path is None else whole[len(MARK) : len(MARK) + 8].view(torch.int64)
        self.pinned, self.why_pageable = False, ""
        self._locked: list[int] = []
        self._finalizer = weakref.finalize(self, _unlock, os.getpid(), self._locked)

    def lock(self, device: torch.device) -> None:
        """Page-lock the region for a CUDA device; a warning if that fails."""
        if not self.pinned:
            self.why_pageable = _lock(self._first, self.nbytes, device, self._locked)
            self.pinned = bool(self._locked)
            if self.why_pageable:
                _say_pageable(self.nbytes, self.why_pageable)

    @property
    def fill(self) -> int:
        """Number of the fill; 0 before the first, and for a region that lies in no file."""
        return 0 if self._fill is None else int(self._fill)

    def begin_fill(self) -> None:
        """Another state is about to be written here: whoever finds the file must not take it for the one before."""
        if self._fill is not None:
            self._fill += 1

    def close(self) -> None:
        """Give the memory back; no copy from or into it may be under way. Idempotent."""
        self._finalizer()
        self.data = torch.empty(0, dtype=torch.uint8)
        self._fill = None
        self.nbytes, self.pinned = 0, False


class FoundArena(Arena):
    """A region in a file that another process left behind: only read, until it is taken over."""

    def __init__(self, path: Path, nbytes: int) -> None:
        """Open it.

        Args:
            path: The file.
            nbytes: Bytes of its data.

        Raises:
            SnapshotError: It is not there, is no such file, or is too short.
        """
        try:
            with path.open("r+b") as file:
                memory = mmap.mmap(file.fileno(), 0)
        except (OSError, ValueError) as error:
            raise SnapshotError(f"{path.name} cannot be read ({error})") from error
        if len(memory) < HEAD + nbytes or memory[: len(MARK)] != MARK:
            raise SnapshotError(f"{path.name} is cut short or damaged at its head")
        self._hold(torch.frombuffer(memory, dtype=torch.uint8), HEAD, nbytes, path)
        self._ours = False

    def take_over(self, path: Path) -> None:
        """From now on it is like one that was made here. The file has this name by now."""
        self.path, self._ours = path, True

    def begin_fill(self) -> None:
        """See Arena.

        Raises:
            SnapshotError: It was not taken over.
        """
        if not self._ours:
            raise SnapshotError(f"{self.path} belongs to a process that has ended; it is not written to")
        super().begin_fill()


def _new_file(path: Path, size: int) -> mmap.mmap:
    """A new file that only its owner can read, with all its bytes reserved, in memory."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Reserved now: a page that cannot be had later would be a SIGBUS in the middle of a copy.
        os.posix_fallocate(handle, 0, size)
        os.pwrite(handle, MARK, 0)
        return mmap.mmap(handle, size)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _near(data: torch.Tensor, device: torch.device | None) -> int | None:
    """Have the pages that are about to be made near the device; where that is, if it worked."""
    node = None if device is None else node_of(device)
    return node if node is not None and prefer(data.data_ptr(), data.numel(), node) else None


def _make_pages(data: torch.Tensor) -> None:
    """Make every page of a region now, with a few threads if it is large."""
    first, size = data.data_ptr(), data.numel()
    count = max(1, min(8, os.cpu_count() or 1, size // _SHARE))
    step = -(-size // count // _PAGE) * _PAGE
    shares = [(first + start, min(step, size - start)) for start in range(0, size, step)]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)

        def populate(share: tuple[int, int]) -> int:
            done = libc.madvise(ctypes.c_void_p(share[0]), ctypes.c_size_t(share[1]), _POPULATE_WRITE)
            return ctypes.get_errno() if done else 0

        with ThreadPoolExecutor(len(shares)) as threads:
            codes = {code for code in threads.map(populate, shares) if code}
        if not codes:
            return
        if codes - {errno.EINVAL, errno.ENOSYS}:  # those two: an older kernel
            code = max(codes - {errno.EINVAL, errno.ENOSYS})
            raise OSError(code, os.strerror(code))
    data[::_PAGE].zero_()


def _lock(first: int, size: int, device: torch.device, locked: list[int]) -> str:
    """Page-lock a region chunk by chunk; the addresses go into ``locked``. Why it failed, "" if it did not."""
    # The device first: otherwise each rank would open a context on device 0.
    with torch.cuda.device(device):
        runtime = torch.cuda.cudart()
        for start in range(0, size, LOCK_CHUNK):
            code = int(runtime.cudaHostRegister(first + start, min(LOCK_CHUNK, size - start), _PORTABLE))
            if code:
                _unlock(os.getpid(), locked)
                _take_blame(device)
                return f"cudaHostRegister returned error {code} at {start >> 20} of {size >> 20} MiB"
            locked.append(first + start)
    return ""


def _take_blame(device: torch.device) -> None:
    """Launch a kernel: the runtime remembers the last failure, and the next launch is blamed for it."""
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device=device).fill_(1)


def _unlock(owner: int, locked: list[int]) -> None:
    """Take page-locking back, in the process that did it: a forked child may not use CUDA."""
    while locked:
        address = locked.pop()
        if os.getpid() == owner:
            torch.cuda.cudart().cudaHostUnregister(address)


def _say_pageable(nbytes: int, reason: str) -> None:
    global _said_pageable
    if _said_pageable:
        return
    _said_pageable = True
    limit = _locked_limit()
    hint = f" The limit on locked memory (ulimit -l) is {limit / 2**20:.0f} MiB; raise it." if limit < nbytes else ""
    warnings.warn(
        f"rank {parallel.this_rank()}: {nbytes / 2**20:.0f} MiB of snapshot memory could not be page-locked "
        f"({reason}): copies to and from the device will be slow and hold up the host.{hint}",
        RuntimeWarning,
        stacklevel=2,
    )


def _locked_limit() -> float:
    """RLIMIT_MEMLOCK in bytes."""
    try:
        import resource
    except ImportError:  # not a Unix
        return float("inf")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return float("inf") if limit == resource.RLIM_INFINITY else limit


# ---------------------------------------------------------------------- budget


class Limit(NamedTuple):
    """Something that bounds this process's memory: what it is, and how many bytes it leaves."""

    name: str
    available: int


def limits(root: Path = Path("/")) -> list[Limit]:
    """What bounds the memory of this process: the machine, and every control group (v2 and v1) it is in.

    Page cache that can be dropped counts as available. Empty where the system has no such files.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    found = []
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(Limit("the machine (MemAvailable)", int(line.split()[1]) * 1024))
    mount = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _groups(mount, path, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _groups(mount / "memory", path, names)
    return found


def check_budget(need: int, slots: int, root: Path = Path("/")) -> None:
    """Compare what snapshots will need with what there is, before any of it is reserved.

    Each rank looks for itself, so ranks of one machine that reserve at the same moment may all find room that is there
    once. RLIMIT_MEMLOCK is not among the limits: CUDA drivers page-lock far more than it allows on most machines, so
    only the attempt tells (see :attr:`Arena.why_pageable`).

    Args:
        need: Bytes still to be reserved.
        slots: How many slots they are for, for the message.
        root: See :func:`limits`.

    Raises:
        SnapshotError: Some limit leaves less.
    """
    tightest = min(limits(root), key=lambda limit: limit.available, default=None)
    if tightest is not None and need > tightest.available:
        raise SnapshotError(
            f"rank {parallel.this_rank()}: snapshots need {need / 2**20:.0f} MiB of host memory ({slots} slots), but "
            f"{tightest.name} leaves {tightest.available / 2**20:.0f} MiB. Keep fewer anchors (anchors=0 needs two "
            "slots), shard the state over more ranks, or raise the limit"
        )


class Memory:
    """Where slots get their memory from."""

    def check(self, need: int, slots: int) -> None:
        """Compare what slots still need with what there is. See :func:`check_budget`."""
        check_budget(need, slots)

    def make(self, nbytes: int, device: torch.device | None) -> Arena:
        """The memory of one slot. See :class:`Arena`."""
        return Arena(nbytes, device)

    def take_over(self, found: Arena, on_chunk: Callable[[], object]) -> bool:
        """Whether what an earlier process left can be the memory of a slot from now on, as if it had been made here.

        Args:
            found: What it left, its bytes read and found to be right.
            on_chunk: Called between the parts of the work.
        """
        return found.path is None


def _groups(mount: Path, path: str, names: tuple[str, str, str]) -> list[Limit]:
    """The group and all above it. In a container the path may be the host's, of which only the mount is seen."""
    maximum, current, droppable = names
    place = mount / path.lstrip("/")
    found = []
    for folder in (place, *place.parents):
        if folder != mount and mount not in folder.parents:
            break
        limit, used = _number(folder / maximum), _number(folder / current)
        if limit is None or used is None or limit >= 1 << 60:  # v1 writes a huge number for no limit
            continue
        cache = next((int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith(droppable)), 0)
        found.append(Limit(f"the control group {folder} ({maximum})", max(0, limit - used + cache)))
    return found


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None  # "max" means no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
