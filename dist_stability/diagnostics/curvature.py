"""Products of the loss's Hessian with a vector, from ordinary backward passes, on shards; the model is left as it was.

The product is a central difference of gradients, H d = (g(theta + e d) - g(theta - e d)) / (2 e). It needs no second
derivative, which fused attention does not have, and no graph that outlives a backward, which FSDP would have to
gather again; checkpointing, ``torch.compile``, mixed precision and every parallel wrapper keep working.

Lifecycle. :meth:`Curvature.session` copies parameters, buffers and gradients; within it every evaluation starts from
the same random streams and the same buffers, so that both signs see the same dropout masks. On the way out, also by
way of an exception, everything is written back bit for bit: parameters, buffers, gradients, train/eval flags, random
streams. (The optimizer is only read.) Use it at a step boundary; nobody may hold a graph through the parameters, and
nobody may be reading them: a controller in enforce mode copies the committed weights between two steps.

What one rank raises it raises alone: its peers, if they are in a collective of the model, learn of it when the group
times out or the process has gone, and then put everything back, too, without a collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import parallel
from ..errors import StabilityError
from ..snapshot.buffers import BufferCopies
from ..snapshot.rng import forked
from .space import ShardSpace, Vector

LossFn = Callable[[Any, Any], Tensor]


class Curvature:
    """The Hessian of the mean of ``loss_fn`` over some batches, as a thing that multiplies.

    ``loss_fn(model, batch)`` is a training loss: it calls the model as the loop does, in the train/eval mode in which
    the modules are. On several ranks each passes the batches of its own data replica, equal in number on all; the
    gradients must be those that the wrapper averages (DDP, FSDP, HSDP), and tensor-parallel ranks of one replica see
    the same batches. Gradients that the loop averages by hand are not.

    Hooks that act on gradients act here, too: an optimizer that steps inside backward cannot be measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        loss_fn: LossFn,
        batches: Iterable[Any],
        *,
        relative_step: float | None = None,
        exact: bool = False,
        seed: int = 0,
    ) -> None:
        """Check and keep; computes nothing, enters no collective.

        Args:
            model: As the loop calls it, wrappers included.
            optimizer: One or several; their parameters are the coordinates.
            loss_fn: ``loss_fn(model, batch)``, a 0-d tensor with a graph.
            batches: Non-empty, finite; consumed once and kept.
            relative_step: Length of the finite difference as a fraction of max(1, |theta|). By default 1e-4 for
                float32 parameters and 1e-6 for float64 ones; use 1e-3 where the forward computes in bfloat16.
            exact: Differentiate twice instead. Only for models without a parallel wrapper whose operators all have a
                second derivative; the reference for tests.
            seed: Of the random streams during each evaluation.

        Raises:
            StabilityError: No batches, a step that is no positive number, parameters of 16 bits or fewer, or ``exact``
                with a wrapped model.
        """
        self.space = ShardSpace(model, optimizer)
        self.model, self.loss_fn, self.batches, self.seed, self.exact = model, loss_fn, tuple(batches), seed, exact
        where = f"rank {parallel.this_rank()}:"
        if not self.batches:
            raise StabilityError(f"{where} batches is empty: curvature needs at least one batch")
        kinds = {live.dtype for live in self.space.live()}
        if small := sorted(str(kind) for kind in kinds if kind not in (torch.float32, torch.float64)):
            raise StabilityError(
                f"{where} the parameters are {', '.join(small)}: a small change of them is lost in rounding. Keep them "
                "in float32 (the forward may compute in bfloat16 through autocast or a MixedPrecisionPolicy)."
            )
        if exact and parallel.describe(model) != "single":
            raise StabilityError(
                f"{where} exact=True differentiates twice, which {parallel.describe(model)} cannot do; leave it out"
            )
        if relative_step is None:
            relative_step = 1e-6 if kinds == {torch.float64} else 1e-4
        if not (math.isfinite(relative_step) and relative_step > 0):
            raise StabilityError(f"{where} relative_step must be a positive number, got {relative_step!r}")
        self.relative_step = relative_step
        self._buffers = BufferCopies(model)

    @contextmanager
    def session(self) -> Iterator[Products]:
        """Copy the model's state, hand out products at the present weights, put the state back.

        Every rank of the model enters and leaves together. Enters no collective itself.
        """
        with ExitStack() as undo:  # undone in reverse order, every step of it, whatever happens
            # Casts of the weights that autocast keeps are stale after each change of them.
            undo.callback(torch.clear_autocast_cache)
            undo.callback(parallel.reshard, self.model)
            parallel.reshard(self.model)
            undo.callback(_put_gradients_back, self._gradients())
            self._buffers.capture()
            modules = list(self.model.modules())
            undo.callback(_set_flags, modules, [module.training for module in modules])
            centre = [part.clone() for part in self.space.live()]
            undo.callback(self._write, centre)
            yield Products(self, centre)

    def _gradients(self) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Each parameter with its gradient and a copy of that: DDP's bucket may own the memory and write to it."""
        found = {id(one): one for one in (*self.model.parameters(), *self.space.handles)}
        return [
            (one, one.grad, None if one.grad is None else parallel.local(one.grad).clone()) for one in found.values()
        ]

    @torch.no_grad()
    def _write(self, centre: Vector, direction: Vector | None = None, length: float = 0.0) -> None:
        """Put the parameters at a point. No collective."""
        parallel.reshard(self.model)  # FSDP may still hold gathered copies of the weights before
        live = self.space.live()
        torch._foreach_copy_(live, centre)
        if direction is not None:
            torch._foreach_add_(live, direction, alpha=length)
        torch.clear_autocast_cache()


