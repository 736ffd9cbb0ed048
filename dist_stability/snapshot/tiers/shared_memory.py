"""Slots in shared memory: files in /dev/shm, which stay when the process that made them dies.

Names say everything that has to be known without opening a file::

    dist_stability.<user>.<job>.r<rank>.<owner>.<number>           the memory of a slot (arena.py)
    dist_stability.<user>.<job>.r<rank>.<owner>.<number>.a, .b     its last two seals (record.py)
    dist_stability.<user>.<job>.r<rank>.<owner>.<number>.h<made>   a seal that stays as long as a copy of that moment
    dist_stability.<user>.<job>.r<rank>.k<keeper>.<owner>...       a copy that another rank keeps (copies.py)

A process writes only to files that have its name, so what an earlier process of the same job and rank left stays as it
was until it is superseded. The slot that a run is resumed from is taken over: it gets a name of the new process and is
one of its slots, which is not filled again before another one is safe. Files of other jobs are removed if neither their
process nor the one that would start it again runs: that cannot change any more, so two processes that clean up at once
do no harm.
"""

from __future__ import annotations

import atexit
import builtins
import itertools
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch

from ...errors import SnapshotError
from ..arena import Arena, FoundArena, Memory
from . import record
from .processes import Owner
from .record import Head, Unusable
from .tier import Found, Listing

_PREFIX = "dist_stability"
_SEALS = ("a", "b")
_HELD = "h"
_PARTIAL = "partial"
_BLOCK = 512  # bytes of what st_blocks counts
_numbers = itertools.count()


@dataclass(frozen=True)
class SharedMemory:
    """Keep the snapshots where they outlive the process: a restarted one finds the last of its rank and job.

    They are kept there instead of in anonymous memory, not beside it.

    Args:
        job: Name of this run, the same after a restart and not that of another run on the machine: letters, digits,
            "-" and "_". By default torchrun's run id, torchrun itself if that has none, or Slurm's job id.
        folder: A folder in memory. One on a disk works as well, at its speed.

    Raises:
        ValueError: No job was given and none is known, or its name has other characters.
    """

    job: str = ""
    folder: str | os.PathLike[str] = "/dev/shm"

    def __post_init__(self) -> None:
        """Find the job."""
        object.__setattr__(self, "job", str(self.job) or _job(os.environ))
        object.__setattr__(self, "folder", Path(self.folder))
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", self.job):
            raise ValueError(
                f"persist=SharedMemory(job={self.job!r}): expected 1 to 64 letters, digits, '-' or '_': it becomes "
                "part of file names"
            )


def _job(environment: Mapping[str, str]) -> str:
    run = environment.get("TORCHELASTIC_RUN_ID", "")
    if run and run != "none":
        return re.sub(r"[^A-Za-z0-9_-]", "_", run)[:64]
    if environment.get("SLURM_JOB_ID"):
        return f"slurm-{environment['SLURM_JOB_ID']}"
    if run:  # torchrun was given no id and calls them all "none"; it lives as long as the job
        pid, began = Owner.this().agent
        return f"torchrun-{pid}-{began}"
    raise ValueError(
        "persist=SharedMemory(): neither torchrun's run id (TORCHELASTIC_RUN_ID) nor SLURM_JOB_ID is set, so the name "
        "of this run is not known. Pass one that is the same after a restart: SharedMemory(job='my-run')"
    )


class FileName(NamedTuple):
    """What the name of a file says.

    Attributes:
        path: The file.
        job: Of the setting.
        rank: Whose state it is.
        keeper: The rank that keeps this copy; None for the rank's own.
        owner: The process that made it.
        number: Tells files of one process apart.
        seal: "" for the memory of a slot.
    """

    path: Path
    job: str
    rank: int
    keeper: int | None
    owner: Owner
    number: int
    seal: str

    @property
    def sealing(self) -> bool:
        """Whether this is a seal, and was written to its end."""
        return bool(self.seal) and not self.seal.endswith(_PARTIAL)

    @property
    def slot(self) -> Path:
        """The memory of the slot that this is, or is about."""
        return self.path.with_name(self.path.name.removesuffix(f".{self.seal}")) if self.seal else self.path


