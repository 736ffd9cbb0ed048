"""Do gradients of different data point the same way? From nearly 1 early in training to nearly 0 where noise rules.

Two ways to see it, each for free where the loop has gradients of parts of the batch anyway:

* :class:`GradientAgreement`: of micro-batches, where gradients are accumulated. Under every kind of sharding.
* :class:`RankAgreement`: of the ranks of a DDP model, before DDP averages them. FSDP never has them: it reduces and
  scatters gradients layer by layer, and no rank ever holds its own whole gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dist_stability.parallel._classes import DDP
from dist_stability.signals.base import Signal, SignalValues, StepContext
from dist_stability.signals.gradients import local_gradient
from dist_stability.signals.sums import constants, norms, row


class GradientAgreement(Signal):
    """``gradient_agreement``: the cosine between the gradient of the first micro-batches and that of all the others.

    The loop says when the first part is complete::

        for number, micro_batch in enumerate(micro_batches):
            (loss_fn(model, micro_batch) / len(micro_batches)).backward()
            if number == 0:
                agreement.mark()

    With a the gradient at the mark and G the whole one, the others' share is G - a, and the cosine of a and G - a
    follows from |a|^2, |G|^2 and a . G, all of them sums over shards. Products are made in float32 and added up in
    float64, so NaN may also mean a product beyond 1e38.

    If the gradient is clipped between backward and step, the step must be given the global norm before clipping
    (``controller.step(grad_norm=...)``): it tells by how much G was scaled. A GradScaler's scale at the mark must be
    that of the step.

    Under DDP's ``no_sync`` the gradient at the mark is this rank's own, and only G is a mean. Then give ``replicas``:
    the share of a in G is a / replicas, and the value is the mean over ranks, one micro-batch of one rank against
    everything else. Under FSDP's ``no_sync`` nothing has been reduced at the mark: the value is left out (FSDP2), or
    NaN with an error that says so (FSDP1).

    Costs a copy of the local gradients, in float32 or more, for as long as the signal lives, and four passes over them.
    Collectives, at the mark and at the step: those of :attr:`Gradients.local`. No host sync.
    """

    name = "gradient_agreement"

    def __init__(self, optimizer: Optimizer | Iterable[Optimizer], *, replicas: int = 1) -> None:
        """Say whose gradients.

        Args:
            optimizer: The optimizer(s) of the step.
            replicas: Data replicas over which the gradient at the mark has yet to be averaged; 1 if it is averaged
                already.

        Raises:
            TypeError, ValueError: ``replicas`` is not an int >= 1.
        """
        if isinstance(replicas, bool) or not isinstance(replicas, int):
            raise TypeError(f"GradientAgreement replicas must be an int >= 1, got {replicas!r}")
        if replicas < 1:
            raise ValueError(f"GradientAgreement replicas must be an int >= 1, got {replicas}")
        self.replicas = replicas
        self._optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        self._copies: dict[int, Tensor] = {}
        self._marked = False
        self._mine: Tensor | None = None

    def mark(self) -> None:
        """The first part's gradients are complete: copy them. Call it between two backward passes, on every rank."""
        parameters = [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]
        with torch.no_grad():
            for parameter in parameters:
                gradient = local_gradient(parameter)
                dtype = None if gradient is None else torch.promote_types(gradient.dtype, torch.float32)
                kept = self._copies.get(id(parameter))
                if gradient is None:
                    self._copies.pop(id(parameter), None)
                elif kept is None or kept.shape != gradient.shape or kept.dtype != dtype:
                    self._copies[id(parameter)] = gradient.to(dtype, copy=True)
                else:
                    kept.copy_(gradient)
        self._marked = True

    def width(self, context: StepContext) -> int:
        """Two sums of squares, one of products; norm before clipping, and 1 if it is known; 1 if there was a mark."""
        return 6

    def before_step(self, context: StepContext) -> None:
        """Compare the gradients with those at the mark, if there was one since the last step."""
        self._mine = None
        if not self._marked:
            return
        self._marked = False
        gradients, device = context.gradients, context.gradients.device
        first, rest, shares = [], [], []
        with torch.no_grad():
            for (name, parameter, residence), gradient in zip(gradients.parameters, gradients.local, strict=True):
                if gradient is None:
                    continue
                kept = self._copies.get(id(parameter))
                # None: a parameter that came into play after the mark.
                marked = torch.zeros_like(gradient) if kept is None else kept
                if marked.shape != gradient.shape:
                    raise ValueError(
                        f"GradientAgreement: the gradient of {name} had the shape {list(marked.shape)} at the mark and "
                        f"has {list(gradient.shape)} now, so it was not reduced then: mark after a backward pass "
                        "outside of FSDP's no_sync"
                    )
                if context.scaler is not None and context.scaler.is_enabled():
                    marked.div_(context.scaler._scale.to(marked.device))
                first.append(marked)
                rest.append(gradient)
                shares.append(1.0 / residence.replicas)
            share = constants(device, shares)
            a = (norms(first, device).square_() * share).sum()
            whole = (norms(rest, device).square_() * share).sum()
            for marked, gradient in zip(first, rest, strict=True):
                marked.mul_(gradient)
            dot = (row(device, *(product.sum(dtype=torch.float64) for product in first)) * share).sum()
        norm = gradients.caller_norm
        self._mine = row(device, a, whole, dot, 0.0 if norm is None else norm, norm is not None, 1.0)

    def collect(self) -> Tensor | None:
        """See :meth:`Signal.collect`."""
        return self._mine

    def read(self, sums: Sequence[float]) -> SignalValues:
        """See the class."""
        a, whole, dot, norm, norms_given, marks = sums
        if not marks:
            return SignalValues()
        # What is given is f G, where f is what clipping left: a . G = a . (f G) / f.
        scale = math.sqrt(whole) / (norm / norms_given) if norms_given and norm and whole else 1.0
        dot = dot / scale
        share = 1.0 / self.replicas
        with_rest = dot - share * a
        rest = whole / scale**2 - 2.0 * share * dot + share**2 * a
        length = a * rest
        # Below rounding the others add nothing: the mark came after the last backward pass.
        if length <= 0.0 or rest <= 1e-5 * a:
            return SignalValues()
        cosine = with_rest / math.sqrt(length)
        return SignalValues(
            {self.name: cosine if abs(cosine) <= 1.0 or math.isnan(cosine) else math.copysign(1.0, cosine)}
        )

    def settings(self) -> dict[str, Any]:
        """The replicas."""
        return {"replicas": self.replicas}


