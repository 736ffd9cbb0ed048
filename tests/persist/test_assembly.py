"""Whole tensors from boxes, for parts of any cut; and that a gap, an overlap or another shape is never silent."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from dist_stability.snapshot.catalogue import Box
from dist_stability.snapshot.tiers import assembly
from dist_stability.snapshot.tiers.assembly import Assembly, runs
from dist_stability.snapshot.tiers.dcp import Wanted
from dist_stability.snapshot.tiers.record import Unusable

WHOLE = torch.arange(7 * 5 * 3, dtype=torch.float32).view(7, 5, 3)


def grid(cuts: Sequence[Sequence[int]]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of all boxes between the cuts along each dimension."""
    for ranges in itertools.product(*(list(itertools.pairwise(each)) for each in cuts)):
        yield tuple(low for low, _ in ranges), tuple(high - low for low, high in ranges)


def boxes(cuts: Sequence[Sequence[int]], transposed: bool = False) -> list[tuple[Box, torch.Tensor]]:
    found = []
    for offsets, sizes in grid(cuts):
        part = WHOLE[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].contiguous()
        if transposed:
            part = part.transpose(0, 2).contiguous().transpose(0, 2)
        memory = part.as_strided((part.numel(),), (1,)).view(torch.uint8)
        found.append((Box("x", WHOLE.dtype, tuple(WHOLE.shape), offsets, sizes, part.stride(), 0, 0), memory))
    return found


def part(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Wanted:
    return Wanted("x", tuple(WHOLE.shape), offsets, torch.full(sizes, torch.nan))


def cut(draw: random.Random, size: int) -> list[int]:
    return [0, *sorted(draw.sample(range(1, size), draw.randrange(min(3, size)))), size]


@pytest.mark.parametrize("transposed", [False, True])
def test_any_cut_from_any_other(transposed: bool) -> None:
    draw = random.Random(1)
    for _ in range(40):
        before, after = ([cut(draw, size) for size in WHOLE.shape] for _ in range(2))
        parts = [part(*each) for each in grid(after)]
        for one in parts:
            given = boxes(before, transposed)
            made = Assembly([one], [box for box, _ in given])
            for box, memory in draw.sample(given, len(given)):
                made.take(box, memory)
            place = tuple(slice(o, o + n) for o, n in zip(one.offsets, one.target.shape, strict=True))
            assert torch.equal(one.target, WHOLE[place])


def test_a_gap_an_overlap_another_shape_and_another_type_are_named() -> None:
    given = [box for box, _ in boxes([[0, 3, 7], [0, 5], [0, 3]])]
    whole = [part((0, 0, 0), (7, 5, 3))]
    for wrong in ([], given[:1], [*given, given[0]]):
        with pytest.raises(Unusable, match="every part of x once"):
            Assembly(whole, wrong)
    with pytest.raises(Unusable, match=r"of shape \(7, 5, 4\)"):
        Assembly(whole, [replace(given[0], shape=(7, 5, 4))])
    with pytest.raises(Unusable, match=r"as torch\.float64"):
        Assembly(whole, [replace(given[0], dtype=torch.float64)])
    assert whole[0].target.isnan().all()


def test_an_empty_part_and_a_number_need_nothing_special() -> None:
    number = Box("step", torch.float32, (), (), (), (), 0, 0)
    parts = [part((7, 0, 0), (0, 5, 3)), Wanted("step", (), (), torch.zeros(()))]
    given = boxes([[0, 7], [0, 5], [0, 3]])
    made = Assembly(parts, [number, *(box for box, _ in given)])
    for box, memory in given:
        made.take(box, memory)
    made.take(number, torch.tensor([4.0]).view(torch.uint8))
    assert parts[1].target == 4.0


def test_what_is_sent_together_is_bounded_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "CHUNK", 64)
    draw = random.Random(2)
    for _ in range(50):
        given, end = [], 0
        for _ in range(draw.randrange(1, 12)):
            kind = draw.choice([torch.uint8, torch.float32, torch.float64])
            start = -(-end // kind.itemsize) * kind.itemsize
            count = draw.randrange(1, 30)
            given.append(Box("x", kind, (count,), (0,), (count,), (1,), start, 0))
            end = start + given[-1].nbytes
        sent = list(runs(draw.sample(given, len(given))))
        assert [box for _, _, together in sent for box in together] == given
        for first, last, together in sent:
            assert last - first <= 64 + 15 or len(together) == 1
            assert all(first <= box.start and box.start + box.nbytes <= last for box in together)
            assert all((box.start - first) % box.dtype.itemsize == 0 for box in together)
