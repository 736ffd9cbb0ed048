"""Algorithm 1 of the controller paper: a fixed threshold on the innovation against an exponential average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dist_stability.rules.base import checked_setting, checked_state
from dist_stability.verdict import Judgement


class FixedInnovation:
    """Commit a proposal when its probe rises by no more than ``epsilon`` above a moving average of committed probes.

    With reference ``y_hat`` (the paper's symbol) and innovation ``nu = y - y_hat``::

        nu <= epsilon:  commit, y_hat <- (1 - alpha) y_hat + alpha y
        else:           refuse, y_hat unchanged

    The gradient norm is not looked at. A measurement that is not finite is refused; committed all the same (in
    observe mode), it teaches nothing. Until a first finite value was committed there is no reference, so any finite
    measurement is accepted with ``bound = +inf``.

    The threshold has the unit of the probe and does not adapt: with a falling loss ``y_hat`` lags above the probe,
    and a damaging step can pass below it. :class:`~dist_stability.rules.predictive.PredictiveInnovation` is the rule
    without this weakness.

    Source: Or, "Automatic Stability and Recovery for Neural Network Training", arXiv 2601.17483, Algorithm 1; the
    paper's public example uses epsilon 0.5 and alpha 0.1.
    """

    def __init__(self, epsilon: float, alpha: float = 0.1) -> None:
        """Set the two constants.

        Args:
            epsilon: Largest innovation that is committed, in the unit of the probe; finite, >= 0.
            alpha: Weight of the newest committed value in the reference; 0 < alpha <= 1.

        Raises:
            TypeError: A setting is not a real number.
            ValueError: A setting is outside its range.
        """
        self.epsilon = checked_setting(
            "FixedInnovation epsilon", epsilon, "a finite number >= 0", lambda v: 0.0 <= v < math.inf
        )
        self.alpha = checked_setting(
            "FixedInnovation alpha", alpha, "a number with 0 < alpha <= 1", lambda v: 0.0 < v <= 1.0
        )
        self._reference: float | None = None

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        """Compare the innovation with epsilon; changes no state."""
        measurement = float(measurement)
        if self._reference is None:
            accepted, innovation, bound = math.isfinite(measurement), math.nan, math.inf
        else:
            innovation, bound = measurement - self._reference, self.epsilon
            accepted = math.isfinite(measurement) and innovation <= bound
        if not math.isfinite(measurement):
            reason = f"measurement is {measurement}"
        elif self._reference is None:
            reason = "no committed value yet: only checked for being finite"
        else:
            reason = f"innovation {innovation:+.4g} {'within' if accepted else 'above'} epsilon {bound:.4g}"
        return Judgement(accepted, innovation, bound, reason)

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Move the reference toward a committed value; the first one becomes the reference."""
        measurement = float(measurement)
        if not math.isfinite(measurement):
            return
        if self._reference is None:
            self._reference = measurement
            return
        average = (1.0 - self.alpha) * self._reference + self.alpha * measurement
        # Proposition 7.5 rests on the average staying between the two. Rounding may push it out by an ulp, and with a
        # small alpha these ulps add up over thousands of commits.
        low, high = sorted((self._reference, measurement))
        self._reference = min(max(average, low), high)

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Nothing: the reference is unchanged, and Algorithm 1 remembers no refusals."""

    def settings(self) -> dict[str, Any]:
        """How the rule was built; the same on every rank."""
        return {"epsilon": self.epsilon, "alpha": self.alpha}

    def state_dict(self) -> dict[str, Any]:
        """The reference y_hat; None before the first commit."""
        return {"rule": type(self).__name__, "reference": self._reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the reference.

        Raises:
            TypeError: The state is not a mapping.
            ValueError: It belongs to another rule or is malformed; nothing was changed.
        """
        self._reference = checked_state(self, state, optional=("reference",))["reference"]

    def __repr__(self) -> str:
        return f"FixedInnovation(epsilon={self.epsilon:g}, alpha={self.alpha:g}; reference={self._reference})"
