"""How large Adam's steps are, from its own moments: what poisons them shows at once, at almost no cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_stability.parallel import local, optimizer_state
from dist_stability.signals.base import Signal, SignalValues, StepContext
from dist_stability.signals.sums import constants, row

_MOMENTS = {"exp_avg", "exp_avg_sq", "step"}

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
        self._samples: dict[int, _Sample] = {}

    def width(self, context: StepContext) -> int:
        """The sum over elements, and their number."""
        return 2

    def before_step(self, context: StepContext) -> None:
        """Forget the step before: this one may not happen."""
        self._mine = None

    def after_step(self, context: StepContext) -> None:
        """Look at the moments that the step was made with."""
        replicas = {id(p): residence.replicas for _, p, residence in context.gradients.parameters}
        before, self._samples = self._samples, {}
        kinds: dict[Any, list[tuple[_Sample, Tensor | float, float]]] = {}
        for optimizer, group in context.groups:
            states = optimizer_state(optimizer)
            partitioned = states is not optimizer.state  # ZeRO-1: the state lies on one rank only
            floor, (beta1, beta2) = float(group.get("eps", 0.0)), map(float, group.get("betas", (0.0, 0.0)))
            for parameter in group["params"]:
                state = states.get(parameter)
                if not state or not state.keys() >= _MOMENTS:
                    continue
                mean, square = state["exp_avg"], state.get("max_exp_avg_sq", state["exp_avg_sq"])
                place = id(parameter)
                sample = before.get(place)
                if sample is None or not sample.fits(mean, square):
                    sample = _Sample(mean, square)
                    if not sample.elements:
                        continue
                self._samples[place] = sample
                step = state["step"]
                weight = sample.elements if partitioned else sample.elements / replicas[place]
                kind = sample.kind, floor, beta1, beta2
                kinds.setdefault(kind, []).append((sample, local(step) if isinstance(step, Tensor) else step, weight))
        device = context.gradients.device
        with torch.no_grad():
            totals = [torch.zeros(2, dtype=torch.float64, device=device)]
            totals += [_total(kind, members, device) for kind, members in kinds.items()]
            self._mine = totals[-1] if len(totals) == 2 else torch.stack(totals).sum(dim=0)

    def collect(self) -> Tensor | None:
        """See :meth:`Signal.collect`."""
        return self._mine

    def read(self, sums: Sequence[float]) -> SignalValues:
        """See the class."""
        total, count = sums
        return SignalValues({self.name: total / count} if count else {})


class _Sample:
    """At most about ``SAMPLE`` evenly spread elements of both moments of a tensor; views, where that is possible.

    The components of complex numbers count as elements.
    """

    def __init__(self, mean: Tensor, square: Tensor) -> None:
        """Choose them. None if the moments are of different shapes: factored ones."""
        self._of, self._at = (mean, square), (_address(mean), _address(square))
        whole = local(mean), local(square)
        self.elements = whole[0].numel() if whole[0].shape == whole[1].shape else 0
        self.kind = whole[0].device, whole[0].dtype, whole[1].dtype
        self._whole, self._views = whole, tuple(map(_spread, whole))
        self._are_views = all(
            view.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()
            for view, one in zip(self._views, whole, strict=True)
        )
        self.size = self._views[0].numel()

    def fits(self, mean: Tensor, square: Tensor) -> bool:
        """Whether these are still the tensors it was made from, at the same place."""
        same = mean is self._of[0] and square is self._of[1]
        return same and self._at == (_address(mean), _address(square))

    @property
    def moments(self) -> tuple[Tensor, ...]:
        """As they are now."""
        return self._views if self._are_views else tuple(map(_spread, self._whole))


def _address(tensor: Tensor) -> int:
    return (tensor if type(tensor) is Tensor else local(tensor)).data_ptr()


def _spread(tensor: Tensor) -> Tensor:
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    return flat if flat.numel() <= SAMPLE else flat[:: -(-flat.numel() // SAMPLE)]


def _total(
    kind: tuple[Any, float, float, float],
    members: Sequence[tuple[_Sample, Tensor | float, float]],
    device: torch.device,
) -> Tensor:
    """Sum of |m^| / (sqrt(v^) + eps) over the elements of some tensors of one kind, and their number."""
    _, floor, beta1, beta2 = kind
    samples, steps, weights = zip(*members, strict=True)
    means, squares = zip(*(sample.moments for sample in samples), strict=True)
    sizes = [sample.size for sample in samples]
    scale = torch.cat(squares).float().sqrt_().add_(floor)
    ratios = torch.cat(means).float().div_(scale).split(sizes)
    sums = torch.stack(torch._foreach_norm(ratios, 1, dtype=torch.float64)).to(device, non_blocking=True)
    count = row(device, *steps)
    weight = constants(device, weights)
    size = (
        sums / constants(device, [float(size) for size in sizes]) * (1.0 - beta2**count).sqrt() / (1.0 - beta1**count)
    )
    # Where there was no gradient yet there is no step, and 0 / 0 elements are no weights that stand still.
    return torch.where(count > 0, torch.stack([size * weight, weight]), 0.0).sum(dim=1)
