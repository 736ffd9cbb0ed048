"""After a refusal the kept batches are shown again and only the guilty one is missing; batches come back as they were.

The queue is tested against a model of the controller in which the "weights" are the list of batches trained on:
whatever is guilty, wherever it is, what stands in the end must be the loader's sequence without it, in order.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_stability import Verdict
from dist_stability.replay import Replay, ReplayQueue, Settled
from dist_stability.verdict import Action
from dist_stability.window import BatchWindow, KeptBatch, digest

PLENTY = 1 << 20


@dataclass
class Guarded:
    """A guarded run whose weights are the numbers it was trained on.

    ``guilty`` numbers make the probe refuse, ``vetoed`` ones a guard; ``transient`` ones make the probe refuse only the
    first time they are shown; ``overflowing`` ones are a loss-scale overflow each time. ``cut`` lowers the learning
    rate at every refusal, which cures ``curable``. ``deep_at`` restores the oldest state at that attempt. With
    ``poisonous`` a guard vetoes everything computed from weights that a guilty batch has gone into.
    """

    every: int
    accumulate: int = 1
    guilty: frozenset[int] = frozenset()
    vetoed: frozenset[int] = frozenset()
    transient: frozenset[int] = frozenset()
    overflowing: frozenset[int] = frozenset()
    curable: frozenset[int] = frozenset()
    cut: bool = False
    poisonous: bool = False
    deep_at: frozenset[int] = frozenset()

    live: list[int] = field(default_factory=list)
    safe: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    attempt: int = 0
    shown: list[tuple[int, ...]] = field(default_factory=list)
    judged: list[bool] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    lowered: bool = False

    def __post_init__(self) -> None:
        self.replay = Replay(BatchWindow(PLENTY), self.every)

    def train(self, numbers: Iterable[int]) -> Guarded:
        batch: list[int] = []
        for tensor in self.replay.batches((torch.tensor(number) for number in numbers), self.accumulate):
            batch.append(int(tensor))
            if len(batch) == self.accumulate:
                self.step(batch)
                batch = []
        return self

    def step(self, batch: list[int]) -> None:
        assert self.attempt < 1000, "loops"
        judged = (self.attempt + 1) % self.every == 0 or self.replay.queue.must_judge
        self.shown.append(tuple(batch))
        self.judged.append(judged)
        verdict = self._verdict(batch, judged)
        self.verdicts.append(verdict)
        assert len(self.replay.queue.groups) <= self.every, "planned for no more"
        self.settled.append(self.replay.settle(verdict))
        held = [group for group in self.replay.queue.groups for _ in group.batches]
        assert self.replay.window.bytes == 8 * len(held)
        self.attempt += 1

    def _verdict(self, batch: list[int], judged: bool) -> Verdict:
        if self.overflowing.intersection(batch):
            return Verdict(Action.SCALER_SKIP, self.attempt)
        first = self.shown.count(tuple(batch)) == 1
        poisoned = self.poisonous and any(n >= 1000 or n in self.guilty for n in self.live[len(self.safe) :])
        vetoed = poisoned or bool(self.vetoed.intersection(batch))
        trained = [] if vetoed else [n + 1000 if first and n in self.transient else n for n in batch]
        if not judged:
            if vetoed:
                return Verdict(Action.VETO, self.attempt)
            self.live += trained
            self.pending.append(self.attempt)
            return Verdict(Action.UNJUDGED, self.attempt)
        proposal = self.live + trained
        bad = [n for n in proposal[len(self.safe) :] if n >= 1000 or n in self.guilty]
        bad = [n for n in bad if not (self.lowered and n in self.curable)]
        if bad or self.attempt in self.deep_at:
            undone, self.pending = tuple(self.pending), []
            self.lowered = self.lowered or self.cut
            if self.attempt in self.deep_at:
                self.live, self.safe = [], []
                return Verdict(Action.DEEP_ROLLBACK, self.attempt, tuple(range(self.attempt)))
            self.live = [*self.safe]
            return Verdict(Action.ROLLBACK, self.attempt, undone, rung="cut_lr" if self.cut else "skip")
        if vetoed:
            return Verdict(Action.VETO, self.attempt)
        self.live, self.pending = proposal, []
        self.safe = [*proposal]
        return Verdict(Action.COMMIT, self.attempt)

    @property
    def dropped(self) -> list[int]:
        """Groups that were dropped and not shown again."""
        dropped: list[int] = []
        for each in self.settled:
            dropped = [number for number in dropped if number not in each.replay]
            dropped += [] if each.dropped is None else [each.dropped]
        return dropped


def groups(numbers: Iterable[int], size: int) -> Iterator[list[int]]:
    """Whole groups only."""
    numbers = list(numbers)
    return (numbers[i : i + size] for i in range(0, len(numbers) - size + 1, size))


def standing(run: Guarded, total: int, bad: Iterable[int]) -> list[int]:
    """What must stand: the groups without a bad number, in order."""
    return [n for group in groups(range(total), run.accumulate) if not set(bad).intersection(group) for n in group]


# ---------------------------------------------------------------------- one guilty batch


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("every", [1, 2, 5, 16])
def test_one_guilty_batch_at_any_position(every: int, accumulate: int) -> None:
    attempts = 4 * every
    for guilty in range(attempts * accumulate):
        run = Guarded(every, accumulate, guilty=frozenset([guilty])).train(range(attempts * accumulate))
        expected = standing(run, attempts * accumulate, [guilty])
        assert run.live == expected, guilty
        assert run.dropped == [guilty // accumulate]
        # Every attempt of the window is shown again once, and what comes later not at all.
        position = guilty // accumulate % every
        assert run.attempt == attempts + (every if every > 1 else 0)
        first = guilty // accumulate - position + every
        window = [tuple(g) for g in list(groups(range(attempts * accumulate), accumulate))[first - every : first]]
        assert run.shown[first : first + (every if every > 1 else 0)] == (window if every > 1 else [])
        assert all(run.judged[first : first + (every if every > 1 else 0)])


@pytest.mark.parametrize("every", [5, 16])
def test_two_guilty_batches_in_one_window(every: int) -> None:
    for pair in itertools.combinations(range(every), 2):
        run = Guarded(every, guilty=frozenset(pair)).train(range(3 * every))
        assert run.live == standing(run, 3 * every, pair), pair
        assert run.dropped == list(pair)


@pytest.mark.parametrize("every", [2, 5, 16])
def test_a_fault_that_does_not_recur_costs_nothing(every: int) -> None:
    for transient in range(2 * every):
        run = Guarded(every, transient=frozenset([transient])).train(range(2 * every))
        assert run.live == list(range(2 * every))
        assert run.dropped == []


def test_without_unjudged_attempts_the_refused_batch_is_the_guilty_one() -> None:
    run = Guarded(1, guilty=frozenset([3]), transient=frozenset([5])).train(range(8))
    assert run.live == [0, 1, 2, 4, 6, 7]
    assert [tuple(group) for group in groups(range(8), 1)] == run.shown


def test_an_innocent_first_batch_may_be_refused_in_replay() -> None:
    """Something else goes wrong while batch 0 is shown again: it is dropped, the guilty one is found all the same."""
    queue: ReplayQueue[str] = ReplayQueue(3)
    for name in "abc":
        queue.fetched(name)
        settled = queue.refused(2) if name == "c" else queue.accepted(judged=False)
    assert settled == Settled(replay=(0, 1, 2))
    assert queue.again().batches == ["a"]
    assert queue.refused(0) == Settled(final=(0,), dropped=0)
    assert queue.again().batches == ["b"]
    assert queue.refused(0) == Settled(final=(1,), dropped=1)
    assert queue.again().batches == ["c"]
    assert queue.accepted(judged=True) == Settled(final=(2,))
    assert queue.groups == () and not queue.replaying


def test_a_retry_in_replay_comes_before_what_follows() -> None:
    queue: ReplayQueue[str] = ReplayQueue(2)
    for name in "ab":
        queue.fetched(name)
        settled = queue.refused(1, retry=True) if name == "b" else queue.accepted(judged=False)
    assert settled.replay == (0, 1)
    assert queue.again().batches == ["a"]
    assert queue.refused(0, retry=True) == Settled(replay=(0,))
    assert queue.again().batches == ["a"]
    assert queue.refused(0, retry=True) == Settled(final=(0,), dropped=0), "once"
    assert queue.again().batches == ["b"]


def test_the_last_batches_of_a_loader_are_replayed_after_its_end() -> None:
    run = Guarded(4, guilty=frozenset([7])).train(range(8))
    assert run.live == [0, 1, 2, 3, 4, 5, 6]
    assert run.shown[8:] == [(4,), (5,), (6,), (7,)]


def test_a_window_across_two_loaders() -> None:
    run = Guarded(4, guilty=frozenset([5]))
    run.train(range(6))
    assert run.live == [0, 1, 2, 3, 4, 5], "not judged yet"
    run.train(range(6, 12))
    assert run.live == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_accumulation_goes_on_across_loaders() -> None:
    run = Guarded(3, 3, guilty=frozenset([1]))
    batch: list[int] = []
    for epoch in (range(5), range(5, 9)):
        for tensor in run.replay.batches(map(torch.tensor, epoch), 3):
            batch.append(int(tensor))
            if len(batch) == 3:
                run.step(batch)
                batch = []
    assert run.live == [3, 4, 5, 6, 7, 8]


# ---------------------------------------------------------------------- any pattern


@given(
    every=st.sampled_from([1, 2, 3, 5, 16]),
    accumulate=st.sampled_from([1, 3]),
    guilty=st.frozensets(st.integers(0, 59), max_size=12),
    vetoed=st.frozensets(st.integers(0, 59), max_size=6),
    transient=st.frozensets(st.integers(0, 59), max_size=4),
    overflowing=st.frozensets(st.integers(0, 59), max_size=3),
    poisonous=st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_what_stands_is_the_loader_without_the_guilty(
    every: int,
    accumulate: int,
    guilty: frozenset[int],
    vetoed: frozenset[int],
    transient: frozenset[int],
    overflowing: frozenset[int],
    poisonous: bool,
) -> None:
    run = Guarded(every, accumulate, guilty, vetoed, transient, overflowing, poisonous=poisonous)
    run.train(range(60 + 2 * every * accumulate))  # nothing is wrong with the rest, so the first 60 are judged
    # With no attempts before it that could have been the cause, a batch is dropped the first time it is refused.
    alone = {n for n in transient if n // accumulate in run.dropped}
    assert [n for n in run.safe if n < 60] == standing(run, 60, guilty | vetoed | overflowing | alone)
    assert max(map(run.shown.count, run.shown)) <= 2


@given(
    every=st.sampled_from([1, 2, 5]),
    guilty=st.frozensets(st.integers(0, 29), max_size=10),
    curable=st.frozensets(st.integers(0, 29), max_size=10),
)
@settings(max_examples=300, deadline=None)
def test_after_a_cut_the_same_batches_are_retried(every: int, guilty: frozenset[int], curable: frozenset[int]) -> None:
    """Batches that a lower learning rate cures stand, in order; the others are dropped after one more try."""
    run = Guarded(every, guilty=guilty, curable=curable, cut=True).train(range(30 + 2 * every))
    assert [n for n in run.safe if n < 30] == [n for n in range(30) if n not in guilty - curable]
    assert max(map(run.shown.count, run.shown)) <= 3


@given(
    every=st.sampled_from([1, 2, 5]),
    guilty=st.frozensets(st.integers(0, 29), max_size=6),
    deep_at=st.frozensets(st.integers(0, 29), max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_after_a_deeper_rollback_what_is_held_is_replayed(
    every: int, guilty: frozenset[int], deep_at: frozenset[int]
) -> None:
    """Nothing older than the window comes back; the rest stands in order."""
    run = Guarded(every, guilty=guilty, deep_at=deep_at).train(range(30))
    assert run.safe == sorted(set(run.safe) - guilty)
    for attempt, (verdict, settled) in enumerate(zip(run.verdicts, run.settled, strict=True)):
        if verdict.action is Action.DEEP_ROLLBACK:
            accepted = [v.step for v in run.verdicts[:attempt] if v.accepted]
            assert settled.lost + len(settled.replay) + (settled.dropped is not None) == attempt + 1
            assert settled.lost >= 0 and len(accepted) <= attempt


# ---------------------------------------------------------------------- what the queue is told


def test_a_veto_of_an_unjudged_attempt_drops_its_batch_only() -> None:
    run = Guarded(4, vetoed=frozenset([1])).train(range(8))
    assert run.shown == [(n,) for n in range(8)]
    assert run.live == [0, 2, 3, 4, 5, 6, 7]
    run = Guarded(4, vetoed=frozenset([0]), guilty=frozenset([2])).train(range(8))
    assert run.shown[4:7] == [(1,), (2,), (3,)], "nothing could be taken back when it was vetoed"


@pytest.mark.parametrize("every", [2, 5, 16])
def test_a_batch_vetoed_on_bad_weights_is_innocent(every: int) -> None:
    """After a bad step nobody judged, the gradients of good batches look bad; the replay gives them their chance."""
    for guilty in range(2 * every):
        run = Guarded(every, guilty=frozenset([guilty]), poisonous=True).train(range(2 * every))
        assert run.live == standing(run, 2 * every, [guilty])
        # The vetoed batches are shown again in their places, and so is one that a guard vetoes on good weights, too.
        run = Guarded(every, guilty=frozenset([guilty]), vetoed=frozenset([guilty + 1]), poisonous=True)
        run.train(range(3 * every))
        assert run.live == standing(run, 3 * every, [guilty, guilty + 1])


def test_a_veto_of_the_judged_attempt_makes_the_next_one_judged() -> None:
    """Or the window would grow beyond what was planned for."""
    run = Guarded(4, vetoed=frozenset([3])).train(range(6))
    assert run.judged == [False, False, False, True, True, False]
    assert run.live == [0, 1, 2, 4, 5]


def test_an_overflow_within_the_window_is_shown_again() -> None:
    """The restored scale is that of before it; alone in the window, it stands at once."""
    run = Guarded(4, overflowing=frozenset([1]), guilty=frozenset([2])).train(range(8))
    assert run.shown[4:8] == [(0,), (1,), (2,), (3,)]
    run = Guarded(4, overflowing=frozenset([0]), guilty=frozenset([2])).train(range(8))
    assert run.shown[4:7] == [(1,), (2,), (3,)]


def test_a_group_may_overflow_again_in_replay() -> None:
    """Then it is final: nothing is held that could take it back."""
    run = Guarded(4, overflowing=frozenset([1, 3]), guilty=frozenset([2])).train(range(12))
    assert run.live == [0, 4, 5, 6, 7, 8, 9, 10, 11]


def test_overflows_without_end_do_not_fill_the_window() -> None:
    queue: ReplayQueue[int] = ReplayQueue(3)
    queue.fetched(0)
    queue.accepted(judged=False)
    for number in range(1, 9):
        queue.fetched(number)
        assert queue.skipped() == Settled()
    queue.fetched(9)
    assert queue.must_judge and len(queue.groups) == 3
    assert queue.refused(1) == Settled(replay=(0, 1, 9), lost=7)
    queue = ReplayQueue(2)
    for number in range(4):
        queue.fetched(number)
        settled = queue.skipped() if number == 1 else queue.accepted(judged=number == 2)
    assert settled == Settled()
    queue.fetched(4)
    assert queue.refused(1) == Settled(replay=(3, 4)), "the overflow before the commit is no loss"


def test_replayed_attempts_must_be_judged() -> None:
    queue: ReplayQueue[int] = ReplayQueue(2)
    queue.fetched(0)
    assert not queue.must_judge and not queue.replaying
    queue.accepted(judged=False)
    queue.fetched(1)
    assert queue.must_judge, "the window is full"
    queue.refused(1)
    assert queue.replaying
    queue.again()
    assert queue.replaying and queue.must_judge
    with pytest.raises(RuntimeError, match="must be judged"):
        queue.accepted(judged=False)


def test_attempts_that_came_from_elsewhere_are_counted_as_lost() -> None:
    queue: ReplayQueue[int] = ReplayQueue(4)
    assert not queue.must_judge
    assert queue.accepted(judged=False) == Settled()
    queue.fetched(0)
    queue.accepted(judged=False)
    assert queue.refused(2) == Settled(replay=(0,), lost=1)
    assert queue.again().number == 0


def test_a_group_of_another_size_is_judged_and_not_replayed() -> None:
    """A loop that steps on the rest of a loader would not do so in the middle of a replay."""
    queue: ReplayQueue[int] = ReplayQueue(4)
    queue.begin(2)
    queue.fetched(0)
    queue.fetched(1)
    assert not queue.must_judge
    queue.accepted(judged=False)
    queue.fetched(2)
    assert queue.must_judge
    assert queue.refused(1) == Settled(replay=(0,), lost=1)


def test_events_out_of_order() -> None:
    queue: ReplayQueue[int] = ReplayQueue(2)
    with pytest.raises(RuntimeError, match="no group is waiting"):
        queue.again()
    queue.fetched(0)
    queue.accepted(judged=False)
    queue.fetched(1)
    queue.refused(1)
    with pytest.raises(RuntimeError, match="shown again before anything new"):
        queue.fetched(2)
    queue.again()
    with pytest.raises(RuntimeError, match="no verdict yet"):
        queue.again()


# ---------------------------------------------------------------------- the loop


def settle(replay: Replay, action: Action = Action.UNJUDGED, undone: tuple[int, ...] = ()) -> Settled:
    return replay.settle(Verdict(action, 0, undone))


def test_new_batches_are_passed_on_as_they_are() -> None:
    batches = [{"x": torch.randn(2, 3)}, {"x": torch.randn(1, 3)}]
    replay = Replay(BatchWindow(PLENTY), 2)
    for batch, given_ in zip(replay.batches(batches), batches, strict=True):
        assert batch is given_
        settle(replay)


def test_changes_that_the_loop_makes_in_place_are_not_replayed() -> None:
    replay = Replay(BatchWindow(PLENTY), 2)
    seen = []
    for number, batch in enumerate(replay.batches([torch.zeros(2), torch.ones(2)])):
        seen.append(batch.tolist())
        batch.fill_(7)
        settle(replay, *[(Action.UNJUDGED,), (Action.ROLLBACK, (0,)), (Action.COMMIT,), (Action.COMMIT,)][number])
    assert seen == [[0, 0], [1, 1], [0, 0], [1, 1]]


def test_a_batch_is_fetched_only_when_it_is_needed() -> None:
    """A loader that draws from the global generators must be asked at the same moment as without us."""
    fetched = []

    def loader() -> Iterator[torch.Tensor]:
        for number in range(3):
            fetched.append(number)
            yield torch.tensor(number)

    replay = Replay(BatchWindow(PLENTY), 4)
    iterator = replay.batches(loader())
    assert fetched == []
    next(iterator)
    assert fetched == [0]
    settle(replay)
    next(iterator)
    assert fetched == [0, 1] and replay.queue.consumed == 2


def test_a_loop_that_does_not_step_is_told() -> None:
    replay = Replay(BatchWindow(PLENTY), 4)
    iterator = replay.batches(map(torch.tensor, range(9)))
    next(iterator)
    with pytest.raises(RuntimeError, match=r"not called step\(\) after 1"):
        next(iterator)
    replay = Replay(BatchWindow(PLENTY), 4)
    iterator = replay.batches(map(torch.tensor, range(9)), accumulate=3)
    for _ in range(3):
        next(iterator)
    with pytest.raises(RuntimeError, match=r"not called step\(\) after 3"):
        next(iterator)


@pytest.mark.parametrize("taken", [1, 3])
def test_a_loop_that_steps_elsewhere_in_replay_is_told(taken: int) -> None:
    replay = Replay(BatchWindow(PLENTY), 2)
    iterator = replay.batches(map(torch.tensor, range(4)), accumulate=2)
    for action, undone in ((Action.UNJUDGED, ()), (Action.ROLLBACK, (0,))):
        next(iterator), next(iterator)
        settle(replay, action, undone)
    with pytest.raises(RuntimeError, match="2 batches, but the loop has (called|not called)"):  # noqa: RUF043
        for number in range(1, 4):
            next(iterator)
            if number == taken:
                settle(replay, Action.COMMIT)


def test_a_loop_that_is_left_in_replay_goes_on_there() -> None:
    replay = Replay(BatchWindow(PLENTY), 3)
    for number, _ in enumerate(replay.batches(map(torch.tensor, range(3)))):
        settle(replay, *[(Action.UNJUDGED,), (Action.UNJUDGED,), (Action.ROLLBACK, (0, 1)), (Action.COMMIT,)][number])
        if number == 3:
            break
    rest = []
    for batch in replay.batches(map(torch.tensor, [3])):
        rest.append(int(batch))
        settle(replay, Action.COMMIT)
    assert rest == [1, 2, 3]


def test_a_loop_that_is_left_before_its_step() -> None:
    """In replay the batch comes again; a new one is gone, as it is for any loop that breaks."""
    replay = Replay(BatchWindow(PLENTY), 2)
    iterator = replay.batches(map(torch.tensor, range(4)))
    next(iterator)
    iterator = replay.batches(map(torch.tensor, range(1, 4)))
    assert int(next(iterator)) == 1
    settle(replay)
    next(iterator)
    settle(replay, Action.ROLLBACK, (0,))
    assert int(next(iterator)) == 1
    iterator = replay.batches(map(torch.tensor, [8]))
    assert int(next(iterator)) == 1
    settle(replay, Action.COMMIT)
    assert int(next(iterator)) == 2


def test_forget() -> None:
    replay = Replay(BatchWindow(PLENTY), 2)
    iterator = replay.batches(map(torch.tensor, range(4)))
    next(iterator)
    settle(replay)
    next(iterator)
    settle(replay, Action.ROLLBACK, (0,))
    assert replay.window.bytes == 16
    replay.forget()
    assert replay.window.bytes == 0 and replay.queue.consumed == 2
    assert int(next(iterator)) == 2


def test_bad_accumulate() -> None:
    replay = Replay(BatchWindow(PLENTY), 2)
    for bad in (0, -1):
        with pytest.raises(ValueError, match="accumulate"):
            replay.batches([], bad)
    for wrong in (1.0, True, None):
        with pytest.raises(TypeError, match="accumulate"):
            replay.batches([], wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- batches

Pair = namedtuple("Pair", "left right")


def nested() -> Any:
    shared = torch.arange(6)
    return {
        "pair": Pair(torch.randn(2, 3), [torch.tensor(3, dtype=torch.int8), None, "text"]),
        "ordered": OrderedDict(mask=torch.tensor([True, False]), empty=torch.empty(0, 4)),
        "half": (
            torch.randn(4).to(torch.bfloat16),
            torch.randn(3, dtype=torch.float64),
            torch.randn(2, dtype=torch.cfloat),
        ),
        "ids": shared,
        "labels": shared,
        "index": 7,
    }


def same(a: Any, b: Any) -> bool:
    """Equal in structure, types, dtypes, strides and every bit."""
    left, spec = torch.utils._pytree.tree_flatten(a)
    right, other = torch.utils._pytree.tree_flatten(b)
    return spec == other and all(form(x) == form(y) for x, y in zip(left, right, strict=True))


def form(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    bits = leaf.detach().contiguous().flatten().view(torch.uint8).tolist()
    return leaf.dtype, leaf.shape, leaf.stride(), leaf.device, leaf.requires_grad, leaf.is_leaf, bits


def test_nested_batches_come_back_as_they_were() -> None:
    batch = nested()
    kept = KeptBatch(batch)
    first, second = kept.restore(), kept.restore()
    assert same(first, batch) and same(second, batch)
    assert first["ids"] is first["labels"] and first["ids"] is not second["ids"]
    assert first["pair"].left.data_ptr() != batch["pair"].left.data_ptr() != second["pair"].left.data_ptr()
    assert kept.bytes == 24 + 1 + 2 + 0 + 8 + 24 + 16 + 48


class Encoding(UserDict[str, Any]):
    """As tokenizers return it: no pytree node, moved in place, with attributes of its own."""

    def to(self, dtype: torch.dtype) -> Encoding:
        self.data = {key: value.to(dtype) for key, value in self.data.items()}
        return self


def test_mappings_that_are_no_pytree_nodes() -> None:
    ids = torch.arange(4)
    batch = (Encoding(ids=ids, mask=torch.ones(4)), ids)
    batch[0].source = "text"
    kept, known = KeptBatch(batch), digest(batch)
    assert kept.bytes == 32 + 16
    batch[0].to(torch.float64)["ids"].zero_()
    batch[0]["more"] = 1
    ids.zero_()
    for _ in range(2):
        back = kept.restore()
        assert type(back[0]) is Encoding and back[0].source == "text" and [*back[0]] == ["ids", "mask"]
        assert back[0]["ids"].tolist() == [0, 1, 2, 3] and back[0]["ids"] is back[1]
        assert digest(back) == known != digest(batch)
        assert back[0] is not kept.restore()[0]
        back[0]["ids"].zero_()
        back[0].clear()
    assert digest(Encoding(ids=torch.zeros(1))) != digest(Encoding(ids=torch.ones(1)))


def test_the_loop_s_own_tensors_are_not_kept_alive() -> None:
    """On a device they would fill it."""
    batch = {"x": torch.zeros(3), "encoding": Encoding(x=torch.ones(3))}
    seen = [weakref.ref(batch["x"]), weakref.ref(batch["encoding"]["x"])]
    kept = KeptBatch(batch)
    del batch
    gc.collect()
    assert [ref() for ref in seen] == [None, None] and kept.bytes == 24


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(3, 5).t(),
        lambda: torch.randn(4, requires_grad=True),
        lambda: torch.tensor([float("nan"), -0.0, float("inf"), 1e-42]),
        lambda: torch.randn(6).to(torch.float8_e4m3fn),
    ],
    ids=["channels last", "transposed", "requires grad", "odd values", "float8"],
)
def test_one_tensor_comes_back_as_it_was(make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    kept = KeptBatch(tensor)
    assert same(kept.restore(), tensor)
    assert kept.bytes == tensor.numel() * tensor.element_size()


def test_a_slice_keeps_its_own_bytes_only() -> None:
    whole = torch.randn(100, 8)
    kept = KeptBatch(whole[10:12, ::2])
    assert kept.bytes == 2 * 4 * 4
    assert torch.equal(kept.restore(), whole[10:12, ::2])


def test_what_cannot_be_kept_says_so() -> None:
    with pytest.raises(TypeError, match="sparse_coo cannot be kept"):
        KeptBatch([torch.eye(3).to_sparse()])


def test_digest_knows_a_batch_again() -> None:
    torch.manual_seed(5)
    batch = nested()
    assert digest(batch) == digest(KeptBatch(batch).restore())
    assert 0 <= digest(batch) < 2**64
    others = []
    for change in (
        lambda b: b["pair"].left[1, 2].add_(1e-6),
        lambda b: b["ids"][0].add_(1),
        lambda b: b["half"][0].neg_(),
        lambda b: b.update(index=8),
        lambda b: b.update(other=8),
        lambda b: b.update(index=7.0),
        lambda b: b.update(ids=b["ids"].to(torch.int32)),
        lambda b: b.update(ids=b["ids"].reshape(2, 3)),
    ):
        torch.manual_seed(5)
        other = nested()
        change(other)
        others.append(digest(other))
    assert len({digest(batch), *others}) == 9
    x, y = torch.randn(3), torch.randn(3)
    assert digest((x, y)) != digest((y, x)) != digest([y, x])


# ---------------------------------------------------------------------- bytes


def test_too_small_a_budget_is_found_out_at_the_first_batch() -> None:
    """Before anything is trained, and the message says what to do."""
    replay = Replay(BatchWindow(8 * 4 * 3 * 5 - 1), 5)
    iterator = replay.batches([torch.zeros(8)] * 15, accumulate=3)
    with pytest.raises(
        ValueError, match=r"max_bytes=479 .* takes 32 bytes .* 15 of its size .* 480 are needed"
    ) as error:
        next(iterator)
    assert "every" in str(error.value) and "Raise max_bytes" in str(error.value)
    assert replay.queue.groups == () and replay.window.bytes == 0
    replay = Replay(BatchWindow(8 * 4 * 3 * 5), 5)
    for number, _ in enumerate(replay.batches([torch.zeros(8)] * 15, accumulate=3)):
        assert replay.window.bytes == 32 * (number + 1)
        if number % 3 == 2:
            settle(replay, Action.UNJUDGED if number < 14 else Action.COMMIT)
    assert replay.window.bytes == 0


def test_a_later_batch_that_does_not_fit_is_refused_before_anything_is_lost() -> None:
    replay = Replay(BatchWindow(100), 3)
    iterator = replay.batches([torch.zeros(8), torch.zeros(18)])
    next(iterator)
    settle(replay)
    with pytest.raises(ValueError, match=r"max_bytes=100 .* 32 bytes are kept already, so 104 are needed"):
        next(iterator)
    assert [group.number for group in replay.queue.groups] == [0] and replay.window.bytes == 32


def test_bytes_are_given_free() -> None:
    replay = Replay(BatchWindow(PLENTY), 3)
    expected = [4, 8, 12, 12, 8, 4, 4, 8, 12, 4]
    actions = [Action.UNJUDGED, Action.UNJUDGED, Action.ROLLBACK, Action.ROLLBACK, Action.COMMIT, Action.COMMIT]
    actions += [Action.UNJUDGED, Action.UNJUDGED, Action.COMMIT, Action.UNJUDGED]
    for number, _ in enumerate(replay.batches([torch.zeros(1)] * 7)):
        assert replay.window.bytes == expected[number], number
        settle(replay, actions[number], (0, 1) if number == 2 else ())


def test_bad_budgets() -> None:
    for wrong in (1.5, True, None, "1 GiB"):
        with pytest.raises(TypeError, match="max_bytes"):
            BatchWindow(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_bytes"):
        BatchWindow(0)


@pytest.mark.gpu
def test_batches_on_a_device_come_back_there() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    batch = {"x": torch.randn(64, 3, 8, 8, device="cuda").to(memory_format=torch.channels_last), "y": torch.arange(64)}
    expected = digest(batch)
    kept = KeptBatch(batch)
    batch["x"].zero_()  # queued behind the copy
    assert digest(kept.restore()) == expected != digest(batch)
    back = kept.restore()["x"]
    assert back.is_cuda and back.is_contiguous(memory_format=torch.channels_last)
    assert kept.bytes == 64 * 3 * 64 * 4 + 64 * 8
