"""What a place that keeps states beyond the ring has in common with the others, so that a restart can look in all.

Two kinds of places. Shared memory is written by the training thread itself, at every seal. The slower ones (a copy on
another host, a disk) are given the sealed slot of some attempts by the courier, beside the training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..arena import Arena
from ..catalogue import Wanted
from ..slot import Slot
from .record import Head

if TYPE_CHECKING:
    from .courier import Channel

Key = tuple[int, int, int]
"""What is equal on all ranks for one moment: (attempts made, commit, history)."""


class Found(Protocol):
    """One moment of this rank in some tier."""

    @property
    def head(self) -> Head:
        """What it is chosen by."""

    @property
    def body(self) -> bytes:
        """Pickled."""

    def open(self) -> Arena:
        """The bytes of the slot, in no way checked. The caller closes it.

        Raises:
            SnapshotError, Unusable: They cannot be read.
        """


class Whole(Protocol):
    """One moment of all ranks: any part of any tensor can be read from it, whoever wrote it."""

    @property
    def head(self) -> Head:
        """Of the first rank."""

    @property
    def body(self) -> bytes:
        """Of this rank, or of the first one if there were others than now.

        Raises:
            Unusable: It cannot be read.
        """

    def check(self, place: int, count: int) -> None:
        """Compare digests: rank number ``place`` of ``count`` does its part, and all together do everything.

        Raises:
            Unusable: Something is damaged.
        """

    def reading(self, wanted: Sequence[Wanted]) -> Callable[[], None]:
        """What reads some parts, planned before anything is written to.

        Raises:
            Unusable: It lacks a part, or has it in another form.
        """


@dataclass(frozen=True)
class Listing:
    """What a tier has.

    Attributes:
        found: Moments of this rank that are sound as far as can be told without reading all of them, newest first.
        said: Why others are not used.
        whole: Moments of all ranks, likewise.
    """

    found: Sequence[Found]
    said: list[str]
    whole: Sequence[Whole] = ()


class Tier(Protocol):
    """A place where states are kept.

    Attributes:
        name: For messages, as in "from shared memory".
        where: The same with what it looks for there.
    """

    name: str

    @property
    def where(self) -> str:
        """See the class."""

    def list(self, world: int, signature: int) -> Listing:
        """What earlier processes left for this rank. Local.

        Args:
            world: Number of ranks.
            signature: Of the plan.
        """

    def begin(self, made: int, found: Found | None) -> None:
        """The run goes on with attempt ``made``, from a moment of this tier, or (None) of another one. Local."""

    def close(self, keep: bool) -> None:
        """The end: of an ordinary run, or (``keep``) of one that will be started again. Local, idempotent."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A sealed slot on its way to a slower tier. The slot is not filled meanwhile.

    Attributes:
        head: What it is chosen by.
        body: Pickled, as in its seal; "where" of it is the pickled catalogue.
        slot: Its bytes, at ``slot.memory.data``; None if this rank has nothing sound to give.
        tell: To be called between the parts of the work, for listeners.
    """

    head: Head
    body: bytes
    slot: Slot | None
    tell: Callable[[], object]


class SlowTier(Tier, Protocol):
    """One that the courier brings slots to.

    Attributes:
        every: Attempts from one delivery to the next.
        keeps: The slot that was delivered last stays as it is until the next one is there, too.
    """

    every: int
    keeps: bool

    def deliver(self, delivery: Delivery, channel: Channel) -> None:
        """Take a slot. Called on all ranks, by the courier's thread, one at a time.

        Whatever it does together with other ranks goes through ``channel``, and whatever may fail on one rank is done
        in ``channel.together``: that raises Undelivered on all of them, which becomes a warning, and the next delivery
        is tried. Anything else it raises ends the deliveries of this run. What was delivered before stays.
        """

    def settle(self, channel: Channel) -> None:
        """The last delivery is good on every rank: what it replaces may go. By the courier's thread; may fail alone."""
