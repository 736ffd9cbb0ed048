"""Where the local part of a tensor lies in the whole one: as a box of offsets and sizes, if it is one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from . import _fsdp1
from ._classes import Shard, partitioned
from .tensors import Wrapping, is_dtensor


def offsets(layout: Wrapping | None, shape: torch.Size) -> tuple[int, ...] | None:
    """Where the local part begins in the whole tensor, in elements of each dimension.

    Args:
        layout: Of the DTensor; None for a plain tensor, which is whole.
        shape: Of the local part.

    Returns:
        None if the local part is no box of that shape: strided shards (FSDP2 over tensor parallelism), partial sums.
    """
    if layout is None:
        return (0,) * len(shape)
    begin, sizes = [0] * len(layout.shape), list(layout.shape)
    coordinate = layout.mesh.get_coordinate()
    if coordinate is None:
        return None
    for placement, place, count in zip(layout.placements, coordinate, layout.mesh.shape, strict=True):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard:
            return None
        dim = placement.dim
        part = -(-sizes[dim] // count)  # as torch.chunk cuts: the last ones may be short, or empty
        first = min(place * part, sizes[dim])
        begin[dim] += first
        sizes[dim] = min(part, sizes[dim] - first)
    return tuple(begin) if tuple(sizes) == tuple(shape) else None


def without_boxes(model: nn.Module, optimizers: Iterable[Optimizer]) -> str:
    """Why the state of a model cannot be written down as boxes of whole tensors; "" if it can. No collective."""
    if _fsdp1.units(model):
        return "FSDP1 keeps pieces of flattened parameters; use fully_shard (FSDP2)"
    if any(partitioned(optimizer) is not None for optimizer in optimizers):
        return "ZeroRedundancyOptimizer keeps whole states on single ranks; use fully_shard (FSDP2)"
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            for placement in parameter.placements:  # type: ignore[attr-defined]
                if not placement.is_replicate() and type(placement) is not Shard:
                    return f"{name} is laid out as {placement}, which is no range of it (FSDP2 over tensor parallelism)"
    return ""
