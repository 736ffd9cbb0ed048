"""The guarded step as one machine: an attempt is opened, proposed, judged and settled, now or at the next step.

What each of these does is in the modules it calls; here is their order, which is the same on every rank, and what is
remembered from one attempt to the next.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from .attempt import Attempt, Decision, event_of
from .edge_watch import EdgeWatch
from .errors import LockstepError, StabilityError
from .judging import Judging, Question
from .learning_rate import announced
from .parts import Parts
from .persistence import Between
from .replay import Replay
from .rungs import Rung
from .settlement import Outcome, Settlement
from .signals import Gradients, JudgedPeriod, SignalValues, StepContext, host_values
from .startup import agree_on_replicas
from .validation import check_not_fused_into_backward, check_scaler
from .verdict import Action, Verdict
from .veto import VetoStage
from .vote import bits


class GuardedStep:
    """Runs the attempts of one controller.

    Args:
        parts: Of the controller.
        deferred: The vote is read at the next attempt.
        replica_check_every: See :class:`StabilityController`.
        reload: See there.
        on_event: See there.

    Attributes:
        judging: Measures and asks the rule.
        verdict: The last one.
        pending: The vote that was begun and not read (deferred verdict).
        replay: The batches of the loop, if it takes them from the controller.
        scaler: The GradScaler of the last step, or None.
        said_rate: The learning rate that the loop vouched for itself, or None.
        captured: Host seconds that captures in forwards of the present attempt took.
    """

    def __init__(
        self,
        parts: Parts,
        deferred: bool,
        replica_check_every: int,
        reload: Callable[[], int | None] | None,
        on_event: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        """Make the stages of an attempt. Enters no collective."""
        self._parts, self._deferred, self._enforced = parts, deferred, parts.enforced
        self._replica_check_every, self._on_event = replica_check_every, on_event
        self._optimizers, self._extra_state, self._cadence = parts.optimizers, parts.extra_state, parts.cadence
        self._ladder, self._monitor, self._rates, self._ledger = parts.ladder, parts.monitor, parts.rates, parts.ledger
        self._recovery, self._persistence, self._phases = parts.recovery, parts.persistence, parts.phases
        self._vote, self._first_forward = parts.vote, parts.first_forward
        self._veto = VetoStage(parts.guards, parts.optimizers, parts.vote, parts.phases)
        self.judging = Judging(
            parts.measuring,
            parts.panel,
            parts.ladder,
            self._veto,
            parts.recovery,
            parts.vote,
            parts.phases,
            parts.monitor,
            parts.enforced,
        )
        self._settlement = Settlement(
            parts.recovery,
            self.judging,
            parts.panel,
            parts.ladder,
            parts.guarantees,
            parts.ledger,
            self._veto,
            parts.vote,
            replica_check_every > 0,
            reload,
            parts.shaping is not None,
            self._identify_batch,
        )
        self._edge = None if parts.edge is None else EdgeWatch(parts.edge, parts)
        self.verdict: Verdict | None = None
        self.pending: Question | None = None
        self.replay: Replay | None = None
        self.scaler: torch.amp.GradScaler | None = None
        self.said_rate: float | None = None
        self.captured = 0.0
        self._open: Attempt | None = None
        self._dropped: Verdict | None = None

    # ------------------------------------------------------------------ whole steps

    def start(self) -> None:
        """Measure y(theta_0), check that replicas start equal, and take the first snapshot.

        Collectives: see :class:`StabilityController`.

        Raises:
            LockstepError: Replicas differ.
            StabilityError: A probe is not finite.
        """
        plan = self._recovery.plan
        compare = self._replica_check_every > 0
        if compare:
            self._vote.replica_groups = agree_on_replicas(self._vote, plan.residences)
        tally, second = self.judging.start(plan, compare)
        if tally.split_replicas:
            raise LockstepError(
                f"ranks {tally.split_replicas} should hold the same weights and optimizer state, but their bits differ "
                f"from the start: wrap the model in DDP or broadcast it; or, if they differ on purpose, set "
                f"replica_check_every=0",
                ranks=sorted({rank for ranks in tally.split_replicas for rank in ranks}),
            )
        for name, value in (("probe", tally.measurement), ("second probe", second)):
            if value is not None and not math.isfinite(value):
                raise StabilityError(
                    f"the {name} measures {value} on the initial weights, so there is nothing to compare a proposal "
                    f"with: check loss_fn, the probe batches and the initialization"
                )
        self._parts.guarantees.committed(tally.measurement)
        self._parts.panel.start(tally.measurement, second)
        if self._enforced:
            self._recovery.commit(plan, -1, tally.measurement)
        if self._persistence is not None:
            self._persistence.mark()
        self._phases.enter("training")

    def step(self, grad_norm: Any, scaler: Any, loss: Any) -> Verdict:
        """One attempt; see :meth:`StabilityController.step`."""
        if (refusal := self.settle_pending()) is not None:
            return refusal
        attempt = self._begin(grad_norm, scaler, loss)
        self._propose(attempt)
        return self._end()

    def before_hooked(self) -> bool:
        """The loop's own optimizers are about to step; returns whether that must change nothing."""
        with self._parts.noted():
            self._dropped = self.settle_pending()
            return self._dropped is not None or bool(self._begin().vetoed)

    def after_hooked(self) -> bool:
        """They have stepped; returns whether the proposal stands."""
        dropped, self._dropped = self._dropped, None
        if dropped is not None:
            return dropped.accepted
        with self._parts.noted():
            return self._end().accepted

    def settle_pending(self, last: bool = False) -> Verdict | None:
        """Read the verdict of the attempt before, if it is pending.

        Args:
            last: No attempt has begun since: settle that one as itself. Otherwise a refusal is the verdict of the
                present attempt, whose gradients came from refused weights.

        Returns:
            The verdict, if it is of the last attempt or takes the place of the present one; else None.
        """
        question, self.pending = self.pending, None
        if question is None:
            return None
        attempt = question.attempt
        attempt.take_over()
        decision = self.judging.answer(question)
        replaces = not last and decision.action.refused and self._enforced
        if replaces:
            # One event for each attempt: this one was accepted as far as the loop knows.
            self._tell(attempt, Verdict(Action.COMMIT, attempt.index, final=False), Decision(Action.COMMIT))
        else:
            self._ledger.withdraw()
        outcome = self._settle(attempt, decision)
        verdict = self._finish(attempt, decision, outcome, begun=not last and not replaces)
        if replaces:
            # To a cadence the present attempt is one more that does not stand.
            self._cadence.record(attempt=verdict.step, judged=False, accepted=False)
        return verdict if last or replaces else None

    # ------------------------------------------------------------------ one attempt

    def _begin(self, grad_norm: Any = None, scaler: Any = None, loss: Any = None) -> Attempt:
        """Everything before the optimizer runs."""
        since = time.perf_counter()
        index = self._ledger.attempt
        if self._open is not None:
            raise RuntimeError(f"attempt {self._open.index} is still open: an optimizer step did not complete")
        check_not_fused_into_backward(self._optimizers)
        if self._enforced and not self._first_forward.captured:
            raise StabilityError(
                f"attempt {index}: no training forward of the model was seen since the last verdict, so RNG "
                f"and buffers could not be restored. Call the model that the controller was given (not a method of it, "
                f"nor a copy), or give the controller the module that you call."
            )
        self.scaler = scaler = check_scaler(scaler)
        self._phases.enter("gradients")
        gradients = Gradients(self._recovery.plan.parameters, grad_norm)
        judged = self._cadence.judged(index) or (self.replay is not None and self.replay.queue.must_judge)
        attempt = Attempt(index, judged, gradients, self._agreement(gradients, judged), scaler, since=since)
        attempt.seconds["capture"], self.captured = self.captured, 0.0
        self._look_at_rates(attempt)
        if self._enforced:
            self._recovery.capture_entry(scaler, bool(self._ledger.pending))
            if not self._ledger.pending:
                self._seal()
        with attempt.timed("guards"):
            self._veto.look(attempt)
            if self._enforced:
                deferred, pending = self._deferred and judged, bool(self._ledger.pending)
                # A late "no" takes back the unjudged attempts before, too; then it is better to know in time.
                self._veto.agree(attempt, later=deferred and not pending, now=deferred and pending)
            else:
                attempt.vetoed = False
        self._recovery.before_step()
        self._open = attempt
        self._phases.enter("step")
        if not attempt.vetoed:
            self._rates.apply(attempt.rate_factor)
        context = StepContext(gradients, self._optimizers, loss, scaler)
        if judged:
            attempt.context = context
            with attempt.timed("signals"):
                self._monitor.before_step(context)
        else:
            attempt.signals = SignalValues(host_values(context))
        attempt.give_back()
        return attempt

    def _look_at_rates(self, attempt: Attempt) -> None:
        attempt.rate_factor = self._ladder.learning_rate_factor if self._enforced else 1.0
        rate = self.said_rate
        if rate is None:
            rate = announced(self._optimizers, self._extra_state.values())
        attempt.learning_rate = None if rate is None else rate * attempt.rate_factor

    def _propose(self, attempt: Attempt) -> None:
        """Step the optimizers, unless the host knows of a veto."""
        if attempt.vetoed:
            return
        with attempt.timed("step"):
            try:
                for optimizer in self._optimizers:
                    if attempt.scaler is not None:
                        attempt.scaler.step(optimizer)
                    else:
                        optimizer.step()
            except Exception as error:
                # Judged, it is a vote: the other ranks have stepped, and all go back together.
                if not attempt.judged or not self._enforced:
                    self._rates.undo()
                    self._open = None
                    raise
                attempt.step_error = error

    def _end(self) -> Verdict:
        """Everything after the optimizers ran: decide, then do it."""
        attempt = self._open
        if attempt is None:
            raise RuntimeError("an optimizer step ended that never began: was the controller attached inside a step?")
        self._open = None
        attempt.take_over()
        if attempt.context is not None and not attempt.vetoed:
            with attempt.timed("signals"):
                self._monitor.after_step(attempt.context)
        self._rates.undo()
        self._veto.stepped()
        if self._deferred and attempt.judged and not attempt.vetoed and not attempt.overflow:
            return self._defer(attempt)
        decision = self._decide(attempt)
        if self._edge is not None:
            decision = self._edge.look(attempt, decision)
        outcome = self._settle(attempt, decision)
        # After a refusal the scaler is as it was before; a shorter step is taken from that state, too.
        if attempt.scaler is not None and outcome.action in (Action.COMMIT, Action.UNJUDGED, Action.SCALER_SKIP):
            attempt.scaler.update()
        return self._finish(attempt, decision, outcome)

    def _defer(self, attempt: Attempt) -> Verdict:
        """Begin the vote and the copy of the proposal; the next step reads the verdict."""
        self._phases.enter("after step")
        self._ledger.judged += 1
        self.pending = self.judging.ask(attempt, len(self._ledger.pending) + 1, self._compares_replicas())
        if self._enforced:
            assert attempt.plan is not None
            with attempt.timed("copy"):
                self._recovery.hold(attempt.plan, attempt.index, attempt.digests)
        if attempt.scaler is not None:
            attempt.scaler.update()
        attempt.defer()
        self._ledger.provisional()
        verdict = Verdict(Action.COMMIT, attempt.index, final=False, reason="provisional: read at the next step")
        self.verdict = verdict
        self._await_forward()
        self._phases.enter("done")
        if self.replay is not None:
            self.replay.settle(verdict)
        self._phases.attempt = self._ledger.attempt
        self._phases.enter("training")
        attempt.give_back()
        return verdict

    def _settle(self, attempt: Attempt, decision: Decision) -> Outcome:
        return (self._settlement.settle if self._enforced else self._settlement.observe)(attempt, decision)

    def _decide(self, attempt: Attempt) -> Decision:
        if attempt.overflow:
            return self._look_behind(attempt)
        if attempt.vetoed and not attempt.judged:
            return self._veto.explain(attempt)
        self._phases.enter("after step")
        if not attempt.judged:
            return self.judging.unjudged(attempt)
        return self._judge(attempt, len(self._ledger.pending) + 1)

    def _judge(self, attempt: Attempt, steps: int) -> Decision:
        self._ledger.judged += 1
        return self.judging.judge(attempt, steps, self._compares_replicas())

    def _look_behind(self, attempt: Attempt) -> Decision:
        """An overflow: no step was taken. But unjudged ones before it may be its cause, and then would never be judged.

        Weights that are not finite make every later gradient overflow, and the scaler would skip for ever.
        """
        skipped = Decision(Action.SCALER_SKIP, "scaler", "the scaled gradients overflowed")
        if not (attempt.judged and self._ledger.pending and self._enforced):
            return skipped
        self._phases.enter("after step")
        decision = self._judge(attempt, len(self._ledger.pending))
        return decision if decision.action.refused else skipped

    def _finish(self, attempt: Attempt, decision: Decision, outcome: Outcome, begun: bool = False) -> Verdict:
        """Remember the attempt, and tell whoever listens.

        Args:
            attempt: What is settled.
            decision: What was decided.
            outcome: What was done.
            begun: The next attempt has begun already: its forward was captured.
        """
        judgement = outcome.judgement
        verdict = Verdict(
            action=outcome.action,
            step=self._ledger.attempt,
            undone=outcome.undone,
            would=None if self._enforced else decision.action,
            signal=decision.signal,
            measurement=outcome.measurement,
            innovation=None if judgement is None else judgement.innovation,
            bound=None if judgement is None else judgement.bound,
            reason=outcome.reason,
            rung=outcome.rung,
            pattern=outcome.pattern,
            warning=outcome.warning,
        )
        self.verdict = verdict
        if not begun:
            self._await_forward()
            self._phases.enter("done")
        chosen = self._record_cadence(attempt, verdict, decision)
        if self.replay is not None and attempt.provisional:
            self.replay.settle_late(verdict, attempt.index)
        elif self.replay is not None:
            self.replay.settle(verdict)
        self._tell(attempt, verdict, decision, chosen)
        self._ledger.close(verdict, attempt.norm)
        if not begun:
            self._phases.attempt = self._ledger.attempt
            self._phases.enter("training")
        if verdict.rung == Rung.STOP:
            raise self._ladder.stop(verdict.step, verdict.reason)
        return verdict

    def _tell(self, attempt: Attempt, verdict: Verdict, decision: Decision, cadence: str | None = None) -> None:
        self.tell({**event_of(attempt, verdict, decision, self._ledger.steps), "cadence": cadence})

    def tell(self, event: dict[str, Any]) -> None:
        """Tell whoever listens."""
        if self._on_event is not None:
            self._on_event(event)

    def _record_cadence(self, attempt: Attempt, verdict: Verdict, decision: Decision) -> str | None:
        innovation, bound, fraction = verdict.innovation, verdict.bound, None
        if innovation is not None and bound is not None and math.isfinite(innovation) and 0 < bound < math.inf:
            fraction = innovation / bound
        return self._cadence.record(
            attempt=attempt.index,
            judged=attempt.judged,
            accepted=verdict.accepted,
            fraction=fraction,
            evidence=0.0 if decision.judgement is None else decision.judgement.evidence,
            learning_rate=attempt.learning_rate,
            seconds=attempt.signals.values.get(JudgedPeriod.name),
        )

    # ------------------------------------------------------------------ agreeing

    def _agreement(self, gradients: Gradients, judged: bool) -> dict[str, int | torch.Tensor]:
        """Numbers that must be equal on all ranks in every vote of this attempt."""
        fields: dict[str, int | torch.Tensor] = {
            "step": self._ledger.attempt,
            "judged": int(judged),
            "use of batches()": int(self.replay is not None),
            "plan": self._recovery.plan.signature,
            "history of verdicts": self._ledger.history,
            "loaded checkpoint": self._ledger.loaded,
        }
        if self._edge is not None:
            fields["edge of stability"] = self._edge.standing
        if gradients.caller_norm is not None:
            fields["gradient norm"] = bits(gradients.caller_norm)
        return fields

    def _identify_batch(self, attempt: Attempt) -> int | None:
        """Content digest of what all ranks trained on in this attempt; None if that is not known.

        Collectives: two all-gathers, if the loop uses :meth:`batches`.
        """
        if self.replay is None:
            return None
        everyone = self._vote.gather(self.replay.digest(attempt.provisional), attempt.index)
        if None in everyone.values():
            return None
        said = ",".join(str(everyone[rank]) for rank in sorted(everyone))
        return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=7).digest(), "little")

    def _compares_replicas(self) -> bool:
        every = self._replica_check_every
        return every > 0 and bool(self._vote.replica_groups) and self._ledger.judged % every == 0

    # ------------------------------------------------------------------ between attempts

    def seal_between(self) -> None:
        """Seal the safe state between two steps, if it is what stands and this process has made it."""
        begun = self._first_forward.captured
        stands = not (begun or self._ledger.pending or self._recovery.stale)
        if stands and self.verdict is not None:
            unfetched = self.replay is not None and self.replay.queue.current is None
            self._seal(Between(self.scaler, unfetched))

    def _seal(self, between: Between | None = None) -> None:
        if self._persistence is None:
            return
        seen = None if self.replay is None else self.replay.export()
        self._persistence.seal(self._ledger.attempt, self._ledger.history, self._parts.state_dict(), seen, between)

    def _await_forward(self) -> None:
        """The attempt is over, and the loop goes on to fetch what comes next."""
        self._first_forward.arm()
        if self._persistence is not None:
            self._persistence.mark()
