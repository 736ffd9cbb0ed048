"""The edge of stability in the guarded step: what is done about what the monitor says.

It is asked between the decision on a proposal and its settlement. The weights are the proposal then, nobody is copying
them, and the safe state is still the one before. So a measurement needs nobody's leave, a step that finds the optimizer
poisoned can be refused itself, and where a gradient spikes the state from before the spike is at hand, to be kept.

========== ======================================================================================================
stable     nothing
edge       nothing, ever
overdriven with ``EdgeSettings(cuts=True)`` the ladder's cut of the learning rate, by the monitor's factor and within
           the ladder's budget
runaway    nothing more: the probe has refused the step, and the ladder knows of it
poisoned   the step is refused and the state from before the spike is restored, whole, within the ladder's budget
========== ======================================================================================================

Why whole, and not the optimizer's part of it alone: weights of now with moments of then are a state that no run was
in, for which nothing that a restore promises holds; and little is lost, since what was trained in between are the steps
of the spike, several times too long, and steps that hardly moved.

All of it follows from sums over ranks, so the ranks do the same; that they do is compared in every vote.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

from .attempt import Attempt, Decision
from .diagnostics.edge import EdgeAssessment
from .diagnostics.monitor import EdgeOfStabilityMonitor
from .parts import Parts
from .rungs import Rung
from .verdict import Action


class EdgeWatch:
    """Asks a monitor about every judged proposal.

    Args:
        monitor: The user's.
        parts: Of the controller.

    Attributes:
        standing: Digest of what the monitor has said since the start of this process: a number to compare over ranks.
    """

    def __init__(self, monitor: EdgeOfStabilityMonitor, parts: Parts) -> None:
        """Nothing was looked at yet."""
        self._monitor, self._parts = monitor, parts
        self.standing = 0

    def look(self, attempt: Attempt, decision: Decision) -> Decision:
        """Ask, and act on the answer.

        Args:
            attempt: Its optimizers have run; the weights are the proposal, also if it will be refused.
            decision: What the ranks have agreed on.

        Returns:
            The decision, or in its place a refusal that goes back behind the spike.

        Collectives: those of :meth:`EdgeOfStabilityMonitor.after_step`, equal on all ranks.

        Raises:
            StabilityError: See :meth:`~.diagnostics.sharpness.Sharpness.measure`.
        """
        if not attempt.judged or attempt.vetoed or attempt.overflow:
            return decision
        said = self._ask(attempt, decision)
        acted = False
        if self._parts.enforced and said.rung is Rung.CUT_LR and said.factor is not None:
            acted = self._parts.ladder.cut(attempt.index, said.factor)
        elif self._parts.enforced and said.rung is Rung.DEEP_ROLLBACK:
            back_to = self._parts.recovery.ring.pinned
            if back_to is not None and self._parts.ladder.may_go_back(attempt.index):
                acted, reason = True, f"{said.reason}; back to attempt {back_to.attempt}, before it"
                decision = replace(decision, action=Action.ROLLBACK, signal="edge", reason=reason, back_to=back_to)
        attempt.edge = {
            "state": str(said.state),
            "margin": self._monitor.margin,
            "rho": self._monitor.machine.rho,
            "rung": None if said.rung is None else str(said.rung),
            "factor": said.factor,
            "acted": acted,
            "reason": said.reason,
        }
        return decision

    def _ask(self, attempt: Attempt, decision: Decision) -> EdgeAssessment:
        parts, machine = self._parts, self._monitor.machine
        numbers = (decision.measurement, attempt.norm)
        finite = all(number is None or math.isfinite(number) for number in numbers)
        refused = decision.action.refused
        values = dict(attempt.signals.values)
        if attempt.norm is not None:
            values["gradient_norm"] = attempt.norm
        if refused and parts.enforced:
            # Of a step that leaves no trace only this is heard: the collapse may be why it is refused.
            values = {name: values[name] for name in ("effective_step",) if name in values}
        parts.phases.enter("edge")
        parts.first_forward.paused = True
        parts.rates.apply(attempt.rate_factor)  # the margin of the steps that are taken, not of the schedule's
        try:
            with attempt.timed("edge"):
                said = self._monitor.after_step(attempt.index, values, refused=refused, finite=finite)
        finally:
            parts.rates.undo()
            parts.first_forward.paused = False
        text = f"{self.standing} {said.state} {self._monitor.margin!r} {machine.rho!r}"
        self.standing = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
        if parts.enforced:
            self._keep(attempt.index, burst=machine.burst == attempt.index)
        return said

    def _keep(self, attempt: int, burst: bool) -> None:
        """Keep the state from before a spike for as long as the spike may turn out to have done harm."""
        ring = self._parts.recovery.ring
        if not self._monitor.machine.suspects(attempt):
            ring.unpin()
        elif burst:
            slot = ring.pin()
            if slot.rule_anchor is None:
                slot.rule_anchor = self._parts.panel.remember()
