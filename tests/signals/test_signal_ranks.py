"""Signals over ranks: whatever the sharding, the numbers are those of one process that has everything.

In float64, so that rounding cannot hide a shard that is counted twice, nor noise in a gradient that should be 0 be
divided by the root of a second moment of the same noise.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parallel"))  # the workers import this file, too
import modes

from dist_stability import parallel
from dist_stability.signals import (
    GradientAgreement,
    GroupNorms,
    Monitor,
    RankAgreement,
    TrainingLoss,
    UpdateRatio,
    UpdateRms,
    measure,
    step_context,
)

TWO = ["ddp", "fsdp1-full", "fsdp1-grad", "fsdp1-none", "fsdp1-flat-full", "fsdp2", "fsdp2-uneven", "fsdp2-keep", "tp"]
FOUR = ["hsdp", "fsdp1-hybrid", "fsdp2+tp", "dp+tp"]
STEPS = 3


def build(mode: str, rank: int, world: int, like: str = "") -> modes.Run:
    torch.set_default_dtype(torch.float64)
    run = modes.build(mode, rank, world, width=7 if "uneven" in mode + like else 8)
    next(module for module in run.model.modules() if isinstance(module, nn.Dropout)).p = 0.0
    return run


def loss(run: modes.Run, index: int, replica: int) -> Tensor:
    """In float64, unlike the loss of ``modes``."""
    draw = torch.Generator().manual_seed(97 * index + replica)
    x = torch.randint(0, 10, (6,), generator=draw)
    return F.cross_entropy(run.model(x), (x + 1) % 10)


def average(run: modes.Run) -> None:
    """Data parallelism by hand, where the mode has no wrapper for it."""
    for parameter in run.model.parameters() if run.average is not None else ():
        shard = parallel.local(parameter.grad)
        dist.all_reduce(shard, group=run.average)
        shard /= 2


def whole_backward(run: modes.Run, index: int, replicas: int) -> None:
    """One process: the mean over the data of all replicas."""
    run.optimizer.zero_grad()
    for replica in range(replicas):
        (loss(run, index, replica) / replicas).backward()


def plain(like: str, replicas: int) -> dict[str, dict[str, Any]]:
    """Every quantity of every tensor by plain formulas, in one process with the whole model."""
    run = build("single", 0, 1, like)
    for index in range(STEPS):
        whole_backward(run, index, replicas)
        run.optimizer.step()
    whole_backward(run, STEPS, replicas)
    found: dict[str, dict[str, Any]] = {}
    for name, p in run.model.named_parameters():
        state = run.optimizer.state[p]
        corrected = 1 - 0.999 ** float(state["step"])
        ratio = corrected * p.grad.square() / state["exp_avg_sq"].clamp_min(1e-16)
        before = p.detach().clone()
        found[name] = {"square": p.grad.square().sum(), "rms": ratio.sum(), "n": p.numel(), "before": before}
    run.optimizer.step()
    for name, p in run.model.named_parameters():
        delta = p.detach() - found[name].pop("before")
        found[name].update(
            moved=delta.abs().sum(), delta=delta.square().sum(), theta=(p.detach() - delta).square().sum()
        )
    return {name: {key: float(value) for key, value in entry.items()} for name, entry in found.items()}


def updates(rank: int, world: int, mode: str) -> dict[str, float]:
    run = build(mode, rank, world)
    expected = plain(mode, parallel.data_replica(run.model)[1] if run.average is None else 2)
    for index in range(STEPS + 1):
        run.optimizer.zero_grad()
        loss(run, index, run.replica).backward()
        average(run)
        if index < STEPS:
            run.optimizer.step()
    context = step_context(run.model, run.optimizer)
    rms, ratio, groups = UpdateRms(every_tensor=True), UpdateRatio(every_tensor=True), GroupNorms()
    said = measure(context, rms, ratio, groups, step=run.optimizer.step).values
    close = lambda a, b: a == pytest.approx(b, rel=1e-6, abs=1e-7)  # noqa: E731
    total = {key: math.fsum(entry[key] for entry in expected.values()) for key in ("square", "rms", "n", "moved")}
    norms = math.fsum(value**2 for name, value in said.items() if name.startswith("gradient_norm/"))
    assert close(norms, total["square"])
    lengths = [math.fsum(entry[key] for entry in expected.values()) for key in ("delta", "theta")]
    assert close(said["update_ratio"], math.sqrt(lengths[0] / lengths[1]))
    if "flat" in mode:  # other tensors, and padding in some: only what ignores both can be compared
        summed = sum_of(rms.collect())[: len(context.gradients.parameters)]
        assert close(float(summed.sum()), total["rms"])
        return said
    assert close(said["update_rms"], math.sqrt(total["rms"] / total["n"]))
    assert close(said["effective_step"], total["moved"] / total["n"] / 0.02)
    names = [name for name, _, _ in context.gradients.parameters]
    assert sorted(names) == sorted(expected)
    for name, entry in expected.items():
        assert close(said[f"update_rms/{name}"], math.sqrt(entry["rms"] / entry["n"])), name
        assert close(said[f"update_ratio/{name}"], math.sqrt(entry["delta"] / entry["theta"])), name
    by_id = {id(parameter): name for name, parameter, _ in context.gradients.parameters}
    for number, group in enumerate(run.optimizer.param_groups):
        square = math.fsum(expected[by_id[id(p)]]["square"] for p in group["params"])
        assert close(said[f"gradient_norm/{number}"], math.sqrt(square))
    return said


def sum_of(vector: Tensor) -> Tensor:
    dist.all_reduce(vector)
    return vector


def alike(results: list[dict[str, float]]) -> None:
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("mode", TWO)
def test_updates_on_two_ranks(two: Any, mode: str) -> None:
    alike(two.run(updates, mode))


@pytest.mark.parametrize("mode", FOUR)
def test_updates_on_four_ranks(four: Any, mode: str) -> None:
    alike(four.run(updates, mode))


def cosine(pairs: list[tuple[Tensor, Tensor]]) -> float:
    dots, first, second = (math.fsum(float(f(a, b)) for a, b in pairs) for f in (dot, aa, bb))
    return dots / math.sqrt(first * second)


dot: Callable[[Tensor, Tensor], Tensor] = lambda a, b: a @ b  # noqa: E731
aa: Callable[[Tensor, Tensor], Tensor] = lambda a, b: a @ a  # noqa: E731
bb: Callable[[Tensor, Tensor], Tensor] = lambda a, b: b @ b  # noqa: E731


def own_gradient(index: int, replica: int, like: str = "") -> Tensor:
    run = build("single", 0, 1, like)
    loss(run, index, replica).backward()
    return torch.cat([p.grad.flatten() for p in run.model.parameters()])


def micro_batches(rank: int, world: int, mode: str) -> dict[str, float]:
    """Reduced after each micro-batch: the part at the mark is the mean over replicas."""
    run = build(mode, rank, world)
    replicas = parallel.data_replica(run.model)[1] if run.average is None else 1
    agreement = GradientAgreement(run.optimizer)
    for number in range(3):
        loss(run, number, run.replica if run.average is None else 0).backward()
        if number == 0:
            agreement.mark()
    said = measure(step_context(run.model, run.optimizer), agreement).values
    first, *rest = (sum(own_gradient(i, replica, mode) for replica in range(replicas)) for i in range(3))
    assert said["gradient_agreement"] == pytest.approx(cosine([(first, sum(rest))]), abs=1e-6)
    return said


@pytest.mark.parametrize("mode", TWO)
def test_micro_batches_on_two_ranks(two: Any, mode: str) -> None:
    alike(two.run(micro_batches, mode))


@pytest.mark.parametrize("mode", FOUR)
def test_micro_batches_on_four_ranks(four: Any, mode: str) -> None:
    alike(four.run(micro_batches, mode))


def unsynchronized(rank: int, world: int) -> dict[str, float]:
    """DDP's no_sync: a rank's own micro-batch against everything else."""
    run = build("ddp", rank, world)
    agreement = GradientAgreement(run.optimizer, replicas=world)
    with run.model.no_sync():
        loss(run, 0, rank).backward()
    agreement.mark()
    loss(run, 1, rank).backward()
    said = measure(step_context(run.model, run.optimizer), agreement).values
    single = {(i, r): own_gradient(i, r) for i in range(2) for r in range(world)}
    pairs = [(single[0, r], sum(g for key, g in single.items() if key != (0, r))) for r in range(world)]
    assert said["gradient_agreement"] == pytest.approx(cosine(pairs), abs=1e-6)
    return said


def test_micro_batches_under_no_sync(two: Any) -> None:
    alike(two.run(unsynchronized))


def unreduced(rank: int, world: int, mode: str) -> None:
    """FSDP's no_sync: at the mark nothing has been reduced, and nothing may be said."""
    run = build(mode, rank, world)
    agreement = GradientAgreement(run.optimizer)
    if mode == "fsdp2":
        run.model.set_requires_gradient_sync(False)
        loss(run, 0, rank).backward()
        run.model.set_requires_gradient_sync(True)
    else:
        with run.model.no_sync():
            loss(run, 0, rank).backward()
    agreement.mark()
    loss(run, 1, rank).backward()
    monitor = Monitor((agreement,), free=False)
    monitor.before_step(step_context(run.model, run.optimizer))
    said = monitor.read(sum_of(monitor.collect()).tolist()).values
    if mode == "fsdp2":
        assert said == {} == monitor.errors
    else:
        assert math.isnan(said["gradient_agreement"])
        assert "at the mark" in str(monitor.errors["gradient_agreement"])


