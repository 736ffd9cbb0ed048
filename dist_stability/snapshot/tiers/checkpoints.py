"""Checkpoints on disk, written from the slots beside the training: ordinary folders of torch.distributed.checkpoint.

::

    folder/attempt-00000120/                       under this name only when it is whole and was read back
        .metadata, __0_0.distcp, __1_0.distcp ...  model and optimizer (dcp.py)
        rank-00000.state, rank-00001.state ...     the rest of each rank, as its seal has it (record.py)
        manifest.json                              whose it is, and a digest of every file
    folder/.attempt-00000240.<process>.partial/    being written, or left by a process that died
    folder/set-aside-attempt-00000480/             of a run that this one does not continue; nobody looks there

Every rank needs to see the same folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arena import Arena
from ..catalogue import Catalogue, Wanted
from . import record
from .form import At
from .manifest import NAME, Manifest, attempts, file_digest, read_manifest, surplus, write_manifest
from .processes import Owner
from .record import Head, Unusable, loads
from .tier import Delivery, Found, Listing, Whole

if TYPE_CHECKING:
    from .courier import Channel

_METADATA = ".metadata"
_PARTIAL = re.compile(r"\.attempt-.*\.(?P<owner>p\d.+)\.partial")
_FOREIGN = 24 * 3600.0
"""Seconds after which what another host was writing, and does not touch any more, counts as left behind."""


@dataclass(frozen=True)
class Checkpoints:
    """Write a checkpoint of the committed state every so often, beside the training.

    Args:
        folder: Where; made if it is not there. All ranks must see the same.
        every: Attempts from one to the next.
        keep: How many stay, >= 1. One is removed only when as many newer ones have been read back and are sound.
        job: Name of the run. If given, those of another one are not gone on with.

    Raises:
        ValueError: A number that makes no sense.
    """

    folder: str | os.PathLike[str]
    every: int = 100
    keep: int = 3
    job: str = ""

    def __post_init__(self) -> None:
        """Check."""
        object.__setattr__(self, "folder", Path(self.folder))
        for name, value in (("every", self.every), ("keep", self.keep)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"persist=Checkpoints({name}={value!r}): expected a whole number of 1 or more")


@dataclass(frozen=True)
class _Stored:
    """A checkpoint, as one moment of this rank, or as a source of boxes for any rank.

    Attributes:
        tier: Its name.
        manifest: Of it.
        place: Among all ranks, of the one whose file is used: this one, or the first where this one has none.
    """

    tier: str
    manifest: Manifest
    place: int

    @property
    def state(self) -> str:
        """The file of that rank."""
        return _state(self.place)

    @cached_property
    def _read(self) -> tuple[Head, bytes]:
        return record.read(self.manifest.path / self.state)

    @property
    def head(self) -> Head:
        """What it is chosen by."""
        return self.manifest.head

    @property
    def body(self) -> bytes:
        """Of that rank; Unusable if it cannot be read."""
        return self._read[1]

    def open(self) -> Arena:
        """The bytes of this rank's slot, read back together.

        Raises:
            Unusable: A part cannot be read.
        """
        from .dcp import Reading

        # What this rank wrote; of the little that it takes from files of others, its own digests tell.
        own = [name for name in self.manifest.files if name in (_METADATA, self.state) or _place_of(name) == self.place]
        self._sound(own)
        head, body = self._read
        catalogue: Catalogue = loads(loads(body)["where"])
        arena = Arena(head.nbytes)
        try:
            parts = [Wanted(box.key, box.shape, box.offsets, box.view(arena.data)) for box in catalogue.boxes]
            _run(Reading(self.manifest.path, parts))
        except BaseException:
            arena.close()
            raise
        return arena

    def check(self, place: int, count: int) -> None:
        """Read this rank's part of the files and compare the digests.

        Raises:
            Unusable: One of them is damaged.
        """
        self._sound(sorted(self.manifest.files)[place::count])

    def _sound(self, names: Sequence[str]) -> None:
        damaged = self.manifest.damaged(names)
        if damaged:
            raise Unusable(f"is damaged: {'; '.join(damaged[:3])}")

    def reading(self, wanted: Sequence[Wanted]) -> Callable[[], None]:
        """Plan to read parts; see :class:`Whole`."""
        from .dcp import Reading

        reading = Reading(self.manifest.path, wanted)
        return lambda: _run(reading)


def _run(reading: Any) -> None:
    try:
        reading.run()
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        raise Unusable(f"cannot be read ({type(error).__name__}: {text[0][:200]})") from error


class CheckpointFolder:
    """The checkpoints of a run: what an earlier process left, and what this one writes.

    Args:
        setting: Where and how often.
        rank: Global.
        ranks: Those that train together.

    Attributes:
        name: For messages.
        every: Of the setting.
        keeps: False: what is on disk needs no slot.
    """

    keeps = False

    def __init__(self, setting: Checkpoints, rank: int, ranks: Sequence[int]) -> None:
        """Look at the folder, and remove what dead processes left half written.

        Raises:
            ValueError: It cannot be made or written to.
        """
        self.setting, self.every = setting, setting.every
        self._folder, self._rank, self._ranks = Path(setting.folder), rank, tuple(ranks)
        self._owner = Owner.this()
        self.name = f"checkpoints in {self._folder}"
        self._sound: dict[str, bool] = {}  # by name, what this process has read
        self._newest = ""
        where = f"rank {rank}: persist=Checkpoints('{self._folder}')"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise ValueError(f"{where}: it cannot be written to ({error}); name a folder that can") from error
        if rank == self._ranks[0]:
            for path in self._left_behind():
                shutil.rmtree(path, ignore_errors=True)

    def _left_behind(self) -> Iterator[Path]:
        now = time.time()
        for path in self._folder.iterdir():
            match = _PARTIAL.fullmatch(path.name)
            owner = None if match is None else Owner.parse(match["owner"])
            if owner is None:
                continue
            here = (owner.boot, owner.namespace) == (self._owner.boot, self._owner.namespace)
            with contextlib.suppress(OSError):
                if not owner.alive() if here else now - path.stat().st_mtime > _FOREIGN:
                    yield path

    @property
    def where(self) -> str:
        """For messages: name and job."""
        return self.name + (f" (job {self.setting.job})" if self.setting.job else "")

    # ------------------------------------------------------------------ what is there

    def list(self, world: int, signature: int) -> Listing:
        """See Tier. Looks at manifests and sizes only."""
        found: list[Found] = []
        whole: list[Whole] = []
        said: list[str] = []
        for path in attempts(self._folder):
            try:
                manifest = read_manifest(path)
                head = manifest.head
                if head.job != self.setting.job:
                    raise Unusable(f"is of job {head.job!r}, and this one is {self.setting.job!r}")
                if head.signature != signature:
                    raise Unusable("is of another model, other optimizers or other parameter groups")
                missing = manifest.missing()
                if missing:
                    raise Unusable(f"is damaged: {'; '.join(missing[:3])}")
            except Unusable as error:
                said.append(f"{path.name} {error}")
                continue
            place = self._ranks.index(self._rank) if head.world == world else 0
            stored = _Stored(self.name, manifest, place)
            whole.append(stored)
            if head.world == world:
                found.append(stored)
        return Listing(found, said, whole)

    def begin(self, made: int, found: Found | None) -> None:
        """See Tier. Checkpoints of later attempts are of another course of the run: the first rank renames them."""
        if self._rank != self._ranks[0]:
            return
        moved = []
        for path in attempts(self._folder):
            match = NAME.fullmatch(path.name)
            if match is not None and int(match[1]) > made:
                with contextlib.suppress(OSError):
                    path.rename(_free(self._folder, f"set-aside-{path.name}"))
                    moved.append(path.name)
        if moved:
            warnings.warn(
                f"rank {self._rank}: {self.name}: this run begins at attempt {made}, so {', '.join(moved[:3])}"
                f"{f' and {len(moved) - 3} more' if len(moved) > 3 else ''} of an earlier one are set aside "
                "(renamed; nothing is deleted)",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self, keep: bool) -> None:
        """Checkpoints stay in any case."""

    # ------------------------------------------------------------------ writing

    def deliver(self, delivery: Delivery, channel: Channel) -> None:
        """See SlowTier: write a checkpoint, read it back, and give it its name."""
        from . import dcp

        assert delivery.slot is not None
        first, place = channel.rank == channel.first, channel.ranks.index(channel.rank)
        data = delivery.slot.memory.data
        head = replace(delivery.head, job=self.setting.job)
        made = head.made

        def begin() -> str:
            if not first:
                return ""
            partial = self._folder / f".attempt-{made:08d}.{self._owner}.partial"
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
            return partial.name

        def write() -> tuple[bytes, dict[str, tuple[int, str]]]:
            delivery.tell()
            body = loads(delivery.body)
            catalogue: Catalogue = loads(body["where"])
            values = beside(body, catalogue) if first else {}
            written = dcp.write(partial, place, channel.rank, catalogue, data, values)
            delivery.tell()
            record.write(partial / _state(place), head, delivery.body, delivery.tell, sync=True)
            files = {**written.files, _state(place): file_digest(partial / _state(place))}
            for name, known in written.files.items():
                if file_digest(partial / name) != known:
                    raise OSError(f"{name} does not read back as it was written")
            delivery.tell()
            return written.share, files

        def finish() -> str:
            if not first:
                return ""
            files = {name: known for told in everyone.values() for name, known in told.items()}
            files.update(dcp.finish(partial, [shares[rank] for rank in channel.ranks]))
            manifest = Manifest(partial, head, files)
            missing = manifest.missing()
            if missing:
                raise OSError(f"{missing[0]}: do all ranks see the same folder?")
            write_manifest(partial, head, files)
            _sync(partial)
            delivery.tell()
            path = _free(self._folder, f"attempt-{made:08d}")
            partial.rename(path)
            _sync(self._folder)
            delivery.tell()
            return path.name

        partial = self._folder
        try:
            partial = self._folder / channel.together("making a folder", begin)[channel.first]
            share = b""

            def write_own() -> dict[str, tuple[int, str]]:
                nonlocal share
                share, files = write()
                return files

            everyone = channel.together("writing", write_own)
            shares = channel.collect(share)
            self._newest = channel.together("finishing", finish)[channel.first]
        except Exception:
            if first and partial != self._folder:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self._sound[self._newest] = True

    def settle(self, channel: Channel) -> None:
        """See SlowTier: remove what is surplus, on the first rank."""
        if channel.rank != channel.first:
            return
        mine = []
        for path in attempts(self._folder):
            with contextlib.suppress(Unusable):
                head = read_manifest(path).head
                if (head.job, head.signature) == self._kind():
                    mine.append(path.name)
        mine.sort(key=lambda name: name != self._newest)  # the newest first, whatever its number
        for name in surplus(mine, self.setting.keep, self._is_sound):
            gone = self._folder / f".{name}.{self._owner}.partial"
            (self._folder / name).rename(gone)  # at once no checkpoint any more
            shutil.rmtree(gone)
            self._sound.pop(name, None)

    def _kind(self) -> tuple[str, int]:
        head = read_manifest(self._folder / self._newest).head
        return head.job, head.signature

    def _is_sound(self, name: str) -> bool:
        if name not in self._sound:
            try:
                self._sound[name] = not read_manifest(self._folder / name).damaged()
            except Unusable:
                self._sound[name] = False
        return self._sound[name]


def beside(body: Mapping[str, Any], catalogue: Catalogue) -> dict[tuple[Any, ...], Any]:
    """What a state dict has beside the tensors of a plan, by path: buffers, per-group values, states without tensors.

    Args:
        body: Of a seal.
        catalogue: Of its slot.
    """
    values: dict[tuple[Any, ...], Any] = {}
    for number, name, content in body["forward"]["buffers"]:
        if content is not None and (number, name) not in catalogue.passing:
            values["model", catalogue.buffer(number, name)] = content
    names = [group for optimizer in catalogue.parameters for group in optimizer]
    groups = [group for optimizer in body["entry"].groups for group in optimizer]
    for number, (members, group) in enumerate(zip(names, groups, strict=True)):
        for key, value in {"params": list(members), **group}.items():
            values["optimizer", "param_groups", number, key] = value
    for trees, parameters in zip(body["trees"], catalogue.parameters, strict=True):
        flat = [name for group in parameters for name in group]
        for place, _, tree in trees:
            if place is not None and isinstance(tree, dict):
                values.update(_loose(tree, ("optimizer", "state", flat[place])))
    return values


def _loose(tree: Mapping[Any, Any], path: tuple[Any, ...]) -> dict[tuple[Any, ...], Any]:
    found: dict[tuple[Any, ...], Any] = {}
    for key, item in tree.items():
        if isinstance(item, dict):
            found.update(_loose(item, (*path, str(key))))
        elif not isinstance(item, At):
            found[(*path, str(key))] = item
    return found


def _state(place: int) -> str:
    return f"rank-{place:05d}.state"


def _place_of(name: str) -> int | None:
    """Of the rank that wrote a file of torch's."""
    match = re.fullmatch(r"__(\d+)_\d+\.distcp", name)
    return None if match is None else int(match[1])


def _free(folder: Path, name: str) -> Path:
    """A name that is not taken: itself, or with a number."""
    path, number = folder / name, 1
    while path.exists():
        number += 1
        path = folder / f"{name}.{number}"
    return path


def _sync(folder: Path) -> None:
    """Down to the disk: the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
