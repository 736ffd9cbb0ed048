"""The small GPT in float64 under every kind of data parallelism, for the tests beside it."""

from __future__ import annotations

from typing import Any

import torch
from gpt import Block, gpt
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

VOCABULARY = 64


def model(width: int = 8, norm: str = "pre") -> nn.Module:
    torch.set_default_dtype(torch.float64)
    return gpt(norm, width=width, heads=2, layers=3, vocabulary=VOCABULARY, std=0.1)


def wrap(mode: str, world: int, **options: Any) -> nn.Module:
    """``mode``: plain, ddp, ddp-checkpoint, fsdp1[-flat], fsdp2[-uneven|-keep], hsdp, fsdp1-hybrid, tp."""
    whole = model(10 if mode == "fsdp2-uneven" and world == 4 else 8, **options)
    if mode == "plain":
        return whole
    if mode == "ddp-checkpoint":
        for number, block in enumerate(whole.blocks):
            whole.blocks[number] = checkpoint_wrapper(block)
    if mode.startswith("ddp"):
        return DistributedDataParallel(whole)
    if mode == "tp":
        mesh = init_device_mesh("cpu", (world,))
        for block in whole.blocks:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return whole
    grid = {}
    if mode in ("hsdp", "fsdp1-hybrid"):
        grid = {"mesh": init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))}
    if mode.startswith("fsdp1"):
        return FullyShardedDataParallel(
            whole,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=mode != "fsdp1-flat",
            sharding_strategy=ShardingStrategy.HYBRID_SHARD if grid else ShardingStrategy.FULL_SHARD,
            device_id=torch.device("cpu"),
            device_mesh=grid.get("mesh"),
        )
    if mode == "fsdp2-keep":
        grid["reshard_after_forward"] = False
    for block in whole.blocks:
        fully_shard(block, **grid)
    return fully_shard(whole, **grid)
