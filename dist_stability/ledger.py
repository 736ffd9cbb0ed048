"""What the controller counts: attempts, accepted steps, commits, and what a rollback would take back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .verdict import Verdict

_SAVED = ("attempt", "steps", "commits", "judged", "history")


@dataclass(slots=True)
class Ledger:
    """Counters of one guarded run; equal on every rank.

    Attributes:
        attempt: Index of the current attempt.
        steps: Accepted optimizer steps.
        commits: Judged commits.
        judged: Judged attempts.
        history: Digest of all verdicts so far and the numbers they were taken in: ranks that ever disagreed about one
            differ here for good.
        loaded: Digest of the checkpoint that was loaded; 0 for none. Not saved.
        pending: Unjudged attempts accepted since the last judged commit.
        accepted: Accepted attempts newer than the oldest state that could be restored.
    """

    attempt: int = 0
    steps: int = 0
    commits: int = 0
    judged: int = 0
    history: int = 0
    loaded: int = 0
    pending: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def accept(self, judged: bool) -> None:
        """The current attempt stands."""
        self.accepted.append(self.attempt)
        self.steps += 1
        if judged:
            self.commits += 1
            self.pending = []
        else:
            self.pending.append(self.attempt)

    def provisional(self) -> None:
        """The current attempt stands until its verdict is read, and the next one begins."""
        self.accept(judged=False)
        self.attempt += 1

    def withdraw(self) -> None:
        """Undo :meth:`provisional`: the verdict of that attempt is there, and will be entered like any other."""
        self.attempt -= 1
        self.accepted.remove(self.attempt)
        self.pending.remove(self.attempt)
        self.steps -= 1

    def undo_after(self, attempt: int) -> tuple[int, ...]:
        """The state of ``attempt`` was restored: forget what was accepted later, and return it."""
        undone = tuple(index for index in self.accepted if index > attempt)
        self.accepted = [index for index in self.accepted if index <= attempt]
        self.steps -= len(undone)
        self.pending = []
        return undone

    def forget(self, oldest: int) -> None:
        """Nothing older than the state of attempt ``oldest`` can be restored any more."""
        self.accepted = [index for index in self.accepted if index > oldest]

    def close(self, verdict: Verdict, norm: float | None) -> None:
        """The current attempt is settled."""
        said = "" if norm is None else norm.hex()
        numbers = f"{verdict.innovation!r} {verdict.bound!r}"
        self.history = _digest(f"{self.history} {verdict.step} {verdict.action} {verdict.would} {said} {numbers}")
        self.attempt += 1

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in _SAVED}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept; nothing can be taken back yet.

        Args:
            state: The whole of the controller's checkpoint: ranks that loaded different ones are found out.
        """
        self.loaded = _digest(json.dumps(state, sort_keys=True, default=str))
        for name in _SAVED:
            setattr(self, name, int(state[name]))
        self.pending, self.accepted = [], []


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
