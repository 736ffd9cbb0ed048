"""Sharpness on shards: the number does not depend on the wrapper, and nothing is left of the measurement."""

from __future__ import annotations

from typing import Any

import edge_models
import pytest
import torch
from choice import often, slow
from edge_models import build, loss_fn, twice_differentiable

from dist_stability.diagnostics.sharpness import Sharpness
from dist_stability.diagnostics.space import ShardSpace

STEPS = 12
TWO = ["ddp", "fsdp1", "fsdp1-flat", "fsdp2", "hsdp-1", "tp"]
FOUR = ["fsdp2", "hsdp", "fsdp2+tp"]


@pytest.fixture(scope="module")
def exact() -> tuple[float, float]:
    """Converged double backward in one process, which has the whole batch."""
    job = build("single", 0, 1)
    for _ in range(STEPS):
        job.step()
    reading = Sharpness(job.model, job.optimizer, twice_differentiable, [job.batch], exact=True).converge(1e-6, 300)
    assert reading.residual < 0.01 and reading.products < 300
    return reading.eigenvalue, weights(job)


def weights(job: edge_models.Job) -> float:
    """The length of all weights: what is replicated must count once."""
    space = ShardSpace(job.model, job.optimizer)
    return space.length(space.live())


def converged(rank: int, world: int, mode: str) -> tuple[float, bool | None, float, float]:
    job = build(mode, rank, world)
    for _ in range(STEPS):
        job.step()
    before = job.image()
    measured = Sharpness(job.model, job.optimizer, loss_fn, [job.batch])
    reading = measured.converge(1e-4, 60)
    same(before, job.image())
    assert sum(reading.shares.values()) == pytest.approx(1.0)
    ends = measured.ends(10)
    same(before, job.image())
    assert ends.upper.value == pytest.approx(reading.eigenvalue, rel=0.01)
    assert ends.lower.value < reading.eigenvalue
    return reading.eigenvalue, reading.reliable, reading.loss, weights(job)


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys(), sorted(before.keys() ^ after.keys())
    for name, value in before.items():
        equal = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert equal, name


def check(results: list[tuple[float, bool | None, float, float]], exact: tuple[float, float]) -> None:
    assert len(set(results)) == 1  # to the bit, on every rank
    value, reliable, loss, length = results[0]
    assert reliable
    assert value == pytest.approx(exact[0], rel=0.005)
    assert length == pytest.approx(exact[1], rel=1e-4)
    assert 0.0 < loss < 5.0


@pytest.mark.parametrize("mode", often(TWO, ("ddp", "fsdp1-flat", "fsdp2")))
def test_two_ranks_see_what_one_process_sees(two: Any, exact: tuple[float, float], mode: str) -> None:
    """Within 0.5 % of the reference, so that any two of these are within 1 % of each other."""
    check(two.run(converged, mode), exact)


@pytest.mark.parametrize("mode", often(FOUR, FOUR[-1:]))
def test_four_ranks_see_what_one_process_sees(four: Any, exact: tuple[float, float], mode: str) -> None:
    check(four.run(converged, mode), exact)


def transparent(rank: int, world: int, mode: str, optimizer: str) -> None:
    """A run with measurements in it, between backward and step, is the run without them."""
    images = []
    for measuring in (False, True):
        job = build(mode, rank, world, optimizer, noise=True)
        measured = Sharpness(job.model, job.optimizer, loss_fn, [job.batch])
        for step in range(5):
            job.optimizer.zero_grad()
            loss_fn(job.model, job.batch).backward()
            if measuring and step in (2, 3):
                before = job.image()
                measured.measure(2, check=True)
                same(before, job.image())
            job.optimizer.step()
        images.append({k: v for k, v in job.image().items() if not k.startswith("gradient object")})
    same(*images)


@pytest.mark.parametrize(
    ("mode", "optimizer"),
    [("ddp", "sgd"), ("ddp-view", "adamw"), ("fsdp1", "sgd"), ("fsdp2", "adamw"), ("tp", "adamw")],
)
def test_a_measurement_leaves_no_trace(two: Any, mode: str, optimizer: str) -> None:
    two.run(transparent, mode, optimizer)


class Fault(Exception):
    """Raised by the test."""


def interrupted(rank: int, world: int, mode: str, inside: bool) -> str:
    job = build(mode, rank, world, noise=True)
    for _ in range(3):
        job.step()
    calls = 0

    def failing(model: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 and rank == 1:
            if inside:
                inner = edge_models.parallel.forward_module(model).blocks[1]
                inner.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Fault))
            else:
                raise Fault
        return loss_fn(model, batch)

    measured = Sharpness(job.model, job.optimizer, failing, [job.batch])
    before = job.image()
    raised = ""
    try:
        measured.measure(4)
    except Exception as error:
        raised = type(error).__name__
    assert calls >= 3
    same(before, job.image())
    return raised


@pytest.mark.parametrize(("mode", "inside"), [("fsdp2", True), slow(("fsdp2", False)), slow(("ddp", False))])
def test_a_rank_that_raises_in_the_middle_leaves_no_trace_on_any(two: Any, mode: str, inside: bool) -> None:
    raised = two.run(interrupted, mode, inside, group_timeout=4.0)
    assert raised[1] == "Fault" and raised[0] not in ("", "Fault")
    two.close()  # the group timed out
