"""The effective step: a poisoned optimizer that raises nothing, because it hardly moves any more.

Under Adam a second moment that has become far too large (a burst of enormous gradients, a flipped bit) makes every step
too small for as long as the moment remembers: hundreds to thousands of steps. The probe sees nothing, since standing
still does no harm. What shows it at once is the effective step, mean |update| / learning rate.

A collapse is judged like an outlying gradient norm, upside down: on the logarithm, by the same arithmetic. The refusal
restores the optimizer state of the last commit, and with it the moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from .guards import GradientNormGuard


class StepCollapse:
    """Refuses a step whose effective step is improbably small for the run so far.

    With the default rate the bar is 9.4 scales of log effective step, at least a factor of 6.5. After ``patience``
    refusals in a row it gives in: an effective step that stays small is that of another phase of training.

    Args:
        false_refusal_rate: Nominal tail probability of the bar.
        patience: Most refusals in a row.
    """

    def __init__(self, false_refusal_rate: float = 1e-4, patience: int = 32) -> None:
        """Nothing was seen yet."""
        self._inverse = GradientNormGuard(false_refusal_rate, patience=patience)

    def judge(self, effective_step: float | None) -> str | None:
        """Why the step must be refused, or None; changes no state. What is unknown, 0 or no number says nothing."""
        if not _usable(effective_step) or self._inverse.veto(1.0 / effective_step) is None:
            return None
        usual = 1.0 / self._inverse.usual
        return (
            f"effective step {effective_step:.3g} is improbably small (usually {usual:.3g}): the optimizer's second "
            f"moment may be poisoned"
        )

    def commit(self, effective_step: float | None) -> None:
        """The step stands: learn from it."""
        if _usable(effective_step):
            self._inverse.commit(1.0 / effective_step)

    def reject(self, effective_step: float | None) -> None:
        """The step was refused; only refusals for its collapse count."""
        if _usable(effective_step):
            self._inverse.reject(1.0 / effective_step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self._inverse.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self._inverse.load_state_dict(state)


def _usable(value: float | None) -> TypeGuard[float]:
    return value is not None and 1e-300 < value < 1e300