@pytest.mark.parametrize("mode", ["fsdp2", "fsdp1-full", "fsdp1-flat-full"])
def test_micro_batches_under_no_sync_of_fsdp(two: Any, mode: str) -> None:
    two.run(unreduced, mode)


def ranks_agree(rank: int, world: int, clip: bool, scaled: bool) -> dict[str, float]:
    run = build("ddp", rank, world)
    signal = RankAgreement(run.model)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=scaled)
    assert measure(step_context(run.model, run.optimizer), signal).values == {}
    for index in range(2):  # the second reading forgets the first
        run.optimizer.zero_grad()
        scaler.scale(loss(run, index, rank)).backward()
        scaler.unscale_(run.optimizer)
        norm = parallel.clip_grad_norm_(run.model, run.model.parameters(), 0.01) if clip else None
        said = measure(step_context(run.model, run.optimizer, grad_norm=norm, scaler=scaler), signal).values
        scaler.update()
    own = [own_gradient(1, r) for r in range(world)]
    dots = [float(own[i] @ own[j]) for i in range(world) for j in range(world) if i != j]
    expected = (math.fsum(dots) / len(dots)) / (math.fsum(float(g @ g) for g in own) / world)
    assert said["rank_agreement"] == pytest.approx(expected, abs=1e-6)
    assert measure(step_context(run.model, run.optimizer), signal).values == {}  # no backward since
    return said


