"""The probe over ranks sees what one process with all the data sees, and training goes on as if it had not been."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import wrapped
from choice import often
from gpt import ids, loss
from harness import RankError
from torch import Tensor

from dist_stability import parallel
from dist_stability.diagnostics import lr_probe

EARLY = 6
"""Steps, of the sixteen of a search, after which runs that differ in rounding are compared no more."""

TWO = ["plain", "ddp", "fsdp1", "fsdp1-flat", "fsdp2", "fsdp2-keep", "tp"]


def data(seed: int) -> Tensor:
    return ids(4, 16, vocabulary=wrapped.VOCABULARY, seed=seed)


def shares(world: int, rank: int) -> list[Tensor]:
    return [data(seed).chunk(world)[rank] for seed in range(3)]


def probed(rank: int, world: int, mode: str) -> list[Any]:
    model = wrapped.wrap(mode, world)
    mine = shares(1, 0) if mode == "tp" else shares(world, rank)
    found = lr_probe.risk(model, loss, mine, 0.1)
    search = lr_probe.stable_learning_rate(model, loss, mine, low=0.1, precision=1.5)
    return [found, search.lr, search.too_risky, search.tried]


def numbers(found: list[Any]) -> list[float]:
    """What does not depend on rounding: at rates that diverge it grows with every step, so only the first ones."""
    risks = [found[0], *found[3]]
    early = [(r.lr, *r.losses[:EARLY], *r.gradient_norms[:EARLY]) for r in risks]
    return [found[0].score, found[1], found[2], *(x for each in early for x in each)]


@pytest.mark.parametrize("mode", often(TWO, ("fsdp1-flat", "fsdp2")))
def test_two_ranks_are_one_process(two: Any, mode: str) -> None:
    first, second = two.run(probed, mode)
    torch.set_default_dtype(torch.float64)
    try:
        one = probed(0, 1, "plain")
    finally:
        torch.set_default_dtype(torch.float32)
    assert first == second  # to the last bit
    assert numbers(first) == pytest.approx(numbers(one), rel=1e-4)


@pytest.mark.parametrize("mode", often(("hsdp", "fsdp2"), ["hsdp"]))
def test_four_ranks_are_one_process(four: Any, mode: str) -> None:
    everyone = four.run(probed, mode)
    torch.set_default_dtype(torch.float64)
    try:
        one = probed(0, 1, "plain")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(each == everyone[0] for each in everyone)
    assert numbers(everyone[0]) == pytest.approx(numbers(one), rel=1e-4)


def trained(rank: int, world: int, mode: str, look: bool) -> list[Tensor]:
    """Weights after three steps, and where the random stream is; with probes between the steps, or without."""
    model = wrapped.wrap(mode, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, batch in enumerate(shares(world, rank)):
        if look:
            before = [parallel.local(parameter).clone() for parameter in model.parameters()]
            lr_probe.risk(model, loss, shares(world, rank), 1.0)
            if step == 1:
                failing(model, rank, world)
            after = [parallel.local(parameter) for parameter in model.parameters()]
            assert all(map(torch.equal, before, after))
            assert all(parameter.grad is None for parameter in model.parameters())
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    parallel.reshard(model)
    return [*(parallel.local(p).clone() for p in model.parameters()), torch.random.get_rng_state()]


def failing(model: Any, rank: int, world: int) -> None:
    """A loss function that raises on every rank after its third forward."""
    calls = []

    def breaks(called: Any, batch: Tensor) -> Tensor:
        value = loss(called, batch)
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("on purpose")
        return value

    with pytest.raises(ZeroDivisionError):
        lr_probe.risk(model, breaks, shares(world, rank), 1.0)


@pytest.mark.parametrize("mode", often(TWO[1:-1], ("ddp", "fsdp1", "fsdp2-keep")))
def test_training_goes_on_as_if_nothing_had_been(two: Any, mode: str) -> None:
    for plain, looked in zip(two.run(trained, mode, False), two.run(trained, mode, True), strict=True):
        assert all(map(torch.equal, plain, looked))


def unlucky(rank: int, world: int, mode: str) -> lr_probe.Risk:
    def poisoned(model: Any, batch: Tensor) -> Tensor:
        return loss(model, batch) * (math.nan if rank == 1 else 1.0)

    return lr_probe.risk(wrapped.wrap(mode, world), poisoned, shares(world, rank), 0.1)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_not_finite_on_one_rank_is_so_on_all(two: Any, mode: str) -> None:
    first, second = two.run(unlucky, mode)
    assert first.score == second.score == math.inf and first.losses == second.losses == (math.inf,)


def disagreeing(rank: int, world: int, what: str) -> None:
    model = wrapped.wrap("fsdp2" if what == "gradients" else "ddp", world)
    mine, lr, loss_fn = shares(world, rank), 0.1, loss
    if what == "lr":
        lr = 0.1 + rank
    elif what == "batches" and rank == 1:
        mine = mine[:2]
    elif what == "raises" and rank == 1:
        loss_fn = None  # type: ignore[assignment]
    elif what == "gradients":
        loss(model, mine[0]).backward()
        if rank == 0:
            model.zero_grad()
    lr_probe.risk(model, loss_fn, mine, lr)


@pytest.mark.parametrize(
    ("what", "here", "there"),
    [
        ("lr", ("LockstepError", "rank(s) [1] differ from rank 0"), ("LockstepError", "'lr': 1.1")),
        ("batches", ("LockstepError", "rank(s) [1] differ"), ("LockstepError", "2 batches")),
        ("raises", ("LockstepError", "rank(s) [1] raised an error"), ("TypeError", "not callable")),
        ("gradients", ("LockstepError", "rank(s) [1] raised an error"), ("ValueError", "rank 1 holds gradients")),
    ],
)
def test_ranks_that_disagree_all_stop(two: Any, what: str, here: Any, there: Any) -> None:
    errors = two.run(disagreeing, what, expect_failure=True, timeout=60.0)
    for error, (kind, words) in zip(errors, (here, there), strict=True):
        assert isinstance(error, RankError) and error.type == kind and words in error.message, str(error)
