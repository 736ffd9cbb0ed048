"""Both stability bounds at this point of training: may the learning rate be this large, is weight decay large enough?

The linearised update contracts in every direction if and only if each eigenvalue of the (preconditioned) Hessian lies
in the range of :class:`~.update_rule.UpdateRule`. The upper end is the edge of stability; the lower end is the other
CFL condition of Sun et al. (arXiv 2206.02001), which no learning rate cures.

What this is not: a learning rate to set. Curvature rises and falls with training (progressive sharpening, warm-up), and
training sits at the edge for long stretches without harm; tuners that sit at the limit end worse (Roulet et al., arXiv
2407.06183). With small batches the number to compare is the batch's own, below the largest eigenvalue.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .. import parallel
from ..errors import StabilityError
from .curvature import LossFn
from .sharpness import Sharpness, participation

LOWER_NOTABLE = 0.1
"""Growth per step below which negative curvature is normal early in training."""


@dataclass(frozen=True, slots=True)
class StabilityBounds:
    """Where the update stands between its two bounds, at this point; the same on every rank.

    Attributes:
        upper_margin: Largest scaled eigenvalue / 2, at the present learning rates: above 1 that direction overshoots
            further each step. From below: a Lanczos value never exceeds the eigenvalue.
        upper_residual: Its residual, relative to the eigenvalue.
        lower_violation: What the most unstable direction of the lower side grows by per step, without momentum's help:
            learning rate times (most negative curvature beyond weight decay), preconditioned with Adam; 0 if none does.
        lower_residual: Residual of that eigenvalue, in the same unit.
        peak_factor: The learning rate's coming peak over the present one, as given.
        peak_margin: upper_margin at the peak, if curvature and second moments stay what they are.
        headroom: The factor by which all learning rates could grow before upper_margin is 1; inf without curvature.
        warmup: Fraction of the peak learning rate at which the margin is 1 now, at most 1: a warm-up that begins higher
            begins unstable.
        reliable: Two lengths of the finite difference agree; None if exact.
        largest_shares: The three parameters with the largest shares of the upper direction.
        participation: Number of parameters over which it spreads.
        loss: Mean loss over the batches.
        products: Hessian-vector products made.
    """

    upper_margin: float
    upper_residual: float
    lower_violation: float
    lower_residual: float
    peak_factor: float
    peak_margin: float
    headroom: float
    warmup: float
    reliable: bool | None
    largest_shares: tuple[tuple[str, float], ...]
    participation: float
    loss: float
    products: int

    @property
    def stable(self) -> bool:
        """Both bounds hold at the present learning rates. False if something was not finite."""
        return self.upper_margin < 1.0 and self.lower_violation == 0.0

    def text(self) -> str:
        """A few lines for people."""
        lines = [
            f"At this point the sharpest direction takes {self.upper_margin:.3g} of what the step can bear (1 is the "
            f"edge of stability; a lower bound, residual {self.upper_residual:.2g})."
        ]
        if self.peak_factor != 1.0:
            lines.append(
                f"At {self.peak_factor:.4g} times the present learning rate it would take {self.peak_margin:.3g}, if "
                f"the curvature stayed what it is; a warm-up would begin stable up to {self.warmup:.2g} of that peak."
            )
        if self.lower_violation > LOWER_NOTABLE:
            lines.append(
                f"Negative curvature grows by {self.lower_violation:.3g} per step, more than weight decay takes back; "
                "no smaller learning rate cures that, it only takes more steps."
            )
        elif self.lower_violation > 0.0:
            lines.append(
                f"Negative curvature of {self.lower_violation:.2g} per step beyond weight decay: usual early on."
            )
        names = ", ".join(f"{name} {share:.0%}" for name, share in self.largest_shares)
        lines.append(f"The direction lies in {names}.")
        if self.reliable is False:
            lines.append(
                "Unreliable: another length of the finite difference gives another value; change relative_step."
            )
        return "\n".join(lines)


def stability_bounds(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    steps: int = 20,
    peak_factor: float = 1.0,
    relative_step: float | None = None,
    exact: bool = False,
    seed: int = 0,
) -> StabilityBounds:
    """Measure both bounds where the run stands. Leaves no trace, changes no learning rate.

    For Adam and AdamW call it after some five steps or more: before, the second moments say nothing.

    Args:
        model: As the loop calls it, wrappers included.
        optimizer: SGD, Adam or AdamW, or several.
        loss_fn: ``loss_fn(model, batch)``, a 0-d tensor with a graph, weight decay not in it.
        batches: Of this rank's data replica; the more, the nearer to the whole loss.
        steps: Lanczos steps, each two forwards and backwards; so many vectors like the local shards are held.
        peak_factor: Largest learning rate of the schedule to come over the present one, > 0.
        relative_step: See :class:`~.curvature.Curvature`.
        exact: Differentiate twice.
        seed: Of the first direction and of the evaluations.

    Collectives: see :meth:`~.sharpness.Sharpness.ends`.

    Raises:
        StabilityError: See :class:`~.sharpness.Sharpness`; or ``peak_factor`` is no positive number.
    """
    if not (math.isfinite(peak_factor) and peak_factor > 0):
        raise StabilityError(f"rank {parallel.this_rank()}: peak_factor must be a positive number, got {peak_factor!r}")
    measured = Sharpness(model, optimizer, loss_fn, batches, relative_step=relative_step, exact=exact, seed=seed).ends(
        steps
    )
    margin = measured.upper.value / 2.0
    lower = measured.lower.value / measured.lower_gain if measured.lower_gain else measured.lower.value
    headroom = math.inf if margin <= 0.0 else 1.0 / margin
    ranked = sorted(measured.shares.items(), key=lambda share: -share[1])
    return StabilityBounds(
        upper_margin=margin,
        upper_residual=measured.upper.residual / abs(measured.upper.value) if measured.upper.value else math.inf,
        lower_violation=lower if math.isnan(lower) else max(0.0, -lower),
        lower_residual=measured.lower.residual / measured.lower_gain if measured.lower_gain else math.nan,
        peak_factor=peak_factor,
        peak_margin=margin * peak_factor,
        headroom=headroom,
        warmup=min(1.0, headroom / peak_factor),
        reliable=measured.reliable,
        largest_shares=tuple(ranked[:3]),
        participation=participation(measured.shares),
        loss=measured.loss,
        products=measured.products,
    )
