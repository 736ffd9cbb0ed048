"""Host copies of sharded training state that come back bit for bit.

:class:`StatePlan` says what is state, a :class:`Slot` holds one copy of it and a :class:`SlotRing` the last few.
:class:`ForwardState` and :class:`EntryState` hold what is not in tensors of the plan. Nothing here enters a collective.
"""

from .buffers import BufferCopies
from .digest import digest
from .host import EntryState, ForwardState
from .plan import Digests, Entry, StatePlan
from .ring import SlotRing
from .rng import RandomState, forked
from .slot import Slot, SlotState

__all__ = [
    "BufferCopies",
    "Digests",
    "Entry",
    "EntryState",
    "ForwardState",
    "RandomState",
    "Slot",
    "SlotRing",
    "SlotState",
    "StatePlan",
    "digest",
    "forked",
]
