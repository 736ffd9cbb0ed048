"""Which part of replicated state each rank keeps.

Ranks that hold the same entries (replicas under DDP and HSDP) each keep one n-th of them. The entries of one set of
ranks are thought of as one row of bytes; its n-th parts, cut between elements, go to the ranks in ascending order. So
every rank knows the parts of all others without asking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

CHUNK = 32 << 20
"""Bytes sent in one collective when parts are gathered."""

_ALIGNMENT = 16
"""Bytes: no element of torch is larger, so every part in a pack can be viewed in its own dtype."""


class Piece(NamedTuple):
    """A range of one entry's elements, in the order of its memory.

    Attributes:
        entry: Index of the entry.
        first: Its first element.
        last: The one after its last.
    """

    entry: int
    first: int
    last: int


def share(members: Sequence[int], sizes: Sequence[int], itemsizes: Sequence[int], rank: int, ranks: int) -> list[Piece]:
    """What one of several ranks keeps.

    Args:
        members: Indices of the entries, in an order all ranks have.
        sizes: Elements of every entry, by index.
        itemsizes: Bytes of one element of every entry, by index.
        rank: Its place among the ranks.
        ranks: Number of ranks.

    Returns:
        Without empty pieces. Over all ranks every element is in exactly one.
    """
    total = sum(sizes[index] * itemsizes[index] for index in members)
    begin, end = total * rank // ranks, total * (rank + 1) // ranks
    found, offset = [], 0
    for index in members:
        first, last = (min(max(-((offset - limit) // itemsizes[index]), 0), sizes[index]) for limit in (begin, end))
        if first < last:
            found.append(Piece(index, first, last))
        offset += sizes[index] * itemsizes[index]
    return found


@dataclass(frozen=True, slots=True)
class Pack:
    """Pieces that are sent together.

    Attributes:
        pieces: At most CHUNK bytes of them.
        starts: Where each lies, in bytes.
        nbytes: Bytes of the whole.
    """

    pieces: tuple[Piece, ...]
    starts: tuple[int, ...]
    nbytes: int


def packs(pieces: Sequence[Piece], itemsizes: Sequence[int], most: int | None = None) -> Iterator[Pack]:
    """Pieces in packs, in order, large ones cut.

    Args:
        pieces: From :func:`share`.
        itemsizes: Bytes of one element of every entry, by index.
        most: Bytes of a pack; CHUNK by default.
    """
    most = CHUNK if most is None else most
    waiting: list[Piece] = []
    starts: list[int] = []
    end = 0
    for entry, first, last in pieces:
        size = itemsizes[entry]
        while first < last:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            fitting = (most - start) // size
            if fitting <= 0 and waiting:
                yield Pack(tuple(waiting), tuple(starts), end)
                waiting, starts, end = [], [], 0
                continue
            stop = min(last, first + max(fitting, 1))
            waiting.append(Piece(entry, first, stop))
            starts.append(start)
            end = start + (stop - first) * size
            first = stop
    if waiting:
        yield Pack(tuple(waiting), tuple(starts), end)
