"""Did the step overshoot along its own direction? The cheapest look at the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_stability.parallel import forward_module, local, reshard
from dist_stability.signals.base import Signal, SignalValues, StepContext
from dist_stability.signals.pace import Pace
from dist_stability.signals.scalar import as_scalar
from dist_stability.snapshot.buffers import BufferCopies
from dist_stability.snapshot.rng import forked


class DirectionalRatio(Signal):
    """Twice the part of the promised fall of the loss that curvature took back, along the step D that was taken.

    Values::

        rho           2 (1 + (L(theta + D) - L(theta)) / (-g.D)), L the loss of this step's batch
        rho_uphill    1 in place of it, where the step (momentum's) went uphill

    In a quadratic rho = D'HD / (-g'D): 0 without curvature, 1 at the bottom along D, 2 where the loss is as high as
    before. Full-batch gradient descent at the edge of stability hovers around 2; above it the step raised its own loss.
    Works for any optimizer, with clipping (if the controller is given the norm before it), under every wrapper.

    A difference of two losses: where the step changes the loss by less than some 1e-5 of it, float32 leaves noise.

    Costs two forwards (or one) at every ``every``-th step, and a copy of the local parameters as long as the signal
    lives. The forwards leave no trace. They are collectives where the model's forward is one; every rank makes them.
    """

    name = "directional_ratio"

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any],
        batch: Callable[[], Any],
        *,
        every: int = 10,
        reuse_loss: bool = False,
        seed: int = 0,
    ) -> None:
        """Keep what is needed for a forward.

        Args:
            model: As the loop calls it, wrappers included.
            loss_fn: ``loss_fn(model, batch)``, the training loss, a 0-d tensor; gets the model without DDP.
            batch: Gives the batch (of this rank) whose gradients the step is made of.
            every: Steps from one measurement to the next, >= 1.
            reuse_loss: Take the loss that the step was given (``loss=``) instead of the first forward: where the loss
                draws no random numbers and is that of the whole batch. Every rank gives one at every step, or none
                does.
            seed: Of the random streams during both forwards, so that dropout is the same.

        Raises:
            ValueError: ``every`` is no positive whole number.
        """
        self._pace, self.reuse_loss = Pace(every, "DirectionalRatio"), bool(reuse_loss)
        self._model, self._loss_fn, self._batch, self._seed = model, loss_fn, batch, seed
        self._buffers = BufferCopies(forward_module(model))
        self._before: list[Tensor] = []
        self._gradients: tuple[Tensor | None, ...] = ()
        self._loss: Tensor | None = None
        self._mine: Tensor | None = None

    def width(self, context: StepContext) -> int:
        """g.D, |g|^2, the change of the loss, the norm before clipping, and the number of ranks that measured."""
        return 5

    def before_step(self, context: StepContext) -> None:
        """Where it is due, keep the weights and measure the loss."""
        self._mine = self._loss = None
        if not self._pace.due():
            return
        with torch.no_grad():
            live = _live(context)
            if [(t.shape, t.dtype, t.device) for t in live] != [(t.shape, t.dtype, t.device) for t in self._before]:
                self._before = [torch.empty_like(part) for part in live]
            for kept, part in zip(self._before, live, strict=True):
                kept.copy_(part)
        self._gradients = context.gradients.local
        given = context.loss if self.reuse_loss else None
        self._loss = self._measure() if given is None else as_scalar(given, "the loss of the step")

    def after_step(self, context: StepContext) -> None:
        """Measure the loss again, and the step."""
        if self._loss is None:
            return
        device = context.gradients.device
        change = self._measure().to(device) - self._loss.to(device, non_blocking=True)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        along, square = zero, zero
        with torch.no_grad():
            kinds = zip(self._gradients, self._before, _live(context), context.gradients.parameters, strict=True)
            for gradient, before, after, (_, _, residence) in kinds:
                if gradient is not None:
                    share = 1.0 / residence.replicas
                    wide = gradient.to(torch.float64)
                    along = along + (wide * (after.double() - before.double())).sum().to(device) * share
                    square = square + wide.square().sum().to(device) * share
        self._gradients = ()
        norm = context.gradients.caller_norm
        self._mine = torch.stack([along, square, change, zero if norm is None else norm.to(device), zero + 1.0])

    def collect(self) -> Tensor | None:
        """See :meth:`Signal.collect`."""
        return self._mine

    def read(self, sums: Sequence[float]) -> SignalValues:
        """See the class."""
        along, square, change, norm, count = sums
        if not count:
            return SignalValues()
        # Gradients that were clipped are shorter than the loss's own, in the same direction.
        length = math.sqrt(square)
        clipped = norm / count / length if length and norm / count > length else 1.0
        promised = -along * clipped
        if promised <= 0.0:
            return SignalValues({"rho_uphill": 1.0})
        return SignalValues({"rho": 2.0 * (1.0 + change / count / promised)})

    def settings(self) -> dict[str, Any]:
        """How often it measures."""
        return {"every": self._pace.every, "reuse_loss": self.reuse_loss, "seed": self._seed}

    def state_dict(self) -> dict[str, Any]:
        """When the next measurement is due."""
        return self._pace.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._pace.load_state_dict(state)

    def _measure(self) -> Tensor:
        module = forward_module(self._model)
        reshard(self._model)
        torch.clear_autocast_cache()
        self._buffers.capture()
        try:
            with forked(self._seed), torch.no_grad():
                return as_scalar(self._loss_fn(module, self._batch()), "the result of DirectionalRatio's loss_fn")
        finally:
            self._buffers.restore()
            reshard(self._model)
            torch.clear_autocast_cache()


def _live(context: StepContext) -> list[Tensor]:
    shards = [local(parameter) for _, parameter, _ in context.gradients.parameters]
    return [torch.view_as_real(shard) if shard.is_complex() else shard for shard in shards]
