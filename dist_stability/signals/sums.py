"""Sums over many small and large tensors, in float64, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

BATCH_BYTES = 64 * 2**20
"""Temporary tensors are made for this many bytes of tensors at once (or for one tensor, if it is larger)."""


_host = "cpu"


def on_host(tensor: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device."""
    return tensor.device.type == _host


@contextmanager
def nothing_on_host() -> Iterator[None]:
    """In the body the CPU is taken for a device that is waited for: to count reads on a machine that has no other."""
    global _host
    before, _host = _host, ""
    try:
        yield
    finally:
        _host = before


def row(device: torch.device, *values: Tensor | float) -> Tensor:
    """Numbers and 0-d tensors of any device as one float64 vector on ``device``, without a host sync."""
    if all(not isinstance(value, Tensor) or on_host(value) for value in values):
        return constants(device, [float(value) for value in values])
    if all(isinstance(value, Tensor) for value in values):
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
    return torch.stack(parts)


def constants(device: torch.device, values: Sequence[float]) -> Tensor:
    """Numbers of the host as a float64 vector on ``device``, without a host sync."""
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)


def joined(device: torch.device, parts: Iterable[Tensor | float]) -> Tensor:
    """Numbers of the host and float64 vectors on ``device`` as one vector there, without a host sync."""
    tensors: list[Tensor] = []
    numbers: list[float] = []
    for part in parts:
        if isinstance(part, Tensor):
            if numbers:
                tensors.append(constants(device, numbers))
                numbers = []
            tensors.append(part.reshape(-1))
        else:
            numbers.append(part)
    if numbers or not tensors:
        tensors.append(constants(device, numbers))
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def batches(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of ``tensors``, in order, in lists that fit one foreach call and about ``BATCH_BYTES``."""
    if (
        len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1
        and sum(t.nbytes for t in tensors) <= BATCH_BYTES
    ):
        yield list(range(len(tensors)))
        return
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
        lengths = torch._foreach_norm([tensors[i] for i in batch], order, dtype=torch.float64)
        if len(batch) == len(tensors):  # nearly always: spare the questions
            return torch.stack(lengths).to(device, non_blocking=True)
        for index, norm in zip(batch, lengths, strict=True):
            found[index] = norm
    return row(device, *found)
