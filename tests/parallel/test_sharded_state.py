"""Snapshot and restore of real sharded training, on real ranks: equal bit for bit, and so is what comes after."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from modes import build

from dist_stability import parallel
from dist_stability.snapshot import ForwardState, Slot, StatePlan, share
from dist_stability.startup import make_vote
from dist_stability.testing.oracle import capture_state, compare

TWO = [
    "ddp",
    "fsdp1-full",
    "fsdp1-flat-full",
    "fsdp1-grad",
    "fsdp1-flat-grad",
    "fsdp1-none",
    "fsdp2",
    "fsdp2-uneven",
    "fsdp2-keep",
    "fsdp2-mixed",
    "fsdp2-offload",
    "tp",
]
FOUR = ["hsdp", "fsdp1-hybrid", "fsdp1-flat-hybrid2", "fsdp2+tp", "dp+tp"]
ALL = {
    "ddp": {(0, 1)},
    "fsdp1-none": {(0, 1)},
    "hsdp": {(0, 2), (1, 3)},
    "fsdp1-hybrid": {(0, 2), (1, 3)},
    "fsdp1-flat-hybrid2": {(0, 2), (1, 3)},
    "tp": {(0,), (1,), (0, 1)},
    "dp+tp": {(0, 2), (1, 3), (0, 1, 2, 3)},
    # Rowwise biases are whole on both tensor-parallel ranks and sharded over data-parallel ones; so is all the rest.
    "fsdp2+tp": {(0,), (1,), (2,), (3,), (0, 1), (2, 3)},
}


def round_trip(rank: int, world: int, mode: str, optimizer: str, split: bool = False) -> dict[str, Any]:
    def image(run: Any) -> Any:
        return capture_state(run.model, run.optimizer)

    golden = build(mode, rank, world, optimizer)
    for index in range(3):
        golden.step(index)
    at_three = image(golden)
    golden_loss = golden.step(9)
    at_end = image(golden)

    run = build(mode, rank, world, optimizer)
    for index in range(3):
        run.step(index)
    parallel.reshard(run.model)
    plan = StatePlan.build(run.model, [run.optimizer], world, split=split)
    slot, forward = Slot(), ForwardState(run.model)
    forward.capture()
    slot.fill(plan, 2)
    slot.publish()
    addresses = [tensor.data_ptr() for tensor in plan.tensors()]
    for index in range(3, 6):
        run.step(index)
    run.look()
    parallel.reshard(run.model)
    assert compare(image(run), at_three), "the further steps changed nothing, so the test proves nothing"
    run.look()
    assert slot.verify() == []
    parallel.reshard(run.model)
    slot.restore()
    if split:
        vote, _ = make_vote(None, torch.device("cpu"), 60.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(share, "CHUNK", 1000)  # so that there is more than one
            slot.gather(partial(vote.broadcast, 0), vote.device)
        vote.close()
    forward.restore()
    parallel.reshard(run.model)
    assert plan.is_current()
    assert [tensor.data_ptr() for tensor in plan.tensors()] == addresses
    assert not (difference := compare(image(run), at_three)), difference
    live = plan.digests(plan.tensors())
    assert {ranks: int(value) for ranks, value in live.items()} == {r: int(v) for r, v in slot.digests.items()}
    assert torch.equal(run.step(9), golden_loss)
    assert not (difference := compare(image(run), at_end)), difference
    return {
        "signature": plan.signature,
        "residences": plan.residences,
        "digests": {ranks: int(value) for ranks, value in live.items()},
        "empty": sum(entry.shape.numel() == 0 for entry in plan.entries),
        "bytes": (plan.nbytes, plan.bytes_kept),
    }


def check(results: list[dict[str, Any]], mode: str) -> None:
    world = len(results)
    assert len({result["signature"] for result in results}) == 1
    expected = ALL.get(mode, {(rank,) for rank in range(world)})
    assert {ranks for result in results for ranks in result["residences"]} == expected
    for ranks in expected:
        assert all((rank in ranks) == (ranks in results[rank]["residences"]) for rank in range(world))
        assert len({results[rank]["digests"][ranks] for rank in ranks}) == 1, f"replicas {ranks} differ"
    if mode.startswith("fsdp2") and mode != "fsdp2+tp":
        assert results[1]["empty"], "no rank has an empty shard, so the test does not cover them"


@pytest.mark.parametrize("mode", TWO)
def test_two_ranks(two: Any, mode: str) -> None:
    check(two.run(round_trip, mode, "adamw"), mode)


@pytest.mark.parametrize("mode", ["ddp", "fsdp1-full", "fsdp2"])
@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_optimizers(two: Any, mode: str, optimizer: str) -> None:
    check(two.run(round_trip, mode, optimizer), mode)


@pytest.mark.parametrize("mode", FOUR)
def test_four_ranks(four: Any, mode: str) -> None:
    check(four.run(round_trip, mode, "adamw"), mode)


@pytest.mark.parametrize("mode", [mode for mode in (*TWO, *FOUR) if any(len(ranks) > 1 for ranks in ALL.get(mode, ()))])
def test_shares_of_replicas(two: Any, four: Any, mode: str) -> None:
    results = (two if mode in TWO else four).run(round_trip, mode, "adamw", True)
    check(results, mode)
    assert any(kept < everything for everything, kept in (result["bytes"] for result in results))


def untouched(rank: int, world: int, mode: str) -> None:
    """A snapshot before the first step, restored after it: the state that appeared is gone, not zeroed."""
    run = build(mode, rank, world)
    at_start = capture_state(run.model, run.optimizer)
    forward = ForwardState(run.model)
    forward.capture()
    plan = StatePlan.build(run.model, [run.optimizer], world)
    slot = Slot()
    slot.fill(plan, -1)
    slot.publish()
    for index in range(2):
        run.step(index)
    # FSDP1 may leave a rank without a shard of any parameter, and so without state.
    assert plan.is_current() == (not run.optimizer.state)
    parallel.reshard(run.model)
    slot.restore()
    forward.restore()
    assert len(run.optimizer.state) == 0
    assert plan.is_current()
    assert compare(capture_state(run.model, run.optimizer), at_start) == []


@pytest.mark.parametrize("mode", ["ddp", "fsdp1-full", "fsdp1-flat-grad", "fsdp2", "tp"])
def test_state_that_appeared_is_deleted(two: Any, mode: str) -> None:
    two.run(untouched, mode)


def revive(rank: int, world: int) -> None:
    """State that vanished after the snapshot is made again, as the DTensor it was."""
    run = build("fsdp2-uneven", rank, world)
    for index in range(2):
        run.step(index)
    before = capture_state(run.model, run.optimizer)
    layouts = {id(p): parallel.wrapping(s["exp_avg"]) for p, s in run.optimizer.state.items()}
    slot = Slot()
    slot.fill(StatePlan.build(run.model, [run.optimizer], world), 1)
    slot.publish()
    run.optimizer.state.clear()
    slot.restore()
    assert compare(capture_state(run.model, run.optimizer), before) == []
    assert all(parallel.wrapping(s["exp_avg"]) == layouts[id(p)] for p, s in run.optimizer.state.items())
    run.step(2)


def test_state_that_vanished_is_made_again(two: Any) -> None:
    two.run(revive)


def gathered(rank: int, world: int, mode: str) -> None:
    """Trap 1: without resharding, the next forward does not see what was written into the shards."""
    run = build(mode, rank, world)
    run.step(0)
    run.look()
    parallel.reshard(run.model)
    with torch.no_grad():
        for group in run.optimizer.param_groups:
            for parameter in group["params"]:
                parallel.local(parameter).zero_()
        run.model.eval()
        assert float(run.loss(0)) == pytest.approx(2.302585, abs=1e-5)  # all zero: every word is as likely
    parallel.reshard(run.model)
    names = {id(parameter) for parameter in run.model.parameters()}
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} <= names
    parallel.reshard(run.model)  # again: nothing to do


@pytest.mark.parametrize("mode", [mode for mode in TWO if mode != "tp"])
def test_reshard_makes_the_next_forward_read_the_shards(two: Any, mode: str) -> None:
    two.run(gathered, mode)


def planned_while_gathered(rank: int, world: int, mode: str) -> None:
    run = build(mode, rank, world)
    run.step(0)
    expected = StatePlan.build(run.model, [run.optimizer], world)
    run.look()
    plan = StatePlan.build(run.model, [run.optimizer], world)
    assert plan.signature == expected.signature
    assert [entry.name for entry in plan.entries] == [entry.name for entry in expected.entries]
    assert plan.entries[0].name in ("gain", "_flat_param")


@pytest.mark.parametrize("mode", ["fsdp1-grad", "fsdp1-flat-full", "fsdp2", "fsdp2-keep"])
def test_a_plan_made_while_parameters_are_gathered(two: Any, mode: str) -> None:
    two.run(planned_while_gathered, mode)


def marked(rank: int, world: int) -> None:
    run = build("fsdp2", rank, world)
    run.step(0)
    run.model.set_post_optim_event(object())  # type: ignore[operator]
    parallel.reshard(run.model)
    assert run.model._get_fsdp_state()._state_ctx.post_optim_event is None
    run.step(1)


def test_a_pending_event_of_the_optimizer_is_dropped(two: Any) -> None:
    """The next all-gather would wait for the step that was undone and not for the restore."""
    two.run(marked)


def many_reshards(rank: int, world: int) -> list[int]:
    run = build("fsdp1-full", rank, world)
    run.step(0)
    lengths = []
    for _ in range(10):
        run.look()
        parallel.reshard(run.model)
        parallel.reshard(run.model)
        lengths.append(len(run.model._free_event_queue._queue))
    return lengths


def test_resharding_does_not_fill_the_queue_of_fsdp1(two: Any) -> None:
    assert all(lengths[-1] == lengths[1] for lengths in two.run(many_reshards))


def partitioned(rank: int, world: int) -> dict[str, Any]:
    """ZeRO-1 over DDP: parameters are replicated, their state is not."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    run = build("ddp", rank, world)
    optimizer = ZeroRedundancyOptimizer(run.model.parameters(), torch.optim.AdamW, lr=0.02)
    run.optimizer = optimizer
    run.step(0)
    plan = StatePlan.build(run.model, [optimizer], world)
    dist.barrier()
    return {ranks: int(value) for ranks, value in plan.digests(plan.tensors()).items()}


def test_state_of_a_partitioned_optimizer_is_no_replica(two: Any) -> None:
    first, second = two.run(partitioned)
    assert first[(0, 1)] == second[(0, 1)]
    assert set(first) == {(0, 1), (0,)} and set(second) == {(0, 1), (1,)}
