"""Which ranks hold the same elements of a parameter."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import StabilityError
from . import _fsdp1, _fsdp2
from ._classes import DDP, partitioned, this_rank
from .tensors import is_dtensor


@dataclass(frozen=True, slots=True)
class Residence:
    """The global ranks that hold the same local elements as this rank, this rank among them, in ascending order.

    A shard that no other rank has: one rank. A parameter under DDP: all ranks. HSDP: the replicas of the shard.
    """

    ranks: tuple[int, ...]

    @property
    def replicas(self) -> int:
        """How many ranks hold these elements; a sum over all ranks counts them that often."""
        return len(self.ranks)


class Layout:
    """Residence and unsharded shape of every parameter of a model, looked up by identity.

    Walks the model once. Enters no collective.
    """

    def __init__(self, model: nn.Module, world: int) -> None:
        """Walk the wrappers.

        Args:
            model: The model as the training loop holds it, wrappers included.
            world: Number of ranks of the job.
        """
        self._world = world
        self._rank = this_rank()
        self._all = Residence(tuple(range(world)))
        self._own = Residence((self._rank,))
        self._flat: dict[int, tuple[Residence, tuple[int, ...]]] = {
            id(parameter): (self._own if ranks is None else Residence(tuple(sorted(ranks))), shape)
            for parameter, ranks, shape in _fsdp1.parameters(model)
        }
        self._on_mesh: dict[tuple[Any, ...], Residence] = {}
        self._sharding = bool(_fsdp1.units(model) or _fsdp2.units(model))
        self._ignored = {
            id(parameter)
            for wrapper in model.modules()
            if isinstance(wrapper, DDP)
            for name, parameter in wrapper.module.named_parameters()
            if name in wrapper.parameters_to_ignore
        }

    def residence(self, parameter: torch.Tensor) -> Residence:
        """Where the local elements of a parameter lie.

        A parameter that a wrapper was told to ignore is taken as this rank's own: nothing keeps its copies equal.

        Raises:
            StabilityError: A DTensor's mesh leaves out ranks of the job and is no slice of a mesh that has them all.
        """
        if self._world == 1:
            return self._own
        if is_dtensor(parameter):
            key = (parameter.device_mesh, tuple(parameter.placements))  # type: ignore[attr-defined]
            if key not in self._on_mesh:
                self._on_mesh[key] = self._of_dtensor(parameter)
            return self._on_mesh[key]
        if id(parameter) in self._flat:
            return self._flat[id(parameter)][0]
        if self._sharding or id(parameter) in self._ignored:
            return self._own
        return self._all

    def state_residence(self, parameter: torch.Tensor, optimizer: object) -> Residence:
        """Where the optimizer state of a parameter lies: with the parameter, except under ZeRO-1 optimizers."""
        return self.residence(parameter) if partitioned(optimizer) is None else self._own

    def shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        """Shape before sharding, the same on every rank."""
        if id(parameter) in self._flat:
            return self._flat[id(parameter)][1]
        return tuple(parameter.shape)

    def _of_dtensor(self, tensor: Any) -> Residence:
        """Ranks that differ from this one only along dimensions over which the tensor is replicated.

        Those are the mesh dimensions with a Replicate placement, and every dimension of the job's mesh that the
        tensor's own mesh does not have: a TP shard under DDP is copied over the data-parallel dimension although the
        DTensor knows nothing of it. (Pipeline stages would break that rule; they also break the rule that every rank
        has the same parameter names, which the plan's signature checks.)
        """
        mesh = tensor.device_mesh
        ranks = _ranks(mesh)
        here = mesh.get_coordinate()
        window = [
            slice(None) if placement.is_replicate() else slice(place, place + 1)
            for placement, place in zip(tensor.placements, here, strict=True)
        ]
        replicas = ranks[tuple(window)].flatten().tolist()
        whole, outside = around(mesh)
        if whole.numel() != self._world:
            raise StabilityError(
                f"rank {self._rank}: a DTensor parameter lies on a mesh of ranks {ranks.flatten().tolist()} in a job "
                f"of {self._world} ranks, and nothing tells which other ranks hold the same elements; make the mesh "
                "as a slice of one that spans the job: init_device_mesh(device, (replicas, shards), "
                "mesh_dim_names=...)[name]"
            )
        found: set[int] = set()
        for rank in replicas:
            place = (whole == rank).nonzero()[0].tolist()
            line = [slice(None) if axis in outside else place[axis] for axis in range(whole.ndim)]
            found.update(whole[tuple(line)].flatten().tolist())
        return Residence(tuple(sorted(found)))


def optimizer_state(optimizer: Optimizer) -> MutableMapping[Any, Any]:
    """Where an optimizer keeps its state: ``optimizer.state``, except for ZeRO-1 optimizers, which wrap another."""
    inner = partitioned(optimizer)
    return optimizer.state if inner is None else inner.state


def around(mesh: Any) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The ranks of the mesh of which this one is a slice (or of itself), and the dimensions this one does not have."""
    ranks = _ranks(mesh)
    whole = _ranks(_root(mesh))
    inside = torch.isin(whole, ranks).nonzero()
    return whole, tuple(axis for axis in range(whole.ndim) if len(inside[:, axis].unique()) == 1)


def residence(model: nn.Module, parameter: torch.Tensor, world: int) -> Residence:
    """Which ranks hold the same local elements of one parameter; for many, make one :class:`Layout`.

    Enters no collective.

    Raises:
        StabilityError: See :meth:`Layout.residence`.
    """
    return Layout(model, world).residence(parameter)


def _ranks(mesh: Any) -> torch.Tensor:
    return mesh.mesh.cpu()


def _root(mesh: Any) -> Any:
    """The mesh of which this one is a slice, or itself. Older versions of torch keep the answer outside the mesh."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources

    return _mesh_resources.get_root_mesh(mesh)
