"""``every="auto"``: as often as a bound on the overhead allows, by what judging costs on this machine, measured.

What is timed. A *period* is the wall time from one judged vote that was read to the next, that is, between two moments
at which the host knows that the device is done. A period of n attempts takes::

    period(n) = n * plain + cost

``plain`` is a training step without us, ``cost`` all that a judged one adds: probe, vote, the copy, and whatever the
copy takes from the steps it hides under. Two lengths give both numbers. Parts of a step timed alone would not: on a
device that runs behind the host they blame whoever waits first.

How. A round interleaves :data:`SAMPLES` periods of length 1 with as many of the present interval, but of at least
:data:`LONG`, and takes medians; then :data:`REST` periods of the present interval pass until the next round. The judged
attempts that rounds add are counted in the overhead.

Agreement. The times of the ranks are averaged in the vote of the next judged attempt (:class:`JudgedPeriod` rides in
it), so that all ranks choose from the same numbers, and no collective is added. Told the same, the cadence chooses the
same. Training is not changed by it: it reads a clock and nothing else. *Which* attempts are judged does depend on the
clock; where that must not matter for what a refusal takes back, use ``controller.batches(loader)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from .cadence import whole
from .rules.base import checked_setting

SAMPLES = 7
"""Periods of each length in a round; their median counts."""

LONG = 4
"""Least length of the longer periods of a round: the longer, the less their noise weighs in the time of a step."""

REST = 64
"""Periods between two rounds."""

WARM_UP = 4
"""Judged attempts at the beginning whose periods do not count: state and snapshot memory are made in them."""

SLACK = 0.25
"""The interval becomes shorter only if the bound would hold with a cost this much above the measured one."""

_COUNTS = ("interval", "since", "held", "left", "warm", "waiting")
_FLAGS = ("chosen", "long_next", "clean")
_TIMES = ("short", "long")


class MeasuredCadence:
    """The smallest interval at which judging adds at most ``bound`` to the time of the plain training steps.

    Starts by judging every attempt. A longer interval is taken as soon as a round asks for it; a shorter one only with
    a margin (:data:`SLACK`). If even ``most`` is not enough, ``most`` is taken and the event says so.

    Periods with a refusal, a veto or a loss-scale overflow in them do not count.

    Args:
        bound: Share of the plain training time, above 0, at most 1: 0.02 is two percent.
        most: Longest interval, in attempts, at least 2.

    Raises:
        TypeError, ValueError: A setting is of another type or out of range.
    """

    def __init__(self, bound: float = 0.02, most: int = 64) -> None:
        """Nothing was measured yet."""
        self.bound = checked_setting("bound", bound, "a number above 0, at most 1", lambda x: 0 < x <= 1)
        self.most = whole("most", most, least=2)
        self._interval, self._chosen = 1, False
        self._since = 0
        self._held = 0
        self._left = 0  # periods until the next round; 0 in a round
        self._warm = WARM_UP
        self._long_next = False
        self._waiting = 0  # length of the last period, whose time comes with the next vote; 0 if it does not count
        self._clean = False  # nothing but accepted attempts since the last judged one, which was accepted, too
        self._short: list[float] = []
        self._long: list[float] = []

    @property
    def interval(self) -> int:
        """Attempts from one judged attempt to the next, between two rounds."""
        return self._interval

    def judged(self, attempt: int) -> bool:
        """Whether this attempt is probed."""
        return self._held > 0 or self._since + 1 >= self._next_length()

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
        """Take the time of an earlier period, and choose at the end of a round; see :meth:`Cadence.record`.

        Returns:
            At the end of a round: what was measured and chosen, in one line.
        """
        self._held = max(0, self._held - 1)
        self._clean = self._clean and accepted
        if not judged:
            self._since += 1
            return None
        if self._left:
            self._left -= 1
        else:
            self._long_next = not self._long_next
        self._take(seconds)
        self._waiting = self._since + 1 if self._clean else 0
        self._clean, self._since = accepted, 0
        if min(len(self._short), len(self._long)) >= SAMPLES:
            return self._choose()
        return None

    def hold(self, attempts: int) -> None:
        """Judge each of the next ``attempts`` attempts."""
        self._held = max(self._held, whole("attempts", attempts, least=0))

    def settings(self) -> dict[str, Any]:
        """How it was built, for comparison over ranks."""
        return {"cadence": "measured", "bound": self.bound, "most": self.most}

    def state_dict(self) -> dict[str, Any]:
        """Everything later choices depend on, except settings; JSON-able."""
        return {
            **{name: getattr(self, f"_{name}") for name in (*_COUNTS, *_FLAGS)},
            **{name: list(getattr(self, f"_{name}")) for name in _TIMES},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned; an interval above ``most`` is cut to it, and measured anew.

        Raises:
            ValueError: It was saved by another cadence, or an entry is malformed.
        """
        _check(state)
        for name in (*_COUNTS, *_FLAGS):
            setattr(self, f"_{name}", state[name])
        for name in _TIMES:
            setattr(self, f"_{name}", [float(time) for time in state[name]])
        if self._interval > self.most:
            self._interval, self._left, self._short, self._long = self.most, 0, [], []

    def overhead(self, ratio: float, interval: int) -> float:
        """Share of the plain training time that judging costs, rounds included.

        Args:
            ratio: Cost of a judged attempt / time of a plain step.
            interval: Between rounds.
        """
        judged = REST + 2 * SAMPLES
        attempts = REST * interval + SAMPLES * (1 + self._round_length(interval))
        return ratio * judged / attempts

    def _next_length(self) -> int:
        if self._left:
            return self._interval
        return self._round_length(self._interval) if self._long_next else 1

    def _round_length(self, interval: int) -> int:
        return min(max(LONG, interval), self.most)

    def _take(self, seconds: float | None) -> None:
        """The time of the period before this one, if it counts."""
        length = self._waiting
        if length == 0 or seconds is None or not (math.isfinite(seconds) and seconds > 0):
            return
        if self._warm:
            self._warm -= 1
        elif self._left == 0 and length == 1:
            self._short.append(seconds)
        elif self._left == 0 and length == self._round_length(self._interval):
            self._long.append(seconds)

    def _choose(self) -> str:
        short, long, length = median(self._short), median(self._long), self._round_length(self._interval)
        self._short, self._long, self._left, self._long_next = [], [], REST, False
        plain = (long - short) / (length - 1)
        if plain <= 0:
            return (
                f"judging every {_nth(self._interval)} attempt: {length} attempts took no longer than one "
                f"({1e3 * long:.3g} and {1e3 * short:.3g} ms), so nothing can be said about the cost"
            )
        cost = max(0.0, short - plain)
        wanted, relaxed = self._smallest(cost / plain), self._smallest((1 + SLACK) * cost / plain)
        if not self._chosen or wanted > self._interval:
            self._interval = wanted
        elif relaxed < self._interval:
            self._interval = relaxed
        self._chosen = True
        share = self.overhead(cost / plain, self._interval)
        line = (
            f"judging every {_nth(self._interval)} attempt costs {100 * share:.2g} % (bound {100 * self.bound:g} %): "
            f"probe, vote and snapshot take {1e3 * cost:.3g} ms, a plain step {1e3 * plain:.3g} ms"
        )
        if share > self.bound:
            line += f"; the bound would need a longer interval than most={self.most}"
        return line

    def _smallest(self, ratio: float) -> int:
        allowed = (k for k in range(1, self.most) if self.overhead(ratio, k) <= self.bound)
        return next(allowed, self.most)


def _nth(number: int) -> str:
    if number == 1:
        return "single"
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number}{ending}"


def _check(state: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``state_dict`` may have saved this; before anything is changed."""
    expected = sorted((*_COUNTS, *_FLAGS, *_TIMES))
    if set(state) != set(expected):
        raise ValueError(
            f"MeasuredCadence.load_state_dict: expected the keys {expected}, got {sorted(state, key=str)}; build the "
            f"controller with the cadence the checkpoint was saved with"
        )
    valid = {
        **{name: type(state[name]) is int and state[name] >= (name == "interval") for name in _COUNTS},
        **{name: isinstance(state[name], bool) for name in _FLAGS},
        **{name: isinstance(state[name], list) and all(map(_is_time, state[name])) for name in _TIMES},
    }
    for name in (name for name, is_valid in valid.items() if not is_valid):
        raise ValueError(
            f"MeasuredCadence.load_state_dict: entry {name!r} is {state[name]!r}, which MeasuredCadence never saves"
        )


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