@pytest.mark.parametrize(("clip", "scaled"), [(False, False), (True, False), (False, True)])
def test_ranks_agree_on_two_ranks(two: Any, clip: bool, scaled: bool) -> None:
    alike(two.run(ranks_agree, clip, scaled))


def test_ranks_agree_on_four_ranks(four: Any) -> None:
    alike(four.run(ranks_agree, False, False))


def averages(rank: int, world: int) -> None:
    """In float32, with several buckets and no power of two ranks: the hook changes no bit of the mean."""
    runs = []
    for watched in (True, False):
        torch.manual_seed(0)
        layers = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))
        model = DistributedDataParallel(layers, bucket_cap_mb=0.5)
        if watched:
            RankAgreement(model)
        for seed in range(3):  # DDP makes its buckets anew after the first
            model.zero_grad()
            x = torch.randn(8, 300, generator=torch.Generator().manual_seed(10 * seed + rank))
            with model.no_sync():
                model(x).square().mean().backward()
            model(2 * x).square().mean().backward()
        runs.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_hook_changes_no_bit_on_two_ranks(two: Any) -> None:
    two.run(averages)


def test_the_hook_changes_no_bit_on_three_ranks() -> None:
    import harness

    harness.pool(3).run(averages)


def many_buckets(rank: int, world: int) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(100, 100) for _ in range(6)))
    alone = nn.Sequential(*(nn.Linear(100, 100) for _ in range(6)))
    alone.load_state_dict(layers.state_dict())
    model = DistributedDataParallel(layers, bucket_cap_mb=0.05)
    signal = RankAgreement(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(8, 100, generator=torch.Generator().manual_seed(rank))
    for number in range(4):
        model.zero_grad()
        model(x).square().mean().backward()
        square = float(signal._square)
        if number < 2:  # DDP makes its buckets anew after the first; the last backward follows one nobody asked about
            measure(step_context(model, optimizer), signal)
    alone(x).square().mean().backward()
    assert square == pytest.approx(sum(float(p.grad.double().square().sum()) for p in alone.parameters()), rel=1e-5)


def test_every_bucket_counts_once(two: Any) -> None:
    two.run(many_buckets)


def partitioned(rank: int, world: int) -> dict[str, float]:
    """ZeRO-1: each parameter's second moment lies on one rank only, beside one that lies on all."""
    said = []
    for kind in (ZeroRedundancyOptimizer, torch.optim.AdamW):
        run = build("ddp", rank, world)
        options = {"optimizer_class": torch.optim.AdamW} if kind is ZeroRedundancyOptimizer else {}
        parameters = list(run.model.parameters())
        optimizers = [kind(parameters[:4], lr=0.02, **options), torch.optim.AdamW(parameters[4:], lr=0.01)]

        def step(optimizers: Any = optimizers) -> None:
            for optimizer in optimizers:
                optimizer.step()

        for index in range(STEPS):
            run.model.zero_grad()
            loss(run, index, rank).backward()
            if index < STEPS - 1:
                step()
        signals = UpdateRms(every_tensor=True), UpdateRatio(every_tensor=True)
        said.append(measure(step_context(run.model, optimizers), *signals, step=step).values)
    assert said[0] == pytest.approx(said[1], rel=1e-9)
    return said[0]


def test_state_on_one_rank_only(two: Any) -> None:
    alike(two.run(partitioned))


def one_bad_rank(rank: int, world: int, mode: str) -> dict[str, float]:
    run = build(mode, rank, world)
    for index in range(2):
        run.optimizer.zero_grad()
        loss(run, index, run.replica).backward()
        if index == 0:
            run.optimizer.step()
    if rank == 1:
        shard = parallel.local(run.model.get_submodule("module" if mode == "ddp" else "").block.up.weight.grad)
        shard.view(-1)[0] = math.nan
    monitor = Monitor((UpdateRms(every_tensor=True), UpdateRatio(), GroupNorms()))
    context = step_context(run.model, run.optimizer, loss=math.inf if rank else 1.0)
    monitor.before_step(context)
    run.optimizer.step()
    monitor.after_step(context)
    vector = monitor.collect()
    assert vector.isfinite().all()
    said = monitor.read(sum_of(vector).tolist())
    assert math.isnan(said.values["update_rms/block.up.weight"]) and math.isnan(said.values["training_loss"])
    assert math.isfinite(said.values["update_rms/block.down.weight"])
    assert said.where["update_rms_max"] == "block.up.weight" == said.where["update_ratio_max"]
    return {name: value for name, value in said.values.items() if not math.isnan(value)}


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_nan_on_one_rank_is_nan_on_all(two: Any, mode: str) -> None:
    alike(two.run(one_bad_rank, mode))


class Broken(TrainingLoss):
    name = "broken"

    def before_step(self, context: Any) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("only here")
        super().before_step(context)


def broken_rank(rank: int, world: int) -> None:
    run = build("ddp", rank, world)
    loss(run, 0, rank).backward()
    monitor = Monitor((Broken(),))
    monitor.before_step(step_context(run.model, run.optimizer, loss=2.0 + rank))
    said = monitor.read(sum_of(monitor.collect()).tolist()).values
    assert said["training_loss"] == 2.5 and math.isnan(said["broken"])
    assert list(monitor.errors) == (["broken"] if rank == 1 else [])


def test_a_signal_that_raises_on_one_rank_hangs_nobody(two: Any) -> None:
    two.run(broken_rank)
