"""Who is replayed: the default rule, the guard, the field's rules, each under one name and with one threshold."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dist_stability.guards import GradientNormGuard
from dist_stability.rules.base import Rule
from dist_stability.rules.baselines import BASELINES, Watches
from dist_stability.rules.fixed import FixedInnovation
from dist_stability.rules.predictive import PredictiveInnovation
from dist_stability.rules.trend import SlowDivergence
from dist_stability.verdict import Judgement

DEFAULT = "predictive"
"""The rule that sets the budget of false refusals for all others."""


ON_PROBE = " on the probe"
"""Ending of the name of a loss rule that is given the probe instead: what the better measurement alone is worth."""


class Judge(Protocol):
    """The part of a rule that a replay needs."""

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        """See :meth:`Rule.judge`."""
        ...

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        """See :meth:`Rule.commit`."""
        ...

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        """See :meth:`Rule.reject`."""
        ...


@dataclass(frozen=True)
class Contestant:
    """A rule and the range of its threshold.

    Attributes:
        name: In tables.
        watches: The stream it is fed.
        build: Makes it from a threshold; None for the value it comes with.
        grid: Thresholds from the most tolerant to the most sensitive; empty if it is not swept.
        sees_norm: Whether it is given gradient norm and training loss beside the probe.
        warns: An alarm is a warning after a commit, not a refusal before it.
        original: The threshold it comes with.
    """

    name: str
    watches: Watches
    build: Callable[[float | None], Judge]
    grid: tuple[float, ...] = ()
    sees_norm: bool = True
    warns: bool = False
    original: float | None = None


class GuardAlone:
    """A guard in the place of a rule: vetoes instead of refusals, on the norm alone."""

    def __init__(self, guard: GradientNormGuard) -> None:
        """Wrap a guard."""
        self._guard = guard

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        """A veto is a refusal."""
        reason = None if gradient_norm is None else self._guard.veto(gradient_norm)
        return Judgement(reason is None, math.nan, math.nan, reason or "no veto")

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        """The guard learns."""
        self._guard.commit(gradient_norm)

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        """The guard counts."""
        self._guard.reject(gradient_norm)


class TrendAlone:
    """A slow-divergence warning in the place of a rule: it refuses where it would warn, and goes on learning."""

    def __init__(self, trend: SlowDivergence) -> None:
        """Wrap a trend."""
        self._trend = trend

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        """What the trend would say if this were committed."""
        reason = copy.deepcopy(self._trend).commit(measurement)
        return Judgement(reason is None, math.nan, math.nan, reason or "no trend")

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        """The trend learns."""
        self._trend.commit(measurement)

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        """A warning refuses nothing: the value was committed."""
        self._trend.commit(measurement)

    def restart(self) -> None:
        """See :meth:`SlowDivergence.restart`."""
        self._trend.restart()


class _Beside:
    """The default rule with something beside it, as in a controller."""

    def __init__(self, rule: PredictiveInnovation, beside: Judge) -> None:
        """Put a guard or a trend beside a rule."""
        self._rule, self._beside = rule, beside

    def expect(self, *, steps: int = 1, learning_rate: float | None = None, training_loss: float | None = None) -> None:
        """For the rule."""
        self._rule.expect(steps=steps, learning_rate=learning_rate, training_loss=training_loss)

    def rebase(self, measurement: float) -> None:
        """For the rule."""
        self._rule.rebase(measurement)

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        """The first "no" of the two."""
        first = self._rule.judge(measurement, gradient_norm)
        return self._beside.judge(measurement, gradient_norm) if first.accepted else first

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Both learn."""
        self._rule.commit(measurement, gradient_norm)
        self._beside.commit(measurement, gradient_norm)


class WithGuard(_Beside):
    """A guard before the step, the rule after it."""

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        """The rule does not hear of a vetoed step, which was never measured; the guard hears of every refusal."""
        if self._beside.judge(measurement, gradient_norm).accepted:
            self._rule.reject(measurement, gradient_norm)
        self._beside.reject(measurement, gradient_norm)


class WithTrend(_Beside):
    """The rule, and a warning about what it committed."""

    _beside: TrendAlone

    def rebase(self, measurement: float) -> None:
        """The rule follows; the trend forgets what was measured with another yardstick."""
        super().rebase(measurement)
        self._beside.restart()

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        """The trend does not hear of a refused step; one that was only warned of stands, and both learn from it."""
        if self._rule.judge(measurement, gradient_norm).accepted:
            self.commit(measurement, gradient_norm)
        else:
            self._rule.reject(measurement, gradient_norm)


def contestants() -> dict[str, Contestant]:
    """Everybody, by name."""
    rates = (1e-12, 1e-10, 1e-8, *(10 ** (-7 + 0.3 * step) for step in range(23)))  # up to 0.4
    everybody = [
        Contestant(DEFAULT, "probe", _predictive, rates, original=5e-4),
        Contestant("predictive, probe only", "probe", _predictive, rates, sees_norm=False, original=5e-4),
        Contestant("predictive + norm guard", "probe", lambda _: WithGuard(PredictiveInnovation(), _guard(None))),
        Contestant("norm guard", "gradient", _guard, rates, original=1e-4),
        Contestant("fixed innovation", "probe", _fixed, _descending(5.0, 0.005), sees_norm=False, original=0.5),
    ]
    for name, (high, low, original) in _SWEEPS.items():
        watches: Watches = BASELINES[name]().watches  # type: ignore[attr-defined]
        build, grid = _baseline(name), _descending(high, low)
        everybody.append(Contestant(name, watches, build, grid, original=original))
        if watches == "loss":
            on_probe = Contestant(name + ON_PROBE, "probe", build, grid, sees_norm=False, original=original)
            everybody.append(on_probe)
    everybody += [
        Contestant("slow divergence (warns)", "probe", lambda _: TrendAlone(SlowDivergence()), warns=True),
        Contestant(
            "predictive + slow divergence",
            "probe",
            lambda _: WithTrend(PredictiveInnovation(), TrendAlone(SlowDivergence())),
            warns=True,
        ),
    ]
    return {contestant.name: contestant for contestant in everybody}


_SWEEPS = {
    "olmo-loss": (60.0, 1.5, 6.0),
    "olmo-gradient": (600.0, 1.5, 6.0),
    "zclip": (600.0, 1.0, 2.5),
    "lightning": (50.0, 0.02, 2.0),
    "metaseq": (20.0, 1.01, 1.25),
    "megatron": (50.0, 0.2, 10.0),
    "llm-foundry": (20.0, 0.5, 2.0),
    "dlib": (30.0, 0.5, 2.3263),
    "gradient-mad": (200.0, 1.5, 6.0),
    "holt": (60.0, 1.5, 6.0),
}
"""By baseline: most tolerant and most sensitive threshold of the sweep, and the original's."""


def _descending(high: float, low: float, count: int = 25) -> tuple[float, ...]:
    return tuple(high * (low / high) ** (step / (count - 1)) for step in range(count))


def _predictive(rate: float | None) -> Rule:
    return PredictiveInnovation() if rate is None else PredictiveInnovation(rate)


def _fixed(epsilon: float | None) -> Rule:
    return FixedInnovation(0.5 if epsilon is None else epsilon, 0.1)


def _guard(rate: float | None) -> GuardAlone:
    return GuardAlone(GradientNormGuard() if rate is None else GradientNormGuard(rate))


def _baseline(name: str) -> Callable[[float | None], Rule]:
    return lambda threshold: BASELINES[name]() if threshold is None else BASELINES[name](threshold=threshold)
