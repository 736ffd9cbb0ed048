"""Which part of replicated state each rank keeps: every element at exactly one rank, and as many bytes at each."""

import random

import pytest

from dist_stability.snapshot.share import Piece, packs, share


def a_state(seed: int) -> tuple[list[int], list[int]]:
    draw = random.Random(seed)
    count = draw.randint(1, 12)
    return [draw.choice([0, 1, 2, 3, 64, 1000, 12345]) for _ in range(count)], draw.choices([1, 2, 4, 8, 16], k=count)


@pytest.mark.parametrize("seed", range(40))
def test_every_element_is_kept_once_and_shares_are_equal(seed: int) -> None:
    sizes, itemsizes = a_state(seed)
    members = [index for index in range(len(sizes)) if index % 3 != 2]  # others are not shared
    ranks = random.Random(seed).choice([1, 2, 3, 4, 7, 16])
    shares = [share(members, sizes, itemsizes, rank, ranks) for rank in range(ranks)]
    owners = {(p.entry, element) for pieces in shares for p in pieces for element in range(p.first, p.last)}
    assert owners == {(index, element) for index in members for element in range(sizes[index])}
    assert len(owners) == sum(p.last - p.first for pieces in shares for p in pieces), "two ranks keep the same element"
    total = sum(sizes[index] * itemsizes[index] for index in members)
    for pieces in shares:
        kept = sum((p.last - p.first) * itemsizes[p.entry] for p in pieces)
        assert abs(kept - total / ranks) <= 16, "more than one element away from its share"
        assert all(p.first < p.last for p in pieces)


@pytest.mark.parametrize("most", [16, 100, 4096, 1 << 20])
@pytest.mark.parametrize("seed", range(10))
def test_packs_hold_everything_in_order_and_are_not_larger_than_asked(seed: int, most: int) -> None:
    sizes, itemsizes = a_state(seed)
    pieces = share(range(len(sizes)), sizes, itemsizes, 1, 3)
    sent: dict[int, int] = {}
    for pack in packs(pieces, itemsizes, most):
        assert 0 < pack.nbytes <= most
        end = 0
        for (entry, first, last), start in zip(pack.pieces, pack.starts, strict=True):
            assert start >= end, "two pieces overlap in a pack"
            assert start % itemsizes[entry] == 0, "a piece that cannot be viewed in its dtype"
            end = start + (last - first) * itemsizes[entry]
            assert sent.get(entry, next(p.first for p in pieces if p.entry == entry)) == first
            sent[entry] = last
        assert end == pack.nbytes
    assert sent == {piece.entry: piece.last for piece in pieces}


def test_a_share_may_be_nothing() -> None:
    assert share([0], [1], [4], 0, 4) + share([0], [1], [4], 3, 4) == [Piece(0, 0, 1)]
    assert list(packs([], [4])) == []
