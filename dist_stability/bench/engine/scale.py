"""``bench scale``: what a snapshot and a vote are at sizes that no test machine has.

The shapes are real: modules on the meta device, sharded by ``fully_shard`` over a process group that pretends to have
all the ranks, an AdamW that has stepped, and the project's own plan of them. From :data:`REAL_RANKS` ranks on
``fully_shard`` takes minutes on one core (it cuts every parameter into as many pieces as there are ranks), so there
rank 0's local shapes are computed by its rule, ceil(rows / ranks) rows of each parameter; a test compares both where
both are possible. The collectives of a vote are counted on the same group.

Rank 0 has the largest part. Bytes are those of parameters and AdamW in float32, 12 per element.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW

from dist_stability.bench.engine.counting import counting
from dist_stability.bench.engine.llama import LLAMAS, QUICK, Llama, blocks_and_model
from dist_stability.experiments.progress import Progress
from dist_stability.signals import Monitor, step_context
from dist_stability.snapshot import StatePlan
from dist_stability.startup import spoken
from dist_stability.vote import Ballot, Vote

RANKS = (8, 64, 512, 4096, 16384)
QUICK_RANKS = (8, 64)
REAL_RANKS = 1024
STATED_LINK = 50.0
"""GB/s from device to host where none was measured: PCIe 5 x16 with large copies."""

AGREED = (
    "step",
    "judged",
    "use of batches()",
    "plan",
    "history of verdicts",
    "loaded checkpoint",
    "point of the protocol",
)
"""What the controller's ballot of a judged step agrees on; a test compares it with a real vote's bytes."""

MODES = ("FSDP", "HSDP", "DDP")


def scale(quick: bool, link: float | None = None) -> dict[str, Any]:
    """Plan every model at every number of ranks.

    Args:
        quick: One small model.
        link: GB/s from device to host; default :data:`STATED_LINK`.

    Returns:
        ``rows``, one for each model, mode and number of ranks, and the link.

    Raises:
        RuntimeError: torch.distributed is initialized already; a pretended group cannot be made beside it.
    """
    if dist.is_initialized():
        raise RuntimeError("bench scale: torch.distributed is initialized already; run it in a process of its own")
    cases = [
        (llama, mode, ranks)
        for llama in (QUICK if quick else LLAMAS)
        for ranks in (QUICK_RANKS if quick else RANKS)
        for mode in MODES
    ]
    rows = []
    with Progress(len(cases), "scale: Llama-3 shapes on pretended ranks") as bar:
        for llama, mode, ranks in cases:
            if mode != "HSDP" or ranks > llama.shard:
                rows.append(plan_case(llama, mode, ranks, STATED_LINK if link is None else link))
            bar.advance(len(rows), f"{llama.name} {mode} {ranks}")
    return {
        "rows": rows,
        "link": {"gb_per_s": STATED_LINK if link is None else link, "stated": link is None},
        "collectives_per_step": max(row["collectives_per_step"] for row in rows),
    }


def plan_case(llama: Llama, mode: str, ranks: int, link: float, real_below: int = REAL_RANKS) -> dict[str, Any]:
    """One row.

    Args:
        llama: The model.
        mode: One of :data:`MODES`.
        ranks: Number of pretended ranks.
        link: GB/s from device to host.
        real_below: Number of ranks of one shard group from which on shapes are computed.
    """
    begin = time.perf_counter()
    shards = {"FSDP": ranks, "HSDP": llama.shard, "DDP": 1}[mode]
    real = shards < real_below
    with pretended(ranks):
        blocks, model = blocks_and_model(llama)
        if real and shards > 1:
            _shard(blocks, model, ranks, shards)
        elif shards > 1:
            _shrink(model, shards)
        optimizer = AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        plan = StatePlan.build(model, [optimizer], ranks)
        planned = time.perf_counter()
        size = _bytes(plan, optimizer)
        replicas = ranks // shards
        # Every shard has its own set of replicas; where all ranks hold the same, there is one.
        groups = shards if replicas > 1 else 0
        votes, vector = _vote(model, optimizer, ranks, groups)
    residences = [tuple(range(shard, ranks, shards)) for shard in range(1 if groups else 0)]
    return {
        "model": llama.name,
        "mode": mode,
        "ranks": ranks,
        "shards": shards,
        "replicas": replicas,
        "parameters": sum(tensor.numel() for tensor in model.parameters()) if shards == 1 else None,
        "shapes": "fully_shard" if real and shards > 1 else "as they are" if shards == 1 else "computed",
        "bytes_per_rank": size,
        "bytes_per_rank_split": -(-size // replicas),
        "link_ms": 1e3 * size / (link * 1e9),
        "link_ms_split": 1e3 * -(-size // replicas) / (link * 1e9),
        "collectives_per_step": votes,
        "vote_bytes": vector,
        "start_up_gather_bytes": ranks * len(json.dumps(spoken(residences, 0))),
        "plan_seconds": planned - begin,
    }


@contextlib.contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """A default process group of this many ranks, of which this process is the first and the others do not exist.

    Collectives return at once and leave rank 0's values.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _shard(blocks: nn.ModuleList, model: nn.Module, ranks: int, shards: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if shards == ranks:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh("cpu", (ranks // shards, shards), mesh_dim_names=("replicate", "shard"))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _shrink(model: nn.Module, shards: int) -> None:
    """Every parameter as rank 0 of ``shards`` would hold it."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            rows = -(-parameter.shape[0] // shards)
            setattr(module, name, nn.Parameter(parameter.detach()[:rows].clone()))


def _bytes(plan: StatePlan, optimizer: AdamW) -> int:
    """Bytes of parameters and optimizer state on this rank, by the plan's parameters.

    Not ``plan.nbytes``: tensors on the meta device have no addresses, by which the plan tells tied weights.
    """
    from dist_stability import parallel

    total = 0
    for _, handle, _ in plan.parameters:
        for tensor in (handle, *optimizer.state[handle].values()):
            part = parallel.local(tensor)
            total += part.numel() * part.element_size()
    return total


def _vote(model: nn.Module, optimizer: AdamW, ranks: int, groups: int) -> tuple[float, int]:
    """Collectives of one judged step without guards, and the bytes of its vector."""
    cpu = torch.device("cpu")
    group = dist.new_group(list(range(ranks)))
    vote = Vote(group, tuple(range(ranks)), 0, cpu, 60.0, None)
    # The digest of each set of replicas that this rank belongs to; which sets there are, all ranks know.
    vote.replica_groups = tuple((shard,) for shard in range(groups))
    monitor = Monitor()
    small = nn.Linear(2, 2)
    trained = AdamW(small.parameters())
    context = step_context(small, trained)
    monitor.before_step(context)
    ballot = Ballot(
        measurement=torch.zeros(()),
        weight=1.0,
        square_sum=torch.zeros(()),
        agree=dict.fromkeys(AGREED, 1),
        signals=monitor.collect(),
    )
    with counting(cpu, (group,)) as counts:
        vote.reduce(vote.pack(ballot), 0)
    assert counts.own_bytes > 0
    return float(counts.ours.total()), counts.own_bytes
