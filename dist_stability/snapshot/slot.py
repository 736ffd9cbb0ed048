"""One host copy of the planned state.

Lifecycle: FREE -> ``fill`` -> FILLING -> COMPLETE -> ``publish`` -> VALID -> ``release`` -> FREE. COMPLETE means that
the bytes and their digest are there. What a fill has started may still be under way when it returns (copier.py): the
slot is FILLING until then, and a ``publish`` takes effect when it is over. A fill that is interrupted leaves the slot
FILLING; it then never becomes VALID, and every other slot is as it was. Only COMPLETE and VALID slots can be verified
and restored; both wait on the host for what is under way.

Entry contract: ``order`` is called before anything changes the state after a fill.

Under a plan that shares entries with other ranks a slot holds this rank's pieces only. Then ``restore`` writes what is
whole here, and ``gather`` brings the rest, all ranks together.
"""

from __future__ import annotations

import contextlib
import operator
import time
import warnings
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from .. import parallel
from ..errors import SnapshotError
from .arena import Arena, Memory
from .copier import Bucket, Copier, HostCopy, HostWork, ThreadTransfer, Transfer, chunks, copy_on_host, view_in
from .digest import FixedSums, bytes_of, entry_digests
from .host import EntryState, ForwardState
from .layout import Layout
from .plan import Digests, Entry, StatePlan, flat
from .share import packs
from .tree import Held, Overlay

_STUCK = 10.0
"""Seconds after which a copy under way is no longer waited for when the memory is given back."""


class SlotState(StrEnum):
    """How far a slot is."""

    FREE = "free"
    FILLING = "filling"
    COMPLETE = "complete"
    VALID = "valid"


