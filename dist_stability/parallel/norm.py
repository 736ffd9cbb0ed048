"""The global gradient norm over every kind of sharding at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from ..errors import StabilityError
from .layout import Layout
from .tensors import local, local_gradient


def clip_grad_norm_(
    model: nn.Module, parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float
) -> torch.Tensor:
    """Scale gradients in place so that their global 2-norm is at most ``max_norm``.

    For models whose gradients torch's own function gets wrong (FSDP1 shards) or refuses (DTensors on different
    meshes, DTensors beside plain tensors). Enters one all-reduce of one number over the default group; every rank
    must call it. (A DTensor gradient that is laid out differently from its parameter, as under sequence parallelism,
    enters one more.) No host sync, except for sparse gradients.

    Args:
        model: The model with its wrappers; says which ranks hold the same elements.
        parameters: Parameters whose gradients count; those without one count as 0.
        max_norm: Largest norm that is left alone, > 0.

    Returns:
        The norm before clipping, a 0-d float64 tensor, the same on every rank; NaN or inf when a gradient is.

    Raises:
        StabilityError: ``max_norm`` is not positive.
    """
    if not max_norm > 0:
        raise StabilityError(f"max_norm must be positive, got {max_norm}")
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    distributed = dist.is_available() and dist.is_initialized()
    layout = Layout(model, dist.get_world_size() if distributed else 1)
    owners = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [local(parameter.grad) for parameter in owners if parameter.grad is not None]
    # A rank whose shards are all empty must still enter the all-reduce, with a tensor its backend takes.
    device = local(parameters[0]).device if parameters else torch.device("cpu")
    square_sum = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        if gradients:
            # In float64 the square of every finite fp32 or bf16 gradient is finite.
            norms = torch._foreach_norm([_counted(owner) for owner in owners], 2, dtype=torch.float64)
            squares = torch._foreach_mul(norms, norms)
            torch._foreach_div_(squares, [float(layout.residence(owner).replicas) for owner in owners])
            square_sum = torch.stack([square.to(device) for square in squares]).sum()
        if distributed:
            dist.all_reduce(square_sum)
        total = square_sum.sqrt()
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            # In-place arithmetic on a detached sparse tensor does not reach the original; on its values it does.
            shared = gradient if gradient.layout == torch.strided else gradient._values()
            shared.mul_(scale.to(shared.device))
    return total


def _counted(parameter: torch.Tensor) -> torch.Tensor:
    """The local gradient as real numbers whose squares count: summands summed, duplicates of a sparse one added up."""
    shard = local_gradient(parameter)
    assert shard is not None  # the owners of gradients only
    dense = shard.coalesce().values() if shard.layout != torch.strided else shard
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
