"""The state of another number of ranks, put together from the records of all ranks of the earlier one.

Each record has a catalogue (catalogue.py) that says which box of which whole tensor each part of it is. The rank that
has a record, its own or a copy, sends it around in pieces of bounded size, and every rank takes from each what lies in
its own part of the new state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from ..catalogue import Box, Wanted
from .courier import Channel
from .record import Unusable

CHUNK = 64 << 20
"""Bytes sent at a time, unless a single box is larger."""

_ALIGNMENT = 16
"""Bytes: no element of torch is larger, so a box of any type can be viewed in what is sent."""


class Assembly:
    """Fills the parts that a rank needs from boxes, in any order.

    Args:
        wanted: The parts of this rank; the key of each is its own.
        boxes: All there are; each element of a whole tensor is in one of them.

    Raises:
        Unusable: They are of tensors of another shape or type, or some element is in none of them. Then nothing is to
            be written anywhere.
    """

    def __init__(self, wanted: Sequence[Wanted], boxes: Iterable[Box]) -> None:
        """Compare the two; nothing is filled yet."""
        self._wanted = {one.key: one for one in wanted}
        missing = {one.key: one.target.numel() for one in wanted}
        for box in boxes:
            one = self._wanted.get(box.key)
            if one is None:
                continue
            if (one.shape, one.target.dtype) != (box.shape, box.dtype):
                raise Unusable(
                    f"has {box.key} as {box.dtype} of shape {box.shape}, and it is {one.target.dtype} of shape "
                    f"{one.shape} now"
                )
            inside = _inside(box, one)
            missing[box.key] -= 0 if inside is None else one.target[inside[1]].numel()
        wrong = [key for key, count in missing.items() if count]
        if wrong:
            raise Unusable(f"does not have every part of {', '.join(wrong[:3])} once")

    @torch.no_grad()
    def take(self, box: Box, data: torch.Tensor) -> None:
        """Write what of a box lies in a part of this rank.

        Args:
            box: One of them.
            data: Its bytes, uint8, on the CPU.
        """
        one = self._wanted.get(box.key)
        inside = None if one is None else _inside(box, one)
        if one is not None and inside is not None:
            source = data.view(box.dtype).as_strided(box.sizes, box.strides)
            one.target[inside[1]].copy_(source[inside[0]])


def _inside(box: Box, one: Wanted) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What a box and a part have in common, as a place in either; None if that is nothing."""
    low = [max(a, b) for a, b in zip(box.offsets, one.offsets, strict=True)]
    sizes = zip(box.offsets, box.sizes, one.offsets, one.target.shape, strict=True)
    high = [min(a + n, b + m) for a, n, b, m in sizes]
    if any(first >= last for first, last in zip(low, high, strict=True)):
        return None
    in_box = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, box.offsets, strict=True))
    return in_box, tuple(slice(a - o, b - o) for a, b, o in zip(low, high, one.offsets, strict=True))


def spread(
    channel: Channel,
    holders: Mapping[int, int],
    boxes: Mapping[int, Sequence[Box]],
    data: Mapping[int, torch.Tensor],
    assembly: Assembly,
) -> None:
    """Bring all boxes of all records to all ranks. All ranks of the channel together.

    Args:
        channel: Of the courier.
        holders: By earlier rank, which rank has its record now.
        boxes: Of all records, by earlier rank.
        data: The bytes of the slots this rank has, likewise.
        assembly: Takes what this rank needs.

    Raises:
        Broken: A rank is gone.
    """
    for rank in sorted(boxes):
        for first, last, together in runs(boxes[rank]):
            if holders[rank] == channel.rank:
                sent = data[rank][first:last]
            else:
                sent = torch.empty(last - first, dtype=torch.uint8)
            if channel.group is not None:
                channel.run(dist.broadcast, sent, holders[rank])
            for box in together:
                assembly.take(box, sent[box.start - first : box.start - first + box.nbytes])


def runs(boxes: Sequence[Box]) -> Iterator[tuple[int, int, list[Box]]]:
    """Boxes of one record that are sent together: (first byte, the one after the last, the boxes)."""
    waiting: list[Box] = []
    first = 0
    for box in sorted(boxes, key=lambda box: box.start):
        if waiting and box.start + box.nbytes - first > CHUNK:
            yield first, max(each.start + each.nbytes for each in waiting), waiting
            waiting = []
        if not waiting:
            first = box.start // _ALIGNMENT * _ALIGNMENT
        waiting.append(box)
    if waiting:
        yield first, max(each.start + each.nbytes for each in waiting), waiting
