"""Is the optimizer's idea of a step's size still right? Adam's second moment against the gradient, and the update.

Adam divides by the root of a second moment v that averages some 1 / (1 - beta2) steps. When gradients grow, v falls
behind and steps are too long until it has caught up: Wortsman et al. (2023, StableAdamW) found loss spikes 1 to 8 steps
after it. After a burst of large gradients v stays too large for as long, and steps are too short: the loss looks fine
and the run stands still.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_stability.parallel import local, optimizer_state
from dist_stability.signals.base import Signal, SignalValues, StepContext
from dist_stability.signals.pace import Pace
from dist_stability.signals.sums import batches, constants, norms, row

_TINY = torch.finfo(torch.float32).tiny


class UpdateRms(Signal):
    """How large the gradient is against Adam's second moment; 1 where the second moment is right.

    ::

        RMS = sqrt((1 - beta2^t) mean(g^2 / max(v, eps^2)))

    with v (``exp_avg_sq``) *before* the step, which is why 1 - beta2^t corrects it for its start at 0, and g as the
    optimizer gets it (after clipping). StableAdamW takes v after the step and caps RMS at 1 / sqrt(1 - beta2) by that;
    before the step it is a ratio of gradients without a ceiling, known before any damage is done.

    Values::

        update_rms           over all elements of all tensors
        update_rms_max       of the tensor in which it is largest; ``where`` names it
        update_rms_median    of the tensor in the middle: deaf to a single tensor
        update_rms/TENSOR    of each tensor, with ``every_tensor``

    In an embedding the rows of rare tokens have a second moment of nearly 0, so its RMS jumps whenever one of them
    comes by, without harm, and takes the first two values with it: judge by the median, look for the place by the
    largest.

    Tensors count from their second step on. Those whose optimizer keeps no ``exp_avg_sq`` of the gradient's shape (SGD,
    Lion, factored or 8-bit second moments) are left out. Padding of an FSDP1 flat parameter counts as gradients of 0.

    Costs at every ``every``-th step three passes over gradients and second moment, and temporary memory of 64 MiB or
    the largest local tensor.
    Collectives: those of :attr:`Gradients.local`. No host sync.
    """

    name = "update_rms"

    def __init__(self, *, every_tensor: bool = False, every: int = 1) -> None:
        """Say what to report.

        Args:
            every_tensor: Also report each tensor by its name.
            every: Steps from one measurement to the next, >= 1.

        Raises:
            ValueError: ``every`` is no positive whole number.
        """
        self._pace = Pace(every, "UpdateRms")
        self.every_tensor = bool(every_tensor)
        self._names: list[str] = []
        self._mine: Tensor | None = None

    def width(self, context: StepContext) -> int:
        """For each tensor its sum and its number of elements."""
        return 2 * len(context.gradients.parameters)

    def before_step(self, context: StepContext) -> None:
        """Compare gradients and second moments."""
        self._names = [name for name, _, _ in context.gradients.parameters]
        self._mine = _rms_sums(context) if self._pace.due() else None

    def collect(self) -> Tensor | None:
        """See :meth:`Signal.collect`."""
        return self._mine

    def read(self, sums: Sequence[float]) -> SignalValues:
        """See the class."""
        half = len(self._names)
        total, counts = sums[:half], sums[half:]
        single = {
            name: math.sqrt(square / count)
            for name, square, count in zip(self._names, total, counts, strict=True)
            if count > 0
        }
        if not single:
            return SignalValues()
        ascending = sorted(single, key=lambda name: _rank(single[name]))
        largest, middle = ascending[-1], ascending[(len(ascending) - 1) // 2]
        values = {
            "update_rms": math.sqrt(sum(total) / sum(counts)),
            "update_rms_max": single[largest],
            "update_rms_median": single[middle],
        }
        if self.every_tensor:
            values.update({f"update_rms/{name}": value for name, value in single.items()})
        return SignalValues(values, {"update_rms_max": largest})

    def settings(self) -> dict[str, Any]:
        """What is reported, and how often."""
        return {"every_tensor": self.every_tensor, "every": self._pace.every}

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Pace.state_dict`."""
        return self._pace.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._pace.load_state_dict(state)


