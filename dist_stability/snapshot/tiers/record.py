"""The seal of a slot: everything a later process needs beside the slot's bytes, in one small file.

A seal is written under another name and then renamed, so there is never half of one; whatever befell it afterwards is
found out by its digest. It says which fill of which file it is about, so a slot that is being filled again has no seal
from the first byte on. Two seals of one slot are kept, the last and the one before.

Layout: ``MAGIC``, length of the head (4 bytes), the head as JSON, the body, a digest (32 bytes) of all that. The head
is what a record is chosen by; the body is a pickle and read only when all else has been checked.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ... import parallel
from ..digest import bytes_of

MAGIC = b"DSTSEAL1"
_DIGEST = 32  # bytes


class Unusable(Exception):
    """A record that cannot be used, and why, in words that follow its name."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a record is known and chosen by.

    Attributes:
        job: Of the setting.
        rank: Global rank it belongs to.
        world: Number of ranks.
        signature: Of the plan: model and optimizers.
        made: Attempts that had been made: a run goes on with attempt number ``made``.
        attempt: The commit whose state it is; -1 for the state before the first.
        history: Digest of all verdicts: tells runs apart that happen to have made as many attempts.
        fill: Of the slot's file.
        nbytes: Of the slot's data.
        written: Seconds since the epoch.
    """

    job: str
    rank: int
    world: int
    signature: int
    made: int
    attempt: int
    history: int
    fill: int
    nbytes: int
    written: float

    @property
    def key(self) -> tuple[int, int, int]:
        """Equal on all ranks for records of one moment: (made, attempt, history)."""
        return self.made, self.attempt, self.history


def write(path: Path, head: Head, body: bytes, on_chunk: Callable[[], object], sync: bool = False) -> None:
    """Write a seal; it is there whole, or not at all.

    Args:
        path: Of the seal. What is there is replaced.
        head: What it is chosen by.
        body: From :func:`dumps`.
        on_chunk: Called between the parts of the work.
        sync: Wait until the disk has it.

    Raises:
        OSError: No room, or the folder has gone.
    """
    said = json.dumps(asdict(head)).encode()
    data = b"".join((MAGIC, len(said).to_bytes(4, "little"), said, body))
    partial = path.with_name(f"{path.name}.partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        on_chunk()
        file.write(_digest(data))
        if sync:
            file.flush()
            os.fsync(file.fileno())
    on_chunk()
    partial.replace(path)


def read(path: Path) -> tuple[Head, bytes]:
    """The head and the pickled body.

    Raises:
        Unusable: Not readable, not this user's, cut short, damaged, or of another version.
    """
    try:
        if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
            raise Unusable("belongs to another user")
        data = path.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from error
    if data[: len(MAGIC)] != MAGIC:
        same = len(data) >= len(MAGIC) and data[: len(MAGIC) - 1] == MAGIC[:-1]
        raise Unusable("is of another version of this package" if same else "is cut short or damaged")
    if len(data) < len(MAGIC) + 4 + _DIGEST or _digest(data[:-_DIGEST]) != data[-_DIGEST:]:
        raise Unusable("is cut short or damaged")
    start = len(MAGIC) + 4
    end = start + int.from_bytes(data[len(MAGIC) : start], "little")
    try:
        return Head(**json.loads(data[start:end])), data[end:-_DIGEST]
    except (TypeError, ValueError) as error:
        raise Unusable("is of another version of this package") from error


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


# ---------------------------------------------------------------------- pickles


@dataclass(frozen=True, slots=True)
class Shard:
    """A DTensor without its mesh: what this rank holds, and how it was laid out."""

    local: torch.Tensor
    placements: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def dumps(value: Any) -> bytes:
    """Pickle anything; tensors, wherever they are in it, as their plain bytes, DTensors as a :class:`Shard`."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """Undo :func:`dumps`; tensors come back on the CPU."""
    return pickle.loads(data)


def fitted(saved: Any, live: Any) -> Any:
    """A tree with DTensors in place of its shards, each laid out like the tensor at the same place of a live tree.

    Raises:
        Unusable: There is no DTensor of that layout at that place.
    """
    if isinstance(saved, Shard):
        layout = parallel.wrapping(live) if isinstance(live, torch.Tensor) else None
        if layout is None or saved.placements != str(layout.placements) or saved.shape != tuple(layout.shape):
            raise Unusable(f"holds a DTensor ({saved.placements}, {saved.shape}) where there is none of that layout")
        return layout.wrap(saved.local.to(parallel.local(live).device))
    if type(saved) in (dict, OrderedDict):
        mapping = live if isinstance(live, Mapping) else {}
        return type(saved)((key, fitted(item, mapping.get(key))) for key, item in saved.items())
    if type(saved) in (list, tuple):
        same = isinstance(live, (list, tuple)) and len(live) == len(saved)
        items = [fitted(item, live[index] if same else None) for index, item in enumerate(saved)]
        return items if isinstance(saved, list) else tuple(items)
    return saved


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        layout = parallel.wrapping(value)
        plain = parallel.local(value)
        if layout is not None:
            return Shard, (plain, str(layout.placements), tuple(layout.shape), layout.stride)
        if type(plain) is not torch.Tensor or plain.layout is not torch.strided:
            raise TypeError(f"a {type(value).__name__} of layout {plain.layout} cannot be kept in a record")
        data = bytes_of(plain.cpu())
        return _tensor, (plain.dtype, tuple(plain.shape), ctypes.string_at(data.data_ptr(), data.numel()))


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape)
