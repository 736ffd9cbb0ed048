"""Peer copies: each rank's slot also in the shared memory of another host, so that one lost host loses nothing.

**Copying.** At every due attempt each rank sends the slot it has just sealed to its keeper (hosts.py), in the
background, from the slot's memory into a file of the keeper (copies.py), which compares it with its digests before it
seals it. Only when all ranks have said that this worked is the moment *good*; until then the good one before stays, as
copies and as the ranks' own slots with a seal of their own. So all ranks, or their keepers, have one moment in common
whichever host is lost whenever.

**Resuming.** All ranks tell which moments they have, of whom. :class:`Sources` chooses the newest that can be had of
everyone; who has his own record of it uses that, the others are sent theirs.
"""

from __future__ import annotations

import builtins
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..arena import Arena, FoundArena
from ..catalogue import Box, Wanted
from . import record
from .assembly import Assembly, spread
from .copies import Copies, check, seal
from .courier import Broken, Channel, Undelivered
from .hosts import keepers, this_host
from .parcels import Parcel, send
from .record import Head, Unusable, loads
from .shared_memory import Record, Shelf
from .tier import Delivery, Found, Key, Listing


@dataclass(frozen=True)
class PeerCopies:
    """Keep a copy of each rank's slot in the shared memory of another host: the job outlives the loss of any one host.

    Beside :class:`SharedMemory`, whose folder and job are used.

    Args:
        every: Attempts from one copy to the next.
        host: Name of this host, the same on its ranks and on no other host; by default the id of its boot, which the
            containers of one machine have in common.

    Raises:
        ValueError: ``every`` is not positive.
    """

    every: int = 10
    host: str = ""

    def __post_init__(self) -> None:
        """Check the arguments."""
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"persist=PeerCopies(every={self.every!r}): expected a number of attempts, 1 or more")