class UpdateRatio(Signal):
    """How far one optimizer step moved the weights, whatever the optimizer, from the weights before and after it.

    Values::

        effective_step      mean |delta theta| / learning rate over all elements whose learning rate is not 0
        update_ratio        |delta theta| / |theta|, 2-norms over all tensors, theta before the step
        update_ratio_max    of the tensor in which it is largest, of those that are not 0; ``where`` names it
        update_ratio/TENSOR of each of them, with ``every_tensor``

    With Adam the effective step is about 1 at most and falls as the gradients turn noisy. After a burst of gradients
    times 300 it stays some ten to a hundred times too small for hundreds of steps, while loss and probe look fine.
    Weight decay is part of the update.

    Costs a copy of the local parameters in device memory for as long as the signal lives, and six passes over them.
    Put back or scaled by somebody else between ``before_step`` and ``after_step``, weights count as moved by that.
    No collective, no host sync.
    """

    name = "update_ratio"

    def __init__(self, *, every_tensor: bool = False) -> None:
        """Say what to report.

        Args:
            every_tensor: Also report each tensor by its name.
        """
        self.every_tensor = bool(every_tensor)
        self._names: list[str] = []
        self._before: list[Tensor] = []
        self._weights: Tensor | None = None
        self._mine: Tensor | None = None

    def width(self, context: StepContext) -> int:
        """For each tensor sums of |delta| / rate, of |delta|^2 and of |theta|^2; the elements with a learning rate."""
        return 3 * len(context.gradients.parameters) + 1

    def before_step(self, context: StepContext) -> None:
        """Copy the weights, into the copies of the step before where they fit."""
        self._mine = None
        self._names = [name for name, _, _ in context.gradients.parameters]
        live = _shards(context)
        with torch.no_grad():
            fits = len(self._before) == len(live) and all(
                old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
                for old, new in zip(self._before, live, strict=True)
            )
            if not fits:
                self._before = [torch.empty_like(tensor) for tensor in live]
            for batch in batches(live):
                torch._foreach_copy_([self._before[i] for i in batch], [live[i] for i in batch])
            self._weights = norms(live, context.gradients.device)

    def after_step(self, context: StepContext) -> None:
        """Take the difference, in place of the copies."""
        device = context.gradients.device
        live = _shards(context)
        parameters = context.gradients.parameters
        assert self._weights is not None
        with torch.no_grad():
            for batch in batches(live):
                torch._foreach_sub_([self._before[i] for i in batch], [live[i] for i in batch])
            shares = [1.0 / residence.replicas for _, _, residence in parameters]
            rates = {id(p): group.get("lr", 0.0) for _, group in context.groups for p in group["params"]}
            rate = row(device, *(rates.get(id(parameter), 0.0) for _, parameter, _ in parameters))
            elements = constants(device, [w * t.numel() for w, t in zip(shares, live, strict=True)])
            share = constants(device, shares)
            moved = norms(self._before, device, order=1) * share
            moved = torch.where(rate == 0.0, 0.0, moved / rate)
            squares = norms(self._before, device).square_() * share
            weights = self._weights.square() * share
            counted = torch.where(rate == 0.0, 0.0, elements).sum()
            self._mine = torch.cat([moved, squares, weights, counted.reshape(1)])

    def collect(self) -> Tensor | None:
        """See :meth:`Signal.collect`."""
        return self._mine

    def read(self, sums: Sequence[float]) -> SignalValues:
        """See the class."""
        *single, counted = sums
        n = len(self._names)
        moved, squares, weights = single[:n], single[n : 2 * n], single[2 * n :]
        values, where = {}, {}
        if counted:
            values["effective_step"] = sum(moved) / counted
        if total := sum(weights):
            values["update_ratio"] = math.sqrt(sum(squares) / total)
        ratios = {
            name: math.sqrt(square / weight)
            for name, square, weight in zip(self._names, squares, weights, strict=True)
            if weight
        }
        if ratios:
            largest = max(ratios, key=lambda name: _rank(ratios[name]))
            values["update_ratio_max"], where["update_ratio_max"] = ratios[largest], largest
        if self.every_tensor:
            values.update({f"update_ratio/{name}": value for name, value in ratios.items()})
        return SignalValues(values, where)

    def settings(self) -> dict[str, Any]:
        """What is reported."""
        return {"every_tensor": self.every_tensor}


