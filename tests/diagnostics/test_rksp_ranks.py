"""A profile over ranks is that of one process which has all tokens, and training goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import wrapped
from gpt import ids, loss
from harness import RankError
from torch import Tensor

from dist_stability import parallel
from dist_stability.diagnostics import rksp
from dist_stability.report.events import to_json

TWO = ["plain", "ddp", "ddp-checkpoint", "fsdp1", "fsdp1-flat", "fsdp2", "fsdp2-keep", "tp"]
FOUR = ["ddp", "fsdp2", "hsdp", "fsdp1-hybrid"]
UNEVEN = {1: [12], 2: [7, 5], 4: [5, 3, 1, 3]}


def shares(world: int) -> list[Tensor]:
    return list(ids(12, 24, vocabulary=wrapped.VOCABULARY).split(UNEVEN[world]))


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
        return
    for key, part in items:
        yield from flat(part, f"{name}.{key}")


def numbers(found: rksp.Profile) -> dict[str, Any]:
    return dict(flat({k: v for k, v in to_json(found.to_dict()).items() if k not in ("ranks", "warnings")}))


def profiled(rank: int, world: int, mode: str, options: dict[str, Any]) -> dict[str, Any]:
    model = wrapped.wrap(mode, world)
    batch = torch.cat(shares(world)) if mode == "tp" else shares(world)[rank]
    found = rksp.profile(model, None, batch, loss_fn=loss, **options)
    assert found.ranks == world
    return numbers(found)


def compare(everyone: list[dict[str, Any]], world: int, mode: str, options: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        whole = wrapped.model()
        one = numbers(rksp.profile(whole, None, torch.cat(shares(1)), loss_fn=loss, **options))
        mean = loss(whole, shares(1)[0]) if mode == "tp" else sum(loss(whole, part) for part in shares(world)) / world
        mean.backward()
        norm = torch.cat([parameter.grad.flatten() for parameter in whole.parameters()]).norm()
    finally:
        torch.set_default_dtype(torch.float32)
    one[".baselines.gradient_norm"] = float(norm)
    for each in everyone:
        assert each == everyone[0]  # the same on every rank, to the last bit
    assert everyone[0].keys() == one.keys()
    for name, value in one.items():
        if isinstance(value, float):
            # eigenvectors are worth fewer digits than eigenvalues
            loose = (
                1e-4 if name.rpartition(".")[2] in ("condition", "kreiss", "transient") or "condition" in name else 1e-6
            )
            assert everyone[0][name] == pytest.approx(value, rel=loose, abs=1e-9), name
        else:
            assert everyone[0][name] == value, name


OPTIONS: dict[str, Any] = {"memory": 2 * 8 * (6 * 64 + 32)}  # two of the three blocks at a time


@pytest.mark.filterwarnings("ignore::dist_stability.diagnostics.rksp.RkspWarning")
@pytest.mark.parametrize("mode", TWO)
def test_two_ranks_are_one_process(two: Any, mode: str) -> None:
    compare(two.run(profiled, mode, OPTIONS), 2, mode, OPTIONS)


@pytest.mark.filterwarnings("ignore::dist_stability.diagnostics.rksp.RkspWarning")
@pytest.mark.parametrize("mode", FOUR)
def test_four_ranks_are_one_process(four: Any, mode: str) -> None:
    compare(four.run(profiled, mode, OPTIONS), 4, mode, OPTIONS)


def sketched(rank: int, world: int) -> dict[str, Any]:
    rksp.WIDEST_FULL_FIT, rksp._WIDE_RANK = 4, 5
    try:
        return profiled(rank, world, "fsdp2", {})
    finally:
        rksp.WIDEST_FULL_FIT, rksp._WIDE_RANK = 2048, 256


@pytest.mark.filterwarnings("ignore::dist_stability.diagnostics.rksp.RkspWarning")
def test_a_truncated_profile_over_ranks(two: Any, monkeypatch: Any) -> None:
    everyone = two.run(sketched)
    assert everyone[0][".truncated"] and everyone[0][".blocks.0.rank"] == 5
    monkeypatch.setattr(rksp, "WIDEST_FULL_FIT", 4)
    monkeypatch.setattr(rksp, "_WIDE_RANK", 5)
    compare(everyone, 2, "fsdp2", {})


def trained(rank: int, world: int, mode: str, look: bool) -> list[Tensor]:
    """Weights after three steps, and where the random stream is; with a profile between the steps, or without."""
    model = wrapped.wrap(mode, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = shares(world)[rank]
    for step in range(3):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if look and step < 2:
            before = [parallel.local(parameter).clone() for parameter in model.parameters()]
            rksp.profile(model, None, batch, loss_fn=loss if step else None)
            after = [parallel.local(parameter) for parameter in model.parameters()]
            assert all(map(torch.equal, before, after))
            assert all(parameter.grad is None for parameter in model.parameters())
    parallel.reshard(model)
    state = [parallel.local(parameter).clone() for parameter in model.parameters()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return [*state, torch.random.get_rng_state(), torch.tensor(hooks)]


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp1-flat", "fsdp2", "fsdp2-keep"])
def test_training_goes_on_as_if_nothing_had_been(two: Any, mode: str) -> None:
    for plain, looked in zip(two.run(trained, mode, False), two.run(trained, mode, True), strict=True):
        assert all(map(torch.equal, plain, looked))


def shared_out(rank: int, world: int) -> int:
    """How many eigenvalue problems this rank solves."""
    solved = []
    solve = rksp.spectrum
    rksp.spectrum = lambda *arguments: solved.append(1) or solve(*arguments)
    try:
        profiled(rank, world, "ddp", {})
    finally:
        rksp.spectrum = solve
    return len(solved)


def test_the_eigenvalue_problems_are_shared_out(two: Any) -> None:
    assert two.run(shared_out) == [2, 1]


def disagreeing(rank: int, world: int, what: str) -> None:
    model = wrapped.wrap("fsdp2" if what == "gradients" else "ddp", world)
    batch, blocks, options = shares(world)[rank], None, {}
    if what == "tau":
        options = {"tau": 0.1 + rank}
    elif what == "names" and rank == 1:
        blocks = ["blocks.9"]
    elif what == "forward" and rank == 1:
        model.module.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    elif what == "blocks" and rank == 1:
        model.module.blocks = model.module.blocks[:2]
    elif what == "gradients":
        loss(model, batch).backward()
        if rank == 0:
            model.zero_grad()
        options = {"loss_fn": loss}
    rksp.profile(model, blocks, batch, **options)


@pytest.mark.parametrize(
    ("what", "here", "there"),
    [
        ("tau", ("LockstepError", r"rank(s) [1] differ from rank 0"), ("LockstepError", "[1] differ from rank 0")),
        ("names", ("LockstepError", "rank(s) [1] raised an error"), ("NoBlocks", "no module 'blocks.9'")),
        ("forward", ("LockstepError", "rank(s) [1] raised an error"), ("ZeroDivisionError", "division")),
        ("blocks", ("LockstepError", "[1] differ from rank 0"), ("LockstepError", "('blocks.1', 8)]")),
        ("gradients", ("LockstepError", "rank(s) [1] raised an error"), ("ValueError", "rank 1 holds gradients")),
    ],
)
def test_ranks_that_disagree_all_stop(two: Any, what: str, here: Any, there: Any) -> None:
    """With an error that says who and what, and no rank left in a collective."""
    errors = two.run(disagreeing, what, expect_failure=True, timeout=60.0)
    for error, (kind, words) in zip(errors, (here, there), strict=True):
        assert isinstance(error, RankError) and error.type == kind and words in error.message, str(error)


def empty_handed(rank: int, world: int) -> dict[str, Any]:
    model = wrapped.wrap("ddp", world)
    batch = torch.cat(shares(world))
    mask = torch.full(batch.shape, rank == 0)
    return numbers(rksp.profile(model, None, batch, mask=mask))


@pytest.mark.filterwarnings("ignore::dist_stability.diagnostics.rksp.RkspWarning")
def test_a_rank_without_tokens_of_its_own(two: Any) -> None:
    first, second = two.run(empty_handed)
    assert first == second and first[".blocks.0.tokens"] == 12 * 24
