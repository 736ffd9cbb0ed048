"""Rewind and replay on real ranks: at any cadence the run is, bit for bit, the one that never saw the guilty batch.

What is wrong is wrong with a *batch*: whenever it is trained on, it damages the weights or the gradients in the same
way, so it is guilty again in the replay. The twin is the plain loop, without any controller, over the loader without
the guilty batches. The model has dropout, so a generator that is off by one draw changes every bit after it; the
learning rate changes at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import harness
import pytest
import torch
import zoo
from choice import often
from zoo import Case

from dist_stability import FixedInnovation, Verdict
from dist_stability.cadence import AdaptiveCadence
from dist_stability.parallel import local
from dist_stability.testing import Outcome, capture_state, compare, flip_largest
from dist_stability.verdict import Action


@dataclass(frozen=True)
class Job:
    """One comparison. ``guilty`` and ``overflowing`` are batch indices; ``kind`` is what a guilty batch does."""

    case: Case
    guilty: tuple[int, ...]
    kind: str = "weight"
    overflowing: tuple[int, ...] = ()
    adaptive: bool = False
    epochs: int = 1
    refusals: int | None = None
    decision: str = "immediate"

    def __str__(self) -> str:
        return f"{self.case} guilty {self.guilty} ({self.kind}) overflowing {self.overflowing}"


@dataclass
class Loop:
    """One run of a job on one rank."""

    job: Job
    rank: int
    world: int
    trained: list[tuple[int, ...]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def loader(self, replica: int, epoch: int) -> Iterator[dict[str, Any]]:
        """The batches of one epoch, with their indices."""
        case = self.job.case
        length = case.steps * case.accumulation // self.job.epochs
        for index in range(epoch * length, (epoch + 1) * length):
            x, y = zoo.data(case, index, replica)
            yield {"inputs": (x, y), "index": index}

    def run(self, guarded: bool) -> Outcome:
        case, job = self.job.case, self.job
        setup = zoo.build(case, self.rank, self.world)
        parameters = [p for optimizer in setup.optimizers for group in optimizer.param_groups for p in group["params"]]
        if not guarded:
            group = [batch for epoch in range(job.epochs) for batch in self.loader(setup.replica, epoch)]
            for first in range(0, len(group), case.accumulation):
                members = group[first : first + case.accumulation]
                if not any(batch["index"] in job.guilty for batch in members):
                    self.backward(setup, members, parameters)
                    self.plain_step(setup)
            return Outcome(capture_state(setup.model, setup.optimizers, setup.extra_state, setup.scaler))
        every: Any = AdaptiveCadence(most=case.every, calm=2) if job.adaptive else case.every
        controller = zoo.control(
            case, setup, rule=FixedInnovation(2.0), every=every, decision=job.decision, on_event=self.events.append
        )
        members = []

        def damage(attempt: int, phase: str) -> None:
            hit = phase == "after step" and any(batch["index"] in job.guilty for batch in members)
            if hit and job.kind == "weight" and self.rank == self.world - 1:
                flip_largest((local(p) for p in parameters), "top-exponent")

        controller.add_phase_listener(damage)
        hooked = case.form == "attach"
        with controller.attach() if hooked else controller:
            for epoch in range(job.epochs):
                for batch in controller.batches(self.loader(setup.replica, epoch), accumulate=case.accumulation):
                    members.append(batch)
                    if len(members) < case.accumulation:
                        continue
                    self.backward(setup, members, parameters)
                    if hooked:
                        setup.optimizers[0].step()
                    else:
                        controller.step(scaler=setup.scaler)
                    verdict = controller.verdict
                    assert verdict is not None
                    self.verdicts.append(verdict)
                    self.trained.append(tuple(batch["index"] for batch in members))
                    members.clear()
                    for scheduler in setup.extra_state.values() if verdict.accepted or hooked else ():
                        scheduler.step()
        image = capture_state(setup.model, setup.optimizers, setup.extra_state, setup.scaler)
        return Outcome(image, self.verdicts)

    def backward(self, setup: zoo.Setup, members: list[dict[str, Any]], parameters: list[Any]) -> None:
        for optimizer in setup.optimizers:
            optimizer.zero_grad()
        for batch in members:
            x, y = batch["inputs"]
            loss = zoo.loss_fn(setup.model, (x, y)) / len(members)
            (loss if setup.scaler is None else setup.scaler.scale(loss)).backward()
            x.zero_()  # what a loop does to its batch must not be in the replayed one
        guilty = any(batch["index"] in self.job.guilty for batch in members) and self.job.kind == "gradient"
        overflow = any(batch["index"] in self.job.overflowing for batch in members)
        for parameter in parameters if guilty or overflow else ():
            if parameter.grad is not None:
                local(parameter.grad).mul_(torch.inf if overflow else -1000.0)

    def plain_step(self, setup: zoo.Setup) -> None:
        skipped = False
        for optimizer in setup.optimizers:
            if setup.scaler is None:
                optimizer.step()
                continue
            before = setup.scaler.get_scale()
            setup.scaler.step(optimizer)
            setup.scaler.update()
            skipped = setup.scaler.get_scale() < before
        for scheduler in setup.extra_state.values() if not skipped else ():
            scheduler.step()


def twins(rank: int, world: int, jobs: list[Job]) -> list[str]:
    """What is wrong with each job on this rank."""
    said = []
    for job in jobs:
        loop = Loop(job, rank, world)
        guarded = loop.run(True)
        twin = Loop(job, rank, world).run(False)
        wrong = compare(guarded.image, twin.image) + judge(job, loop)
        said += [f"{job}: {line}" for line in wrong[:4]]
    return said


def judge(job: Job, loop: Loop) -> list[str]:
    """Whether exactly the guilty batches are missing, according to the verdicts."""
    standing: dict[int, tuple[int, ...]] = {}
    for verdict, members in zip(loop.verdicts, loop.trained, strict=True):
        for attempt in verdict.undone:
            del standing[attempt]
        if verdict.accepted:
            standing[verdict.step] = members
    # Deferred verdicts that were read when a loader was at its end: the loop never saw them.
    seen = {verdict.step for verdict in loop.verdicts if not verdict.accepted}
    ends = [e for e in loop.events if Action(e["action"]).refused and e["attempt"] not in seen]
    for attempt in [attempt for event in ends for attempt in (*event["undone"], event["attempt"])]:
        del standing[attempt]
    expected = [
        members
        for first in range(0, job.case.steps * job.case.accumulation, job.case.accumulation)
        if not {*job.guilty, *job.overflowing}.intersection(
            members := tuple(range(first, first + job.case.accumulation))
        )
    ]
    wrong = [] if [*standing.values()] == expected else [f"standing: {[*standing.values()]}"]
    refusals = [v for v in loop.verdicts if v.action.refused]
    if job.refusals is not None and len(refusals) != job.refusals:
        wrong.append(f"{len(refusals)} refusals: {[(v.step, str(v.action), v.reason) for v in refusals]}")
    undone = [*(v for v in refusals if v.undone), *(event for event in ends if event["undone"])]
    if job.case.every > 1 and not job.adaptive and job.guilty and not undone:
        wrong.append("nothing was undone")
    # On bad weights other batches overflow, too; they must stand in the end, which is checked above.
    skipped = [m for v, m in zip(loop.verdicts, loop.trained, strict=True) if v.action is Action.SCALER_SKIP]
    if not {*job.overflowing} <= {index for members in skipped for index in members}:
        wrong.append(f"overflows: {skipped}")
    return wrong


def check(jobs: list[Job], timeout: float = 300) -> None:
    (world,) = {zoo.world_of(job.case) for job in jobs}
    said = harness.pool(world).run(twins, jobs, timeout=timeout)
    assert not any(said), "\n".join(dict.fromkeys(line for lines in said for line in lines))


def at_any_position(case: Case, kind: str = "weight") -> list[Job]:
    """The guilty batch at every position of the window: the first half of them in one window, the rest in the next."""
    every, half = case.every, -(-case.every // 2)
    case = replace(case, steps=max(2 * every, 4))
    return [Job(case, (p, every + min(p + half, every - 1)), kind) for p in range(half)]


@pytest.mark.parametrize(
    ("mode", "every"),
    often(product(("ddp", "fsdp2"), (1, 2, 5, 16)), [("ddp", 2), ("fsdp2", 1), ("fsdp2", 5)]),
)
def test_golden_twin_wherever_the_guilty_batch_is(mode: str, every: int) -> None:
    """A weight with a flipped exponent: every later gradient is NaN, so that the guard vetoes innocent batches, too."""
    jobs = at_any_position(Case(mode, every=every, scheduler=True))
    check([replace(job, refusals=None if every > 1 else 2) for job in jobs])


@pytest.mark.parametrize("mode", often(("ddp", "fsdp2"), ["fsdp2"]))
def test_golden_twin_in_other_loops(mode: str) -> None:
    """Finite damage, buffers, accumulation, two guilty batches in one window, one across epochs, hooks, no guilt."""
    case = Case(mode, every=5, scheduler=True, steps=15)
    check(
        [
            Job(replace(case, optimizer="sgd"), (7,), "gradient", refusals=2),
            Job(replace(case, model="conv"), (5, 11)),
            Job(replace(case, model="conv", optimizer="sgd"), (6,), "gradient", refusals=2),
            Job(replace(case, accumulation=3, every=2, steps=8), (4, 14)),
            Job(case, (5, 9)),
            Job(case, (6, 7, 8)),
            Job(replace(case, steps=16), (6,), epochs=2),
            Job(replace(case, form="attach"), (3, 7)),
            Job(case, (), refusals=0),
        ]
    )


@pytest.mark.parametrize("mode", often(("ddp", "fsdp2"), ["ddp"]))
def test_golden_twin_at_an_adaptive_cadence(mode: str) -> None:
    """The interval grows from 1 to 8 while all is calm; wherever the fault falls, only its batch is missing."""
    case = Case(mode, every=8, scheduler=True, steps=30)
    check([Job(case, (guilty,), adaptive=True) for guilty in (0, 3, 9, 13, 17, 20)])


@pytest.mark.parametrize("mode", often(("ddp", "fsdp2"), ["ddp"]))
def test_golden_twin_with_a_loss_scale(mode: str) -> None:
    """An overflow among the attempts that are taken back has lowered the scale: it does so again in the replay."""
    case = Case(mode, optimizer="sgd", every=5, scheduler=True, steps=10, scaler=True)
    overflows = ((), (1,), (5,), (8,), (1, 3, 5, 8))
    check([Job(case, (guilty,), "gradient", overflowing) for guilty in (2, 7) for overflowing in overflows])


def test_overflows_do_not_hide_a_bad_step(two: harness.Pool) -> None:
    """Weights that are not finite make every later gradient overflow: what stands must be judged all the same."""
    check([Job(Case("fsdp2", every=5, steps=10, scaler=True), (7,))])


def test_the_oracle_sees_a_batch_too_many_or_too_few(two: harness.Pool) -> None:
    """The comparison can fail: against a twin that was shown the guilty batch, or was not shown an innocent one."""
    for said in two.run(against_the_wrong_twin, Job(Case("ddp", every=5, steps=10), (7,))):
        assert all(said)


def against_the_wrong_twin(rank: int, world: int, job: Job) -> list[list[str]]:
    right = Loop(job, rank, world).run(True)
    others = (replace(job, guilty=guilty, kind="none") for guilty in ((), (7, 8), (8,)))
    return [compare(right.image, Loop(other, rank, world).run(False).image) for other in others]