def files(folder: Path) -> Iterator[FileName]:
    """This user's files in a folder, of all jobs."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    pattern = re.compile(
        rf"{_PREFIX}\.{user}\.(?P<job>[\w-]+)\.r(?P<rank>\d+)(\.k(?P<keeper>\d+))?\.(?P<owner>p.+)\.(?P<number>\d+)"
        rf"(\.(?P<seal>([ab]|h\d+)(\.{_PARTIAL})?))?"
    )
    for path in folder.iterdir():
        found = pattern.fullmatch(path.name)
        owner = None if found is None else Owner.parse(found["owner"])
        if found is not None and owner is not None:
            keeper = None if found["keeper"] is None else int(found["keeper"])
            rank, number = int(found["rank"]), int(found["number"])
            yield FileName(path, found["job"], rank, keeper, owner, number, found["seal"] or "")


class Overwritten(SnapshotError):
    """A slot holds another state than the one that was sealed."""


@dataclass(frozen=True)
class Record:
    """One moment of one rank that can be gone back to.

    Attributes:
        head: What it is chosen by.
        body: Pickled.
        path: Of the slot.
    """

    head: Head
    body: bytes
    path: Path

    def open(self) -> FoundArena:
        """The bytes of the slot, in no way checked.

        Raises:
            SnapshotError: They cannot be read, or have been overwritten since.
        """
        arena = FoundArena(self.path, self.head.nbytes)
        if arena.fill != self.head.fill:
            raise Overwritten(f"{self.path.name} has been filled again since")
        return arena


class Shelf(Memory):
    """The files of one rank of one job: those of this process, and those that an earlier one left.

    Args:
        setting: Where, and of which job.
        rank: Global rank.
        count: How many ranks the job has, also those that train something else.

    Attributes:
        name: For messages.
        folder: Where.
        keeps_held: Of what earlier processes left, moments of which another host has copies stay for now.
        awaits_copies: They stay until there are copies of newer ones; otherwise until the second seal.
        here: The ranks that are on this host, if that is known.
    """

    name = "shared memory"

    def __init__(self, setting: SharedMemory, rank: int, count: int) -> None:
        """Look at the folder, and remove what dead jobs left there.

        Raises:
            ValueError: The folder is not there or cannot be written to, or the job's name is in use by a process that
                runs.
        """
        self.folder = Path(setting.folder)
        self._job, self._rank, self._count = setting.job, rank, count
        self._owner = Owner.this()
        self._pid = os.getpid()
        self._arenas: list[Arena] = []
        self._kept: list[Arena] = []
        self._landed: list[Path] = []
        self._first = next(_numbers)
        # Which of the two seals of a slot is the newer one, and of which moment.
        self._last: dict[Path, tuple[int, tuple[int, int, int] | None]] = {}
        self._seals = 0
        self._looked = False
        self._closed = False
        self.keeps_held = self.awaits_copies = False
        self.here: frozenset[int] | None = None
        self._check_folder()
        remove_stale(self.folder, self._job)
        mine = (self.folder, self._job, rank)
        earlier = list(self._earlier())
        used = next((file.owner for file in earlier if file.owner.alive() and file.owner.process[0] != self._pid), None)
        if used is not None or any(shelf.place == mine for shelf in _open):
            whose = f"process {used.process[0]}" if used is not None else "another controller of this process"
            raise ValueError(
                f"rank {rank}: persist=SharedMemory(job={self._job!r}): the snapshots of this job and rank in "
                f"{self.folder} belong to {whose}, which runs. Give each run a job name of its own, or end that one"
            )

    @property
    def rank(self) -> int:
        """Global rank."""
        return self._rank

    @property
    def place(self) -> tuple[Path, str, int]:
        """Folder, job and rank."""
        return self.folder, self._job, self._rank

    # ------------------------------------------------------------------ memory of the slots

    def check(self, need: int, slots: int) -> None:
        """See Memory; the folder's room counts as well.

        What earlier processes left is room for all slots but the next: by then it has been taken over or removed.
        """
        left = self._left_behind()
        need = max(need - left, need // slots)
        super().check(need, slots)
        found = os.statvfs(self.folder)
        free = found.f_bavail * found.f_frsize
        if need > free:
            raise SnapshotError(
                f"rank {self._rank}: persist=SharedMemory(folder='{self.folder}'): snapshots need {need / 2**20:.0f} "
                f"MiB there ({slots} slots), and {free / 2**20:.0f} MiB are free"
                f"{f', beside {left / 2**20:.0f} MiB of an earlier process' if left else ''}. Make it larger (mount -o "
                "remount,size=...; docker run --shm-size=...), keep fewer anchors, or name another folder"
            )

    def make(self, nbytes: int, device: torch.device | None) -> Arena:
        """See Memory; files of slots that have given theirs back go first."""
        for arena in [arena for arena in self._arenas if not arena.nbytes]:
            self._arenas.remove(arena)
            self.remove(arena.path)
        _open.add(self)
        arena = Arena(nbytes, device, self._new(f"r{self._rank}"))
        self._arenas.append(arena)
        return arena

    def take_over(self, found: Arena, on_chunk: Callable[[], object]) -> bool:
        """See Memory: a slot that an earlier process of this rank left, which gets a name of this process.

        It goes on to be sealed under both names until the earlier one is removed. Not what must stay as it is: slots of
        which another host has copies, until there are newer ones; and not what is another rank's copy.
        """
        old = found.path
        # The slot first: a seal without a slot would have to be explained.
        earlier = sorted((file for file in self._earlier() if file.slot == old), key=attrgetter("seal"))
        held = self.keeps_held and any(file.seal.startswith(_HELD) for file in earlier)
        if old is None or held or not earlier or not isinstance(found, FoundArena):
            return False
        new = self._new(f"r{self._rank}")
        self._landed.append(new)  # so that it is removed in the end, should this be interrupted
        try:
            for file in earlier:  # the slot, and its seals
                if file.seal in ("", *_SEALS):
                    os.link(file.path, new.with_name(new.name + file.path.name.removeprefix(old.name)))
                    on_chunk()
        except OSError:  # a file system without links, or one that is full
            self.remove(new)
            return False
        self.remove(old)
        found.take_over(new)
        self._landed.remove(new)
        _open.add(self)
        self._arenas.append(found)
        return True

    def make_copy(self, rank: int, nbytes: int) -> Arena:
        """The memory of a copy of another rank's slot.

        Raises:
            SnapshotError: There is not that much memory.
        """
        self.check(nbytes, 1)
        arena = Arena(nbytes, None, self._new(f"r{rank}.k{self._rank}"))
        self._kept.append(arena)
        return arena

    def land(self, nbytes: int) -> Arena:
        """Memory for a slot of this rank that comes from another host. Sealed, it is as if it had been left here.

        It goes at the second seal of this process. Close it before.

        Raises:
            SnapshotError: There is not that much memory.
        """
        self.check(nbytes, 1)
        _open.add(self)
        path = self._new(f"r{self._rank}")
        self._landed.append(path)
        return Arena(nbytes, None, path)

    def _new(self, whose: str) -> Path:
        return self.folder / f"{_PREFIX}.{os.getuid()}.{self._job}.{whose}.{self._owner}.{next(_numbers)}"

    @property
    def where(self) -> str:
        """For messages: name and job."""
        return f"{self.name} (job {self._job})"

    # ------------------------------------------------------------------ records

    def list(self, world: int, signature: int) -> Listing:
        """See Tier."""
        return Listing(*self.records(world, signature))

    def begin(self, made: int, found: Found | None) -> None:
        """See Tier: the other slots of earlier processes are of no use any more."""
        if found is None and self.keeps_held:
            return  # until there are seals of this process: the state came from slots like these
        self.forget_earlier(but=found.path if isinstance(found, Record) else None)

    def seal(self, memory: Arena, head: Head, body: bytes, on_chunk: Callable[[], object]) -> None:
        """Make what a slot holds findable. The seal before stays; what earlier processes left goes at the second one.

        At the second, because by then all ranks have made the first: there was a vote in between. There is none between
        two seals of one moment, so the later takes the place of the earlier and does not count.

        Raises:
            OSError: No room.
        """
        assert memory.path is not None
        which, moment = self._last.get(memory.path, (1, None))
        again = moment == head.key
        which = which if again else 1 - which
        record.write(memory.path.with_name(f"{memory.path.name}.{_SEALS[which]}"), head, body, on_chunk)
        self._last[memory.path] = which, head.key
        self._seals += not again
        if self._seals == 2 and not again:
            for path in self._landed:
                self.remove(path)
            self._landed = []
            gone = self.forget_earlier()
            if not self.awaits_copies:
                self.supersede()
            if gone and not self._looked:
                warnings.warn(
                    f"rank {self._rank}: job {self._job!r} had snapshots of an earlier process in {self.folder}, and "
                    "nobody called resume(): they are removed now, as this run has its own",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def hold(self, slot: Path, head: Head, body: bytes) -> Path:
        """Seal a moment of a slot once more, apart from its last two: stays until it is removed.

        Raises:
            OSError: No room.
        """
        path = slot.with_name(f"{slot.name}.h{head.made}")
        record.write(path, head, body, lambda: None)
        return path

    def ranks(self) -> builtins.list[int]:
        """Ranks of which something that earlier processes of this job left is in the folder."""
        return sorted({file.rank for file in self._left()})

    def records(
        self, world: int | None, signature: int, rank: int | None = None
    ) -> tuple[builtins.list[Record], builtins.list[str]]:
        """What earlier processes of this job left of a rank, copies of its slots included.

        Args:
            world: Number of ranks; None for any.
            signature: Of the plan.
            rank: This one by default.

        Returns:
            Records that are sound as far as their seals go, newest first; why others are not used.
        """
        self._looked = True
        rank = self._rank if rank is None else rank
        found: list[Record] = []
        wrong: dict[str, list[str]] = {}
        overwritten = 0
        for file in self._left():
            if file.rank != rank or not file.sealing:
                continue
            try:
                head, body = record.read(file.path)
                self._check(head, rank, world, signature)
                one = Record(head, body, file.slot)
                try:
                    one.open().close()
                except Overwritten:  # what becomes of every slot in time
                    overwritten += 1
                    continue
                except SnapshotError as error:
                    raise Unusable(f"is of no use: {error}") from error
                found.append(one)
            except Unusable as error:
                whose = "" if file.keeper is None else f" of rank {rank}, kept by rank {file.keeper}"
                wrong.setdefault(str(error), []).append(f"slot {file.number}{whose}, seal {file.seal}")
        said = [
            f"{seals[0]} {error}{f' (and {len(seals) - 1} more)' if seals[1:] else ''}"
            for error, seals in wrong.items()
        ]
        if overwritten and not found:
            said.append(f"{overwritten} seals are of slots that were filled again, and not sealed")
        return sorted(found, key=lambda one: one.head.key, reverse=True), said

    def _check(self, head: Head, rank: int, world: int | None, signature: int) -> None:
        if (head.job, head.rank) != (self._job, rank):
            raise Unusable(f"is of rank {head.rank} of job {head.job!r}, whatever its name says")
        if world is not None and head.world != world:
            raise Unusable(f"was made by {head.world} ranks, and there are {world}")
        if head.signature != signature:
            raise Unusable("is of another model or other optimizers")

    def forget_earlier(self, but: Path | None = None) -> int:
        """Remove what earlier processes of this job and rank left, except for one slot; how many slots that were."""
        gone = self._superseded() - {but}
        for path in gone:
            self.remove(path)
        return len(gone)

    def _superseded(self) -> set[Path]:
        """Slots of earlier processes of this job and rank that are of no use once this one has a state of its own."""
        earlier = list(self._earlier())
        stay = {file.slot for file in earlier if self.keeps_held and file.seal.startswith(_HELD)}
        return {file.slot for file in earlier} - stay

    def _left_behind(self) -> int:
        """Bytes of those slots."""
        return sum(path.stat().st_blocks * _BLOCK for path in self._superseded() if path.exists())

    def supersede(self) -> None:
        """What earlier processes left is not needed any more, the moments of which there are copies included."""
        if self.keeps_held:
            self.keeps_held = False
            self.forget_earlier()
            self._forget_copies()

    def _forget_copies(self) -> None:
        """Remove what earlier processes of this rank kept for others, and of ranks that are not on this host now."""
        for file in list(self._left()):
            maker = file.rank if file.keeper is None else file.keeper
            gone = maker >= self._count or (self.here is not None and maker not in self.here)
            if (file.keeper == self._rank) or (gone and not file.owner.alive()):
                self.remove(file.slot)

    def _earlier(self) -> Iterator[FileName]:
        """Files of this job and rank that are not this shelf's; what was interrupted in its writing counts as well."""
        return (file for file in self._left() if file.rank == self._rank and file.keeper is None)

    def _left(self) -> Iterator[FileName]:
        """Files of this job that are not this shelf's."""
        return (
            file
            for file in files(self.folder)
            if file.job == self._job and not (file.owner == self._owner and file.number > self._first)
        )

    # ------------------------------------------------------------------ the end

    def close(self, keep: bool) -> None:
        """The memory has been given back. Idempotent.

        Args:
            keep: Leave the files for a process that is started again; otherwise remove all of this job and rank, and
                those of ranks that the job no longer has.
        """
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        if keep or os.getpid() != self._pid:  # a forked child's copy of this object
            return
        self.keeps_held = False
        self.forget_earlier()
        self._forget_copies()
        self.discard()

    def discard(self) -> None:
        """Remove the files of this process."""
        for path in [*(arena.path for arena in [*self._arenas, *self._kept]), *self._landed]:
            self.remove(path)
        self._arenas, self._kept, self._landed = [], [], []

    def remove(self, slot: Path | None) -> None:
        """Remove a slot of this job, with its seals."""
        if slot is None:
            return
        self.unseal(slot)
        slot.unlink(missing_ok=True)
        self._last.pop(slot, None)
        self._kept = [arena for arena in self._kept if arena.path != slot]

    def unseal(self, slot: Path) -> None:
        """Remove the seals of a slot: it is of no use without one, and a seal without a slot had to be explained."""
        for path in slot.parent.glob(f"{slot.name}.*"):
            path.unlink(missing_ok=True)

    def _check_folder(self) -> None:
        where = f"rank {self._rank}: persist=SharedMemory(folder='{self.folder}')"
        if not self.folder.is_dir():
            raise ValueError(f"{where}: there is no such folder; name one in memory, such as /dev/shm")
        try:
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(f"{where}: it cannot be written to ({error}); name one that can") from error


def remove_stale(folder: Path, job: str) -> list[Path]:
    """Remove this user's files of other jobs that nobody will come back for.

    Args:
        folder: Where.
        job: Whose files are left alone.

    Returns:
        What was removed.
    """
    gone = [file.path for file in files(folder) if file.job != job and not file.owner.may_return()]
    for path in gone:
        path.unlink(missing_ok=True)
    return gone


_open: set[Shelf] = set()


def _interrupted() -> bool:
    """Whether the interpreter ends because of an exception that nobody caught."""
    return getattr(sys, "last_exc", None) is not None or getattr(sys, "last_value", None) is not None


@atexit.register
def _close_open() -> None:
    for shelf in tuple(_open):
        shelf.close(keep=_interrupted())
