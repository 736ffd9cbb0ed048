"""The linear map a block is best described by, and what its eigenvalues say. Pure linear algebra on the CPU.

From Kim et al., "Residual Koopman Spectral Profiling" (arXiv 2602.22988v1), whose symbols are given beside our names.
Everything comes from the covariances C_xx, C_yx, C_yy of a block's input and output: in whitened coordinates P the
least-squares map is A = P C_yx P^T (P C_xx P^T)^+, and no residual needs a token again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from dist_stability.diagnostics.moments import Covariances

UNSTABLE_ABOVE = 1.05
NEAR_UNIT_FROM = 0.90
DAMPED_BELOW = 0.80

Method = Literal["numerical-rank", "full", "randomized", "pca"]
_TINY = 1e-300
# Above this the inverse of the eigenvectors has too few digits left to say anything about single modes.
_WORST_CONDITION = 1e10


@dataclass(frozen=True, slots=True)
class Fit:
    """How a block is fitted.

    Attributes:
        method: "numerical-rank" fits in the directions in which the input varies at all. "full" is the paper's formula
            in all d directions; those without any variance count as eigenvalues 0. "randomized" is its recipe, a
            random subspace of the whitened input. "pca" fits in the leading principal directions. Numbers of the last
            two are not comparable with the first two.
        rank: Dimensions for "randomized" and "pca".
        cutoff: Variance of a direction, relative to the largest, below which it counts as none, > 0.
        epsilon: For "full" and "randomized": added to every variance before whitening, >= 0.
        seed: Seed of every random direction.
    """

    method: Method = "numerical-rank"
    rank: int = 32
    cutoff: float = 1e-8
    epsilon: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: A setting is out of range; the message names it.
        """
        if self.method not in get_args(Method):
            raise ValueError(f"Fit: method must be one of {', '.join(get_args(Method))}; got {self.method!r}")
        if self.rank < 1:
            raise ValueError(f"Fit: rank must be at least 1, got {self.rank}")
        if not 0 < self.cutoff < 1:
            raise ValueError(f"Fit: cutoff must be between 0 and 1, got {self.cutoff}")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"Fit: epsilon must be finite and at least 0, got {self.epsilon}")

    @property
    def truncates(self) -> bool:
        """Whether it looks at a part of the directions only."""
        return self.method in ("randomized", "pca")


