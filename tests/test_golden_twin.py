"""Promise 2, exact: after refusals the run is bit for bit the run that never saw those batches.

Each job is a case of the zoo, the faults injected into it, and the attempts that must be refused because of them (and
no others). ``assert_golden_twin`` compares every bit of every rank's state with a run of the same loop, without any
controller, that drops those batches before the forward.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import harness
import pytest
import torch
import zoo
from choice import in_thirds, often, slow, third_of
from zoo import Case

from dist_stability import FixedInnovation, GradientNormGuard, Judgement, NonFiniteGuard
from dist_stability.testing import FaultInjector, NotTheTwin, Outcome, assert_golden_twin, compare

BAD = 9
"""The attempt that most faults hit: the rule needs eight commits before a gradient norm counts as evidence."""


@dataclass(frozen=True)
class Job:
    """One golden-twin comparison."""

    case: Case
    faults: tuple[str, ...]
    refused: tuple[int, ...] = (BAD,)
    undone: tuple[int, ...] = ()
    actions: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.case} [{'; '.join(self.faults)}]"


def twins(rank: int, world: int, jobs: list[Job]) -> list[str]:
    """What is wrong with each job, on any rank."""
    said = []
    for job in jobs:
        injector = FaultInjector.parse(job.faults)

        def run(skip: frozenset[int], guarded: bool, job: Job = job, injector: FaultInjector = injector) -> Outcome:
            faults = injector if guarded else None
            options = copy.deepcopy(job.options)  # rules and guards learn
            return zoo.train(job.case, rank, world, skip=skip, guarded=guarded, injector=faults, **options)

        try:
            outcome = assert_golden_twin(run, refused=job.refused, undone=job.undone)
        except NotTheTwin as error:
            said.append(f"{job}: {error}")
            continue
        actions = tuple(str(v.action) for v in outcome.verdicts if not v.accepted)
        if job.actions and actions != job.actions:
            said.append(f"{job}: {actions} instead of {job.actions}")
        if not all(isfinite(value) for value in outcome.image.entries.values()):
            said.append(f"{job}: a value that is not finite was left in the state")
        missing = [
            str(fault) for fault in injector.faults if fault.rank in (None, rank) and fault not in injector.fired
        ]
        said += [f"{job}: rank {rank}: never fired: {fault}" for fault in missing]
    return said


def isfinite(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


def check(jobs: Iterable[Job], timeout: float = 300) -> None:
    jobs = list(jobs)
    for world in sorted({zoo.world_of(job.case) for job in jobs}):
        mine = [job for job in jobs if zoo.world_of(job.case) == world]
        said = harness.pool(world).run(twins, mine, timeout=timeout)
        assert not any(said), "\n\n".join(dict.fromkeys(line for lines in said for line in lines))


SCALE = f"gradient-scale:step={BAD},factor=300,length=2"


@in_thirds(0)
def test_gradient_scaling_over_the_matrix(mode: str, third: int | None) -> None:
    cases = third_of(zoo.matrix_of(mode), third)
    check(Job(case, (SCALE,), refused=(BAD, BAD + 1), actions=("rollback",) * 2) for case in cases)


def faults_of(mode: str) -> list[tuple[str, str, Case]]:
    """Every other fault of the list, on the last rank: its text, what must be done about it, and the run it is in."""
    last = zoo.MODES[mode] - 1
    # Without collectives in the forward only rank 0 runs the probe, so only there can it raise.
    probing = 0 if mode in ("single", "ddp") else last
    short, long = Case(mode, steps=6, probes=2), Case(mode)
    return [
        (f"nan:step=4,rank={last}", "veto", short),
        (f"inf:step=4,rank={last}", "veto", short),
        # Under Adam only the gradient norm betrays it, and that counts after eight commits.
        (f"bit-flip:step={BAD},rank={last}", "rollback", long),
        (f"bit-flip:step=4,rank={last},where=parameter", "rollback", short),
        (f"raise:step=4,phase=loss-before-forward,rank={probing}", "rollback", short),
        (f"raise:step=4,phase=loss-after-forward,rank={probing}", "rollback", short),
    ]


@in_thirds(0)
def test_every_fault_in_every_mode(mode: str, third: int | None) -> None:
    """Under SGD and Adam each; of every run of the tests, under one of them, in the next mode under the other."""
    optimizers = ("sgd", "adamw-loop" if mode.endswith("tp") else "adamw-fused")
    jobs = []
    for place, (fault, action, case) in enumerate(faults_of(mode)):
        refused = (BAD if case.steps > BAD else 4,)
        names = optimizers if third is None else optimizers[(place + third) % 2 :][:1]
        jobs += [Job(replace(case, optimizer=name), (fault,), refused, actions=(action,)) for name in names]
    if not mode.endswith("tp"):
        # Without a guard the NaN reaches weights, moments and the probe, and is taken back from there.
        case = Case(mode, "conv", guards=False, steps=6)
        jobs.append(Job(case, (f"nan:step=4,rank={zoo.MODES[mode] - 1}",), (4,), actions=("rollback",)))
    check(jobs)


FORMS = {
    "attach": Case(form="attach", scheduler=True),
    "closure": Case(form="closure", scheduler=True),
    "attached closure": Case(form="attach+closure", scheduler=True),
    "several optimizers": Case(optimizers=2, scheduler=True),
    "several optimizers, attached": Case(optimizers=2, form="attach", scheduler=True),
    "accumulation": Case(accumulation=2, scheduler=True),
    "clipping": Case(clip=0.5, scheduler=True),
    "clipping, attached": Case(clip=0.5, form="attach", model="conv"),
    "tensor learning rate": Case(optimizer="adamw-loop", tensor_lr=True, scheduler=True),
    "a schedule in the loss": Case(shape=3),
    "a schedule in the loss, several times a step": Case(shape=3, accumulation=2),
    "a schedule in the loss, in a closure": Case(shape=3, form="closure"),
    "everything": Case(model="conv", accumulation=2, clip=1.0, scheduler=True, probe_on="mean", optimizer="adam-fused"),
}


@pytest.mark.parametrize("mode", often(("single", "ddp", "fsdp2-uneven"), ("single", "fsdp2-uneven")))
def test_every_way_to_use_it(mode: str) -> None:
    jobs = []
    for case in FORMS.values():
        case = replace(case, mode=mode)
        last = zoo.MODES[mode] - 1
        faults = (f"bit-flip:step=4,rank={last},where=parameter", f"nan:step=6,rank={last}")
        jobs.append(Job(replace(case, steps=8), faults, (4, 6), actions=("rollback", "veto")))
    check(jobs)


def test_first_attempts_and_repeats(two: harness.Pool) -> None:
    """A refusal before the optimizer has any state removes it again; several in a row and at the end work too."""
    jobs = []
    for mode in ("ddp", "fsdp2"):
        flip = "bit-flip:step={},rank=1,where=parameter"
        for optimizer in ("sgd", "adamw-foreach", "adamw-fused"):
            case = Case(mode, optimizer=optimizer, steps=8)
            jobs.append(Job(case, (flip.format(0),), refused=(0,)))
            jobs.append(Job(case, ("nan:step=0,rank=1",), refused=(0,), actions=("veto",)))
            jobs.append(Job(case, ("nan:step=7,rank=1",), refused=(7,), actions=("veto",)))
            jobs.append(Job(case, (flip.format(0) + ",length=3", "nan:step=4,rank=0", flip.format(7)), (0, 1, 2, 4, 7)))
    check(jobs)


def test_one_replica_of_four(four: harness.Pool) -> None:
    """A fault on one rank that the probe of rank 0 cannot see, where others hold the same bits."""
    jobs = []
    for mode in ("ddp", "hsdp", "fsdp2+tp"):
        for fault in (f"bit-flip:step={BAD},rank=2,where=parameter,bit=low-mantissa", f"bit-flip:step={BAD},rank=2"):
            jobs.append(Job(Case(mode, ranks=4), (fault,), actions=("rollback",)))
    # Scaling on one rank of a sharded mode, and uneven and empty shards on more ranks than rows.
    jobs += [Job(Case(mode, ranks=4, optimizer="sgd"), (SCALE,), (BAD, BAD + 1)) for mode in ("fsdp2-uneven", "fsdp1")]
    jobs += [Job(Case("fsdp2-empty", ranks=4, optimizer="adam-loop"), (f"nan:step={BAD},rank=3",))]
    check(jobs)


def test_probe_on_every_rank_sees_what_rank_0_cannot(two: harness.Pool) -> None:
    raising = [f"raise:step={BAD},phase=loss-{where}-forward,rank=1" for where in ("before", "in", "after")]
    jobs = [Job(Case("ddp", probe_on="mean", probes=2), (fault,), actions=("rollback",)) for fault in raising]
    # Replica checks off: the measurement alone must notice rank 1's weights.
    flip = f"bit-flip:step={BAD},rank=1,where=parameter"
    jobs.append(Job(Case("ddp", probe_on="mean"), (flip,), options={"replica_check_every": 0}))
    jobs.append(Job(Case("fsdp2", probe_on="mean", model="conv"), (flip,)))
    check(jobs)


def test_the_norm_guard_vetoes_a_scaled_gradient(two: harness.Pool) -> None:
    jobs = []
    for mode in ("ddp", "fsdp2-uneven"):
        scaled = Case(mode, scaler=True, clip=1.0, shape=3)  # a veto brings the scaler back, and what a forward moves
        for case in (Case(mode), Case(mode, clip=1.0), Case(mode, optimizer="adam-fused", form="attach"), scaled):
            options = {"guards": (GradientNormGuard(), NonFiniteGuard())}
            jobs.append(Job(case, (SCALE,), (BAD, BAD + 1), actions=("veto",) * 2, options=options))
    check(jobs)


def test_raise_inside_the_forward_without_collectives(two: harness.Pool) -> None:
    fault = f"raise:step={BAD},phase=loss-in-forward,rank=0"
    check(Job(Case(mode), (fault,), actions=("rollback",)) for mode in ("single", "ddp"))


@pytest.mark.parametrize("mode", ["single", slow("ddp"), "fsdp2"])
def test_every_third_attempt_is_judged(mode: str) -> None:
    """A refusal takes back the unjudged attempts before it; a veto takes back none."""
    last = zoo.MODES[mode] - 1
    flip = f"bit-flip:step={{}},rank={last},where=parameter"
    quiet = Case(mode, "conv", every=3, draws=False, scheduler=True, steps=14)
    jobs = [
        Job(quiet, (flip.format(10),), refused=(11,), undone=(9, 10)),
        Job(quiet, (flip.format(11),), refused=(11,), undone=(9, 10)),
        Job(quiet, (flip.format(1),), refused=(2,), undone=(0, 1)),
        # A loader may draw when nothing is undone.
        Job(replace(quiet, draws=True), (f"nan:step=9,rank={last}",), refused=(9,), actions=("veto",)),
        Job(replace(quiet, draws=True), (f"nan:step=10,rank={last}",), refused=(10,), actions=("veto",)),
        Job(quiet, (f"nan:step=10,rank={last}", flip.format(11)), refused=(10, 11), undone=(9,)),
        Job(replace(quiet, form="attach"), (flip.format(10),), refused=(11,), undone=(9, 10)),
        # What a forward moves: a veto goes back to before this one, a rollback to before the first of three.
        Job(replace(quiet, model="transformer", shape=4), (f"nan:step=10,rank={last}",), refused=(10,)),
        Job(replace(quiet, model="transformer", shape=4), (flip.format(10),), refused=(11,), undone=(9, 10)),
    ]
    check(jobs)


class AlwaysDeep(FixedInnovation):
    """Algorithm 1 with a wish for the older anchor at each refusal."""

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        judgement = super().judge(measurement, gradient_norm)
        return judgement if judgement.accepted else replace(judgement, deep=True)

    def anchor(self) -> dict[str, Any]:
        return self.state_dict()

    def deep(self, anchor: dict[str, Any]) -> None:
        self.load_state_dict(anchor)


@pytest.mark.parametrize("mode", ["single", "ddp", slow("fsdp1"), "fsdp2"])
def test_deep_rollback(mode: str) -> None:
    """Back to the older of two anchors (commits 8 and 16), and the run goes on from there as its twin."""
    flip = f"bit-flip:step={{}},rank={zoo.MODES[mode] - 1},where=parameter"
    jobs = []
    for model, optimizer in (("transformer", "adamw-foreach"), ("conv", "sgd")):
        # The flip must be seen by the probe, not by comparing replicas: only the rule asks for a deep rollback.
        case = Case(mode, model, optimizer, steps=24, draws=False, scheduler=True)
        options = {"rule": AlwaysDeep(5.0), "replica_check_every": 0}
        everywhere = "bit-flip:step={},where=parameter" if mode == "ddp" else flip
        deep = (everywhere.format(20),)
        jobs.append(Job(case, deep, (20,), tuple(range(8, 20)), ("deep_rollback",), options))
        # With one anchor only there is no deep rollback yet.
        jobs.append(Job(replace(case, steps=16), (everywhere.format(12),), (12,), (), ("rollback",), options))
        # A second one goes to the same anchor, which now is both.
        again = (everywhere.format(20), everywhere.format(22))
        jobs.append(Job(case, again, (20, 22), (*range(8, 20), 21), ("deep_rollback",) * 2, options))
    check(jobs)


def test_deep_rollback_that_the_default_rule_asks_for(one: harness.Pool) -> None:
    """Weights that are bad again and again with gradients that look fine: the eighth refusal goes back further."""
    # A sign: a measurement that is not finite would count as evidence from the gradients.
    flip = "bit-flip:step=20,where=parameter,bit=sign,length=8"
    case = Case("single", steps=30, draws=False)
    actions = ("rollback",) * 7 + ("deep_rollback",)
    # The second with a schedule in the loss: an anchor knows where that was, too.
    check(
        Job(each, (flip,), tuple(range(20, 28)), tuple(range(8, 20)), actions)
        for each in (case, replace(case, shape=3))
    )


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp1", "fsdp2"])
def test_with_a_grad_scaler(mode: str) -> None:
    jobs = []
    for optimizer, clip in (("adamw-foreach", 1.0), ("adam-fused", 1.0), ("sgd", None)):
        case = Case(mode, optimizer=optimizer, scaler=True, clip=clip, scheduler=True, steps=8)
        flip = f"bit-flip:step=5,rank={zoo.MODES[mode] - 1},where=parameter"
        jobs.append(Job(case, (flip,), (5,), actions=("rollback",)))
        if (
            mode != "fsdp1"
        ):  # an optimizer whose shards are all empty on a rank has no gradients there: torch refuses it
            jobs.append(Job(replace(case, optimizers=2), (flip,), (5,), actions=("rollback",)))
    check(jobs)


def overflow(rank: int, world: int, cases: list[Case]) -> list[str]:
    """A loss-scale overflow is the scaler's own business: nothing is refused, the run equals the plain scaler's.

    Also where only one rank overflows, whose scaler alone would skip: all ranks do what it must.
    """
    said = []
    for case in cases:
        everywhere = FaultInjector.parse(["inf:step=5"])
        plain = zoo.train(case, rank, world, injector=everywhere, guarded=False)
        for fault in ("inf:step=5", f"inf:step=5,rank={world - 1}"):
            guarded = zoo.train(case, rank, world, injector=FaultInjector.parse([fault]))
            actions = [str(verdict.action) for verdict in guarded.verdicts]
            wrong = [] if actions == ["commit"] * 5 + ["scaler_skip"] + ["commit"] * 2 else [str(actions)]
            said += [f"{case} [{fault}]: {line}" for line in wrong + compare(guarded.image, plain.image)]
    return said


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp1", "fsdp2"])
def test_overflow_is_no_refusal(mode: str) -> None:
    names = ("adamw-foreach", "adam-fused", "sgd")
    cases = [Case(mode, optimizer=name, scaler=True, steps=8) for name in names]
    for said in harness.pool(zoo.MODES[mode]).run(overflow, cases):
        assert not said, "\n".join(said)
