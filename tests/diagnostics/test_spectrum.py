"""The spectrum of a fitted block against plain formulas on the data, and against maps whose eigenvalues are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_stability.diagnostics.moments import Covariances, Moments, Sketch
from dist_stability.diagnostics.ranks import Ranks
from dist_stability.diagnostics.spectrum import (
    NUMBERS,
    Fit,
    Masses,
    NoSpectrum,
    Spectrum,
    _whitened,
    eigenvalues,
    mode_residuals,
    spectrum,
)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(x: Tensor, y: Tensor, **options: Any) -> Moments:
    sums = Moments(x.shape[1], torch.device("cpu"), **options)
    sums.add(x, y)
    return sums


def covariances(x: Tensor, y: Tensor) -> Covariances:
    return moments(x, y).covariances()


def mapped(matrix: Tensor, tokens: int = 0, noise: float = 0.0) -> Covariances:
    """Of x with a spread that differs by direction, and y = matrix x."""
    width = len(matrix)
    x = draws(tokens or 6 * width, width) * torch.linspace(0.5, 3.0, width).double()
    return covariances(x, x @ matrix.T + noise * draws(*x.shape, seed=2))


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(draws(width, width, seed=3))[0]


def test_whitening_moves_no_eigenvalue_of_a_full_fit() -> None:
    """A similarity: whatever the epsilon, the moduli are those of C_yx C_xx^-1."""
    found = mapped(torch.eye(24, dtype=torch.float64) + 0.3 * draws(24, 24, seed=5) / 24**0.5, noise=0.1)
    plain = torch.linalg.eigvals(torch.linalg.solve(found.xx, found.yx, left=False)).abs().sort().values
    trace = float(found.xx.diagonal().sum())
    for fit in (Fit(), Fit("full", epsilon=0.0), Fit("full"), Fit("full", epsilon=trace / 24)):
        torch.testing.assert_close(eigenvalues(found, fit).abs().sort().values, plain, rtol=0, atol=1e-8)


@pytest.mark.parametrize("fit", [Fit(), Fit("full")])
@pytest.mark.parametrize(
    ("factor", "bin"), [("rotation", "near_unit"), (2.0, "unstable"), (0.85, "middle"), (0.5, "damped")]
)
def test_maps_of_one_modulus_fall_into_one_bin(factor: str | float, bin: str, fit: Fit) -> None:
    matrix = rotation(16) if isinstance(factor, str) else factor * torch.eye(16, dtype=torch.float64)
    found = spectrum(mapped(matrix), fit)
    assert getattr(found.masses, bin) == 1.0
    assert found.fit_ratio < 1e-6 and found.kept == 1.0 and found.filtered == found.masses
    assert found.radius == pytest.approx(1.0 if isinstance(factor, str) else factor, abs=1e-8)


@pytest.mark.parametrize(
    ("radius", "near_unit", "unstable"),
    [(0.05, 1.0, 0.0), (0.11, 0.76, 0.23), (0.2, 0.46, 0.36), (0.3, 0.31, 0.42), (0.5, 0.19, 0.49), (1.0, 0.10, 0.58)],
)
def test_a_random_branch_puts_eigenvalues_on_a_disc(radius: float, near_unit: float, unstable: float) -> None:
    width = 256
    matrix = torch.eye(width, dtype=torch.float64) + radius * draws(width, width) / width**0.5
    moduli = torch.linalg.eigvals(matrix).abs()  # what the fit of noiseless data gives, without the time it takes
    masses = Masses.of(moduli)
    assert masses.near_unit == pytest.approx(near_unit, abs=0.04)
    assert masses.unstable == pytest.approx(unstable, abs=0.04)
    assert sum((masses.near_unit, masses.unstable, masses.damped, masses.middle)) == pytest.approx(1.0)


def test_everything_from_sums_equals_everything_from_data() -> None:
    """eta, kappa, the filter's residuals and the whitened update, from the tokens themselves."""
    width = 20
    x = draws(300, width) * torch.linspace(0.5, 3.0, width).double() + 5.0
    y = x + torch.tanh(0.3 * (x - 5.0) @ draws(width, width, seed=2)) + 3.0
    centred_x, centred_y = (x - x.mean(0)).T, (y - y.mean(0)).T
    variances, directions = torch.linalg.eigh(
        centred_x @ centred_x.T / 299 + 1e-5 * torch.eye(width, dtype=torch.float64)
    )
    white = (directions * variances.rsqrt()) @ directions.T
    xw, yw = white @ centred_x, white @ centred_y
    fitted = yw @ torch.linalg.pinv(xw)
    values, vectors = torch.linalg.eig(fitted)
    left = torch.linalg.inv(vectors)
    data = (left @ yw.to(left.dtype) - values[:, None] * (left @ xw.to(left.dtype))).norm(dim=1)
    data = data / (left @ xw.to(left.dtype)).norm(dim=1)
    tau = 1.001 * float(data.median())
    found = spectrum(covariances(x, y), Fit("full"), tau)
    inside = _whitened(covariances(x, y), Fit("full"))
    own_vectors = torch.linalg.eig(inside.map)[1]
    sums = mode_residuals(torch.linalg.inv(own_vectors), inside.residual, inside.xx)
    torch.testing.assert_close(sums.sort().values, data.sort().values, rtol=0, atol=1e-8)
    assert 0 < found.kept < 1 and found.kept == pytest.approx(float((data <= tau).double().mean()))
    kept = values.abs()[data <= tau]
    assert found.filtered.unstable == pytest.approx(float((kept > 1.05).double().mean()))
    assert found.fit_ratio == pytest.approx(float((yw - fitted @ xw).norm() / (yw - xw).norm()), abs=1e-8)
    assert found.condition == pytest.approx(float(torch.linalg.cond(vectors)), rel=1e-5)
    assert found.radius == pytest.approx(float(values.abs().max()), abs=1e-8)
    assert found.whitened_update == pytest.approx(float((yw - xw).norm() / xw.norm()), abs=1e-8)


