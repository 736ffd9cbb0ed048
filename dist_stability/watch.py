"""Notes the ranks leave each other outside of collectives: where each one is, and why one of them stopped.

A collective that waits for a missing rank names nobody. So every rank publishes its position, (attempt, phase), in the
job's key-value store from a background thread, a few times per timeout. When a wait runs out, :meth:`Watch.explain`
reads the positions and names the ranks that are behind, that fell silent, or that left a note saying why they failed.

The thread uses a connection of its own and only operations that do not wait, so it cannot hold up a rendezvous.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

PHASES = (
    "preflight",
    "training",
    "gradients",
    "veto vote",
    "step",
    "after step",
    "probe",
    "vote",
    "edge",
    "copy",
    "restore",
    "done",
)
"""The phases of one attempt, in order. "training" is everything between two calls of ``step()``."""

_NOTE = "note"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a rank was when it last published."""

    beat: int
    attempt: int
    phase: int
    waiting: bool

    def __str__(self) -> str:
        """For error messages."""
        return f"attempt {self.attempt}, {PHASES[self.phase]}"


class Watch:
    """The positions of all ranks of one controller.

    Args:
        store: The job's key-value store; a connection of its own is opened where the store offers that.
        prefix: Namespace of this controller, equal on all ranks.
        rank: This process's global rank.
        ranks: Global ranks that take part.
        timeout: Seconds after which a wait is given up; positions are published ten times as often.
    """

    def __init__(self, store: dist.Store, prefix: str, rank: int, ranks: Sequence[int], timeout: float) -> None:
        """Start publishing."""
        connection = store.clone() if hasattr(store, "clone") else store
        self._store = dist.PrefixStore(prefix, connection)
        self._rank = rank
        self._ranks = tuple(ranks)
        self._interval = min(max(timeout / 10, 0.05), 10.0)
        self._position = (0, 0, False)
        self._beat = 0
        self._stop = threading.Event()
        self._publish()
        self._thread = threading.Thread(target=self._run, name="dist_stability.watch", daemon=True)
        self._thread.start()

    def enter(self, attempt: int, phase: str) -> None:
        """Note that this rank has reached ``phase`` of ``attempt``; published by the thread, costs nothing here."""
        self._position = (attempt, PHASES.index(phase), False)

    def fail(self, attempt: int, reason: str) -> None:
        """Leave a note that this rank stops, and why. The first note of a job is kept; later ones follow from it."""
        self._leave(f"rank {self._rank} stopped at attempt {attempt}: {reason}", (self._rank,))

    def failure(self) -> tuple[str, tuple[int, ...]] | None:
        """The first note, if there is one: (what happened, the global ranks it is about)."""
        return self._bounded(self._read_note)

    def explain(self) -> tuple[str, tuple[int, ...]]:
        """Say who kept this rank waiting: (one line, global ranks). Without a note it takes two publishing intervals.

        What is found out is left as a note: whoever asks later would find the ranks that asked first gone as well.
        """
        noted = self.failure()
        if noted is not None:
            return noted
        attempt, phase, _ = self._position
        self._position = (attempt, phase, True)
        self._bounded(self._publish)
        before = self._bounded(self._positions)
        time.sleep(2 * self._interval)
        noted = self.failure()
        if noted is not None:
            return noted
        after = self._bounded(self._positions)
        if before is None or after is None:
            return "the job's key-value store does not answer; the process that serves it may be stopped or gone", ()
        silent = [
            r
            for r, p in after.items()
            if r != self._rank and not p.waiting and r in before and p.beat == before[r].beat
        ]
        behind = [
            r for r, p in after.items() if r not in silent and not p.waiting and (p.attempt, p.phase) < (attempt, phase)
        ]
        blamed = tuple(sorted({*silent, *behind}))
        if not blamed:
            return "no rank is behind or silent, so the transport between them failed", ()
        said = "waited for " + ", ".join(
            f"rank {r} (last seen at {after[r]}{', then silent: stopped or dead' if r in silent else ''})"
            for r in blamed
        )
        self._leave(said, blamed)
        return self.failure() or (said, blamed)

    def silent(self) -> tuple[int, ...]:
        """Ranks that do not publish any more: stopped or dead. Takes two publishing intervals; none if nobody knows."""
        before = self._bounded(self._positions)
        time.sleep(2 * self._interval)
        after = self._bounded(self._positions)
        if before is None or after is None:
            return ()
        return tuple(r for r, p in after.items() if r != self._rank and r in before and p.beat == before[r].beat)

    def _leave(self, said: str, ranks: tuple[int, ...]) -> None:
        self._bounded(lambda: self._store.compare_set(_NOTE, "", json.dumps({"said": said, "ranks": ranks})))

    def _read_note(self) -> tuple[str, tuple[int, ...]] | None:
        if not self._store.check([_NOTE]):
            return None
        note = json.loads(self._store.get(_NOTE))
        return note["said"], tuple(note["ranks"])

    def close(self) -> None:
        """Stop publishing. Idempotent."""
        self._stop.set()
        self._thread.join(timeout=1.0)

    def _positions(self) -> dict[int, Position]:
        found = {}
        for rank in self._ranks:
            key = f"at/{rank}"
            if self._store.check([key]):
                found[rank] = Position(*json.loads(self._store.get(key)))
        return found

    def _publish(self) -> None:
        self._beat += 1
        self._store.set(f"at/{self._rank}", json.dumps((self._beat, *self._position)))

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._publish()
            except RuntimeError:  # the store's server has gone: the job is ending
                return

    def _bounded(self, call: Callable[[], _T]) -> _T | None:
        """Run a store operation, but do not wait for ever: a stopped server never answers (None then)."""
        answer: list[_T] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answer.append(call())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(timeout=max(2 * self._interval, 1.0))
        return answer[0] if answer else None


@contextlib.contextmanager
def bounded(groups: Iterable[dist.ProcessGroup], seconds: float) -> Iterator[None]:
    """Bound every collective started on ``groups`` inside the block to ``seconds``, then put their timeouts back.

    A user's groups wait 10 or 30 minutes by default; a probe's forward must not. There is no public setter;
    ``_set_default_timeout`` acts on operations started later.
    """
    before = []
    for group in groups:
        for backend in {group._get_backend(device) for device in group._device_types}:
            before.append((backend, backend.options._timeout))
            backend._set_default_timeout(timedelta(seconds=seconds))
    try:
        yield
    finally:
        for backend, timeout in before:
            backend._set_default_timeout(timeout)


_TRANSPORT = (
    *("gloo", "connection closed", "connection reset", "timed out", "nccl", "broken pipe", "process group"),
    "pair closure",  # gloo, of every collective in flight when another one of its group timed out
)


def is_transport_error(error: BaseException) -> bool:
    """Whether an exception comes from a collective that lost its peers, rather than from the model."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _TRANSPORT)
