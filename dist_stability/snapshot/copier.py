"""Moves bytes between the live state and a slot, beside the training step where that is possible.

Contract. Between a commit and the next optimizer step the state does not change, so a copy of it may run beside the
next forward and backward. ``order()`` of each :class:`Transfer` is the barrier: whatever changes the state afterwards
comes after the copy. Sources must stay alive until then, destinations until ``wait()``.

* State on an accelerator: a stream of its own, of the lowest priority, that begins after everything queued so far.
  Small tensors are gathered on the device and sent together. The barrier is a ``wait_event`` on the current stream: the
  device waits, the host does not.
* State on the CPU: copied at once, since a copy in another thread was no faster (docs/guarded-step.md has the table),
  and the state may then be changed by anybody. Only the digest is made by a thread, from the slot's own bytes, where a
  core is free for it. :attr:`HostWork.ALL` does everything in the thread: the same contract as a stream, and how it is
  tested without one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch

from .layout import Batch, Layout, cuts

_MAX_CHUNK = 64 << 20  # bytes
_MIN_CHUNKS = 8
_JOINED = 64 << 10  # bytes of a tensor above which one call for several of them gains nothing

Chunk = Callable[[], object]


class HostWork(StrEnum):
    """What the thread does for state that lies on the CPU."""

    NONE = "none"
    DIGEST = "digest"
    ALL = "all"


HOST_WORK: HostWork | None = None
"""What the thread of a new :class:`Copier` does; None: the digest, if a core is free for it."""


class Transfer(Protocol):
    """One piece of work on a slot that may still be under way."""

    def done(self) -> bool:
        """Whether it is over; asks, does not wait."""

    def order(self) -> None:
        """What changes the state from here on (on the current stream) comes after the copy."""

    def wait(self) -> None:
        """Wait on the host until it is over; raises what went wrong in it."""


class StreamTransfer:
    """Work queued on a stream, up to an event."""

    def __init__(self, device: torch.device, event: Any) -> None:
        """Remember them; the event has been recorded."""
        self._device, self._event = device, event

    def done(self) -> bool:
        """See Transfer."""
        return bool(self._event.query())

    def order(self) -> None:
        """See Transfer; the device waits."""
        torch.get_device_module(self._device).current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        """See Transfer."""
        self._event.synchronize()


class ThreadTransfer:
    """A job of the thread.

    Args:
        future: Of the job.
        copies: It reads the live state (and not only the slot).
    """

    def __init__(self, future: Future[None], copies: bool) -> None:
        """Remember them."""
        self._future, self._copies = future, copies

    def done(self) -> bool:
        """See Transfer."""
        return self._future.done()

    def order(self) -> None:
        """See Transfer; the host waits, if the job copies."""
        if self._copies:
            self._future.result()

    def wait(self) -> None:
        """See Transfer."""
        self._future.result()


class Bucket(NamedTuple):
    """Device memory through which a batch goes: the batch, the bytes, and a part for each of its members."""

    batch: Batch
    data: torch.Tensor
    parts: list[torch.Tensor]


class Lane:
    """The way between one accelerator and the host: a stream and one bucket on the device, used by all slots."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream; the bucket comes with the first batch."""
        self._device = device
        self._module = torch.get_device_module(device)
        lowest = self._module.Stream.priority_range()[0] if hasattr(self._module.Stream, "priority_range") else 0
        self._stream = self._module.Stream(device=device, priority=lowest)
        self._bucket = torch.empty(0, dtype=torch.uint8, device=device)

    def buckets(self, layout: Layout, views: Sequence[torch.Tensor]) -> list[Bucket]:
        """For each batch of a layout, the bucket and the parts of it that lie as in the arena.

        There is one bucket: the stream keeps batches apart. A larger one is made if need be; a slot that was laid out
        before keeps the smaller one until it is laid out anew.
        """
        batches = layout.batches[self._device]
        size = max((batch.end - batch.start for batch in batches), default=0)
        if size > self._bucket.numel():
            self._bucket = torch.empty(size, dtype=torch.uint8, device=self._device)
        return [
            Bucket(
                batch,
                self._bucket[: batch.end - batch.start],
                [view_in(self._bucket, layout.starts[i] - batch.start, views[i]) for i in batch.members],
            )
            for batch in batches
        ]

    def save(
        self,
        layout: Layout,
        arena: torch.Tensor,
        buckets: Sequence[Bucket],
        views: Sequence[torch.Tensor],
        live: Sequence[torch.Tensor],
        on_chunk: Chunk,
        last: Callable[[], None],
    ) -> StreamTransfer:
        """Queue the copies of everything that lies on this device, after all that is queued on the current stream.

        Args:
            layout: Of the arena.
            arena: Its bytes.
            buckets: From :meth:`buckets` for this layout.
            views: One into the arena for each entry.
            live: One live tensor for each entry; to be kept until the transfer was ordered or waited for.
            on_chunk: Called between transfers.
            last: Queues what else belongs to the slot, on the same stream.
        """
        ready = self._module.Event()
        ready.record(self._module.current_stream(self._device))
        with self._module.stream(self._stream), self._finished_if_interrupted():
            self._stream.wait_event(ready)
            for batch, bucket, parts in buckets:
                torch._foreach_copy_(parts, [live[index] for index in batch.members])
                for start, end in cuts(batch.start, batch.end):
                    arena[start:end].copy_(bucket[start - batch.start : end - batch.start], non_blocking=True)
                    on_chunk()
            for index in layout.large[self._device]:
                for host, device in _pieces(views[index], live[index], layout.starts[index]):
                    host.copy_(device, non_blocking=True)
                    on_chunk()
            last()
            done = self._module.Event()
            done.record(self._stream)
        return StreamTransfer(self._device, done)

    def load(
        self,
        layout: Layout,
        arena: torch.Tensor,
        buckets: Sequence[Bucket],
        views: Sequence[torch.Tensor],
        live: dict[int, list[torch.Tensor]],
        on_chunk: Chunk,
    ) -> StreamTransfer:
        """Queue the way back, on the current stream. Copies by :meth:`save` must have been ordered before it.

        Args:
            layout: Of the arena.
            arena: Its bytes.
            buckets: From :meth:`buckets` for this layout.
            views: One into the arena for each entry.
            live: For some entries, the tensors to write.
            on_chunk: Called between transfers.
        """
        with self._module.device(self._device):
            for batch, bucket, parts in buckets:
                for start, end in cuts(batch.start, batch.end):
                    bucket[start - batch.start : end - batch.start].copy_(arena[start:end], non_blocking=True)
                    on_chunk()
                pairs = [(t, parts[n]) for n, i in enumerate(batch.members) for t in live.get(i, ())]
                if pairs:
                    torch._foreach_copy_([tensor for tensor, _ in pairs], [part for _, part in pairs])
            for index in layout.large[self._device]:
                for tensor in live.get(index, ()):
                    for host, device in _pieces(views[index], tensor, layout.starts[index]):
                        device.copy_(host, non_blocking=True)
                        on_chunk()
            done = self._module.Event()
            done.record(self._module.current_stream(self._device))
        return StreamTransfer(self._device, done)

    @contextmanager
    def _finished_if_interrupted(self) -> Iterator[None]:
        """Leave no copy under way of which nobody knows."""
        try:
            yield
        except BaseException:
            self._stream.synchronize()
            raise


