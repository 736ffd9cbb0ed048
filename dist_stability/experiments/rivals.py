"""What the guarded arm is compared with: the naive rollback on training-loss spikes, and adaptive gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean, stdev
from typing import Any

from torch import nn

from dist_stability.experiments.norms import GlobalNorm
from dist_stability.parallel import clip_grad_norm_
from dist_stability.rules.base import checked_setting, checked_state
from dist_stability.rules.baselines import ZClip
from dist_stability.verdict import Judgement

FEWEST_LOSSES = 8
"""Committed losses before a standard deviation means something."""

_LARGEST = 1e100  # squares and sums over a window stay finite
_ANCHORS = 2


class LossRollback:
    """Go back when the training loss spikes: the naive rollback of the controller paper, in its strongest honest form.

    ::

        refuse iff  L > mean + sigmas std   of the last 128 committed losses, once there are 8

    L is the training loss of the batch that the proposal was made of, so it was measured *before* the step that is
    judged: a spike was made by an earlier step, which is committed already. Therefore the refusal asks for the older
    anchor, 8 to 16 commits back, and for the last committed state only while there are no two anchors. The anchor's
    losses are restored with it.

    The test is OLMo-core's and Levanter's (window 128, six standard deviations), with these differences, all in its
    favour: refused losses do not enter the window, where one spike would hide the next; a spike is undone, not only
    skipped; a loss that is not finite is a spike; there are 8 losses of warm-up instead of 64. A loss that nobody knows
    is no spike. What remains is its weakness: while the steep begin of a run is in the window, it is the deviation.

    The probe is looked at for being finite and for nothing else. So no innovation is reported (NaN), and ``bound`` is
    +inf for what is accepted, -inf for what is refused: this rule promises nothing about the probe.

    Source: allenai/OLMo-core ``optim/skip_step_optimizer.py`` for the test; Or, arXiv 2601.17483, for the arm.
    """

    def __init__(self, sigmas: float = 6.0, window: int = 128) -> None:
        """Set the number of standard deviations, and over how many committed losses they are taken.

        Raises:
            TypeError: The first is not a real number, or the second not an int.
            ValueError: The first is not finite and > 0, or the second below 8.
        """
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"LossRollback window must be an int >= {FEWEST_LOSSES}, got {window!r}")
        if window < FEWEST_LOSSES:
            raise ValueError(f"LossRollback window must be an int >= {FEWEST_LOSSES}, got {window}")
        self.window = window
        self.sigmas = checked_setting("LossRollback sigmas", sigmas, "a finite number > 0", lambda v: 0 < v < math.inf)
        self._losses: list[float] = []
        self._loss: float | None = None  # of the next proposal
        self._anchors = 0

    def expect(self, *, steps: int = 1, learning_rate: float | None = None, training_loss: float | None = None) -> None:
        """See :meth:`ExpectingRule.expect`; only the training loss is used."""
        self._loss = None if training_loss is None else float(training_loss)

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        """Compare the expected training loss with those before it; changes no state."""
        if not math.isfinite(measurement):
            return _refuse(f"measurement is {measurement:g}", deep=False)
        loss = self._loss
        if loss is None:
            return _accept("the training loss is not known")
        # A loss that is not finite says that the weights were bad before this step, as any other spike does.
        deep = self._anchors >= _ANCHORS
        where = "back to the older anchor" if deep else "no two anchors yet"
        if not abs(loss) <= _LARGEST:
            return _refuse(f"training loss is {loss:g}; {where}", deep)
        if len(self._losses) < FEWEST_LOSSES:
            return _accept("too few training losses: only checked for being finite")
        highest = fmean(self._losses) + self.sigmas * stdev(self._losses)
        if loss <= highest:
            return _accept(f"training loss {loss:.4g} within {highest:.4g}")
        return _refuse(f"training loss {loss:.4g} above {highest:.4g}; {where}", deep)

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Learn the loss of a proposal that stands."""
        if self._loss is not None and abs(self._loss) <= _LARGEST:
            self._losses = [*self._losses[1 - self.window :], self._loss]
        self._loss = None

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Nothing: a refused loss is not learned, and refusals are not counted."""

    def anchor(self) -> dict[str, Any]:
        """See :meth:`DeepRule.anchor`."""
        self._anchors = min(_ANCHORS, self._anchors + 1)
        return self.state_dict()

    def deep(self, anchor: Mapping[str, Any]) -> None:
        """Continue with the losses that led to the restored anchor.

        Raises:
            TypeError: The anchor is not a mapping.
            ValueError: It was not made by this class's ``anchor()``; nothing was changed.
        """
        self._losses = list(checked_state(self, anchor, lists=("losses",), where="deep")["losses"])
        self._anchors = _ANCHORS

    def settings(self) -> dict[str, Any]:
        """How the rule was built; the same on every rank."""
        return {"sigmas": self.sigmas, "window": self.window}

    def state_dict(self) -> dict[str, Any]:
        """The committed losses; exact through JSON."""
        return {"rule": type(self).__name__, "losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a saved state, of a longer window the last losses; the rule then has no anchors.

        Raises:
            TypeError: The state is not a mapping.
            ValueError: It belongs to another rule or is malformed; nothing was changed.
        """
        self._losses = list(checked_state(self, state, lists=("losses",))["losses"])[-self.window :]
        self._loss, self._anchors = None, 0

    def __repr__(self) -> str:
        settings = f"sigmas={self.sigmas:g}, window={self.window}"
        return f"LossRollback({settings}; losses={len(self._losses)}, anchors={self._anchors})"


