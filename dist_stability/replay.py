"""Rewind and replay: a refusal costs the guilty batch and nothing else, however far apart the probes are.

With ``every=k`` a refusal takes back up to k - 1 attempts that nobody judged, and only one of them need be bad. So the
batches since the last judged commit are kept on the host; after a refusal the loop is given them again, oldest first,
and every one is judged: what is refused now is guilty and is dropped, the rest stands. The run then is, bit for bit,
the one that never saw the guilty batch.

* :class:`~dist_stability.window.BatchWindow` keeps batches on the host.
* :class:`ReplayQueue` decides what is shown next: a pure state machine, told of fetches and verdicts. Verdicts are
  equal on all ranks, so all ranks replay the same attempts.
* :class:`Replay` joins both to a loader and a loop: ``for batch in controller.batches(loader):``.

Contract with the loop: one ``step()`` after every ``accumulate``-th batch, whatever the batch; batches to be left out
are filtered before, in the loader. Nothing is fetched twice, so what a loader draws from the *global* generators while
it fetches batches that are replayed later is outside the promise: give it, or its sampler, a generator of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from .verdict import Action, Verdict
from .window import BatchWindow, KeptBatch, digest

T = TypeVar("T")
_END = object()


@dataclass(slots=True)
class Group(Generic[T]):
    """The batches of one attempt.

    Attributes:
        number: Of this group among all that came from loaders, from 0; equal on all ranks.
        batches: Micro-batches, in order.
        replayed: It was taken back and is shown again, so it must be judged.
        retried: It was refused alone once and given another chance.
        idle: It made no step: it was vetoed, or the loss scale overflowed.
    """

    number: int
    batches: list[T]
    replayed: bool = False
    retried: bool = False
    idle: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """What a verdict meant for the batches; group numbers, in order.

    Attributes:
        final: Groups about which an ordinary rollback can change nothing any more.
        dropped: The guilty group, which is not shown again unless what it was computed from is taken back; None if
            there is none, or it is not known yet which it is.
        replay: Groups to be shown again because of this verdict.
        lost: Attempts that were taken back and cannot be shown again: older than what is held (a deeper rollback, a
            reload), never taken from :meth:`Replay.batches`, or of an irregular number of micro-batches.
    """

    final: tuple[int, ...] = ()
    dropped: int | None = None
    replay: tuple[int, ...] = ()
    lost: int = 0


class ReplayQueue(Generic[T]):
    """What is shown to the loop next, and what may still be taken back.

    A group is *current* from its first batch to its verdict, *held* while it is accepted but not judged, and *waiting*
    while it is to be shown again. It is shown at most three times: when fetched, in the replay after a refusal that
    took it back, and once more if a retry was asked for. So the queue cannot loop on a bad batch.

    Args:
        most: Attempts from one judged attempt to the next, at most.

    Attributes:
        accumulate: Micro-batches in an attempt.
        consumed: Batches fetched from loaders.
    """

    def __init__(self, most: int) -> None:
        """Nothing was fetched yet."""
        self.most, self.accumulate, self.consumed = most, 1, 0
        self._groups = 0
        self._current: Group[T] | None = None
        self._held: list[Group[T]] = []
        self._unheld = 0  # idle groups since the last judged commit for which the window had no room
        self._waiting: deque[Group[T]] = deque()

    @property
    def current(self) -> Group[T] | None:
        """The group under way: it has no verdict yet."""
        return self._current

    @property
    def groups(self) -> tuple[Group[T], ...]:
        """Every group whose batches are still wanted: held, current, waiting."""
        return (*self._held, *([] if self._current is None else [self._current]), *self._waiting)

    @property
    def replaying(self) -> bool:
        """Whether the group under way, or else the next one, is shown again."""
        return bool(self._waiting) if self._current is None else self._current.replayed

    @property
    def must_judge(self) -> bool:
        """Whether the attempt whose ``step()`` is entered must be judged, whatever the cadence says.

        In replay; when the window is full, because the attempt that was to be judged was vetoed or overflowed; and when
        the group is not of ``accumulate`` batches and so could not be replayed.
        """
        current = self._current
        return current is not None and (
            current.replayed or len(self._held) + 1 >= self.most or len(current.batches) != self.accumulate
        )

    def begin(self, accumulate: int) -> None:
        """A loop begins.

        What waits for replay, waits on. Of a group that the last loop left without a verdict, a rest of fewer than
        ``accumulate`` batches goes on to grow, as its gradients do.
        """
        self.accumulate = accumulate
        current = self._current
        if current is not None and current.replayed:
            self._waiting.appendleft(current)
        if current is not None and (current.replayed or len(current.batches) >= accumulate):
            self._current = None

    def fetched(self, batch: T) -> None:
        """A new batch comes from the loader and joins the group under way.

        Raises:
            RuntimeError: Something is to be shown again first.
        """
        if self.replaying:
            raise RuntimeError("fetched(): what is waiting is shown again before anything new is fetched")
        if self._current is None:
            self._current = Group(self._groups, [])
            self._groups += 1
        self._current.batches.append(batch)
        self.consumed += 1

    def again(self) -> Group[T]:
        """Begin to show the next waiting group again.

        Raises:
            RuntimeError: None is waiting, or a group is under way.
        """
        if self._current is not None or not self._waiting:
            raise RuntimeError("again(): no group is waiting, or the one under way has no verdict yet")
        self._current = self._waiting.popleft()
        self._current.replayed = True
        return self._current

    def accepted(self, judged: bool) -> Settled:
        """The attempt stands: for good if it was judged, else until the next judgement.

        Raises:
            RuntimeError: A group that is shown again was not judged; so the guilty one could not be found.
        """
        current = self._take()
        if current is not None:
            if current.replayed and not judged:
                raise RuntimeError(f"group {current.number} is shown again, so its attempt must be judged")
            self._held.append(current)
        if not judged:
            return Settled()
        held, self._held, self._unheld = self._held, [], 0
        return Settled(final=tuple(group.number for group in held))

    def skipped(self) -> Settled:
        """The loss scale overflowed: no step, but RNG, buffers and the scale itself have moved."""
        current = self._take()
        return Settled() if current is None else self._idled(current)

    def refused(self, undone: int, retry: bool = False) -> Settled:
        """The attempt was vetoed or rolled back.

        With nothing else taken back its own group is guilty; otherwise any may be, and all are shown again.

        Args:
            undone: Earlier accepted attempts that the verdict took back.
            retry: Conditions have changed (a lower learning rate), so a guilty group is shown again as well, once.
        """
        current = self._take()
        taken: list[Group[T]] = []
        lost = 0
        if undone:
            lost = undone - sum(not group.idle for group in self._held) + self._unheld
            taken, self._held, self._unheld = self._held, [], 0
        if current is not None:
            if not taken and (current.retried or not retry):
                return replace(self._idled(current), dropped=current.number, lost=lost)
            current.retried = current.retried or not taken
            taken = [*taken, current]
        again = [group for group in taken if len(group.batches) == self.accumulate]
        self._waiting.extendleft(reversed(again))
        return Settled((), None, tuple(group.number for group in again), lost + len(taken) - len(again))

    def _idled(self, group: Group[T]) -> Settled:
        """A group that made no step. It is final, unless attempts are held whose rollback concerns it, too.

        A batch that was vetoed on weights that turn out bad may be innocent, and an overflow has lowered the scale that
        a rollback restores; so it is held with them. Room for one attempt, to be judged, always remains: vetoes and
        overflows without end do not fill the window.
        """
        if not self._held:
            return Settled(final=(group.number,))
        if len(self._held) + 1 < self.most:
            group.idle = True
            self._held.append(group)
        else:
            self._unheld += 1
        return Settled()

    def _take(self) -> Group[T] | None:
        current, self._current = self._current, None
        return current


class Replay:
    """The batches of a guarded loop, shown again after a refusal.

    Who calls what: the loop iterates over :meth:`batches`; the controller asks ``queue.must_judge`` on entry of every
    ``step()`` and hands every final verdict to :meth:`settle`.

    Args:
        window: Keeps the batches.
        most: Attempts from one judged attempt to the next, at most.
    """

    def __init__(self, window: BatchWindow, most: int) -> None:
        """Nothing was fetched yet."""
        self.window = window
        self.queue: ReplayQueue[KeptBatch] = ReplayQueue(most)

    def batches(self, loader: Iterable[Any], accumulate: int = 1) -> Iterator[Any]:
        """The loader's batches, and after a refusal the kept ones again.

        New batches are passed on as they are. The loop may end early and another begin: what is to be replayed is shown
        first. A loader that is at its end is asked for nothing more, but a refusal of its last batches is replayed.

        Args:
            loader: Gives batches: tensors, or trees of them; on all ranks equally many.
            accumulate: Micro-batches in an attempt: how many batches the loop takes from one ``step()`` to the next.

        Raises:
            TypeError, ValueError: ``accumulate`` is not a whole number >= 1, or ``max_bytes`` is too small.
            RuntimeError: The loop broke the contract: it did not step after every ``accumulate``-th batch.
        """
        if not isinstance(accumulate, int) or isinstance(accumulate, bool):
            raise TypeError(f"accumulate: expected a whole number, got {accumulate!r}")
        if accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1, got {accumulate}")
        return self._iterate(loader, accumulate)

    def settle(self, verdict: Verdict) -> Settled:
        """Take note of a final verdict; what it means for the batches, equal on all ranks.

        After a cut of the learning rate the refused batch is shown once more as well.
        """
        if verdict.action is Action.SCALER_SKIP:
            settled = self.queue.skipped()
        elif verdict.action.refused:
            settled = self.queue.refused(len(verdict.undone), retry=verdict.rung == "cut_lr")
        else:
            settled = self.queue.accepted(judged=verdict.action is not Action.UNJUDGED)
        self._retain()
        return settled

    def digest(self) -> int | None:
        """Content digest of this rank's batches of the attempt under way; None if they did not come from here."""
        current = self.queue.current
        return None if current is None else digest([digest(batch.restore()) for batch in current.batches])

    def forget(self) -> None:
        """A checkpoint was loaded: nothing that was shown before can be taken back now."""
        most, consumed = self.queue.most, self.queue.consumed
        self.queue = ReplayQueue(most)
        self.queue.consumed = consumed
        self._retain()

    def _iterate(self, loader: Iterable[Any], accumulate: int) -> Iterator[Any]:
        self.queue.begin(accumulate)
        self._retain()
        source = iter(loader)
        taken = 0
        while True:
            if self.queue.replaying:
                yield from self._show_again()
                continue
            batch = next(source, _END)
            if batch is _END:
                return
            self.queue.fetched(self.window.keep(batch, of=self.queue.most * accumulate))
            yield batch
            taken = 0 if self.queue.current is None else taken + 1
            if taken >= accumulate:
                raise RuntimeError(
                    f"batches(): the loop asks for another batch, but has not called step() after {taken}. With "
                    f"gradient accumulation give batches(loader, accumulate=...); leave out batches in the loader, "
                    f"not in the loop."
                )

    def _show_again(self) -> Iterator[Any]:
        group = self.queue.again()
        for number, batch in enumerate(group.batches, 1):
            yield batch.restore()
            stepped = self.queue.current is not group
            if stepped is not (number == len(group.batches)):
                raise RuntimeError(
                    f"batches(): the attempt that is shown again has {len(group.batches)} batches, but the loop has "
                    f"{'called' if stepped else 'not called'} step() after {number}. Call step() after every "
                    f"`accumulate`-th batch, and not by the position in the loader."
                )

    def _retain(self) -> None:
        self.window.retain(batch for group in self.queue.groups for batch in group.batches)
