"""The plain numbers a spectral score has to be compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dist_stability import parallel
from dist_stability.diagnostics.quiet import quiet
from dist_stability.diagnostics.ranks import Ranks

USUAL_EDGES = {False: 0.018, True: 0.56}
"""Largest stable learning rate of AdamW without and with normalization: medians over the small models of the grid
``design`` (``dist-stability experiment rksp``, docs/lr-probe.md). Their ratio is the factor 31 there."""

_NOT_OF_ACTIVATIONS = ("weightnorm", "spectralnorm", "nonorm")


def has_normalization(blocks: Iterable[nn.Module]) -> bool:
    """Whether a block contains a normalization layer, told by class names: "Norm" in them, and not that of weights.

    One that is only a function call inside ``forward`` is not seen.
    """
    names = (type(part).__name__.lower().replace("_", "") for block in blocks for part in block.modules())
    return any("norm" in name and not any(other in name for other in _NOT_OF_ACTIVATIONS) for name in names)


def gradient_norm(
    model: nn.Module, loss_fn: Callable[[Any, Any], torch.Tensor], batch: Any, ranks: Ranks, seed: int
) -> float:
    """Global 2-norm of the gradient in eval mode, averaged over data replicas as training would. Leaves no trace.

    Collectives: those of a forward and, under FSDP and tensor parallelism, a backward of the model, then one
    all-reduce; otherwise one per parameter (DDP's own reduction is not touched).

    Args:
        model: With its wrappers; under FSDP and tensor parallelism without gradients.
        loss_fn: ``loss_fn(model, batch)`` gives a 0-d tensor.
        batch: This rank's data.
        ranks: Of the job.
        seed: Seed of every random stream meanwhile.
    """
    module = parallel.forward_module(model)
    with quiet(module, seed), torch.enable_grad():
        loss = loss_fn(module, batch)
        if parallel.has_collectives(model):
            loss.backward()
            parallel.reshard(model)
            norm = parallel.clip_grad_norm_(model, model.parameters(), math.inf)
            for parameter in model.parameters():
                parameter.grad = None
            return float(norm)
        # Not `backward`: DDP's hooks on the parameters would take it for one of the training loop's.
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    total = 0.0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        whole = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        plain = torch.view_as_real(whole.resolve_conj()) if whole.is_complex() else whole
        mean = ranks.sum(plain.detach().to(ranks.device, torch.float64)) / ranks.size
        total += float(mean.square().sum())
    return math.sqrt(total)