class Slot:
    """One preallocated copy. Filling it again under the same plan allocates nothing (digest.py has one exception).

    Attributes:
        state: See the module.
        attempt: Index of the attempt whose commit it holds; -1 for the state before the first.
        forward: Set by the owner: random streams and buffers that belong to this state. ``fill`` clears its content.
        entry: Set by the owner: per-group values and other objects that belong to this state. ``fill`` drops it.
        rule_anchor: Set by the owner: the rule's statistics at this commit. ``fill`` drops it.
        measurement: Set by the owner: what the probe measured of this state. ``fill`` drops it.
        sealed: Set by the owner: how many attempts had been made when this state was last made findable by a later
            process; None if it is not. ``fill`` drops it.

    Args:
        copier: Shared with other slots of a ring; by default one of its own, without a thread.
        siblings: All slots of the ring, this one included: memory is reserved only if there is enough for all.
        source: Where its memory comes from.
    """

    def __init__(
        self, copier: Copier | None = None, siblings: Sequence[Slot] | None = None, source: Memory | None = None
    ) -> None:
        """A free slot without memory."""
        self.state = SlotState.FREE
        self.attempt = -1
        self.forward: ForwardState | None = None
        self.entry: EntryState | None = None
        self.rule_anchor: dict[str, Any] | None = None
        self.measurement: float | None = None
        self.sealed: int | None = None
        self._host_memory = Memory() if source is None else source
        self._copier = Copier(HostWork.NONE) if copier is None else copier
        self._siblings: Sequence[Slot] = [self] if siblings is None else siblings
        self._arena: Arena | None = None
        self._locked_for: torch.device | None = None
        self._layout = Layout.of((), (), ())
        self._views: list[torch.Tensor] = []
        self._forms: list[torch.Tensor] = []  # one for each entry: its view, or a tensor without memory if it is shared
        self._bytes = FixedSums([])  # the views as bytes where they have them in order: quicker to sum up
        self._host_copy = HostCopy([], [])
        self._own: Digests | None = None  # overwritten at each fill, as is the next
        self._own_sums: torch.Tensor | None = None
        self._buckets: dict[torch.device, list[Bucket]] = {}
        self._plan: StatePlan | None = None
        self._held: tuple[tuple[Held, ...], ...] = ()
        self._digests = Digests({}, torch.empty(0, dtype=torch.int64))
        self._sums = self._digests.entries  # of this rank's pieces
        self._awaited: dict[int, list[torch.Tensor]] = {}  # by entry, the live tensors that gather() has to fill
        self._transfers: list[Transfer] = []
        self._published = False
        # While a copy is under way: its sources, kept alive, and how often each had been written to at the fill.
        self._sources: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._changed: list[str] = []

    @property
    def plan(self) -> StatePlan:
        """The plan it was filled under; SnapshotError before the first fill."""
        if self._plan is None:
            raise SnapshotError("the slot was never filled")
        return self._plan

    @property
    def digests(self) -> Digests:
        """The digests of the state when it was copied. Waits for them."""
        self.wait()
        return self._digests

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return 0 if self._arena is None else self._arena.nbytes

    @property
    def payload(self) -> int:
        """Bytes of that memory that the copy takes."""
        return self._layout.nbytes

    @property
    def pinned(self) -> bool:
        """Whether that memory is page-locked."""
        return self._arena is not None and self._arena.pinned

    @property
    def published(self) -> bool:
        """VALID, or to be so as soon as the bytes are there."""
        return self.state is SlotState.VALID or (self._published and self.state is SlotState.FILLING)

    @torch.no_grad()
    def fill(
        self,
        plan: StatePlan,
        attempt: int,
        digests: Digests | None = None,
        on_chunk: Callable[[], object] | None = None,
    ) -> None:
        """Start to copy the live state into this slot. Enters no collective, waits for no device.

        Args:
            plan: A current plan.
            attempt: Index of the attempt that was committed.
            digests: ``plan.digests`` of exactly this state, if the caller has them; computed here otherwise.
            on_chunk: Called between chunks, perhaps by another thread; what it raises interrupts the copy.

        Raises:
            SnapshotError: The plan is not current, or there is no memory for the copy.
        """
        self.state = SlotState.FILLING
        self._clear()
        image = plan.image()
        live = plan.cut(image.tensors)
        devices = plan.devices_of(image)
        same = plan is self._plan and devices == self._layout.devices
        self._forget(wait=not same)
        if not same:
            self._plan = None
            self._reserve(plan, live, devices)
        self.attempt, self._plan, self._held = attempt, plan, image.held
        assert self._arena is not None
        self._arena.begin_fill()
        if plan.shared and digests is None:  # the slot will not have all that they are of
            digests = plan.digests(image.tensors)
        self._start(plan, live, digests, on_chunk or (lambda: None))
        if not self._transfers:
            self.state = SlotState.COMPLETE

    def take(self, plan: StatePlan, memory: Arena, attempt: int, digests: Digests, sums: torch.Tensor) -> None:
        """Become the copy that another process made under a plan of the same form. Nothing is read or compared yet.

        Its memory is only lent; see :meth:`keep`.

        Args:
            plan: A current plan.
            memory: What that process's slot left.
            attempt: Index of the attempt whose commit it holds.
            digests: Of the state, as that slot had them.
            sums: Digests of the pieces, as that slot had them.

        Raises:
            SnapshotError: The plan needs another number of bytes.
        """
        image = plan.image()
        live = plan.cut(image.tensors)
        devices = tuple(tensor.device for tensor in live)
        layout = _layout_of(live, devices)
        if layout.nbytes != memory.data.numel():
            raise SnapshotError(
                f"rank {parallel.this_rank()}: the copy has {memory.data.numel()} bytes, this state {layout.nbytes}"
            )
        self.close()
        self._clear()
        self._arena, self._locked_for = memory, layout.cuda
        if layout.cuda is not None:
            memory.lock(layout.cuda)
        self._lay_out(plan, live, layout)
        self.attempt, self._plan, self._held = attempt, plan, image.held
        self._digests, self._sums = digests, sums
        self.state = SlotState.COMPLETE

    def keep(self, digests: Digests, made: int, on_chunk: Callable[[], object]) -> bool:
        """After :meth:`take`: have that memory for good and be as if this process had filled and sealed it.

        Args:
            digests: Of the state, on the device of those that ``fill`` makes.
            made: How many attempts had been made at its seal.
            on_chunk: Called between the parts of the work.

        Returns:
            Whether that is possible. Otherwise nothing has changed.
        """
        if not self._host_memory.take_over(self.memory, on_chunk):
            return False
        self._digests, self.sealed = digests, made
        return True

    @property
    def on_host(self) -> bool:
        """Whether all of the state lies in memory of the host, and this slot has all of it."""
        return not self._layout.large and not self.plan.shared

    @property
    def spoilt(self) -> bool:
        """Whether the state was written to while it was copied."""
        return bool(self._changed)

    @property
    def sums(self) -> torch.Tensor:
        """The digests of the pieces kept here, on the CPU. Waits for them."""
        self.wait()
        return self._sums.cpu()

    @property
    def memory(self) -> Arena:
        """Where the bytes are; SnapshotError before the first fill."""
        if self._arena is None:
            raise SnapshotError("the slot was never filled")
        return self._arena

    @property
    def starts(self) -> tuple[int, ...]:
        """Byte at which each piece of the plan begins in its memory."""
        return self._layout.starts

    @property
    def held(self) -> tuple[tuple[Held, ...], ...]:
        """For each optimizer, what of its state is no tensor, and the places of the tensors."""
        return self._held

    def publish(self) -> None:
        """Declare the slot valid: every rank has one of the same attempt. Takes effect when the bytes are there.

        Raises:
            SnapshotError: It is neither complete nor being filled.
        """
        if self.state is SlotState.FILLING and self._transfers:
            self._published = True
            self.landed()
        elif self.state is SlotState.COMPLETE:
            self.state = SlotState.VALID
        else:
            raise SnapshotError(f"rank {parallel.this_rank()}: a slot that is {self.state} cannot be published")

    def release(self) -> None:
        """Free the slot; its memory stays for the next fill. A copy that is under way goes on, for nobody."""
        self.state, self._published = SlotState.FREE, False

    def landed(self) -> bool:
        """Whether nothing is under way any more. Asks, does not wait."""
        if self._transfers and all(transfer.done() for transfer in self._transfers):
            self.wait()
        return not self._transfers

    def order(self) -> None:
        """The barrier: what changes the state from here on comes after the copy. The host waits for no device.

        Raises:
            SnapshotError: A copy by the thread failed. This slot stays FILLING.
        """
        if self._sources:
            self._look_for_changes()
        for transfer in self._transfers:
            try:
                transfer.order()
            except BaseException:
                self._drop_transfers()
                raise
        self._sources, self._versions = [], []

    def wait(self) -> None:
        """Wait on the host until nothing is under way.

        Raises:
            SnapshotError: A copy by the thread failed. This slot stays FILLING.
        """
        if not self._transfers:
            return
        if self._sources:
            self._look_for_changes()
        try:
            for transfer in self._transfers:
                transfer.wait()
        finally:
            self._drop_transfers()
        if self.state is SlotState.FILLING:
            self.state = SlotState.VALID if self._published else SlotState.COMPLETE
            self._published = False

    def assure(self) -> None:
        """Wait for what may still fail: not for work on a stream, which comes before whatever is queued there later.

        Raises:
            SnapshotError: A copy by the thread failed. This slot stays FILLING.
        """
        if any(isinstance(transfer, ThreadTransfer) for transfer in self._transfers):
            self.wait()

    def close(self) -> None:
        """Give the memory back; the slot is as new. Tensors that view it keep theirs.

        Work that does not end within seconds keeps the memory for good: the device is stuck.
        """
        deadline = time.monotonic() + _STUCK
        while not all(transfer.done() for transfer in self._transfers):
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)
        self._forget(wait=True)
        self.release()
        self._plan, self._views, self._forms, self._bytes, self._buckets = None, [], [], FixedSums([]), {}
        self._host_copy = HostCopy([], [])
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def verify(self) -> list[str]:
        """Compute the digests of the host bytes anew and name every entry that is not what was copied.

        Waits for the copy. Returns an empty list for a sound slot. Values that are no tensors are not covered.
        """
        try:
            self.wait()
        except SnapshotError as error:
            return [str(error)]
        if self.state not in (SlotState.COMPLETE, SlotState.VALID):
            return [f"the slot itself, which is {self.state}"]
        found = self._bytes.now()
        wrong = (found != self._sums.cpu()).nonzero().flatten().tolist()
        names = [self._name(index) for index in wrong]
        return names + [name for name in self._changed if name not in names]

    @torch.no_grad()
    def restore(
        self, on_chunk: Callable[[], object] | None = None, source: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Write the copy back, in place, into the tensors that are the state now. Enters no collective.

        Optimizer state that the slot does not have is deleted. Tensors keep their objects and addresses; one that has
        vanished or changed its form since is made again. Call ``parallel.reshard`` before and after. Interrupted, it
        may be called again. On an accelerator it is queued on the current stream. What is shared with other ranks is
        not there before :meth:`gather`.

        Args:
            on_chunk: Called between chunks of tensors; what it raises interrupts the restore.
            source: For each entry of the plan, a tensor with the same contents, to be taken instead of this slot's own.
                Then nothing is left to be gathered.

        Raises:
            SnapshotError: The slot is not complete, or it does not fit the live parameters; nothing was changed then.
        """
        self.wait()
        if self.state not in (SlotState.COMPLETE, SlotState.VALID):
            raise SnapshotError(f"rank {parallel.this_rank()}: a slot that is {self.state} cannot be restored")
        for slot in self._siblings:  # another one may be taking its copy of what is about to be overwritten
            with contextlib.suppress(SnapshotError):
                slot.order()
        copies = self._pairs(self._forms if source is None else source)
        if source is not None:
            _copy_within(copies)
        else:
            self._write(copies, on_chunk or (lambda: None))

    @torch.no_grad()
    def gather(
        self,
        send: Callable[[torch.Tensor, tuple[int, ...], int], object],
        device: torch.device,
        on_chunk: Callable[[], object] | None = None,
    ) -> None:
        """Bring what is shared with other ranks into the tensors that ``restore`` found or made. All of them together.

        Args:
            send: Broadcasts a tensor of bytes among some ranks, of which the last argument is the source.
            device: Where it wants them.
            on_chunk: Called before each of them; what it raises interrupts the restore.

        Collectives: for each set of ranks and each of them, one for every 32 MiB of its share.
        """
        plan, me = self.plan, parallel.this_rank()
        place = {(piece.entry, piece.first): index for index, piece in enumerate(plan.pieces)}
        targets = {
            entry: [_laid_out(live, plan.entries[entry]) for live in tensors]
            for entry, tensors in self._awaited.items()
        }
        for ranks in plan.shared:
            for source in ranks:
                pieces = plan.pieces_of(ranks, source)
                own = {piece.entry: piece.first for piece in pieces}
                for pack in packs(pieces, plan.itemsizes):
                    bucket = torch.empty(pack.nbytes, dtype=torch.uint8, device=device)
                    parts = [
                        bucket[start : start + (last - first) * plan.itemsizes[entry]].view(plan.entries[entry].dtype)
                        for (entry, first, last), start in zip(pack.pieces, pack.starts, strict=True)
                    ]
                    if source == me:
                        for (entry, first, last), part in zip(pack.pieces, parts, strict=True):
                            begin = own[entry]
                            part.copy_(flat(self._views[place[entry, begin]])[first - begin : last - begin])
                    if on_chunk is not None:
                        on_chunk()
                    send(bucket, ranks, source)
                    for (entry, first, last), part in zip(pack.pieces, parts, strict=True):
                        for target in targets[entry]:
                            flat(target)[first:last].copy_(part)
        for entry, tensors in self._awaited.items():
            for live, target in zip(tensors, targets[entry], strict=True):
                if target is not live:
                    live.copy_(target)
        self._awaited = {}

    def _start(
        self, plan: StatePlan, live: list[torch.Tensor], digests: Digests | None, on_chunk: Callable[[], object]
    ) -> None:
        """Start everything that has to be copied or summed up."""
        copier = self._copier
        in_thread = copier.host_work is HostWork.ALL and copier.overlap and not self._layout.large
        if in_thread or self._layout.large:  # what the parameters stand for now, whatever is made of them meanwhile
            live = [tensor.detach() for tensor in live]
        if digests is not None:
            self._digests = digests
            if not plan.shared:
                self._sums = digests.entries

        def copy(asynchronous: bool = False) -> None:
            done = 0

            def between(count: int) -> None:
                nonlocal done
                done = count
                on_chunk()

            try:
                self._host_copy.run(live, between)
            except Exception as error:
                if not asynchronous:
                    raise
                name = self._name(self._host_copy.order[done])
                raise SnapshotError(
                    f"rank {parallel.this_rank()}: the snapshot of attempt {self.attempt} was interrupted at {name} "
                    f"({type(error).__name__}: {error}); the one before it is still there"
                ) from error

        def add_up(tensors: Sequence[torch.Tensor] | FixedSums) -> None:
            if plan.shared:
                self._sums = tensors.now(self._own_sums) if isinstance(tensors, FixedSums) else entry_digests(tensors)
                self._own_sums = self._sums
            elif digests is None:
                self._digests = self._own = plan.digests(tensors, self._own)
                self._sums = self._digests.entries

        def both() -> None:
            copy(asynchronous=True)
            add_up(self._bytes)

        if in_thread:
            self._transfers.append(copier.submit(both, copies=True))
        else:
            copy()
            accelerators = list(self._layout.large)
            for device in accelerators:
                last = partial(add_up, live) if device == accelerators[-1] else (lambda: None)
                lane, data = copier.lane(device), self._data
                transfer = lane.save(self._layout, data, self._buckets[device], self._views, live, on_chunk, last)
                self._transfers.append(transfer)
                if not copier.overlap:
                    transfer.order()
            if not accelerators and (digests is None or plan.shared):
                if copier.host_work is HostWork.NONE:
                    add_up(self._bytes)
                else:
                    self._transfers.append(copier.submit(partial(add_up, self._bytes), copies=False))
        if copier.overlap and (in_thread or self._layout.large):
            self._sources, self._versions = live, [_version(tensor) for tensor in live]

    def _look_for_changes(self) -> None:
        """Whether anybody wrote to the state while its copy was under way: then the copy is of no single moment."""
        changed = [
            self._name(index)
            for index, (tensor, version) in enumerate(zip(self._sources, self._versions, strict=True))
            if _version(tensor) != version
        ]
        self._sources, self._versions = [], []
        if not changed:
            return
        self._changed = changed
        self._copier.overlap = False
        warnings.warn(
            f"rank {parallel.this_rank()}: {changed[0]} and {len(changed) - 1} more were written to between the commit "
            f"of attempt {self.attempt} and the next optimizer step, while they were copied. That snapshot is "
            "not used. From now on copies are made before anything else runs, which costs their time.",
            RuntimeWarning,
            stacklevel=2,
        )

    def _clear(self) -> None:
        """Drop what belongs to the content and was set by the owner."""
        self.entry, self.rule_anchor, self.measurement, self.sealed = None, None, None, None
        if self.forward is not None:
            self.forward.clear()

    def _forget(self, wait: bool) -> None:
        """Give up the content, and what went wrong with it.

        Args:
            wait: Until no device uses the memory. Without it, streams keep the order of what was queued and what will
                be; only the thread is waited for.
        """
        for transfer in self._transfers:
            with contextlib.suppress(Exception):
                if wait or isinstance(transfer, ThreadTransfer):
                    transfer.wait()
                else:
                    transfer.order()
        self._drop_transfers()
        self._changed, self._published = [], False

    def _drop_transfers(self) -> None:
        self._transfers, self._sources, self._versions = [], [], []

    @property
    def _data(self) -> torch.Tensor:
        assert self._arena is not None
        return self._arena.data

    def _name(self, piece: int) -> str:
        return self.plan.entries[self.plan.pieces[piece].entry].name

    def _pairs(self, forms: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Put back what is no tensor; pairs of (live tensor, its entry's form) that are still to be copied."""
        image = self.plan.look()
        if image is not None and all(map(_same, self.plan.optimizers, image.held, self._held)):
            return list(zip(image.tensors, forms, strict=True))
        places = self.plan.places
        overlay = Overlay(lambda part: forms[places[part]], self.plan.name)
        for optimizer, of_optimizer in zip(self.plan.optimizers, self._held, strict=True):
            self._check(optimizer, of_optimizer, overlay)
        for optimizer, of_optimizer in zip(self.plan.optimizers, self._held, strict=True):
            _lay(optimizer, of_optimizer, overlay)
        return overlay.copies

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

    def _reserve(self, plan: StatePlan, tensors: Sequence[torch.Tensor], devices: tuple[torch.device, ...]) -> None:
        """Lay out the views for a plan; take new memory only if there is too little."""
        layout = _layout_of(tensors, devices)
        if self._arena is None or layout.nbytes > self._data.numel() or self._locked_for != layout.cuda:
            self.close()  # before the new memory is there, not beside it
            self.state = SlotState.FILLING
            missing = sum(max(0, layout.nbytes - slot.nbytes) for slot in self._siblings)
            self._host_memory.check(missing, len(self._siblings))
            self._arena, self._locked_for = self._host_memory.make(layout.nbytes, layout.cuda), layout.cuda
        self._lay_out(plan, tensors, layout)

    def _lay_out(self, plan: StatePlan, tensors: Sequence[torch.Tensor], layout: Layout) -> None:
        self._layout = layout
        self._views = [view_in(self._data, start, like) for start, like in zip(layout.starts, tensors, strict=True)]
        self._bytes = FixedSums([bytes_of(view) if view.is_contiguous() else view for view in self._views])
        self._host_copy, self._own, self._own_sums = HostCopy(self._views, layout.host), None, None
        whole = {piece.entry: view for piece, view in zip(plan.pieces, self._views, strict=True)}
        shared = {index for members in plan.shared.values() for index in members}
        self._forms = [
            torch.empty_strided(entry.shape, entry.stride, dtype=entry.dtype, device="meta")
            if index in shared and entry.stride is not None
            else whole[index]
            for index, entry in enumerate(plan.entries)
        ]
        self._buckets = {device: self._copier.lane(device).buckets(layout, self._views) for device in layout.large}

    def _write(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], on_chunk: Callable[[], object]) -> None:
        """Write views of this slot into live tensors: pairs of (live tensor, view or form)."""
        self._awaited = {}
        if self.plan.shared:
            entry_at = {id(form): index for index, form in enumerate(self._forms) if form.is_meta}
            for live, form in copies:
                if form.is_meta:
                    self._awaited.setdefault(entry_at[id(form)], []).append(live)
            copies = [(live, view) for live, view in copies if not view.is_meta]
        on_host = [(live, view) for live, view in copies if live.device.type == "cpu"]
        targets = [live for live, _ in on_host]
        copy_on_host(targets, [view for _, view in on_host], list(chunks(targets)), lambda _: on_chunk())
        if not self._buckets:
            return
        entry_of = {id(view): index for index, view in enumerate(self._views)}
        rest: dict[int, list[torch.Tensor]] = {}
        for live, view in copies:
            if live.device.type != "cpu":
                rest.setdefault(entry_of[id(view)], []).append(live)
        for device, buckets in self._buckets.items():
            here = {i: tensors for i, tensors in rest.items() if self._layout.devices[i] == device}
            lane = self._copier.lane(device)
            self._transfers.append(lane.load(self._layout, self._data, buckets, self._views, here, on_chunk))


