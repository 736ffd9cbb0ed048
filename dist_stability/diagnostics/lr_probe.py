"""How risky a learning rate is, from a few virtual steps; and the largest one that is not.

Before training starts, or at any step boundary, ``risk`` takes eight Adam steps at the learning rate in question,
without warmup, and looks at the loss and the gradient norm on the way. Then everything is undone, bit for bit. The
score says how near they came to the limits beyond which a run counts as diverged. ``stable_learning_rate`` searches
the largest rate whose score stays under a threshold, with sixteen.

How it was chosen. Among sign steps along one ray (thresholds on loss and gradient norm at up to 20 distances), and 1
to 8 virtual Adam steps (loss, loss over initial loss, gradient norm, both), on the grid
``experiments.spectral.grids.DESIGN``: one task, one width, three seeds. Number of steps, limits and threshold have not
changed since; docs/lr-probe.md has what was measured on other tasks, widths and seeds.

What it cannot see: whatever happens later than the virtual steps reach, a learning rate that is safe in a long warmup
only, clipping, a bad batch.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_stability import parallel
from dist_stability.diagnostics.quiet import quiet
from dist_stability.diagnostics.ranks import Ranks

__all__ = ["Limits", "Risk", "Search", "risk", "stable_learning_rate"]

LossFn = Callable[[Any, Any], Tensor]

STEPS, SEARCH_STEPS = 8, 16
_BETAS, _EPS = (0.9, 0.999), 1e-8
_BLOWN_UP = 3.0
"""A score at which the virtual run is over: a thousand times a limit."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Beyond which a run counts as diverged; the paper's.

    Attributes:
        loss: Of a batch, > 0.
        gradient_norm: Global 2-norm before clipping, > 0.
    """

    loss: float = 50.0
    gradient_norm: float = 500.0


@dataclass(frozen=True, slots=True)
class Risk:
    """Of one learning rate. The same numbers on every rank.

    Attributes:
        lr: The learning rate.
        score: log10 of the largest of loss / limit and gradient norm / limit on the way; above 0 the virtual run itself
            diverged, infinite if something was not finite. Higher is riskier. Not a probability.
        losses: At each point, the starting point first; fewer than the steps + 1 where it blew up.
        gradient_norms: Likewise.
    """

    lr: float
    score: float
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Search:
    """What was found between the bounds.

    Attributes:
        lr: Largest learning rate tried below the first one that was too risky; None if the lowest already was.
        too_risky: The lowest tried that was too risky; None if none was: the edge lies above the highest tried.
        tried: In the order in which they were.
    """

    lr: float | None
    too_risky: float | None
    tried: tuple[Risk, ...]


def risk(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    lr: float,
    *,
    steps: int = STEPS,
    limits: Limits | None = None,
    seed: int = 0,
) -> Risk:
    """Score one learning rate for Adam or AdamW. Every rank calls it, at a step boundary, each with its own data.

    Forwards run in evaluation mode. Weights, gradients, buffers, flags, random streams and sharding are afterwards as
    before, also when something was raised.

    Collectives: a small all-reduce, then for each point those of a forward and a backward under FSDP and tensor
    parallelism and one of one number, otherwise a small all-reduce and one for each parameter; and one of two numbers.

    Memory: two more copies of the trainable parameters' local shards in float32 and one in their own dtype.

    Args:
        model: As the training loop holds it: plain, DDP, FSDP1, ``fully_shard``, HSDP, tensor parallel. Sharded models
            must hold no gradients.
        loss_fn: ``loss_fn(model, batch)`` gives the training loss, a 0-d tensor.
        batches: This rank's data, as large as those of training; taken in turn. Equally many on every rank.
        lr: The learning rate, > 0.
        steps: Virtual steps, at least 1. Measured with the default only.
        limits: Default: the paper's.
        seed: Of every random stream meanwhile.

    Raises:
        ValueError: A setting is out of range, there are no batches, or a sharded model holds gradients.
        LockstepError: The ranks disagree, or another one raised.
    """
    with _walker(model, loss_fn, batches, limits or Limits(), steps, seed, {"lr": lr}) as walker:
        return walker.walk(lr)


def stable_learning_rate(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    *,
    low: float = 1e-5,
    high: float = 10.0,
    threshold: float = 0.0,
    precision: float = 1.05,
    steps: int = SEARCH_STEPS,
    limits: Limits | None = None,
    seed: int = 0,
    told: Callable[[Risk], None] | None = None,
) -> Search:
    """The largest learning rate whose score stays under a threshold.

    Doubles from ``low`` until the score reaches the threshold, then halves the bracket on a logarithmic scale: about 20
    learning rates, each as in :func:`risk`, with its collectives. Everything is undone as there. The rate found is an
    estimate of the edge, not a recommendation: leave a margin.

    Args:
        model: See :func:`risk`.
        loss_fn: See :func:`risk`.
        batches: See :func:`risk`.
        low: Where to begin, > 0.
        high: Where to give up, >= low.
        threshold: Scores from here on are too risky; 0 is where the virtual run itself diverges.
        precision: The bracket is at most this ratio wide in the end, > 1.
        steps: Virtual steps. On the design grid the edges of 16 spread less around the true ones than those of 8.
        limits: See :func:`risk`.
        seed: See :func:`risk`.
        told: Called with each rate once it was tried; must not enter collectives.

    Raises:
        ValueError: As for :func:`risk`.
        LockstepError: As for :func:`risk`.
    """
    settings = {"low": low, "high": high, "threshold": threshold, "precision": precision}
    with _walker(model, loss_fn, batches, limits or Limits(), steps, seed, settings) as walker:
        tried: list[Risk] = []

        def walk(lr: float) -> None:
            tried.append(walker.walk(lr))
            if told is not None:
                told(tried[-1])

        walk(low)
        while tried[-1].score < threshold and tried[-1].lr < high:
            walk(min(2 * tried[-1].lr, high))
        if tried[-1].score < threshold:
            return Search(tried[-1].lr, None, tuple(tried))
        if len(tried) == 1:
            return Search(None, low, tuple(tried))
        safe, risky = tried[-2].lr, tried[-1].lr
        while risky > safe * precision:
            walk(math.sqrt(safe * risky))
            if tried[-1].score < threshold:
                safe = tried[-1].lr
            else:
                risky = tried[-1].lr
        return Search(safe, risky, tuple(tried))


class _Walker:
    """A model that can be walked away from where it is, and put back."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], limits: Limits, steps: int, ranks: Ranks
    ) -> None:
        self._model, self._module = model, parallel.forward_module(model)
        self._loss_fn, self._batches, self._limits, self._steps, self._ranks = loss_fn, batches, limits, steps, ranks
        self._sharded = parallel.has_collectives(model)
        # The module's own, in the sharded state: under FSDP2 a gathered module shows others.
        self._parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        self._shards = [parallel.local(parameter) for parameter in self._parameters]
        self._start = [shard.clone() for shard in self._shards]

    def walk(self, lr: float) -> Risk:
        """Take the steps from the start at this learning rate. Leaves the model where they end."""
        self.restore()
        moments = [(_zeros(shard), _zeros(shard)) for shard in self._shards]
        losses: list[float] = []
        norms: list[float] = []
        score = -math.inf
        for step in range(self._steps + 1):
            loss, norm, gradients = self._gradients(self._batches[step % len(self._batches)])
            losses.append(loss)
            norms.append(norm)
            score = max(score, _log_ratio(loss, self._limits.loss), _log_ratio(norm, self._limits.gradient_norm))
            if score >= _BLOWN_UP or step == self._steps:
                break
            with torch.no_grad():
                _adam(self._shards, gradients, moments, lr, step + 1)
        return Risk(lr, score, tuple(losses), tuple(norms))

    def restore(self) -> None:
        """Back to the start, bit for bit. No collective."""
        parallel.reshard(self._model)
        with torch.no_grad():
            for shard, start in zip(self._shards, self._start, strict=True):
                shard.copy_(start)

    def _gradients(self, batch: Any) -> tuple[float, float, list[Tensor]]:
        """Mean loss over ranks, global norm of the mean gradient, and this rank's shards of it."""
        if self._sharded:
            with torch.enable_grad():
                loss = self._loss_fn(self._module, batch)
                loss.backward()
            parallel.reshard(self._model)
            # Before the norm, which multiplies gradients that are not finite with NaN.
            shards = [parallel.local_gradient(parameter) for parameter in self._parameters]
            norm = float(parallel.clip_grad_norm_(self._model, self._parameters, math.inf))
            for parameter in self._parameters:
                parameter.grad = None
            whole = [_zeros(own) if g is None else g for g, own in zip(shards, self._shards, strict=True)]
            return self._mean(loss), norm, whole
        error: Exception | None = None
        found: tuple[Tensor | None, ...] = ()
        try:
            with torch.enable_grad():
                loss = self._loss_fn(self._module, batch)
                # Not `backward`: DDP's hooks on the parameters would take it for one of the training loop's.
                found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        except Exception as wrong:
            traceback.clear_frames(wrong.__traceback__)  # they hold activations
            error = wrong
        self._ranks.agree("", error, "lr_probe")
        gradients = []
        for gradient, parameter in zip(found, self._parameters, strict=True):
            dense = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            gradients.append(self._ranks.sum(dense.detach()).div_(self._ranks.size))
        squares = [float(gradient.to(torch.float64).square().sum()) for gradient in gradients]
        return self._mean(loss), math.sqrt(math.fsum(squares)) if _finite(squares) else math.inf, gradients

    def _mean(self, loss: Tensor) -> float:
        """Over ranks, infinite if it is not finite on any. One all-reduce of two numbers."""
        value = float(loss.detach())
        finite = math.isfinite(value)
        count, total = self._ranks.sum(
            torch.tensor([float(finite), value if finite else 0.0], dtype=torch.float64)
        ).tolist()
        return total / self._ranks.size if round(count) == self._ranks.size else math.inf


