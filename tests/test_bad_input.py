"""Bad input: each kind is a clear error that says what to do, or a documented behaviour that is tested here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import harness
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from zoo import Case

from dist_stability import (
    Escalation,
    FixedInnovation,
    LossProbe,
    NonFiniteGuard,
    PredictiveInnovation,
    StabilityController,
    StabilityError,
    StabilityStop,
)
from dist_stability.testing import FaultInjector, Outcome, assert_golden_twin, compare

BATCH = (torch.ones(4, 3), torch.zeros(4, 2))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).pow(2).mean()


def parts() -> tuple[nn.Module, torch.optim.Optimizer, LossProbe]:
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    return model, torch.optim.Adam(model.parameters(), lr=0.1), LossProbe(loss_fn, [BATCH])


def train(controller: StabilityController, model: nn.Module, steps: int = 1, **options: Any) -> None:
    for _ in range(steps):
        model.zero_grad()
        loss_fn(model, BATCH).backward()
        controller.step(**options)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no module": ({"model": "resnet18"}, TypeError, r"model: expected a torch.nn.Module, got str"),
    "class of a module": ({"model": nn.Linear}, TypeError, r"model: expected .* got the class Linear"),
    "no optimizer": ({"optimizer": 0.1}, TypeError, r"optimizer: expected a torch.optim.Optimizer .* got float"),
    "optimizer class": ({"optimizer": torch.optim.Adam}, TypeError, r"optimizer: .* the class Adam"),
    "scheduler for optimizer": ({"optimizer": [object()]}, TypeError, r"optimizer\[0\]: .* got object"),
    "no optimizers": ({"optimizer": []}, ValueError, r"optimizer: an empty list"),
    "loss_fn for probe": (
        {"probe": loss_fn},
        TypeError,
        r"probe: expected LossProbe\(loss_fn, batches\), got function",
    ),
    "rule class": ({"rule": PredictiveInnovation}, TypeError, r"rule: .* the class PredictiveInnovation"),
    "number for rule": ({"rule": 0.5}, TypeError, r"rule: expected an object with judge"),
    "one guard": ({"guards": NonFiniteGuard()}, TypeError, r"guards: .* write guards=\(NonFiniteGuard\(\),\)"),
    "guard class": ({"guards": (NonFiniteGuard,)}, TypeError, r"guards\[0\]: the class NonFiniteGuard is no guard"),
    "extra state": ({"extra_state": {"step": 3}}, TypeError, r"extra_state\['step'\]: int has no state_dict"),
    "every 0": ({"every": 0}, ValueError, r"every: expected at least 1, got 0"),
    "every 1.0": ({"every": 1.0}, TypeError, r"every: expected a whole number, got 1.0"),
    "mode": ({"mode": "enforced"}, ValueError, r"mode: expected one of \('enforce', 'observe'\), got 'enforced'"),
    "probe_on": ({"probe_on": "all"}, ValueError, r"probe_on: expected one of .* got 'all'"),
    "timeout": ({"timeout": -1}, ValueError, r"timeout: expected seconds above 0, got -1"),
    "replica checks": ({"replica_check_every": -1}, ValueError, r"replica_check_every: expected at least 0"),
    "budget": ({"anchors": -1}, ValueError, r"anchors: expected at least 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str) -> None:
    model, optimizer, probe = parts()
    change, error, says = WRONG[name]
    with pytest.raises(error, match=says):
        StabilityController(**({"model": model, "optimizer": optimizer, "probe": probe} | change))
    assert not model._forward_pre_hooks, "nothing is left behind"


def test_the_same_optimizer_twice() -> None:
    model, optimizer, probe = parts()
    with pytest.raises(ValueError, match="listed twice"):
        StabilityController(model, [optimizer, optimizer], probe)


def test_an_optimizer_that_calls_its_closure_repeatedly() -> None:
    model, _, probe = parts()
    with pytest.raises(TypeError, match="LBFGS evaluates its closure several times"):
        StabilityController(model, torch.optim.LBFGS(model.parameters()), probe)

    class Twice(torch.optim.SGD):
        def step(self, closure: Callable[[], Tensor] | None = None) -> None:
            assert closure is not None
            closure()
            super().step(closure)

    optimizer = Twice(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, BATCH)
        loss.backward()
        return loss

    with StabilityController(model, optimizer, probe).attach(), pytest.raises(TypeError, match="more than once"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("batches", "error", "says"),
    [
        ([], ValueError, "batches is empty"),
        (iter(()), ValueError, "batches is empty"),
        (torch.ones(4, 3), TypeError, "batches must be an iterable of batches, got .*Tensor"),
        (None, TypeError, "batches must be an iterable"),
    ],
)
def test_zero_probe_batches(batches: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        LossProbe(loss_fn, batches)


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (lambda model, batch: (model(batch[0]) - batch[1]).pow(2).mean(1), r"must be a 0-d tensor .* shape \[4\]"),
        (lambda model, batch: None, "must be a 0-d tensor or a float, got None"),
        (lambda model, batch: (loss_fn(model, batch), 1), r"must be a 0-d tensor or a float, got \("),
        (lambda model, batch: 1 / 0, "ZeroDivisionError"),
        (lambda model, batch: torch.tensor(float("nan")), "measures nan on the initial weights"),
    ],
    ids=["vector", "nothing", "tuple", "raises", "nan"],
)
def test_a_probe_that_gives_no_number(result: Callable[[Any, Any], Any], says: str) -> None:
    model, optimizer, _ = parts()
    with pytest.raises(StabilityError, match=says):
        StabilityController(model, optimizer, LossProbe(result, [BATCH]))
    assert not model._forward_pre_hooks and model.training


def test_a_probe_that_turns_into_a_vector_later_is_a_refusal() -> None:
    """What loss_fn returns is checked each time; a failing probe is a vote, not a crash."""
    model, optimizer, _ = parts()
    broken = False

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = (model(batch[0]) - batch[1]).pow(2).mean(1)
        return value if broken else value.mean()

    with StabilityController(model, optimizer, LossProbe(loss, [BATCH])) as controller:
        train(controller, model)
        before = model.weight.detach().clone()
        broken = True
        train(controller, model)
        assert controller.verdict.action == "rollback" and "shape [4]" in controller.verdict.reason
        assert torch.equal(model.weight, before)


def test_initial_weights_that_are_not_finite() -> None:
    model, optimizer, probe = parts()
    nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(StabilityError, match=r"measures nan on the initial weights.*initialization"):
        StabilityController(model, optimizer, probe)


@pytest.mark.parametrize("guards", [(), (NonFiniteGuard(),)], ids=["no guard", "guard"])
def test_a_nan_at_step_0_leaves_nothing(guards: tuple[Any, ...]) -> None:
    model, optimizer, probe = parts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with StabilityController(model, optimizer, probe, guards=guards) as controller:
        loss_fn(model, (BATCH[0] * float("nan"), BATCH[1])).backward()
        verdict = controller.step()
        assert verdict.action == ("veto" if guards else "rollback") and not verdict.accepted
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not optimizer.state, "state that did not exist before is deleted, not zeroed"
        optimizer.zero_grad()
        train(controller, model)
        assert controller.verdict.accepted


def test_nan_in_every_batch_stops_with_a_report() -> None:
    model, optimizer, probe = parts()
    controller = StabilityController(
        model, optimizer, probe, guards=(NonFiniteGuard(),), escalation=Escalation(max_refusals_in_row=3)
    )
    with controller, pytest.raises(StabilityStop, match="3 refusals in a row") as stopped:
        for _ in range(5):
            optimizer.zero_grad()
            loss_fn(model, (BATCH[0] * float("nan"), BATCH[1])).backward()
            controller.step()
    assert stopped.value.report["refusals_in_a_row"] == 3


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"grad_norm": "1"}, TypeError, "grad_norm"),
        ({"grad_norm": torch.ones(2)}, ValueError, "grad_norm"),
        ({"grad_norm": -1.0}, ValueError, "grad_norm"),
        ({"scaler": 2.0}, TypeError, "scaler"),
        ({"closure": 3}, TypeError, "callable"),
    ],
    ids=str,
)
def test_wrong_arguments_of_step(options: dict[str, Any], error: type[Exception], says: str) -> None:
    model, optimizer, probe = parts()
    with StabilityController(model, optimizer, probe) as controller:
        with pytest.raises(error, match=says):
            train(controller, model, **options)
        train(controller, model)
        assert controller.verdict.accepted, "the controller is as usable as before"


def test_a_nan_given_as_gradient_norm_is_ordinary_input() -> None:
    model, optimizer, probe = parts()
    with StabilityController(model, optimizer, probe, guards=(NonFiniteGuard(),)) as controller:
        train(controller, model, grad_norm=float("nan"))
        assert controller.verdict.action == "veto"


def test_using_it_in_the_wrong_order() -> None:
    model, optimizer, probe = parts()
    controller = StabilityController(model, optimizer, probe)
    with pytest.raises(StabilityError, match="no training forward of the model was seen"):
        controller.step()
    controller.attach()
    with pytest.raises(RuntimeError, match="this controller is attached"):
        train(controller, model)
    controller.close()
    controller.close()
    with pytest.raises(RuntimeError, match="closed"):
        train(controller, model)
    with pytest.raises(RuntimeError, match="closed"):
        controller.attach()
    optimizer.step()
    assert not optimizer._optimizer_step_pre_hooks and not model._forward_pre_hooks


def test_an_optimizer_that_does_not_own_the_parameters() -> None:
    model, _, probe = parts()
    stranger = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
    with pytest.raises(StabilityError, match=r"none of the model's parameters.*after wrapping"):
        StabilityController(model, stranger, probe)
    with pytest.raises(StabilityError, match=r"optimizer 1 .*none of the model's parameters"):
        StabilityController(model, [torch.optim.SGD(model.parameters(), lr=0.1), stranger], probe)


def fused_into_backward(model: nn.Module) -> torch.optim.Optimizer:
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_an_optimizer_fused_into_backward() -> None:
    model, _, probe = parts()
    optimizer = fused_into_backward(model)
    with StabilityController(model, optimizer, probe) as controller:
        with pytest.raises(TypeError, match="fused into backward"):
            train(controller, model)
        controller.attach()
        loss_fn(model, BATCH).backward()
        with pytest.raises(TypeError, match="fused into backward"):
            optimizer.step()


# ---------------------------------------------------------------------- weights that somebody else changes


def meddle(what: str, setup: zoo.Setup) -> None:
    """Change the weights behind everybody's back, between two steps."""
    parameters = [p for optimizer in setup.optimizers for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        for parameter in parameters:
            if what == "scaled":
                parameter.mul_(50.0)
            elif what == "made anew":
                parameter.data = parameter.data * 50.0
            elif what == "nan":
                parameter.fill_(float("nan"))
            elif what == "nudged":
                parameter.mul_(1.0001)


def meddled(rank: int, world: int, case: Case, what: str, expected: str) -> list[str]:
    def run(skip: frozenset[int], guarded: bool) -> Outcome:
        def after(attempt: int, setup: zoo.Setup, controller: StabilityController | None) -> None:
            if attempt == 5 and (guarded or expected == "commit"):
                meddle(what, setup)

        return zoo.train(case, rank, world, skip=skip, guarded=guarded, after_step=after)

    if expected == "commit":
        guarded = run(frozenset(), True)
        return [str(v) for v in guarded.verdicts if not v.accepted] + compare(
            guarded.image, run(frozenset(), False).image
        )
    outcome = assert_golden_twin(run)
    return [] if outcome.refused <= {6, 7} and 6 in outcome.refused else [str(sorted(outcome.refused))]


@pytest.mark.parametrize(
    ("mode", "what", "expected"),
    [
        *((m, w, e) for m in ("single", "ddp", "fsdp2") for w, e in (("nudged", "commit"), ("scaled", "refused"))),
        *((m, "nan", "refused") for m in ("single", "ddp", "fsdp2")),
        ("single", "made anew", "refused"),  # DDP and FSDP forbid it
    ],
)
def test_weights_changed_between_steps_by_somebody_else(mode: str, what: str, expected: str) -> None:
    """The change belongs to the next proposal: it is measured with it, and undone with it."""
    # With and without a guard: weights that are NaN give gradients that are NaN, and a veto alone would keep them.
    cases = [Case(mode, steps=10, optimizer="sgd"), Case(mode, steps=10, guards=False)]
    for case in cases:
        assert harness.pool(zoo.world_of(case)).run(meddled, case, what, expected) == [[]] * zoo.world_of(case)


# ---------------------------------------------------------------------- wrapped too late


def wrapped_late(rank: int, world: int, mode: str) -> list[str]:
    """The optimizer is made first, and the model is wrapped after it."""
    case = Case("ddp" if mode == "ddp" else "fsdp2", steps=6)
    setup = zoo.build(Case("single"), rank, world)
    model: Any = setup.model
    if mode == "ddp":
        model = DistributedDataParallel(model)
    elif mode == "fsdp2":
        fully_shard(model)
    else:
        model = FullyShardedDataParallel(model, use_orig_params=mode == "fsdp1", device_id=torch.device("cpu"))
    late = replace(setup, model=model)
    faults = FaultInjector.parse(["bit-flip:step=3,rank=1,where=parameter"])
    outcome = zoo.train(case, rank, world, setup=late, injector=faults, timeout=20.0)
    return [str(verdict.action) for verdict in outcome.verdicts]


@pytest.mark.parametrize("mode", ["fsdp1-flat", "fsdp2"])
def test_a_model_wrapped_after_the_optimizer_was_made(two: harness.Pool, mode: str) -> None:
    for error in two.run(wrapped_late, mode, expect_failure=True, timeout=60):
        assert isinstance(error, harness.RankError) and error.is_a("StabilityError"), str(error)
        assert "make the optimizer after wrapping" in error.message


@pytest.mark.parametrize("mode", ["ddp", "fsdp1"])
def test_wrappers_that_keep_the_parameters_may_come_later(two: harness.Pool, mode: str) -> None:
    """DDP, and FSDP1 with use_orig_params, train the very parameters that the optimizer has: nothing is wrong."""
    assert two.run(wrapped_late, mode, timeout=60) == [["commit"] * 3 + ["rollback"] + ["commit"] * 2] * 2


def test_a_rule_may_be_anything_with_the_five_methods() -> None:
    model, optimizer, probe = parts()

    class Optimist:
        def judge(self, measurement: float, gradient_norm: float | None = None) -> Any:
            return FixedInnovation(1e9).judge(measurement)

        def commit(self, measurement: float, gradient_norm: float | None = None) -> None: ...

        def reject(self, measurement: float, gradient_norm: float | None = None) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

        def __repr__(self) -> str:
            return "Optimist()"

    with StabilityController(model, optimizer, probe, rule=Optimist()) as controller:
        train(controller, model, steps=9)
        assert controller.verdict.accepted
