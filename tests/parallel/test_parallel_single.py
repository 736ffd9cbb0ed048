"""Without any other rank: in one process, compiled, and where torch has no torch.distributed at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from modes import Net, build
from torch import nn

from dist_stability import StabilityError, parallel


def test_a_plain_model_in_one_process() -> None:
    net = Net()
    assert parallel.forward_module(net) is net
    assert not parallel.has_collectives(net)
    assert parallel.data_replica(net) == (0, 1)
    assert parallel.forward_groups(net) == []
    assert parallel.describe(net) == "single"
    assert parallel.residence(net, net.gain, 1) == parallel.Residence((0,))
    assert parallel.Residence((0,)).replicas == 1
    parallel.reshard(net)
    parallel.clip_grad_norm_(net, net.parameters(), 1.0)


def test_local_shares_memory_and_needs_no_gradient() -> None:
    net = Net()
    shard = parallel.local(net.gain)
    assert not shard.requires_grad and type(shard) is torch.Tensor
    shard.fill_(7.0)
    assert net.gain.item() == 7.0
    assert parallel.wrapping(net.gain) is None and not parallel.is_dtensor(net.gain)


WITHOUT = """
import sys
import torch
import torch.distributed as dist
dist.is_available = lambda: False
gone = ("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed._functional_collectives")
for name in [name for name in sys.modules if name.startswith(gone)] + list(gone):
    sys.modules[name] = None
from dist_stability import parallel
from dist_stability.snapshot import Slot, StatePlan
net = torch.nn.Linear(2, 2)
assert parallel.describe(net) == "single" and parallel.data_replica(net) == (0, 1)
assert parallel.forward_module(net) is net and not parallel.has_collectives(net)
assert parallel.forward_groups(net) == [] and parallel.residence(net, net.weight, 1).ranks == (0,)
parallel.reshard(net)
net(torch.ones(2)).sum().backward()
parallel.clip_grad_norm_(net, net.parameters(), 1.0)
optimizer = torch.optim.AdamW(net.parameters())
optimizer.step()
slot = Slot()
slot.fill(StatePlan.build(net, [optimizer], 1), 0)
slot.publish()
kept = net.weight.detach().clone()
net.weight.data.zero_()
slot.restore()
assert torch.equal(net.weight, kept)
print("fine")
"""


def test_without_torch_distributed() -> None:
    root = Path(parallel.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120, cwd=root)
    assert done.stdout == "fine\n", done.stderr


def test_compiled_models_in_one_process() -> None:
    net = Net()
    compiled = torch.compile(net)
    assert parallel.forward_module(compiled) is compiled
    assert not parallel.has_collectives(compiled)


def wrapped(rank: int, world: int) -> None:
    from torch.nn.parallel import DistributedDataParallel as DDP

    net = Net()
    inner = torch.compile(net)
    around, inside, both = torch.compile(DDP(net)), DDP(inner), torch.compile(DDP(inner))
    assert parallel.forward_module(around) is net
    assert parallel.forward_module(inside) is inner
    assert parallel.forward_module(both) is inner
    assert parallel.forward_module(DDP(net)) is net
    for model in (around, inside, both):
        assert not parallel.has_collectives(model)
        assert parallel.describe(model) == "ddp"
        assert parallel.data_replica(model) == (rank, world)
        assert parallel.forward_groups(model) == []
    outer = nn.Sequential(DDP(net))
    assert parallel.has_collectives(outer), "a DDP inside the model broadcasts its buffers in the probe's forward"
    assert len(parallel.forward_groups(outer)) == 1
    assert parallel.residence(outer, net.gain, world).ranks == (0, 1)


def test_ddp_and_compile_around_each_other(two: Any) -> None:
    two.run(wrapped)


def facts(rank: int, world: int, mode: str) -> tuple[Any, ...]:
    from torch.distributed import get_process_group_ranks

    run = build(mode, rank, world)
    groups = {tuple(get_process_group_ranks(group)) for group in parallel.forward_groups(run.model)}
    run.look()  # gathered or not, the answers are the same
    again = {tuple(get_process_group_ranks(group)) for group in parallel.forward_groups(run.model)}
    assert groups == again
    found = parallel.describe(run.model), parallel.has_collectives(run.model), parallel.data_replica(run.model)
    assert parallel.data_replica(run.model)[0] == run.replica
    return *found, groups


@pytest.mark.parametrize(
    ("mode", "kind", "collectives"),
    [
        ("ddp", "ddp", False),
        ("fsdp1-full", "fsdp1", True),
        ("fsdp1-flat-grad", "fsdp1", True),
        ("fsdp2", "fsdp2", True),
        ("fsdp2-keep", "fsdp2", True),
    ],
)
def test_data_parallel_modes(two: Any, mode: str, kind: str, collectives: bool) -> None:
    groups = {(0, 1)} if collectives else set()
    assert two.run(facts, mode) == [(kind, collectives, (0, 2), groups), (kind, collectives, (1, 2), groups)]


def test_tensor_parallel(two: Any) -> None:
    assert two.run(facts, "tp") == [("tp", True, (0, 1), {(0, 1)})] * 2


@pytest.mark.parametrize(("mode", "forward_only"), [("hsdp", False), ("fsdp1-hybrid", True)])
def test_hybrid_sharding(four: Any, mode: str, forward_only: bool) -> None:
    for rank, found in enumerate(four.run(facts, mode)):
        across = set() if forward_only else {(rank % 2, rank % 2 + 2)}
        assert found == ("hsdp", True, (rank, 4), {(0, 1) if rank < 2 else (2, 3)} | across)


@pytest.mark.parametrize(("mode", "kind"), [("fsdp2+tp", "fsdp2+tp"), ("dp+tp", "tp")])
def test_two_dimensions(four: Any, mode: str, kind: str) -> None:
    for rank, found in enumerate(four.run(facts, mode)):
        sharded = {(rank % 2, rank % 2 + 2)} if mode == "fsdp2+tp" else set()
        assert found == (kind, True, (rank // 2, 2), {(0, 1) if rank < 2 else (2, 3)} | sharded)


def lost(rank: int, world: int) -> None:
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard

    meshes = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    tensor = DTensor.from_local(torch.ones(4), meshes[rank // 2], [Shard(0)])
    with pytest.raises(StabilityError, match=f"rank {rank}.*job of 4 ranks"):
        parallel.residence(nn.Module(), tensor, world)


def test_a_mesh_that_hides_the_rest_of_the_job(four: Any) -> None:
    four.run(lost)


def left_out(rank: int, world: int) -> None:
    """What a wrapper was told to leave alone is nobody's replica."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel as DDP

    net = Net()
    DDP._set_params_and_buffers_to_ignore_for_model(net, ["gain"])
    model: nn.Module = DDP(net)
    assert parallel.residence(model, net.gain, world).ranks == (rank,)
    assert parallel.residence(model, net.embed.weight, world).ranks == (0, 1)
    sharded = Net()
    fully_shard(sharded.block)
    assert parallel.residence(sharded, sharded.gain, world).ranks == (rank,)
    assert parallel.residence(sharded, sharded.block.up.weight, world).ranks == (rank,)


def test_parameters_that_a_wrapper_ignores(two: Any) -> None:
    two.run(left_out)
