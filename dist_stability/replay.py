"""Rewind and replay: a refusal costs the guilty batch and nothing else, however far apart the probes are.

With ``every=k`` a refusal takes back up to k - 1 attempts that nobody judged, and only one of them need be bad. So the
batches since the last judged commit are kept on the host; after a refusal the loop is given them again, oldest first,
and every one is judged: what is refused now is guilty and is dropped, the rest stands. The run then is, bit for bit,
the one that never saw the guilty batch.

* :class:`~dist_stability.window.BatchWindow` keeps batches on the host.
* :class:`ReplayQueue` decides what is shown next: a pure state machine, told of fetches and verdicts. Verdicts are
  equal on all ranks, so all ranks replay the same attempts.
* :class:`Replay` joins both to a loader and a loop: ``for batch in controller.batches(loader):``.

With ``decision="deferred"`` the verdict on a group is known only when the next one has been trained on. The group is
held until then; if it is refused, the next one, whose gradients came from refused weights, is shown again as well.

Contract with the loop: one ``step()`` after every ``accumulate``-th batch, whatever the batch; batches to be left out
are filtered before, in the loader. Nothing is fetched twice, so what a loader draws from the *global* generators while
it fetches batches that are replayed later is outside the promise: give it, or its sampler, a generator of its own.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    took it back, and once more if a retry was asked for; under a deferred verdict up to twice more, because the group
    before it was refused. So the queue cannot loop on a bad batch.

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
    def count(self) -> int:
        """Groups that came from loaders."""
        return self._groups

    def resume(self, consumed: int, count: int, waiting: Iterable[Group[T]]) -> None:
        """Go on from another process: so many batches and groups came from loaders, and some are to be shown again."""
        self.consumed, self._groups, self._waiting = consumed, count, deque(waiting)

    @property
    def newest_held(self) -> Group[T] | None:
        """The group of the last accepted attempt, if it may still be taken back."""
        return self._held[-1] if self._held else None

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

    def provisional(self) -> None:
        """The attempt stands until its verdict is read, after the forward and backward of the next group."""
        current = self._take()
        if current is not None:
            self._held.append(current)

    def confirmed(self) -> Settled:
        """The provisional attempt and all before it stand for good; the group under way stays under way."""
        held, self._held, self._unheld = self._held, [], 0
        return Settled(final=tuple(group.number for group in held))

    def shortened_late(self) -> Settled:
        """A part of the provisional attempt's step stands for good; the group under way is shown again."""
        settled, again = self.confirmed(), self._take()
        if again is None:
            return settled
        return self._show_again([again], settled)

    def refused_late(self, undone: int, retry: bool = False) -> Settled:
        """The provisional attempt is refused, after the group under way was trained on: that one is innocent.

        Args:
            undone: Accepted attempts that the verdict took back, the provisional one among them.
            retry: See :meth:`refused`.
        """
        taken, self._held = self._held, []
        lost, self._unheld = undone - sum(not group.idle for group in taken) + self._unheld, 0
        dropped = None
        if taken and undone == 1:
            guilty = taken[-1]
            if guilty.retried or not retry:
                dropped = guilty.number
                taken.remove(guilty)
            guilty.retried = True
        current = self._take()
        return self._show_again([*taken, *([] if current is None else [current])], Settled(dropped=dropped, lost=lost))

    def _show_again(self, taken: list[Group[T]], settled: Settled) -> Settled:
        again = [group for group in taken if len(group.batches) == self.accumulate]
        self._waiting.extendleft(reversed(again))
        return replace(
            settled, replay=tuple(group.number for group in again), lost=settled.lost + len(taken) - len(again)
        )

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
        return self._show_again(taken, Settled(lost=lost))

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
        finish: Reads the verdict of the last attempt, if that is deferred: called when a loader is at its end.
        follows: Note where a loader with ``state_dict`` is, for :meth:`export`.
    """

    def __init__(
        self, window: BatchWindow, most: int, finish: Callable[[], object] | None = None, follows: bool = False
    ) -> None:
        """Nothing was fetched yet."""
        self.window = window
        self._finish = finish
        self._follows = follows
        self._loader: Any = None
        self._position: Any = None  # of the loader, before the group under way was fetched
        self._wanted: Any = None  # where the next loader is to be put
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
        if not verdict.final:
            self.queue.provisional()
            return Settled()
        if verdict.action is Action.SCALER_SKIP:
            settled = self.queue.skipped()
        elif verdict.action.refused:
            settled = self.queue.refused(len(verdict.undone), retry=verdict.rung == "cut_lr")
        else:
            settled = self.queue.accepted(judged=verdict.action is not Action.UNJUDGED)
        self._retain()
        return settled

    def settle_late(self, verdict: Verdict, attempt: int) -> Settled:
        """Take note of the final verdict on an attempt that stood provisionally.

        Args:
            verdict: Of that attempt, or of the next one, whose batches are under way and have to be shown again.
            attempt: Index of the one that stood provisionally.
        """
        if verdict.action.refused:
            undone = len(verdict.undone) + (attempt not in verdict.undone)
            settled = self.queue.refused_late(undone, retry=verdict.rung == "cut_lr")
        elif verdict.action is Action.ATTENUATE:
            settled = self.queue.shortened_late()
        else:
            settled = self.queue.confirmed()
        self._retain()
        return settled

    def digest(self, provisional: bool = False) -> int | None:
        """Content digest of this rank's batches of one attempt; None if they did not come from here.

        Args:
            provisional: Of the attempt that stands provisionally, else of the one under way.
        """
        current = self.queue.newest_held if provisional else self.queue.current
        return None if current is None else digest([digest(batch.restore()) for batch in current.batches])

    def forget(self) -> None:
        """A checkpoint was loaded: nothing that was shown before can be taken back now."""
        most, consumed = self.queue.most, self.queue.consumed
        self.queue = ReplayQueue(most)
        self.queue.consumed = consumed
        self._retain()

    def export(self) -> dict[str, Any]:
        """What another process needs to show the same from the group under way on: plain data and batches.

        Called when nothing is held: on entry of a ``step()`` after a judged verdict.
        """
        queue, current = self.queue, self.queue.current
        again = [group for group in queue.groups if group.replayed or group is not current]
        fetched = 0 if current is None or current.replayed else len(current.batches)
        return {
            "consumed": queue.consumed - fetched,
            "groups": queue.count - (fetched > 0),
            "again": [(group.number, group.retried, [batch.restore() for batch in group.batches]) for group in again],
            "loader": self._position if fetched else self._where(),
        }

    def load(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from what :meth:`export` gave in another process; before any loop begins. None: from the beginning."""
        if saved is None:
            return
        self.queue = ReplayQueue(self.queue.most)
        groups = [
            Group(number, [self.window.keep(batch) for batch in batches], retried=retried)
            for number, retried, batches in saved["again"]
        ]
        self.queue.resume(saved["consumed"], saved["groups"], groups)
        self._wanted = saved["loader"]

    def _where(self) -> Any:
        follows = self._follows and hasattr(self._loader, "state_dict")
        return copy.deepcopy(self._loader.state_dict()) if follows else None

    def _iterate(self, loader: Iterable[Any], accumulate: int) -> Iterator[Any]:
        self.queue.begin(accumulate)
        self._retain()
        self._loader = loader
        if self._wanted is not None:
            wanted, self._wanted = self._wanted, None
            if not hasattr(loader, "load_state_dict"):
                raise TypeError(
                    f"batches(): the run that is resumed had a loader with a state_dict, but this "
                    f"{type(loader).__name__} has no load_state_dict; give the same kind of loader"
                )
            loader.load_state_dict(wanted)
        source = iter(loader)
        taken, ended = 0, False
        while True:
            if self.queue.replaying:
                yield from self._show_again()
                continue
            if self.queue.current is None:
                self._position = self._where()
            batch = _END if ended else next(source, _END)
            if batch is _END:
                ended = True
                if self._finish is not None:
                    self._finish()
                if self.queue.replaying:
                    continue
                return
            behind = 0 if self._finish is None else 1
            self.queue.fetched(self.window.keep(batch, of=(self.queue.most + behind) * accumulate))
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
