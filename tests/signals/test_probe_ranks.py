"""The probe and the gradients on two ranks: who fails must not leave its peer alone inside a collective."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import harness
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dist_stability import parallel
from dist_stability.guards import NonFiniteGuard
from dist_stability.signals import Gradients, LossProbe, Reading


class Block(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = norm(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.linear(x)).relu())


class Model(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(norm), Block(norm))
        self.head = nn.Linear(8, 1)
        self.raise_inside = False

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.blocks[0](x)
        if self.raise_inside:
            raise RuntimeError("inside the forward")
        return self.head(self.blocks[1](x)) * scale


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = Model(nn.LayerNorm if "bf16" in kind else nn.BatchNorm1d)
    if kind.startswith("fsdp2"):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if kind == "fsdp2 bf16" else MixedPrecisionPolicy()
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)
    if kind == "fsdp1":
        wrap = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
        model.blocks[0] = wrap(model.blocks[0])  # type: ignore[index, operator]
        return wrap(model)
    if kind == "tp":
        mesh = init_device_mesh("cpu", (2,))
        layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        return parallelize_module(layers, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model


class Loss:
    """Two forwards per batch, one by keyword; fails where it is told to."""

    def __init__(self) -> None:
        self.fail_at: tuple[int, str] | None = None

    def __call__(self, model: nn.Module, batch: tuple[int, Tensor]) -> Tensor:
        number, x = batch
        self.maybe_fail(model, number, "before")
        loss = model(x).square().mean()
        self.maybe_fail(model, number, "between")
        self.maybe_fail(model, number, "inside")
        loss = loss + model(x=x * 2).square().mean()
        self.maybe_fail(model, number, "after")
        return loss.float()

    def maybe_fail(self, model: Any, number: int, where: str) -> None:
        if self.fail_at == (number, where):
            if where == "inside":
                (model.module if isinstance(model, FullyShardedDataParallel) else model).raise_inside = True
            else:
                raise ValueError(f"{where} the forward of batch {number}")


def batches() -> list[tuple[int, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(number, torch.randn(4, 8, generator=generator)) for number in range(3)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    generator = torch.Generator().manual_seed(10 + rank)
    model(torch.randn(4, 8, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def number(reading: Reading) -> float:
    assert reading.error is None and reading.value is not None, reading
    return float(reading.value)


def owed_forwards(rank: int, world: int, kind: str) -> list[str]:
    model = build(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, rank)
    loss = Loss()
    probe = LossProbe(loss, batches())
    assert parallel.has_collectives(model)
    baseline = number(probe.measure(model))
    said = []
    for place in ((0, "before"), (1, "between"), (2, "before"), (2, "after")):
        loss.fail_at = place if rank == 1 else None
        reading = probe.measure(model)
        loss.fail_at = None
        if rank == 1:
            assert not reading.inside_forward and not reading.owed and reading.value is None
            said.append(str(reading.error))
        else:
            assert number(reading) == baseline, "the healthy rank has its value"
        # The collectives are still in step: a vote, then a normal measurement of the same weights.
        votes = torch.tensor(float(reading.error is not None))
        dist.all_reduce(votes)
        assert votes == 1
        assert number(probe.measure(model)) == baseline
    train(model, optimizer, rank)
    assert number(probe.measure(model)) != baseline, "the new weights are measured, not copies gathered before"
    return said


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_a_rank_that_fails_between_forwards_does_not_leave_its_peer_alone(two: harness.Pool, kind: str) -> None:
    healthy, failed = two.run(owed_forwards, kind, timeout=60)
    assert healthy == []
    assert failed == [
        "before the forward of batch 0",
        "between the forward of batch 1",
        "before the forward of batch 2",
        "after the forward of batch 2",
    ]


def shards_written_in_place(rank: int, world: int, kind: str) -> None:
    model = build(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = LossProbe(Loss(), batches())
    x = torch.ones(2, 8)

    @torch.no_grad()
    def write() -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            parallel.local(parameter).add_(0.25)

    @torch.no_grad()
    def forward() -> Tensor:
        return model.eval()(x)

    forward()  # leaves the root gathered
    write()  # a step
    measured = number(probe.measure(model))
    assert kind == "fsdp1" or all(isinstance(parameter, DTensor) for parameter in model.parameters())
    write()  # a restore
    after = forward()
    parallel.reshard(model)
    assert torch.equal(after, forward()), "the forward after a measurement reads the shards"
    for parameter in optimizer.param_groups[0]["params"]:
        parallel.local(parameter).detach().sub_(0.25)
    parallel.reshard(model)
    assert measured == pytest.approx(number(probe.measure(model)), rel=1e-5), "the measurement reads the shards"


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_no_gathered_copy_of_the_weights_outlives_a_step_or_a_restore(two: harness.Pool, kind: str) -> None:
    two.run(shards_written_in_place, kind)


def first_measurement_fails(rank: int, world: int) -> bool:
    model = build("fsdp2")
    loss = Loss()
    loss.fail_at = (0, "before")
    reading = LossProbe(loss, batches()).measure(model)
    return reading.owed and not reading.inside_forward


def test_a_first_measurement_that_fails_cannot_pay(two: harness.Pool) -> None:
    assert two.run(first_measurement_fails) == [True, True]


def inside(rank: int, world: int, kind: str) -> tuple[bool, bool, str, float, bool]:
    model = build(kind)
    loss = Loss()
    probe = LossProbe(loss, batches())
    number(probe.measure(model))
    flags = [module.training for module in model.modules()]
    loss.fail_at = (1, "inside") if rank == 1 else None
    start = time.monotonic()
    reading = probe.measure(model)
    seconds = time.monotonic() - start
    clean = flags == [module.training for module in model.modules()]
    return reading.inside_forward, reading.owed, str(reading.error), seconds, clean


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_a_raise_inside_the_forward_comes_back_while_the_peer_is_still_waiting(two: harness.Pool, kind: str) -> None:
    try:
        waiting, raised = two.run(inside, kind, group_timeout=2.0, timeout=60)
    finally:
        two.close()  # a group that timed out is not used again
    assert raised[:3] == (True, True, "inside the forward") and raised[4]
    assert waiting[0] and waiting[4], "the collective's own timeout is a raise inside the forward, too"
    assert raised[3] < waiting[3], "it did not wait for the timeout"


def leaves_no_trace(rank: int, world: int, kind: str) -> None:
    """Training with a measurement after each step equals training without, in every bit."""

    def run(measure: bool) -> list[Tensor]:
        model = build(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        probe = LossProbe(Loss() if kind != "tp" else lambda model, batch: model(batch[1]).square().mean(), batches())
        torch.manual_seed(rank if kind != "tp" else 0)
        for _ in range(4):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            if measure:
                number(probe.measure(model))
            optimizer.zero_grad()
        parallel.reshard(model)
        tensors = [*(p for group in optimizer.param_groups for p in group["params"]), *model.buffers()]
        return [torch.random.get_rng_state(), *(parallel.local(tensor).clone() for tensor in tensors)]

    for mine, theirs in zip(run(True), run(False), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2 bf16", "fsdp1", "tp"])
def test_sharded_training_goes_on_bitwise_as_if_nothing_had_been_measured(two: harness.Pool, kind: str) -> None:
    two.run(leaves_no_trace, kind, timeout=60)


def dtensor_losses(rank: int, world: int) -> list[float]:
    mesh = init_device_mesh("cpu", (2,))
    results = {
        "replicated": DTensor.from_local(torch.tensor(3.0), mesh, [Replicate()]),
        "partial sum": DTensor.from_local(torch.tensor(1.0 + rank), mesh, [Partial()]),
        "partial average": DTensor.from_local(torch.tensor(2.0 + 2 * rank), mesh, [Partial("avg")]),
    }
    values = []
    for result in results.values():
        value = LossProbe(lambda model, batch, result=result: result, [0]).measure(build("")).value
        assert value is not None and not isinstance(value, DTensor) and value.dtype == torch.float64
        values.append(float(value))
    vector = DTensor.from_local(torch.ones(2), mesh, [Shard(0)])
    reading = LossProbe(lambda model, batch: vector, [0]).measure(build(""))
    assert "shape [4]" in str(reading.error)
    return values


def test_losses_that_are_dtensors(two: harness.Pool) -> None:
    assert two.run(dtensor_losses) == [[3.0, 3.0, 3.0]] * 2


def mean_mode(rank: int, world: int) -> tuple[float, float, float]:
    model = build("fsdp2")
    probe = LossProbe(lambda model, batch: model(batch).square().mean(), [torch.randn(8, 8) for _ in range(3)])
    index, count = parallel.data_replica(model)
    whole = number(probe.measure(model))
    share = probe.share(index, count)
    description = repr(share.describe())
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, description)
    assert everyone == [description] * world
    mine = torch.tensor(number(share.measure(model)), dtype=torch.float64)
    total = mine.clone()
    dist.all_reduce(total)
    return whole, float(total) / 2, float(mine)


def test_the_mean_over_shares_is_the_value_of_the_whole(two: harness.Pool) -> None:
    (whole, mean, first), (_, other_mean, second) = two.run(mean_mode)
    assert mean == other_mean == pytest.approx(whole) and first != second


# ---------------------------------------------------------------- gradients


def sharded_norms(rank: int, world: int) -> None:
    """The sum over ranks is the square of the norm of the unsharded gradient, for every placement."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [torch.randn(5, 3), torch.randn(4), torch.randn(1), torch.randn(3, 3)]
    placements: list[Any] = [Shard(0), Replicate(), Shard(0), Replicate()]
    entries = []
    for index, (tensor, placement) in enumerate(zip(whole, placements, strict=True)):
        parameter = nn.Parameter(distribute_tensor(torch.zeros_like(tensor), mesh, [placement]))
        parameter.grad = distribute_tensor(tensor, mesh, [placement])
        if index == 3:  # what sequence parallelism leaves: summands, of which the squares mean nothing
            summand = tensor * (3 if rank else -2)
            parameter.grad = DTensor.from_local(summand, mesh, [Partial()])
        entries.append((f"p{index}", parameter, parallel.residence(build(""), parameter, world)))
    gradients = Gradients(entries)
    total = gradients.square_sum.clone()
    assert type(total) is Tensor and entries[3][1].grad.placements == (Partial(),), "left as it was"
    dist.all_reduce(total)
    torch.testing.assert_close(total, sum(tensor.double().square().sum() for tensor in whole))
    assert [tuple(gradient.shape) for _, gradient in gradients.named()] == [(3 - rank, 3), (4,), (1 - rank,), (3, 3)]
    assert all(type(gradient) is Tensor for _, gradient in gradients.named())


