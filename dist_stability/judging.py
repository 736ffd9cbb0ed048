"""The second half of an attempt, up to its decision: probe the proposal, vote, and ask the rule.

The vote is begun by ``ask`` and read by ``answer``: at once, or at the next step where the verdict is deferred.

Every rank enters the same collectives in the same order, whatever it measured: the forwards of the probe, then one
all-reduce. What a rank has to say against the step (an exception, a guard's flag, other bits than its replicas) rides
in that all-reduce; only if somebody said something does a gather follow, which names it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .attempt import Attempt, Decision, Phases, one_line
from .errors import StabilityError
from .escalation import Ladder
from .measuring import Measuring
from .recovery import Recovery
from .rules.panel import Panel
from .signals import Monitor
from .snapshot import StatePlan
from .verdict import Action
from .veto import VetoStage
from .vote import Ballot, Reduction, Tally, Vote, from_bits

PROPOSAL, STANDING = 2, 6
"""Points of the protocol: ranks that measure different things in the same vote are found out by these numbers."""


@dataclass(frozen=True, slots=True)
class Question:
    """A vote on a proposal that is under way.

    Attributes:
        attempt: What is voted on.
        steps: Optimizer steps in the proposal.
        ballot: This rank's.
        reduction: Of all ballots.
        error: What this rank has against the step.
    """

    attempt: Attempt
    steps: int
    ballot: Ballot
    reduction: Reduction
    error: BaseException | None


class Judging:
    """Turns a proposal into a decision that all ranks share.

    Args:
        measuring: Runs the probes.
        panel: Judges their values.
        ladder: May overrule an acceptance, when slow divergence was warned of for long enough.
        veto: Explains vetoes.
        recovery: Knows the plan that fits the proposal.
        vote: Of this controller.
        phases: Of this controller.
        monitor: Its signals ride in the vote.
        enforced: A refusal will be acted on.
    """

    def __init__(
        self,
        measuring: Measuring,
        panel: Panel,
        ladder: Ladder,
        veto: VetoStage,
        recovery: Recovery,
        vote: Vote,
        phases: Phases,
        monitor: Monitor,
        enforced: bool,
    ) -> None:
        """Remember the parts."""
        self._measuring, self._panel, self._ladder = measuring, panel, ladder
        self._veto, self._recovery, self._vote = veto, recovery, vote
        self._phases, self._monitor, self._enforced = phases, monitor, enforced

    def unjudged(self, attempt: Attempt) -> Decision:
        """Nobody measures this proposal; guards may still have vetoed it."""
        if attempt.error is not None and self._enforced:
            raise attempt.error
        if attempt.vetoed is None:
            self._veto.read(attempt)
            attempt.vetoed = bool(attempt.flag)
        return self._veto.explain(attempt) if attempt.vetoed else Decision(Action.UNJUDGED)

    def judge(self, attempt: Attempt, steps: int, compare: bool) -> Decision:
        """Probe, vote, and let the rule judge.

        Args:
            attempt: After the optimizers have run.
            steps: Optimizer steps in the proposal.
            compare: Compare the bits of replicas.

        Collectives: the probe's forwards and one all-reduce; two all-gathers if something is to be named.

        Raises:
            LockstepError: The ranks can no longer act as one.
        """
        return self.answer(self.ask(attempt, steps, compare))

    def ask(self, attempt: Attempt, steps: int, compare: bool) -> Question:
        """Probe and vote, without waiting for the outcome; see :meth:`judge`.

        Collectives: the probe's forwards, and one all-reduce that is only begun.
        """
        with attempt.timed("probe"):
            plan, image = self._recovery.proposal()
            attempt.plan = plan
            replan = plan is not self._recovery.plan
            if compare:
                attempt.digests = plan.digests(image.tensors)
            self._phases.enter("probe")
            reading, second = self._measuring.measure(attempt.index)
        first = attempt.pre_vote is None
        error = (attempt.error if first else None) or attempt.step_error or reading.error or second.error
        with attempt.timed("vote"):
            self._phases.enter("vote")
            ballot = Ballot(
                no=error is not None,
                veto=attempt.flag if first else False,
                replan=replan,
                measurement=reading.value,
                confirmation=second.value,
                weight=self._measuring.weight,
                square_sum=attempt.gradients.square_sum if first and attempt.gradients.caller_norm is None else None,
                agree={**attempt.agree, "point of the protocol": PROPOSAL},
                checksums=attempt.digests or {},
                signals=self._monitor.collect(),
            )
            return Question(attempt, steps, ballot, self._vote.begin(self._vote.pack(ballot), attempt.index), error)

    def answer(self, question: Question) -> Decision:
        """Read the vote and let the rule judge. The weights are still the proposal.

        Collectives: none; all-gathers if something is to be named.

        Raises:
            LockstepError: The ranks can no longer act as one.
        """
        attempt, ballot, error = question.attempt, question.ballot, question.error
        with attempt.timed("vote"):
            vector = self._vote.finish(question.reduction, attempt.index)
            if attempt.vetoed is None and attempt.pre_vote is not None:
                self._veto.read(attempt)
                attempt.vetoed = bool(attempt.flag)
            tally = self._vote.read(vector, ballot, attempt.index)
            attempt.signals, attempt.signal_errors = self._monitor.read(tally.signals), self._monitor.errors
        if "gradient norm" in tally.agreed:
            attempt.norm = from_bits(tally.agreed["gradient norm"])
        elif tally.gradient_norm is not None:
            attempt.norm = tally.gradient_norm
        if tally.replan and not ballot.replan and not attempt.provisional:
            attempt.plan = self._recovery.build_plan()
            attempt.digests = None
        late = attempt.provisional and self._enforced
        raised = tally.veto > 0 or (late and self._veto.above_limit(attempt))
        attempt.vetoed = bool(attempt.vetoed) or (raised and tally.no == 0)
        self._panel.expect(
            steps=question.steps,
            learning_rate=attempt.learning_rate,
            effective_step=None if attempt.vetoed else attempt.signals.values.get("effective_step"),
            training_loss=attempt.signals.values.get("training_loss"),
        )
        if not attempt.vetoed:
            # Overflowed gradients were not stepped with, so their norm says nothing about what is measured here.
            return self._decide(attempt, tally, error, None if attempt.overflow else attempt.norm)
        if late:
            # The step was taken, and must be taken back like any other.
            return replace(self._veto.explain(attempt), action=Action.ROLLBACK)
        # Nothing was proposed now; what was measured is what stands. If that is refused (a fault in unjudged attempts,
        # or weights that somebody else damaged), it is restored, or the guards would veto everything for ever.
        standing = self._decide(attempt, tally, error, None)
        if standing.action.refused and self._enforced:
            return standing
        veto = self._veto.explain(attempt)
        if self._enforced:
            return veto
        return replace(veto, measurement=tally.measurement, confirmation=tally.confirmation)

    def standing(self, attempt: Attempt, number: int = 0) -> tuple[float, float | None]:
        """Measure the weights as they are now, between restore and commit; NaN if that fails on some rank.

        Args:
            attempt: The attempt being settled.
            number: How many such measurements of this attempt came before.

        Collectives: the probe's forwards and one all-reduce.
        """
        reading, second = self._measuring.measure(attempt.index)
        ballot = Ballot(
            no=reading.error is not None or second.error is not None,
            measurement=reading.value,
            confirmation=second.value,
            weight=self._measuring.weight,
            agree={**attempt.agree, "point of the protocol": STANDING + number},
        )
        tally = self._vote.cast(ballot, attempt.index)
        return (float("nan") if tally.no else tally.measurement), self._second(tally)

    def start(self, plan: StatePlan, compare: bool) -> tuple[Tally, float | None]:
        """The first measurement, y(theta_0), and the first vote.

        Raises:
            StabilityError: The probe failed on some rank.
        """
        self._phases.enter("probe")
        reading, second = self._measuring.measure(-1)
        error = reading.error or second.error
        ballot = Ballot(
            no=error is not None,
            measurement=reading.value,
            confirmation=second.value,
            weight=self._measuring.weight,
            agree={"point of the protocol": 0},
            checksums=plan.digests(plan.tensors()) if compare else {},
        )
        tally = self._vote.cast(ballot, -1)
        if tally.no:
            said = self._vote.gather(one_line(error), -1)
            text = "; ".join(f"rank {rank}: {reason}" for rank, reason in said.items() if reason is not None)
            raise StabilityError(f"the probe failed on the initial weights: {text}") from error
        return tally, self._second(tally)

    def _name_nonfinite(self, attempt: Attempt) -> str:
        """Which tensors of the proposal are to blame for a measurement that is no number. Collectives: two all-gathers.

        Waits for the device once per tensor: only on the way to a refusal.
        """
        assert attempt.plan is not None
        tensors = zip(attempt.plan.entries, attempt.plan.tensors(), strict=True)
        names = [e.name for e, t in tensors if t.is_floating_point() and not bool(t.isfinite().all())]
        said = self._vote.gather([len(names), *names[:1]], attempt.index)
        found = {rank: text for rank, text in said.items() if text[0]}
        if not found:
            return "; weights and optimizer state are finite, so it is the probe's forward that overflows"
        rank = min(found)
        return f"; not finite on rank {rank}: {found[rank][1]} (and {found[rank][0] - 1} more tensors)"

    def _second(self, tally: Tally) -> float | None:
        return tally.confirmation if self._measuring.confirm is not None else None

    def _decide(self, attempt: Attempt, tally: Tally, error: BaseException | None, norm: float | None) -> Decision:
        if tally.no:
            said = self._vote.gather(one_line(error), attempt.index)
            failed = {rank: text for rank, text in said.items() if text is not None}
            everywhere = attempt.step_error is not None and len(failed) == self._vote.world
            reason = "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())
            rank = min(failed, default=0)
            return Decision(Action.ROLLBACK, "error", reason, rank, fatal=attempt.step_error if everywhere else None)
        if tally.split_replicas:
            ranks = self._vote.name_split(tally, attempt.digests or {}, attempt.index)
            reason = f"replicas of the same state differ in their bits: ranks {ranks}"
            return Decision(Action.ROLLBACK, "replica", reason, ranks[0], None, tally.measurement)
        second = self._second(tally)
        judgement = self._panel.judge(tally.measurement, second, norm)
        action, signal, reason = Action.COMMIT, "probe", judgement.reason
        if not judgement.accepted:
            action = Action.DEEP_ROLLBACK if judgement.deep else Action.ROLLBACK
            if not math.isfinite(tally.measurement):
                reason += self._name_nonfinite(attempt)
        elif (overdue := self._ladder.overdue()) is not None:
            action, signal, reason = Action.ROLLBACK, "trend", overdue
        return Decision(action, signal, reason, self._vote.ranks[0], judgement, tally.measurement, second)
