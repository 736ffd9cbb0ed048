"""The end of an attempt: carry out the decision, and what the ladder adds to a refusal, on all ranks together.

A commit makes the proposal the safe state. A refusal restores the safe state first, whatever comes next, so that a
failure on the way up the ladder leaves the last committed state and not something in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import parallel
from .attempt import Attempt, Decision
from .errors import StabilityError
from .escalation import Ladder
from .judging import Judging
from .ledger import Ledger
from .recovery import Recovery
from .rules import Guarantees
from .rules.panel import Panel
from .rungs import Refusal, Response, Rung
from .snapshot import Slot
from .verdict import Action, Judgement
from .veto import VetoStage
from .vote import Vote

ANCHOR_EVERY = 8
"""Commits between two anchors: with two of them a deep rollback goes 8 to 16 commits back."""

_MOVED = 1e-6
"""Relative difference between two measurements of the same bits that is more than the order of a sum."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done with an attempt. See :class:`~dist_stability.Verdict` for the fields of the same names."""

    action: Action
    undone: tuple[int, ...] = ()
    judgement: Judgement | None = None
    measurement: float | None = None
    reason: str = ""
    rung: str = ""
    pattern: str = ""
    warning: str = ""


class Settlement:
    """Carries out decisions. All ranks call it with the same ones.

    Args:
        recovery: Plan, ring and captured state.
        judging: Measures what stands.
        panel: Learns from commits and counts refusals.
        ladder: Says what follows a refusal.
        guarantees: Checked at every commit and restore.
        ledger: Counts.
        veto: Its guards learn, too.
        vote: Of this controller.
        compare_replicas: A restore compares the restored bits over replicas.
        reload: Loads the last persisted state on all ranks, or None.
        can_shape: There is spectral shaping that the ladder could switch on.
        identify_batch: Content digest of the batch of an attempt, agreed by all ranks; None where it is not known.
    """

    def __init__(
        self,
        recovery: Recovery,
        judging: Judging,
        panel: Panel,
        ladder: Ladder,
        guarantees: Guarantees,
        ledger: Ledger,
        veto: VetoStage,
        vote: Vote,
        compare_replicas: bool,
        reload: Callable[[], int | None] | None,
        can_shape: bool,
        identify_batch: Callable[[Attempt], int | None],
    ) -> None:
        """Remember the parts."""
        self._recovery, self._judging, self._panel, self._ladder = recovery, judging, panel, ladder
        self._guarantees, self._ledger, self._veto, self._vote = guarantees, ledger, veto, vote
        self._compare_replicas, self._reload_state = compare_replicas, reload
        self._can_shape, self._identify_batch = can_shape, identify_batch

    def settle(self, attempt: Attempt, decision: Decision) -> Outcome:
        """Do what was decided.

        Collectives: none for an accepted attempt; two votes and a measurement or more for a refused one.

        Raises:
            LockstepError, SnapshotError: The ranks could not go back together.
            Exception: What an optimizer raised on every rank, after the state was restored.
        """
        action = decision.action
        if action is Action.COMMIT:
            return self._commit(attempt, decision)
        if action is Action.UNJUDGED:
            self._accept(attempt, judged=False)
            self._ladder.accepted(attempt.index)
            return Outcome(action)
        if action.refused:
            return self._refuse(attempt, decision)
        return Outcome(action, reason=decision.reason)

    def observe(self, attempt: Attempt, decision: Decision) -> Outcome:
        """Accept whatever was decided, and let the rule learn what is finite."""
        if decision.action is Action.SCALER_SKIP:
            return Outcome(decision.action, reason=decision.reason)
        warning = None
        if decision.measurement is not None and math.isfinite(decision.measurement):
            warning = self._panel.commit(decision.measurement, decision.confirmation, attempt.norm)
            self._guarantees.committed(decision.measurement)
        self._accept(attempt, attempt.judged)
        self._ledger.accepted = []
        if attempt.plan is not None:
            self._recovery.plan = attempt.plan
        action = Action.COMMIT if attempt.judged else Action.UNJUDGED
        return Outcome(action, (), decision.judgement, decision.measurement, decision.reason, warning=warning or "")

    # ------------------------------------------------------------------ accepted

    def _accept(self, attempt: Attempt, judged: bool) -> None:
        self._ledger.accept(judged)
        for guard in self._veto.guards:
            guard.commit(attempt.norm)

    def _commit(self, attempt: Attempt, decision: Decision) -> Outcome:
        warning = self._make_safe(attempt, decision)
        pattern = self._ladder.accepted(attempt.index, alarm=warning is not None)
        return Outcome(
            Action.COMMIT,
            (),
            decision.judgement,
            decision.measurement,
            decision.reason,
            pattern=pattern or "",
            warning=warning or "",
        )

    def _make_safe(self, attempt: Attempt, decision: Decision) -> str | None:
        """Learn from what stands now and copy it; what the trend says of it."""
        measurement = decision.measurement
        assert attempt.plan is not None and decision.judgement is not None and measurement is not None
        judgement = decision.judgement if self._panel.bounded else replace(decision.judgement, bound=math.inf)
        self._guarantees.committed(measurement, judgement, self._panel.envelope)
        warning = self._panel.commit(measurement, decision.confirmation, attempt.norm)
        self._accept(attempt, judged=True)
        anchor = self._panel.anchor() if self._ledger.commits % ANCHOR_EVERY == 0 else None
        with attempt.timed("copy"):
            if self._recovery.holding:
                self._recovery.keep(measurement, anchor)
            else:
                self._recovery.commit(attempt.plan, self._ledger.attempt, measurement, anchor, attempt.digests)
        if self._reload_state is None:  # a persisted state may be older than anything in memory
            self._ledger.forget(self._recovery.ring.oldest)
        return warning

    # ------------------------------------------------------------------ refused

    def _refuse(self, attempt: Attempt, decision: Decision) -> Outcome:
        self._recovery.drop()
        if decision.fatal is not None:
            # The optimizer fails everywhere: a fault of the program, not of one rank. Nothing is lost by it.
            self._restore(attempt)
            raise decision.fatal
        self._recovery.before_step()  # whatever is done about it writes to the state
        response = self._ladder.refused(self._facts(attempt, decision))
        judgement = decision.judgement
        if judgement is not None and not judgement.accepted and decision.measurement is not None:
            norm = None if attempt.vetoed or attempt.overflow else attempt.norm
            self._panel.reject(decision.measurement, decision.confirmation, norm)
        outcome = self._undo(attempt, decision, response)
        if attempt.vetoed and outcome.action.refused:
            for guard in self._veto.guards:
                guard.reject(attempt.norm)
        return replace(outcome, rung=str(response.rung), pattern=str(response.pattern))

    def _undo(self, attempt: Attempt, decision: Decision, response: Response) -> Outcome:
        outcome = Outcome(Action.VETO, (), decision.judgement, decision.measurement, decision.reason)
        if response.rung is Rung.RELOAD:
            return self._reload(attempt, outcome)
        if decision.action is Action.VETO and not response.deep:
            self._recovery.undo_forward(attempt.scaler)
            return outcome
        if response.rung is Rung.ATTENUATE:
            return self._attenuate(attempt, outcome)
        with attempt.timed("restore"):
            oldest = decision.action is not Action.DEEP_ROLLBACK
            action, undone = self._restore(attempt, response.deep, oldest, decision.back_to)
        return replace(outcome, action=action, undone=undone)

    def _facts(self, attempt: Attempt, decision: Decision) -> Refusal:
        judgement, measured = decision.judgement, decision.measurement
        norm = None if attempt.overflow else attempt.norm
        # A provisional attempt is among those that are pending itself.
        alone = all(index == attempt.index for index in self._ledger.pending)
        return Refusal(
            attempt.index,
            decision.signal,
            decision.reason,
            measured,
            evidence=0.0 if judgement is None else judgement.evidence,
            finite=(measured is None or math.isfinite(measured)) and (norm is None or math.isfinite(norm)),
            # Rules count on going back by 8 commits at least, which only the second anchor guarantees.
            wants_deep=decision.action is Action.DEEP_ROLLBACK and self._recovery.ring.full,
            alone=alone,
            anchors=len(self._recovery.ring.older),
            can_reload=self._reload_state is not None,
            can_shape=self._can_shape,
            # With unjudged steps in the proposal any of their batches may be guilty; the replay will tell.
            batch=self._identify_batch(attempt) if alone else None,
        )

    def _restore(
        self, attempt: Attempt, deep: bool = False, oldest: bool = True, back_to: Slot | None = None
    ) -> tuple[Action, tuple[int, ...]]:
        """Back to the last committed state or an older one: (what that is called, attempts undone by it)."""
        ring, safe = self._recovery.ring, self._recovery.ring.safe
        wanted = safe
        if deep and back_to is not None:
            wanted = back_to
        elif deep:
            older = ring.older
            # What a rule asks for is the anchor before the newest, 8 to 16 commits back; the ladder wants all it has.
            wanted = older[0] if oldest or ring.anchors[-2:][0] not in older else ring.anchors[-2:][0]
        slot = self._recovery.restore(attempt, wanted, self._vote, self._guarantees, self._compare_replicas)
        undone = self._ledger.undo_after(slot.attempt)
        if slot is safe:
            return Action.ROLLBACK, undone
        ring.fall_back(slot)
        self._panel.deep(slot.rule_anchor)
        return Action.DEEP_ROLLBACK, undone

    def _attenuate(self, attempt: Attempt, outcome: Outcome) -> Outcome:
        """Try shorter and shorter parts of the proposal from the restored state; commit the first that does no harm.

        The optimizer keeps the memory of the safe state: the gradient that was refused must not live on in it.

        The restored weights are measured first. They are the committed ones to the bit, so if they measure something
        else now, the probe has moved and not the weights: then the rule is told, and no step is needed.
        """
        parameters = [parallel.local(handle) for _, handle, _ in self._recovery.plan.parameters]
        proposal = [parameter.detach().clone() for parameter in parameters]
        with attempt.timed("restore"):
            action, undone = self._restore(attempt)
        outcome = replace(outcome, action=action, undone=undone)
        if action is not Action.ROLLBACK:
            self._ladder.shortened(False)
            return outcome
        recorded = self._recovery.ring.safe.measurement
        before, second = self._judging.standing(attempt)
        if recorded is not None and not math.isclose(before, recorded, rel_tol=_MOVED, abs_tol=1e-300):
            self._ladder.shortened(False)
            return replace(outcome, reason=f"{outcome.reason}; {self._follow_probe(recorded, before, second)}")
        halvings = self._ladder.halvings
        if not halvings:
            self._ladder.shortened(False)
            return replace(outcome, reason=f"{outcome.reason}; the restored weights measure what they measured before")
        safe = [parameter.detach().clone() for parameter in parameters]
        with attempt.timed("attenuate"):
            for number in range(1, halvings + 1):
                fraction = 0.5**number
                self._write(parameters, [s.lerp(p, fraction) for s, p in zip(safe, proposal, strict=True)])
                measurement, second = self._judging.standing(attempt, number)
                judgement = self._panel.judge(measurement, second)
                if judgement.accepted and measurement <= before:
                    return self._commit_part(attempt, outcome, judgement, measurement, second, fraction)
            self._write(parameters, safe)
        self._ladder.shortened(False)
        shortest = f"1/{2**halvings}"
        return replace(outcome, reason=f"{outcome.reason}; even {shortest} of the step does harm")

    def _commit_part(
        self,
        attempt: Attempt,
        outcome: Outcome,
        judgement: Judgement,
        measurement: float,
        second: float | None,
        fraction: float,
    ) -> Outcome:
        attempt.plan, attempt.digests, attempt.norm = self._recovery.plan, None, None
        reason = f"{outcome.reason}; {fraction:g} of the step was committed ({judgement.reason})"
        part = Decision(Action.ATTENUATE, "probe", reason, 0, judgement, measurement, second)
        warning = self._make_safe(attempt, part)
        self._ladder.shortened(True)
        return replace(
            outcome,
            action=Action.ATTENUATE,
            judgement=judgement,
            measurement=measurement,
            reason=reason,
            warning=warning or "",
        )

    def _write(self, parameters: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(parameters, values)

    def _follow_probe(self, recorded: float, before: float, second: float | None) -> str:
        moved = f"the restored weights measured {recorded:.6g} when they were committed and {before:.6g} now"
        if not math.isfinite(before):
            return f"{moved}: the probe itself fails"
        followed = self._panel.rebase(before, second)
        self._recovery.ring.safe.measurement = before
        self._guarantees.rebased(before - recorded)
        self._guarantees.committed(before)
        return f"{moved}: the probe has moved" + (", and the rule's level with it" if followed else "")

    def _reload(self, attempt: Attempt, outcome: Outcome) -> Outcome:
        """The last persisted state, through the caller's own loading."""
        assert self._reload_state is not None
        with attempt.timed("reload"):
            loaded = self._reload_state()
        if loaded is not None and (isinstance(loaded, bool) or not isinstance(loaded, int)):
            raise TypeError(f"reload: expected the attempt index of the state it loaded, or None, got {loaded!r}")
        recorded = self._recovery.ring.safe.measurement
        self._recovery.adopt(self._ledger.attempt)
        measurement, second = self._judging.standing(attempt)
        if not math.isfinite(measurement):
            raise StabilityError(
                f"attempt {attempt.index}: the persisted state that reload() brought back measures {measurement}: the "
                f"checkpoint itself is damaged, or reload() did not load the model. Restart from an older one."
            )
        self._panel.rebase(measurement, second)
        self._recovery.ring.safe.measurement = measurement
        # The rule's level has moved with the measurement; so has what it may be compared with.
        self._guarantees.rebased(measurement - (measurement if recorded is None else recorded))
        self._guarantees.committed(measurement)
        undone = self._ledger.undo_after(-1 if loaded is None else loaded)
        reason = f"{outcome.reason}; the persisted state was loaded and measures {measurement:.6g}"
        return replace(outcome, action=Action.RELOAD, undone=undone, reason=reason)
