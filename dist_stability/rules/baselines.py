"""The field's rules as baselines, in one file: what other tools refuse, flag or clip, as rules of this package.

Each is its original's test and memory and nothing more; what the original *does* about it (stop, clip, reload) is left
to the controller, which refuses the step. Each has one threshold, whose default is the original's value and which grows
more tolerant as it grows, so that all can be tuned to one budget of false refusals.

Three things hold for all of them, whether or not the original has them:

* a measurement or gradient norm that is not finite, or beyond 1e100, is refused and teaches nothing (the "NaN fix":
  each docstring says whether the original lacks it);
* a rule that watches the gradient reads the gradient norm and accepts while none is given, others read the
  measurement: ``watches`` says whether that should be the training loss, the probe or the norm;
* the sums are computed afresh at every step, so a rule that was saved and loaded goes on exactly.

Sources and formulas: this project's practice notes, sections 1.2 and 1.3, read in the repositories named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, Literal

from dist_stability.rules.base import Rule, checked_setting, checked_state
from dist_stability.verdict import Judgement

Watches = Literal["loss", "gradient", "probe"]

_LARGEST = 1e100  # squares and sums over a window stay finite


class Baseline:
    """What the baselines share; a subclass says how a value is scored and what it teaches.

    Attributes:
        watches: The stream this rule is made for. With "gradient" it reads the gradient norm instead of the
            measurement.
        threshold: The one setting; larger is more tolerant.
        bounded: False: innovation and bound are in units of the original's own statistic, so they promise nothing about
            the measurement that is committed.
    """

    bounded = False
    watches: Watches = "loss"
    # Names of the learned attributes, without underscore, by kind: what `checked_state` wants to know.
    _numbers: tuple[str, ...] = ()
    _optional: tuple[str, ...] = ()
    _counts: tuple[str, ...] = ()
    _lists: tuple[str, ...] = ()

    def __init__(self, threshold: float) -> None:
        """Set the threshold.

        Raises:
            TypeError: It is not a real number.
            ValueError: It is not finite and > 0.
        """
        self.threshold = checked_setting(
            f"{type(self).__name__} threshold", threshold, "a finite number > 0", lambda v: 0 < v < math.inf
        )

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        """Compare the watched value with the threshold; changes no state."""
        if not _usable(measurement):
            return Judgement(False, math.nan, math.inf, f"measurement is {measurement:g}")
        if gradient_norm is not None and not _usable(gradient_norm):
            return Judgement(False, math.nan, -math.inf, f"gradient norm is {gradient_norm:g}", evidence=math.inf)
        value = self._watched(measurement, gradient_norm)
        score = None if value is None else self._score(value)
        if score is None:
            return Judgement(True, math.nan, math.inf, "too little history: only checked for being finite")
        innovation, bound = score
        accepted = innovation <= bound
        return Judgement(
            accepted, innovation, bound, f"{innovation:+.4g} {'within' if accepted else 'above'} {bound:.4g}"
        )

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Learn from a proposal that stands."""
        value = self._watched(measurement, gradient_norm)
        if value is not None and _usable(value):
            self._learn(value, refused=False)

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Do with a refused value what the original does: some learn from it, some do not."""
        value = self._watched(measurement, gradient_norm)
        if value is not None and _usable(value):
            self._learn(value, refused=True)

    def settings(self) -> dict[str, Any]:
        """How the rule was built; the same on every rank."""
        return {"threshold": self.threshold, "watches": self.watches}

    def state_dict(self) -> dict[str, Any]:
        """Everything learned; exact through JSON."""
        names = (*self._numbers, *self._optional, *self._counts, *self._lists)
        values = {name: getattr(self, f"_{name}") for name in names}
        return {"rule": type(self).__name__, **{k: list(v) if isinstance(v, list) else v for k, v in values.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a saved state.

        Raises:
            TypeError: The state is not a mapping.
            ValueError: It belongs to another rule or is malformed; nothing was changed.
        """
        values = checked_state(
            self, state, numbers=self._numbers, optional=self._optional, counts=self._counts, lists=self._lists
        )
        for name, value in values.items():
            setattr(self, f"_{name}", list(value) if isinstance(value, list) else value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(threshold={self.threshold:g}, watches={self.watches!r})"

    def _watched(self, measurement: float, gradient_norm: float | None) -> float | None:
        value = gradient_norm if self.watches == "gradient" else measurement
        return None if value is None else float(value)

    def _score(self, value: float) -> tuple[float, float] | None:
        """What is compared with what: (innovation, bound), accepted iff innovation <= bound; None in warm-up."""
        raise NotImplementedError

    def _learn(self, value: float, *, refused: bool) -> None:
        """Take in one value."""
        raise NotImplementedError


class SixSigma(Baseline):
    """OLMo-core SkipStep optimizers: above mean + 6 standard deviations of the last 128.

    ``refuse iff v - mean > threshold * std``, unbiased std, from 64 values on; refused values enter the window, too.
    The original tests the loss and the norm together (each is a baseline of its own here) and upward and downward (a
    fall is no fault here). The NaN fix is ours: in the original one NaN stays in the window for 128 steps, and the
    "skipped" step multiplies NaN by 0.

    Source: allenai/OLMo-core ``optim/skip_step_optimizer.py``; Levanter ``optim/skipstep.py`` has the same test.
    """

    _lists = ("window",)

    def __init__(self, threshold: float = 6.0, *, watches: Watches = "loss") -> None:
        """Set the number of standard deviations, and the stream."""
        super().__init__(threshold)
        self.watches = watches
        self._window: list[float] = []

    def _score(self, value: float) -> tuple[float, float] | None:
        count = len(self._window)
        if count < 64:
            return None
        mean = sum(self._window) / count
        variance = sum([(v - mean) ** 2 for v in self._window]) / (count - 1)
        return value - mean, self.threshold * math.sqrt(variance)

    def _learn(self, value: float, *, refused: bool) -> None:
        self._window = [*self._window[-127:], value]


class ZClip(Baseline):
    """ZClip as a detector: the z score of the gradient norm against exponential averages of gain 0.03.

    ``refuse iff (g - m) / (s + 1e-6) > threshold`` after 25 norms of warm-up. The original clips to
    ``g* = m + threshold^2 s / z`` and goes on; as in the original, ``g*`` then enters the averages. The NaN fix is
    ours: in the original one NaN makes both averages NaN for ever.

    Source: bluorion-com/ZClip ``zclip/zclip.py``, mode "zscore", option "adaptive_scaling".
    """

    watches: Watches = "gradient"
    _optional = ("mean",)
    _numbers = ("variance",)
    _lists = ("buffer",)

    def __init__(self, threshold: float = 2.5) -> None:
        """Set the z score."""
        super().__init__(threshold)
        self._mean: float | None = None
        self._variance = 0.0
        self._buffer: list[float] = []

    def _score(self, value: float) -> tuple[float, float] | None:
        if self._mean is None:
            return None
        return (value - self._mean) / (math.sqrt(self._variance) + 1e-6), self.threshold

    def _learn(self, value: float, *, refused: bool) -> None:
        if self._mean is None:
            self._buffer = [*self._buffer, value]
            if len(self._buffer) == 25:
                self._mean = sum(self._buffer) / 25
                self._variance = sum((v - self._mean) ** 2 for v in self._buffer) / 25
                self._buffer = []
            return
        z = (value - self._mean) / (math.sqrt(self._variance) + 1e-6)
        if z > self.threshold:
            value = self._mean + self.threshold**2 * math.sqrt(self._variance) / z
        self._mean = 0.97 * self._mean + 0.03 * value
        self._variance = 0.97 * self._variance + 0.03 * (value - self._mean) ** 2


class LightningSpike(Baseline):
    """Lightning SpikeDetection: the loss is no improvement and far from the mean of the last 10.

    ``refuse iff v > last and |v - mean| >= threshold |mean|``; with the default of 2 that is three times the mean.
    Refused values are not learned (the original stops the run), so a lasting rise of that size is refused for ever.
    The original has the NaN check.

    Source: Lightning-AI/pytorch-lightning ``fabric/utilities/spike.py``, ``rtol``.
    """

    _lists = ("window",)

    def __init__(self, threshold: float = 2.0) -> None:
        """Set the relative tolerance."""
        super().__init__(threshold)
        self._window: list[float] = []

    def _score(self, value: float) -> tuple[float, float] | None:
        if not self._window:
            return None
        mean = sum(self._window) / len(self._window)
        # In units of the mean, with a fall counted as 0. The original refuses at equality, too.
        distance = abs(value - mean) if value > self._window[-1] else 0.0
        return distance, math.nextafter(self.threshold * abs(mean), 0.0)

    def _learn(self, value: float, *, refused: bool) -> None:
        if not refused:
            self._window = [*self._window[-9:], value]


class MetaseqRatio(Baseline):
    """metaseq: ratio of the loss to its exponential average of span 9 (gain 0.2).

    ``refuse iff v / average > threshold``; refused values are not learned. The original leaves the ratio to the user
    (off by default) and divides the learning rate by its fourth power; 1.25 is what this project's practice notes
    tried. A ratio depends on the level of the loss: at 10 it means something else than at 2. The NaN fix is ours: in
    the original one NaN makes the average NaN for ever.

    Source: facebookresearch/metaseq ``metaseq/trainer.py``, ``skip_spike``.
    """

    _optional = ("average",)

    def __init__(self, threshold: float = 1.25) -> None:
        """Set the ratio."""
        super().__init__(threshold)
        self._average: float | None = None

    def _score(self, value: float) -> tuple[float, float] | None:
        return None if self._average is None else (value, self.threshold * self._average)

    def _learn(self, value: float, *, refused: bool) -> None:
        if self._average is None:
            self._average = value
        elif not refused:
            self._average += 0.2 * (value - self._average)


class MegatronLarge(Baseline):
    """Megatron's rerun state machine: 10 times the largest of the first 100.

    ``refuse iff |v| >= threshold * max |first 100|``; nothing is learned after them. The original also tests for NaN
    and for infinity, and then runs the step again to find out whether the hardware erred.

    Source: NVIDIA/Megatron-LM ``core/rerun_state_machine.py``, ``is_unexpectedly_large``.
    """

    _numbers = ("largest",)
    _counts = ("seen",)

    def __init__(self, threshold: float = 10.0) -> None:
        """Set the factor."""
        super().__init__(threshold)
        self._largest = 0.0
        self._seen = 0

    def _score(self, value: float) -> tuple[float, float] | None:
        return None if self._seen < 100 else (abs(value), math.nextafter(self.threshold * self._largest, 0.0))

    def _learn(self, value: float, *, refused: bool) -> None:
        if self._seen < 100:
            self._seen += 1
            self._largest = max(self._largest, abs(value))


class KillLossSpike(Baseline):
    """llm-foundry KillLossSpike: five losses in a row, each at least twice the mean of the last 100.

    ``outlier iff v >= threshold * mean``; refused from the fifth outlier in a row on (the original's patience of 4),
    once the window is full. Outliers enter the window. The original's second test, half of the window above a cap of
    10, is left out: it asks whether the loss is high, not whether it rose. The NaN fix is ours: in the original a NaN
    makes the mean NaN for 100 steps.

    Source: mosaicml/llm-foundry ``callbacks/kill_loss_spike_callback.py``.
    """

    _lists = ("window",)
    _counts = ("outliers",)

    def __init__(self, threshold: float = 2.0) -> None:
        """Set the multiple of the mean."""
        super().__init__(threshold)
        self._window: list[float] = []
        self._outliers = 0

    def _score(self, value: float) -> tuple[float, float] | None:
        if len(self._window) < 100 or self._outliers < 4:
            return None
        return value, self._limit()

    def _learn(self, value: float, *, refused: bool) -> None:
        if len(self._window) == 100:
            self._outliers = self._outliers + 1 if value > self._limit() else 0
        self._window = [*self._window[-99:], value]

    def _limit(self) -> float:
        return math.nextafter(self.threshold * sum(self._window) / len(self._window), -math.inf)


class RobustTrend(Baseline):
    """dlib's trainer: the slope of a line through the last 60 values is surely positive.

    ``refuse iff max(z, z') > threshold`` with ``z`` the slope in its standard errors over all values, ``z'`` without
    the tenth that is largest; from 30 values on. The default 2.326 is the original's probability of 0.99. A refusal
    empties the window and makes the next harder, as the original's reload does: the tail probability beyond the
    threshold shrinks by a tenth, so it can never loop. The original looks at the values since twice its last save; a
    window of 60 is what this project's practice notes used. It has the NaN check.

    Source: davisking/dlib ``dnn/trainer.h`` and ``statistics/running_gradient.h``.
    """

    _lists = ("window",)
    _counts = ("refused",)

    def __init__(self, threshold: float = 2.3263) -> None:
        """Set the number of standard errors; at most 37, beyond which the tail probability is 0."""
        super().__init__(threshold)
        checked_setting("RobustTrend threshold", threshold, "at most 37 standard errors", lambda v: v <= 37)
        self._window: list[float] = []
        self._refused = 0

    def _score(self, value: float) -> tuple[float, float] | None:
        if len(self._window) < 29:
            return None
        values = [*self._window, value]
        kept = sorted(values)[round((len(values) - 1) * 0.9)]
        steepest = max(_slope_score(values), _slope_score([v for v in values if v <= kept]))
        if not self._refused:
            return steepest, self.threshold
        # As log10 of the tail probability, whose sign is turned so that larger means steeper.
        tail = math.log10(_normal_tail(self.threshold)) + self._refused * math.log10(0.9)
        return -math.log10(max(_normal_tail(steepest), 5e-324)), -tail

    def _learn(self, value: float, *, refused: bool) -> None:
        if refused:
            self._refused += 1
            self._window = []
        else:
            self._window = [*self._window[-58:], value]


class GradientMAD(Baseline):
    """Median and median absolute deviation of the log gradient norm, over the last 50 that were committed.

    ``refuse iff log g - median > threshold * max(1.4826 MAD, 1e-3)``, from 20 on. No tool's rule but the robust
    textbook one. Refused values are not learned: it locks out after a lasting change (which is measured, not hidden).
    """

    watches: Watches = "gradient"
    _lists = ("window",)

    def __init__(self, threshold: float = 6.0) -> None:
        """Set the number of scales."""
        super().__init__(threshold)
        self._window: list[float] = []

    def _score(self, value: float) -> tuple[float, float] | None:
        if len(self._window) < 20 or value <= 0:
            return None
        middle = median(self._window)
        scale = max(1.4826 * median([abs(v - middle) for v in self._window]), 1e-3)
        return (math.log(value) - middle) / scale, self.threshold

    def _learn(self, value: float, *, refused: bool) -> None:
        if not refused and value > 0:
            self._window = [*self._window[-49:], math.log(value)]


class Holt(Baseline):
    """Holt's linear forecast of the probe with a z score: level gain 0.5, slope gain 0.1, variance gain 0.1.

    ``refuse iff v - (level + slope) > threshold * std``, from 20 on; learns from commits only, without any patience,
    so a lasting rise is refused for ever. The plainest forecasting rule, beside which the default has to justify its
    parts.
    """

    watches: Watches = "probe"
    _optional = ("level",)
    _numbers = ("slope", "variance")
    _counts = ("seen",)

    def __init__(self, threshold: float = 6.0) -> None:
        """Set the z score."""
        super().__init__(threshold)
        self._level: float | None = None
        self._slope = self._variance = 0.0
        self._seen = 0

    def _score(self, value: float) -> tuple[float, float] | None:
        if self._level is None or self._seen < 20:
            return None
        return value - (self._level + self._slope), self.threshold * math.sqrt(self._variance)

    def _learn(self, value: float, *, refused: bool) -> None:
        if refused:
            return
        self._seen += 1
        if self._level is None:
            self._level = value
            return
        predicted = self._level + self._slope
        error = value - predicted
        level = predicted + 0.5 * error
        self._variance += max(0.1, 1 / self._seen) * (error**2 - self._variance)
        self._slope += 0.1 * ((level - self._level) - self._slope)
        self._level = level


BASELINES: dict[str, Callable[..., Rule]] = {
    "olmo-loss": SixSigma,
    "olmo-gradient": partial(SixSigma, watches="gradient"),
    "zclip": ZClip,
    "lightning": LightningSpike,
    "metaseq": MetaseqRatio,
    "megatron": MegatronLarge,
    "llm-foundry": KillLossSpike,
    "dlib": RobustTrend,
    "gradient-mad": GradientMAD,
    "holt": Holt,
}
"""Builders by name; each takes ``threshold``, whose default is the original's value."""


def _usable(value: float) -> bool:
    return abs(value) <= _LARGEST  # False for NaN


def _slope_score(values: Sequence[float]) -> float:
    """Least-squares slope over equally spaced values, in standard errors; 0 where the fit is exact and flat."""
    count = len(values)
    middle, mean = (count - 1) / 2, sum(values) / count
    spread = count * (count * count - 1) / 12
    deviations = [value - mean for value in values]
    slope = sum([(index - middle) * deviation for index, deviation in enumerate(deviations)]) / spread
    residual = max(0.0, sum([deviation**2 for deviation in deviations]) - slope**2 * spread)
    error = math.sqrt(residual / (count - 2) / spread)
    if error == 0.0:
        return 0.0 if slope == 0.0 else math.copysign(math.inf, slope)
    return slope / error


def _normal_tail(score: float) -> float:
    return 0.5 * math.erfc(score / math.sqrt(2))
