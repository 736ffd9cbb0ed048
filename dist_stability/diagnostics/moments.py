"""First and second moments of the two ends of a block, added up token by token, chunk by chunk and rank by rank.

Everything a spectral profile needs is in these sums, so hidden states are never kept and never gathered. All sums are
centred where they arise and shifted when they are joined (Chan, Golub & LeVeque 1983): a stream with a mean far
larger than its spread loses no digits, and how tokens are cut into chunks and ranks changes rounding only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_stability.diagnostics.ranks import Ranks

_CHUNK = 4096


class Moments:
    """Moments of pairs (x, y) of hidden states of one block, in float64.

    With a ``basis`` x and y are projected before second moments are taken; lengths are always those of the whole
    vectors.

    Attributes:
        count: Tokens added.
        dropped: Tokens left out because x or y was not finite.
        mean_x: Mean of x, (size,).
        mean_y: Mean of y, (size,).
        xx: Sum of (x - mean_x)(x - mean_x)^T, (size, size).
        yx: Sum of (y - mean_y)(x - mean_x)^T.
        yy: Sum of (y - mean_y)(y - mean_y)^T.
        squares: Sums of |x|^2, |y|^2 and |y - x|^2 over tokens, (3,), not centred.
    """

    def __init__(self, width: int, device: torch.device, basis: Tensor | None = None) -> None:
        """Start with no tokens.

        Args:
            width: Length of a hidden state.
            device: Where the sums are kept.
            basis: Orthonormal columns, (width, size) float64 on ``device``; None for the identity.
        """
        size = width if basis is None else basis.shape[1]
        self.count, self.dropped = 0.0, 0.0
        self.basis = basis
        self.mean_x, self.mean_y = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(2))
        self.xx, self.yx, self.yy = (torch.zeros(size, size, dtype=torch.float64, device=device) for _ in range(3))
        self.squares = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: two tensors of shape (tokens, width), of any floating dtype."""
        device = self.xx.device
        for part_x, part_y in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
            wide_x, wide_y = _float64(part_x, device), _float64(part_y, device)
            finite = torch.isfinite(wide_x).all(1) & torch.isfinite(wide_y).all(1)
            wide_x, wide_y = wide_x[finite], wide_y[finite]
            self.dropped += len(part_x) - len(wide_x)
            if not len(wide_x):
                continue
            self.squares += torch.stack(
                [wide_x.square().sum(), wide_y.square().sum(), (wide_y - wide_x).square().sum()]
            )
            if self.basis is not None:
                wide_x, wide_y = wide_x @ self.basis, wide_y @ self.basis
            mean_x, mean_y = wide_x.mean(0), wide_y.mean(0)
            wide_x, wide_y = wide_x - mean_x, wide_y - mean_y
            total = self.count + len(wide_x)
            step_x, step_y = mean_x - self.mean_x, mean_y - self.mean_y
            # What two centred sums lack to be one: the spread of their means about the common mean.
            weight = self.count * len(wide_x) / total
            self.xx += wide_x.T @ wide_x + weight * torch.outer(step_x, step_x)
            self.yx += wide_y.T @ wide_x + weight * torch.outer(step_y, step_x)
            self.yy += wide_y.T @ wide_y + weight * torch.outer(step_y, step_y)
            self.mean_x += step_x * (len(wide_x) / total)
            self.mean_y += step_y * (len(wide_x) / total)
            self.count = total

    def reduce(self, ranks: Ranks) -> None:
        """Make this the moments of the tokens of all ranks, the same on each. Two all-reduces: means, then the rest."""
        if ranks.size == 1:
            return
        device, size = self.xx.device, len(self.mean_x)
        counts = torch.tensor([self.count, self.dropped], dtype=torch.float64, device=device)
        first = torch.cat([counts, self.squares, self.count * self.mean_x, self.count * self.mean_y])
        first = ranks.sum(first) / ranks.copies
        total, dropped = float(first[0]), float(first[1])
        squares, sum_x, sum_y = first[2:].split([3, size, size])
        mean_x, mean_y = sum_x / max(total, 1.0), sum_y / max(total, 1.0)
        step_x, step_y = self.mean_x - mean_x, self.mean_y - mean_y
        second = torch.stack(
            [
                self.xx + self.count * torch.outer(step_x, step_x),
                self.yx + self.count * torch.outer(step_y, step_x),
                self.yy + self.count * torch.outer(step_y, step_y),
            ]
        )
        self.xx, self.yx, self.yy = (ranks.sum(second) / ranks.copies).unbind()
        self.count, self.dropped, self.mean_x, self.mean_y, self.squares = total, dropped, mean_x, mean_y, squares

    def covariances(self) -> Covariances:
        """The moments as covariances on the CPU, where they are decomposed."""
        scale = 1.0 / max(self.count - 1.0, 1.0)
        return Covariances(self.xx.cpu() * scale, self.yx.cpu() * scale, self.yy.cpu() * scale, self.count)

    @staticmethod
    def nbytes(size: int) -> int:
        """Bytes of the sums, and of what reducing them takes for a moment, for this many dimensions."""
        return 8 * (6 * size * size + 4 * size)


@dataclass(frozen=True, slots=True, eq=False)
class Covariances:
    """C_xx, C_yx and C_yy, (size, size) float64 on the CPU, with divisor N - 1, and the number N of tokens."""

    xx: Tensor
    yx: Tensor
    yy: Tensor
    count: float


class Sketch:
    """Finds a basis of the leading principal directions of x without a matrix of width x width.

    The range of C_xx G for a random G (Halko, Martinsson & Tropp 2011, algorithm 4.1), where C_xx G is a sum over
    tokens.
    """

    def __init__(self, width: int, size: int, device: torch.device, seed: int) -> None:
        """Draw G from ``seed``, the same on every rank; ``size`` is the number of columns of the basis."""
        draw = torch.Generator().manual_seed(seed)
        self._test = torch.randn(width, size, dtype=torch.float64, generator=draw).to(device)
        self._image = torch.zeros_like(self._test)
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._count = 0.0

    def add(self, x: Tensor) -> None:
        """Add tokens, (tokens, width)."""
        for part in x.split(_CHUNK):
            wide = _float64(part, self._mean.device)
            wide = wide[torch.isfinite(wide).all(1)]
            if not len(wide):
                continue
            mean = wide.mean(0)
            total = self._count + len(wide)
            step = mean - self._mean
            wide = wide - mean
            weight = self._count * len(wide) / total
            self._image += wide.T @ (wide @ self._test) + weight * torch.outer(step, step @ self._test)
            self._mean += step * (len(wide) / total)
            self._count = total

    def basis(self, ranks: Ranks) -> Tensor:
        """Orthonormal columns, (width, size), the same on every rank. Two all-reduces."""
        if ranks.size > 1:
            here = torch.tensor([self._count], dtype=torch.float64, device=self._mean.device)
            first = ranks.sum(torch.cat([here, self._count * self._mean]))
            step = self._mean - first[1:] / first[0].clamp(min=1.0)
            self._image = ranks.sum(self._image + self._count * torch.outer(step, step @ self._test))
        return torch.linalg.qr(self._image)[0]

    @staticmethod
    def nbytes(width: int, size: int) -> int:
        """Bytes kept for a width and a number of columns."""
        return 8 * (4 * width * size + width)


def _float64(part: Tensor, device: torch.device) -> Tensor:
    return part.detach().to(device).to(torch.float64)