@dataclass(frozen=True, slots=True)
class Masses:
    """Shares of the eigenvalues by modulus; they add up to 1, or are all NaN where there is no eigenvalue.

    Attributes:
        near_unit: 0.90 <= |lambda| <= 1.05, the paper's M≈1.
        unstable: |lambda| > 1.05, M>1.
        damped: |lambda| < 0.80, M<1.
        middle: The rest.
    """

    near_unit: float
    unstable: float
    damped: float
    middle: float

    @classmethod
    def of(cls, moduli: Tensor) -> Masses:
        """Count them."""
        count = len(moduli)
        if not count:
            return cls(*[math.nan] * 4)
        unstable = int((moduli > UNSTABLE_ABOVE).sum())
        near = int(((moduli >= NEAR_UNIT_FROM) & (moduli <= UNSTABLE_ABOVE)).sum())
        damped = int((moduli < DAMPED_BELOW).sum())
        return cls(near / count, unstable / count, damped / count, (count - unstable - near - damped) / count)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What the eigenvalues of one block say.

    Attributes:
        masses: Over all modes.
        filtered: Over the modes whose residual is at most tau (ResDMD).
        kept: Share of the modes that the filter keeps.
        rank: Number of modes.
        radius: Largest modulus, rho.
        condition: Condition number of the eigenvectors of length 1, kappa. Large: single eigenvalues mean little.
        fit_ratio: ||Yw - A Xw|| / ||Yw - Xw||, eta: how much of the update a linear map leaves unexplained.
        kreiss: Kreiss constant, sup over |z| > 1 of (|z| - 1) ||(z - A)^-1||; infinite whenever radius > 1, otherwise
            a lower bound from a grid of z. NaN where the condition is above 1e10.
        transient: The same of A / max(1, radius): growth beyond what the largest eigenvalue says; 1 for a normal A.
        whitened_update: ||Yw - Xw|| / ||Xw||; near 0 the block is the identity and says nothing.
    """

    masses: Masses
    filtered: Masses
    kept: float
    rank: int
    radius: float
    condition: float
    fit_ratio: float
    kreiss: float
    transient: float
    whitened_update: float

    def numbers(self) -> list[float]:
        """All of it in one row; :meth:`of` undoes it."""
        rest = [float(getattr(self, field.name)) for field in fields(self)[2:]]
        return [*_row(self.masses), *_row(self.filtered), *rest]

    @classmethod
    def of(cls, row: list[float]) -> Spectrum:
        """Undo :meth:`numbers`."""
        kept, rank, *rest = row[8:]
        return cls(Masses(*row[:4]), Masses(*row[4:8]), kept, 0 if math.isnan(rank) else int(rank), *rest)


NUMBERS = 16
"""Length of :meth:`Spectrum.numbers`."""


CONSTANT = "the input is the same for every token"
NOT_FINITE = "a covariance is not finite"
NOT_SOLVED = "an eigensolver did not converge"


class NoSpectrum(ValueError):
    """There is nothing to decompose, or it failed; the message is one of the three constants above."""


@dataclass(frozen=True, slots=True, eq=False)
class _Whitened:
    """Covariances in whitened coordinates, and the fitted map there."""

    xx: Tensor
    yx: Tensor
    yy: Tensor
    map: Tensor

    @property
    def residual(self) -> Tensor:
        """Covariance of Yw - A Xw."""
        crossed = self.map @ self.yx.T
        return self.yy - crossed - crossed.T + self.map @ self.xx @ self.map.T

    @property
    def update(self) -> Tensor:
        """Covariance of Yw - Xw."""
        return self.yy - self.yx - self.yx.T + self.xx


def spectrum(covariances: Covariances, fit: Fit, tau: float = 0.1) -> Spectrum:
    """Fit one block and read its eigenvalues. Costs about 25 d^3 operations.

    Args:
        covariances: Of the block's input and output.
        fit: How to fit.
        tau: Largest residual of a mode that the filter keeps, > 0.

    Raises:
        NoSpectrum: No direction varies, a covariance is not finite, or an eigensolver did not converge.
    """
    try:
        return _spectrum(covariances, fit, tau)
    except torch.linalg.LinAlgError as error:
        raise NoSpectrum(NOT_SOLVED) from error


def _spectrum(covariances: Covariances, fit: Fit, tau: float) -> Spectrum:
    white = _whitened(covariances, fit)
    values, vectors = torch.linalg.eig(white.map)
    moduli = values.abs()
    singular = torch.linalg.svdvals(vectors)
    condition = float(singular[0] / singular[-1]) if singular[-1] > 0 else math.inf
    residuals = torch.full_like(moduli, math.inf)
    kreiss = transient = math.nan
    radius = float(moduli.max())
    if condition < _WORST_CONDITION:
        left = torch.linalg.inv(vectors)
        residuals = mode_residuals(left, white.residual, white.xx)
        transient = _kreiss(values / max(1.0, radius), vectors, left)
        kreiss = transient if radius <= 1.0 else math.inf
    update = _norm(white.update)
    kept = residuals <= tau
    return Spectrum(
        masses=Masses.of(moduli),
        filtered=Masses.of(moduli[kept]),
        kept=float(kept.double().mean()),
        rank=len(values),
        radius=radius,
        condition=condition,
        fit_ratio=_norm(white.residual) / (update + _TINY),
        kreiss=kreiss,
        transient=transient,
        whitened_update=update / (_norm(white.xx) + _TINY),
    )


def eigenvalues(covariances: Covariances, fit: Fit) -> Tensor:
    """The eigenvalues themselves, complex, (modes,).

    Raises:
        NoSpectrum: No direction varies, or a covariance is not finite.
        torch.linalg.LinAlgError: An eigensolver did not converge.
    """
    return torch.linalg.eigvals(_whitened(covariances, fit).map)


def mode_residuals(left: Tensor, residual: Tensor, xx: Tensor) -> Tensor:
    """||u^*(Yw - lambda Xw)|| / ||u^* Xw|| of each left eigenvector u, a row of ``left``; (modes,).

    u^*(Y - lambda X) = u^*(Y - A X): the residual of a mode is the fit's, seen along u.
    """

    def seen(covariance: Tensor) -> Tensor:
        along: Tensor = ((left @ covariance.to(left.dtype)) * left.conj()).sum(1).real
        return along.clamp(min=0.0)

    return (seen(residual) / (seen(xx) + _TINY)).sqrt()


def _whitened(covariances: Covariances, fit: Fit) -> _Whitened:
    xx = covariances.xx
    if not all(bool(torch.isfinite(part).all()) for part in (xx, covariances.yx, covariances.yy)):
        raise NoSpectrum(NOT_FINITE)
    variances, directions = torch.linalg.eigh(xx)
    if not variances[-1] > 0:
        raise NoSpectrum(CONSTANT)
    varies = variances > fit.cutoff * variances[-1]
    if fit.method in ("numerical-rank", "pca"):
        if fit.method == "pca":
            varies[: -fit.rank] = False
        project = (directions[:, varies] / variances[varies].sqrt()).T
        xx, yx, yy = (project @ part @ project.T for part in (xx, covariances.yx, covariances.yy))
        return _Whitened(xx, yx, yy, torch.linalg.solve(xx, yx, left=False))  # xx is the identity but for rounding
    # In directions without variance there is rounding error only; without this the fit would explain it.
    variances = variances.where(varies, 0.0)
    scale = (variances + fit.epsilon).rsqrt()
    scale = scale.where(torch.isfinite(scale), 0.0)
    project, root = ((directions * factor) @ directions.T for factor in (scale, scale * variances.sqrt()))
    if fit.method == "randomized":
        draw = torch.Generator().manual_seed(fit.seed)
        test = torch.randn(len(xx), min(fit.rank, len(xx)), dtype=xx.dtype, generator=draw)
        subspace = torch.linalg.qr(root @ (root @ test))[0].T
        project, root = subspace @ project, subspace @ root
    # Not project @ xx @ project.T: epsilon is small, and would make rounding error large where nothing varies.
    xx = root @ root.T
    yx, yy = (project @ part @ project.T for part in (covariances.yx, covariances.yy))
    return _Whitened(xx, yx, yy, yx @ torch.linalg.pinv(xx, rtol=1e-12, hermitian=True))


def _kreiss(values: Tensor, vectors: Tensor, left: Tensor) -> float:
    """Largest (|z| - 1) ||(z - A)^-1|| on a grid outside the unit circle, by power iteration at all z at once.

    A is real, so the upper half plane is enough. Any vector gives a lower bound of a norm.
    """
    largest = values[values.abs().topk(min(8, len(values))).indices].angle().abs()
    angles = torch.cat([torch.linspace(0.0, math.pi, 9, dtype=torch.float64), largest])
    radii = 1.0 + torch.tensor([0.01, 0.03, 0.1, 0.3, 1.0], dtype=torch.float64)
    grid = torch.polar(radii.repeat(len(angles)), angles.repeat_interleave(len(radii)))
    resolvent = 1.0 / (grid - values[:, None])
    draw = torch.Generator().manual_seed(0)
    probe = torch.randn(len(values), len(grid), dtype=torch.complex128, generator=draw)
    gain = torch.zeros(len(grid), dtype=torch.float64)
    for _ in range(8):
        probe = probe / torch.linalg.vector_norm(probe, dim=0)
        image = vectors @ (resolvent * (left @ probe))
        gain = torch.linalg.vector_norm(image, dim=0)
        probe = left.mH @ (resolvent.conj() * (vectors.mH @ image))
    # Far away from every eigenvalue the quantity tends to 1.
    return max(1.0, float(((grid.abs() - 1.0) * gain).max()))


def _norm(covariance: Tensor) -> float:
    """Frobenius norm per token of what has this covariance."""
    return math.sqrt(max(0.0, float(covariance.diagonal().sum())))


def _row(masses: Masses) -> list[float]:
    return [masses.near_unit, masses.unstable, masses.damped, masses.middle]
