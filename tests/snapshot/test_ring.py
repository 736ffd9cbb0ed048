"""The ring never gives up a good copy for one that is not complete."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from dist_stability import SnapshotError
from dist_stability.snapshot import Slot, SlotRing, SlotState, StatePlan


class World:
    """One weight, and a ring of its copies."""

    def __init__(self, anchors: int = 2) -> None:
        self.model = nn.Linear(1, 4, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.plan = StatePlan.build(self.model, [self.optimizer], 1)
        self.ring = SlotRing(anchors)

    def commit(self, attempt: int, as_anchor: bool = False) -> Slot:
        self.model.weight.data.fill_(attempt)
        slot = self.ring.begin()
        slot.fill(self.plan, attempt)
        slot.publish()
        self.ring.commit(slot, as_anchor)
        return slot

    def holds(self, slot: Slot) -> float:
        slot.restore()
        return self.model.weight[0].item()


def test_nothing_to_go_back_to() -> None:
    with pytest.raises(SnapshotError, match="nothing was committed"):
        _ = SlotRing(0).safe


@pytest.mark.parametrize("anchors", [0, 1, 2])
def test_number_of_slots(anchors: int) -> None:
    world = World(anchors)
    seen = {id(world.commit(attempt, as_anchor=attempt % 3 == 0)) for attempt in range(12)}
    assert len(seen) <= 2 + anchors
    assert len(world.ring.anchors) == anchors


def test_safe_and_anchors_move_on() -> None:
    world = World()
    for attempt in range(1, 25):
        slot = world.commit(attempt, as_anchor=attempt % 8 == 0)
        assert world.ring.safe is slot and slot.state is SlotState.VALID
    assert [anchor.attempt for anchor in world.ring.anchors] == [16, 24]
    world.commit(25)
    assert world.holds(world.ring.anchors[0]) == 16
    assert world.holds(world.ring.anchors[1]) == 24
    assert world.holds(world.ring.safe) == 25


def test_filling_touches_no_slot_in_use() -> None:
    world = World()
    for attempt in (8, 16, 17):
        world.commit(attempt, as_anchor=attempt != 17)
    slot = world.ring.begin()
    assert slot not in (world.ring.safe, *world.ring.anchors)

    world.model.weight.data.fill_(99)
    slot.fill(world.plan, 99)
    assert [world.holds(kept) for kept in (*world.ring.anchors, world.ring.safe)] == [8, 16, 17]


def test_only_a_valid_slot_can_be_committed() -> None:
    world = World()
    world.commit(1)
    slot = world.ring.begin()
    for state in (SlotState.FREE, SlotState.FILLING, SlotState.COMPLETE):
        slot.state = state
        with pytest.raises(SnapshotError, match=f"{state} cannot become the safe one"):
            world.ring.commit(slot)
    assert world.holds(world.ring.safe) == 1


def test_fall_back_to_an_anchor_makes_it_everything() -> None:
    world = World()
    for attempt in range(1, 20):
        world.commit(attempt, as_anchor=attempt % 8 == 0)
    oldest = world.ring.anchors[0]
    world.ring.fall_back(oldest)
    assert world.ring.safe is oldest and world.ring.anchors == [oldest, oldest]
    assert sum(slot.state is SlotState.VALID for slot in world.ring._slots) == 1
    for attempt in range(20, 24):
        world.commit(attempt, as_anchor=attempt == 22)
    assert [anchor.attempt for anchor in world.ring.anchors] == [8, 22]


def test_fall_back_to_the_safe_slot_changes_nothing() -> None:
    world = World()
    for attempt in (8, 16):
        world.commit(attempt, as_anchor=True)
    world.ring.fall_back(world.ring.safe)
    assert [anchor.attempt for anchor in world.ring.anchors] == [8, 16]


def test_one_anchor_stays_one() -> None:
    world = World()
    world.commit(8, as_anchor=True)
    world.commit(9)
    world.ring.fall_back(world.ring.anchors[0])
    assert [anchor.attempt for anchor in world.ring.anchors] == [8]


def test_an_adopted_slot_is_all_there_is() -> None:
    world = World()
    for attempt in range(1, 17):
        world.commit(attempt, as_anchor=attempt % 8 == 0)
    world.ring.pin()
    slot = world.ring.begin()
    slot.fill(world.plan, 20)
    slot.publish()
    world.ring.adopt(slot)
    assert world.ring.safe is slot and world.ring.anchors == [] and world.ring.pinned is None
    assert [one for one in world.ring._slots if one.state is not SlotState.FREE] == [slot]


def test_where_to_look_when_a_slot_is_damaged() -> None:
    world = World()
    for attempt in (8, 16, 17):
        world.commit(attempt, as_anchor=attempt != 17)
    old, new = world.ring.anchors
    assert list(world.ring.no_newer_than(world.ring.safe)) == [world.ring.safe, new, old]
    assert list(world.ring.no_newer_than(new)) == [new, old]
    assert list(world.ring.no_newer_than(old)) == [old]
    world.ring.fall_back(old)
    assert list(world.ring.no_newer_than(old)) == [old]


class RingMachine(RuleBasedStateMachine):
    """Against a model that keeps every committed state for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.clock = itertools.count()
        self.safe: int | None = None
        self.anchors: list[int] = []

    @rule(as_anchor=st.booleans())
    def commit(self, as_anchor: bool) -> None:
        self.safe = next(self.clock)
        self.world.commit(self.safe, as_anchor)
        if as_anchor:
            self.anchors = [*self.anchors, self.safe][-2:]

    @rule(published=st.booleans())
    def torn(self, published: bool) -> None:
        slot = self.world.ring.begin()
        self.world.model.weight.data.fill_(-1)
        slot.fill(self.world.plan, -1)
        if not published:
            slot.state = SlotState.FILLING

    @precondition(lambda self: self.anchors)
    @rule()
    def deep(self) -> None:
        slot = self.world.ring.anchors[0]
        if self.safe != self.anchors[0]:
            self.anchors = [self.anchors[0]] * len(self.anchors)
        self.safe = self.anchors[0]
        self.world.ring.fall_back(slot)

    @invariant()
    def every_promised_state_is_there(self) -> None:
        if self.safe is not None:
            assert self.world.holds(self.world.ring.safe) == self.safe
        found: list[Any] = [self.world.holds(anchor) for anchor in self.world.ring.anchors]
        assert found == self.anchors


TestRing = RingMachine.TestCase
TestRing.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
