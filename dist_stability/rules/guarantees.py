"""The controller paper's guarantees, checked while the run goes on.

Let y_k be the committed measurements, and let ``prediction_t`` and ``bound_t`` be the rule's at attempt t:

* Theorem 7.3: every committed measurement satisfies ``y_{t+1} <= prediction_t + bound_t``.
* Proposition 7.4: after a refusal the state equals the last committed one, bit for bit.
* Proposition 7.5: ``y_{t+1} <= max_{k<=t} y_k + bound_t``. (With a constant bound epsilon it follows that
  ``max_{k<=t} y_k <= y_0 + t epsilon``.) For ``FixedInnovation`` the reference is a convex combination of committed
  measurements, so it never exceeds the highest; for ``PredictiveInnovation`` see the docstring of ``predictive``.
* Envelope: ``y_{t+1} <= envelope_t``, for a rule that has one. Proposition 7.5 allows a rise of epsilon at every step,
  so what it promises gets weaker as the run gets longer; an envelope hangs on the best committed value instead.

What is outside them: the first commits of a rule without history (their bound is +inf), steps that were not judged
(``every > 1``; only judged commits count), observe mode, where a refused proposal stands, and rules that promise
nothing about the measurement and say so (``bounded = False``: the field's baselines).

After a deep restore the run continues from an anchor, and the trajectory that counts is the one that led to it. Its
measurements are among all committed ones, so the highest of all is still an upper bound of what Proposition 7.5 allows;
the check gets looser, never wrong. After a deep restore Proposition 7.4 is about the anchor.

A violation is a defect of a rule or of a restore, not of the training run: it raises.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dist_stability.errors import StabilityError
from dist_stability.verdict import Judgement

# Three additions and subtractions separate the rule's exact "innovation <= bound" from the sums checked here; each
# rounds by at most half an ulp of the largest number involved.
_ROUNDING = 4 * sys.float_info.epsilon


class GuaranteeViolation(StabilityError):
    """A promise of the controller was broken: the rule or the restore is wrong, and the run cannot be trusted.

    Attributes:
        guarantee: "Theorem 7.3", "Proposition 7.4", "Proposition 7.5" or "Envelope".
        numbers: What was compared, by name.
    """

    def __init__(self, guarantee: str, message: str, numbers: Mapping[str, Any]) -> None:
        """Keep the facts beside the message."""
        listed = ", ".join(f"{name} {value!r}" for name, value in numbers.items())
        super().__init__(f"{guarantee} is violated: {message} ({listed})")
        self.guarantee = guarantee
        self.numbers = dict(numbers)


class Guarantees:
    """Follows one guarded run and raises on the first broken guarantee. Plain numbers, no collectives.

    Fed with agreed numbers it raises on every rank alike.
    """

    def __init__(self) -> None:
        """Start before the first measurement."""
        self._highest: float | None = None

    @property
    def highest(self) -> float | None:
        """Highest measurement committed so far; None before the first."""
        return self._highest

    def committed(self, measurement: float, judgement: Judgement | None = None, envelope: float | None = None) -> None:
        """Check a commit against Theorem 7.3, Proposition 7.5 and the envelope, and remember its measurement.

        Args:
            measurement: The committed probe value.
            judgement: What the rule said about it. None when nobody judged: the probe of the starting weights, and
                commits in observe mode; these are only remembered.
            envelope: Highest measurement that the rule would have committed at all; None if it has no such limit.

        Raises:
            GuaranteeViolation: The commit broke one of them.
        """
        if judgement is not None:
            self._check(measurement, judgement)
            # An infinite bound is one that did not count: the first commits, or a second probe that overruled it.
            if envelope is not None and judgement.bound < math.inf:
                self._check_envelope(measurement, envelope)
        if math.isfinite(measurement):
            self._highest = measurement if self._highest is None else max(self._highest, measurement)

    def rebased(self, difference: float) -> None:
        """Equal weights measure ``difference`` more now: what was committed counts as that much more, too."""
        if self._highest is not None and difference > 0 and math.isfinite(difference):
            self._highest += difference

    def restored(self, committed: Sequence[int], found: Sequence[int]) -> None:
        """Check a restore against Proposition 7.4.

        Args:
            committed: Digests of the state that was to be restored (the last commit, or the anchor), taken when it was
                committed; one for each part of the state, in any fixed order.
            found: Digests of the live state after the restore, in the same order.

        Raises:
            GuaranteeViolation: A bit differs.
        """
        committed, found = tuple(committed), tuple(found)
        if committed != found:
            differing = [i for i, (a, b) in enumerate(zip(committed, found, strict=False)) if a != b]
            raise GuaranteeViolation(
                "Proposition 7.4",
                "the restored state is not the committed one, bit for bit",
                {"committed digests": committed, "digests found": found, "parts that differ": differing},
            )

    def state_dict(self) -> dict[str, Any]:
        """The highest committed measurement: without it a resumed run would be checked against too little."""
        return {"highest": self._highest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        highest = state["highest"]
        self._highest = None if highest is None else float(highest)

    def _check_envelope(self, measurement: float, envelope: float) -> None:
        if not measurement <= envelope + _ROUNDING * max(abs(measurement), abs(envelope)):
            raise GuaranteeViolation(
                "Envelope",
                "the committed measurement is above all that may be committed",
                {"measurement": measurement, "envelope": envelope, "highest": self._highest},
            )

    def _check(self, measurement: float, judgement: Judgement) -> None:
        innovation, bound = judgement.innovation, judgement.bound
        prediction = measurement - innovation
        numbers = {"measurement": measurement, "prediction": prediction, "innovation": innovation, "bound": bound}
        if not judgement.accepted or not math.isfinite(measurement):
            raise GuaranteeViolation("Theorem 7.3", "a measurement that must be refused was committed", numbers)
        if bound == math.inf:
            return
        slack = _ROUNDING * max(abs(measurement), abs(innovation), abs(bound))
        if not (innovation <= bound and measurement <= prediction + bound + slack):
            raise GuaranteeViolation("Theorem 7.3", "the committed measurement exceeds prediction + bound", numbers)
        if self._highest is None or not measurement <= self._highest + bound + slack:
            raise GuaranteeViolation(
                "Proposition 7.5",
                "the committed measurement exceeds the highest committed before + bound",
                {**numbers, "highest": self._highest},
            )