class Products:
    """Gradients and Hessian-vector products at the weights at which the session began. Made by a session.

    Attributes:
        loss: Mean loss over this rank's batches at the last evaluation, on the device; None before the first.
    """

    def __init__(self, of: Curvature, centre: Vector) -> None:
        """Use :meth:`Curvature.session`."""
        self._of, self._centre = of, centre
        self._norm: float | None = None
        self._reached = False
        self.loss: Tensor | None = None

    def gradient(self) -> Vector:
        """The gradient at the centre. Collectives: those of forward and backward, and an all-reduce in the first."""
        return self._gradient(None, 0.0)

    def hessian(self, direction: Vector, relative_step: float | None = None) -> Vector:
        """H times ``direction``, which may have any length.

        Collectives: those of two forwards and backwards, and an all-reduce; two more in the first of a session.

        Args:
            direction: In parameter coordinates.
            relative_step: In place of the curvature's own.

        Raises:
            StabilityError: No gradient reached any parameter.
        """
        space = self._of.space
        if self._norm is None:
            self._norm = space.length(self._centre)
        length = space.length(direction)
        if length == 0.0:
            return [torch.zeros_like(part) for part in direction]
        if self._of.exact:
            return self._exact(direction)
        step = (relative_step or self._of.relative_step) * max(1.0, self._norm) / length
        ahead = self._gradient(direction, step)
        behind = self._gradient(direction, -step)
        with torch.no_grad():
            torch._foreach_sub_(ahead, behind)
            torch._foreach_div_(ahead, 2.0 * step)
        return ahead

    def _gradient(self, direction: Vector | None, length: float) -> Vector:
        of = self._of
        of._write(self._centre, direction, length)
        _drop_gradients(of)
        with self._evaluation():
            total = None
            for number, batch in enumerate(of.batches):
                loss = self._loss(batch, number)
                loss.backward()  # type: ignore[no-untyped-call]
                total = loss.detach() if total is None else total + loss.detach()
            self.loss = total
        found = of.space.gradient()
        if not self._reached:
            # Agreed on: what a rank holds may be unused, or nothing at all.
            mine = [0.0 if handle.grad is None else 1.0 for handle in of.space.handles]
            if not of.space.sum_over_elements([mine])[0]:
                raise StabilityError(
                    f"rank {parallel.this_rank()}: the loss reached no parameter of the optimizer. Does loss_fn call "
                    "the model it is given, and is gradient synchronization on?"
                )
            self._reached = True
        return found

    def _exact(self, direction: Vector) -> Vector:
        of = self._of
        of._write(self._centre)
        with self._evaluation():
            loss = torch.stack([self._loss(batch, number) for number, batch in enumerate(of.batches)]).sum()
            moving = [handle for handle in of.space.handles if handle.requires_grad]
            along = {id(h): d.reshape(h.shape) for h, d in zip(of.space.handles, direction, strict=True)}
            first = torch.autograd.grad(loss, moving, create_graph=True, allow_unused=True)
            pairs = [(g, along[id(h)]) for g, h in zip(first, moving, strict=True) if g is not None and g.requires_grad]
            second = torch.autograd.grad(
                [g for g, _ in pairs], moving, [d for _, d in pairs], allow_unused=True, materialize_grads=True
            )
            self.loss = loss.detach()
        by_handle = {id(h): part for h, part in zip(moving, second, strict=True)}
        return [by_handle.get(id(h), torch.zeros_like(h)).detach() for h in of.space.handles]

    def _loss(self, batch: Any, number: int) -> Tensor:
        loss: Any = self._of.loss_fn(self._of.model, batch)
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
            shown = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise StabilityError(
                f"rank {parallel.this_rank()}: loss_fn must return a 0-d tensor with a graph, got {shown} "
                f"for batch {number}"
            )
        return loss / len(self._of.batches)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """The same random streams and buffers for each evaluation, and after it those of the session's beginning."""
        with forked(self._of.seed), torch.enable_grad():
            try:
                yield
            finally:
                self._of._buffers.restore()


def _drop_gradients(of: Curvature) -> None:
    for one in (*of.model.parameters(), *of.space.handles):
        one.grad = None


def _put_gradients_back(saved: Sequence[tuple[Tensor, Tensor | None, Tensor | None]]) -> None:
    for parameter, gradient, content in saved:
        parameter.grad = gradient
        if gradient is not None and content is not None:
            with torch.no_grad():
                parallel.local(gradient).copy_(content)


def _set_flags(modules: Sequence[nn.Module], flags: Sequence[bool]) -> None:
    for module, training in zip(modules, flags, strict=True):
        if module.training is not training:
            module.training = training
