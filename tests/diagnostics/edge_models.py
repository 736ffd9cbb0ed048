"""A two-block transformer under every kind of parallelism, with one global batch whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from dist_stability import parallel
from dist_stability.testing import StateImage, capture_state

WORDS, LENGTH, GLOBAL_BATCH = 12, 8, 8


class Block(nn.Module):
    def __init__(self, width: int, noise: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1 if noise else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.mix(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Gpt(nn.Module):
    """Tied embedding and head, a parameter of one element; with ``noise`` dropout and BatchNorm, too."""

    def __init__(self, width: int = 8, noise: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList([Block(width, noise) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.batch_norm = nn.BatchNorm1d(LENGTH) if noise else nn.Identity()
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.batch_norm(self.norm(x)) * self.gain)


@dataclass
class Job:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[Tensor, Tensor]

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = loss_fn(self.model, self.batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def image(self) -> dict[str, Any]:
        """Every bit of the state, and of the gradients."""
        state: StateImage = capture_state(self.model, self.optimizer)
        entries = dict(state.entries)
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            entries[f"gradient {name}"] = None if gradient is None else parallel.local(gradient).clone()
            entries[f"gradient object {name}"] = id(gradient)
        return entries


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def twice_differentiable(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return loss_fn(model, batch)


def data(replica: int = 0, replicas: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    x = torch.randint(0, WORDS, (GLOBAL_BATCH, LENGTH), generator=draw)
    y = (x + 1) % WORDS
    return x[replica::replicas], y[replica::replicas]


def build(mode: str, rank: int, world: int, optimizer: str = "adamw", noise: bool = False) -> Job:
    """``mode``: single, ddp, ddp-view, fsdp1[-flat], fsdp2, hsdp (of pairs), hsdp-1 (of single ranks), tp, fsdp2+tp."""
    torch.manual_seed(3)
    model: nn.Module = Gpt(noise=noise)
    if mode.startswith("ddp"):
        model = DistributedDataParallel(model, gradient_as_bucket_view=mode == "ddp-view")
    elif mode.startswith("fsdp1"):
        model = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=mode == "fsdp1",
            device_id=torch.device("cpu"),
        )
    elif mode != "single":
        options: dict[str, Any] = {}
        if mode.startswith("hsdp"):
            pair = 1 if mode == "hsdp-1" else 2
            options["mesh"] = init_device_mesh("cpu", (world // pair, pair), mesh_dim_names=("replicate", "shard"))
        if mode.endswith("tp"):
            mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
            for block in model.blocks:
                parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            options["mesh"] = mesh["dp"]
        if mode != "tp":
            for block in model.blocks:
                fully_shard(block, **options)
            fully_shard(model, **options)
    made = _optimizer(model, optimizer)
    replica, replicas = (0, 1) if mode == "tp" else parallel.data_replica(model)
    torch.manual_seed(100 + replica)
    return Job(model, made, data(replica, replicas))


def _optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    # Tensors on different meshes cannot share a foreach call.
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        by_mesh.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    groups = [{"params": part} for part in by_mesh.values()]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
