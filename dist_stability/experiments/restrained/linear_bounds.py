"""R2: the linearised equation of one layer between its two bounds (the paper's Figure 3, Table 2); threshold formulas.

A kernel of 32 x 32 on a checkerboard of 256 x 256; a = -0.5, beta = 1, step 1e-8: K <- K + dt (G K / 4 - alpha K) with
the patches' Gram matrix G. Weight decay alpha must outweigh the image, alpha > 225^2 * 1024 / 4, and stay below 2 / dt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_stability.diagnostics.bounds import stability_bounds
from dist_stability.diagnostics.update_rule import UpdateRule
from dist_stability.experiments.restrained.bisection import bisect
from dist_stability.experiments.restrained.parts import Outcome, Part, Result, Settings, close, every, within

IMAGE, KERNEL, STEP = 256, 32, 1e-8
GROWS = {1.1e7: True, 1.2e7: True, 1.3e7: False, 1.9e8: False, 2.0e8: None, 2.1e8: True, 2.2e8: True}
"""The figure's seven curves; one is marginal."""

LOWER, UPPER = 0.25 * (IMAGE - KERNEL + 1) ** 2 * KERNEL**2, 2.0 / STEP
_SAID = {True: "grows", False: "decays", None: "marginal"}
STEPS, MARGINAL = 200, 1e-6
RATES, MOMENTA, DECAYS = (1e-3, 0.1, 1.0), (0.0, 0.5, 0.9), (0.0, 5e-4, 0.1)


class Kernel(nn.Module):
    """The linear layer, whose loss has the linearised equation for its gradient flow."""

    def __init__(self) -> None:
        """Start from fixed random numbers."""
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(KERNEL**2, dtype=torch.float64, generator=draw))

    def forward(self, gram: Tensor) -> Tensor:
        """- K'GK / 8."""
        return -0.125 * self.kernel @ gram @ self.kernel  # type: ignore[no-any-return]


def settings(quick: bool) -> list[Settings]:
    """The equation, and the formulas."""
    return [{"name": name, "steps": 20 if quick else STEPS} for name in ("equation", "formulas")]


def work(settings: Settings) -> Result:
    """One of the two."""
    return _equation(settings["steps"]) if settings["name"] == "equation" else {"errors": _formula_errors()}


def conclude(results: Sequence[Result]) -> Outcome:
    """Signs, bounds and formulas."""
    checks, rows = [], []
    for result in results:
        if "errors" in result:
            checks.append(within("threshold formulas against spectral radii, relative", result["errors"], high=1e-4))
            continue
        signs = []
        for (alpha, grows), factor, stable in zip(GROWS.items(), result["factors"], result["stable"], strict=True):
            sign = None if abs(factor - 1.0) <= MARGINAL else factor > 1.0
            signs.append(sign is grows and (grows is None or stable is not grows))
            rows.append([f"{alpha:g}", _SAID[grows], factor, stable])
        checks += [
            every("curves that grow or decay as published, and stability_bounds says so", signs),
            close("lower bound, bisected by stability_bounds", [result["lower"]], LOWER, within_fraction=0.005),
            close("upper bound", [result["upper"]], UPPER, within_fraction=0.005),
            close("largest eigenvalue / 4 of the patches' Gram matrix", [result["gram"]], LOWER, within_fraction=1e-4),
        ]
    return Outcome(checks, ("alpha", "published", "factor per step", "stability_bounds: stable"), rows)


@cache
def gram() -> Tensor:
    """Of the patches of the checkerboard, (1024, 1024) float64, exact."""
    places = torch.arange(IMAGE)
    image = 1.0 - 2.0 * ((places[:, None] + places) % 2)
    patches = functional.unfold(image[None, None], KERNEL)[0]  # sums of at most 225^2 ones: exact in float32
    return (patches @ patches.T).double()


def _equation(steps: int) -> Result:
    gram_matrix = gram()

    def factor(alpha: float) -> float:
        kernel, before = Kernel().kernel.detach(), math.nan
        for _ in range(steps):
            before = float(kernel.norm())
            kernel = kernel + STEP * (0.25 * gram_matrix @ kernel - alpha * kernel)
        return float(kernel.norm()) / before

    def stable(alpha: float) -> bool:
        model = Kernel()
        optimizer = torch.optim.SGD(model.parameters(), lr=STEP, weight_decay=alpha)
        return stability_bounds(model, optimizer, lambda m, batch: m(batch), [gram_matrix], steps=4).stable

    middle = 1e8
    return {
        "factors": [factor(alpha) for alpha in GROWS],
        "stable": [stable(alpha) for alpha in GROWS],
        "lower": bisect(stable, middle, 1e6, 30),
        "upper": bisect(stable, middle, 1e9, 30),
        "gram": 0.25 * float(torch.linalg.eigvalsh(gram_matrix)[-1]),
    }


def _formula_errors() -> list[float]:
    """Relative error of the upper limits against where the update's own 2 x 2 matrix stops contracting."""
    errors = []
    for lr, mu, decay in itertools.product(RATES, MOMENTA, DECAYS):
        kinds = [(UpdateRule.sgd(lr, mu, weight_decay=decay), _sgd(lr, mu, decay, False))]
        kinds.append((UpdateRule.adam(lr, mu, weight_decay=decay, decoupled=True), _adam(lr, mu, decay)))
        if mu:
            kinds.append((UpdateRule.sgd(lr, mu, nesterov=True, weight_decay=decay), _sgd(lr, mu, decay, True)))
        for rule, radius in kinds:
            found = bisect(partial(_below_one, radius), 1e-3 / lr, 1e3 / lr, 60)
            errors.append(abs(found / rule.stable.upper - 1.0))
    return errors


def _sgd(lr: float, mu: float, decay: float, nesterov: bool) -> Callable[[float], float]:
    def radius(s: float) -> float:
        g = s + decay
        look = 1.0 + mu if nesterov else 1.0
        return _radius([1.0 - lr * g * look, -lr * mu * (mu if nesterov else 1.0)], [g, mu])

    return radius


def _adam(lr: float, beta1: float, decay: float) -> Callable[[float], float]:
    def radius(s: float) -> float:
        g = (1.0 - beta1) * s
        return _radius([1.0 - lr * decay - lr * g, -lr * beta1], [g, beta1])

    return radius


def _below_one(radius: Callable[[float], float], s: float) -> bool:
    return radius(s) < 1.0


def _radius(*rows: list[float]) -> float:
    return float(torch.linalg.eigvals(torch.tensor(rows, dtype=torch.float64)).abs().max())


PART = Part("R2", "Linear equation of one layer (Figure 3), threshold formulas", settings, work, conclude)
