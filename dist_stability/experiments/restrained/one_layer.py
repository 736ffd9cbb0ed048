"""The paper's one-layer network on a checkerboard, and the one number it comes down to. Shared by R3 and R4.

All patches of the image are plus or minus one pattern c, so that only m = <c, K> matters::

    m <- m - dt (alpha m + 1024 (sigmoid(p(m)) - 1) p'(m)),   p(m) = w r(m) + (1 - w) r(-m),   r(z) = z sigmoid(z)

with the fraction w = (113^2 + 112^2) / 225^2 of patches that begin white. Everything else shrinks.
"""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_stability.diagnostics.twins import Build, TwinRun
from dist_stability.experiments.restrained.linear_bounds import IMAGE, KERNEL

WHITE, SIZE, DECAY = (113**2 + 112**2) / 225**2, KERNEL**2, 20.0


class Number(nn.Module):
    """The reduced network: its loss as a function of m, without weight decay."""

    def __init__(self, value: float) -> None:
        """Start at a value."""
        super().__init__()
        self.m = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self) -> Tensor:
        """0-d."""
        p = WHITE * functional.silu(self.m) + (1.0 - WHITE) * functional.silu(-self.m)
        return SIZE * functional.softplus(-p)


class Network(nn.Module):
    """The network itself: convolution, Swish, average, sigmoid, cross-entropy with label 1."""

    def __init__(self, value: float, seed: int = 0) -> None:
        """Random weights whose product with the pattern is ``value``."""
        super().__init__()
        places = torch.arange(IMAGE)
        self.image = (1.0 - 2.0 * ((places[:, None] + places) % 2)).double()[None, None]
        self.pattern = self.image[0, 0, :KERNEL, :KERNEL].clone()
        kernel = torch.randn(KERNEL, KERNEL, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        kernel += (value - float((kernel * self.pattern).sum())) / SIZE * self.pattern
        self.kernel = nn.Parameter(kernel)

    def forward(self) -> Tensor:
        """The loss, 0-d."""
        p = functional.silu(functional.conv2d(self.image, self.kernel[None, None])).mean()
        return functional.softplus(-p)

    @property
    def number(self) -> float:
        """The product with the pattern."""
        return float((self.kernel.detach() * self.pattern).sum())


def number_run(lr: float) -> Build:
    """Builds runs of the reduced network under SGD; the seed says where m starts."""

    def build(seed: int) -> TwinRun:
        model = Number(1.0 + 0.1 * seed)
        return TwinRun(model, torch.optim.SGD(model.parameters(), lr=lr, weight_decay=DECAY), lambda _: model())

    return build


def next_number(m: float, lr: float) -> float:
    """One step of the map."""
    return m - lr * _slope(m)[0]


def stretch(m: float, lr: float) -> float:
    """Derivative of the map: what a small difference at m is multiplied by."""
    return 1.0 - lr * _slope(m)[1]


def exponent(m: float, lr: float, steps: int) -> float:
    """Lyapunov exponent per step by the map's derivative; the first fifth of the steps does not count."""
    found = []
    for step in range(steps):
        if step >= steps // 5:
            found.append(math.log(max(abs(stretch(m, lr)), 1e-300)))
        m = next_number(m, lr)
    return fmean(found)


def curvature(m: float) -> float:
    """Second derivative of the loss with weight decay."""
    return _slope(m)[1]


def _slope(m: float) -> tuple[float, float]:
    """First and second derivative of the loss with weight decay."""
    s = 1.0 / (1.0 + math.exp(-m)) if m >= 0 else math.exp(m) / (1.0 + math.exp(m))
    bend = s * (1.0 - s)
    # r'(z) = s + z s(1-s), and r(-z) = r(z) - z: p = r(m) - (1 - w) m
    first = s + m * bend - (1.0 - WHITE)
    second = bend * (2.0 + m * (1.0 - 2.0 * s))
    p = m * s - (1.0 - WHITE) * m
    q = 1.0 / (1.0 + math.exp(min(p, 700.0)))  # 1 - sigmoid(p)
    return DECAY * m - SIZE * q * first, DECAY + SIZE * (q * (1.0 - q) * first**2 - q * second)