class ZClipper:
    """ZClip: gradients are scaled down to a norm that follows recent norms; called in place of ``clip_grad_norm_``.

    ::

        z = (g - m) / (s + 1e-6);  if z > 2.5:  scale the gradients to norm  m + 2.5^2 s / z

    with mean m and variance s^2 of the global gradient norm: of the first 25 norms, which are not clipped, then
    exponential averages with 0.97 of memory, fed with the norm after clipping. These statistics are those of the
    baseline :class:`~dist_stability.rules.baselines.ZClip`.

    Where the norm is not finite (or beyond 1e100) nothing is clipped and nothing learned: the step is taken as it is.
    The original lacks the check, and one NaN makes its averages NaN for ever. Its optional constant bound on the norm
    is left out: that is the other arm, ``--clip-grad-norm``.

    Args:
        model: With its wrappers.
        parameters: Whose gradients are clipped.

    Source: Kumar et al. (2025), "ZClip"; bluorion-com/ZClip ``zclip/zclip.py``, mode "zscore", "adaptive_scaling".
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing was seen yet."""
        self._model, self._parameters = model, list(parameters)
        self._norm = GlobalNorm(model, self._parameters)
        self._statistics = ZClip()

    def __call__(self) -> float:
        """Clip the gradients in place, after backward, and learn their norm.

        Returns:
            The global norm before clipping, equal on all ranks.

        Collectives: an all-reduce of one number; another one if the gradients are clipped.
        """
        norm = self._norm.of_gradients()
        limit = zclip_limit(self._statistics, norm)
        if limit is not None:
            clip_grad_norm_(self._model, self._parameters, limit)
        self._statistics.commit(0.0, norm)
        return norm


def zclip_limit(statistics: ZClip, norm: float) -> float | None:
    """What ZClip scales a gradient of this norm down to, > 0; None to leave it alone."""
    judgement = statistics.judge(0.0, norm)
    if judgement.accepted or math.isnan(judgement.innovation):  # usual, or no number to compare
        return None
    state = statistics.state_dict()
    limit: float = state["mean"] + statistics.threshold**2 * math.sqrt(state["variance"]) / judgement.innovation
    return limit if limit > 0.0 else None  # only after 25 norms of exactly 0: nothing to go by


def _accept(reason: str) -> Judgement:
    return Judgement(True, math.nan, math.inf, reason)


def _refuse(reason: str, deep: bool) -> Judgement:
    return Judgement(False, math.nan, -math.inf, reason, deep)
