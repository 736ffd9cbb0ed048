"""What ranks tell each other at construction is little, however many they are."""

from __future__ import annotations

import json
from typing import Any

import harness
import pytest
import torch

from dist_stability.startup import _ranks, agree_on_replicas, agree_on_settings, make_vote, spoken


class Hall:
    """What one rank's vote hears when all ranks gather at once."""

    def __init__(self, rank: int, residences: dict[int, list[tuple[int, ...]]]) -> None:
        self.rank, self._residences = rank, residences

    def gather(self, value: Any, attempt: int) -> dict[int, Any]:
        assert value == spoken(self._residences[self.rank], self.rank)
        told = {rank: spoken(residences, rank) for rank, residences in self._residences.items()}
        return json.loads(json.dumps(told), object_pairs_hook=lambda pairs: {_number(k): v for k, v in pairs})


def _number(key: str) -> int | str:
    return int(key) if key.isdigit() else key


GROUPS = [
    [tuple(range(8))],  # DDP
    [(0, 4), (1, 5), (2, 6), (3, 7)],  # HSDP, 2 x 4
    [(0, 1, 2, 3), (4, 5, 6, 7)],  # tensor parallel
    [(0, 3, 4, 7), (1, 2, 5, 6)],  # no even distance
    [(0, 1), (2, 3, 6), tuple(range(8))],
    [],
]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_every_rank_learns_all_groups(groups: list[tuple[int, ...]]) -> None:
    residences = {rank: [group for group in groups if rank in group] + [(rank,)] for rank in range(8)}
    for rank in range(8):
        assert agree_on_replicas(Hall(rank, residences), residences[rank]) == tuple(sorted(groups))  # type: ignore[arg-type]


def test_a_group_is_told_once_and_evenly_spaced_ranks_in_a_few_bytes() -> None:
    everyone = tuple(range(3, 16_384, 8))
    assert spoken([everyone], 11) == []
    told = spoken([everyone], 3)
    assert len(json.dumps(told)) < 32 and [_ranks(each) for each in told] == [everyone]


def settings(rank: int, world: int, values: tuple[int, int]) -> list[int]:
    """Bytes of what this rank gathered."""
    vote, watch = make_vote(None, torch.device("cpu"), 20.0)
    assert watch is not None
    sizes: list[int] = []
    gather = vote.gather

    def counted(value: Any, attempt: int) -> dict[int, Any]:
        sizes.append(len(json.dumps(value)))
        return gather(value, attempt)

    vote.gather = counted  # type: ignore[method-assign]
    try:
        agree_on_settings(vote, {"long": "x" * 10_000, "value": values[rank]})
    finally:
        watch.close()
        vote.close()
    return sizes


def test_equal_settings_cost_a_few_bytes(two: harness.Pool) -> None:
    assert two.run(settings, (1, 1)) == [[18], [18]]


def test_different_ones_are_shown(two: harness.Pool) -> None:
    for error in two.run(settings, (1, 2), expect_failure=True):
        assert error.is_a("LockstepError") and "different value (rank 0: 1; rank 1: 2)" in error.message
