"""FSDP2 (``fully_shard``): its parameter groups, their meshes, and how to put them back to the sharded state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ._classes import FSDP2


def units(model: nn.Module) -> list[Any]:
    """Every module on which ``fully_shard`` was called."""
    return [module for module in model.modules() if isinstance(module, FSDP2)]


def reshard(model: nn.Module) -> None:
    """Every module back to its sharded parameters. No collective.

    After a forward the root stays gathered. An event set with ``set_post_optim_event`` and not used
    yet is dropped: the next all-gather would wait for the optimizer step it marks and not for a restore made after
    it. Without an event FSDP2 waits for everything on the compute stream.

    A module whose forward raised counts as still inside it, and keeps what it gathered through its public
    ``reshard()``. At a step boundary no forward is under way, so the weights of such a one are put back, too.
    """
    for unit in units(model):
        unit.reshard()
        state = unit._get_fsdp_state()
        for group in _groups_of(state):
            if group.is_unsharded:
                group._to_sharded()
        context = getattr(state, "_state_ctx", None)
        if context is not None and context.post_optim_event is not None:
            context.post_optim_event = None


def groups(model: nn.Module) -> Iterator[Any]:
    """FSDP2's own parameter groups: each has ``mesh_info`` and ``fsdp_params``.

    Private in FSDP2, which has no public way to ask a module for its data-parallel mesh; torch up to 2.10 or so keeps
    one group per module, later versions a list.
    """
    seen: set[int] = set()
    for unit in units(model):
        state = unit._get_fsdp_state()
        if id(state) in seen:  # fully_shard([a, b]) gives both modules one state
            continue
        seen.add(id(state))
        yield from _groups_of(state)


def _groups_of(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    one = state._fsdp_param_group
    return [] if one is None else [one]


def parameters(model: nn.Module) -> Iterator[torch.Tensor]:
    """The sharded parameters, as the optimizer knows them, also while a module is gathered."""
    for group in groups(model):
        for parameter in group.fsdp_params:
            yield parameter.sharded_param