class RankAgreement(Signal):
    """``rank_agreement``: mean cosine, weighted by length, between the gradients of two ranks of a DDP model.

    ::

        (W |mean g|^2 / mean |g_i|^2 - 1) / (W - 1)     from -1 / (W - 1) to 1; W ranks, g_i the gradient of rank i

    which is the mean of g_i . g_j over all pairs, divided by the mean of |g_i|^2. A communication hook of DDP adds up
    |g_i|^2 of each bucket before the bucket is averaged as ever. Averages stay as they are to the bit: the hook scales
    by 1 / W before it sums, like DDP itself.

    Accumulate under ``no_sync`` (without it a later backward pass sees gradients that are averaged in part, and the
    agreement comes out too high). If the gradient is clipped, give the step its norm before clipping. A model has room
    for one communication hook and DDP has no way to take it off, so make one signal per model, before the first
    backward pass. Left out with one rank, and at a step without a synchronized backward pass.

    Costs one pass over the gradients, during backward. Collectives: DDP's own. No host sync.
    """

    name = "rank_agreement"

    def __init__(self, model: Any) -> None:
        """Register the hook.

        Args:
            model: The DistributedDataParallel module.

        Raises:
            TypeError: It is something else.
            RuntimeError: It has a communication hook already (from DDP).
        """
        if not isinstance(model, DDP):
            raise TypeError(
                f"RankAgreement: model must be a DistributedDataParallel module, got {type(model).__name__}. Under "
                "FSDP no rank has its own gradient; use GradientAgreement with gradient accumulation"
            )
        self._square: Tensor | None = None
        self._members = {id(parameter) for parameter in model.parameters()}
        self._world = dist.get_world_size(model.process_group)
        # A lambda, because DDP checks a hook's annotations and takes them as strings for wrong.
        model.register_comm_hook(model.process_group, lambda group, bucket: self._reduce(group, bucket))
        self._mine: Tensor | None = None

    def width(self, context: StepContext) -> int:
        """Own and common squares; norm before clipping; how many ranks gave the first, the third."""
        return 5

    def before_step(self, context: StepContext) -> None:
        """Take what the hook has added up."""
        self._mine = None
        if self._square is None:
            return
        device = context.gradients.device
        parameters = context.gradients.parameters
        common = [
            square if id(parameter) in self._members else 0.0
            for (_, parameter, _), square in zip(parameters, context.gradients.squares.unbind(), strict=True)
        ]
        own, self._square = self._square, None
        if context.scaler is not None and context.scaler.is_enabled():
            own = own / context.scaler._scale.to(own.device, torch.float64) ** 2
        norm = context.gradients.caller_norm
        given = norm is not None
        self._mine = row(device, own, row(device, *common).sum(), 0.0 if norm is None else norm, 1.0, given)

    def collect(self) -> Tensor | None:
        """See :meth:`Signal.collect`."""
        return self._mine

    def read(self, sums: Sequence[float]) -> SignalValues:
        """See the class."""
        own, common, norm, ranks, norms_given = sums
        if not ranks or self._world == 1:
            return SignalValues()
        if norms_given:
            common = (norm / norms_given) ** 2
        mean = own / ranks
        if not mean:
            return SignalValues()
        return SignalValues({self.name: (self._world * common / mean - 1.0) / (self._world - 1)})

    def _reduce(self, group: Any, bucket: Any) -> Any:
        buffer = bucket.buffer()
        square = torch.linalg.vector_norm(buffer, dtype=torch.float64).square()
        # Buckets come in order; the first one begins a backward pass.
        self._square = square if bucket.index() == 0 or self._square is None else self._square + square
        work = dist.all_reduce(buffer.mul_(1.0 / self._world), group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])
