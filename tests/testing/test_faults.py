"""The fault injector by itself: what each fault does, that it does it once, and what the parser says."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor, nn

from dist_stability import LossProbe, StabilityController
from dist_stability.testing import BITS, Fault, FaultInjector, InjectedFault, flip_largest
from dist_stability.testing.fault import DRAWN_KINDS, KINDS


def parameters(*values: float) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.tensor([value, 0.0])) for value in values]
    for parameter in made:
        parameter.grad = parameter.detach().clone()
    return made


def flipped(value: float, bit: int) -> float:
    return struct.unpack("f", struct.pack("I", struct.unpack("I", struct.pack("f", value))[0] ^ (1 << bit)))[0]


def test_gradient_scaling_lasts_its_length_and_counts() -> None:
    injector = FaultInjector().scale_gradients(step=2, factor=300, length=2)
    params = parameters(1.0, -2.0)
    for step in range(6):
        injector.gradients(step, params)
    assert [p.grad[0].item() for p in params] == [90000.0, -180000.0]
    assert injector.fired == {injector.faults[0]: [2, 3]}


def test_a_fault_acts_once_in_an_attempt() -> None:
    injector = FaultInjector().scale_gradients(step=0, factor=3)
    params = parameters(1.0)
    injector.gradients(0, params)
    injector.gradients(0, params)
    assert params[0].grad[0] == 3.0


def test_other_ranks_and_phases_are_left_alone() -> None:
    injector = FaultInjector().nonfinite(0, rank=1).fail(0, "after step", rank=0)
    params = parameters(1.0)
    injector.gradients(0, params)
    assert params[0].grad[0] == 1.0 and not injector.fired
    with pytest.raises(InjectedFault, match="raise:step=0,phase=after-step,rank=0"):
        injector.weights(0, params)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_one_element_becomes_non_finite(value: str) -> None:
    params = [nn.Parameter(torch.empty(0)), *parameters(2.0)]
    params[0].grad = torch.empty(0)  # an empty shard is passed over
    FaultInjector().nonfinite(0, rank=0, value=value).gradients(0, params)
    wrong = [not math.isfinite(x) for p in params for x in p.grad.flatten().tolist()]
    assert wrong == [True, False]
    assert str(params[1].grad[0].item()) == value


def test_a_flip_hits_the_largest_element() -> None:
    params = parameters(0.5, -0.75)
    FaultInjector().flip(0, rank=0).gradients(0, params)
    assert [p.grad[0].item() for p in params] == [0.5, flipped(-0.75, 30)]
    FaultInjector().flip(0, rank=0, where="parameter", bit="sign").weights(0, params)
    assert [p[0].item() for p in params] == [0.5, 0.75]


@pytest.mark.parametrize(("dtype", "power"), [(torch.float64, 1023), (torch.float32, 127), (torch.bfloat16, 127)])
def test_bits_have_the_same_names_in_every_width(dtype: torch.dtype, power: int) -> None:
    tensors = {bit: torch.tensor([[0.0, 0.5], [-0.75, 0.25]], dtype=dtype) for bit in BITS}
    for bit, tensor in tensors.items():
        flip_largest([torch.empty(0, dtype=dtype), tensor], bit)
    assert tensors["sign"][1, 0] == 0.75
    assert tensors["top-exponent"][1, 0].item() == -1.5 * 2.0**power
    assert tensors["low-exponent"][1, 0] == -1.5
    assert tensors["top-mantissa"][1, 0] == -0.5
    assert tensors["low-mantissa"][1, 0] == -0.75 - torch.finfo(dtype).eps / 2
    assert all(tensor[0, 1] == 0.5 for tensor in tensors.values())


def test_a_flip_reaches_through_strides_and_scalars() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    flip_largest([matrix.t()], "sign")
    assert matrix[1, 2] == -5.0
    scalar = torch.tensor(2.0)
    flip_largest([scalar], "sign")
    assert scalar == -2.0
    flip_largest([torch.empty(0), torch.ones(2, dtype=torch.int64)], "sign")


class Controller:
    """As much of the controller as an injector sees."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self._optimizers = [torch.optim.SGD(params, lr=0.1)]
        self.listener = lambda step, phase: None

    def add_phase_listener(self, listener) -> None:
        self.listener = listener


