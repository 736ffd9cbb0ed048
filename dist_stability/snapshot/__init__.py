"""Host copies of sharded training state that come back bit for bit.

:class:`StatePlan` says what is state, a :class:`Slot` holds one copy of it and a :class:`SlotRing` the last few.
:class:`ForwardState` and :class:`EntryState` hold what is not in tensors of the plan. Nothing here enters a collective.
"""

from .arena import Arena, Memory
from .buffers import BufferCopies
from .copier import Copier, HostWork
from .digest import digest
from .host import EntryState, ForwardState
from .plan import Digests, Entry, Image, StatePlan
from .ring import SlotRing
from .rng import RandomState, forked
from .shadow import Shadow
from .slot import Slot, SlotState

__all__ = [
    "Arena",
    "BufferCopies",
    "Copier",
    "Digests",
    "Entry",
    "EntryState",
    "ForwardState",
    "HostWork",
    "Image",
    "Memory",
    "RandomState",
    "Shadow",
    "Slot",
    "SlotRing",
    "SlotState",
    "StatePlan",
    "digest",
    "forked",
]
