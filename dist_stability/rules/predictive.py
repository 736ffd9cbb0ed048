"""The default rule: a step is refused when it lands improbably far above where committed history says it should land.

Prediction ``p``, scale ``s`` and bar ``q`` come from committed values only::

    prediction    p = l + min(b, 0)                          level and slope; a rise is never predicted
    scale         s = max(1.2533 a, max(f (y0 - y_min), C max(0, -b)) / 6 + 1e-7 |l|)
    evidence      x = max(0, (log g - mu_g) / max(1.2533 a_g, 0.2) - 3)          of the gradient norm g
    bar           q = c(nu) T_nu(1 - rate) sqrt(1 + 1 / min(n, 23))              Student t, nu = 2, 3, 4, 4, ...
    accept  iff   y and g finite  and  y - p <= (q - x / (1 + r/r1)) (1 + r/r0) s  =  bound

Every part is there for a failure it fixed in closed loop (reject = restore, next batch):

* level *and* slope, short memory: on a falling loss an average lags above the probe and lets damage pass below it;
* ``1.2533 a`` (a mean absolute innovation, equal to sigma for a Gaussian), with single innovations clipped at 3 scales
  upward and 8 downward: one bad commit cannot blind the rule, while a true change of scale is followed at once;
* the floors: a converged, nearly constant probe, and a very smooth descent whose natural ripple would be refused for
  ever, because an exact restore brings back the momentum that makes it (``materiality``);
* patience, ``1 + r/r0`` after r refusals in a row: a rule that learns from commits only would otherwise lock out for
  ever after a lasting change; it grows with the *size* of the jump it gives in to, and re-anchors when it does;
* gradient evidence ``x``: under Adam the step after an enormous gradient hardly moves the probe, its harm comes later
  out of the moments. Evidence lowers the bar instead of deciding alone, since benign outliers of the norm are common;
* deep restore: the poison was committed already and every later proposal is bad. Asked for only while refusals carry
  *no* gradient evidence, since ordinary faults must not cost 8 to 16 committed steps.

The bound of the controller paper (Proposition 7.5) holds with the rule's own bound: ``p <= l``, and ``l`` never
exceeds the highest committed measurement M. By induction over commits: ``l' = p + 0.8 (y - p)`` lies between p and y,
hence below max(l, y); re-anchoring sets ``l' = y``; a deep restore brings back an earlier ``l``; clipping touches only
the scale. So an accepted y satisfies ``y <= p + bound <= M + bound``. The induction holds in floating point, too:
rounding is monotone, and 0.8 leaves room for the rounding of ``y - p``. (The sum ``p + bound`` rounds: an ulp.)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dist_stability.rules.base import checked_setting, checked_state
from dist_stability.rules.student import student_quantile
from dist_stability.verdict import Judgement

_LARGEST = 1e200  # a larger |measurement| is a diverged run; below it no statistic, product or bound can overflow
_SMALLEST_SCALE = sys.float_info.min  # a probe that was exactly 0 so far still has a bound that patience can raise

_MEAN_ABS_TO_SIGMA = 1.2533  # sqrt(pi / 2): sigma of a Gaussian over its mean absolute value
_LEVEL_GAIN = 0.8
_SLOPE_GAIN = 0.1
_SCALE_GAIN = 1.0 / 12.0
_SCALE_MEMORY = 23  # samples an exponential average of gain 1/12 is worth, 2 / gain - 1
_CLIP_RISE, _CLIP_FALL = 3.0, 8.0  # scales
_DESCENT_FLOOR = 1e-3  # of the descent since the start
_FLOOR_BAR = 6.0  # scales that turn a floor on the bar into a floor on the scale
_WARM_UP = 3  # commits before the probe is judged
_NORM_GAIN = 1.0 / 16.0
_NORM_WARM_UP = 8  # norms before the gradient is judged
_NORM_SCALE_FLOOR = 0.2  # in units of log norm
_NORM_FREE = 3.0  # scales of log norm that are no evidence at all
_NORM_CLIP = 3.0

_ANCHORS = 2
_COOL_DOWN = 16  # commits between two deep restores
_RECENT = 8  # committed scores that are remembered
_SUSPECT_SCORE = 3.0  # a recent commit this high may be the poison: two refusals are enough
_SUSPECT_REFUSALS, _REFUSALS = 2, 8


@dataclass(slots=True)
class _Learned:
    """What an anchor keeps and a deep restore brings back."""

    level: float = 0.0  # l
    slope: float = 0.0  # b, per commit
    spread: float = 0.0  # a, mean absolute innovation
    best: float = 0.0  # y_min
    log_norm: float | None = None  # mu_g
    log_norm_spread: float = 0.0  # a_g


class PredictiveInnovation:
    """Refuse a step whose probe lands improbably far above the prediction; one number to set.

    Affine-equivariant in the measurement (except for a relative floor of 1e-7 on the scale) and scale-free in the
    gradient norm, so the same settings serve any loss. Until three proposals were committed only finiteness is checked
    and ``bound`` is +inf; the gradient norm is evidence from its ninth value on. ``bound`` falls with gradient evidence
    (below zero when the evidence alone exceeds the bar, -inf for a norm that is not finite) and rises with the refusals
    in a row. A norm of exactly 0 is no evidence and teaches nothing.

    A value that is not finite, a negative norm, or a measurement beyond 1e200 is refused. Committed all the same (in
    observe mode), such a measurement changes nothing, and such a norm is left out.

    Two kinds of probe starve the scale, so that the first ordinary rise looks enormous: one rounded to bfloat16, whose
    value stands still and then jumps by a whole step (measure in float32), and weights that do not move for the first
    commits (a learning rate of exactly 0).

    Source: this project's detector notes, rule "LS+gd" with C = 8, tuned and reported in closed loop.
    """

    def __init__(
        self,
        false_reject_rate: float = 5e-4,
        *,
        patience: float = 32.0,
        gradient_patience: float = 128.0,
        materiality: float = 8.0,
        deep_restore: bool = True,
    ) -> None:
        """Set the rate; the other settings have been measured and rarely need a change.

        Args:
            false_reject_rate: Nominal tail probability of the Student-t bar, 1e-12 <= rate < 0.5. The default puts the
                bar at 6.2 scales; the realised rate on real trajectories is far below it.
            patience: Refusals in a row that double the bar (r0). A jump of z scales gives in after r0 (z / 6.2 - 1).
            gradient_patience: Refusals in a row that halve the weight of gradient evidence (r1).
            materiality: A rise worth fewer than about this many steps of the current descent is not refused (C).
            deep_restore: Ask for the older anchor when refusals persist without an outlying gradient. Two anchors cost
                two host copies of the training state; a sustained fault that is invisible in the gradient can be made
                worse by it.

        Raises:
            TypeError: A setting has the wrong type.
            ValueError: A setting is outside its range.
        """
        name = type(self).__name__
        refusals = "a finite number >= 1"
        self.false_reject_rate = checked_setting(
            f"{name} false_reject_rate",
            false_reject_rate,
            "a probability with 1e-12 <= rate < 0.5",
            lambda v: 1e-12 <= v < 0.5,
        )
        self.patience = checked_setting(f"{name} patience", patience, refusals, lambda v: 1 <= v < math.inf)
        self.gradient_patience = checked_setting(
            f"{name} gradient_patience", gradient_patience, refusals, lambda v: 1 <= v < math.inf
        )
        self.materiality = checked_setting(
            f"{name} materiality", materiality, "a number with 0 <= materiality <= 1e6", lambda v: 0 <= v <= 1e6
        )
        if not isinstance(deep_restore, bool):
            raise TypeError(f"{name} deep_restore must be True or False, got {deep_restore!r}")
        self.deep_restore = deep_restore
        # A Student variable has variance nu / (nu - 2): dividing it out makes the bar a number of sigmas. With nu = 2
        # it has none; 0.6 was chosen so that the bar falls smoothly: 22, 8.3, 6.7, ... 6.2 scales at the default rate.
        self._quantiles = {
            2: 0.6 * student_quantile(self.false_reject_rate, 2),
            3: math.sqrt(1 / 3) * student_quantile(self.false_reject_rate, 3),
            4: math.sqrt(1 / 2) * student_quantile(self.false_reject_rate, 4),
        }
        self._learned = _Learned()
        self._first: float | None = None  # y0
        self._commits = 0  # n: commits after the first measurement
        self._norms = 0  # n_g
        self._recent: list[float] = []  # scores z of the last commits
        self._refused = 0  # r: in a row
        self._refused_quietly = 0  # r_y: in a row without gradient evidence
        self._since_deep = _COOL_DOWN  # commits since the last deep restore; the first one need not wait
        self._anchors = 0

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        """Compare the innovation with the bound; changes no state.

        The decision is taken in exactly the reported numbers: a usable measurement and norm are accepted if and only
        if ``innovation <= bound`` (or there is no history, and ``innovation`` is NaN).
        """
        measurement = float(measurement)
        started = self._first is not None
        innovation = measurement - self._prediction() if started else math.nan
        evidence = self._evidence(gradient_norm)
        bound = self._bound(evidence)
        usable = _usable_measurement(measurement) and _usable_norm(gradient_norm)
        accepted = usable and (not started or innovation <= bound)
        deep = not accepted and self._wants_deep(self._quiet_after(measurement, gradient_norm))
        if not _usable_measurement(measurement):
            reason = f"measurement is {measurement:g}"
        elif not _usable_norm(gradient_norm):
            reason = f"gradient norm is {gradient_norm:g}"
        elif not started:
            reason = "no committed value yet: only checked for being finite"
        elif self._commits < _WARM_UP:
            reason = f"only checked for being finite (commit {self._commits + 1} of {_WARM_UP})"
        else:
            reason = (
                f"innovation {innovation:+.4g} {'within' if accepted else 'above'} bound {bound:.4g} "
                f"({innovation / self._scale():.3g} scales, bar {self._bar():.3g}"
                + (f", gradient evidence {evidence:.3g}" if evidence else "")
                + (f", {self._refused} refused before in a row" if self._refused else "")
                + ")"
            )
        if deep:
            reason += "; refusals persist without an outlying gradient: back to the older anchor"
        return Judgement(accepted, innovation, bound, reason, deep)

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Learn from a proposal that stands, and forget the refusals in a row."""
        measurement = float(measurement)
        if not _usable_measurement(measurement):
            return
        released = self._refused >= self.patience
        self._refused = self._refused_quietly = 0
        if self._first is None:
            self._first = self._learned.level = self._learned.best = measurement
            return
        self._learn_measurement(measurement)
        if gradient_norm and _usable_norm(gradient_norm):
            self._learn_norm(float(gradient_norm), released)
        if released:
            # What was just given in to is the new normal: without a fresh start the next step is refused again.
            self._learned.level = measurement
            self._recent = []
        self._since_deep += 1

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Count a refusal: it raises the next bounds, and may lead to a deep restore."""
        self._refused_quietly = self._quiet_after(float(measurement), gradient_norm)
        self._refused += 1

    def anchor(self) -> dict[str, Any]:
        """See :meth:`DeepRule.anchor`."""
        self._anchors = min(_ANCHORS, self._anchors + 1)
        return {"rule": type(self).__name__, **asdict(self._learned)}

    def deep(self, anchor: Mapping[str, Any]) -> None:
        """Continue from the statistics of the restored anchor, with a clean memory of refusals.

        Raises:
            TypeError: The anchor is not a mapping.
            ValueError: It was not made by this class's ``anchor()``; nothing was changed.
        """
        numbers = [field.name for field in fields(_Learned) if field.name != "log_norm"]
        self._learned = _Learned(**checked_state(self, anchor, numbers=numbers, optional=("log_norm",), where="deep"))
        if self._learned.log_norm is None:
            self._norms = 0  # the anchor is older than the first norm: learn its scale from the start
        self._recent = []
        self._refused = self._refused_quietly = self._since_deep = 0
        self._anchors = _ANCHORS

    def settings(self) -> dict[str, Any]:
        """How the rule was built; the same on every rank."""
        return {
            "false_reject_rate": self.false_reject_rate,
            "patience": self.patience,
            "gradient_patience": self.gradient_patience,
            "materiality": self.materiality,
            "deep_restore": self.deep_restore,
        }

    def state_dict(self) -> dict[str, Any]:
        """Learned statistics and the memory of refusals: about 20 numbers, exact through JSON."""
        return {
            "rule": type(self).__name__,
            **asdict(self._learned),
            "first": self._first,
            "commits": self._commits,
            "norms": self._norms,
            "recent": list(self._recent),
            "refused": self._refused,
            "refused_quietly": self._refused_quietly,
            "since_deep": self._since_deep,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a saved state; the rule then has no anchors.

        Raises:
            TypeError: The state is not a mapping.
            ValueError: It belongs to another rule or is malformed; nothing was changed.
        """
        values = checked_state(
            self,
            state,
            numbers=("level", "slope", "spread", "best", "log_norm_spread"),
            optional=("log_norm", "first"),
            counts=("commits", "norms", "refused", "refused_quietly", "since_deep"),
            lists=("recent",),
        )
        self._learned = _Learned(**{field.name: values[field.name] for field in fields(_Learned)})
        self._first = values["first"]
        self._commits = values["commits"]
        self._norms = values["norms"]
        self._recent = list(values["recent"])
        self._refused = values["refused"]
        self._refused_quietly = values["refused_quietly"]
        self._since_deep = values["since_deep"]
        self._anchors = 0

    def __repr__(self) -> str:
        now = "nothing committed"
        if self._first is not None:
            now = f"commits={self._commits}, prediction={self._prediction():.4g}, scale={self._scale():.3g}"
        return (
            f"{type(self).__name__}(false_reject_rate={self.false_reject_rate:g}; {now}, "
            f"refused_in_row={self._refused}, anchors={self._anchors})"
        )

    def _prediction(self) -> float:
        return self._learned.level + min(self._learned.slope, 0.0)

    def _scale(self) -> float:
        """Standard deviation of the innovation, never below what would be immaterial."""
        learned = self._learned
        descent = 0.0 if self._first is None else self._first - learned.best
        floor = max(_DESCENT_FLOOR * descent, self.materiality * max(0.0, -learned.slope)) / _FLOOR_BAR
        return max(_MEAN_ABS_TO_SIGMA * learned.spread, floor + 1e-7 * abs(learned.level), _SMALLEST_SCALE)

    def _bar(self) -> float:
        """How many scales are too many; wider while the scale rests on few commits."""
        freedom = min(4, max(2, self._commits - 1))
        return self._quantiles[freedom] * math.sqrt(1 + 1 / min(self._commits, _SCALE_MEMORY))

    def _evidence(self, gradient_norm: float | None) -> float:
        """How many scales the log gradient norm lies beyond what needs no explanation; +inf when it is no norm."""
        if not _usable_norm(gradient_norm):
            return math.inf
        learned = self._learned
        if not gradient_norm or learned.log_norm is None or self._norms < _NORM_WARM_UP:
            return 0.0
        return max(0.0, (math.log(gradient_norm) - learned.log_norm) / self._norm_scale() - _NORM_FREE)

    def _norm_scale(self) -> float:
        return max(_MEAN_ABS_TO_SIGMA * self._learned.log_norm_spread, _NORM_SCALE_FLOOR)

    def _bound(self, evidence: float) -> float:
        """Largest innovation that is accepted given this much gradient evidence."""
        if evidence == math.inf:
            return -math.inf
        if self._commits < _WARM_UP:
            return math.inf
        lowered = self._bar() - evidence / (1 + self._refused / self.gradient_patience)
        return lowered * (1 + self._refused / self.patience) * self._scale()

    def _quiet_after(self, measurement: float, gradient_norm: float | None) -> int:
        """Refusals in a row without gradient evidence, once this one is counted."""
        quiet = _usable_measurement(measurement) and self._evidence(gradient_norm) == 0.0
        return self._refused_quietly + 1 if quiet else 0

    def _wants_deep(self, quiet: int) -> bool:
        if not self.deep_restore or self._anchors < _ANCHORS or self._since_deep < _COOL_DOWN:
            return False
        suspect = max(self._recent, default=0.0) >= _SUSPECT_SCORE
        return quiet >= _REFUSALS or (quiet >= _SUSPECT_REFUSALS and suspect)

    def _learn_measurement(self, measurement: float) -> None:
        """Update level, slope and scale with one committed innovation."""
        learned = self._learned
        prediction, scale = self._prediction(), self._scale()
        innovation = measurement - prediction
        if self._commits >= _WARM_UP:
            score = min(max(innovation / scale, -_LARGEST), _LARGEST)
            self._recent = [*self._recent, score][-_RECENT:]
        self._commits += 1
        if self._commits <= _WARM_UP:
            learned.spread += (abs(innovation) - learned.spread) / self._commits
        else:
            size = min(innovation, _CLIP_RISE * scale) if innovation > 0 else min(-innovation, _CLIP_FALL * scale)
            learned.spread += max(1 / (self._commits + 1), _SCALE_GAIN) * (size - learned.spread)
        level = prediction + _LEVEL_GAIN * innovation
        learned.slope += max(1 / (self._commits + 1), _SLOPE_GAIN) * ((level - learned.level) - learned.slope)
        learned.level = level
        learned.best = min(learned.best, measurement)

    def _learn_norm(self, gradient_norm: float, released: bool) -> None:
        """Update mean and scale of the log gradient norm with one committed norm."""
        learned, value = self._learned, math.log(gradient_norm)
        self._norms += 1
        if learned.log_norm is None:
            learned.log_norm = value
            return
        gain = max(1 / self._norms, _NORM_GAIN)
        clip = _NORM_CLIP * self._norm_scale() if self._norms > _NORM_WARM_UP else math.inf
        deviation = max(-clip, min(clip, value - learned.log_norm))
        learned.log_norm_spread += gain * (abs(deviation) - learned.log_norm_spread)
        learned.log_norm = value if released else learned.log_norm + gain * deviation


def _usable_measurement(value: float) -> bool:
    return abs(value) <= _LARGEST  # False for NaN


def _usable_norm(value: float | None) -> bool:
    """A norm is a finite number >= 0; unknown (None) is usable, too."""
    return value is None or 0.0 <= value < math.inf
