"""What :class:`PredictiveInnovation` learns from commits: a local prediction, its scale, and the gradient's usual size.

Plain numbers with the arithmetic that moves them; what is done with them is in ``predictive``. An anchor is a copy of
all of it, so that a deep restore brings the statistics back together with the weights.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dist_stability.rules.base import checked_state

LARGEST = 1e200
"""A larger |measurement| is a diverged run; below it no statistic, product or bound can overflow."""

WARM_UP = 3
"""Commits before the probe is judged."""

NORM_WARM_UP = 8
"""Norms before the gradient is judged."""

HORIZONS = (4, 8, 16, 32)
"""Commits over which a rise is judged as a whole."""

_SMALLEST_SCALE = sys.float_info.min  # a probe that was exactly 0 so far still has a scale to divide by
_MEAN_ABS_TO_SIGMA = 1.2533  # sqrt(pi / 2): sigma of a Gaussian over its mean absolute value
_LEVEL_GAIN = 0.8
_SLOPE_GAIN = 0.1
_SCALE_GAIN = 1.0 / 12.0
_CLIP_RISE, _CLIP_FALL = 3.0, 8.0  # scales that one commit may teach the scale
_LEVEL_FALL = 4.0  # scales that the level follows a fall at once
_DESCENT_FLOOR = 1e-3  # of the descent since the start
_FLOOR_BAR = 6.0  # scales that turn a floor on the bar into a floor on the scale
_LARGEST_JUMP = 1e3  # a learning rate that was about 0 says nothing about the scale at the new one
_NEW_LEVEL = 2.0  # times the learning rate of the past
_NORM_GAIN = 0.3
_NORM_SCALES = 0.2, 0.5  # least and most, in units of log norm
_NORM_CLIP = 3.0  # scales
_LOSS_SCALE_FLOOR = 1e-2  # of the loss


@dataclass(slots=True)
class Learned:
    """Statistics of the committed trajectory.

    Attributes:
        level: l, where the measurement stands.
        slope: b, per optimizer step.
        spread: a, mean absolute innovation of one step.
        falls: Twice the mean downward innovation of one step: the spread, seen from below only.
        best: Lowest committed measurement, as far as the level has followed it.
        last: Measurement of the last commit.
        rate: The announced learning rate that the spread was learned under; None before there was one.
        log_norm: mu_g, of the gradient norm; None before there was one.
        log_norm_spread: a_g.
        loss: mu_L, of the training loss; None before there was one.
        loss_spread: a_L.
        clock: Optimizer steps judged so far.
        moved: Sum of all rebasing so far.
        levels: Of the last 32 commits, oldest first: the level they found.
        scales: The scale of one step they found, at the learning rate in ``rate``.
        times: The clock they found.
    """

    level: float = 0.0
    slope: float = 0.0
    spread: float = 0.0
    falls: float = 0.0
    best: float = 0.0
    last: float = 0.0
    rate: float | None = None
    log_norm: float | None = None
    log_norm_spread: float = 0.0
    loss: float | None = None
    loss_spread: float = 0.0
    clock: float = 0.0
    moved: float = 0.0
    levels: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, measurement: float) -> Learned:
        """Statistics of the starting weights."""
        return cls(level=measurement, best=measurement, last=measurement)

    @classmethod
    def from_state(cls, rule: object, state: Mapping[str, Any], where: str, **others: tuple[str, ...]) -> Learned:
        """Statistics from what ``state()`` returned, with copies of its lists.

        Args:
            rule: The rule they belong to; its name must be in the state.
            state: A saved mapping.
            where: Method named in errors.
            others: Further keys of the state, by kind, as for :func:`checked_state`.

        Raises:
            TypeError, ValueError: See :func:`checked_state`.
        """
        lists = ("levels", "scales", "times")
        optional = ("rate", "log_norm", "loss")
        numbers = tuple(name for name in cls.__slots__ if name not in (*lists, *optional))
        values = checked_state(
            rule,
            state,
            numbers=numbers,
            optional=(*optional, *others.get("optional", ())),
            counts=others.get("counts", ()),
            lists=(*lists, *others.get("lists", ())),
            where=where,
        )
        if len({len(values[name]) for name in lists}) != 1 or len(values["levels"]) > HORIZONS[-1]:
            raise ValueError(
                f"{type(rule).__name__}.{where}: {', '.join(lists)} must be equally long, at most {HORIZONS[-1]}, got "
                f"{[len(values[name]) for name in lists]}"
            )
        kept: dict[str, Any] = {name: values[name] for name in cls.__slots__}
        kept.update({name: list(values[name]) for name in lists})
        return cls(**kept)

    def state(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self)

    def prediction(self, steps: int) -> float:
        """p: where the next measurement should lie. A rise is never predicted."""
        return self.level + min(self.slope, 0.0) * steps

    def jump(self, rate: float | None) -> float:
        """How much larger an announced learning rate is than the one the scale was learned under, at least 1."""
        if rate is None or self.rate is None or rate <= self.rate:
            return 1.0
        return min(rate / self.rate, _LARGEST_JUMP)

    def scale(self, descent: float, materiality: float) -> float:
        """Standard deviation of the innovation of one step, never below what would be immaterial.

        Args:
            descent: From the start to the best.
            materiality: Steps of the present descent that a rise must be worth.
        """
        floor = max(_DESCENT_FLOOR * descent, materiality * max(0.0, -self.slope)) / _FLOOR_BAR
        return max(_MEAN_ABS_TO_SIGMA * self.spread, floor + 1e-7 * abs(self.level), _SMALLEST_SCALE)

    def scale_of_falls(self) -> float:
        """The same from downward innovations alone, which a drift upward does not have."""
        return _MEAN_ABS_TO_SIGMA * self.falls

    def learn(self, measurement: float, commits: int, steps: int, rate: float | None, scale: float) -> None:
        """Learn from one committed measurement.

        Args:
            measurement: What was committed.
            commits: Which commit this is, from 1.
            steps: Optimizer steps since the one before.
            rate: Announced learning rate of these steps.
            scale: Of one step, as it was for this proposal.
        """
        root = math.sqrt(steps)
        innovation = (measurement - self.prediction(steps)) / root
        if commits > WARM_UP:
            found = scale / self.jump(rate)  # as it is at the learning rate of the past; `_learn_rate` moves them all
            for kept, value in ((self.levels, self.level), (self.scales, found), (self.times, self.clock)):
                kept.append(value)
                del kept[: -HORIZONS[-1]]
            # 2 / (n + 2) weighs the n-th innovation with n: the steep first steps are forgotten soon.
            gain = max(2 / (commits + 2), _SCALE_GAIN)
            size = min(innovation, _CLIP_RISE * scale) if innovation > 0 else min(-innovation, _CLIP_FALL * scale)
            followed, fall = max(innovation, -_LEVEL_FALL * scale), 2 * size if innovation < 0 else 0.0
        else:
            gain, size, followed, fall = 1 / commits, abs(innovation), innovation, abs(innovation)
        self.spread += gain * (size - self.spread)
        self.falls += gain * (fall - self.falls)
        if rate is not None:
            self._learn_rate(rate, gain)
        level = self.prediction(steps) + _LEVEL_GAIN * followed * root
        self.slope += max(1 / (commits + 1), _SLOPE_GAIN) * ((level - self.level) / steps - self.slope)
        self.level, self.last, self.clock = level, measurement, self.clock + steps
        # Not a single measurement far below all others: everything usual would lie high above it for ever.
        self.best = min(self.best, max(measurement, level))

    def norm_score(self, norm: float, jump: float) -> float:
        """Scales by which a log gradient norm exceeds the usual one. Needs ``log_norm``.

        Args:
            norm: > 0.
            jump: A learning rate that was raised by this factor may have raised the norm as much.
        """
        assert self.log_norm is not None
        return (math.log(norm) - math.log(jump) - self.log_norm) / self._norm_scale()

    def learn_norm(self, norm: float, norms: int, jump: float, anew: bool) -> None:
        """Learn from one committed gradient norm.

        Args:
            norm: > 0.
            norms: Which norm this is, from 1.
            jump: As for :meth:`norm_score`; a rise as large is learned at once.
            anew: It is the new normal, whatever was before.
        """
        value = math.log(norm)
        if self.log_norm is None:
            self.log_norm = value
            return
        clip = _NORM_CLIP * self._norm_scale() if norms > NORM_WARM_UP else math.inf
        deviation = max(-clip, min(clip + math.log(jump), value - self.log_norm))
        self.log_norm_spread += max(2 / (norms + 1), _SCALE_GAIN) * (abs(deviation) - self.log_norm_spread)
        self.log_norm = value if anew else self.log_norm + max(1 / norms, _NORM_GAIN) * deviation

    def loss_score(self, loss: float, jump: float) -> float:
        """Scales by which a training loss exceeds the usual one. Needs ``loss``.

        Args:
            loss: Finite.
            jump: A learning rate that was raised by this factor may have raised the scatter as much.
        """
        assert self.loss is not None
        return (loss - self.loss) / (self._loss_scale() * jump)

    def learn_loss(self, loss: float, losses: int, anew: bool) -> None:
        """Learn from the training loss of one committed step.

        Args:
            loss: Finite.
            losses: Which loss this is, from 1.
            anew: It is the new normal, whatever was before.
        """
        if self.loss is None:
            self.loss = loss
            return
        clip = _NORM_CLIP * self._loss_scale() if losses > NORM_WARM_UP else math.inf
        deviation = max(-clip, min(clip, loss - self.loss))
        self.loss_spread += max(2 / (losses + 1), _SCALE_GAIN) * (abs(deviation) - self.loss_spread)
        self.loss = loss if anew else self.loss + max(1 / losses, _NORM_GAIN) * deviation

    def shift(self, difference: float) -> None:
        """Move everything that is a measurement."""
        self.level += difference
        self.best += difference
        self.last += difference
        self.moved += difference
        self.levels = [level + difference for level in self.levels]

    def _norm_scale(self) -> float:
        least, most = _NORM_SCALES
        return min(max(_MEAN_ABS_TO_SIGMA * self.log_norm_spread, least), most)

    def _loss_scale(self) -> float:
        assert self.loss is not None
        return max(_MEAN_ABS_TO_SIGMA * self.loss_spread, _LOSS_SCALE_FLOOR * abs(self.loss), _SMALLEST_SCALE)

    def _learn_rate(self, rate: float, gain: float) -> None:
        """Follow the announced learning rate with the memory of the scale.

        Scales of the past count at the learning rate of the past: where that has grown since, so have they. Where it
        was announced to be twice as large, the measurement settles on another level, of which the past says nothing.
        """
        if self.jump(rate) >= _NEW_LEVEL:
            self.levels, self.scales, self.times = [], [], []
        before, self.rate = self.rate, rate if self.rate is None else self.rate + gain * (rate - self.rate)
        if before is not None and self.rate > before:
            growth = min(self.rate / before, _LARGEST_JUMP)
            self.scales = [min(growth * scale, LARGEST) for scale in self.scales]
