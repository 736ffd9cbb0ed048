"""The files of ``torch.distributed.checkpoint``, written from slots and read into boxes, without its collectives.

Its planners, writer and reader do the work; who writes what follows from the catalogue, so the ranks need not plan
together, and only the first one needs to know what all have written. The keys are those of ``get_state_dict``, so that
``dcp.load`` of anybody reads the files.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from ..catalogue import Box, Catalogue, Wanted
from .manifest import DIGEST
from .record import Unusable


class Written(NamedTuple):
    """What a rank has written: plain data for the first rank, and its files.

    Attributes:
        share: Pickled, for :func:`finish`.
        files: By name, (bytes, digest).
    """

    share: bytes
    files: dict[str, tuple[int, str]]


def write(
    folder: Path,
    place: int,
    rank: int,
    catalogue: Catalogue,
    data: torch.Tensor,
    values: Mapping[tuple[Any, ...], Any],
) -> Written:
    """Write what one rank writes of a slot. Local.

    Args:
        folder: There already.
        place: Of this rank among those that train together.
        rank: Global.
        catalogue: Of the slot.
        data: Its bytes; read where they lie.
        values: What the first rank writes beside the slot, by path: tensors, and anything that can be pickled.

    Raises:
        OSError: No room, for example.
    """
    paths: dict[str, tuple[Any, ...]] = {each.key: each.path for each in catalogue.places}
    paths |= {_key(path): path for path in values}
    items, sources = [], dict[tuple[str, tuple[int, ...]], Any]()
    for box in catalogue.boxes:
        if box.owner != rank:
            continue
        kind, *name = paths[box.key]
        others = catalogue.aliases.get(name[0], ()) if kind == "model" else ()
        for path in ((kind, *name), *((kind, other) for other in others)):
            key = _key(path)
            paths[key] = path
            items.append(_item(key, box.offsets, box.sizes, box.shape, box.dtype))
            sources[key, box.offsets] = box
    for path, value in values.items():
        key = _key(path)
        if isinstance(value, torch.Tensor):
            shape = tuple(value.shape)
            items.append(_item(key, (0,) * len(shape), shape, shape, value.dtype))
            sources[key, (0,) * len(shape)] = value
        else:
            items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
            sources[key, ()] = value
    # Without copies ahead: that is for tensors on a device, and these lie on the host.
    writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
    files = _Files()
    writer.fs = files
    plan = writer.prepare_global_plan([SavePlan([])] * place + [SavePlan(items, planner_data=paths)])[place]
    try:
        results = writer.write_data(plan, _SavePlanner(sources, data)).wait()
    except Exception as error:
        raise files.failure or error from error
    return Written(pickle.dumps((plan, results)), files.written)


def finish(folder: Path, shares: Sequence[bytes]) -> dict[str, tuple[int, str]]:
    """Write the metadata, from what every rank has written. Local, on the first rank.

    Returns:
        Its file; see :class:`Written`.

    Raises:
        ValueError: The parts of some tensor overlap or leave gaps.
        OSError: No room, for example.
    """
    writer = dcp.FileSystemWriter(folder)
    files = _Files()
    writer.fs = files
    plans, results = zip(*(pickle.loads(share) for share in shares), strict=True)
    # One more plan, of nothing: whether parts leave gaps is asked only where there are several.
    _, metadata = dcp.DefaultSavePlanner().create_global_plan([*plans, SavePlan([], planner_data={})])
    writer.finish(metadata, list(results))
    return {name.removesuffix(".tmp"): known for name, known in files.written.items()}


class _SavePlanner(dcp.DefaultSavePlanner):
    """Knows where the bytes of each item are."""

    def __init__(self, sources: Mapping[tuple[str, tuple[int, ...]], Any], data: torch.Tensor) -> None:
        super().__init__()
        self._sources, self._data = sources, data

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        found = self._sources[write_item.index.fqn, tuple(write_item.index.offset or ())]
        if isinstance(found, Box):
            return found.view(self._data)
        if isinstance(found, torch.Tensor):
            return found.clone()
        buffer = io.BytesIO()
        torch.save(found, buffer)
        return buffer


def _key(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _item(
    key: str, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int], dtype: torch.dtype
) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(shape))
    return WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)


# ---------------------------------------------------------------------- files


class _Files(FileSystem):
    """Sums up what is written, and remembers what the disk said: torch's writer may tell another story of it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, tuple[int, str]] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if "w" not in mode:
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with open(path, "wb") as file:
            stream = _Summed(file, self)
            yield stream
        self.written[Path(path).name] = stream.size, stream.digest.hexdigest()