def _rms_sums(context: StepContext) -> Tensor:
    """Of each tensor this rank's summand of (1 - beta2^t) g^2 / max(v, eps^2), then those of its elements."""
    device = context.gradients.device
    replicas = {id(p): residence.replicas for _, p, residence in context.gradients.parameters}
    place = {id(p): index for index, (_, p, _) in enumerate(context.gradients.parameters)}
    gradients, moments, steps, betas, floors, weights, places = [], [], [], [], [], [], []
    for optimizer, group in context.groups:
        states = optimizer_state(optimizer)
        # A parameter and its state lie on the same ranks, except that a ZeRO-1 optimizer keeps the state on one.
        partitioned = states is not optimizer.state
        for parameter in group["params"]:
            state = states.get(parameter) or {}
            gradient = context.gradients.local[place[id(parameter)]]
            if gradient is None or "exp_avg_sq" not in state or "step" not in state:
                continue
            moment = local(state["exp_avg_sq"])
            moment = torch.view_as_real(moment) if moment.is_complex() else moment
            if moment.shape != gradient.shape:
                continue
            gradients.append(gradient)
            moments.append(moment)
            step = state["step"]
            steps.append(local(step) if isinstance(step, Tensor) else step)
            betas.append(float(group["betas"][1]))
            floors.append(max(float(group.get("eps", 0.0)), _TINY))
            weights.append(1.0 if partitioned else 1.0 / replicas[id(parameter)])
            places.append(place[id(parameter)])
    with torch.no_grad():
        ratios: list[Tensor | float] = [0.0] * len(gradients)
        for batch in batches(moments):
            roots = list(torch._foreach_sqrt([moments[i] for i in batch]))
            # In float16 eps would be 0, and what was never touched 0 / 0.
            roots = [root if root.dtype.itemsize >= 4 else root.float() for root in roots]
            torch._foreach_clamp_min_(roots, [floors[i] for i in batch])
            torch._foreach_reciprocal_(roots)
            torch._foreach_mul_(roots, [gradients[i] for i in batch])
            for index, norm in zip(batch, torch._foreach_norm(roots, 2, dtype=torch.float64), strict=True):
                ratios[index] = norm
        weight = constants(device, weights)
        elements = constants(device, [float(gradient.numel()) for gradient in gradients]) * weight
        corrected = 1.0 - constants(device, betas) ** row(device, *steps)
        squares = row(device, *ratios).square_() * weight * corrected
        # Before its first step a tensor has no second moment to speak of, though some optimizers make it early.
        begun = corrected > 0.0
        found = torch.stack([torch.where(begun, squares, 0.0), torch.where(begun, elements, 0.0)])
        sums = torch.zeros(2, len(place), dtype=torch.float64, device=device)
        sums.index_copy_(1, torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True), found)
        return sums.flatten()


def _shards(context: StepContext) -> list[Tensor]:
    shards = [local(parameter) for _, parameter, _ in context.gradients.parameters]
    return [torch.view_as_real(shard) if shard.is_complex() else shard for shard in shards]


def _rank(value: float) -> float:
    """For sorting: a NaN is larger than any number."""
    return math.inf if math.isnan(value) else value
