"""Where each entry of a plan lies in an arena.

First what lies on accelerators, device after device: its large tensors, then its small ones side by side, so that one
transfer carries many of them. Within each, strictest alignment first, so that next to nothing is lost between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

CHUNK = 32 << 20
"""Bytes of one transfer. At 50 GB/s it takes 0.6 ms, to which its submission adds 1 %; others that want the link (and
an interruption) wait no longer than that."""

SMALL = 256 << 10
"""Bytes below which a device tensor is gathered with others: about what the link carries while one transfer is being
submitted (5 to 7 microseconds)."""

ALIGNMENT = 64
"""Bytes: what a large tensor begins at, one cache line."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Small tensors of one device that are sent together.

    Attributes:
        members: Indices of entries.
        start: Where they begin in the arena.
        end: Where they end.
    """

    members: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Places of all entries.

    Attributes:
        starts: Offset of each entry in bytes.
        nbytes: Bytes of the whole.
        devices: Where each entry's live tensor lies.
        host: Entries that lie on the CPU.
        large: For each device, entries that are sent one by one.
        batches: For each device, those that are sent together; each at most CHUNK bytes.
    """

    starts: tuple[int, ...]
    nbytes: int
    devices: tuple[torch.device, ...]
    host: tuple[int, ...]
    large: dict[torch.device, tuple[int, ...]]
    batches: dict[torch.device, tuple[Batch, ...]]

    @property
    def cuda(self) -> torch.device | None:
        """The CUDA device that copies come from and go to, if there is one: the memory is page-locked for it."""
        return next((device for device in self.large if device.type == "cuda"), None)

    @classmethod
    def of(cls, sizes: Sequence[int], itemsizes: Sequence[int], devices: Sequence[torch.device]) -> Layout:
        """Lay out entries of the given bytes, bytes per element, and devices."""
        kinds = list(dict.fromkeys(sorted(devices, key=lambda device: (device.type == "cpu", str(device)))))
        small = [device.type != "cpu" and size < SMALL for size, device in zip(sizes, devices, strict=True)]
        steps = [alignment(size, item) for size, item in zip(sizes, itemsizes, strict=True)]
        order = sorted(
            range(len(sizes)),  # equal sizes side by side: they are copied and summed up together
            key=lambda index: (kinds.index(devices[index]), small[index], -steps[index], sizes[index], index),
        )
        starts, end, previous = [0] * len(sizes), 0, None
        for index in order:
            section = (devices[index], small[index])
            step = ALIGNMENT if section != previous else steps[index]
            starts[index] = -(-end // step) * step
            end, previous = starts[index] + sizes[index], section
        accelerators = [device for device in kinds if device.type != "cpu"]
        return cls(
            tuple(starts),
            end,
            tuple(devices),
            tuple(index for index, device in enumerate(devices) if device.type == "cpu"),
            {d: tuple(i for i in order if devices[i] == d and not small[i]) for d in accelerators},
            {
                d: tuple(_batches([i for i in order if devices[i] == d and small[i]], starts, sizes))
                for d in accelerators
            },
        )


def alignment(nbytes: int, itemsize: int) -> int:
    """What an entry's place is a multiple of.

    At least its elements' size, so that they can be viewed, at most a cache line, and otherwise so little that the gap
    before the next entry is below 1 % of it.
    """
    step = itemsize
    while step < ALIGNMENT and step * 256 <= nbytes:
        step *= 2
    return step


def cuts(start: int, end: int) -> Iterator[tuple[int, int]]:
    """The range of an arena in transfers: cut at every multiple of CHUNK, and so at every chunk of page-locking."""
    while start < end:
        stop = min(end, (start // CHUNK + 1) * CHUNK)
        yield start, stop
        start = stop


def _batches(members: Sequence[int], starts: Sequence[int], sizes: Sequence[int]) -> Iterator[Batch]:
    waiting: list[int] = []
    for index in members:
        if waiting and starts[index] + sizes[index] - starts[waiting[0]] > CHUNK:
            yield Batch(tuple(waiting), starts[waiting[0]], starts[waiting[-1]] + sizes[waiting[-1]])
            waiting = []
        waiting.append(index)
    if waiting:
        yield Batch(tuple(waiting), starts[waiting[0]], starts[waiting[-1]] + sizes[waiting[-1]])
