"""From a tensor that may be sharded to the plain tensor that lies on this rank, and back."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._classes import AsyncTensor, DTensor

_shard, _layout = operator.attrgetter("_local_tensor"), operator.attrgetter("_spec")


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a DTensor; False where torch has no torch.distributed."""
    return isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies on this rank, as a plain detached tensor that shares its storage.

    Enters no collective; waits for one that is still under way (AsyncCollectiveTensor).

    Args:
        tensor: DTensor, AsyncCollectiveTensor, parameter or plain tensor.

    Returns:
        The local shard, possibly with 0 elements; writing into it writes into ``tensor``.
    """
    if isinstance(tensor, DTensor):
        # Without autograd `to_local` hands out the shard itself instead of building a graph node.
        with torch.no_grad():
            tensor = tensor.to_local()
    if isinstance(tensor, AsyncTensor):
        tensor = tensor.wait()
    return tensor.detach()


def offset(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where the local part of a tensor begins in the whole, along each dimension; zeros unless it is a DTensor.

    Enters no collective. torch has no public way to ask a DTensor for it.
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def local_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """The part of a parameter's gradient that belongs to its local shard, of the same shape; None without a gradient.

    Enters a collective only where a DTensor's gradient is laid out differently from it (sequence parallelism).
    """
    gradient: Any = parameter.grad
    if is_dtensor(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return None if gradient is None else local(gradient)


@dataclass(frozen=True, slots=True)
class Wrapping:
    """How a DTensor is laid out, without its data: enough to make it again from a local shard."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def wrap(self, shard: torch.Tensor) -> torch.Tensor:
        """A DTensor of this layout around ``shard``. Enters no collective."""
        return DTensor.from_local(
            shard, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


def is_wrapped_as(tensor: torch.Tensor, layout: Wrapping | None) -> bool:
    """Whether ``wrapping(tensor) == layout``, its global shape aside; asks less than making one."""
    if not isinstance(tensor, DTensor):
        return layout is None
    return (
        layout is not None
        and (tensor.device_mesh is layout.mesh or tensor.device_mesh == layout.mesh)
        and tuple(tensor.placements) == layout.placements
        and tensor.stride() == layout.stride
    )


def shards(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Any]] | None:
    """The shards of DTensors, and how these are laid out: to be compared with ``==``. In two loops of C.

    Unlike :func:`local` it waits for no collective, so the class of a shard has to be looked at. None: one of the
    tensors is no DTensor.
    """
    try:
        return list(map(_shard, tensors)), list(map(_layout, tensors))
    except AttributeError:
        return None


def wrapping(tensor: torch.Tensor) -> Wrapping | None:
    """The layout of a DTensor; None for a tensor that is not one."""
    if not isinstance(tensor, DTensor):
        return None
    return Wrapping(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tuple(tensor.stride()))
