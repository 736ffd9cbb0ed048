"""Gradients: the sum of squares and the caller's norm, without overflow and without waiting for the device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_stability.parallel import Residence
from dist_stability.signals import Gradients
from dist_stability.signals.sums import nothing_on_host

ALONE = Residence((0,))
NAN, INF = math.nan, math.inf


def of(*gradients: Tensor | None, norm: Any = None, replicas: int = 1) -> Gradients:
    entries = []
    for number, gradient in enumerate(gradients):
        parameter = nn.Parameter(torch.zeros(2) if gradient is None else torch.zeros(gradient.shape).to(gradient))
        parameter.grad = gradient
        entries.append((f"p{number}", parameter, Residence(tuple(range(replicas)))))
    return Gradients(entries, norm)


class NoSync(TorchDispatchMode):
    """Nothing inside reads a tensor on the host; the CPU stands for a device that would have to be waited for."""

    def __enter__(self) -> Any:
        self._elsewhere = nothing_on_host()
        self._elsewhere.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._elsewhere.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_the_sum_of_squares_is_a_0d_float64_tensor() -> None:
    total = of(torch.tensor([3.0, 4.0]), None, torch.tensor([[2.0]], dtype=torch.bfloat16)).square_sum
    assert total.dtype == torch.float64 and total.shape == () and not total.requires_grad
    assert float(total) == pytest.approx(29.0)


def test_each_square_is_where_its_parameter_is() -> None:
    gradients = of(None, torch.tensor([3.0, 4.0]), torch.tensor([1.0], dtype=torch.float64), None, torch.tensor([2.0]))
    assert gradients.squares.tolist() == [0.0, 25.0, 1.0, 0.0, 4.0]
    assert [None if part is None else part.tolist() for part in gradients.local] == [
        None,
        [3.0, 4.0],
        [1.0],
        None,
        [2.0],
    ]
    assert [name for name, _, _ in gradients.parameters] == ["p0", "p1", "p2", "p3", "p4"]
    assert of().squares.shape == (0,) and float(of().square_sum) == float(of(None).square_sum) == 0.0


def test_it_is_computed_when_asked_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda *a, **k: calls.append(1) or original(*a, **k))
    gradients = of(torch.ones(3), torch.ones(2))
    assert calls == []
    assert gradients.square_sum is gradients.square_sum and calls == [1]


def test_replicas_share_a_square() -> None:
    mixed = Gradients([(n, p, r) for n, p, r in [one("a", 3.0, ALONE), one("b", 4.0, Residence((0, 1, 2, 3)))]])
    assert float(mixed.square_sum) == pytest.approx(9 + 16 / 4)


def one(name: str, value: float, residence: Residence) -> tuple[str, Tensor, Residence]:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([value])
    return name, parameter, residence


def test_parameters_without_a_gradient_and_empty_shards_count_as_nothing() -> None:
    assert float(of(None, None).square_sum) == 0.0
    assert float(of().square_sum) == 0.0
    gradients = of(torch.zeros(0), None, torch.ones(2), torch.zeros(0, 3))
    assert float(gradients.square_sum) == pytest.approx(2.0)
    assert [(name, tuple(grad.shape)) for name, grad in gradients.named()] == [
        ("p0", (0,)),
        ("p2", (2,)),
        ("p3", (0, 3)),
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_finite_gradients_never_overflow(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    gradients = of(*[torch.full((4096,), largest).to(dtype) for _ in range(4)])
    expected = 4 * 4096 * float(torch.tensor(largest).to(dtype)) ** 2
    assert float(gradients.square_sum) == pytest.approx(expected, rel=1e-6) and math.isfinite(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("poison", [[NAN], [INF], [-INF], [INF, -INF], [NAN, INF], [-INF, 1.0, INF]])
@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_or_an_infinity_never_gives_a_finite_number(dtype: torch.dtype, poison: list[float], place: int) -> None:
    values = [torch.ones(1000, dtype=dtype), torch.full((7,), torch.finfo(dtype).max / 2, dtype=dtype)]
    values[place][: len(poison)] = torch.tensor(poison)
    assert not math.isfinite(float(of(*values).square_sum))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.floats(width=32), max_size=6), max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]),
    st.integers(1, 4),
)
def test_finite_exactly_if_all_gradients_are(values: list[list[float]], dtype: torch.dtype, replicas: int) -> None:
    gradients = [torch.tensor(each, dtype=torch.float32).to(dtype) for each in values]
    total = of(*gradients, replicas=replicas).square_sum
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert bool(total.isfinite()) == finite
    if finite:
        expected = sum(float(gradient.abs().double().square().sum()) for gradient in gradients) / replicas
        assert float(total) == pytest.approx(expected, rel=1e-5, abs=1e-300)


def test_duplicate_indices_of_a_sparse_gradient_add_up() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1, 3])).sum().backward()
    gradients = Gradients([("table", table.weight, ALONE)])
    assert float(gradients.square_sum) == pytest.approx(2 * 2.0**2 + 2)
    assert [(name, gradient.tolist()) for name, gradient in gradients.named()] == [("table", [[2.0, 2.0], [1.0, 1.0]])]


def test_complex_gradients() -> None:
    assert float(of(torch.tensor([3 + 4j, 1j])).square_sum) == pytest.approx(26.0)
    assert float(of(torch.tensor([3 + 4j]).conj()).square_sum) == pytest.approx(25.0)


def test_nothing_waits_for_the_device_and_nothing_changes() -> None:
    first, second = torch.randn(10), torch.randn(3).half()
    copies = first.clone(), second.clone()
    gradients = of(first, second, norm=torch.tensor([2.0]))
    with NoSync():
        _ = gradients.square_sum, gradients.caller_norm, list(gradients.named())
    assert torch.equal(first, copies[0]) and torch.equal(second, copies[1])


def test_named_gives_the_gradients_themselves() -> None:
    gradient = torch.randn(3)
    ((name, local),) = of(gradient).named()
    assert name == "p0" and local.data_ptr() == gradient.data_ptr()


@pytest.mark.parametrize(
    "norm",
    [
        2.5,
        np.float32(2.5),
        torch.tensor(2.5),
        torch.tensor([2.5]),
        torch.tensor([[2.5]], dtype=torch.bfloat16),
        torch.tensor(2.5, dtype=torch.float64, requires_grad=True),
    ],
)
def test_norms_a_caller_may_give(norm: Any) -> None:
    caller = of(torch.ones(1), norm=norm).caller_norm
    assert caller is not None and caller.dtype == torch.float64 and caller.shape == () and not caller.requires_grad
    assert float(caller) == 2.5


def test_an_int_zero_nan_and_infinity_are_norms_and_none_is_none() -> None:
    assert of(norm=None).caller_norm is None
    for norm in (0, 3, NAN, INF, torch.tensor(NAN), torch.tensor(-1.0)):
        caller = of(norm=norm).caller_norm
        assert caller is not None
        assert float(caller) == pytest.approx(float(norm), rel=0, nan_ok=True)


@pytest.mark.parametrize(
    ("norm", "error", "says"),
    [
        (-1.0, ValueError, "never negative"),
        (-INF, ValueError, "never negative"),
        (torch.ones(2), ValueError, "shape [2]"),
        (torch.ones(0), ValueError, "shape [0]"),
        ("1.0", TypeError, "'1.0' of type str"),
        ([1.0], TypeError, "list"),
        (True, TypeError, "True"),
        (torch.tensor(True), TypeError, "bool"),
        (1j, TypeError, "complex"),
        (torch.tensor(1j), TypeError, "complex"),
        (np.ones(1), TypeError, "ndarray"),
    ],
)
def test_norms_that_are_none_are_refused_by_name(norm: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        of(torch.ones(1), norm=norm)
    assert "grad_norm" in str(caught.value) and says in str(caught.value)


def test_the_main_device_is_the_cpu_without_an_accelerator() -> None:
    assert of(torch.ones(1), norm=1.0).device == torch.device("cpu") == of().device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_nothing_synchronizes_and_nothing_overflows() -> None:
    largest = torch.finfo(torch.float32).max
    tensors = [torch.full((5000,), largest, device="cuda"), torch.ones(3, device="cuda").bfloat16(), torch.ones(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients = of(*tensors, norm=2.0)
        total, caller = gradients.square_sum, gradients.caller_norm
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert gradients.device.type == total.device.type == "cuda" and caller is not None and caller.is_cuda
    assert float(total) == pytest.approx(5000 * largest**2) and float(caller) == 2.0
