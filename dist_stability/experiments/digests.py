"""Digests of every bit of a rank's training state, so that two runs can be compared through files."""

from __future__ import annotations

import ctypes
import hashlib
import pickle
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dist_stability.testing import StateImage


def digests(image: StateImage) -> dict[str, str]:
    """SHA-256 of each entry of a state image: dtype, shape and bits of tensors, type and value of the rest."""
    return {name: _digest(value) for name, value in image.entries.items()}


def differences(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Names of the entries that differ or that only one of two images has, sorted."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def _digest(value: Any) -> str:
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous()
        head = f"{held.dtype} {tuple(held.shape)} ".encode()
        bits = ctypes.string_at(held.data_ptr(), held.nbytes) if held.numel() else b""
        return hashlib.sha256(head + bits).hexdigest()
    if isinstance(value, float):
        value = value.hex()  # tells -0.0 from 0.0
    body = value if isinstance(value, bytes) else pickle.dumps(value)
    return hashlib.sha256(type(value).__name__.encode() + b" " + body).hexdigest()
