"""The errors a guarded run can end with. Each names the rank, the attempt and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class StabilityError(RuntimeError):
    """Base class of every error raised by this package while a run is guarded.

    All of them can be pickled with their facts: a worker process hands them to the one that started it.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Message and facts; the constructors of subclasses take other arguments than ``args`` has."""
        return _restored, (type(self), self.args, self.__dict__)


class LockstepError(StabilityError):
    """The ranks can no longer act as one: they disagree, or some did not arrive in time.

    Raised on every rank that is still able to raise. The job must stop: a process group that timed out, or whose
    peers are inside different collectives, cannot be used again.

    Attributes:
        ranks: Global ranks the error is about (those that disagree, failed, or were waited for).
        step: Attempt index at which it was noticed; -1 before the first.
    """

    def __init__(self, message: str, *, ranks: Iterable[int] = (), step: int = -1) -> None:
        """Keep the facts beside the message, so that a launcher can act on them."""
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.step = step


class SnapshotError(StabilityError):
    """A snapshot could not be taken, is damaged, or does not fit the state it should restore."""


class StabilityStop(StabilityError):
    """The budgets are spent: the run is stopped in its last committed state, with a report of what was tried.

    Attributes:
        report: JSON-able description of the refusals that led here.
    """

    def __init__(self, message: str, report: Mapping[str, Any]) -> None:
        """Keep the report beside the message."""
        super().__init__(message)
        self.report = dict(report)


def _restored(kind: type[StabilityError], args: tuple[Any, ...], facts: dict[str, Any]) -> StabilityError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(facts)
    return error