def _same(optimizer: Optimizer, now: Sequence[Held], kept: Sequence[Held]) -> bool:
    """Whether nothing but contents of tensors can differ. An empty state that was not there is a difference, too."""
    states = len(parallel.optimizer_state(optimizer))
    return all(map(operator.is_, now, kept)) and states == sum(not held.empty for held in kept)


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


def _copy_within(copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy pairs of (destination, source), those on the same device in one call."""
    for device in {destination.device for destination, _ in copies}:
        here = [pair for pair in copies if pair[0].device == device]
        torch._foreach_copy_([destination for destination, _ in here], [source for _, source in here])


def _layout_of(tensors: Sequence[torch.Tensor], devices: tuple[torch.device, ...]) -> Layout:
    sizes = [tensor.element_size() for tensor in tensors]
    return Layout.of([tensor.numel() * size for tensor, size in zip(tensors, sizes, strict=True)], sizes, devices)


def _laid_out(live: torch.Tensor, entry: Entry) -> torch.Tensor:
    """The tensor itself if its memory has the order of the entry's, else another one that has."""
    if entry.stride is None or live.stride() == entry.stride:
        return live
    return torch.empty_strided(entry.shape, entry.stride, dtype=live.dtype, device=live.device)


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to; tensors made under inference_mode do not count."""
    return -1 if tensor.is_inference() else tensor._version
