"""The fault injector by itself: what each fault does, that it does it once, and what the parser says."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor, nn

from dist_stability.testing import BITS, Fault, FaultInjector, InjectedFault, flip_largest


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
    ],
)
def test_a_wrong_text_is_told_what_is_known(spec: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FaultInjector.parse([spec])


def test_a_seed_gives_the_same_fault_everywhere() -> None:
    drawn = [FaultInjector.random(seed, 2, 14, start=3).faults for seed in range(300)]
    assert drawn == [FaultInjector.random(seed, 2, 14, start=3).faults for seed in range(300)]
    faults = [fault for (fault,) in drawn]
    assert {fault.kind for fault in faults} == set(SPECS[i].split(":")[0] for i in range(len(SPECS)))
    assert {fault.step for fault in faults} == set(range(3, 14))
    assert {fault.rank for fault in faults} == {0, 1, None}
    for fault in faults:
        assert FaultInjector.parse([str(fault)]).faults == [fault]
