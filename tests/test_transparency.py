"""Promise 1, transparent: attached and refusing nothing, the controller changes no bit of the run.

Every parallel mode, with every model and optimizer that works under it, is trained twice from the same seeds, with the
controller and without, and every bit of every rank's state is compared.
"""

from __future__ import annotations

import harness
import pytest
import torch
import torch.distributed as dist
import zoo
from choice import in_thirds, often, third_of
from zoo import Case

from dist_stability import AdaptiveCadence, GradientNormGuard, LossProbe, NonFiniteGuard
from dist_stability.signals import GroupNorms, UpdateRatio, UpdateRms
from dist_stability.testing import compare

OPTIONS = {
    "attached": Case(form="attach", scheduler=True, clip=1.0),
    "closure": Case(form="closure"),
    "attached closure": Case(form="attach+closure", scheduler=True, optimizer="adam-loop"),
    "every third": Case(every=3, scheduler=True),
    "several optimizers": Case(optimizers=2, scheduler=True, clip=1.0),
    "accumulation": Case(accumulation=2, clip=0.5, scheduler=True),
    "tensor learning rate": Case(optimizer="adamw-loop", tensor_lr=True),
    "probe on all": Case(probe_on="mean", model="conv"),
    "no guard": Case(guards=False, optimizer="adam-fused"),
}


def transparent(rank: int, world: int, cases: list[Case]) -> list[str]:
    """For each case, what differs with the controller attached."""
    said = []
    for case in cases:
        setup = zoo.build(case, rank, world)
        keys = [*setup.model.state_dict()]
        groups = [sorted(group) for optimizer in setup.optimizers for group in optimizer.param_groups]
        hooks = hooks_of(setup.model)
        guarded = zoo.train(case, rank, world, setup=setup)
        wrong = [f"{verdict}" for verdict in guarded.verdicts if not verdict.accepted or verdict.undone]
        wrong += [] if len(guarded.verdicts) == case.steps else [f"{len(guarded.verdicts)} verdicts"]
        wrong += compare(guarded.image, zoo.train(case, rank, world, guarded=False).image)
        if hooks_of(setup.model) != hooks or [*setup.model.state_dict()] != keys:
            wrong.append("the closed controller left a hook, parameter or buffer in the model")
        if [sorted(group) for optimizer in setup.optimizers for group in optimizer.param_groups] != groups:
            wrong.append("the closed controller left something in param_groups")
        said += [f"rank {rank}, {case}: {line}" for line in wrong[:5]]
    return said


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@in_thirds(1)
def test_with_and_without_the_controller(mode: str, third: int | None) -> None:
    for said in harness.pool(zoo.MODES[mode]).run(transparent, third_of(zoo.matrix_of(mode), third), timeout=300):
        assert not said, "\n".join(said)


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_every_way_to_use_it(mode: str) -> None:
    cases = [zoo.replace(case, mode=mode) for case in OPTIONS.values()]
    cases += [Case(mode, scaler=True, clip=1.0), Case(mode, optimizer="adam-fused", scaler=True)]
    for said in harness.pool(zoo.MODES[mode]).run(transparent, cases, timeout=300):
        assert not said, "\n".join(said)


def observing(rank: int, world: int, cases: list[Case]) -> list[str]:
    """Observe mode while faults happen: bit for bit the unguarded run with those faults, and says what it would do."""
    said = []
    specs = ["gradient-scale:step=9,factor=300", "bit-flip:step=11,rank=0,where=parameter"]
    for case in cases:
        guarded = zoo.train(case, rank, world, injector=zoo.FaultInjector.parse(specs), mode="observe")
        plain = zoo.train(case, rank, world, injector=zoo.FaultInjector.parse(specs), guarded=False)
        wrong = [str(verdict) for verdict in guarded.verdicts if not verdict.accepted or verdict.undone]
        would = [str(verdict.would) for verdict in guarded.verdicts]
        wrong += [] if "rollback" in would[9:10] and set(would[:9]) == {"commit"} else [f"would {would}"]
        wrong += compare(guarded.image, plain.image)
        said += [f"rank {rank}, {case}: {line}" for line in wrong[:5]]
    return said


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_observe_mode_acts_on_nothing(mode: str) -> None:
    # The probe of a float that became infinite is not finite either, and the run goes on regardless.
    for said in harness.pool(zoo.MODES[mode]).run(observing, [Case(mode, optimizer="sgd"), Case(mode)], timeout=120):
        assert not said, "\n".join(said)


def reuse(rank: int, world: int) -> list[str]:
    """Closed twice, attached anew, one controller after the other on the same run: still the same bits."""
    case = Case("ddp", model="conv", steps=8)
    setup = zoo.build(case, rank, world)
    for half in (range(4), range(4, 8)):
        controller = zoo.control(case, setup)
        for attempt in half:
            zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, None)
        controller.close()
        controller.close()
    dist.barrier()
    image = zoo.capture_state(setup.model, setup.optimizers)
    return compare(image, zoo.train(case, rank, world, guarded=False).image)


def test_one_controller_after_another(two: harness.Pool) -> None:
    assert two.run(reuse) == [[], []]


def everything(rank: int, world: int, mode: str) -> list[str]:
    """All that can be switched on at once: transparent while nothing is wrong, and the golden twin after a fault."""
    case = Case(mode, ranks=world, steps=20, scheduler=True, clip=1.0, draws=False)
    second = [zoo.data(case, 10**7 + i, 0, size=16) for i in range(2)]

    def run(specs: list[str]) -> zoo.Outcome:
        return zoo.train(
            case,
            rank,
            world,
            injector=zoo.FaultInjector.parse(specs),
            confirm=LossProbe(zoo.probe_loss, second),
            signals=(UpdateRms(), UpdateRatio(), GroupNorms()),
            guards=(NonFiniteGuard(), GradientNormGuard()),
            every=AdaptiveCadence(most=3, calm=100),
            anchors=3,
        )

    clean = run([])
    wrong = [f"{verdict}" for verdict in clean.verdicts if not verdict.accepted or verdict.undone]
    wrong += compare(clean.image, zoo.train(case, rank, world, guarded=False).image)
    # In replicas alike, or their checksums would refuse it before a probe does.
    faulty = run(["bit-flip:step=12,where=parameter", "gradient-scale:step=15,factor=3e4"])
    actions = {verdict.step: str(verdict.action) for verdict in faulty.verdicts if not verdict.accepted}
    wrong += [] if actions == {12: "rollback", 15: "veto"} else [f"refused {actions}"]
    wrong += compare(faulty.image, zoo.train(case, rank, world, skip=frozenset({12, 15})).image)
    return [f"rank {rank}: {line}" for line in wrong[:6]]


@pytest.mark.parametrize(
    "mode",
    often(("single", "ddp", "fsdp1", "fsdp2-uneven", "hsdp", "fsdp2+tp"), ("ddp", "fsdp2-uneven", "hsdp")),
)
def test_everything_switched_on(mode: str) -> None:
    for said in harness.pool(zoo.MODES[mode]).run(everything, mode, timeout=200):
        assert not said, "\n".join(said)
