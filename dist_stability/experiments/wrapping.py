"""The model in each parallel mode, wrapped the way a user of torch would do it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_stability.experiments.data import Batch


@dataclass(frozen=True)
class Processes:
    """This process and its peers.

    Attributes:
        rank: Global rank.
        world_size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def processes(parallel: str, device: str, local_rank: int) -> Iterator[Processes]:
    """Start the process group a parallel mode needs, from the environment torchrun sets, and end it.

    gloo on the CPU, NCCL on CUDA. Without parallelism no group is started.
    """
    place = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if parallel == "single":
        yield Processes(0, 1, place)
        return
    if place.type == "cuda":
        dist.init_process_group("nccl", device_id=place)
    else:
        dist.init_process_group("gloo")
    yield Processes(dist.get_rank(), dist.get_world_size(), place)
    # What refers to the group keeps its threads; one that asks for the GIL at the very end would abort the process.
    gc.collect()
    # Not after an exception: the group may be unusable, and to destroy it could wait for ranks that will not come.
    dist.destroy_process_group()


def wrap(
    model: nn.Module, blocks: Sequence[nn.Module], parallel: str, *, dtype: torch.dtype, here: Processes
) -> nn.Module:
    """Distribute a model.

    Args:
        model: Equal on all ranks, on the device it will run on.
        blocks: The parts that FSDP shards one by one; what is left is the root's.
        parallel: "single", "ddp", "fsdp1", "fsdp2" or "hsdp" (two replicas of world/2 shards).
        dtype: Of the computation under FSDP; weights and gradient reduction stay float32.
        here: This process.

    Collectives: DDP and FSDP1 broadcast or check the weights, meshes make process groups.
    """
    mixed = dtype != torch.float32
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if parallel == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(block) for block in blocks}),
            mixed_precision=MixedPrecision(param_dtype=dtype, reduce_dtype=torch.float32) if mixed else None,
            device_id=here.device,  # without it FSDP1 insists on an accelerator
            use_orig_params=True,
        )
    if parallel in ("fsdp2", "hsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = (
            init_device_mesh(here.device.type, (2, here.world_size // 2), mesh_dim_names=("replicate", "shard"))
            if parallel == "hsdp"
            else init_device_mesh(here.device.type, (here.world_size,), mesh_dim_names=("shard",))
        )
        policy = MixedPrecisionPolicy(dtype, torch.float32) if mixed else MixedPrecisionPolicy()
        # BatchNorm keeps its statistics in float32 and computes in it, as FSDP1 and autocast arrange by themselves.
        precise = MixedPrecisionPolicy(torch.float32, torch.float32, output_dtype=dtype)
        for module in [module for module in model.modules() if mixed and isinstance(module, nn.BatchNorm2d)]:
            fully_shard(module, mesh=mesh, mp_policy=precise)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def autocast(
    loss_fn: Callable[[nn.Module, Batch], Tensor], parallel: str, *, dtype: torch.dtype, device: torch.device
) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss function, under autocast where no FSDP policy takes care of the computation's dtype."""
    if dtype == torch.float32 or parallel in ("fsdp1", "fsdp2", "hsdp"):
        return loss_fn

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(device.type, dtype=dtype):
            return loss_fn(model, batch)

    return loss