class Copier:
    """What the slots of a ring share: one lane for each accelerator, and one thread.

    Attributes:
        host_work: What the thread does; by default what :data:`HOST_WORK` says.
        overlap: Copies run beside the step. Set to False, they are ordered before whatever comes next: for loops that
            change the weights between a commit and the next optimizer step.
    """

    def __init__(self, host_work: HostWork | None = None) -> None:
        """Nothing is started before it is needed."""
        self.host_work = _default_host_work() if host_work is None else host_work
        self.overlap = True
        self._lanes: dict[torch.device, Lane] = {}
        self._thread: ThreadPoolExecutor | None = None

    def lane(self, device: torch.device) -> Lane:
        """The lane to a device."""
        if device not in self._lanes:
            self._lanes[device] = Lane(device)
        return self._lanes[device]

    def submit(self, job: Callable[[], None], copies: bool) -> ThreadTransfer:
        """Have the thread do a job, after those it was given before."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        return ThreadTransfer(self._thread.submit(job), copies)

    def close(self) -> None:
        """End the thread and forget the lanes; every transfer must be over. It can be used again."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        self._lanes.clear()


@torch.no_grad()
def copy_on_host(
    destinations: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    ranges: Sequence[tuple[int, int]],
    on_chunk: Callable[[int], object],
) -> None:
    """Copy tensors of the CPU, many in one call.

    Args:
        destinations: Written.
        sources: As many.
        ranges: From :func:`chunks`.
        on_chunk: Called between chunks with the number of tensors done so far.
    """
    for first, last in ranges:
        if first:
            on_chunk(first)
        torch._foreach_copy_(list(destinations[first:last]), list(sources[first:last]))