class _Summed(io.RawIOBase):
    """A file that is only written to, front to back."""

    def __init__(self, file: Any, owner: _Files) -> None:
        self._file, self._owner = file, owner
        self.size, self.digest = 0, hashlib.blake2b(digest_size=DIGEST)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self._owner.failure = error
            raise
        view = memoryview(data)
        self.size += view.nbytes
        self.digest.update(view)
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self._owner.failure = error
            raise

    def fileno(self) -> int:
        return int(self._file.fileno())

    def close(self) -> None:
        """The file is closed by whoever opened it."""


# ---------------------------------------------------------------------- reading


class Reading:
    """What is read for some parts, planned before anything is written to. Local.

    Args:
        folder: Of the checkpoint.
        wanted: The parts.
    """

    def __init__(self, folder: Path, wanted: Sequence[Wanted]) -> None:
        """Look up every part.

        Raises:
            Unusable: The checkpoint lacks a part, or has it in another shape or dtype.
        """
        self._reader = dcp.FileSystemReader(folder)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        except Exception as error:
            raise Unusable(f"has metadata that cannot be read ({error})") from error
        self._wanted = {(one.key, one.offsets): one for one in wanted}
        items: list[ReadItem] = []
        for one in wanted:
            items += _reads(self._metadata, one)
        self._plan = LoadPlan(items)

    @torch.no_grad()
    def run(self) -> None:
        """Read.

        Raises:
            Exception: A file cannot be read; some targets may be filled.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about how it loads
            self._reader.set_up_storage_reader(self._metadata, False)
            self._reader.read_data(self._plan, _LoadPlanner(self._wanted)).wait()


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Knows where the bytes of each item go."""

    def __init__(self, wanted: Mapping[tuple[str, tuple[int, ...]], Wanted]) -> None:
        super().__init__()
        self._wanted = wanted

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        found = self._wanted[read_item.dest_index.fqn, tuple(read_item.dest_index.offset or ())].target
        for dim, (first, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            found = found.narrow(dim, first, size)
        return found


def _reads(metadata: Metadata, one: Wanted) -> Iterator[ReadItem]:
    """The stored parts that overlap a wanted one; Unusable unless they make up all of it."""
    known = metadata.state_dict_metadata.get(one.key)
    if not isinstance(known, TensorStorageMetadata):
        raise Unusable(f"has no {one.key}")
    if tuple(known.size) != one.shape or known.properties.dtype != one.target.dtype:
        raise Unusable(
            f"has {one.key} as {known.properties.dtype} {tuple(known.size)} where there is {one.target.dtype} "
            f"{one.shape} now"
        )
    missing = one.target.numel()
    end = [first + size for first, size in zip(one.offsets, one.target.shape, strict=True)]
    for index, chunk in enumerate(known.chunks):
        low = [max(a, b) for a, b in zip(one.offsets, chunk.offsets, strict=True)]
        high = [min(a, b + c) for a, b, c in zip(end, chunk.offsets, chunk.sizes, strict=True)]
        lengths = [b - a for a, b in zip(low, high, strict=True)]
        if any(length <= 0 for length in lengths):
            continue
        missing -= math.prod(lengths)
        yield ReadItem(
            LoadItemType.TENSOR,
            MetadataIndex(one.key, one.offsets),
            torch.Size(a - b for a, b in zip(low, one.offsets, strict=True)),
            MetadataIndex(one.key, chunk.offsets, index),
            torch.Size(a - b for a, b in zip(low, chunk.offsets, strict=True)),
            torch.Size(lengths),
        )
    if missing:
        raise Unusable(f"lacks {missing} elements of {one.key}")
