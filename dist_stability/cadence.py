"""Which attempts are probed: every k-th one, or often while the run is restless and seldom while it is calm.

The third, :class:`~dist_stability.measured_cadence.MeasuredCadence`, is as often as a bound on the overhead allows.

A judged attempt costs a probe, a vote and a snapshot; what it buys is that a bad update is found at once, with nothing
good to undo. Far apart, probes find it later: no more than one interval later, which is what every cadence promises.

A rank that probes while another does not would wait for ever, so a cadence is a pure function of what all ranks agree
on: it looks at no clock and draws no random numbers, and is told of verdicts and of numbers that were agreed in a vote
or are the same everywhere by construction. Told the same, it chooses the same on every rank.

Who calls what (the controller, in this order)::

    judged(attempt)        on entry of every step(); changes nothing, may be asked twice
    record(attempt, ...)   after every verdict, of unjudged attempts too
    hold(attempts)         at any time: the next ones are all judged, whatever the cadence would have chosen
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from .rules.base import checked_setting

NORM_SCORE_RESTLESS = 3.0
"""A gradient norm this many robust scales above its centre is restless; where the default rule's evidence begins."""

LEARNING_RATE_JUMP = 1.25
"""An announced learning rate that rises by more than this factor from one attempt to the next is a jump."""


@runtime_checkable
class Cadence(Protocol):
    """Chooses the judged attempts."""

    @property
    def most(self) -> int:
        """Attempts from one judged attempt to the next, at most; the batch window must hold as many."""
        ...

    def judged(self, attempt: int) -> bool:
        """Whether this attempt is probed."""
        ...

    def record(
        self,
        *,
        attempt: int,
        judged: bool,
        accepted: bool,
        fraction: float | None = None,
        evidence: float = 0.0,
        norm_score: float | None = None,
        learning_rate: float | None = None,
        seconds: float | None = None,
    ) -> str | None:
        """Hear what became of an attempt. Every argument must be equal on all ranks.

        Args:
            attempt: Its index.
            judged: It was probed.
            accepted: It stands. A veto, a rollback of any depth and a loss-scale overflow do not.
            fraction: Innovation / bound, where both are finite and the bound is positive; else None.
            evidence: The rule's gradient evidence, in scales.
            norm_score: Robust score of the gradient norm, in scales; None when the norm is not known.
            learning_rate: Largest announced learning rate; None when unknown.
            seconds: At a judged attempt: how long it took, in the mean over ranks, from the reading of the vote before
                the last one to the reading of the last one; None when unknown.

        Returns:
            What was chosen and why, in one line, when there is something to say; it goes into the event.
        """
        ...

    def hold(self, attempts: int) -> None:
        """Judge each of the next ``attempts`` attempts."""
        ...

    def settings(self) -> dict[str, Any]:
        """How it was built, for comparison over ranks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything later choices depend on, except settings; JSON-able."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        ...


class FixedCadence:
    """Attempt t is judged iff (t + 1) % every == 0.

    Args:
        every: Attempts from one judged attempt to the next.

    Raises:
        TypeError, ValueError: ``every`` is not a whole number >= 1.
    """

    def __init__(self, every: int = 1) -> None:
        """Check the setting."""
        self.most = whole("every", every)
        self._held = 0

    def judged(self, attempt: int) -> bool:
        """Whether this attempt is probed."""
        return self._held > 0 or (attempt + 1) % self.most == 0

    def record(
        self,
        *,
        attempt: int,
        judged: bool,
        accepted: bool,
        fraction: float | None = None,
        evidence: float = 0.0,
        norm_score: float | None = None,
        learning_rate: float | None = None,
        seconds: float | None = None,
    ) -> None:
        """Count down a hold; nothing else changes this cadence."""
        self._held = max(0, self._held - 1)

    def hold(self, attempts: int) -> None:
        """Judge each of the next ``attempts`` attempts."""
        self._held = max(self._held, whole("attempts", attempts, least=0))

    def settings(self) -> dict[str, Any]:
        """How it was built, for comparison over ranks."""
        return {"cadence": "fixed", "every": self.most}

    def state_dict(self) -> dict[str, Any]:
        """Everything later choices depend on, except settings; JSON-able."""
        return {"held": self._held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned.

        Raises:
            ValueError: It was saved by another cadence, or an entry is malformed.
        """
        (self._held,) = _saved(self, state, ("held",))