def test_attached_it_has_the_effect_of_the_plain_loop() -> None:
    specs = ["gradient-scale:step=1,factor=5", "bit-flip:step=1,rank=0,where=parameter"]
    plain, guarded = parameters(1.0, 2.0), parameters(1.0, 2.0)
    by_hand, attached = FaultInjector.parse(specs), FaultInjector.parse(specs)
    controller = Controller(guarded)
    attached.attach(controller)
    for step in range(3):
        by_hand.gradients(step, plain)
        by_hand.weights(step, plain)
        for phase in ("gradients", "step", "after step", "probe", "done"):
            controller.listener(step, phase)
    assert by_hand.fired == attached.fired and len(attached.fired) == 2
    for a, b in zip(plain, guarded, strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("where", ["before", "in", "after"])
def test_the_loss_function_fails_in_the_probe_only(where: str) -> None:
    calls: list[str] = []

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append("called")
        value = model(batch).sum()
        calls.append("forward done")
        return value

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    injector = FaultInjector().fail(1, f"loss {where} forward", rank=0)
    controller = Controller(list(model.parameters()))
    injector.attach(controller)
    wrapped = injector.wrap_loss(loss_fn)
    batch = torch.ones(1, 2)
    controller.listener(1, "gradients")
    assert torch.equal(wrapped(model, batch), loss_fn(model, batch)), "training is not the probe"
    controller.listener(0, "probe")
    wrapped(model, batch)
    calls.clear()
    controller.listener(1, "probe")
    with pytest.raises(InjectedFault):
        wrapped(model, batch)
    assert calls == {"before": [], "in": ["called"], "after": ["called", "forward done"]}[where]
    assert not any(module._forward_pre_hooks for module in model.modules()), "no hook is left behind"


def test_shuffled_labels_change_places_in_their_attempts_only() -> None:
    injector = FaultInjector().shuffle_labels(step=2, length=2)
    inputs, targets = torch.arange(12.0).view(3, 4), torch.arange(12).view(3, 4)
    seen = [injector.batch(step, (inputs, targets)) for step in range(5)]
    assert all(x is inputs for x, _ in seen)
    assert [y is targets for _, y in seen] == [True, True, False, False, True]
    for _, shuffled in seen[2:4]:
        assert shuffled.shape == targets.shape and not torch.equal(shuffled, targets)
        assert sorted(shuffled.flatten().tolist()) == list(range(12))
    assert not torch.equal(seen[2][1], seen[3][1])
    assert torch.equal(targets, torch.arange(12).view(3, 4)), "the loader's own tensor is not written to"
    # Every micro-batch of an attempt, and the same on every machine; it counts once.
    assert torch.equal(injector.batch(2, (inputs, targets))[1], seen[2][1])
    assert injector.fired == {injector.faults[0]: [2, 3]}


def test_shuffled_labels_spare_other_ranks_and_the_random_stream() -> None:
    labels = torch.arange(9)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert FaultInjector().shuffle_labels(0, rank=1).batch(0, (labels, labels))[1] is labels
    FaultInjector().shuffle_labels(0).batch(0, (labels, labels))
    assert torch.equal(torch.get_rng_state(), before)


def rates_of_steps(optimizer: torch.optim.Optimizer) -> tuple[list[list[float]], list[list[float]]]:
    """Learning rates inside each step, and right after it as the first hook but the injector's sees them."""
    inside: list[list[float]] = []
    after: list[list[float]] = []

    def rates() -> list[float]:
        return [float(group["lr"]) for group in optimizer.param_groups]

    step = type(optimizer).step.__wrapped__

    def spy(self, closure=None):
        inside.append(rates())
        return step(self, closure)

    optimizer.step = type(optimizer).profile_hook_step(spy).__get__(optimizer)
    optimizer.register_step_post_hook(lambda *_: after.append(rates()))
    return inside, after


@pytest.mark.parametrize("tensor", [False, True])
def test_learning_rates_are_scaled_in_the_step_alone_and_put_back_to_the_bit(tensor: bool) -> None:
    params, low, high = parameters(1.0, 2.0), 0.1, 0.3
    rates = [torch.tensor(low), torch.tensor(high)] if tensor else [low, high]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(params, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, capturable=False, foreach=False)
    inside, after = rates_of_steps(optimizer)
    injector = FaultInjector().scale_learning_rate(2, 30.0, length=2).hook(optimizer).hook(optimizer)
    for step in range(5):
        injector.gradients(step, params)
        optimizer.step()
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    true = [float(rate) for rate in rates]
    assert after == [true] * 5, "also before any other hook that runs after the step"
    assert [pair == true for pair in inside] == [True, True, False, False, True]
    assert inside[2] == pytest.approx([3.0, 9.0]) and inside[3] == inside[2]
    assert injector.fired == {injector.faults[0]: [2, 3]}


class Failing(torch.optim.SGD):
    """Fails in the steps it is told to."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise RuntimeError("no step")
        return super().step(closure)


def test_a_step_that_raised_leaves_no_learning_rate_to_be_put_back_later() -> None:
    params = parameters(1.0)
    optimizer = Failing(params, lr=0.1)
    injector = FaultInjector().scale_learning_rate(0, 30.0).hook(optimizer)
    injector.gradients(0, params)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    optimizer.fails, optimizer.param_groups[0]["lr"] = False, 0.05  # whoever caught it went back, and has gone on since
    injector.gradients(1, params)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.05 and params[0][0].item() == pytest.approx(0.95)


@pytest.mark.parametrize("form", ["step", "attach"])
def test_guarded_and_plain_loops_take_the_same_steps_of_the_wrong_length(form: str) -> None:
    specs = ["learning-rate:step=1,factor=30,length=2", "shuffled-labels:step=4"]
    probe = LossProbe(lambda model, batch: model(batch).square().mean(), [torch.ones(1, 2)])
    results = []
    for guarded in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        injector, controller = FaultInjector.parse(specs), None
        if guarded:
            controller = StabilityController(model, optimizer, probe)
            if form == "attach":
                controller.attach()
            injector.attach(controller)
        else:
            injector.hook(optimizer)
        for step in range(6):
            x, y = injector.batch(step, (torch.randn(4, 2), torch.randn(4, 1)))
            (model(x) - y).square().mean().backward()
            if controller is None:
                injector.gradients(step, model.parameters())
                optimizer.step()
            elif form == "step":
                assert controller.step().accepted
            else:
                optimizer.step()
                assert controller.verdict is not None and controller.verdict.accepted
            optimizer.zero_grad()
            assert optimizer.param_groups[0]["lr"] == 1e-3
        if controller is not None:
            controller.close()
        results.append([p.detach().clone() for p in model.parameters()])
        assert [len(steps) for steps in injector.fired.values()] == [2, 1]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


SPECS = [
    "gradient-scale:step=120,factor=30.0,length=10",
    "nan:step=5,rank=1",
    "inf:step=5,rank=0,length=2",
    "bit-flip:step=3,rank=1",
    "bit-flip:step=3,rank=1,where=parameter,bit=sign",
    "bit-flip:step=3,where=snapshot",
    "raise:step=0,phase=loss-before-forward,rank=1",
    "raise:step=0,phase=gradients",
    "sleep:step=1,phase=veto-vote,rank=0,seconds=0.5",
    "kill:step=1,phase=vote,rank=1",
    "stop:step=1,phase=vote,rank=1",
    "exit:step=1,phase=copy,rank=1,code=3",
    "shuffled-labels:step=120,length=10",
    "learning-rate:step=120,factor=30.0,length=3",
]


def test_text_and_faults_are_the_same_thing() -> None:
    injector = FaultInjector.parse(SPECS)
    assert [str(fault) for fault in injector.faults] == SPECS
    assert injector.faults[0] == Fault("gradient-scale", 120, factor=30.0, length=10)
    assert injector.faults[4] == Fault("bit-flip", 3, rank=1, where="parameter", bit="sign")
    assert injector.faults[4].phase == "after step"
    assert FaultInjector.parse(["gradient-scale:step=120,factor=300,length=10"]).faults[0].factor == 300.0


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("gradient-scal:step=1", "gradient-scal.*known: gradient-scale, nan"),
        ("gradient-scale:stop=1", "'stop'; known: step, factor, length, rank"),
        ("gradient-scale:factor=3", "needs step"),
        ("raise:step=1", "needs phase; keys of raise: step, phase"),
        ("raise:step=1,phase=nowhere", "'nowhere'; known: gradients"),
        ("nan:step=one", "step.*'one' is not a number"),
        ("nan:step", "step.*'' is not a number"),
        ("nan:step=-1", "step must be >= 0"),
        ("bit-flip:step=1,where=optimizer", "'optimizer'; known: gradient, parameter, snapshot"),
        ("bit-flip:step=1,bit=31", "'31'; known: sign"),
        ("gradient-scale:step=1,length=0", "length >= 1"),
        ("shuffled-labels:step=1,factor=3", "'factor'; known: step, length, rank"),
        ("learning-rate:step=1,phase=batch", "'phase'; known: step, factor, length, rank"),
        ("raise:step=1,phase=batch", "'batch'; known: gradients"),
    ],
)
def test_a_wrong_text_is_told_what_is_known(spec: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FaultInjector.parse([spec])


def test_a_seed_gives_the_same_fault_everywhere() -> None:
    drawn = [FaultInjector.random(seed, 2, 14, start=3).faults for seed in range(300)]
    assert drawn == [FaultInjector.random(seed, 2, 14, start=3).faults for seed in range(300)]
    faults = [fault for (fault,) in drawn]
    assert {fault.kind for fault in faults} == set(DRAWN_KINDS)
    assert set(KINDS) == {spec.split(":")[0] for spec in SPECS}
    # Tests elsewhere rely on what a seed draws: a new kind must not move it.
    assert DRAWN_KINDS == ("gradient-scale", "nan", "inf", "bit-flip", "raise", "sleep", "kill", "stop", "exit")
    assert {fault.step for fault in faults} == set(range(3, 14))
    assert {fault.rank for fault in faults} == {0, 1, None}
    for fault in faults:
        assert FaultInjector.parse([str(fault)]).faults == [fault]
