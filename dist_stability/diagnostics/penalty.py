"""The spectral penalty of one block: its map in a few leading directions, and the gradient of what its moduli cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dist_stability.diagnostics.spectrum import NEAR_UNIT_FROM, UNSTABLE_ABOVE

SHARPNESS = 20.0
_OVERSAMPLING = 8
_CUTOFF = 1e-8
_WORST_CONDITION = 1e8

REASONS = ("non-finite activations", "too little variance", "no convergence", "defective", "non-finite gradient")
"""Why a block can be skipped; a :class:`Skip` has one of them."""


class Skip(Exception):
    """This block has no usable penalty at this step; the message is one of :data:`REASONS`."""


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """The penalty of a map, and its gradient.

    Attributes:
        value: L_KSS.
        gradient: dL/dA, of the shape of A, float64 on the CPU.
    """

    value: float
    gradient: Tensor


def small_map(x: Tensor, y: Tensor, rank: int, draw: torch.Generator, tokens_each: int = 8) -> Tensor:
    """The least-squares map from x to y in the leading principal directions of x, whitened there. Differentiable in y.

    Mean, directions and variances of x are constants: a gradient through them would move the ruler with what is
    measured. The directions come from two rounds of subspace iteration, in O(tokens width rank).

    Args:
        x: (tokens, width), any floating dtype.
        y: Of the same shape.
        rank: At most so many directions; fewer where x varies in fewer, and at most one for ``tokens_each`` tokens.
        draw: For the first subspace, and nothing else.
        tokens_each: Fewer tokens for a direction spread the eigenvalues.

    Returns:
        A, (modes, modes) float64 on the device of x (on the CPU where that has no float64).

    Raises:
        Skip: x or y is not finite, or x does not vary.
    """
    device = torch.device("cpu") if x.device.type == "mps" else x.device
    with torch.no_grad():
        fixed = x.detach().to(device).to(torch.float64)
        if not (torch.isfinite(fixed).all() and torch.isfinite(y).all()):
            raise Skip(REASONS[0])
        count, width = fixed.shape
        modes = min(rank, count // tokens_each, width)
        if modes < 1:
            raise Skip(REASONS[1])
        fixed = fixed - fixed.mean(0)
        start = torch.randn(width, min(modes + _OVERSAMPLING, width), dtype=torch.float64, generator=draw)
        subspace = torch.linalg.qr(start)[0].to(device)
        for _ in range(2):
            subspace = torch.linalg.qr(fixed.T @ (fixed @ subspace))[0]
        inside = fixed @ subspace
        variances, directions = torch.linalg.eigh(inside.T @ inside / (count - 1))
        varies = variances > _CUTOFF * variances[-1].clamp(min=1e-300)
        varies[:-modes] = False
        if not varies.any():
            raise Skip(REASONS[1])
        project = subspace @ (directions[:, varies] / variances[varies].sqrt())
        white = fixed @ project / (count - 1)
    # The mean of y needs no subtraction for the result (the columns of `white` add up to 0), only for the digits.
    live = y.to(device).to(torch.float64)
    return ((live - live.detach().mean(0)) @ project).T @ white


def spectral_cost(matrix: Tensor, beta: float, gamma: float) -> Cost:
    """Equation of L_KSS: a cost of every modulus above 1.05, and of a near-unit share other than ``gamma``.

    sum_j sigmoid(T (|l_j| - 1.05)) softplus(|l_j| - 1.05)^2 + beta (m - gamma)^2, where
    m = mean_j sigmoid(T (|l_j| - 0.90)) sigmoid(T (1.05 - |l_j|)) and T = 20.

    Raises:
        Skip: The eigensolver did not converge, or eigenvectors are so close to each other that the gradient of the
            eigenvalues means nothing.
    """
    leaf = matrix.detach().cpu().requires_grad_()
    with torch.enable_grad():
        try:
            values, vectors = torch.linalg.eig(leaf)
            condition = float(torch.linalg.cond(vectors.detach()))
        except torch.linalg.LinAlgError:
            raise Skip(REASONS[2]) from None
        if not condition <= _WORST_CONDITION:
            raise Skip(REASONS[3])
        moduli = values.abs()
        above = moduli - UNSTABLE_ABOVE
        unstable = (torch.sigmoid(SHARPNESS * above) * functional.softplus(above).square()).sum()
        near = (torch.sigmoid(SHARPNESS * (moduli - NEAR_UNIT_FROM)) * torch.sigmoid(-SHARPNESS * above)).mean()
        cost = unstable + beta * (near - gamma).square()
        (gradient,) = torch.autograd.grad(cost, leaf)
    value = float(cost.detach())
    if not (math.isfinite(value) and torch.isfinite(gradient).all()):
        raise Skip(REASONS[4])
    return Cost(value, gradient)


def attached(matrix: Tensor, cost: Cost) -> Tensor:
    """The cost as a 0-d tensor whose gradient with respect to ``matrix`` is known already.

    So the eigenvalues are differentiated once, in a graph of their own, where a gradient that is not finite is noticed
    before it is in the weights.
    """
    return cost.value + ((matrix - matrix.detach()) * cost.gradient.to(matrix.device)).sum()
