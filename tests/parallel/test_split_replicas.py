"""Each rank keeps its share of the state that others hold as well, and a restore gathers the shares."""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import pytest
import torch
import zoo
from harness import RankError
from modes import build
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_stability import FixedInnovation, LossProbe, NonFiniteGuard, StabilityController, parallel
from dist_stability.snapshot import Slot, StatePlan
from dist_stability.startup import make_vote
from dist_stability.testing import FaultInjector, compare


def kept(rank: int, world: int, mode: str) -> dict[str, int]:
    run = build(mode, rank, world, width=256)
    run.step(0)
    parallel.reshard(run.model)
    plan = StatePlan.build(run.model, [run.optimizer], world, split=True)
    slot = Slot()
    slot.fill(plan, 0)
    assert not slot.verify()
    return {"payload": plan.nbytes, "kept": plan.bytes_kept, "memory": slot.nbytes}


@pytest.mark.parametrize(("mode", "world", "replicas"), [("ddp", 2, 2), ("ddp", 4, 4), ("hsdp", 4, 2)])
def test_a_rank_keeps_the_payload_over_the_number_of_replicas(mode: str, world: int, replicas: int) -> None:
    for rank, found in enumerate(harness.pool(world).run(kept, mode)):
        share = found["payload"] / replicas
        assert abs(found["kept"] - share) <= 16, f"rank {rank}"
        assert found["memory"] <= 1.01 * share + 4096, f"rank {rank}: {found}"  # a region ends with its page


class Mixed(nn.Module):
    """Convolutions in channels-last order, bfloat16 beside float32, a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.head = nn.Linear(5, 4, dtype=torch.bfloat16)
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean((2, 3)).bfloat16()).float() * self.frozen.mean()


def disturbed(rank: int, world: int) -> None:
    """Between snapshot and restore state vanishes, appears, and changes the order of its memory."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Mixed())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    plan = StatePlan.build(model, [optimizer], world, split=True)
    assert plan.shared and len(plan.pieces) < len(plan.entries)
    before = [tensor.clone() for tensor in plan.tensors()]
    slot = Slot()
    slot.fill(plan, 1)
    slot.publish()
    conv, head = model.module.conv.weight, model.module.head.weight
    with torch.no_grad():
        for tensor in plan.tensors():
            tensor.fill_(rank + 2)
    optimizer.state[conv]["exp_avg"] = torch.zeros(conv.shape)  # contiguous now
    assert not plan.is_current(), "ranks may cut this tensor differently"
    del optimizer.state[head]["exp_avg_sq"]
    optimizer.state[head]["other"] = torch.ones(3)
    optimizer.state.pop(model.module.conv.bias)
    addresses = conv.data_ptr(), head.data_ptr()
    slot.restore()
    vote, _ = make_vote(None, torch.device("cpu"), 60.0)
    slot.gather(partial(vote.broadcast, 0), vote.device)
    vote.close()
    assert (conv.data_ptr(), head.data_ptr()) == addresses
    assert "other" not in optimizer.state[head]
    again = StatePlan.build(model, [optimizer], world, split=True)
    assert [entry.name for entry in again.entries] == [entry.name for entry in plan.entries]
    for entry, tensor, expected in zip(again.entries, again.tensors(), before, strict=True):
        assert torch.equal(tensor, expected), entry.name


def test_state_that_changed_its_form_comes_back() -> None:
    harness.pool(2).run(disturbed)


def steps(rank: int, world: int, mode: str, faults: list[str], split: bool | None) -> Any:
    case = zoo.Case(mode, steps=12)
    options = {"split_replicas": split, "rule": FixedInnovation(1e9), "guards": (NonFiniteGuard(),)}
    outcome = zoo.train(case, rank, world, guarded=True, injector=FaultInjector.parse(faults), **options)
    return outcome.image, [str(verdict.action) for verdict in outcome.verdicts]


DAMAGE = ["raise:step=5,phase=loss-after-forward,rank=0"]


@pytest.mark.parametrize("mode", ["ddp", "hsdp"])
def test_split_or_whole_the_run_is_the_same(mode: str) -> None:
    pool = harness.pool(zoo.MODES[mode])
    split, whole = pool.run(steps, mode, DAMAGE, None), pool.run(steps, mode, DAMAGE, False)
    for (image, actions), (expected, others) in zip(split, whole, strict=True):
        assert actions == others
        assert "rollback" in actions
        assert not (difference := compare(image, expected)), difference


def interrupted(rank: int, world: int) -> str:
    """Rank 1 fails while shares are being sent."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(64, 64))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = torch.ones(2, 64)
    probe = LossProbe(lambda module, batch: module(batch).square().mean(), [batch])
    controller = StabilityController(model, optimizer, probe, FixedInnovation(0.5), timeout=20.0)
    sent = []

    def listen(attempt: int, phase: str) -> None:
        if phase == "restore" and rank == 1:
            sent.append(attempt)
            if len(sent) == 3:  # the phase itself, a chunk of nothing but shares, a share
                raise MemoryError("no memory for a share")

    controller.add_phase_listener(listen)
    for step in range(3):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        if step == 2:
            with torch.no_grad():
                model.module.weight.add_(100.0)
        controller.step()
    return "went on"


def test_an_error_while_shares_are_sent_stops_every_rank_and_names_the_one() -> None:
    peer, culprit = harness.pool(2).run(interrupted, expect_failure=True, timeout=100)
    assert isinstance(culprit, RankError) and culprit.type == "MemoryError", str(culprit)
    assert isinstance(peer, RankError) and peer.is_a("LockstepError"), str(peer)
    assert peer.facts["ranks"] == (1,) and "no memory for a share" in peer.message, peer.message


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"split_replicas": True, "replica_check_every": 0}, ValueError, "replica_check_every to 1 or more"),
        ({"split_replicas": 1}, TypeError, "split_replicas: expected True, False or None, got 1"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], said: str) -> None:
    model = nn.Linear(2, 2)
    probe = LossProbe(lambda module, batch: module(batch).sum(), [torch.ones(1, 2)])
    with pytest.raises(error, match=said):
        StabilityController(model, torch.optim.SGD(model.parameters(), lr=0.1), probe, **options)
