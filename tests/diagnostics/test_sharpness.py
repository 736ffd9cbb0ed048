"""Sharpness in one process: right on what is known, honest about what it cannot know."""

from __future__ import annotations

import math

import pytest
import torch
from edge_models import build, loss_fn
from torch import Tensor, nn

from dist_stability import StabilityError
from dist_stability.diagnostics.curvature import Curvature
from dist_stability.diagnostics.sharpness import Sharpness


class Point(nn.Module):
    def __init__(self, *parts: Tensor) -> None:
        super().__init__()
        self.parts = nn.ParameterList([part.clone() for part in parts])

    def forward(self) -> Tensor:
        return torch.cat([part.flatten() for part in self.parts])


def symmetric(size: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    half = torch.randn(size, size, generator=draw, dtype=torch.float64)
    return half + half.T


def quadratic(matrix: Tensor) -> object:
    return lambda model, _: 0.5 * model() @ matrix @ model()


def sgd(model: nn.Module, **settings: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **settings)


def test_a_product_is_the_matrix_times_the_vector() -> None:
    matrix = symmetric(9)
    model = Point(torch.ones(2, 2, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
    curvature = Curvature(model, sgd(model), quadratic(matrix), [None])  # type: ignore[arg-type]
    vector = curvature.space.random(1)
    with curvature.session() as products:
        image = products.hessian(vector)
        gradient = products.gradient()
    flat = torch.cat([part.flatten() for part in vector])
    expected = matrix @ flat
    assert torch.cat([part.flatten() for part in image]).sub(expected).norm() < 1e-6 * expected.norm()
    torch.testing.assert_close(torch.cat([part.flatten() for part in gradient]), matrix.sum(1))


@pytest.mark.parametrize("exact", [False, True])
def test_both_ends_of_a_known_spectrum(exact: bool) -> None:
    matrix = symmetric(9, seed=3)
    values = torch.linalg.eigvalsh(matrix)
    model = Point(torch.ones(9, dtype=torch.float64))
    measured = Sharpness(model, sgd(model), quadratic(matrix), [None], scaled=False, exact=exact)  # type: ignore[arg-type]
    ends = measured.ends(9)
    assert ends.upper.value == pytest.approx(float(values[-1]), rel=1e-6)
    assert ends.lower.value == pytest.approx(float(values[0]), rel=1e-6)
    assert ends.products == 9 + (not exact)
    assert ends.reliable is (None if exact else True)


def test_the_upper_end_is_found_where_the_lower_one_is_larger() -> None:
    matrix = torch.diag(torch.tensor([-5.0, 1.0, 2.0], dtype=torch.float64))
    model = Point(torch.ones(3, dtype=torch.float64))
    measured = Sharpness(model, sgd(model), quadratic(matrix), [None], scaled=False)  # type: ignore[arg-type]
    reading = measured.converge(1e-7, 300)
    assert reading.eigenvalue == pytest.approx(2.0, rel=1e-4) and reading.margin is None
    assert reading.residual < 0.01


def test_what_momentum_and_decay_make_of_the_margin() -> None:
    model = Point(torch.ones(2, dtype=torch.float64))
    loss = quadratic(torch.diag(torch.tensor([1.0, 30.0], dtype=torch.float64)))
    reading = Sharpness(model, sgd(model, momentum=0.5, weight_decay=2.0), loss, [None]).converge()  # type: ignore[arg-type]
    assert reading.margin == pytest.approx(0.1 * 32.0 / 3.0, rel=1e-5)


def test_a_frozen_parameter_takes_no_part() -> None:
    model = Point(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    model.parts[1].requires_grad_(False)
    loss = quadratic(torch.tensor([[1.0, 50.0], [50.0, 90.0]], dtype=torch.float64))
    for scaled, expected in ((False, 1.0), (True, 0.1)):
        reading = Sharpness(model, sgd(model), loss, [None], scaled=scaled).measure(1)  # type: ignore[arg-type]
        assert reading.eigenvalue == pytest.approx(expected, rel=1e-6)


def test_one_product_now_and_then_follows_a_run_to_the_edge() -> None:
    """Full-batch gradient descent: the margin rises to 1 and stays; the cheap number never exceeds the exact one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    x = torch.randn(48, 6)
    y = torch.sin(2.0 * x.sum(1, keepdim=True))

    def loss(model: nn.Module, _: object) -> Tensor:
        return ((model(x) - y) ** 2).mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    cheap = Sharpness(model, optimizer, loss, [None])
    begin = cheap.measure(20).margin
    assert begin is not None and begin < 0.6
    late = []
    for step in range(1200):
        optimizer.zero_grad()
        loss(model, None).backward()
        optimizer.step()
        if step % 25 == 24:
            reading = cheap.measure()
            if step % 200 == 199:
                exact = Sharpness(model, optimizer, loss, [None], exact=True).converge(1e-5, 300)
                assert exact.margin is not None and reading.margin is not None
                assert 0.8 * exact.margin <= reading.margin <= 1.02 * exact.margin
                late.append(exact.margin)
    assert all(0.9 < margin < 1.3 for margin in late[1:]), late


def test_what_adam_knows_only_rounding_errors_of_is_left_out() -> None:
    """The bias of the keys has no true gradient; with it the number would be noise at the smaller step."""
    job = build("single", 0, 1)
    for _ in range(12):
        job.step()
    values = []
    for step in (1e-5, 1e-4, 1e-3):
        measured = Sharpness(job.model, job.optimizer, loss_fn, [job.batch], relative_step=step)
        reading = measured.converge(1e-4, 60)
        assert reading.reliable and reading.residual < 0.02
        keys = 2 * 8  # two blocks of width 8
        assert reading.left_out * sum(p.numel() for p in job.model.parameters()) == pytest.approx(keys)
        values.append(reading.eigenvalue)
    assert max(values) < 1.01 * min(values)


def test_a_step_that_is_too_long_is_reported() -> None:
    model = Point(torch.tensor([0.3, 0.1], dtype=torch.float64))
    bumpy = lambda m, _: torch.cos(9.0 * m()).sum()  # noqa: E731
    assert Sharpness(model, sgd(model), bumpy, [None], relative_step=0.5).measure(3, check=True).reliable is False
    assert Sharpness(model, sgd(model), bumpy, [None]).measure(3, check=True).reliable is True


def test_what_is_not_finite_is_said_and_forgotten() -> None:
    model = Point(torch.ones(2, dtype=torch.float64))
    bad = True
    matrix = torch.eye(2, dtype=torch.float64)
    measured = Sharpness(
        model,
        sgd(model),
        lambda m, _: 0.5 * m() @ matrix @ m() * (math.nan if bad else 1.0),
        [None],
    )
    reading = measured.measure(2, check=True)
    assert math.isnan(reading.eigenvalue) and math.isnan(reading.loss) and reading.reliable is None
    bad = False
    assert measured.measure().eigenvalue == pytest.approx(0.1)
    assert torch.equal(model(), torch.ones(2, dtype=torch.float64))


def test_bad_settings_are_named() -> None:
    half = Point(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(StabilityError, match=r"rank 0: the parameters are torch\.bfloat16"):
        Sharpness(half, sgd(half), loss_fn, [None])
    model = Point(torch.ones(2))
    with pytest.raises(StabilityError, match="relative_step must be a positive number"):
        Sharpness(model, sgd(model), loss_fn, [None], relative_step=-1.0)
    with pytest.raises(StabilityError, match="at least 1 product"):
        Sharpness(model, sgd(model), loss_fn, [None]).measure(0)
