"""Who keeps whose copy: for many layouts of ranks on hosts, the loss of any one host loses nothing."""

from __future__ import annotations

import itertools
import random

import pytest

from dist_stability.snapshot.tiers.hosts import keepers, this_host


def check(hosts: dict[int, str]) -> None:
    kept = keepers(hosts)
    assert set(kept) == set(hosts)
    for rank, keeper in kept.items():
        assert keeper in hosts and hosts[keeper] != hosts[rank]
    for lost in set(hosts.values()):
        left = {rank for rank in hosts if hosts[rank] != lost}
        assert left | {rank for rank in hosts if kept[rank] in left} == set(hosts)


def test_every_small_layout_survives_the_loss_of_any_host() -> None:
    for count in range(2, 7):
        for names in itertools.product("ABC", repeat=count):
            if len(set(names)) > 1:
                check(dict(enumerate(names)))


def test_random_layouts_of_ranks_with_gaps() -> None:
    draw = random.Random(0)
    for _ in range(200):
        ranks = draw.sample(range(100), draw.randrange(2, 40))
        hosts = {rank: f"host{draw.randrange(8)}" for rank in ranks}
        if len(set(hosts.values())) > 1:
            check(hosts)


def test_the_usual_layout_is_the_same_place_on_the_next_host() -> None:
    hosts = {rank: f"host{rank // 4}" for rank in range(12)}
    assert keepers(hosts) == {rank: (rank + 4) % 12 for rank in range(12)}
    hosts = {rank: f"host{rank % 2}" for rank in range(6)}  # dealt out one by one
    assert keepers(hosts) == {0: 1, 2: 3, 4: 5, 1: 0, 3: 2, 5: 4}


def test_an_equal_layout_gives_each_rank_one_copy_to_keep() -> None:
    for count, size in itertools.product(range(2, 5), range(1, 5)):
        kept = keepers({rank: str(rank // size) for rank in range(count * size)})
        assert sorted(kept.values()) == list(range(count * size))


def test_fewer_ranks_on_the_next_host_take_turns() -> None:
    kept = keepers({0: "A", 1: "A", 2: "A", 3: "A", 4: "B", 5: "B"})
    assert [kept[rank] for rank in range(6)] == [4, 5, 4, 5, 0, 1]


@pytest.mark.parametrize("hosts", [{}, {0: "A"}, {0: "A", 1: "A"}, {3: "", 9: ""}])
def test_one_host_keeps_nothing(hosts: dict[int, str]) -> None:
    assert keepers(hosts) == {}


def test_the_name_of_this_host_stays() -> None:
    assert this_host() == this_host()
