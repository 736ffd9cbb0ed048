"""Guards look at gradients before the optimizer steps. Their "no" is a veto: an exact no-op that needs no snapshot.

Who calls what (the controller, in this order, every attempt)::

    flag(gradients)     a device flag that rides in the vote: any rank's True is a veto. No host sync.
    limit()             the largest global norm that may pass; compared on the device with what the vote added up
    veto(norm)          a reason, or None, from the global norm that all ranks agreed on: before the step if reads_norm,
                        else only to explain a veto
    explain(gradients)  rare: after a flag was raised on some rank, what this rank can say about its cause
    commit(norm)        the proposal was committed          | exactly one of the two
    reject(norm)        it was refused, for whatever reason |

What a guard learns is the memory of refusals, too, and is never rolled back with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dist_stability.rules.base import checked_setting
from dist_stability.rules.student import student_quantile
from dist_stability.signals.gradients import Gradients

_MEAN_ABS_TO_SIGMA = 1.2533  # sqrt(pi / 2): sigma of a Gaussian over its mean absolute value
_SCALE_FLOOR = 0.2  # in units of log norm
_GAIN = 1.0 / 16.0
_MEMORY = 31  # samples an exponential average of that gain is worth, 2 / gain - 1
_WARM_UP = 3  # commits before a finite norm can be vetoed
_UNCLIPPED = 8  # commits before the scale is good enough to clip by
_CLIP = 3.0  # scales


@runtime_checkable
class Guard(Protocol):
    """Base of all guards: one that never objects and learns nothing. Derive from it and override what is needed.

    Attributes:
        reads_norm: ``veto`` wants the global gradient norm before the step, for which the host waits. A guard that can
            say beforehand which norms it would let pass gives them as ``limit`` instead, and nobody waits.
    """

    reads_norm: bool = False

    def flag(self, gradients: Gradients) -> Tensor | None:
        """Whether this rank objects: 0-d bool tensor, or None for never. Must not wait for the device.

        Called on every rank. Reading ``gradients.square_sum`` may enter collectives, so all ranks must do it or none.
        """
        return None

    def limit(self) -> float:
        """The largest global gradient norm that may pass, the same on every rank; +inf for any."""
        return math.inf

    def veto(self, norm: float) -> str | None:
        """Why the step must not be taken, or None. On the host, and the same on every rank for the same norms."""
        return None

    def explain(self, gradients: Gradients) -> str | None:
        """What this rank's gradients say about a raised flag; None if they show no fault. Must enter no collective.

        Asked on every rank, whichever guard raised the flag, so a guard that finds nothing wrong must stay silent.
        """
        return None

    def commit(self, norm: float | None) -> None:
        """The proposal stands; ``norm`` is its global gradient norm before clipping, None if unknown."""
        return None

    def reject(self, norm: float | None) -> None:
        """The proposal was refused, by this guard or by anybody else."""
        return None

    def settings(self) -> dict[str, Any]:
        """How the guard was built, JSON-able: the controller compares it over ranks."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything the next veto depends on, except settings; JSON-able."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        return None


class NonFiniteGuard(Guard):
    """Vetoes a step whose gradient has a NaN or an infinity, without waiting for the device.

    If the caller gives the global gradient norm, only that is looked at: a NaN or an infinity in any gradient makes it
    non-finite, and every rank has the same. A norm that overflowed its own dtype (fp32: gradients beyond 1e19) is
    vetoed, too. Otherwise the sum of squares of this rank's shards is checked, in float64.
    """

    def flag(self, gradients: Gradients) -> Tensor:
        """See :meth:`Guard.flag`. Reads ``square_sum`` only if the caller gave no norm."""
        norm = gradients.caller_norm
        return ~torch.isfinite(gradients.square_sum if norm is None else norm)

    def explain(self, gradients: Gradients) -> str | None:
        """Name this rank's first parameter with a non-finite gradient, and the largest gradient that is still finite.

        The two bracket the fault: the largest finite one is often next to it. Waits for the device once per parameter.

        Returns:
            One line, or None if all gradients of this rank are finite.
        """
        first, count, affected, elements, spoilt = "", 0, 0, 0, 0
        largest, owner = -1.0, ""
        for name, gradient in gradients.named():
            if not gradient.numel():
                continue
            values = gradient if gradient.dtype.itemsize >= 2 else gradient.float()
            nan, size = int(values.isnan().sum()), values.numel()
            infinite = int(values.isinf().sum())
            count, elements, spoilt = count + 1, elements + size, spoilt + nan + infinite
            if nan or infinite:
                affected += 1
                first = first or f"gradient of {name}: {nan} NaN and {infinite} infinite of {size} elements"
            elif (top := float(values.abs().max())) > largest:
                largest, owner = top, name
        if not affected:
            return None
        line = f"{first} ({affected} of {count} parameters with a gradient are affected)"
        if owner:
            return f"{line}; largest finite gradient: {owner}, |g| <= {largest:.3g}"
        if spoilt == elements:
            return (
                f"{line}; not one element is finite: clipping by a NaN norm does that, so the cause may lie elsewhere"
            )
        return line


