"""One host copy of the planned state.

Lifecycle: FREE -> ``fill`` -> FILLING -> COMPLETE -> ``publish`` -> VALID -> ``release`` -> FREE. A fill that is
interrupted leaves the slot FILLING; it then never becomes VALID, and every other slot is as it was. Only COMPLETE and
VALID slots can be verified and restored.

On CUDA the copies are queued on the current stream and ``fill`` returns before they are done. State must not change
before they are, which holds for work queued on the same stream later; ``verify`` and ``restore`` wait on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch.optim import Optimizer

from .. import parallel
from ..errors import SnapshotError
from .host import EntryState, ForwardState
from .plan import Digests, StatePlan
from .tree import Held, Overlay

ALIGNMENT = 64
"""Bytes: the copies of two tensors share no cache line, and any element type may be viewed at their beginning."""

_MAX_CHUNK = 64 << 20  # bytes
_MIN_CHUNKS = 8
_NO_MEMORY = torch.empty(0, dtype=torch.uint8)


class SlotState(StrEnum):
    """How far a slot is."""

    FREE = "free"
    FILLING = "filling"
    COMPLETE = "complete"
    VALID = "valid"


class Slot:
    """One preallocated copy. Filling it again under the same plan allocates no tensor.

    Attributes:
        state: See the module.
        attempt: Index of the attempt whose commit it holds; -1 for the state before the first.
        digests: The digests of the state when it was copied.
        forward: Set by the owner: random streams and buffers that belong to this state. ``fill`` clears its content.
        entry: Set by the owner: per-group values and other objects that belong to this state. ``fill`` drops it.
        rule_anchor: Set by the owner: the rule's statistics at this commit. ``fill`` drops it.
        measurement: Set by the owner: what the probe measured of this state. ``fill`` drops it.
    """

    def __init__(self) -> None:
        """A free slot without memory."""
        self.state = SlotState.FREE
        self.attempt = -1
        self.digests = Digests({}, torch.empty(0, dtype=torch.int64))
        self.forward: ForwardState | None = None
        self.entry: EntryState | None = None
        self.rule_anchor: dict[str, Any] | None = None
        self.measurement: float | None = None
        self._arena = _NO_MEMORY
        self._pinned = False
        self._views: list[torch.Tensor] = []
        self._plan: StatePlan | None = None
        self._held: tuple[tuple[Held, ...], ...] = ()
        self._pending: list[Any] = []

    @property
    def plan(self) -> StatePlan:
        """The plan it was filled under; SnapshotError before the first fill."""
        if self._plan is None:
            raise SnapshotError("the slot was never filled")
        return self._plan

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return self._arena.numel()

    @torch.no_grad()
    def fill(
        self,
        plan: StatePlan,
        attempt: int,
        digests: Digests | None = None,
        on_chunk: Callable[[], object] | None = None,
    ) -> None:
        """Copy the live state into this slot. Enters no collective; waits for nothing but an earlier fill.

        Args:
            plan: A current plan.
            attempt: Index of the attempt that was committed.
            digests: ``plan.digests`` of exactly this state, if the caller has them; computed here otherwise.
            on_chunk: Called between chunks of tensors; what it raises interrupts the fill.

        Raises:
            SnapshotError: The plan is not current, or there is no memory for the copy.
        """
        self._settle()
        self.state = SlotState.FILLING
        self.entry, self.rule_anchor, self.measurement = None, None, None
        if self.forward is not None:
            self.forward.clear()
        image = plan.image()
        if plan is not self._plan:
            self._plan = None
            self._reserve(plan, image.tensors)
        self.attempt, self._plan, self._held = attempt, plan, image.held
        self.digests = plan.digests(image.tensors) if digests is None else digests
        _copy(self._views, image.tensors, on_chunk)
        self._mark(image.tensors)
        self.state = SlotState.COMPLETE

    def publish(self) -> None:
        """Declare a complete slot valid: every rank has one of the same attempt.

        Raises:
            SnapshotError: The slot is not complete.
        """
        if self.state is not SlotState.COMPLETE:
            raise SnapshotError(f"rank {parallel.this_rank()}: a slot that is {self.state} cannot be published")
        self.state = SlotState.VALID

    def release(self) -> None:
        """Free the slot; its memory stays for the next fill."""
        self.state = SlotState.FREE

    def verify(self) -> list[str]:
        """Compute the digests of the host bytes anew and name every entry that is not what was copied.

        Waits for the copy. Returns an empty list for a sound slot. Values that are no tensors are not covered.
        """
        if self.state not in (SlotState.COMPLETE, SlotState.VALID):
            return [f"the slot itself, which is {self.state}"]
        self._settle()
        found = self.plan.digests(self._views).entries
        wrong = (found != self.digests.entries.cpu()).nonzero().flatten().tolist()
        return [self.plan.entries[index].name for index in wrong]

    @torch.no_grad()
    def restore(self, on_chunk: Callable[[], object] | None = None) -> None:
        """Write the copy back, in place, into the tensors that are the state now. Enters no collective.

        Optimizer state that the slot does not have is deleted. Tensors keep their objects and addresses; one that has
        vanished or changed its form since is made again. Call ``parallel.reshard`` before and after. Interrupted, it
        may be called again.

        Args:
            on_chunk: Called between chunks of tensors; what it raises interrupts the restore.

        Raises:
            SnapshotError: The slot is not complete, or it does not fit the live parameters; nothing was changed then.
        """
        if self.state not in (SlotState.COMPLETE, SlotState.VALID):
            raise SnapshotError(f"rank {parallel.this_rank()}: a slot that is {self.state} cannot be restored")
        self._settle()
        overlay = Overlay(self._view, self.plan.name)
        for optimizer, of_optimizer in zip(self.plan.optimizers, self._held, strict=True):
            self._check(optimizer, of_optimizer, overlay)
        for optimizer, of_optimizer in zip(self.plan.optimizers, self._held, strict=True):
            _lay(optimizer, of_optimizer, overlay)
        _copy([live for live, _ in overlay.copies], [saved for _, saved in overlay.copies], on_chunk)
        self._mark([live for live, _ in overlay.copies])

    def _view(self, part: int) -> torch.Tensor:
        return self._views[self.plan.places[part]]

    def _check(self, optimizer: Optimizer, of_optimizer: Sequence[Held], overlay: Overlay) -> None:
        """Raise SnapshotError if the live state cannot take this copy. Changes nothing."""
        live = {id(handle) for group in optimizer.param_groups for handle in group["params"]}
        if live != {id(held.key) for held in of_optimizer if held.parameter is not None}:
            raise SnapshotError(
                f"rank {parallel.this_rank()}: the optimizer has other parameters than at the snapshot of attempt "
                f"{self.attempt}; parameters that were added or removed cannot be rolled back"
            )
        states = parallel.optimizer_state(optimizer)
        for held in of_optimizer:
            if held.parameter is not None and not overlay.matches(held.key, held.parameter):
                raise SnapshotError(
                    f"rank {parallel.this_rank()}: {self.plan.name(held.parameter.path)} has another shape or dtype "
                    f"than at the snapshot of attempt {self.attempt}, or its FSDP module is not in its sharded state"
                )
            if not held.empty:
                overlay.check(states.get(held.key), held.state)

    def _reserve(self, plan: StatePlan, tensors: Sequence[torch.Tensor]) -> None:
        """Lay out the views for a plan; take new memory only if there is too little."""
        starts, end = [], 0
        for entry in plan.entries:
            starts.append(end)
            end += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
        pinned = any(tensor.is_cuda for tensor in tensors)
        if end > self._arena.numel() or pinned != self._pinned:
            self._views, self._arena = [], _NO_MEMORY  # before the new one, not beside it
            try:
                self._arena = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
            except RuntimeError as error:
                raise SnapshotError(
                    f"rank {parallel.this_rank()}: no {'pinned ' if pinned else ''}host memory for a snapshot of "
                    f"{end / 2**20:.0f} MiB ({error})"
                ) from error
            self._pinned = pinned
        self._views = [
            self._arena[start : start + entry.nbytes].view(entry.dtype).view(entry.shape)
            for start, entry in zip(starts, plan.entries, strict=True)
        ]

    def _mark(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note where the copies end on each device's stream."""
        for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
            module = torch.get_device_module(device)
            event = module.Event()
            event.record(module.current_stream(device))
            self._pending.append(event)

    def _settle(self) -> None:
        """Wait until no copy from or into this slot is under way."""
        for event in self._pending:
            event.synchronize()
        self._pending.clear()


