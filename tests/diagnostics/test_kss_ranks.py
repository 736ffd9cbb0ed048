"""Shaping over ranks: one backward gives the mean of what each rank's tokens say, whatever the sharding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import wrapped
from gpt import ids, loss
from harness import RankError
from torch import Tensor, nn

from dist_stability import parallel
from dist_stability.diagnostics import kss
from dist_stability.diagnostics.kss import LOCAL, PAPER, Shaping, SpectralShaping
from dist_stability.diagnostics.penalty import REASONS, Skip

PRESETS = {"local": Shaping(rank=4), "paper": Shaping(rank=4, every=2, layers=0.5, local=False)}
STEPS = 3


def batch(step: int, replica: int) -> Tensor:
    return ids(4, 16, vocabulary=wrapped.VOCABULARY, seed=100 * step + replica)


class Fails:
    """Stands for ``spectral_cost``: fails in the number-th call of each step on one rank."""

    def __init__(self, rank: int, number: int) -> None:
        self._plain, self._here, self._number, self._calls = kss.spectral_cost, parallel.this_rank() == rank, number, 0

    def __call__(self, *arguments: Any) -> Any:
        self._calls += 1
        if self._here and self._calls % 3 == self._number:
            raise Skip(REASONS[2])
        return self._plain(*arguments)


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if parallel.is_dtensor(tensor) else tensor).detach().clone()


def trained(rank: int, world: int, mode: str, preset: str, fails: bool) -> dict[str, Any]:
    """Gradients of each step, and what was applied."""
    model = wrapped.wrap(mode, world, norm="none")
    shaping = SpectralShaping(model, preset=PRESETS[preset])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if fails:
        kss.spectral_cost = Fails(1, 2)
    found = []
    try:
        for step in range(STEPS):
            shaping(loss, batch(step, rank)).backward()
            named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
            found.append({name.replace("_checkpoint_wrapped_module.", ""): whole(each) for name, each in named.items()})
            optimizer.step()
            optimizer.zero_grad()
    finally:
        kss.spectral_cost = kss.spectral_cost._plain if fails else kss.spectral_cost
    return {"gradients": found, "blocks": [shaping.last.blocks], "skips": shaping.skips}


def expected(world: int, preset: str, without: str = "") -> list[dict[str, Tensor]]:
    """One process: the mean over the ranks' batches, each with its own penalty."""
    torch.set_default_dtype(torch.float64)
    try:
        model: nn.Module = wrapped.model(norm="none")
        shapings = [SpectralShaping(model, preset=PRESETS[preset]) for _ in range(world)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for step in range(STEPS):
            for replica, shaping in enumerate(shapings):
                names = shaping.chosen(step)
                shaping.chosen = lambda step, names=names: tuple(name for name in names if name != without)
                (shaping(loss, batch(step, replica)) / world).backward()
                del shaping.chosen
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
            optimizer.step()
            optimizer.zero_grad()
        return found
    finally:
        torch.set_default_dtype(torch.float32)


def compare(everyone: list[dict[str, Any]], reference: list[dict[str, Tensor]]) -> None:
    for each in everyone:
        assert each["blocks"] == everyone[0]["blocks"] and each["skips"] == everyone[0]["skips"]
        for found, wanted in zip(each["gradients"], reference, strict=True):
            assert found.keys() == wanted.keys()
            for name, gradient in wanted.items():
                torch.testing.assert_close(
                    found[name], gradient, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("preset", ["local", "paper"])
@pytest.mark.parametrize("mode", ["ddp", "ddp-checkpoint", "fsdp2", "fsdp2-keep"])
def test_two_ranks_are_one_process(two: Any, mode: str, preset: str) -> None:
    compare(two.run(trained, mode, preset, False), expected(2, preset))


@pytest.mark.parametrize("preset", ["local", "paper"])
@pytest.mark.parametrize("mode", ["fsdp2", "hsdp"])
def test_four_ranks_are_one_process(four: Any, mode: str, preset: str) -> None:
    compare(four.run(trained, mode, preset, False), expected(4, preset))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_what_one_rank_must_skip_all_skip(two: Any, mode: str) -> None:
    everyone = two.run(trained, mode, "local", True)
    compare(everyone, expected(2, "local", without="blocks.1"))
    assert everyone[0]["blocks"] == [("blocks.0", "blocks.2")]
    assert everyone[0]["skips"]["no convergence"] == STEPS


def refused(rank: int, world: int, mode: str, local: bool, alpha: float) -> str:
    model = wrapped.wrap(mode, world)
    shaping = SpectralShaping(model, preset=LOCAL if local else PAPER, alpha=alpha * (1 + rank))
    shaping(loss, batch(0, rank)).backward()
    return "done"


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("fsdp1", "its parameters are gathered elsewhere (fsdp1)"),
        ("tp", "its parameters are gathered elsewhere (tp)"),
        ("ddp", "rank(s) [1] differ from rank 0"),
    ],
)
def test_what_cannot_work_is_refused_on_every_rank(two: Any, mode: str, words: str) -> None:
    for error in two.run(refused, mode, True, 0.1, expect_failure=True, timeout=60.0):
        assert isinstance(error, RankError) and words in error.message, str(error)