@contextmanager
def _walker(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    limits: Limits,
    steps: int,
    seed: int,
    settings: dict[str, float],
) -> Iterator[_Walker]:
    """Check, agree, and undo everything in the end. One small all-reduce."""
    ranks = Ranks(model)
    error: Exception | None = None
    try:
        _check(model, batches, limits, steps, settings, ranks.rank)
    except ValueError as wrong:
        error = wrong
    facts = f"{settings}, {limits}, {steps} steps, seed {seed}"
    if error is None:
        facts += f", {len(batches)} batches, {sum(p.requires_grad for p in model.parameters())} trainable parameters"
    ranks.agree(facts, error, "lr_probe")
    with quiet(parallel.forward_module(model), seed):
        walker = _Walker(model, loss_fn, batches, limits, steps, ranks)
        try:
            yield walker
        finally:
            walker.restore()
            if walker._sharded:
                for parameter in walker._parameters:
                    parameter.grad = None


def _check(
    model: nn.Module, batches: Sequence[Any], limits: Limits, steps: int, settings: dict[str, float], rank: int
) -> None:
    for name, value in {**settings, "limits.loss": limits.loss, "limits.gradient_norm": limits.gradient_norm}.items():
        if name == "threshold":
            fits, wanted = math.isfinite(value), "a finite number"
        elif name == "precision":
            fits, wanted = 1.0 < value < math.inf, "above 1"
        else:
            fits, wanted = 0.0 < value < math.inf, "a positive number"
        if not fits:
            raise ValueError(f"lr_probe: rank {rank}: {name} must be {wanted}, got {value}")
    if "low" in settings and settings["high"] < settings["low"]:
        raise ValueError(f"lr_probe: rank {rank}: high must be at least low, got {settings['high']}, {settings['low']}")
    if steps < 1:
        raise ValueError(f"lr_probe: rank {rank}: steps must be at least 1, got {steps}")
    if not isinstance(batches, Sequence) or isinstance(batches, str) or not batches:
        raise ValueError(
            f"lr_probe: rank {rank}: batches must be a non-empty list of batches, got {type(batches).__name__}; for a "
            "single batch pass [batch]"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(f"lr_probe: rank {rank}: the model has no trainable parameter")
    if any(parameter.is_complex() for parameter in trainable):
        raise ValueError(f"lr_probe: rank {rank}: complex parameters are not supported")
    if parallel.has_collectives(model) and any(parameter.grad is not None for parameter in model.parameters()):
        raise ValueError(
            f"lr_probe: rank {rank} holds gradients; a sharded model is probed without: call it after "
            "optimizer.zero_grad(set_to_none=True)"
        )


def _zeros(shard: Tensor) -> Tensor:
    """For sums of gradients: at least float32."""
    return torch.zeros_like(shard, dtype=torch.promote_types(shard.dtype, torch.float32))


def _adam(
    shards: list[Tensor], gradients: list[Tensor], moments: list[tuple[Tensor, Tensor]], lr: float, step: int
) -> None:
    """One step of Adam with its usual settings, in place."""
    first_bias, second_bias = (1 - beta**step for beta in _BETAS)
    for shard, gradient, (first, second) in zip(shards, gradients, moments, strict=True):
        gradient = gradient.to(first.dtype)
        first.lerp_(gradient, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        update = (first / first_bias) / ((second / second_bias).sqrt_() + _EPS)
        shard.sub_((lr * update).to(shard.dtype))


def _log_ratio(value: float, limit: float) -> float:
    if not math.isfinite(value):
        return math.inf
    return math.log10(value / limit) if value > 0 else -math.inf


def _finite(values: list[float]) -> bool:
    return all(map(math.isfinite, values))
