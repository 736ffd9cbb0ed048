"""The loss's curvature as the optimizer's step sees it: scaled so that the edge of stability lies at 2 for all of them.

With D the elementwise step per unit of gradient (learning rate, Adam's denominator, what momentum makes of the limit)
the scaled curvature is the symmetric matrix D^(1/2) H D^(1/2) plus a diagonal of weight decay: learning rates,
denominators and decay may differ from element to element. Exact where all groups have the same momentum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW

from .. import parallel
from ..errors import StabilityError
from .curvature import Products
from .space import ShardSpace, Vector
from .update_rule import UpdateRule

NOISE = 100.0
"""Adam's second moments below so many rounding errors of the typical one are noise; see :meth:`Scaling.of`."""


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """One entry for each parameter of a space.

    Attributes:
        roots: Square root of D. 0 for what does not move: frozen, without learning rate, or left out.
        rules: The rule of its group; None without scaling.
        left_out: Fraction of the elements under Adam that were left out as noise.
    """

    roots: tuple[Tensor | float, ...]
    rules: tuple[UpdateRule | None, ...]
    left_out: float = 0.0

    @classmethod
    def none(cls, space: ShardSpace) -> Scaling:
        """The Hessian as it is."""
        roots = tuple(1.0 if handle.requires_grad else 0.0 for handle in space.handles)
        return cls(roots, (None,) * len(roots))

    @classmethod
    @torch.no_grad()
    def of(cls, space: ShardSpace) -> Scaling:
        """As the optimizers of the space stand now. Their state is only read.

        Adam's second moment must mean something: take at least some five steps before. Elements are left out whose
        root of it is below ``NOISE`` rounding errors of the root mean square over all elements: their true gradient
        is 0 (the bias of an attention's keys, rows of an embedding that no batch has used), Adam divides rounding
        errors by rounding errors there, and the finite difference would measure nothing else. On what remains the
        largest eigenvalue is not larger than on the whole.

        Collectives: two all-reduces if there is an Adam. Waits for the device.

        Raises:
            StabilityError: An optimizer that is not known (see :meth:`UpdateRule.of`), or Adam before its first step.
        """
        rules: dict[int, UpdateRule] = {}
        for optimizer in space.optimizers:
            for group in optimizer.param_groups:
                rules.update(dict.fromkeys(map(id, group["params"]), UpdateRule.of(optimizer, group)))
        moments = _all_moments(space)
        for number, optimizer in enumerate(space.optimizers):
            adaptive = [h for group in optimizer.param_groups for h in group["params"] if rules[id(h)].adaptive]
            # A rank whose shards are all empty may have no state, and is right.
            if not any(id(h) in moments for h in adaptive) and any(parallel.local(h).numel() for h in adaptive):
                raise StabilityError(
                    f"rank {parallel.this_rank()}: optimizer {number} ({type(optimizer).__name__}) has no second "
                    "moments yet; take at least five steps before its stability is measured"
                )
        order = [id(handle) for handle in space.handles]
        floor, count = _floor(space, moments) if any(rule.adaptive for rule in rules.values()) else (0.0, 0.0)
        roots: list[Tensor | float] = []
        out: list[Tensor | float] = [0.0] * len(order)
        for index, place in enumerate(order):
            rule = rules[place]
            rate = rule.gain * rule.learning_rate if space.handles[index].requires_grad else 0.0
            if not rule.adaptive:
                roots.append(math.sqrt(rate))
            elif place not in moments:
                roots.append(0.0)  # unused so far: its gradient was None at every step
            else:
                one = moments[place]
                noise = one.root <= floor
                out[index] = noise.sum()
                denominator = one.root.add_(one.eps).mul_(one.correction)
                roots.append(denominator.reciprocal_().mul_(rate).sqrt_().masked_fill_(noise, 0.0))
        left_out = space.sum_over_elements([out])[0] / count if floor else 0.0
        return cls(tuple(roots), tuple(rules[place] for place in order), left_out)

    @torch.no_grad()
    def direction(self, vector: Vector) -> Vector:
        """D^(1/2) times a vector: from scaled to parameter coordinates."""
        return [part * root for part, root in zip(vector, self.roots, strict=True)]

    @torch.no_grad()
    def product(self, products: Products, vector: Vector, relative_step: float | None = None) -> Vector:
        """The scaled curvature times a vector, weight decay included, as it decides about the lower side.

        Collectives: those of :meth:`Products.hessian`.
        """
        curved = products.hessian(self.direction(vector), relative_step)
        for part, root, rule, other in zip(curved, self.roots, self.rules, vector, strict=True):
            part.mul_(root)
            if rule is None:
                continue
            if rule.coupled:
                part.add_(other * root * root, alpha=rule.coupled)
            if shrinking := _shrinking(rule, root):
                part.add_(other, alpha=rule.gain * shrinking)
        return curved

    def upper_excess(self, space: ShardSpace, vector: Vector) -> float:
        """What the quotient of a unit vector has to be raised by for the upper side; 0 but for decoupled decay.

        Decoupled decay takes part in the upper limit without momentum's help. (1 - gain) * learning rate * decay.

        Collectives: one all-reduce.
        """
        # Summed here and then over ranks: a rank may have no state, and so no root, where its shard is empty.
        terms: list[Tensor | float] = []
        for part, rule, root in zip(vector, self.rules, self.roots, strict=True):
            excess = 0.0 if rule is None else (1.0 - rule.gain) * _shrinking(rule, root)
            terms.append((part * part).sum(dtype=torch.float64) * excess if excess else 0.0)
        return space.sum_over_elements([terms])[0]

    def gain(self, space: ShardSpace, vector: Vector) -> float:
        """The gain along a unit vector. Collectives: one all-reduce."""
        squares = space.squares(vector).values()
        return sum(
            square * (1.0 if rule is None else rule.gain) for square, rule in zip(squares, self.rules, strict=True)
        )