def test_the_kreiss_constant() -> None:
    """Of a normal stable map 1; of a Jordan-like one what a fine grid says; infinite outside the unit circle."""

    def of(matrix: Tensor) -> Spectrum:
        x = draws(50, len(matrix))
        x = torch.linalg.qr(x - x.mean(0))[0]  # already white, so the fit is the matrix itself
        return spectrum(covariances(x, x @ matrix.T), Fit())

    assert of(0.5 * rotation(12)).kreiss == pytest.approx(1.0, abs=0.02)
    skew = torch.tensor([[0.9, 4.0], [0.0, 0.8]], dtype=torch.float64)
    found = of(skew)
    circle = torch.polar(
        (1 + torch.logspace(-3, 1, 60, dtype=torch.float64)).repeat(60),
        torch.linspace(0, math.pi, 60, dtype=torch.float64).repeat_interleave(60),
    )
    identity = torch.eye(2, dtype=torch.complex128)
    resolvents = torch.linalg.inv(circle[:, None, None] * identity - skew)
    best = float(((circle.abs() - 1) * torch.linalg.matrix_norm(resolvents, 2)).max())
    assert best > 5
    assert best * 0.9 < found.kreiss <= best * 1.1
    assert found.transient == found.kreiss
    beyond = of(2.0 * rotation(12))
    assert beyond.kreiss == math.inf and beyond.transient == pytest.approx(1.0, abs=0.02)


def test_truncation_of_white_data_takes_an_arbitrary_part() -> None:
    """Why truncated numbers are labelled: of a rotation, all near 1, a random subspace of 16 of 128 sees nothing."""
    found = mapped(rotation(128))
    assert spectrum(found, Fit()).masses.near_unit == 1.0
    assert spectrum(found, Fit("randomized", rank=16)).masses.near_unit < 0.3
    assert spectrum(found, Fit("pca", rank=16)).masses.near_unit < 0.3
    assert Fit("pca").truncates and Fit("randomized").truncates and not Fit().truncates


