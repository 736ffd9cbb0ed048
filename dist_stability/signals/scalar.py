"""One number, whatever it came as, as a 0-d float64 tensor that has not been waited for."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dist_stability.parallel import is_dtensor, local


def as_scalar(value: object, what: str, *, one_element: bool = False) -> Tensor:
    """Turn a number into a plain, detached 0-d float64 tensor on the device it is on, without a host sync.

    A DTensor that is replicated gives its local value; one that is a partial sum or is sharded is reduced, which is
    a collective over its mesh.

    Args:
        value: Float, int or 0-d tensor.
        what: What the number is and who gave it; the subject of the errors.
        one_element: Accept tensors of one element with more dimensions, too.

    Raises:
        TypeError: Not a number, or not a real one.
        ValueError: A tensor of another shape.
    """
    expected = "a tensor with one element" if one_element else "a 0-d tensor"
    if isinstance(value, Real) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be {expected} or a float, got {_described(value)}")
    if value.dtype == torch.bool or value.dtype.is_complex:
        raise TypeError(f"{what} must be a real number, got a tensor of dtype {value.dtype}")
    # Shapes are known on the host: a vector is found out without waiting for its values.
    if value.numel() != 1 if one_element else value.ndim:
        raise ValueError(
            f"{what} must be {expected} or a float, got a tensor of shape {list(value.shape)}; reduce it first, for "
            "example with .mean()"
        )
    whole: Any = value
    if is_dtensor(whole):
        whole = whole.full_tensor()
    return local(whole).reshape(()).to(torch.float64)


def _described(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"
