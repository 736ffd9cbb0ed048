"""Carries sealed slots to slower tiers, beside the training: one thread and one gloo group that nobody else uses.

Lifecycle of a delivery. ``offer`` (training thread, at a seal) holds the slot in the ring and queues it, at the same
attempts on every rank. The thread takes one after the other: all ranks agree that it is of the same moment and that
each has something sound, ``tier.deliver`` runs on all of them, and all agree that it worked. Only then it is *good*.
The training thread learns of it at the next ``offer`` or ``poll`` and lets the slot go; a tier that ``keeps`` holds the
good one until the next one is good.

At most one delivery of a tier is under way. If the next is due before that is over, the training waits: all ranks do,
as they end a delivery together.

What fails is told as a warning, by the training thread, and the next due delivery is tried. If the group is broken (a
rank died, or did not come), there are no more. The thread never waits for ever: it asks every half second whether it is
to stop, so that the process can end.
"""

from __future__ import annotations

import atexit
import ctypes
import pickle
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ...errors import LockstepError
from ..ring import SlotRing
from .record import Unusable
from .tier import Delivery, SlowTier

T = TypeVar("T")

NOTICE = 0.5
"""Seconds the training waits for the background before it says so."""

PATIENCE = 600.0
"""Seconds that ranks wait for each other in the background: a slow disk may hold one of them up for long."""


class Undelivered(Exception):
    """A delivery did not work, on which ranks and why; the group is as before."""


class Broken(Exception):
    """The group cannot be used any more."""


