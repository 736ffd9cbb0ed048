"""Which curvatures an optimizer's step can bear: the formulas, and the scaling that brings every optimizer to one edge.

Near a point the loss is a quadratic, and the step is linear in each eigendirection. It contracts for eigenvalues s in
an open interval, checked in the tests against the spectral radius of the update's 2 x 2 matrix (eta learning rate, mu
momentum, a coupled and w decoupled weight decay)::

    SGD              -a < s < 2 / eta - a
    SGD, momentum    -a < s < (2 + 2 mu) / eta - a
    SGD, Nesterov    -a < s < (2 + 2 mu) / (eta (1 + 2 mu)) - a
    Adam             -a < s < (2 + 2 beta1) / (eta (1 - beta1)) - a       s of P^-1 H; a where P is the identity
    AdamW            -w < s < (1 + beta1) (2 - eta w) / (eta (1 - beta1))     s of P^-1 H

with P = (1 - beta1^(t+1)) (sqrt(v^) + eps) and H the Hessian of the loss without weight decay (Cohen et al.,
arXiv 2103.00065 and 2207.14484; the lower side: Sun et al., arXiv 2206.02001). The upper side is the edge of stability.
No step size cures the lower one: decay must outweigh the most negative curvature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import SGD, Adam, AdamW, Optimizer

from .. import parallel
from ..errors import StabilityError


@dataclass(frozen=True, slots=True)
class StableRange:
    """The open interval of curvatures at which an update contracts.

    Attributes:
        lower: Curvature below which it grows away, at any learning rate.
        upper: Curvature above which it overshoots further each time.
    """

    lower: float
    upper: float

    def __contains__(self, curvature: float) -> bool:
        return self.lower < curvature < self.upper


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """One parameter group's step, as far as stability goes.

    Attributes:
        learning_rate: eta, > 0 where it moves anything.
        gain: What momentum makes of the limit: curvature * gain * learning rate has its edge at 2.
        coupled: Weight decay that is added to the gradient.
        decoupled: Weight decay that shrinks the weights directly.
        adaptive: The gradient is divided by Adam's second moment.
    """

    learning_rate: float
    gain: float = 1.0
    coupled: float = 0.0
    decoupled: float = 0.0
    adaptive: bool = False

    @classmethod
    def sgd(
        cls,
        learning_rate: float,
        momentum: float = 0.0,
        *,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> UpdateRule:
        """``torch.optim.SGD`` with these settings."""
        if nesterov:
            return cls(learning_rate, (1.0 + 2.0 * momentum) / (1.0 + momentum), weight_decay)
        # Without momentum torch keeps no buffer, and dampening does nothing.
        return cls(learning_rate, (1.0 - dampening) / (1.0 + momentum) if momentum else 1.0, weight_decay)

    @classmethod
    def adam(
        cls, learning_rate: float, beta1: float = 0.9, *, weight_decay: float = 0.0, decoupled: bool = False
    ) -> UpdateRule:
        """``torch.optim.Adam``, or ``AdamW`` with ``decoupled``; its curvature is that of P^-1 H."""
        coupled, direct = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
        return cls(learning_rate, (1.0 - beta1) / (1.0 + beta1), coupled, direct, adaptive=True)

    @classmethod
    def of(cls, optimizer: Optimizer, group: Mapping[str, Any]) -> UpdateRule:
        """The rule of one parameter group. Waits for the device if the learning rate is a tensor there.

        Raises:
            StabilityError: The optimizer is none of SGD, Adam and AdamW, or it maximizes.
        """
        kind = type(optimizer).__name__
        if group.get("maximize"):
            raise StabilityError(
                f"rank {parallel.this_rank()}: {kind} has maximize=True; stability is defined for descent. Negate the "
                "loss instead."
            )
        rate, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
        if isinstance(optimizer, SGD):
            return cls.sgd(
                rate,
                float(group["momentum"]),
                dampening=float(group["dampening"]),
                nesterov=bool(group["nesterov"]),
                weight_decay=decay,
            )
        if isinstance(optimizer, Adam | AdamW):
            # Up to torch 2.6 or so AdamW is a class of its own; later it is an Adam with this setting.
            decoupled = bool(group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))
            return cls.adam(rate, float(group["betas"][0]), weight_decay=decay, decoupled=decoupled)
        raise StabilityError(
            f"rank {parallel.this_rank()}: no stability limit is known for {kind}, only for torch.optim.SGD, Adam and "
            "AdamW. Measure the curvature without the optimizer (scaled=False)."
        )

    @property
    def stable(self) -> StableRange:
        """Curvatures at which the update contracts; see the module."""
        upper = (2.0 - self.learning_rate * self.decoupled) / (self.gain * self.learning_rate) - self.coupled
        return StableRange(-(self.coupled + self.decoupled), upper)
