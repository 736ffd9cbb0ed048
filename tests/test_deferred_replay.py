"""Replay under a deferred verdict: whatever is guilty, wherever it is, all the rest stands in the loader's order.

The model of test_replay.py, whose "weights" are the list of batches trained on, with the verdict on a judged attempt
read when the next batch has been trained on, or at the end of the loader.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_replay import PLENTY, Guarded, standing

from dist_stability import Verdict
from dist_stability.replay import Replay, ReplayQueue, Settled
from dist_stability.verdict import Action
from dist_stability.window import BatchWindow, digest


@dataclass
class Late(Guarded):
    """``waiting`` is the attempt whose verdict is pending, and whether it will be a refusal."""

    waiting: tuple[int, bool] | None = None

    def __post_init__(self) -> None:
        self.replay = Replay(BatchWindow(PLENTY), self.every, lambda: self.read(last=True))

    def step(self, batch: list[int]) -> None:
        assert self.attempt < 1000, "loops"
        assert len(self.replay.queue.groups) <= self.every + 1, "planned for no more"
        self.shown.append(tuple(batch))
        if not self.read(last=False):
            judged = (self.attempt + 1) % self.every == 0 or self.replay.queue.must_judge
            self.judged.append(judged)
            self.settle(batch, judged)
        self.attempt += 1

    def settle(self, batch: list[int], judged: bool) -> None:
        vetoed, overflow = self.vetoed.intersection(batch), self.overflowing.intersection(batch)
        if judged and not overflow and not (vetoed and self.pending):
            first = self.shown.count(tuple(batch)) == 1
            self.live += [n + 1000 if first and n in self.transient else n for n in batch]
            bad = [n for n in self.live[len(self.safe) :] if n >= 1000 or n in self.guilty]
            bad = [n for n in bad if not (self.lowered and n in self.curable)]
            self.pending.append(self.attempt)
            self.waiting = self.attempt, bool(bad or vetoed)
            verdict = Verdict(Action.COMMIT, self.attempt, final=False)
        else:
            verdict = self._verdict(batch, judged)
        self.verdicts.append(verdict)
        self.settled.append(self.replay.settle(verdict))

    def read(self, last: bool) -> bool:
        """Whether the attempt that waited was refused."""
        if self.waiting is None:
            return False
        (attempt, refused), self.waiting = self.waiting, None
        undone, self.pending = tuple(self.pending), []
        if refused:
            self.live, self.lowered = [*self.safe], self.lowered or self.cut
            step, undone = (attempt, undone[:-1]) if last else (self.attempt, undone)
            verdict = Verdict(Action.ROLLBACK, step, undone, rung="cut_lr" if self.cut else "skip")
        else:
            self.safe, verdict = [*self.live], Verdict(Action.COMMIT, attempt)
        self.settled.append(self.replay.settle_late(verdict, attempt))
        return refused


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_one_guilty_batch_at_any_position(every: int, accumulate: int) -> None:
    total = 4 * every * accumulate
    for guilty in range(total):
        # The dropped attempt moves the cadence, so a few more until the last of these is judged.
        run = Late(every, accumulate, guilty=frozenset([guilty])).train(range(total + every * accumulate))
        assert [n for n in run.safe if n < total] == standing(run, total, [guilty]), guilty
        assert run.dropped == [guilty // accumulate]


def test_judged_alone_the_refused_batch_is_guilty_and_the_next_is_shown_again() -> None:
    run = Late(1, guilty=frozenset([3, 4])).train(range(7))
    assert run.shown == [(0,), (1,), (2,), (3,), (4,), (4,), (5,), (5,), (6,)]
    assert run.live == [0, 1, 2, 5, 6]


@pytest.mark.parametrize("every", [1, 3])
def test_the_last_batch_is_read_at_the_end_of_the_loader(every: int) -> None:
    asked = 0

    def numbers() -> Iterable[torch.Tensor]:
        nonlocal asked
        for number in range(6):
            asked += 1
            yield torch.tensor(number)

    run = Late(every, guilty=frozenset([5]))
    for tensor in run.replay.batches(numbers()):
        run.step([int(tensor)])
    assert run.live == run.safe == [0, 1, 2, 3, 4] and asked == 6
    assert run.train(range(6, 9)).live == [0, 1, 2, 3, 4, 6, 7, 8]


@given(
    every=st.sampled_from([1, 2, 3, 5, 16]),
    accumulate=st.sampled_from([1, 3]),
    guilty=st.frozensets(st.integers(0, 59), max_size=12),
    vetoed=st.frozensets(st.integers(0, 59), max_size=6),
    transient=st.frozensets(st.integers(0, 59), max_size=4),
    overflowing=st.frozensets(st.integers(0, 59), max_size=3),
)
@settings(max_examples=400, deadline=None)
def test_what_stands_is_the_loader_without_the_guilty(
    every: int,
    accumulate: int,
    guilty: frozenset[int],
    vetoed: frozenset[int],
    transient: frozenset[int],
    overflowing: frozenset[int],
) -> None:
    run = Late(every, accumulate, guilty, vetoed, transient, overflowing).train(range(60 + 2 * every * accumulate))
    alone = {n for n in transient if n // accumulate in run.dropped}
    assert [n for n in run.safe if n < 60] == standing(run, 60, guilty | vetoed | overflowing | alone)
    assert max(map(run.shown.count, run.shown)) <= 3


@given(
    every=st.sampled_from([1, 2, 5]),
    guilty=st.frozensets(st.integers(0, 29), max_size=10),
    curable=st.frozensets(st.integers(0, 29), max_size=10),
)
@settings(max_examples=200, deadline=None)
def test_after_a_cut_the_same_batches_are_retried(every: int, guilty: frozenset[int], curable: frozenset[int]) -> None:
    run = Late(every, guilty=guilty, curable=curable, cut=True).train(range(30 + 2 * every))
    assert [n for n in run.safe if n < 30] == [n for n in range(30) if n not in guilty - curable]
    assert max(map(run.shown.count, run.shown)) <= 5


def test_a_shortened_step_keeps_its_batch_and_shows_the_next_one_again() -> None:
    queue: ReplayQueue[str] = ReplayQueue(1)
    queue.fetched("a")
    queue.provisional()
    queue.fetched("b")
    assert queue.shortened_late() == Settled(final=(0,), replay=(1,))
    assert queue.again().batches == ["b"]
    queue.provisional()
    assert queue.shortened_late() == Settled(final=(1,)) and not queue.replaying


def test_attempts_older_than_what_is_held_are_lost() -> None:
    queue: ReplayQueue[str] = ReplayQueue(1)
    for name in "ab":
        queue.fetched(name)
        if name == "a":
            queue.provisional()
    assert queue.refused_late(5) == Settled(replay=(0, 1), lost=4), (
        "a deeper rollback: which one is guilty is not known"
    )


def test_the_batch_that_is_identified_is_the_one_on_trial() -> None:
    replay = Replay(BatchWindow(PLENTY), 1, lambda: None)
    batches = replay.batches(iter([torch.tensor([1.0]), torch.tensor([2.0])]))
    next(batches)
    replay.settle(Verdict(Action.COMMIT, 0, final=False))
    next(batches)
    assert replay.digest(provisional=True) == digest([digest(torch.tensor([1.0]))])
    assert replay.digest() == digest([digest(torch.tensor([2.0]))])


def test_the_window_has_room_for_the_batch_after_the_one_on_trial() -> None:
    """Found out at the first batch, not when the budget is spent in the middle of a run."""
    size = torch.zeros(4).nbytes
    batches = (torch.zeros(4) for _ in range(3))
    with pytest.raises(ValueError, match="too small"):
        next(Replay(BatchWindow(size), 1, lambda: None).batches(batches))
    next(Replay(BatchWindow(2 * size), 1, lambda: None).batches(batches))