class Channel:
    """What a delivery may do with the other ranks, from the courier's thread. Alone, it is a group of one.

    Attributes:
        group: A gloo group that nobody else uses; None for a single process.
        ranks: Global ranks, in ascending order.
        rank: This one.
        first: The first of the ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, ranks: Sequence[int], rank: int) -> None:
        """Enters no collective."""
        self.group, self.ranks, self.rank, self.first = group, tuple(ranks), rank, ranks[0]
        self.stopping = threading.Event()
        self.doing = "nothing"

    def together(self, what: str, work: Callable[[], T]) -> dict[int, T]:
        """Run something on this rank, and bring what it returned on each rank to all.

        Args:
            what: For messages.
            work: What it returns is pickled, so it should be small; it enters no collective.

        Collectives: two all-gathers.

        Raises:
            Undelivered: On every rank, naming those on which it raised and what.
            Broken: A rank is gone.
        """
        self.doing = what
        try:
            mine: tuple[bool, Any] = True, work()
        except Broken:
            raise
        except Exception as error:
            mine = False, str(error) if isinstance(error, Undelivered | Unusable) else first_line(error)
        everyone = {rank: pickle.loads(data) for rank, data in self.gather(pickle.dumps(mine)).items()}
        wrong = {rank: text for rank, (fine, text) in everyone.items() if not fine}
        if wrong:
            shown = "; ".join(f"rank {rank}: {text}" for rank, text in list(wrong.items())[:4])
            raise Undelivered(f"{what}: {shown}{f' and {len(wrong) - 4} more ranks' if len(wrong) > 4 else ''}")
        return {rank: value for rank, (_, value) in everyone.items()}

    def gather(self, data: bytes) -> dict[int, bytes]:
        """The bytes of every rank, on every rank. Collectives: two all-gathers."""
        if self.group is None:
            return {self.rank: data}
        sizes, mine = self._padded(data)
        everyone = [torch.empty_like(mine) for _ in self.ranks]
        self.run(dist.all_gather, everyone, mine)
        return self._cut(everyone, sizes)

    def collect(self, data: bytes) -> dict[int, bytes]:
        """The bytes of every rank, on the first one; nothing elsewhere. Collectives: an all-gather and a gather."""
        if self.group is None:
            return {self.rank: data}
        sizes, mine = self._padded(data)
        everyone = [torch.empty_like(mine) for _ in self.ranks] if self.rank == self.first else None
        self.run(dist.gather, mine, everyone, dst=self.first)
        return {} if everyone is None else self._cut(everyone, sizes)

    def exchange(self, data: torch.Tensor, to: int | None, into: torch.Tensor, source: int | None) -> None:
        """Send bytes to one rank and receive bytes from another, all ranks at once.

        Not by ``isend`` and ``irecv``: gloo gives up such an operation when a wait for it runs out.

        Args:
            data: uint8 on the CPU, contiguous; of no elements if nothing is sent.
            to: The rank it is for.
            into: Filled with what ``source`` sends to this rank: as many bytes as that sends.
            source: The rank they come from.

        Collectives: one all-to-all.
        """
        if self.group is None:
            return
        given = [data.numel() if rank == to else 0 for rank in self.ranks]
        taken = [into.numel() if rank == source else 0 for rank in self.ranks]
        self.run(dist.all_to_all_single, into, data, taken, given)

    def _padded(self, data: bytes) -> tuple[list[int], torch.Tensor]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in self.ranks]
        self.run(dist.all_gather, sizes, torch.tensor([len(data)]))
        mine = torch.zeros(max(1, *map(int, sizes)), dtype=torch.uint8)
        if data:
            mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return [int(size) for size in sizes], mine

    def _cut(self, everyone: Sequence[torch.Tensor], sizes: Sequence[int]) -> dict[int, bytes]:
        each = zip(self.ranks, everyone, sizes, strict=True)
        return {rank: ctypes.string_at(tensor.data_ptr(), size) for rank, tensor, size in each}

    def run(self, collective: Callable[..., Any], *args: Any, **options: Any) -> None:
        """One collective of the group, from beginning to end; Broken if it does not come to that."""
        try:
            work = collective(*args, group=self.group, async_op=True, **options)
        except RuntimeError as error:
            raise Broken(f"{self.doing}: {first_line(error)}") from error
        self._wait(work)

    def _wait(self, work: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                work.wait(timedelta(seconds=0.5))
                return
            except RuntimeError as error:
                # Work.wait gives up without cancelling the operation, so it can be asked again.
                if work.is_completed():
                    try:
                        work.wait()
                        return
                    except RuntimeError as failure:
                        raise Broken(f"{self.doing}: {first_line(failure)}") from failure
                if self.stopping.is_set():
                    raise Broken(f"{self.doing}: stopped") from error
                if time.monotonic() > deadline:
                    raise Broken(f"{self.doing}: waited {PATIENCE:g} s for the other ranks") from error


@dataclass(slots=True)
class _Job:
    """One delivery. When it is done: why it failed ("" if it is good), and what else is to be said."""

    tier: SlowTier
    delivery: Delivery
    done: threading.Event
    failure: str = ""
    note: str = ""


class Courier:
    """Brings slots to slower tiers. All ranks make one together.

    Args:
        tiers: To whom.
        ring: Whose slots.
        group: Of the ranks that train together, None for all: a new one is made of these.
        ranks: They.
        rank: This one.

    Attributes:
        channel: To the other ranks.
        silent: Names ranks that were stopped or have died; asked when the training waits for long.
        timeout: Seconds after which it is asked.

    Collectives: construction makes a process group.
    """

    def __init__(
        self,
        tiers: Iterable[SlowTier],
        ring: SlotRing,
        group: dist.ProcessGroup | None,
        ranks: Sequence[int],
        rank: int,
    ) -> None:
        """Make the group; the thread starts with the first delivery."""
        mine = None
        if len(ranks) > 1:
            mine = dist.new_group(
                list(ranks),
                backend="gloo",
                timeout=timedelta(seconds=PATIENCE),
                use_local_synchronization=group is not None,
            )
        self.channel = Channel(mine, ranks, rank)
        self.silent: Callable[[], Sequence[int]] = tuple
        self.timeout = PATIENCE
        self._tiers, self._ring = tuple(tiers), ring
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._under_way: dict[int, _Job] = {}  # by place of the tier
        self._good: dict[int, Delivery] = {}  # whose slot is held still
        self._last: dict[int, int] = {}  # attempts made at the last delivery that was due
        self._said: set[tuple[int, str]] = set()
        self._thread: threading.Thread | None = None
        self._broken = ""
        self._closed = False
        _open.add(self)

    @staticmethod
    def slots(tiers: Iterable[SlowTier]) -> int:
        """How many slots the ring needs beside its own: one under way for each tier, and one that it keeps."""
        return sum(2 if tier.keeps else 1 for tier in tiers)

    def start_at(self, made: int) -> None:
        """The run begins with so many attempts made: what was due before is not delivered."""
        self._last = dict.fromkeys(range(len(self._tiers)), made)

    def due(self, made: int) -> list[SlowTier]:
        """The tiers that want a state of this moment; the same on every rank. To be asked once for each moment."""
        if self._broken:
            return []
        return [tier for place, tier in enumerate(self._tiers) if self._due(place, made)]

    def _due(self, place: int, made: int) -> bool:
        return made // self._tiers[place].every > self._last.get(place, 0) // self._tiers[place].every

    def offer(self, delivery: Delivery, now: bool = False) -> None:
        """Queue a slot for every tier that is due. On all ranks at the same attempts, also if this one has no slot.

        Waits for a delivery of the same tier that is still under way.

        Args:
            delivery: What is brought.
            now: To every tier that was not offered it, due or not.

        Raises:
            LockstepError: That does not end.
        """
        for place, tier in enumerate(self._tiers):
            wanted = self._last.get(place) != delivery.head.made if now else self._due(place, delivery.head.made)
            if self._broken or not wanted:
                continue
            self._last[place] = delivery.head.made
            if place in self._under_way:
                self._await(place)
                if self._broken:
                    return
            if delivery.slot is not None:
                self._ring.hold(delivery.slot)
            job = self._under_way[place] = _Job(tier, delivery, threading.Event())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
                self._thread.start()
            self._queue.put(job)

    def poll(self) -> None:
        """Learn what has ended: let slots go, warn of what failed. Training thread; enters no collective."""
        for place in [place for place, job in self._under_way.items() if job.done.is_set()]:
            self._finish(place)

    def flush(self) -> None:
        """Wait for what is under way; a failure is a warning.

        Raises:
            LockstepError: That does not end.
        """
        for place in list(self._under_way):
            self._await(place, expected=True)

    def _await(self, place: int, expected: bool = False) -> None:
        job = self._under_way[place]
        if not job.done.is_set():
            begin = time.monotonic()
            # The thread gives up when its waits for other ranks run out; a disk that does not answer never ends. A slow
            # disk is waited for, a rank that was stopped is not.
            while not job.done.wait(0.75 * self.timeout) and time.monotonic() - begin < 2 * PATIENCE:
                silent = tuple(self.silent())
                if silent and not job.done.is_set():
                    raise LockstepError(
                        f"rank {self.channel.rank}, attempt {job.delivery.head.made}: waited {self.timeout:g} s for "
                        f"{job.tier.name}; ranks {list(silent)} are silent: stopped or dead. Restart the job",
                        ranks=silent,
                        step=job.delivery.head.made,
                    )
            if not job.done.is_set():
                raise LockstepError(
                    f"rank {self.channel.rank}, attempt {job.delivery.head.made}: {job.tier.name} was not written "
                    f"within {2 * PATIENCE:g} s (in: {self.channel.doing}); the disk or the network does not answer",
                    ranks=(self.channel.rank,),
                    step=job.delivery.head.made,
                )
            waited = time.monotonic() - begin
            if waited > NOTICE and not expected:
                self._say(
                    place,
                    "slow",
                    f"training waited {waited:.1f} s for {job.tier.name} of attempt {job.delivery.head.made}, which "
                    f"was still under way when the next was due: raise every= (now {job.tier.every})",
                )
        self._finish(place)

    def _finish(self, place: int) -> None:
        job = self._under_way.pop(place)
        slot = job.delivery.slot
        if job.failure:
            if slot is not None:
                self._ring.drop(slot)
            kind = "broken" if self._broken else f"attempt {job.delivery.head.made}"
            last = " No more are tried in this run." if self._broken else " The one before stays."
            self._say(place, kind, f"{job.tier.name}: attempt {job.delivery.head.made} failed ({job.failure}).{last}")
            return
        if job.note:
            self._say(place, f"attempt {job.delivery.head.made}", f"{job.tier.name}: {job.note}")
        before = self._good.pop(place, None)
        if before is not None and before.slot is not None:
            self._ring.drop(before.slot)
        if job.tier.keeps:
            self._good[place] = job.delivery
        elif slot is not None:
            self._ring.drop(slot)

    def _say(self, place: int, kind: str, text: str) -> None:
        if (place, kind) not in self._said:
            self._said.add((place, kind))
            warnings.warn(f"rank {self.channel.rank}: {text}", RuntimeWarning, stacklevel=2)

    def close(self, wait: bool) -> None:
        """End the thread and give the group back. Idempotent.

        Args:
            wait: For what is under way, as at the end of an ordinary run on all ranks; otherwise it is given up.
        """
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        if wait:
            for job in self._under_way.values():
                job.done.wait(2 * PATIENCE)
        self.channel.stopping.set()
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(None if wait else 10.0)
        self.poll()
        for delivery in self._good.values():
            if delivery.slot is not None:
                self._ring.drop(delivery.slot)
        self._good.clear()
        group, self.channel.group = self.channel.group, None
        stuck = self._thread is not None and self._thread.is_alive()
        if group is not None and not self._broken and not stuck and dist.is_initialized():
            dist.destroy_process_group(group)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                if self._broken or self.channel.stopping.is_set():
                    job.failure = self._broken or "stopped"
                else:
                    self._deliver(job)
            except Undelivered as error:
                job.failure = str(error)
            except BaseException as error:
                # Whatever it is, the other ranks may be anywhere in the protocol now.
                self._broken = job.failure = str(error) if isinstance(error, Broken) else first_line(error)
            if not job.failure:
                self._settle(job)
            job.done.set()

    def _deliver(self, job: _Job) -> None:
        """See the module. Raises Undelivered on every rank alike, anything else only where the group is lost."""
        channel, delivery = self.channel, job.delivery

        def ready() -> tuple[int, int, int]:
            if delivery.slot is None:
                raise Undelivered("this rank has no sound copy of that state")
            damaged = delivery.slot.verify()
            if damaged:
                raise Undelivered(f"its copy in memory is damaged: {', '.join(damaged[:3])}")
            return delivery.head.key

        keys = channel.together("beginning", ready)
        if len(set(keys.values())) > 1:
            raise Broken(f"the ranks are at different moments: {keys}")
        job.tier.deliver(delivery, channel)
        delivery.tell()
        channel.together("the last agreement", lambda: None)

    def _settle(self, job: _Job) -> None:
        try:
            job.tier.settle(self.channel)
        except Broken as error:
            self._broken = str(error)
        except Exception as error:
            job.note = f"what attempt {job.delivery.head.made} replaces could not be removed ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """An exception for messages."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


_open: set[Courier] = set()


@atexit.register
def _close_open() -> None:
    for courier in tuple(_open):
        courier.close(wait=False)
