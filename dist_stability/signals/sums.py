"""Sums over many small and large tensors, in float64, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BATCH_BYTES = 64 * 2**20
"""Temporary tensors are made for this many bytes of tensors at once (or for one tensor, if it is larger)."""


def row(device: torch.device, *values: Tensor | float) -> Tensor:
    """Numbers and 0-d tensors of any device as one float64 vector on ``device``, without a host sync."""
    if values and all(isinstance(value, Tensor) for value in values):
        first = values[0]
        kinds = {(value.device, value.dtype, value.shape, value.requires_grad) for value in values}  # type: ignore[union-attr]
        if len(kinds) == 1 and first.dim() == 0 and not first.requires_grad:  # type: ignore[union-attr]
            return torch.stack(values).to(device, torch.float64, non_blocking=True)  # type: ignore[arg-type]
    # A number becomes an argument of the kernel that fills it in; a copy of it would wait for the device.
    parts = [
        value.detach().reshape(()).to(device, torch.float64, non_blocking=True)
        if isinstance(value, Tensor)
        else torch.full((), float(value), dtype=torch.float64, device=device)
        for value in values
    ]
    return torch.stack(parts) if parts else torch.zeros(0, dtype=torch.float64, device=device)


def constants(device: torch.device, values: Sequence[float]) -> Tensor:
    """Numbers of the host as a float64 vector on ``device``, without a host sync."""
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)


def batches(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of ``tensors``, in order, in lists that fit one foreach call and about ``BATCH_BYTES``."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    for members in kinds.values():
        batch: list[int] = []
        size = 0
        for index in members:
            nbytes = tensors[index].numel() * tensors[index].dtype.itemsize
            if batch and size + nbytes > BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(index)
            size += nbytes
        yield batch


def norms(tensors: Sequence[Tensor], device: torch.device, order: float = 2) -> Tensor:
    """The norm of each tensor, added up in float64: a vector on ``device``. An empty tensor has norm 0."""
    found: list[Tensor | float] = [0.0] * len(tensors)
    for batch in batches(tensors):
        for index, norm in zip(
            batch, torch._foreach_norm([tensors[i] for i in batch], order, dtype=torch.float64), strict=True
        ):
            found[index] = norm
    return row(device, *found)
