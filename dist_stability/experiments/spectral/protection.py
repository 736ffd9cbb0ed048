"""What the arms of Table 3 minimise in place of the bare loss, and the spectral normalization of their models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm
from torch.nn.utils.parametrizations import spectral_norm

from dist_stability.diagnostics.kss import SpectralShaping
from dist_stability.experiments.spectral.tasks import Batch, loss_fn
from dist_stability.snapshot.rng import forked

Objective = Callable[[Batch], tuple[Tensor, Tensor]]
"""Of a batch, the loss of the task and what is minimised: 0-d tensors of one graph, one and the same without a
penalty."""


def bare(model: nn.Module) -> Objective:
    """The loss of the task and nothing else."""

    def objective(batch: Batch) -> tuple[Tensor, Tensor]:
        loss = loss_fn(model, batch)
        return loss, loss

    return objective


def shaped(shaping: SpectralShaping) -> Objective:
    """With the spectral penalty."""

    def objective(batch: Batch) -> tuple[Tensor, Tensor]:
        losses = []

        def noted(model: nn.Module, batch: Batch) -> Tensor:
            losses.append(loss_fn(model, batch))
            return losses[-1]

        total = shaping(noted, batch)
        return losses[0], total

    return objective


def gradient_penalized(model: nn.Module, weight: float) -> Objective:
    """With ``weight`` times the squared norm of the gradient of the loss, by double backward.

    The gradient is that by all weights. Attention runs as written: its fused kernels have no second derivative.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def objective(batch: Batch) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_fn(model, batch)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        return loss, loss + weight * torch.stack([gradient.square().sum() for gradient in gradients]).sum()

    return objective


def normalize_spectra(blocks: nn.Module, seed: int) -> None:
    """Parametrize every matrix of the blocks so that its largest singular value is 1, by power iteration as usual.

    Embeddings and head stay as they are: the paper does not say which it normalizes, and theirs would bound the logits.
    """
    with forked(seed):
        for part in list(blocks.modules()):
            if isinstance(part, nn.Linear):
                spectral_norm(part)


def task_gradient_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> float:
    """Of the loss of the task alone; keeps the graph for the backward that follows."""
    return float(get_total_norm(torch.autograd.grad(loss, parameters, retain_graph=True)))