def test_directions_without_variance_are_modes_of_the_full_fit_only() -> None:
    """The rank-deficient input of a repeated phrase."""
    x = draws(200, 5) @ draws(5, 16, seed=4)
    found = covariances(x, 1.0 * x)
    numerical, full = spectrum(found, Fit()), spectrum(found, Fit("full"))
    assert numerical.rank == 5 and numerical.masses.near_unit == 1.0
    assert full.rank == 16 and full.masses.near_unit == pytest.approx(5 / 16)
    assert full.masses.damped == pytest.approx(11 / 16)


def test_a_constant_input_has_no_spectrum() -> None:
    with pytest.raises(NoSpectrum, match="same for every token"):
        spectrum(covariances(torch.zeros(9, 4), draws(9, 4)), Fit())
    with pytest.raises(NoSpectrum, match="not finite"):
        spectrum(covariances(1e200 * draws(9, 4), draws(9, 4)), Fit())


def test_sums_in_parts_are_the_sums() -> None:
    """Means a million times the spread, tokens in uneven chunks, some of them not finite."""
    x, y = draws(500, 6) + 1e6, draws(500, 6, seed=1) - 1e6
    whole = moments(x, y)
    parts = Moments(6, torch.device("cpu"))
    for start, end in ((0, 1), (1, 8), (8, 400), (400, 500)):
        parts.add(x[start:end], y[start:end])
    bad = torch.full((3, 6), math.nan)
    parts.add(bad, y[:3])
    parts.add(x[:3], bad)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    for sums in (whole, parts):
        assert sums.count == 500
        torch.testing.assert_close(sums.xx, centred_x.T @ centred_x, rtol=1e-8, atol=1e-6)
        torch.testing.assert_close(sums.yx, centred_y.T @ centred_x, rtol=1e-8, atol=1e-6)
        torch.testing.assert_close(sums.yy, centred_y.T @ centred_y, rtol=1e-8, atol=1e-6)
        torch.testing.assert_close(sums.mean_x, x.mean(0))
        squares = torch.stack([x.square().sum(), y.square().sum(), (y - x).square().sum()])
        torch.testing.assert_close(sums.squares, squares)
    assert parts.dropped == 6 and whole.dropped == 0


def test_a_sketch_finds_the_leading_directions() -> None:
    """And a fit in its basis is the fit in the principal directions."""
    width = 40
    scale = torch.cat([torch.linspace(30, 20, 4), torch.full((width - 4,), 0.01)]).double()
    turn = rotation(width)
    x = (draws(800, width) * scale) @ turn.T + 7.0
    y = x @ (torch.eye(width, dtype=torch.float64) + 0.1 * draws(width, width, seed=6) / width**0.5).T
    sketch = Sketch(width, 8, torch.device("cpu"), seed=0)
    sketch.add(x[:300])
    sketch.add(x[300:])
    basis = sketch.basis(Ranks(torch.nn.Linear(1, 1)))
    outside = turn[:, :4] - basis @ (basis.T @ turn[:, :4])
    assert float(outside.norm()) < 1e-2
    inside = spectrum(moments(x, y, basis=basis).covariances(), Fit("pca", rank=4))
    exact = spectrum(covariances(x, y), Fit("pca", rank=4))
    assert inside.rank == exact.rank == 4
    assert inside.radius == pytest.approx(exact.radius, rel=1e-3)
    assert inside.fit_ratio == pytest.approx(exact.fit_ratio, rel=1e-2)


def test_numbers_travel_in_a_row() -> None:
    found = spectrum(mapped(0.9 * rotation(8), noise=0.1), Fit())
    assert len(found.numbers()) == NUMBERS
    assert Spectrum.of(found.numbers()) == found


@pytest.mark.parametrize("bad", [{"method": "dmd"}, {"rank": 0}, {"cutoff": 0.0}, {"epsilon": -1.0}])
def test_senseless_fits_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Fit: {next(iter(bad))}"):
        Fit(**bad)
