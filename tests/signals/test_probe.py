"""LossProbe on one process: the value is a fixed function of the model, and measuring leaves no trace."""

from __future__ import annotations

import json
import math
import random
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from dist_stability.measuring import Measuring
from dist_stability.signals import LossProbe, Reading

Batch = tuple[Tensor, Tensor]


class ReplacesBuffer(nn.Module):
    """Assigns a new tensor to its buffer in every forward, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("optional", None)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.detach().abs().sum()
        self.optional = torch.ones(3)
        return x + 0 * self.seen


class KeepsFrozen(nn.Sequential):
    """Overrides train(), as modules with frozen BatchNorm do; must not be asked."""

    def train(self, mode: bool = True) -> KeepsFrozen:
        raise AssertionError("the probe must write flags, not call train()")


class Everything(nn.Module):
    """Dropout, BatchNorm, replaced buffers, a part frozen in eval, an overridden train()."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.special = KeepsFrozen(ReplacesBuffer(), nn.Linear(8, 8))
        self.last = nn.Linear(8, 1)
        self.forwards = 0
        self.inputs: list[Tensor] = []
        self.modes: list[tuple[bool, bool]] = []
        self.raise_inside = False
        self.frozen.training = False

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        self.inputs.append(x)
        self.modes.append((self.training, torch.is_grad_enabled()))
        x = self.drop(self.frozen(self.norm(self.first(x))))
        if self.raise_inside:
            raise RuntimeError("inside")
        return self.last(self.special(x)).squeeze(-1)


@pytest.fixture
def model() -> Everything:
    torch.manual_seed(1)
    model = Everything()
    model(torch.randn(16, 4)).mean().backward()
    model.forwards, model.inputs, model.modes = 0, [], []
    return model


@pytest.fixture
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)) for _ in range(3)]


def mse(model: nn.Module, batch: Batch) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def bits(tensor: Tensor | None) -> tuple[int, bytes] | None:
    return None if tensor is None else (id(tensor), tensor.detach().numpy().tobytes())


