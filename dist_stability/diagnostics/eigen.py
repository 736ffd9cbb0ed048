"""Extreme eigenvalues of a symmetric operator that is known by its products: Lanczos over shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .space import ShardSpace, Vector

Operator = Callable[[Vector], Vector]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """An approximate eigenpair.

    Attributes:
        value: Rayleigh quotient of ``vector``. It never lies outside the spectrum, but for the error of the products.
        residual: Norm of (A - value) vector; some eigenvalue is that close to ``value``.
        vector: Of length 1.
    """

    value: float
    residual: float
    vector: Vector


@torch.no_grad()
def normalized(space: ShardSpace, vector: Vector) -> Vector:
    """The vector divided by its length, in place. Collectives: one all-reduce."""
    length = space.length(vector)
    for part in vector:
        part.div_(length)
    return vector


@torch.no_grad()
def lanczos(space: ShardSpace, operator: Operator, start: Vector, steps: int) -> tuple[Pair, Pair, int]:
    """The lower and the upper end of a spectrum.

    Keeps ``steps`` vectors in memory and makes each new one orthogonal to all of them, twice.

    Args:
        space: Of the vectors.
        operator: Symmetric; must leave its argument alone.
        start: Not 0, of any length; overwritten.
        steps: Most products, >= 1; fewer where the space is used up.

    Returns:
        Lowest pair, highest pair, and how many products were made.

    Collectives: those of the operator, and four all-reduces for each step.
    """
    basis = [normalized(space, start)]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = operator(basis[-1])
        diagonal.append(0.0)
        for _ in range(2):
            overlaps = space.dots([(image, one) for one in basis])
            diagonal[-1] += overlaps[-1]
            for one, overlap in zip(basis, overlaps, strict=True):
                for part, other in zip(image, one, strict=True):
                    part.sub_(other, alpha=overlap)
        rest = space.length(image)
        scale = max(map(abs, diagonal)) + max(beside, default=0.0)
        # What is left of a used-up space is rounding: a direction made of that would be no direction of the operator.
        over = len(basis) == steps or not math.isfinite(rest) or rest <= 1e-6 * scale or rest == 0.0
        if over:
            break
        beside.append(rest)
        for part in image:
            part.div_(rest)
        basis.append(image)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for index, value in enumerate(beside):
        matrix[index, index + 1] = matrix[index + 1, index] = value
    if not matrix.isfinite().all():
        nothing = Pair(math.nan, math.nan, basis[0])
        return nothing, nothing, len(basis)
    values, vectors = torch.linalg.eigh(matrix)
    ends = []
    for place in (0, -1):
        weights = vectors[:, place].tolist()
        combined = [torch.zeros_like(part) for part in basis[0]]
        for one, weight in zip(basis, weights, strict=True):
            for part, other in zip(combined, one, strict=True):
                part.add_(other, alpha=weight)
        ends.append(Pair(float(values[place]), abs(rest * weights[-1]), combined))
    return ends[0], ends[1], len(basis)
