"""Small models under every kind of parallelism, with their optimizer, from fixed seeds: for the tests beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dist_stability import parallel

STRATEGIES = {
    "full": ShardingStrategy.FULL_SHARD,
    "grad": ShardingStrategy.SHARD_GRAD_OP,
    "none": ShardingStrategy.NO_SHARD,
    "hybrid": ShardingStrategy.HYBRID_SHARD,
    "hybrid2": ShardingStrategy._HYBRID_SHARD_ZERO2,
}


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Tied weights, a parameter of one element (an empty shard on the other ranks), dropout and BatchNorm."""

    def __init__(self, width: int = 8, hidden: int = 12, words: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.block = Block(width, hidden)
        self.batch_norm = nn.BatchNorm1d(width)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.batch_norm(self.block(self.embed(x))) * self.gain)


@dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    replica: int
    average: Any = None

    def loss(self, index: int, module: nn.Module | None = None) -> Tensor:
        draw = torch.Generator().manual_seed(97 * index + self.replica)
        x = torch.randint(0, 10, (6,), generator=draw)
        return F.cross_entropy((module or self.model)(x).float(), (x + 1) % 10)

    def backward(self, index: int) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(index)
        loss.backward()
        for parameter in self.model.parameters() if self.average is not None else ():
            shard = parallel.local(parameter.grad)
            dist.all_reduce(shard, group=self.average)
            shard /= 2
        return loss.detach()

    def step(self, index: int) -> Tensor:
        loss = self.backward(index)
        self.optimizer.step()
        return loss

    def look(self) -> None:
        """A forward as a probe makes it: it leaves FSDP's root (or more) gathered."""
        was = self.model.training
        self.model.eval()
        with torch.no_grad():
            self.loss(10**4, parallel.forward_module(self.model))
        self.model.train(was)


def build(mode: str, rank: int, world: int, optimizer: str = "adamw", width: int | None = None) -> Run:
    """``mode``: single, ddp, fsdp1[-flat]-STRATEGY, fsdp2[-uneven|-keep|-mixed|-offload], hsdp, tp, fsdp2+tp, dp+tp.

    "dp+tp" is tensor parallelism on slices of the job's mesh, with gradients averaged by hand over the other dimension
    (DDP itself refuses a mixture of DTensors and plain parameters).
    """
    torch.manual_seed(3)
    net = Net(width or (7 if "uneven" in mode else 8))
    if mode == "fsdp2-mixed":
        net.batch_norm = nn.Identity()  # on the CPU it takes no bfloat16 weights beside float32 statistics
    model, replica, average = wrap(net, mode, rank, world)
    made = make_optimizer(model, optimizer)
    torch.manual_seed(1000 + replica)
    return Run(model, made, replica, average)


def wrap(net: Net, mode: str, rank: int, world: int) -> tuple[nn.Module, int, Any]:
    if mode == "single":
        return net, 0, None
    if mode == "ddp":
        return DistributedDataParallel(net), rank, None
    if mode.startswith("fsdp1"):
        _, *flat, strategy = mode.split("-")
        options: dict[str, Any] = {}
        if strategy.startswith("hybrid"):
            options["device_mesh"] = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
        wrapped = FullyShardedDataParallel(
            net,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=not flat,
            sharding_strategy=STRATEGIES[strategy],
            device_id=torch.device("cpu"),
            **options,
        )
        return wrapped, rank, None
    if mode == "hsdp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(net.block, mesh=mesh)
        return fully_shard(net, mesh=mesh), rank, None
    options = {}
    if mode.endswith("tp"):
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net.block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if mode == "tp":
            return net, 0, None
        if mode == "dp+tp":
            return net, rank // 2, mesh["dp"].get_group()
        options["mesh"] = mesh["dp"]
    if mode == "fsdp2-mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if mode == "fsdp2-offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if mode == "fsdp2-keep":
        options["reshard_after_forward"] = False
    fully_shard(net.block, **options)
    return fully_shard(net, **options), rank // 2 if mode == "fsdp2+tp" else rank, None


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    # Tensors on different meshes cannot share a foreach call.
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        by_mesh.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    groups = [{"params": part} for part in by_mesh.values()]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.02, fused=name == "fused" or None)