def test_squares_add_up_over_ranks(two: harness.Pool) -> None:
    two.run(sharded_norms)


def real_gradients(rank: int, world: int, kind: str) -> None:
    model = build(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layout = parallel.Layout(model, world)
    generator = torch.Generator().manual_seed(10 + (rank if kind != "tp" else 0))
    model(torch.randn(4, 8, generator=generator)).square().mean().backward()
    parameters = optimizer.param_groups[0]["params"]
    entries = [(f"p{index}", p, layout.residence(p)) for index, p in enumerate(parameters)]
    total = Gradients(entries).square_sum
    assert not bool(NonFiniteGuard().flag(Gradients(entries)))
    dist.all_reduce(total)
    norm = parallel.clip_grad_norm_(model, parameters, 1e9)
    assert float(total) ** 0.5 == pytest.approx(float(norm), rel=1e-6)
    if kind == "fsdp2":
        whole = nn.utils.get_total_norm([p.grad for p in parameters])
        part = torch.linalg.vector_norm(parameters[0].grad)
        assert whole.placements[0].is_replicate() and part.placements[0].is_partial()
        expected = float(norm), float(torch.linalg.vector_norm(parameters[0].grad.full_tensor()))
        for given, value in zip((whole, part), expected, strict=True):
            caller = Gradients(entries, given).caller_norm
            assert caller is not None and type(caller) is Tensor
            assert float(caller) == pytest.approx(value, rel=1e-5)
    if rank == 1:  # one element in one shard
        next(parallel.local(p.grad) for p in parameters if p.grad is not None and parallel.local(p.grad).numel()).view(
            -1
        )[0] = float("nan")
    spoilt = Gradients(entries)
    assert bool(NonFiniteGuard().flag(spoilt)) == (rank == 1), "each rank speaks for its own shards"
    assert (NonFiniteGuard().explain(spoilt) is not None) == (rank == 1)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "tp"])
def test_gradients_of_real_models(two: harness.Pool, kind: str) -> None:
    two.run(real_gradients, kind)