class _HostChunk(NamedTuple):
    """A part of a :class:`HostCopy`.

    Attributes:
        first: How many tensors come before it.
        joined: Places of several tensors each, and what picks these out of all.
        places: Of single tensors.
        alone: Their indices.
    """

    first: int
    joined: list[tuple[torch.Tensor, itemgetter[Any]]]
    places: list[torch.Tensor]
    alone: list[int]


class HostCopy:
    """Copies tensors of the CPU to the same places again and again: equal small ones that go side by side in one call.

    Attributes:
        order: The indices in the order in which they are copied, that of their places.
    """

    def __init__(self, places: Sequence[torch.Tensor], members: Iterable[int]) -> None:
        """Look at the places.

        Args:
            places: Where the tensors go; those of one dtype, shape and strides may follow each other without a gap.
            members: Indices of those that are copied.
        """
        self.order = sorted(members, key=lambda index: places[index].data_ptr())
        self._chunks: list[_HostChunk] = []
        for first, last in chunks([places[index] for index in self.order]):
            runs: list[list[int]] = []
            for index in self.order[first:last]:
                if runs and _joins(places[runs[-1][-1]], places[index]):
                    runs[-1].append(index)
                else:
                    runs.append([index])
            alone = [run[0] for run in runs if len(run) == 1]
            joined = [(_joined(places[run[0]], len(run)), itemgetter(*run)) for run in runs if len(run) > 1]
            self._chunks.append(_HostChunk(first, joined, [places[index] for index in alone], alone))

    @torch.no_grad()
    def run(self, live: Sequence[torch.Tensor], on_chunk: Callable[[int], object]) -> None:
        """Copy.

        Args:
            live: One tensor for each place, of its dtype and shape.
            on_chunk: Called between chunks with the number of tensors done so far.
        """
        for chunk in self._chunks:
            if chunk.first:
                on_chunk(chunk.first)
            for place, pick in chunk.joined:
                torch.stack(pick(live), out=place)
            if chunk.alone:
                torch._foreach_copy_(chunk.places, [live[index] for index in chunk.alone])


def _joins(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a small tensor is followed in memory by another one of its form."""
    size = one.numel() * one.element_size()
    return (
        0 < size <= _JOINED
        and one.data_ptr() + size == other.data_ptr()
        and (one.dtype, one.shape) == (other.dtype, other.shape)
        and one.is_contiguous()
        and other.is_contiguous()
    )


def _joined(first: torch.Tensor, count: int) -> torch.Tensor:
    """A tensor and those that follow it, as one."""
    return first.as_strided((count, *first.shape), (first.numel(), *first.stride()))


def chunks(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
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


def view_in(data: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """A view of bytes at an offset, of a tensor's dtype and shape, and of its strides if it has no gaps."""
    stop = start + like.numel() * like.element_size()
    flat = data[start:stop].view(like.dtype)
    return flat.as_strided(like.shape, like.stride()) if is_dense(like) else flat.view(like.shape)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one range of memory, in any order of the dimensions."""
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.size(dim)), reverse=True)
    return tensor.numel() > 0 and tensor.permute(order).is_contiguous()


def _pieces(view: torch.Tensor, live: torch.Tensor, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(host, device) pairs of one large tensor, cut for the link; whole if its elements lie differently by now."""
    if not view.numel():
        return
    if view.stride() != live.stride() or not is_dense(live) or live.is_conj() or live.is_neg():
        yield view, live
        return
    size = live.element_size()
    hosts, devices = (t.as_strided((t.numel(),), (1,), t.storage_offset()) for t in (view, live))
    for first, last in cuts(start, start + live.numel() * size):
        part = slice((first - start) // size, (last - start) // size)
        yield hosts[part], devices[part]


def _default_host_work() -> HostWork:
    if HOST_WORK is not None:
        return HOST_WORK
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return HostWork.DIGEST if cores > local * torch.get_num_threads() else HostWork.NONE