def _lay(optimizer: Optimizer, of_optimizer: Sequence[Held], overlay: Overlay) -> None:
    states = parallel.optimizer_state(optimizer)
    for held in of_optimizer:
        if held.parameter is not None:
            overlay.lay(held.key, held.parameter)
        if held.empty:
            states.pop(held.key, None)
            continue
        live = states.get(held.key)
        new = overlay.lay(live, held.state)
        if new is not live:
            states[held.key] = new
    kept = {id(held.key) for held in of_optimizer}
    for key in [key for key in states if id(key) not in kept]:
        del states[key]


def _copy(
    destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], on_chunk: Callable[[], object] | None
) -> None:
    for number, (first, last) in enumerate(_chunks(destinations)):
        if number and on_chunk is not None:
            on_chunk()
        torch._foreach_copy_(list(destinations[first:last]), list(sources[first:last]), non_blocking=True)


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Ranges of tensors to copy in one call: at least four if there are four tensors, none much above 64 MiB."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    most_bytes = min(_MAX_CHUNK, sum(sizes) // _MIN_CHUNKS)
    most_tensors = -(-len(sizes) // _MIN_CHUNKS)
    first = waiting = 0
    for index, size in enumerate(sizes):
        waiting += size
        if waiting > most_bytes or index + 1 - first >= most_tensors:
            yield first, index + 1
            first, waiting = index + 1, 0
    if first < len(sizes):
        yield first, len(sizes)
