"""FSDP1 (``FullyShardedDataParallel``): its units, their groups, and how to put them back to the sharded state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ._classes import FSDP1, ranks_of


def units(model: nn.Module) -> list[Any]:
    """Every FSDP1 module in the tree."""
    return [module for module in model.modules() if isinstance(module, FSDP1)]


def reshard(model: nn.Module) -> None:
    """Free what a forward left gathered, so that the next forward reads the shards again. No collective.

    FSDP1 keeps the root (and everything under SHARD_GRAD_OP) gathered after a forward and offers no public
    ``reshard()``: a later write to the shards would be ignored by the next forward. This calls the
    private ``_reshard`` that its own post-backward hook calls. It may go when FSDP1 goes, or learns to reshard.
    """
    for unit in units(model):
        handle = unit._handle
        # No handle: the unit manages no parameter. No `_local_shard`: no forward has run yet, all is sharded.
        # `needs_unshard`: the gathered copy is freed already; freeing it again would make FSDP1's queue of free
        # events (one per free, one taken per gather) grow without end.
        if handle is None or not hasattr(handle.flat_param, "_local_shard"):
            continue
        if handle.uses_sharded_strategy and not handle.needs_unshard():
            from torch.distributed.fsdp._runtime_utils import _reshard

            _reshard(unit, handle, True)


def parameters(model: nn.Module) -> Iterator[tuple[torch.Tensor, tuple[int, ...] | None, tuple[int, ...]]]:
    """Parameters that FSDP1 manages, as an optimizer knows them.

    Yields:
        Parameter (the flat one, or with ``use_orig_params=True`` each original one), the ranks that hold the same
        shard (None when no other rank does), and its shape before sharding.
    """
    for unit in units(model):
        handle = unit._handle
        if handle is None:
            continue
        ranks = _same_shard(unit, handle)
        flat = handle.flat_param
        if flat._params is None:
            yield flat, ranks, tuple(flat._unpadded_unsharded_size)
            continue
        for parameter, shape in zip(flat._params, flat._shapes, strict=True):
            yield parameter, ranks, tuple(shape)


def _same_shard(unit: Any, handle: Any) -> tuple[int, ...] | None:
    if not handle.uses_sharded_strategy:  # NO_SHARD: a DDP in FSDP's clothes
        return ranks_of(unit.process_group)
    between_nodes = replicas_group(unit)
    return None if between_nodes is None else ranks_of(between_nodes)


def replicas_group(unit: Any) -> Any:
    """The group of ranks that hold this rank's shard (HYBRID_SHARD), or None."""
    return getattr(unit, "_inter_node_pg", None)