class GradientNormGuard(Guard):
    """Vetoes a step whose global gradient norm is improbably large for the run so far; one number to set.

    On the logarithm, so that the unit of the loss and slow drift do not matter, and only upward::

        scale  s = max(1.2533 a, 0.2)             a: mean absolute deviation from the mean m of log g, gain 1/16
        bar    q = c T(1 - rate) sqrt(1 + 1/n)    n: commits, at most 31; Student t, n - 1 degrees of freedom, at most 4
        veto   iff  log g - m > q s K / (K - r)   r: vetoes in a row, K: patience;  a NaN or an infinity always

    With the default rate the bar is 9.4 scales in the long run: where the norm is steady (floor of 0.2), 6.5 times the
    usual one. It is wider while the scale rests on few commits; before the third only finiteness counts.

    Committed norms are learned, single ones clipped at 3 scales. Vetoed ones are not, or a fault that lasts would soon
    be taken for normal. What prevents lock-out is patience: the bar grows with every veto in a row and is infinite
    after ``patience`` of them. So no stream of finite norms, whatever it does, is vetoed more than ``patience`` times
    in a row; how soon the guard gives in depends on the size of the jump. When it does, the mean starts again from the
    norm that was let through: an average that only moved towards it would veto the next one.

    Measured on 20 streams of 400 norms, log g normal with a standard deviation of 0.2 around a falling level, from step
    120 on multiplied by 300 for 10, 30 or 60 steps, or by 1000 for good
    (``pytest tests/test_guards.py -k figures``)::

        what a vetoed norm teaches         bad steps let through, of                longest run of vetoes
                                           200 (10)     600 (30)     1200 (60)      after the lasting shift
        itself                             180          580          1180           2
        itself, clipped at 3 scales        69           469          1069           9
        nothing, without patience          0            0            0              280 of 280: locked out
        nothing, with patience (this one)  0            0            0              94

    None of the four vetoed one of the 8000 clean steps. A norm that scatters more hides more: with a standard deviation
    of 0.3 this guard lets 102 of the 1200 through, and at 0.6 a factor of 300 is itself only at the bar.
    """

    def __init__(self, false_veto_rate: float = 1e-4, *, patience: int = 128) -> None:
        """Set the rate.

        Args:
            false_veto_rate: Nominal tail probability of the Student-t bar, 1e-12 <= rate < 0.5. Smaller is more
                tolerant.
            patience: Most vetoes of finite norms in a row, >= 1. Keep it below the controller's
                ``max_refusals_in_row``, or a lasting change of the norm stops the run.

        Raises:
            TypeError: A setting has the wrong type.
            ValueError: A setting is outside its range.
        """
        self.false_veto_rate = checked_setting(
            "GradientNormGuard false_veto_rate",
            false_veto_rate,
            "a probability with 1e-12 <= rate < 0.5",
            lambda rate: 1e-12 <= rate < 0.5,
        )
        if isinstance(patience, bool) or not isinstance(patience, int):
            raise TypeError(f"GradientNormGuard patience must be an int >= 1, got {patience!r}")
        if patience < 1:
            raise ValueError(f"GradientNormGuard patience must be an int >= 1, got {patience!r}")
        self.patience = patience
        # Divided by the standard deviation of t, the quantile counts sigmas; with two degrees of freedom there is none.
        spread = {2: 0.6, 3: math.sqrt(1 / 3), 4: math.sqrt(1 / 2)}
        self._quantiles = {
            freedom: factor * student_quantile(self.false_veto_rate, freedom) for freedom, factor in spread.items()
        }
        self._mean: float | None = None
        self._deviation = 0.0
        self._commits = 0
        self._vetoes = 0

    def flag(self, gradients: Gradients) -> Tensor:
        """See :meth:`Guard.flag`: the caller's norm is too large, or this rank's shards are not finite."""
        norm = gradients.caller_norm
        if norm is None:
            return ~torch.isfinite(gradients.square_sum)
        return ~(torch.isfinite(norm) & (norm <= self.limit()))

    def limit(self) -> float:
        """See :meth:`Guard.limit`; +inf while the guard knows too little, and once patience has run out."""
        if self._mean is None:
            return math.inf
        bar = self._patient_bar()
        return math.inf if bar == math.inf else _exp(self._mean + bar * self._scale())

    def veto(self, norm: float) -> str | None:
        """See :meth:`Guard.veto`. Changes no state. A norm of exactly 0 passes."""
        if not 0.0 <= norm < math.inf:  # True for NaN
            return f"gradient norm is {norm}"
        if self._mean is None or norm <= self.limit():
            return None
        score, bar = self._score(norm), self._patient_bar()
        return (
            f"gradient norm {norm:.4g} is {score:.1f} scales above the usual {_exp(self._mean):.4g} "
            f"(bar {bar:.1f} scales, veto {self._vetoes + 1} in a row)"
        )

    def commit(self, norm: float | None) -> None:
        """Learn from a committed norm.

        One that the guard would have vetoed (in observe mode all are committed) counts as vetoed instead.
        """
        if norm is None or not 0.0 < norm < math.inf:
            return
        if self.veto(norm):
            self._vetoes += 1
            return
        # Beyond the plain bar only patience let it pass: a new level.
        if self._vetoes and self._score(norm) > self._bar():
            self._mean = None
        self._learn(math.log(norm), _CLIP * self._scale() if self._commits >= _UNCLIPPED else math.inf)
        self._vetoes = 0

    def reject(self, norm: float | None) -> None:
        """Count a veto of this guard's own. A step that somebody else refused teaches it nothing."""
        if norm is not None and 0.0 < norm < math.inf and self.veto(norm):
            self._vetoes += 1

    @property
    def usual(self) -> float:
        """The usual norm so far; NaN before the first."""
        return math.nan if self._mean is None else _exp(self._mean)

    def settings(self) -> dict[str, Any]:
        """How the guard was built; the same on every rank."""
        return {"false_veto_rate": self.false_veto_rate, "patience": self.patience}

    def state_dict(self) -> dict[str, Any]:
        """Learned statistics and the vetoes in a row: four numbers, exact through JSON."""
        return {
            "guard": type(self).__name__,
            "mean": self._mean,
            "deviation": self._deviation,
            "commits": self._commits,
            "vetoes": self._vetoes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a saved state.

        Raises:
            TypeError: The state is not a mapping.
            ValueError: It belongs to another guard or is malformed; nothing was changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"GradientNormGuard.load_state_dict expects a dictionary, got {type(state).__name__}")
        expected = self.state_dict()
        if set(state) != set(expected) or state["guard"] != expected["guard"]:
            raise ValueError(
                f"GradientNormGuard.load_state_dict expects a state saved by a GradientNormGuard, with the keys "
                f"{sorted(expected)}; got guard {state.get('guard')!r} with {sorted(state)}. Build the controller with "
                "the guards the checkpoint was saved with, in the same order."
            )
        counts = [state["commits"], state["vetoes"]]
        numbers = [state["deviation"], 0.0 if state["mean"] is None else state["mean"]]
        sound = all(type(count) is int and count >= 0 for count in counts) and all(map(_is_finite, numbers))
        if not sound or numbers[0] < 0 or (state["mean"] is None) != (state["commits"] == 0):
            raise ValueError(f"GradientNormGuard.load_state_dict: malformed state {dict(state)!r}; nothing was changed")
        self._mean, self._deviation = state["mean"], state["deviation"]
        self._commits, self._vetoes = counts

    def __repr__(self) -> str:
        usual = "none" if self._mean is None else f"{_exp(self._mean):.4g}"
        return (
            f"GradientNormGuard(false_veto_rate={self.false_veto_rate:g}, patience={self.patience}; "
            f"commits={self._commits}, usual norm={usual}, scale={self._scale():.3g}, vetoes in a row={self._vetoes})"
        )

    def _learn(self, log_norm: float, clip: float) -> None:
        self._commits += 1
        if self._mean is None:
            self._mean = log_norm
            return
        gain = max(1 / self._commits, _GAIN)
        deviation = max(-clip, min(clip, log_norm - self._mean))
        self._deviation += gain * (abs(deviation) - self._deviation)
        self._mean += gain * deviation

    def _score(self, norm: float) -> float:
        assert self._mean is not None
        return (math.log(norm) - self._mean) / self._scale()

    def _scale(self) -> float:
        return max(_MEAN_ABS_TO_SIGMA * self._deviation, _SCALE_FLOOR)

    def _bar(self) -> float:
        if self._commits < _WARM_UP:
            return math.inf
        freedom = min(4, self._commits - 1)
        return self._quantiles[freedom] * math.sqrt(1 + 1 / min(self._commits, _MEMORY))

    def _patient_bar(self) -> float:
        left = self.patience - self._vetoes
        return self._bar() * self.patience / left if left > 0 else math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < 709.0 else math.inf


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
