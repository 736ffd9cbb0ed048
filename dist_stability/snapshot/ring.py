"""The last few snapshots: the last committed state, older anchors, and one slot to fill.

A committed slot may still be on its way to the host. Until its bytes are there, the safe slot before it stays VALID and
is not filled again.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import SnapshotError
from .arena import Memory
from .copier import Copier, HostWork
from .slot import Slot, SlotState


class SlotRing:
    """Owns ``2 + anchors + spare`` slots and knows what each is for. A slot can be the safe one and an anchor at once.

    Attributes:
        safe: The last committed state; raises before the first commit.
        anchors: Older committed states for a deep rollback, oldest first; after one, several may be the same slot.
    """

    def __init__(
        self, anchors: int, copier: Copier | None = None, spare: int = 0, source: Memory | None = None
    ) -> None:
        """Make the slots; memory comes with the first fill of each.

        Args:
            anchors: How many older states are kept, >= 0.
            copier: Moves the bytes; by default everything on the CPU is done at once.
            spare: Slots beyond those, >= 0, for what is held; a sealed state stays the longer for them.
            source: Where the memory of the slots comes from.
        """
        self._kept = anchors
        self._copier = Copier(HostWork.NONE) if copier is None else copier
        self._slots: list[Slot] = []
        self._slots += [Slot(self._copier, self._slots, source) for _ in range(2 + anchors + spare)]
        self._safe: Slot | None = None
        self._before: Slot | None = None  # safe until the bytes of the safe one are there
        self._guests: list[Slot] = []  # held for somebody else; as often as that
        self._pinned: Slot | None = None
        self.anchors: list[Slot] = []

    @property
    def safe(self) -> Slot:
        """See the class."""
        if self._safe is None:
            raise SnapshotError("nothing was committed yet, so there is nothing to go back to")
        return self._safe

    @property
    def size(self) -> int:
        """Number of slots."""
        return len(self._slots)

    @property
    def has_safe(self) -> bool:
        """Whether anything was committed yet."""
        return self._safe is not None

    def begin(self) -> Slot:
        """A slot to fill: one that is neither safe nor an anchor. What an interrupted fill left in it is given up.

        Among several, that which a later process would miss least: not sealed, else sealed the longest ago.

        Raises:
            SnapshotError: The copy of the safe one failed, and there is no other slot.
        """
        self._let_go()
        if all(self._in_use(slot) for slot in self._slots):
            self.safe.assure()
            self._before = None
        free = [slot for slot in self._slots if not self._in_use(slot)]
        slot = min(free, key=lambda slot: -1 if slot.sealed is None else slot.sealed)
        slot.release()
        return slot

    def commit(self, slot: Slot, as_anchor: bool = False) -> None:
        """Make a published slot the safe one, and the newest anchor if asked to.

        Raises:
            SnapshotError: The slot is neither VALID nor about to be: an incomplete copy must never replace a good one.
        """
        if not slot.published:
            raise SnapshotError(f"a slot that is {slot.state} cannot become the safe one")
        if self._safe is not slot and (self._safe is None or self._safe.state is SlotState.VALID):
            self._before = self._safe
        self._safe = slot
        if as_anchor and self._kept:
            self.anchors = [*self.anchors, slot][-self._kept :]
        self._let_go()
        self._release_unused()

    def adopt(self, slot: Slot) -> None:
        """Make a published slot the safe one that this process has not filled; every other state is given up."""
        self._safe, self._before, self.anchors = None, None, []
        self.commit(slot)

    def hold(self, slot: Slot) -> None:
        """Somebody reads this slot: it is not filled again before as many calls of :meth:`drop`.

        The ring must have been made with a spare slot for each that is held at a time.
        """
        self._guests.append(slot)

    def drop(self, slot: Slot) -> None:
        """Undo one :meth:`hold`."""
        self._guests.pop(next(place for place, guest in enumerate(self._guests) if guest is slot))
        if not self._in_use(slot):
            slot.release()

    @property
    def pinned(self) -> Slot | None:
        """What :meth:`pin` kept, if it still may be gone back to."""
        return self._pinned

    def pin(self) -> Slot:
        """Keep the safe state when it is safe no more, until :meth:`unpin`, or until a restore goes back behind it.

        Another pinned one is given up. The ring must have been made with a spare slot for it.
        """
        self.unpin()
        self._pinned = self.safe
        return self._pinned

    def unpin(self) -> None:
        """Let go of what is pinned. Idempotent."""
        pinned, self._pinned = self._pinned, None
        if pinned is not None and not self._in_use(pinned):
            pinned.release()

    def order(self) -> None:
        """The barrier: what changes the state from here on comes after every copy. The host waits for no device.

        Raises:
            SnapshotError: A copy failed; the safe slot before it is still VALID.
        """
        for slot in self._slots:
            slot.order()
        self._let_go()

    def reset(self) -> None:
        """Give up every state, keep the memory."""
        self._safe, self._before, self._pinned, self.anchors = None, None, None, []
        self._release_unused()

    def close(self) -> None:
        """Wait for what is under way, and give the memory back. Nothing can be restored afterwards.

        The memory under a copy that does not end within seconds is left to the end of the process: the device is stuck,
        in a collective that lost its peers for example.
        """
        self.reset()
        for slot in self._slots:
            slot.close()
        self._copier.close()

    def fall_back(self, slot: Slot) -> None:
        """After ``slot`` was restored: it is the safe one, and takes the place of every newer anchor.

        The states committed after it are undone; nothing may go back to them. The number of anchors stays, as the rule
        counts its own the same way.
        """
        if slot is self._safe:
            return
        self._safe, self._before = slot, None
        if self._pinned is not None and self._pinned.attempt > slot.attempt:
            self._pinned = None
        self.anchors = [anchor if anchor.attempt < slot.attempt else slot for anchor in self.anchors]
        self._release_unused()

    @property
    def full(self) -> bool:
        """As many anchors are there as are kept, or at least two."""
        return len(self.anchors) >= min(2, self._kept)

    @property
    def older(self) -> list[Slot]:
        """The anchors that are older than the safe state, oldest first, each once."""
        kept = {id(anchor): anchor for anchor in self.anchors if anchor.attempt < self.safe.attempt}
        return sorted(kept.values(), key=lambda slot: slot.attempt)

    def no_newer_than(self, slot: Slot) -> Iterator[Slot]:
        """``slot`` and then the older ones, newest first: where to look if ``slot`` turns out to be damaged."""
        yield slot
        seen = {id(slot)}
        for other in sorted({id(a): a for a in self.anchors}.values(), key=lambda kept: kept.attempt, reverse=True):
            if id(other) not in seen and other.attempt < slot.attempt:
                yield other

    @property
    def oldest(self) -> int:
        """Attempt of the oldest state that could be restored."""
        kept = [self.safe, *self.anchors, *([] if self._pinned is None else [self._pinned])]
        return min(slot.attempt for slot in kept)

    def _in_use(self, slot: Slot) -> bool:
        return any(slot is one for one in (self._safe, self._before, self._pinned, *self.anchors, *self._guests))

    def _let_go(self) -> None:
        """Release the slot that was safe before, once the safe one is there."""
        there = self._safe is not None and self._safe.landed() and self._safe.state is SlotState.VALID
        before = self._before
        if there and before is not None:
            self._before = None
            if not self._in_use(before):
                before.release()

    def _release_unused(self) -> None:
        for slot in self._slots:
            if not self._in_use(slot):
                slot.release()