class Peers:
    """This rank's part in the copies: a tier that the courier brings slots to.

    Args:
        setting: Of the controller.
        shelf: Of this rank.

    Attributes:
        every: Attempts from one copy to the next.
    """

    name = "peer copies"
    where = "copies on other hosts"
    keeps = True

    def __init__(self, setting: PeerCopies, shelf: Shelf) -> None:
        """Enters no collective."""
        self.every = setting.every
        self.host = setting.host or this_host()
        self._shelf = shelf
        self._keepers: dict[int, int] = {}
        self._copies = Copies(shelf)
        self._good: Path | None = None
        self._next: Path | None = None
        self._listing = Listing([], [])
        shelf.keeps_held = True

    def join(self, hosts: Mapping[int, str]) -> None:
        """Find out who keeps whose copy.

        Args:
            hosts: The host of each rank that trains with this one.
        """
        self._keepers = keepers(hosts)
        self._shelf.awaits_copies = bool(self._keepers)
        self._shelf.here = frozenset(rank for rank, host in hosts.items() if host == hosts[self._shelf.rank])
        if not self._keepers:
            self.every = sys.maxsize
            if self._shelf.rank == min(hosts):
                warnings.warn(
                    f"persist=PeerCopies(): there is one host only (ranks: {len(hosts)}), and copies would be lost "
                    "with it: none are made. If there are more, give the ranks of each a name: PeerCopies(host=...)",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def deliver(self, delivery: Delivery, channel: Channel) -> None:
        """Send the slot to this rank's keeper, and take those this rank is to keep. See SlowTier."""
        self._forget(self._next)
        head, slot = delivery.head, delivery.slot
        assert slot is not None and slot.memory.path is not None
        path, data = slot.memory.path, slot.memory.data[: head.nbytes]
        seals: dict[int, tuple[Head, bytes]] = {}

        def give() -> dict[int, Parcel]:
            self._next = self._shelf.hold(path, head, delivery.body)
            return {self._keepers[channel.rank]: Parcel(record.encoded(head, delivery.body), data)}

        def room(rank: int, text: bytes, nbytes: int) -> torch.Tensor:
            taken, _ = seals[rank] = record.decoded(text)
            if (taken.job, taken.rank, taken.key) != (head.job, rank, head.key):
                raise Unusable(f"rank {rank} sent attempt {taken.made} of rank {taken.rank}, not {head.made}")
            return self._copies.room(rank, nbytes)

        def keep() -> None:
            for rank, (taken, body) in seals.items():
                delivery.tell()
                self._copies.seal(rank, taken, body)

        send(channel, self._keepers.items(), give, room, delivery.tell)
        channel.together("the copies' digests", keep)

    def settle(self, channel: Channel) -> None:
        """All ranks have this moment; the one before is not needed any more. See SlowTier."""
        self._forget(self._good)
        self._good, self._next = self._next, None
        self._copies.agreed()
        self._shelf.supersede()

    def _forget(self, held: Path | None) -> None:
        if held is not None:
            held.unlink(missing_ok=True)

    # ------------------------------------------------------------------ resuming

    def collect(self, channel: Channel, signature: int) -> builtins.list[str]:
        """Find out what there is, and send the newest common moment to the ranks that lack it. All ranks together.

        Of as many ranks as now. What other numbers of ranks left stays where it is, and is listed if it is complete.

        Args:
            channel: Of the courier.
            signature: Of the plan.

        Returns:
            What is to be said about it, the same on all ranks.

        Raises:
            Broken: A rank is gone.
        """
        world = len(channel.ranks)
        here: dict[int, dict[int, dict[Key, Record]]] = {}  # by number of ranks, rank and moment
        said: builtins.list[str] = []
        for rank in self._shelf.ranks():
            records, why = self._shelf.records(None, signature, rank)
            for one in reversed(records):
                here.setdefault(one.head.world, {}).setdefault(rank, {})[one.head.key] = one
            said += why if rank != self._shelf.rank else []
        mine = {size: {rank: sorted(keys) for rank, keys in of.items()} for size, of in here.items()}
        told: dict[int, Any] = {
            rank: pickle.loads(data) for rank, data in channel.gather(pickle.dumps((mine, said[:4]))).items()
        }
        notes = [f"rank {rank}: {text}" for rank, (_, texts) in told.items() for text in texts]

        def sources(size: int, ranks: Sequence[int]) -> Sources:
            return Sources({rank: has.get(size, {}) for rank, (has, _) in told.items()}, ranks)

        found = self._bring(channel, sources(world, channel.ranks), here.get(world, {}), notes)
        newest = None if found is None else found[0]
        whole = []
        for size in sorted({size for has, _ in told.values() for size in has} - {world}):
            others = sources(size, range(size))
            while (choice := others.newest()) is not None and (newest is None or choice[0] > newest):
                whole.append(self._scattered(channel, *choice, here.get(size, {})))
                others.drop(choice[0])
        self._listing = Listing([found[1]] if found is not None and found[1] is not None else [], [], whole)
        return notes

    def _bring(
        self, channel: Channel, sources: Sources, here: Mapping[int, Mapping[Key, Record]], notes: builtins.list[str]
    ) -> tuple[Key, Record | None] | None:
        """The newest moment that could be brought together, and this rank's record if it was sent one."""
        while (choice := sources.newest()) is not None:
            key, holders = choice
            sent = {rank: holder for rank, holder in holders.items() if holder != rank}
            try:
                found = None
                if sent:
                    found = bring(
                        channel, self._shelf, holders, {rank: keys[key] for rank, keys in here.items() if key in keys}
                    )
                    notes += [f"rank {rank}'s from rank {holder}" for rank, holder in sent.items()]
                return key, found
            except Undelivered as error:
                notes.append(f"attempt {key[0]}: {error}")
                sources.drop(key)
        return None

    def _scattered(
        self, channel: Channel, key: Key, holders: Mapping[int, int], here: Mapping[int, Mapping[Key, Record]]
    ) -> Scattered:
        """A moment of another number of ranks. All ranks together."""
        mine = {rank: here[rank][key] for rank, holder in holders.items() if holder == channel.rank}
        catalogues = {rank: loads(loads(one.body)["where"]) for rank, one in mine.items()}
        told = (
            {rank: (one.boxes, one.problem) for rank, one in catalogues.items()},
            (mine[0].head, mine[0].body) if 0 in mine else None,
        )
        everyone = [pickle.loads(data) for data in channel.gather(pickle.dumps(told)).values()]
        head, body = next(first for _, first in everyone if first is not None)
        boxes = {
            rank: [box for box in found if box.owner == rank and box.nbytes]
            for has, _ in everyone
            for rank, (found, _) in has.items()
        }
        return Scattered(channel, head, body, holders, mine, boxes)

    def list(self, world: int, signature: int) -> Listing:
        """What :meth:`collect` found. See Tier."""
        return self._listing

    def begin(self, made: int, found: Found | None) -> None:
        """See Tier: what earlier processes left goes when there are new copies, or when none will be."""
        self._listing = Listing([], [])

    def close(self, keep: bool) -> None:
        """See Tier: the shelf removes the files."""


@dataclass(frozen=True)
class Scattered:
    """One moment of another number of ranks, whose records lie here and there. See Whole.

    Attributes:
        channel: Of the courier.
        head: Of the first rank.
        body: Of the first rank.
        holders: By earlier rank, who has its record now.
        mine: The records of this rank, by earlier rank.
        boxes: What is in all of them, by earlier rank.
    """

    channel: Channel
    head: Head
    body: bytes
    holders: Mapping[int, int]
    mine: Mapping[int, Record]
    boxes: Mapping[int, Sequence[Box]]

    def check(self, place: int, count: int) -> None:
        """See Whole: each rank looks at those it has."""
        for rank, one in self.mine.items():
            found = one.open()
            try:
                check(one.body, found.data)
            except Unusable as error:
                raise Unusable(f"has a record of rank {rank} that {error}") from error
            finally:
                found.close()

    def reading(self, wanted: Sequence[Wanted]) -> Callable[[], None]:
        """See Whole. What it gives is called by all ranks together."""
        assembly = Assembly(wanted, (box for boxes in self.boxes.values() for box in boxes))

        def read() -> None:
            opened = {rank: one.open() for rank, one in self.mine.items()}
            spread(self.channel, self.holders, self.boxes, {rank: one.data for rank, one in opened.items()}, assembly)
            for one in opened.values():
                one.close()

        return read


class Sources:
    """Where the record of each rank of each moment is to be had; the same on all ranks.

    Args:
        told: What each rank has: by rank, for each rank whose records they are, the moments.
        ranks: Whose records are needed.
    """

    def __init__(self, told: Mapping[int, Mapping[int, Sequence[Key]]], ranks: Sequence[int]) -> None:
        """Put them in order: a rank's own first."""
        self._ranks = tuple(ranks)
        self._of: dict[Key, dict[int, list[int]]] = {}
        for holder in sorted(told):
            for rank, keys in told[holder].items():
                for key in keys:
                    self._of.setdefault(key, {}).setdefault(rank, []).append(holder)
        for holders in self._of.values():
            for rank, having in holders.items():
                having.sort(key=lambda holder, rank=rank: (holder != rank, holder))  # type: ignore[misc]

    def newest(self) -> tuple[Key, dict[int, int]] | None:
        """The newest moment that all ranks' records can be had of, and from whom each; None if there is none."""
        for key in sorted(self._of, reverse=True):
            holders = self._of[key]
            if all(holders.get(rank) for rank in self._ranks):
                return key, {rank: holders[rank][0] for rank in self._ranks}
        return None

    def drop(self, key: Key) -> None:
        """A record of this moment was no good."""
        del self._of[key]


def bring(
    channel: Channel,
    shelf: Shelf,
    holders: Mapping[int, int],
    records: Mapping[int, Record],
) -> Record | None:
    """Send records to the ranks that lack theirs. All ranks together.

    Args:
        channel: Of the courier.
        shelf: Of this rank.
        holders: By rank, who has its record.
        records: What this rank has of the moment, by rank whose record it is.

    Returns:
        This rank's record if it was sent one: in a file of its own, as if it had been left there.

    Raises:
        Undelivered: On every rank: it did not work on some rank.
        Broken: A rank is gone.
    """
    me = channel.rank
    opened: list[FoundArena] = []
    taken: list[tuple[Head, bytes, Arena]] = []

    def give() -> dict[int, Parcel]:
        parcels = {}
        for rank in (rank for rank, holder in holders.items() if holder == me != rank):
            found, one = records[rank].open(), records[rank]
            opened.append(found)
            parcels[rank] = Parcel(record.encoded(one.head, one.body), found.data)
        return parcels

    def room(_: int, text: bytes, nbytes: int) -> torch.Tensor:
        head, body = record.decoded(text)
        arena = shelf.land(nbytes)
        taken.append((head, body, arena))
        arena.begin_fill()
        return arena.data

    def keep() -> list[Record]:
        if holders[me] == me:  # all or nobody: what the others were sent is of no use without this one
            own = records[me].open()
            check(records[me].body, own.data)
            own.close()
        return [Record(*seal(arena, head, body), arena.path) for head, body, arena in taken if arena.path is not None]

    found: list[Record] = []
    try:
        send(channel, [(holder, rank) for rank, holder in holders.items() if holder != rank], give, room, lambda: None)
        channel.together("the digests of what was sent", lambda: found.extend(keep()))
    except (Undelivered, Broken):
        for _, _, arena in taken:
            shelf.remove(arena.path)
        raise
    finally:
        for each in opened:
            each.close()
        for _, _, arena in taken:
            arena.close()
    return found[0] if found else None
