"""The global norm over shards is the norm of the whole, however the whole is spread over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from modes import Net, Run, build
from torch import nn

from dist_stability import StabilityError, parallel
from dist_stability.snapshot import StatePlan

TWO = ["ddp", "fsdp1-full", "fsdp1-flat-grad", "fsdp1-none", "fsdp2-uneven", "fsdp2-offload", "tp"]
FOUR = ["hsdp", "fsdp1-hybrid", "fsdp2+tp", "dp+tp"]


def reference(mode: str, replicas: int) -> nn.Module:
    """One process with the whole model, its gradients the mean over the data of all replicas."""
    run = build("single", 0, 1, width=7 if "uneven" in mode else 8)
    run.model.block.dropout.p = 0.0
    for replica in range(replicas):
        (Run(run.model, run.optimizer, replica).loss(0) / replicas).backward()
    return run.model


def clipped(rank: int, world: int, mode: str) -> None:
    run = build(mode, rank, world)
    next(module for module in run.model.modules() if isinstance(module, nn.Dropout)).p = 0.0
    whole = reference(mode, parallel.data_replica(run.model)[1])
    expected = torch.cat([parameter.grad.flatten() for parameter in whole.parameters()]).norm()
    run.backward(0)
    parallel.reshard(run.model)
    parameters = list(run.model.parameters())
    before = [None if p.grad is None else parallel.local(p.grad).clone() for p in parameters]
    norm = parallel.clip_grad_norm_(run.model, parameters, 0.1)
    assert norm.dtype == torch.float64 and norm.shape == ()
    assert float(norm) == pytest.approx(float(expected), rel=2e-5)
    for parameter, old in zip(parameters, before, strict=True):
        if old is not None:
            torch.testing.assert_close(parallel.local(parameter.grad), old * (0.1 / float(norm)), rtol=1e-4, atol=1e-9)
    assert float(parallel.clip_grad_norm_(run.model, parameters, 10.0)) == pytest.approx(0.1, rel=1e-4)
    assert float(parallel.clip_grad_norm_(run.model, parameters, 10.0)) == pytest.approx(0.1, rel=1e-4)  # left alone
    everyone = [torch.zeros((), dtype=torch.float64) for _ in range(world)]
    dist.all_gather(everyone, norm)
    assert len({float(each) for each in everyone}) == 1


@pytest.mark.parametrize("mode", TWO)
def test_clipping_on_two_ranks(two: Any, mode: str) -> None:
    two.run(clipped, mode)


@pytest.mark.parametrize("mode", FOUR)
def test_clipping_on_four_ranks(four: Any, mode: str) -> None:
    four.run(clipped, mode)


def weighed(rank: int, world: int, mode: str) -> None:
    """What is summed over all ranks must count every element once."""
    run = build(mode, rank, world)
    expected = sum(float(p.double().square().sum()) for p in build("single", 0, 1).model.parameters())
    plan = StatePlan.build(run.model, [run.optimizer], world)
    total = torch.zeros((), dtype=torch.float64)
    for _, parameter, residence in plan.parameters:
        total += parallel.local(parameter).double().square().sum() / residence.replicas
    dist.all_reduce(total)
    assert float(total) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mode", ["ddp", "fsdp1-full", "fsdp1-flat-full", "fsdp2", "tp"])
def test_weights_on_two_ranks(two: Any, mode: str) -> None:
    two.run(weighed, mode)


@pytest.mark.parametrize("mode", FOUR)
def test_weights_on_four_ranks(four: Any, mode: str) -> None:
    four.run(weighed, mode)


def test_one_process_agrees_with_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 4), nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    for module in (ours, theirs):
        (module(torch.arange(5.0)) ** 2).sum().backward()
    norm = parallel.clip_grad_norm_(ours, ours.parameters(), 0.5)
    assert float(norm) == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_finite_gradients_have_a_finite_norm() -> None:
    model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    model.weight.grad = torch.full_like(model.weight, 3e38)
    assert float(parallel.clip_grad_norm_(model, model.weight, 1.0)) == pytest.approx(4 * 3e38, rel=0.01)
    assert torch.isfinite(model.weight.grad).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_shows_in_the_norm(bad: float) -> None:
    model = nn.Linear(3, 3)
    model.weight.grad = torch.tensor([[bad, 1, 1]] * 3)
    model.bias.grad = None
    norm = float(parallel.clip_grad_norm_(model, model.parameters(), 1.0))
    assert norm - norm != 0.0


def test_other_kinds_of_gradients() -> None:
    table = nn.Embedding(6, 2, sparse=True)
    table(torch.tensor([1, 1, 4])).sum().backward()  # the row of 1 twice: coalesced it is (2, 2)
    number = nn.Parameter(torch.tensor([1 + 1j]))
    number.grad = torch.tensor([3 + 4j])
    norm = parallel.clip_grad_norm_(table, [table.weight, number], 1.0)
    assert float(norm) == pytest.approx((4 + 4 + 1 + 1 + 25) ** 0.5)
    assert float(table.weight.grad.coalesce().values()[0, 0]) == pytest.approx(2 / float(norm), rel=1e-5)


def test_no_gradients_at_all() -> None:
    model = Net()
    assert float(parallel.clip_grad_norm_(model, model.parameters(), 1.0)) == 0.0
    assert float(parallel.clip_grad_norm_(model, [], 1.0)) == 0.0


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_senseless_bound_is_refused(bad: float) -> None:
    with pytest.raises(StabilityError, match="max_norm must be positive"):
        parallel.clip_grad_norm_(Net(), [], bad)


def sequence_parallel(rank: int, world: int) -> None:
    """A gradient that is only a summand on each rank (Partial) counts with its sum."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = init_device_mesh("cpu", (world,))
    model = nn.Module()
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Replicate()]))
    model.weight.grad = DTensor.from_local(torch.full((3,), 1.0 + rank), mesh, [Partial()])
    norm = parallel.clip_grad_norm_(model, model.parameters(), 1.0)
    assert float(norm) == pytest.approx((3 * 3.0**2) ** 0.5)
    torch.testing.assert_close(parallel.local(model.weight.grad), torch.full((3,), (1.0 + rank) / float(norm)))


def test_partial_gradients(two: Any) -> None:
    two.run(sequence_parallel)
