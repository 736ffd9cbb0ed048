"""Slow divergence: a rise that no single step shows, noticed in the committed measurements.

A rule that judges one step at a time cannot see damage that stays below its bar each time, such as a learning rate
that creeps up. Here the newest committed measurement is compared with what was normal 48 commits before::

    level    l' = l + 0.5 (y - l)
    spread   s' = s + max(2 / (n + 2), 1/12) (|y - y_before| - s)                 of committed measurements
    scale    S  = max(1.2533 s, 1e-3 (y_first - y_best) / 6 + 1e-7 |l|)
    alarm    y > l_then + 14 S_then sqrt(elapsed steps / 48)                      "then": 48 commits ago

* The scale is that of *then*: a run that diverges gets noisier, and its present scale would hide the rise.
* On a falling loss the spread is mostly the descent, so the bar is a rise worth about a dozen steps of progress.
* A healthy run that overfits rises by far less than its own noise in 48 steps; fourteen times the noise is allowed.
* A test for a positive slope over a window, the usual one, was tried first and dropped: measurements of neighbouring
  steps are correlated, so it alarms in every plateau (t values up to 36 on clean runs, more than in any ramp).

It warns; what follows is the controller's business. A warning needs 56 commits of history.

Measured on two tuning seeds of each of four small tasks, learning rate +3 % per step from step 120 on for 100 steps:
six of eight ramps noticed, at 0.00 to 0.12 nats (median 0.08) above the run without the ramp on a third data set; most
of that is progress not made, the loss itself had risen by 0.04 nats in the median. The other two cost progress and had
not raised the loss at all after 88 steps. No alarm on 16,900 clean steps. With a threshold of 10: seven ramps, median
0.06, and two episodes of alarm on the clean steps, both of SGD on the small CNN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dist_stability.rules.base import checked_setting, checked_state

_HORIZON = 48  # commits
_WARM_UP = 8  # commits before the scale is one
_LEVEL_GAIN = 0.5
_SPREAD_GAIN = 1.0 / 12.0
_MEAN_ABS_TO_SIGMA = 1.2533  # sqrt(pi / 2)
_DESCENT_FLOOR = 1e-3 / 6
_LARGEST = 1e200  # a larger measurement is a diverged run; below it no sum or product here can overflow


class SlowDivergence:
    """Warns when committed measurements have risen far beyond what was normal 48 commits before.

    Affine-equivariant in the measurement, except for a relative floor of 1e-7 on the scale. A measurement equal to the
    one before teaches nothing: the weights did not move. One that is not finite is ignored, as no rule commits it.
    """

    def __init__(self, threshold: float = 14.0) -> None:
        """Set the bar.

        Args:
            threshold: Scales of then by which the measurement must exceed the level of then.

        Raises:
            TypeError: Not a number.
            ValueError: Not above 0.
        """
        self.threshold = checked_setting(
            f"{type(self).__name__} threshold", threshold, "a finite number > 0", lambda v: 0 < v < math.inf
        )
        self.restart()

    def restart(self) -> None:
        """Forget the history: an older state was restored, or the yardstick moved."""
        self._first = self._best = self._level = self._spread = 0.0
        self._last: float | None = None
        self._commits = 0
        self._steps = 0
        # Of the last 48 commits, oldest first: level, scale, and the number of optimizer steps done by then.
        self._levels: list[float] = []
        self._scales: list[float] = []
        self._times: list[float] = []

    def commit(self, measurement: float, steps: int = 1) -> str | None:
        """Take in the next committed measurement.

        Args:
            measurement: Probe value y.
            steps: Optimizer steps since the commit before, >= 1.

        Returns:
            One line for people while it alarms, else None.
        """
        measurement, steps = float(measurement), max(1, int(steps))
        if not abs(measurement) <= _LARGEST or measurement == self._last:
            return None
        if self._last is None:
            self._first = self._best = self._level = self._last = measurement
            return None
        self._steps += steps
        warning = self._compare(measurement)
        self._learn(measurement, steps)
        return warning

    def settings(self) -> dict[str, Any]:
        """How it was built; the same on every rank."""
        return {"threshold": self.threshold}

    def state_dict(self) -> dict[str, Any]:
        """The history: about 150 numbers, exact through JSON."""
        return {
            "rule": type(self).__name__,
            "first": self._first,
            "best": self._best,
            "level": self._level,
            "spread": self._spread,
            "last": self._last,
            "commits": self._commits,
            "steps": self._steps,
            "levels": list(self._levels),
            "scales": list(self._scales),
            "times": list(self._times),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a saved state.

        Raises:
            TypeError: The state is not a mapping.
            ValueError: It belongs to something else or is malformed; nothing was changed.
        """
        values = checked_state(
            self,
            state,
            numbers=("first", "best", "level", "spread"),
            optional=("last",),
            counts=("commits", "steps"),
            lists=("levels", "scales", "times"),
        )
        lengths = {len(values[name]) for name in ("levels", "scales", "times")}
        if len(lengths) != 1 or max(lengths) > _HORIZON:
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: 'levels', 'scales' and 'times' must be equally long, at most "
                f"{_HORIZON}, got {[len(values[name]) for name in ('levels', 'scales', 'times')]}"
            )
        for name, value in values.items():
            setattr(self, f"_{name}", list(value) if isinstance(value, list) else value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(threshold={self.threshold:g}; commits={self._commits}, level={self._level:.4g})"

    def _compare(self, measurement: float) -> str | None:
        if len(self._levels) < _HORIZON:
            return None
        level, scale = self._levels[0], self._scales[0]
        reach = scale * math.sqrt((self._steps - self._times[0]) / _HORIZON)
        if measurement <= level + self.threshold * reach:
            return None
        return (
            f"slow divergence: committed measurements rose from {level:.4g} to {measurement:.4g} within {_HORIZON} "
            f"commits, {(measurement - level) / reach:.3g} scales of then (threshold {self.threshold:g})"
        )

    def _learn(self, measurement: float, steps: int) -> None:
        assert self._last is not None
        self._commits += 1
        gain = max(2 / (self._commits + 2), _SPREAD_GAIN)
        self._spread += gain * (abs(measurement - self._last) / math.sqrt(steps) - self._spread)
        self._level += _LEVEL_GAIN * (measurement - self._level)
        self._best, self._last = min(self._best, measurement), measurement
        if self._commits < _WARM_UP:
            return
        floor = _DESCENT_FLOOR * (self._first - self._best) + 1e-7 * abs(self._level)
        scale = max(_MEAN_ABS_TO_SIGMA * self._spread, floor)
        for kept, value in ((self._levels, self._level), (self._scales, scale), (self._times, float(self._steps))):
            kept.append(value)
            del kept[:-_HORIZON]