def _shrinking(rule: UpdateRule, root: Tensor | float) -> float:
    """Learning rate times decoupled decay; 0 for what is not stepped."""
    return 0.0 if isinstance(root, float) and root == 0.0 else rule.learning_rate * rule.decoupled


@dataclass(frozen=True, slots=True, eq=False)
class _Moments:
    """Adam's denominator of one parameter: (root + eps) * correction."""

    root: Tensor
    eps: float
    correction: float


@torch.no_grad()
def noise(space: ShardSpace) -> list[Tensor | None]:
    """For each parameter which of its elements Adam knows only rounding errors of; None where there is no Adam.

    Collectives: one all-reduce if any parameter is under Adam. Waits for the device.
    """
    if not any(isinstance(optimizer, Adam | AdamW) for optimizer in space.optimizers):
        return [None] * len(space.handles)
    moments = _all_moments(space)
    floor, _ = _floor(space, moments)
    found = [moments.get(id(handle)) for handle in space.handles]
    return [None if one is None else one.root <= floor for one in found]


def _all_moments(space: ShardSpace) -> dict[int, _Moments]:
    """Of every parameter under Adam that was stepped and is not frozen, by identity."""
    live = dict(zip(map(id, space.handles), space.live(), strict=True))
    moments = {}
    for optimizer in space.optimizers:
        states = parallel.optimizer_state(optimizer)
        for group in optimizer.param_groups if isinstance(optimizer, Adam | AdamW) else ():
            for handle in group["params"]:
                state = states.get(handle) or {}
                if handle.requires_grad and "exp_avg_sq" in state:
                    moments[id(handle)] = _moments(group, state, live[id(handle)])
    return moments


def _floor(space: ShardSpace, moments: dict[int, _Moments]) -> tuple[float, float]:
    """The root of a second moment at which it is noise, and the number of elements under Adam. One all-reduce."""
    known = [moments.get(id(handle)) for handle in space.handles]
    squares, count = space.sum_over_elements(
        [
            [0.0 if one is None else one.root.double().square().sum() for one in known],
            [0.0 if one is None else float(one.root.numel()) for one in known],
        ]
    )
    precision = max(torch.finfo(parallel.local(handle).dtype).eps for handle in space.handles)
    return (NOISE * precision * math.sqrt(squares / count) if count else 0.0), count


def _moments(group: dict[str, Any], state: dict[str, Any], live: Tensor) -> _Moments:
    square = parallel.local(state.get("max_exp_avg_sq", state["exp_avg_sq"]))
    square = (torch.view_as_real(square) if square.is_complex() else square).to(live.dtype)
    steps = state["step"]
    count = float(parallel.local(steps) if isinstance(steps, Tensor) else steps)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    # The next step's correction of the first moment, the present one's of the second, which is what we have of it.
    return _Moments((square / (1.0 - beta2**count)).sqrt_(), float(group["eps"]), 1.0 - beta1 ** (count + 1.0))
