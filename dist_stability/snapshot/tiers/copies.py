"""Copies of the slots of other ranks, as files like theirs in this rank's folder in shared memory.

``dist_stability.<user>.<job>.r<rank>.k<keeper>.<owner>.<number>`` is the copy of a slot of ``rank`` that ``keeper``
made; its seal has the same name and ``.a``. Two files for each rank: one with the last good copy, and one for the next.
A file has a seal only while the bytes under it are whole and right.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..arena import Arena
from ..digest import entry_digests
from . import record
from .form import pieces_in
from .record import Head, Unusable
from .shared_memory import Shelf


class Copies:
    """What one rank keeps for others.

    Args:
        shelf: Of this rank; removes the files at its end.
    """

    def __init__(self, shelf: Shelf) -> None:
        """Nothing is kept yet."""
        self._shelf = shelf
        self._good: dict[int, Arena] = {}
        self._next: dict[int, Arena] = {}
        self._sealed: set[int] = set()

    def room(self, rank: int, nbytes: int) -> torch.Tensor:
        """Memory for the next copy of a rank: that of the one before the last good one.

        Raises:
            SnapshotError: There is not that much memory.
        """
        arena = self._next.pop(rank, None)
        self._sealed.discard(rank)
        if arena is not None and arena.data.numel() < nbytes:
            self._shelf.remove(arena.path)
            arena.close()
            arena = None
        if arena is None:
            arena = self._shelf.make_copy(rank, nbytes)
        assert arena.path is not None
        self._next[rank] = arena
        self._shelf.unseal(arena.path)
        arena.begin_fill()
        return arena.data[:nbytes]

    def seal(self, rank: int, head: Head, body: bytes) -> None:
        """The bytes are there: compare them with their digests, and make the copy findable.

        Raises:
            Unusable: They are not what was sealed.
            OSError: No room for the seal.
        """
        seal(self._next[rank], head, body)
        self._sealed.add(rank)

    def agreed(self) -> None:
        """All ranks have all copies of this moment: those before may go."""
        for rank in self._sealed:
            arena = self._next.pop(rank)
            if rank in self._good:
                self._next[rank] = self._good[rank]
            self._good[rank] = arena
        self._sealed.clear()


def seal(arena: Arena, head: Head, body: bytes) -> tuple[Head, bytes]:
    """Seal a slot that came from another rank, if its bytes are right; the seal.

    Raises:
        Unusable: They are not what was sealed there.
        OSError: No room for the seal.
    """
    check(body, arena.data[: head.nbytes])
    assert arena.path is not None
    own = replace(head, fill=arena.fill)
    record.write(arena.path.with_name(f"{arena.path.name}.a"), own, body, lambda: None)
    return own, body


def check(body: bytes, data: torch.Tensor) -> None:
    """Compare the bytes of a slot with the digests in its seal.

    Raises:
        Unusable: They differ, or the seal does not say what lies where.
    """
    said = record.loads(body)
    pieces = pieces_in(record.loads(said["form"]), said["starts"], data)
    wrong = (entry_digests([piece for _, piece in pieces]) != said["sums"]).nonzero().flatten().tolist()
    if wrong:
        raise Unusable(f"is damaged: {', '.join(pieces[index][0] for index in wrong[:3])}")
