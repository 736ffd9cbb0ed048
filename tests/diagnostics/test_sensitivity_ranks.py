"""Twins on shards: the owner changes its element, replicas change alike, and every rank says the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from edge_models import build, loss_fn
from torch.distributed.tensor import DTensor

from dist_stability import StabilityError
from dist_stability.diagnostics.growth import Verdict
from dist_stability.diagnostics.lyapunov import lyapunov
from dist_stability.diagnostics.perturbation import KScale, OneUlp, Perturbation, RandomUlps
from dist_stability.diagnostics.sensitivity import sensitivity
from dist_stability.diagnostics.twins import Twin, TwinRun

TWO = ["ddp", "fsdp2", "tp"]
FOUR = ["hsdp", "fsdp2+tp"]


def make(mode: str, rank: int, world: int, optimizer: str, seed: int) -> TwinRun:
    job = build(mode, rank, world, optimizer, noise=mode != "tp")
    return TwinRun(job.model, job.optimizer, lambda step: loss_fn(job.model, job.batch), predict=None)


def whole(twin: Twin) -> dict[str, torch.Tensor]:
    full = {}
    for name, handle in zip(twin.space.names, twin.space.handles, strict=True):
        full[name] = (handle.full_tensor() if isinstance(handle, DTensor) else handle).detach().clone()
    return full


def placed(rank: int, world: int, mode: str) -> None:
    """Global indices, also of a parameter of one element and of one that is cut along both dimensions."""
    made = partial(make, mode, rank, world, "sgd")
    plain = whole(Twin(made, 0, Perturbation()))
    places = {"embed.weight": 93, "gain": 0, "blocks.1.up.weight": 77, "blocks.0.down.weight": 127, "norm.bias": 7}
    for name, index in places.items():
        twin = Twin(made, 0, OneUlp(name, index))
        twin.perturbation.before_step(0, twin.space)
        for other, weights in whole(twin).items():
            changed = (weights != plain[other]).flatten().nonzero().flatten().tolist()
            assert changed == ([index] if other == name else []), (name, other, changed)


@pytest.mark.parametrize("mode", TWO)
def test_an_index_is_global_on_two_ranks(two: Any, mode: str) -> None:
    two.run(placed, mode)


@pytest.mark.parametrize("mode", FOUR)
def test_an_index_is_global_on_four_ranks(four: Any, mode: str) -> None:
    four.run(placed, mode)


def twins(rank: int, world: int, mode: str, optimizer: str) -> Any:
    made = partial(make, mode, rank, world, optimizer)
    exact = sensitivity(made, KScale(2), 5, gate_steps=0)
    assert set(exact.relative_l1) == {0.0} and exact.verdict is Verdict.BENIGN
    found = sensitivity(made, KScale(3), 6, gate_steps=4)
    assert found.begun == 0 and 0.0 < found.relative_l2[0] < 1e-6
    ulps = sensitivity(made, RandomUlps(), 4, gate_steps=0)
    assert ulps.begun == 0 and 0.0 < ulps.relative_l2[0] < 1e-5
    keys = {"blocks.0.mix.bias", "blocks.1.mix.bias"} if optimizer == "adamw" else set()
    assert keys <= set(found.left_out) and bool(found.left_out) is bool(keys)
    exponent = lyapunov(made, 4)
    return found, ulps, exponent


@pytest.mark.parametrize(("mode", "optimizer"), [("ddp", "sgd"), ("fsdp2", "adamw"), ("tp", "adamw")])
def test_every_rank_says_the_same(two: Any, mode: str, optimizer: str) -> None:
    first, second = (repr(each) for each in two.run(twins, mode, optimizer))
    assert first == second


def replicas_stay_equal(rank: int, world: int) -> float:
    """Random ulps on HSDP: a replica that was changed otherwise would show in the sum over all weights."""
    made = partial(make, "hsdp", rank, world, "sgd")
    twin = Twin(made, 0, RandomUlps(0.5))
    twin.perturbation.before_step(0, twin.space)
    mine = torch.cat([part.flatten().double() for part in twin.space.live()])
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, mine)
    assert torch.equal(everyone[0], everyone[2]) and torch.equal(everyone[1], everyone[3])
    return float(mine.sum())


def test_replicas_change_alike(four: Any) -> None:
    four.run(replicas_stay_equal)


def uneven(rank: int, world: int) -> str:
    made = partial(make, "ddp", rank, world, "sgd")
    with pytest.raises(StabilityError, match="no parameter 'other'"):
        sensitivity(made, OneUlp("other"), 2, gate_steps=0)
    return "refused"


def test_bad_input_is_refused_on_every_rank(two: Any) -> None:
    assert two.run(uneven) == ["refused", "refused"]
