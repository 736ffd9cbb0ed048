"""How large Adam's steps are, from its own moments: what poisons them shows at once, at almost no cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_stability.parallel import local, optimizer_state
from dist_stability.signals.base import Signal, SignalValues, StepContext
from dist_stability.signals.sums import batches, constants, row

SAMPLE = 4096
"""Elements of each local tensor that are looked at, evenly spread over it."""


class EffectiveStep(Signal):
    """Mean of |m^| / (sqrt(v^) + eps) over the weights, m^ and v^ Adam's bias-corrected moments after the step.

    Values::

        effective_step    about 1 at most; falls as the gradients turn noisy

    It is what :class:`UpdateRatio` measures from the weights (and then reports in its place), but for weight decay.
    Where a second moment has become far too large (a burst of enormous gradients, a flipped bit) it collapses, while
    loss and probe look fine: such a run stands still.

    An estimate from at most 4,096 evenly spread elements of each local tensor, each tensor weighed with all its
    elements. Tensors whose optimizer does not keep ``exp_avg``, ``exp_avg_sq`` and ``step`` are left out (SGD, Lion,
    factored or 8-bit second moments): then there is no value. Padding of an FSDP1 flat parameter counts as steps of 0.

    Costs a few kernels over the samples. No collective, no host sync.
    """

    name = "effective_step"

    def __init__(self) -> None:
        """Nothing to set."""
        self._mine: Tensor | None = None

    def width(self, context: StepContext) -> int:
        """The sum over elements, and their number."""
        return 2

    def before_step(self, context: StepContext) -> None:
        """Forget the step before: this one may not happen."""
        self._mine = None

    def after_step(self, context: StepContext) -> None:
        """Look at the moments that the step was made with."""
        replicas = {id(p): residence.replicas for _, p, residence in context.gradients.parameters}
        means, roots, floors, steps, betas, weights = [], [], [], [], [], []
        for optimizer, group in context.groups:
            states = optimizer_state(optimizer)
            partitioned = states is not optimizer.state  # ZeRO-1: the state lies on one rank only
            for parameter in group["params"]:
                state = states.get(parameter) or {}
                if not {"exp_avg", "exp_avg_sq", "step"} <= state.keys():
                    continue
                mean = local(state["exp_avg"])
                square = local(state.get("max_exp_avg_sq", state["exp_avg_sq"]))
                if mean.shape != square.shape or mean.numel() == 0:
                    continue
                means.append(_sample(mean))
                roots.append(_sample(square))
                floors.append(float(group.get("eps", 0.0)))
                step = state["step"]
                steps.append(local(step) if isinstance(step, Tensor) else step)
                betas.append(tuple(map(float, group["betas"])))
                weights.append(mean.numel() * (1.0 if partitioned else 1.0 / replicas[id(parameter)]))
        device = context.gradients.device
        with torch.no_grad():
            found: list[Tensor | float] = [0.0] * len(means)
            for batch in batches(means):
                scale = torch._foreach_sqrt([roots[i].float() for i in batch])
                torch._foreach_add_(scale, [floors[i] for i in batch])
                ratios = torch._foreach_div([means[i].float() for i in batch], scale)
                for index, total in zip(batch, torch._foreach_norm(ratios, 1, dtype=torch.float64), strict=True):
                    found[index] = total
            count = row(device, *steps)
            first, second = (1.0 - constants(device, [beta[k] for beta in betas]) ** count for k in (0, 1))
            weight = constants(device, weights)
            size = row(device, *found) / constants(device, [float(mean.numel()) for mean in means])
            size = size * second.sqrt() / first
            # Where there was no gradient yet there is no step, and 0 / 0 elements are no weights that stand still.
            begun = count > 0
            self._mine = torch.stack([torch.where(begun, x, 0.0).sum() for x in (size * weight, weight)])

    def collect(self) -> Tensor | None:
        """See :meth:`Signal.collect`."""
        return self._mine

    def read(self, sums: Sequence[float]) -> SignalValues:
        """See the class."""
        total, count = sums
        return SignalValues({self.name: total / count} if count else {})


def _sample(tensor: Tensor) -> Tensor:
    """At most about ``SAMPLE`` elements, evenly spread, as real numbers; a view where the layout allows."""
    if tensor.numel() <= SAMPLE and not tensor.is_complex():
        return tensor
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.reshape(-1)[:: math.ceil(tensor.numel() / SAMPLE)]