class AdaptiveCadence:
    """Every attempt while the run is restless, up to every ``most``-th while it is calm.

    The interval starts at 1 and doubles after ``calm`` calm judged commits in a row, so the first probes far apart come
    only after calm stretches at every shorter interval. It falls back to 1 at once, also between two probes, on:

    * a refusal of any kind, and a loss-scale overflow;
    * an innovation above ``restless`` of its bound, or gradient evidence;
    * a gradient norm more than :data:`NORM_SCORE_RESTLESS` scales above its centre;
    * an announced learning rate that rises by more than :data:`LEARNING_RATE_JUMP`.

    A fault in an attempt that looked calm is noticed at the next probe, fewer than ``most`` attempts later. A commit
    that the rule could not weigh (no bound yet) is neither calm nor restless: it ends the row, not the interval.

    Args:
        most: Longest interval, in attempts.
        calm: Calm judged commits in a row, at one interval, before it doubles.
        restless: Fraction of the bound above which an innovation is restless.

    Raises:
        TypeError, ValueError: A setting is of another type or out of range.
    """

    def __init__(self, most: int = 16, calm: int = 16, restless: float = 0.5) -> None:
        """Start at an interval of 1."""
        self.most = whole("most", most)
        self.calm = whole("calm", calm)
        self.restless = checked_setting("restless", restless, "a number above 0, at most 1", lambda x: 0 < x <= 1)
        self._interval = 1
        self._row = 0
        self._since = 0
        self._held = 0
        self._learning_rate: float | None = None

    @property
    def interval(self) -> int:
        """Attempts from one judged attempt to the next, at present."""
        return self._interval

    def judged(self, attempt: int) -> bool:
        """Whether this attempt is probed: the interval since the last judged one is over."""
        return self._held > 0 or self._since + 1 >= self._interval

    def record(
        self,
        *,
        attempt: int,
        judged: bool,
        accepted: bool,
        fraction: float | None = None,
        evidence: float = 0.0,
        norm_score: float | None = None,
        learning_rate: float | None = None,
        seconds: float | None = None,
    ) -> None:
        """Lengthen or shorten the interval; see :meth:`Cadence.record`."""
        self._held = max(0, self._held - 1)
        self._since = 0 if judged else self._since + 1
        jumped = self._jumped(learning_rate)
        # Written so that NaN is restless.
        quiet = (
            accepted
            and not jumped
            and (fraction is None or fraction <= self.restless)
            and evidence <= 0
            and (norm_score is None or norm_score <= NORM_SCORE_RESTLESS)
        )
        if not quiet:
            self._interval, self._row = 1, 0
        elif judged:
            self._row = 0 if fraction is None else self._row + 1
            if self._row >= self.calm:
                self._interval, self._row = min(2 * self._interval, self.most), 0

    def hold(self, attempts: int) -> None:
        """Judge each of the next ``attempts`` attempts; what is learned from them counts as ever."""
        self._held = max(self._held, whole("attempts", attempts, least=0))

    def settings(self) -> dict[str, Any]:
        """How it was built, for comparison over ranks."""
        return {"cadence": "adaptive", "most": self.most, "calm": self.calm, "restless": self.restless}

    def state_dict(self) -> dict[str, Any]:
        """Everything later choices depend on, except settings; JSON-able."""
        return {
            "interval": self._interval,
            "row": self._row,
            "since": self._since,
            "held": self._held,
            "learning_rate": self._learning_rate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned; an interval above ``most`` is cut to it.

        Raises:
            ValueError: It was saved by another cadence, or an entry is malformed.
        """
        rate = state.get("learning_rate")
        if rate is not None:
            rate = checked_setting("cadence state: learning_rate", rate, "a number or None", lambda x: x == x)
        interval, row, since, held = _saved(self, state, ("interval", "row", "since", "held"), ("learning_rate",))
        self._interval = max(1, min(interval, self.most))
        self._row, self._since, self._held, self._learning_rate = row, since, held, rate

    def _jumped(self, learning_rate: float | None) -> bool:
        before = self._learning_rate
        if learning_rate is None or learning_rate != learning_rate:
            return False
        self._learning_rate = learning_rate
        return before is not None and learning_rate > LEARNING_RATE_JUMP * before


def whole(name: str, value: object, least: int = 1) -> int:
    """Return a setting that is a whole number.

    Raises:
        TypeError, ValueError: Naming the setting, what was expected and what came.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def _saved(owner: object, state: Mapping[str, Any], counts: tuple[str, ...], others: tuple[str, ...] = ()) -> list[int]:
    """The counts of a saved state, after checking all of it, so that a bad one changes nothing."""
    name = type(owner).__name__
    if set(state) != {*counts, *others}:
        raise ValueError(
            f"{name}.load_state_dict: expected the keys {sorted((*counts, *others))}, got {sorted(state, key=str)}; "
            f"build the controller with the cadence the checkpoint was saved with"
        )
    for key in counts:
        if type(state[key]) is not int or state[key] < 0:
            raise ValueError(f"{name}.load_state_dict: entry {key!r} is {state[key]!r}, which {name} never saves")
    return [state[key] for key in counts]
