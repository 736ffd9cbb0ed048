"""How sharp the loss is where the weights are, as the optimizer's step sees it: 1 is the edge of stability.

:class:`Sharpness` keeps the direction in which the loss curves most from one measurement to the next. The direction
turns slowly, so that one product of the Hessian with it, two forwards and backwards, is a measurement that a training
loop can afford every 50 steps. The number is a Rayleigh quotient: never above the truth (but for the finite
difference's error), and as far below it as the direction has turned since. :meth:`Sharpness.ends` is thorough, for
both ends.

The direction is not the controller's business: it is not rolled back, and a checkpoint does not have it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .. import parallel
from ..errors import StabilityError
from .curvature import Curvature, LossFn, Products
from .eigen import Pair, lanczos, normalized
from .scaling import Scaling
from .space import Vector, total

AGREEMENT = 0.1
"""Two step sizes must give the same quotient within this fraction of the larger one."""


@dataclass(frozen=True, slots=True)
class SharpnessReading:
    """One measurement, the same on every rank. Numbers are NaN where something was not finite.

    Attributes:
        eigenvalue: Largest eigenvalue of the scaled curvature (of the Hessian without scaling), from below.
        margin: eigenvalue / 2: above 1 the step overshoots in that direction. None without scaling.
        residual: |A u - eigenvalue u| / |eigenvalue|: an eigenvalue is that close, relatively. inf at eigenvalue 0.
        reliable: The quotient at a third of the finite difference's length is the same within 10 %. None if not
            checked, and with exact products.
        products: Hessian-vector products made.
        loss: Mean loss over the batches of all ranks, at a weight vector beside the present one.
        shares: Of the squared direction, by parameter; adds up to 1.
        participation: 1 / sum of squared shares: 1 when one parameter has it all, their number when all share it.
        left_out: Fraction of the elements under Adam that were left out; see :meth:`~.scaling.Scaling.of`.
    """

    eigenvalue: float
    margin: float | None
    residual: float
    reliable: bool | None
    products: int
    loss: float
    shares: dict[str, float]
    participation: float
    left_out: float

    @property
    def largest_shares(self) -> list[tuple[str, float]]:
        """The three parameters with the largest shares."""
        return sorted(self.shares.items(), key=lambda share: -share[1])[:3]


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """Both ends of the scaled curvature, at one point of training.

    Attributes:
        lower: Pair of the lower side; an eigenvalue below 0 grows away at any learning rate.
        upper: Pair of the upper side, decoupled weight decay included.
        lower_gain: What momentum makes of the limit along the lower direction.
        products: Hessian-vector products made.
        reliable: See :class:`SharpnessReading`, of the upper end.
        shares: Shares of the upper direction.
        loss: See :class:`SharpnessReading`.
    """

    lower: Pair
    upper: Pair
    lower_gain: float
    products: int
    reliable: bool | None
    shares: dict[str, float]
    loss: float


class Sharpness:
    """Measures the largest eigenvalue of the scaled curvature, each time from where the last time ended.

    Leaves no trace in the run; see :mod:`.curvature` for that, for what ``loss_fn`` and ``batches`` are, and for the
    entry contract (at a step boundary, every rank together). Cost: each product is two forwards and backwards on
    ``batches``; memory: the kept direction, a copy of the weights, two gradients and, for Adam, one tensor more, all of
    the size of the local shards in their precision.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        loss_fn: LossFn,
        batches: Iterable[Any],
        *,
        scaled: bool = True,
        relative_step: float | None = None,
        exact: bool = False,
        seed: int = 0,
    ) -> None:
        """Check and keep; measures nothing.

        Args:
            model: As the loop calls it, wrappers included.
            optimizer: SGD, Adam or AdamW, or several of them; anything with ``scaled=False``.
            loss_fn: ``loss_fn(model, batch)``, a 0-d tensor with a graph.
            batches: Of this rank's data replica.
            scaled: As the optimizer sees it; False for the Hessian itself.
            relative_step: See :class:`~.curvature.Curvature`.
            exact: Differentiate twice.
            seed: Of the first direction, and of the random streams during each evaluation.

        Raises:
            StabilityError: See :class:`~.curvature.Curvature`.
        """
        self.curvature = Curvature(
            model, optimizer, loss_fn, batches, relative_step=relative_step, exact=exact, seed=seed
        )
        self.scaled, self.seed = scaled, seed
        self._direction: Vector | None = None
        self._shift = 0.0

    def restart(self) -> None:
        """Forget the direction: the next measurement starts from a random one."""
        self._direction, self._shift = None, 0.0

    def measure(self, products: int = 1, *, check: bool = False) -> SharpnessReading:
        """Power iteration from the kept direction.

        Args:
            products: Hessian-vector products, >= 1. The first measurement of all needs some twenty.
            check: One product more at the end, for ``reliable``.

        Collectives: for each product those of two forwards and backwards and four all-reduces; two more at the end.

        Raises:
            StabilityError: See :meth:`~.scaling.Scaling.of` and :class:`~.curvature.Products`.
        """
        return self._iterate(products, None, check)

    def converge(self, tolerance: float = 1e-3, limit: int = 100, *, check: bool = True) -> SharpnessReading:
        """Power iteration until the eigenvalue changes by less than a fraction, or for ``limit`` products."""
        return self._iterate(limit, tolerance, check)

    def ends(self, steps: int = 20) -> Ends:
        """Both ends, by Lanczos from the kept direction and a random one; the kept direction becomes the upper end's.

        Args:
            steps: Hessian-vector products, and vectors of the size of the local shards that are held meanwhile.

        Collectives: for each step those of two forwards and backwards and six all-reduces, and some at the end.

        Raises:
            StabilityError: See :meth:`measure`.
        """
        if steps < 1:
            raise StabilityError(f"rank {parallel.this_rank()}: steps must be at least 1, got {steps}")
        space, scaling = self.curvature.space, self._scaling()
        start = self._masked(scaling, space.random(self.seed))
        if self._direction is not None:
            normalized(space, start)
            for part, kept in zip(start, self._direction, strict=True):
                part.add_(kept)
        with self.curvature.session() as products, torch.no_grad():
            lower, upper, made = lanczos(space, lambda v: scaling.product(products, v), start, steps)
            self._direction = upper.vector
            reliable = self._check(products, scaling, upper.vector, upper.value)
            loss = self._loss(products)
        raised = upper.value + scaling.upper_excess(space, upper.vector)
        return Ends(
            lower,
            Pair(raised, upper.residual, upper.vector),
            scaling.gain(space, lower.vector),
            made + (0 if reliable is None else 1),
            reliable,
            space.squares(upper.vector),
            loss,
        )

    @torch.no_grad()
    def _iterate(self, limit: int, tolerance: float | None, check: bool) -> SharpnessReading:
        if limit < 1:
            raise StabilityError(f"rank {parallel.this_rank()}: at least 1 product is needed, got {limit}")
        space, scaling = self.curvature.space, self._scaling()
        if self._direction is None:
            self._direction = normalized(space, self._masked(scaling, space.random(self.seed)))
        made, value, before, square = 0, math.nan, math.nan, math.nan
        with self.curvature.session() as products:
            measured = self._direction
            while made < limit:
                measured = self._direction
                image = scaling.product(products, measured)
                value, square = space.dots([(measured, image), (image, image)])
                made += 1
                if not math.isfinite(square):
                    self.restart()
                    break
                self._advance(image, measured, value)
                if tolerance is not None and value > 0.0 and abs(value - before) < tolerance * value:
                    break
                before = value
            reliable = self._check(products, scaling, measured, value) if check and math.isfinite(square) else None
            made += 0 if reliable is None else 1
            loss = self._loss(products)
        residual = math.sqrt(max(square - value * value, 0.0)) if math.isfinite(square) else math.nan
        upper = value + scaling.upper_excess(space, measured)
        shares = space.squares(measured)
        return SharpnessReading(
            eigenvalue=upper,
            margin=upper / 2.0 if self.scaled else None,
            residual=residual / abs(value) if value else math.inf,
            reliable=reliable,
            products=made,
            loss=loss,
            shares=shares,
            participation=participation(shares),
            left_out=scaling.left_out,
        )

    def _advance(self, image: Vector, measured: Vector, value: float) -> None:
        """The next direction, in place of the product."""
        # Where the most negative eigenvalue is the largest in size, the iteration would run to that end. The shift
        # makes the upper end the largest again, at the price of slower convergence.
        self._shift = max(self._shift, -1.1 * value)
        if self._shift:
            for part, other in zip(image, measured, strict=True):
                part.add_(other, alpha=self._shift)
        length = self.curvature.space.length(image)
        if length == 0.0:  # nothing curves along it, or exactly as much as the shift: stay
            return
        for part in image:
            part.div_(length)
        self._direction = image

    def _check(self, products: Products, scaling: Scaling, vector: Vector, value: float) -> bool | None:
        """Whether a third of the finite difference's length gives the same quotient. One product."""
        if self.curvature.exact:
            return None
        image = scaling.product(products, vector, self.curvature.relative_step / 3.0)
        other = self.curvature.space.dots([(vector, image)])[0]
        return bool(abs(value - other) <= AGREEMENT * max(abs(value), abs(other)))  # False for NaN

    def _scaling(self) -> Scaling:
        space = self.curvature.space
        return Scaling.of(space) if self.scaled else Scaling.none(space)

    def _masked(self, scaling: Scaling, vector: Vector) -> Vector:
        """Nothing where nothing moves."""
        for part, root in zip(vector, scaling.roots, strict=True):
            if isinstance(root, float) and root == 0.0:
                part.zero_()
        return vector

    def _loss(self, products: Products) -> float:
        space = self.curvature.space
        mine = torch.zeros((), dtype=torch.float64) if products.loss is None else products.loss
        value = parallel.local(mine).to(space.device, torch.float64).reshape(())
        summed, count = total(torch.stack([value, torch.ones_like(value)]))
        return summed / count


def participation(shares: dict[str, float]) -> float:
    """1 / sum of squares of shares that add up to 1."""
    squares = sum(share * share for share in shares.values())
    return 1.0 / squares if squares else math.nan
