"""Changes that are nothing but rounding: to one twin of a pair of runs.

On shards every index is global: the rank that owns an element changes it, and ranks that hold copies change them alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .. import parallel
from ..errors import StabilityError
from .space import ShardSpace


class Perturbation:
    """None at all; the base of the others.

    Attributes:
        name: For reports.
    """

    name = "none"

    def reference(self) -> Perturbation:
        """What the other twin gets."""
        return Perturbation()

    def builder(self, build: Callable[[int], Any]) -> Callable[[int], Any]:
        """What makes the perturbed twin."""
        return build

    def before_step(self, step: int, space: ShardSpace) -> None:
        """Change weights before the forward of a step. No collective."""
        return None

    def step(self, space: ShardSpace) -> None:
        """Step the optimizers."""
        for optimizer in space.optimizers:
            optimizer.step()


class KScale(Perturbation):
    """theta <- theta - (lr k) (d / k), d the final direction, at every step (Sun et al., arXiv 2206.02001).

    The same for all k on paper. In floating point an odd k >= 3 rounds differently, by about one ulp of the
    update; a power of two is exact, so k = 1, 2 and 4 give the same bits. With Adam d is the normalized update. For
    SGD k = 1 is the optimizer's own step to the bit.

    The direction is taken from a step that starts from zero weights at learning rate 1, with weight decay done here:
    for optimizers whose step depends on the weights by weight decay alone.
    """

    def __init__(self, k: int = 3) -> None:
        """Choose k.

        Raises:
            StabilityError: k is no positive whole number.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise StabilityError(f"rank {parallel.this_rank()}: KScale k: expected a whole number >= 1, got {k!r}")
        self.k, self.name = k, f"kscale:{k}"

    @staticmethod
    def knows(optimizer: Optimizer) -> bool:
        """Whether its direction can be taken apart from its step."""
        return isinstance(optimizer, SGD | Adam | AdamW)

    def reference(self) -> Perturbation:
        """K = 1, by the same arithmetic."""
        return KScale(1)

    @torch.no_grad()
    def step(self, space: ShardSpace) -> None:
        """Step the optimizers.

        Raises:
            StabilityError: An optimizer is none of SGD, Adam and AdamW.
        """
        for optimizer in space.optimizers:
            if not self.knows(optimizer):
                raise StabilityError(
                    f"rank {parallel.this_rank()}: KScale knows torch.optim.SGD, Adam and AdamW, not "
                    f"{type(optimizer).__name__}; use OneUlp or RandomUlps"
                )
            self._step(optimizer)

    def _step(self, optimizer: Optimizer) -> None:
        moving = []
        settings = []
        for group in optimizer.param_groups:
            rate, decay = group["lr"], float(group["weight_decay"])
            direct = group.get("decoupled_weight_decay", isinstance(optimizer, AdamW))
            settings.append((group, rate, group["weight_decay"]))
            for handle in group["params"]:
                if handle.grad is None:
                    continue
                weights, gradient = parallel.local(handle), parallel.local(handle.grad)
                if decay and not direct:
                    gradient.add_(weights, alpha=decay)
                shrink = 1.0 - float(rate) * decay if direct else 1.0
                moving.append((weights, weights.clone(), float(rate), shrink))
                weights.zero_()
            group["lr"] = torch.ones_like(rate) if isinstance(rate, Tensor) else 1.0
            group["weight_decay"] = 0.0
        try:
            optimizer.step()
        finally:
            for group, rate, decay in settings:
                group["lr"], group["weight_decay"] = rate, decay
            for weights, before, rate, shrink in moving:
                direction = weights.neg().div_(self.k)
                weights.copy_(before if shrink == 1.0 else before.mul_(shrink))
                weights.add_(direction, alpha=-(rate * self.k))


class OneUlp(Perturbation):
    """One weight to the next larger number, once (Summers and Dinneen, arXiv 2103.04514)."""

    def __init__(self, name: str, index: int = 0, step: int = 0) -> None:
        """Choose the weight.

        Args:
            name: Of the parameter, without what wrappers put before it.
            index: Place in the flattened whole parameter.
            step: Before which step.
        """
        self.parameter, self.index, self.at = name, index, step
        self.name = f"ulp-one:{name},{index}"

    @torch.no_grad()
    def before_step(self, step: int, space: ShardSpace) -> None:
        """Change it where it lies.

        Raises:
            StabilityError: There is no such weight.
        """
        if step == self.at:
            element = space.element(self.parameter, self.index)
            if element is not None:
                element.copy_(torch.nextafter(element, torch.full_like(element, math.inf)))


class RandomUlps(Perturbation):
    """A fraction of all weights one number up or down, once (Kwok et al., arXiv 2506.13234)."""

    def __init__(self, fraction: float = 1.0, step: int = 0, seed: int = 0) -> None:
        """Choose how many.

        Args:
            fraction: Of the weights, 0 < fraction <= 1. Which ones depends on the sharding.
            step: Before which step.
            seed: Of the choice.
        """
        if not 0.0 < fraction <= 1.0:
            raise StabilityError(
                f"rank {parallel.this_rank()}: RandomUlps fraction: expected 0 < fraction <= 1, got {fraction!r}"
            )
        self.fraction, self.at, self.seed = fraction, step, seed
        self.name = f"ulp-all:{fraction:g}"

    @torch.no_grad()
    def before_step(self, step: int, space: ShardSpace) -> None:
        """Change this rank's share of them."""
        if step != self.at:
            return
        limit = math.sqrt(2.0) * float(torch.erfinv(torch.tensor(self.fraction, dtype=torch.float64)))
        for weights, draw in zip(space.live(), space.random(self.seed), strict=True):
            towards = torch.where(draw > 0, math.inf, -math.inf).to(weights.dtype)
            weights.copy_(torch.where(draw.abs() <= limit, torch.nextafter(weights, towards), weights))


class Rebuilt(Perturbation):
    """Another way to build the same run: DDP's bucket size, FSDP's grouping, another kernel. The noise of clusters.

    Parameters must lie on the ranks as in the first run. Sums of two numbers do not depend on their order: on two ranks
    another reduction order changes nothing.
    """

    def __init__(self, build: Callable[[int], Any], name: str = "rebuilt") -> None:
        """Take the other builder."""
        self._build, self.name = build, name

    def builder(self, build: Callable[[int], Any]) -> Callable[[int], Any]:
        """The other one."""
        return self._build
