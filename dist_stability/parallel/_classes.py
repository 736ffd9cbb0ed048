"""The classes of every parallel wrapper, importable also where torch was built without torch.distributed."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class _Absent:
    """Stands for a class this build of torch does not have: nothing is an instance of it."""


AsyncTensor: Any = _Absent
DDP: Any = _Absent
DTensor: Any = _Absent
FSDP1: Any = _Absent
FSDP2: Any = _Absent
Shard: Any = _Absent

if dist.is_available():
    import torch.distributed._functional_collectives
    import torch.distributed.fsdp
    import torch.distributed.tensor

    AsyncTensor = torch.distributed._functional_collectives.AsyncCollectiveTensor
    DDP = nn.parallel.DistributedDataParallel
    DTensor = torch.distributed.tensor.DTensor
    FSDP1 = torch.distributed.fsdp.FullyShardedDataParallel
    FSDP2 = torch.distributed.fsdp.FSDPModule
    Shard = torch.distributed.tensor.Shard


def compiled_inner(module: nn.Module) -> nn.Module | None:
    """The module inside a ``torch.compile`` wrapper, or None. Does not import the compiler to find out."""
    frame = sys.modules.get("torch._dynamo.eval_frame")
    if frame is None or not isinstance(module, frame.OptimizedModule):
        return None
    return module._orig_mod  # type: ignore[return-value]


def partitioned(optimizer: Any) -> Any:
    """The optimizer inside a ZeRO-1 one (``ZeroRedundancyOptimizer``), or None for any other.

    It keeps each parameter's state on one rank although the parameter is replicated, in an optimizer of its own.
    """
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return optimizer.optim if zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer) else None


def ranks_of(group: Any) -> tuple[int, ...]:
    """Global ranks of a process group, in the group's order."""
    return tuple(dist.get_process_group_ranks(group))


def this_rank() -> int:
    """Global rank of this process; 0 when torch.distributed is absent or not initialized."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
