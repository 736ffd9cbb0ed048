"""One task and seed of the closed-loop comparison: its shared prefix, its references, and its arms.

All arms of a cell share the training up to shortly before the fault: it is trained once, recorded, and the rule is fed
the record; an arm whose rule refuses a recorded step trains from the start. The branch lies 16 attempts before the
fault, so that two anchors for a deep restore exist when it strikes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_stability import LossProbe, StabilityController, StabilityStop
from dist_stability.bench.detection.cells import CLEAN, ClosedFault, ClosedTask
from dist_stability.bench.detection.closed_tasks import Training
from dist_stability.experiments.tasks import cross_entropy
from dist_stability.rules import Rule
from dist_stability.rules.trend import SlowDivergence
from dist_stability.verdict import Action, Verdict

LEAD = 16
"""Attempts between the branch and the fault: with anchors every 8 commits, two exist when it strikes."""

SCORED = (12, 8, 4, 0)
"""Attempts before the end at which the score is taken; the final loss is their mean (one weight vector scatters)."""

LOST = 1e6
"""Regret of a run that ended non-finite, in nats; larger ones are cut to it."""

RuleFactory = Callable[[], Rule]
Arms = Mapping[str, RuleFactory | None]
"""By name, what makes a fresh rule. The names "none" (no guard) and "perfect" take no rule (None)."""


@dataclass(frozen=True)
class Prefix:
    """What a guard takes over from training that it did not watch.

    Attributes:
        commits: Attempts trained.
        rule: State of the rule that was fed them.
        trend: State of the slow-divergence rule that was fed them.
        highest: Highest measurement among them: what the controller's own guarantees are checked against.
    """

    commits: int
    rule: Mapping[str, Any]
    trend: Mapping[str, Any]
    highest: float


@dataclass
class Record:
    """What one arm did.

    Attributes:
        numbers: (measurement, gradient norm, announced learning rate, training loss) of each attempt, where measured.
        last: Score-set losses at the end, see :data:`SCORED`.
        scores: Score-set loss after every attempt, by attempt, where it was asked for.
        verdicts: Of a guarded arm, in order.
        committed: Fault attempts that stand at the end.
        warned: First attempt after which the slow-divergence rule warned inside or after the fault; None for never.
        score_at_warning: Score-set loss then.
        false_warnings: Its warnings before the fault.
        stopped: The controller gave up.
    """

    numbers: list[tuple[float, ...]] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    committed: set[int] = field(default_factory=set)
    warned: int | None = None
    score_at_warning: float = math.nan
    false_warnings: int = 0
    stopped: bool = False

    @property
    def final(self) -> float:
        """The final loss: mean of the last scores."""
        return sum(self.last) / len(self.last)


def make_controller(training: Training, rule: Rule, prefix: Prefix | None = None) -> StabilityController:
    """The guard of one arm: the one place that knows the controller's arguments.

    Args:
        training: The run, in the state at which the guard takes over.
        rule: A fresh rule.
        prefix: What was trained without the guard before; None at the start of a run.

    Collectives: those of the controller's construction.
    """
    controller = StabilityController(
        training.model,
        training.optimizer,
        LossProbe(cross_entropy, [training.parts.probe]),
        rule,
        extra_state={"scheduler": training.scheduler},
    )
    if prefix is not None:
        state = controller.state_dict()
        state["panel"] = {**state["panel"], "rule": dict(prefix.rule), "trend": dict(prefix.trend)}
        state["guarantees"] = {"highest": prefix.highest}
        state.update(dict.fromkeys(("attempt", "steps", "commits", "judged"), prefix.commits))
        controller.load_state_dict(state)
    return controller


class Group:
    """Cells of one task and seed whose faults begin together."""

    def __init__(self, task: ClosedTask, seed: int, arms: Arms, rank: int = 0, world: int = 1) -> None:
        """Train nothing yet."""
        self._task, self._seed, self._arms, self._rank, self._world = task, seed, arms, rank, world
        self._references: dict[tuple[frozenset[int], int], Record] = {}
        self._prefix = Record()
        self._branch = 0
        self._state: dict[str, Any] = {}

    def run(
        self, faults: Sequence[tuple[ClosedFault, Sequence[str]]], take: Callable[[list[dict[str, Any]]], None]
    ) -> None:
        """Train the prefix, then every arm of every fault."""
        start = faults[0][0].start
        self._branch = max(0, (start - LEAD) // 8 * 8)
        training = self._training(CLEAN)
        first = training.loss(training.parts.probe)
        self._prefix.numbers.append(training.agreed(first, math.nan, math.nan, math.nan))
        self._plain(training, range(self._branch), frozenset(), self._prefix, measured=True)
        self._state = training.snapshot()
        training.fault.close()
        for fault, names in faults:
            reference = self._reference(fault)
            take([self._row(fault, name, self._arm(fault, name, reference), reference) for name in names])

    def _training(self, fault: ClosedFault, load: bool = False) -> Training:
        training = Training(self._task, self._seed, fault, fault.end, self._rank, self._world)
        if load:
            training.load(self._state)
        return training

    def _reference(self, fault: ClosedFault) -> Record:
        """Perfect rejection, or the run without a fault that lasts."""
        skipped = frozenset() if fault.lasting else fault.attempts
        key = (skipped, fault.end)
        if key not in self._references:
            training, record = self._training(CLEAN, load=True), Record()
            # A warning may come at any attempt of a lasting fault: it needs the clean run's score at all of them.
            every = fault.lasting and fault.kind != "clean"
            self._plain(training, range(self._branch, fault.end), skipped, record, fault.end, every=every)
            training.fault.close()
            self._references[key] = record
        return self._references[key]

    def _arm(self, fault: ClosedFault, name: str, reference: Record) -> Record:
        if name == "perfect":
            return reference
        record, factory = Record(), self._arms[name]
        training = self._training(fault, load=True)
        if factory is None:
            self._plain(training, range(self._branch, fault.end), frozenset(), record, fault.end)
            record.committed = set(fault.attempts)
        else:
            prefix = self._replay(factory())
            if prefix is None:
                training.fault.close()
                training = self._training(fault)
            self._guarded(training, factory(), prefix, record, fault)
        training.fault.close()
        return record

    def _replay(self, rule: Rule) -> Prefix | None:
        """Feed the prefix to a fresh rule; None if it refuses any of it."""
        trend = SlowDivergence()
        for number, (measurement, norm, rate, loss) in enumerate(self._prefix.numbers):
            trend.commit(measurement)
            if number == 0:
                rule.commit(measurement)
                continue
            expect = getattr(rule, "expect", None)
            if expect is not None:
                expect(steps=1, learning_rate=rate, training_loss=loss)
            if not rule.judge(measurement, norm).accepted:
                return None
            rule.commit(measurement, norm)
        highest = max(measurement for measurement, *_ in self._prefix.numbers)
        return Prefix(self._branch, rule.state_dict(), trend.state_dict(), highest)

    def _plain(
        self,
        training: Training,
        attempts: range,
        skipped: frozenset[int],
        record: Record,
        end: int = 0,
        measured: bool = False,
        every: bool = False,
    ) -> None:
        """Train without a guard, leaving out some attempts."""
        for attempt in attempts:
            if attempt not in skipped:
                (loss, norm), rate = training.backward(attempt), float(training.scheduler.get_last_lr()[0])
                training.optimizer.step()
                training.optimizer.zero_grad()
                training.scheduler.step()
                if measured:
                    record.numbers.append(training.agreed(training.loss(training.parts.probe), norm, rate, loss))
            if every:
                record.scores[attempt] = training.loss(training.parts.score)
            if end - 1 - attempt in SCORED:
                record.last.append(training.loss(training.parts.score))

    def _guarded(
        self, training: Training, rule: Rule, prefix: Prefix | None, record: Record, fault: ClosedFault
    ) -> None:
        """Train with the controller, as a user's loop would."""
        with make_controller(training, rule, prefix) as controller:
            for attempt in range(0 if prefix is None else prefix.commits, fault.end):
                if not record.stopped:
                    loss, norm = training.backward(attempt)
                    try:
                        verdict = controller.step(loss=loss, grad_norm=norm)
                    except StabilityStop:
                        record.stopped = True  # the state is the last committed one: that is what it ends with
                        continue
                    training.optimizer.zero_grad()
                    if verdict.accepted:
                        training.scheduler.step()
                    self._note(training, verdict, record, fault)
                if fault.end - 1 - attempt in SCORED:
                    record.last.append(training.loss(training.parts.score))

    def _note(self, training: Training, verdict: Verdict, record: Record, fault: ClosedFault) -> None:
        """Keep the books of one verdict."""
        record.verdicts.append(verdict)
        record.committed -= set(verdict.undone)
        if verdict.accepted and verdict.step in fault.attempts:
            record.committed.add(verdict.step)
        if not verdict.warning:
            return
        if verdict.step < fault.start or fault.kind == "clean":
            record.false_warnings += 1
        elif record.warned is None:
            record.warned, record.score_at_warning = verdict.step, training.loss(training.parts.score)

    def _row(self, fault: ClosedFault, name: str, record: Record, reference: Record) -> dict[str, Any]:
        damage = None
        if record.warned is not None:
            damage = record.score_at_warning - reference.scores.get(record.warned, reference.final)
        refused = [v for v in record.verdicts if v.action.refused]
        final = record.final
        return {
            "task": self._task.name,
            "fault": fault.name,
            "seed": self._seed,
            "arm": name,
            "final": final if math.isfinite(final) else None,
            "regret": min(LOST, final - reference.final) if math.isfinite(final) else LOST,
            "fault_committed": len(record.committed),
            "fault_attempts": len(fault.attempts),
            "extra_refused": sum(v.step not in fault.attempts for v in refused),
            "deep": sum(bool(v.undone) for v in refused),
            "stopped": record.stopped,
            "warned": None if record.warned is None else record.warned - fault.start,
            "damage_at_warning": damage,
            "attenuated": sum(v.action is Action.ATTENUATE for v in record.verdicts),
            "false_warnings": record.false_warnings,
        }