def trace(model: nn.Module) -> dict[str, Any]:
    """All that a measurement might leave behind."""
    numpy_state = np.random.get_state(legacy=True)
    modules = dict(model.named_modules())
    return {
        "python": random.getstate(),
        "numpy": (numpy_state[1].tobytes(), *numpy_state[2:]),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "flags": {name: module.training for name, module in modules.items()},
        "buffers": {(n, k): bits(b) for n, module in modules.items() for k, b in module._buffers.items()},
        "parameters": {name: bits(parameter) for name, parameter in model.named_parameters()},
        "gradients": {name: bits(parameter.grad) for name, parameter in model.named_parameters()},
        "versions": {name: parameter._version for name, parameter in model.named_parameters()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()},
        "always": {n: len(m._forward_hooks_always_called) for n, m in modules.items()},
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def draws(model: nn.Module, batch: Batch) -> Tensor:
    noise = random.random() + np.random.rand() + torch.rand(())
    return mse(model, batch) * noise + functional.dropout(batch[1], 0.5, training=True).mean()


def turns_training_on(model: nn.Module, batch: Batch) -> Tensor:
    for module in model.modules():  # what model.train() does, wrongly
        module.training = True
    return mse(model, batch)


def turns_training_on_afterwards(model: nn.Module, batch: Batch) -> Tensor:
    loss = mse(model, batch)
    for module in model.modules():
        module.training = True
    return loss


def writes_buffers(model: Any, batch: Batch) -> Tensor:
    model.norm.running_mean.fill_(7.0)
    model.norm.num_batches_tracked = None
    return mse(model, batch)


def raises_before(model: nn.Module, batch: Batch) -> Tensor:
    random.random()
    raise ValueError("before")


def raises_after(model: nn.Module, batch: Batch) -> Tensor:
    turns_training_on(model, batch)
    torch.rand(3)
    raise ValueError("after")


def raises_inside(model: Any, batch: Batch) -> Tensor:
    model.raise_inside = True
    try:
        return turns_training_on(model, batch)
    finally:
        model.raise_inside = False


def returns_float(model: nn.Module, batch: Batch) -> float:
    return mse(model, batch).item()


ALL = [
    mse,
    draws,
    turns_training_on,
    turns_training_on_afterwards,
    writes_buffers,
    raises_before,
    raises_after,
    raises_inside,
    returns_float,
]


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("loss_fn", ALL, ids=lambda fn: fn.__name__)
def test_a_measurement_leaves_no_trace(
    loss_fn: Callable[..., Any], batch_statistics: bool, model: Everything, batches: list[Batch]
) -> None:
    probe = LossProbe(loss_fn, batches, batch_statistics=batch_statistics)
    before = trace(model)
    for _ in range(2):
        reading = probe.measure(model)
        assert (reading.error is not None) == loss_fn.__name__.startswith("raises")
        assert trace(model) == before


def test_batch_statistics_are_those_of_the_probe_where_batchnorm_takes_them_in_training() -> None:
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(50.0)  # type: ignore[union-attr]
    frozen = nn.BatchNorm1d(3).eval()
    frozen.running_var.fill_(4.0)  # type: ignore[union-attr]
    model = nn.Sequential(norm, frozen, nn.Dropout(0.5))
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2

    def square(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    own = ((x - x.mean(0)) / (x.var(0, correction=0) + norm.eps).sqrt()).square().mean() / 4
    value = LossProbe(square, [x], batch_statistics=True).measure(model).value
    assert value is not None and value.item() == pytest.approx(own.item(), rel=1e-5)
    running = LossProbe(square, [x]).measure(model).value
    assert running is not None and running.item() > 100
    share = LossProbe(square, [x], batch_statistics=True).share(1, 2)
    assert share.batch_statistics and share.describe() != LossProbe(square, [x]).share(1, 2).describe()


def test_batch_statistics_of_all_ranks_are_refused_before_anything_is_measured() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    with pytest.raises(TypeError, match="SyncBatchNorm"):
        Measuring(model, LossProbe(mse, [1], batch_statistics=True), "rank0")
    Measuring(model, LossProbe(mse, [1]), "rank0")
    with pytest.raises(TypeError, match="batch_statistics must be True or False"):
        LossProbe(mse, [1], batch_statistics=1)  # type: ignore[arg-type]


def test_training_goes_on_bitwise_as_if_nothing_had_been_measured(batches: list[Batch]) -> None:
    def run(probe: LossProbe | None) -> list[bytes]:
        torch.manual_seed(5)
        model = Everything()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(4):
            functional.mse_loss(model(torch.randn(8, 4)), torch.randn(8)).backward()
            optimizer.step()
            if probe is not None:
                assert probe.measure(model).error is None
            optimizer.zero_grad()
        return [tensor.numpy().tobytes() for tensor in model.state_dict().values()]

    assert run(LossProbe(draws, batches)) == run(None)


def test_an_interrupt_passes_and_leaves_no_trace_either(model: Everything, batches: list[Batch]) -> None:
    def interrupted(model: nn.Module, batch: Batch) -> Tensor:
        turns_training_on(model, batch)
        raise KeyboardInterrupt

    before = trace(model)
    with pytest.raises(KeyboardInterrupt):
        LossProbe(interrupted, batches).measure(model)
    assert trace(model) == before


@pytest.mark.parametrize("loss_fn", [mse, draws, turns_training_on], ids=lambda fn: fn.__name__)
def test_the_value_is_a_fixed_function_of_the_weights(
    loss_fn: Callable[..., Any], model: Everything, batches: list[Batch]
) -> None:
    probe = LossProbe(loss_fn, batches)
    values = []
    for seed in range(3):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        values.append(probe.measure(model).value)
    assert values[0] is not None and math.isfinite(float(values[0]))
    assert values == [values[0]] * 3
    with torch.no_grad():
        model.last.bias += 1
    assert probe.measure(model).value != values[0]
    if loss_fn is draws:
        assert LossProbe(loss_fn, batches, seed=1).measure(model).value != probe.measure(model).value


def test_the_value_is_the_mean_in_eval_mode_as_a_0d_float64_tensor(model: Everything, batches: list[Batch]) -> None:
    value = LossProbe(mse, batches).measure(model).value
    for module in model.modules():
        module.training = False
    with torch.no_grad():
        expected = sum(mse(model, batch).double() for batch in batches) / 3
    assert value is not None and value.shape == () and value.dtype == torch.float64 and not value.requires_grad
    assert torch.equal(value, torch.as_tensor(expected))


def test_casts_of_weights_that_autocast_keeps_do_not_outlive_a_step_or_a_rollback() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    x = torch.ones(2, 4)
    probe = LossProbe(lambda model, batch: model(batch).float().mean(), [x])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x).float().mean()  # leaves casts of the weights in the cache
        with torch.no_grad():
            model.bias += 100  # the step
        measured = probe.measure(model).value
        assert measured is not None and measured > 90 > before
        with torch.no_grad():
            model.bias -= 100  # the rollback
        after = model(x).float().mean()
        assert after < 90
        after.backward()
    assert model.weight.grad is not None
    assert torch.is_autocast_enabled("cpu") is False


class NoSync(TorchDispatchMode):
    """Fails when a value travels from a tensor to Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        ), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_fn", [mse, lambda model, batch: model(batch[0])], ids=["value", "vector"])
def test_measuring_does_not_wait_for_the_device(loss_fn: Any, model: Everything, batches: list[Batch]) -> None:
    probe = LossProbe(loss_fn, batches)
    with NoSync():
        probe.measure(model)
        probe.measure(model)
    with pytest.raises(AssertionError), NoSync():
        torch.ones(()).item()


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (torch.tensor(2.0), 2.0),
        (torch.tensor(2.0, dtype=torch.bfloat16), 2.0),
        (torch.tensor(3), 3.0),
        (2.5, 2.5),
        (3, 3.0),
        (np.float32(0.5), 0.5),
        (float("nan"), math.nan),
        (torch.tensor(float("nan")), math.nan),
        (torch.tensor(float("-inf")), -math.inf),
        (torch.tensor(1e300, dtype=torch.float64), 1e300),
    ],
)
def test_numbers_that_are_accepted(result: Any, expected: float) -> None:
    value = LossProbe(lambda model, batch: result, [0]).measure(nn.Linear(1, 1)).value
    assert value is not None and value.dtype == torch.float64 and value.shape == ()
    assert float(value) == pytest.approx(expected, rel=0, nan_ok=True)


@pytest.mark.parametrize(
    ("result", "error", "says"),
    [
        (torch.ones(3), ValueError, "shape [3]"),
        (torch.ones(1), ValueError, "shape [1]"),
        (torch.ones(0), ValueError, "shape [0]"),
        (None, TypeError, "None"),
        (True, TypeError, "True"),
        (torch.tensor(True), TypeError, "torch.bool"),
        (torch.tensor(1j), TypeError, "complex64"),
        ("0.5", TypeError, "'0.5' of type str"),
        (1 + 1j, TypeError, "complex"),
        ((torch.tensor(1.0), 2), TypeError, "tuple"),
    ],
)
def test_anything_else_is_an_error_that_names_it(result: Any, error: type[Exception], says: str) -> None:
    reading = LossProbe(lambda model, batch: result, [0]).measure(nn.Linear(1, 1))
    assert reading.value is None and type(reading.error) is error
    assert says in str(reading.error) and "loss_fn" in str(reading.error)
    assert "batch 0 of 1" in reading.error.__notes__[0]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((mse, []), ValueError, "batches is empty"),
        ((mse, iter(())), ValueError, "batches is empty"),
        ((mse, None), TypeError, "batches must be an iterable"),
        ((mse, 3), TypeError, "type int"),
        ((mse, "abc"), TypeError, "type str"),
        ((mse, torch.ones(3, 2)), TypeError, r"[batch]"),
        ((mse, {"x": 1}), TypeError, r"[batch]"),
        (([torch.ones(2)], mse), TypeError, "swapped"),
        ((None, [1]), TypeError, "loss_fn must be a function"),
        (("loss", [1]), TypeError, "type str"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        LossProbe(*arguments)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**32, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_bad_seeds(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed"):
        LossProbe(mse, [1], seed=seed)


def test_measuring_something_that_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        LossProbe(mse, [1]).measure(mse)  # type: ignore[arg-type]


def test_batches_may_come_from_a_generator_and_are_kept() -> None:
    probe = LossProbe(lambda model, batch: float(batch), (n for n in (1, 2, 6)))
    assert [float(probe.measure(nn.Linear(1, 1)).value or 0) for _ in range(2)] == [3.0, 3.0]


# ---------------------------------------------------------------- shares


def test_batches_are_dealt_out_when_their_number_allows_it() -> None:
    batches = [torch.full((5, 2), float(n)) for n in range(6)]
    probe = LossProbe(mse, batches, seed=7)
    for index in range(3):
        share = probe.share(index, 3)
        assert share.seed == 7 and share.loss_fn is mse
        assert [float(batch[0, 0]) for batch in share.batches] == [index, index + 3]
    assert probe.share(0, 1) is probe


def test_batches_are_cut_when_their_number_does_not_allow_it() -> None:
    batch = {"x": torch.arange(8.0).reshape(4, 2), "nested": [torch.arange(4), "label"], "none": None}
    shares = [LossProbe(mse, [batch]).share(index, 2) for index in range(2)]
    assert [share.batches[0]["nested"][0].tolist() for share in shares] == [[0, 1], [2, 3]]
    assert [share.batches[0]["x"].shape for share in shares] == [(2, 2), (2, 2)]
    assert all(share.batches[0]["nested"][1] == "label" for share in shares)
    assert shares[0].batches[0]["x"].data_ptr() == batch["x"].data_ptr(), "views, not copies"


@pytest.mark.parametrize("sizes", [[4, 4], [4, 2], [2, 4, 6], [8]])
def test_shares_are_equal_in_number_and_shape_and_their_mean_is_that_of_the_whole(sizes: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    probe = LossProbe(lambda model, batch: model(batch).square().mean(), [torch.randn(size, 3) for size in sizes])
    shares = [probe.share(index, 2) for index in range(2)]
    assert shares[0].describe() == shares[1].describe()
    values = [share.measure(model).value for share in shares]
    assert values[0] is not None and values[1] is not None
    torch.testing.assert_close((values[0] + values[1]) / 2, probe.measure(model).value)


@pytest.mark.parametrize(
    ("batches", "count", "says"),
    [
        ([torch.ones(4, 2)] * 3, 2, None),
        ([torch.ones(5, 2)] * 3, 2, "batch 0 has 5 examples, not a multiple of 2"),
        ([torch.ones(4, 2), torch.ones(3, 2)], 2, "batch 1 has 3 examples"),
        ([torch.ones(0, 2)], 2, "batch 0 has 0 examples"),
        ([(torch.ones(4), torch.ones(2))], 2, "no common first dimension ([4], [2])"),
        ([(torch.ones(4), torch.ones(()))], 2, "no common first dimension ([4], [])"),
        ([3], 2, "no tensors"),
        ([(torch.ones(4), np.ones(4))], 2, "ndarray"),
        ([UserDict(x=torch.ones(4))], 2, "UserDict"),
    ],
)
def test_a_set_that_cannot_be_shared_says_why(batches: list[Any], count: int, says: str | None) -> None:
    probe = LossProbe(mse, batches)
    if says is None:
        probe.share(0, count)
        return
    with pytest.raises(ValueError) as caught:
        probe.share(0, count)
    assert says in str(caught.value) and f"{count} data replicas" in str(caught.value)
    assert "probe_on='rank0'" in str(caught.value)


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_a_share_that_does_not_exist(index: int, count: int) -> None:
    with pytest.raises(ValueError, match="index"):
        LossProbe(mse, [torch.ones(4)]).share(index, count)


def test_descriptions_tell_apart_what_must_be_equal_on_all_ranks() -> None:
    def describe(*batches: Any, seed: int = 0) -> str:
        return json.dumps(LossProbe(mse, batches, seed=seed).describe())

    same = describe((torch.ones(4, 2), "a"), (torch.ones(4, 2), "a"))
    assert same == describe((torch.zeros(4, 2), "b"), (torch.ones(4, 2), "c"))
    others = [
        describe((torch.ones(4, 2), "a")),
        describe((torch.ones(4, 2), "a"), (torch.ones(4, 3), "a")),
        describe((torch.ones(4, 2), "a"), (torch.ones(4, 2).half(), "a")),
        describe((torch.ones(4, 2), "a"), (torch.ones(4, 2), 1)),
        describe((torch.ones(4, 2), "a"), (torch.ones(4, 2), np.ones(2))),
        describe((torch.ones(4, 2), "a"), (torch.ones(4, 2), "a"), seed=1),
    ]
    assert len({same, *others}) == 7


# ---------------------------------------------------------------- failure


def test_where_an_exception_came_from(model: Everything, batches: list[Batch]) -> None:
    for loss_fn, inside in ((raises_before, False), (raises_after, False), (raises_inside, True)):
        reading = LossProbe(loss_fn, batches).measure(model)
        assert reading.value is None and reading.inside_forward is inside
        assert not reading.owed, "without collectives nobody waits"


def test_a_failed_measurement_keeps_no_activations_alive(model: Everything) -> None:
    activations: list[Any] = []

    def fails(model: nn.Module, batch: Tensor) -> Tensor:
        import weakref

        out = model(batch)
        activations.append(weakref.ref(out))
        raise ValueError("after")

    reading = LossProbe(fails, [torch.ones(2, 4)]).measure(model)
    model.inputs.clear()
    assert reading.error is not None and reading.error.__traceback__ is not None, "the lines are kept"
    assert activations[0]() is None


class Collective(Everything):
    """Everything, in the role of a model whose forward contains collectives."""


@pytest.fixture
def sharded(model: Everything, monkeypatch: pytest.MonkeyPatch) -> Everything:
    monkeypatch.setattr("dist_stability.signals.probe.has_collectives", lambda model: True)
    return model


class Script:
    """A loss function that makes two forwards per batch and does as told."""

    def __init__(self) -> None:
        self.act: Callable[[Any, int, str], None] = lambda model, number, where: None
        self.forwards_per_batch = 2

    def __call__(self, model: Any, batch: tuple[int, Tensor]) -> Tensor:
        number, x = batch
        self.act(model, number, "before")
        out = model(x + 1)
        self.act(model, number, "between")
        for _ in range(self.forwards_per_batch - 1):
            out = out + model(x=x * 2)
        self.act(model, number, "after")
        return out.mean()


@pytest.fixture
def numbered() -> list[tuple[int, Tensor]]:
    return [(n, torch.full((3, 4), float(n))) for n in range(3)]


def ran(model: Everything, probe: LossProbe) -> tuple[list[float], Reading]:
    """Inputs of the forwards that a measurement makes, and what it gives."""
    model.inputs.clear()
    reading = probe.measure(model)
    return [float(x[0, 0]) for x in model.inputs], reading


WHOLE = [1.0, 0.0, 2.0, 2.0, 3.0, 4.0]  # for batch n: n + 1, then 2 n


@pytest.mark.parametrize("where", ["before", "between", "after"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_forwards_still_owed_are_run_on_recorded_inputs(
    sharded: Everything, numbered: list[tuple[int, Tensor]], number: int, where: str
) -> None:
    def fail(model: Any, at: int, place: str) -> None:
        if (at, place) == (number, where):
            for module in model.modules():
                module.training = True
            raise ValueError("on purpose")

    script = Script()
    probe = LossProbe(script, numbered)
    assert ran(sharded, probe)[0] == WHOLE
    before = trace(sharded)
    script.act = fail
    inputs, reading = ran(sharded, probe)
    assert inputs == WHOLE, "every forward that peers make, once, in their order"
    assert set(sharded.modes) == {(False, False)}, "eval mode, no autograd"
    assert str(reading.error) == "on purpose" and not reading.inside_forward and not reading.owed
    assert trace(sharded) == before
    script.act = Script().act
    assert ran(sharded, probe)[1].error is None, "the next measurement is a normal one"


def test_before_the_first_complete_measurement_forwards_stay_owed(
    sharded: Everything, numbered: list[tuple[int, Tensor]]
) -> None:
    def fail(model: Any, at: int, place: str) -> None:
        raise ValueError("on purpose")

    script = Script()
    script.act = fail
    probe = LossProbe(script, numbered)
    for _ in range(2):  # the failed one must not become the record
        inputs, reading = ran(sharded, probe)
        assert inputs == [] and reading.owed and not reading.inside_forward


def test_a_raise_inside_a_forward_comes_back_at_once(sharded: Everything, numbered: list[tuple[int, Tensor]]) -> None:
    def fail(model: Any, at: int, place: str) -> None:
        model.raise_inside = (at, place) == (1, "between")

    script = Script()
    probe = LossProbe(script, numbered)
    ran(sharded, probe)
    before = trace(sharded)
    script.act = fail
    inputs, reading = ran(sharded, probe)
    assert inputs == WHOLE[:4] and str(reading.error) == "inside"
    assert reading.inside_forward and reading.owed
    assert trace(sharded) == before


def test_a_raise_in_a_hook_of_the_model_is_inside_too(sharded: Everything, numbered: list[tuple[int, Tensor]]) -> None:
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("hook")

    probe = LossProbe(Script(), numbered)
    ran(sharded, probe)
    for register in (sharded.register_forward_pre_hook, sharded.register_forward_hook):
        handle = register(hook)
        reading = ran(sharded, probe)[1]
        assert reading.inside_forward and str(reading.error) == "hook"
        assert len(calls) == 1, "no other forward is tried"
        handle.remove()
        calls.clear()


def test_a_replay_that_fails_is_a_failure_inside(sharded: Everything, numbered: list[tuple[int, Tensor]]) -> None:
    def fail(model: Any, at: int, place: str) -> None:
        model.raise_inside = True
        raise ValueError("on purpose")

    script = Script()
    probe = LossProbe(script, numbered)
    ran(sharded, probe)
    script.act = fail
    inputs, reading = ran(sharded, probe)
    assert len(inputs) == 1 and reading.inside_forward and reading.owed
    assert str(reading.error) == "inside" and str(reading.error.__context__) == "on purpose"


def test_an_exception_swallowed_by_the_loss_function_is_found(
    sharded: Everything, numbered: list[tuple[int, Tensor]]
) -> None:
    def swallow(model: Any, batch: tuple[int, Tensor]) -> Tensor:
        model.raise_inside = batch[0] == 1
        try:
            return model(batch[1]).mean()
        except RuntimeError:
            return torch.zeros(())

    reading = LossProbe(swallow, numbered).measure(sharded)
    assert reading.inside_forward and reading.owed and "Let it be raised" in str(reading.error)


@pytest.mark.parametrize("forwards", [1, 3])
def test_another_number_of_forwards_is_an_error_and_peers_see_the_usual_number(
    sharded: Everything, numbered: list[tuple[int, Tensor]], forwards: int
) -> None:
    script = Script()
    probe = LossProbe(script, numbered)
    ran(sharded, probe)
    script.forwards_per_batch = forwards
    inputs, reading = ran(sharded, probe)
    assert len(inputs) == len(WHOLE)
    assert "number of forwards" in str(reading.error) and not reading.inside_forward and not reading.owed


def test_a_loss_function_that_calls_parts_of_the_model_cannot_be_helped(sharded: Everything) -> None:
    fail = False

    def parts(model: Any, batch: Tensor) -> Tensor:
        if fail:
            raise ValueError("on purpose")
        return model.first(batch).mean()

    probe = LossProbe(parts, [torch.ones(2, 4)])
    assert probe.measure(sharded).error is None
    fail = True
    assert probe.measure(sharded).owed


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.outer = 0

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        self.outer += depth == 2
        return self.layer(x) if depth == 0 else self(x, depth=depth - 1)


def test_forwards_inside_forwards_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_stability.signals.probe.has_collectives", lambda model: True)
    fail = False

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if fail:
            raise ValueError("on purpose")
        return model(batch).mean()

    model = Recursive()
    probe = LossProbe(loss, [torch.ones(2, 2)] * 3)
    probe.measure(model)
    assert model.outer == 3
    fail = True
    assert not probe.measure(model).owed and model.outer == 6


def test_inputs_are_kept_only_where_they_may_be_needed(model: Everything, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    made: list[Any] = []

    def makes_inputs(model: nn.Module, batch: Tensor) -> Tensor:
        x = batch * 2
        made.append(weakref.ref(x))
        return model(x).mean()

    for collectives in (False, True):
        monkeypatch.setattr("dist_stability.signals.probe.has_collectives", lambda model, c=collectives: c)
        probe = LossProbe(makes_inputs, [torch.ones(2, 4)])
        for _ in range(2):
            probe.measure(model)
        model.inputs.clear()
        assert [ref() is not None for ref in made] == [collectives, False]
        made.clear()


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("what", ["model", "in place", "loss_fn"])
def test_compiled_code_is_compiled_once_for_all_measurements(what: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def plain(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    expected = LossProbe(plain, [torch.ones(2, 4)]).measure(model).value
    loss_fn = plain
    if what == "model":
        model = torch.compile(model, backend=counter)
    elif what == "in place":
        model.compile(backend=counter)
    else:
        loss_fn = torch.compile(plain, backend=counter)
    plain(model, torch.ones(2, 4)).backward()
    probe = LossProbe(loss_fn, [torch.ones(2, 4)])
    before = model.training
    assert torch.equal(probe.measure(model).value, expected)  # type: ignore[arg-type]
    frames = counter.frame_count
    for _ in range(3):
        reading = probe.measure(model)
        assert reading.error is None and torch.equal(reading.value, expected)  # type: ignore[arg-type]
    assert counter.frame_count == frames
    assert model.training is before
    torch.compiler.reset()
