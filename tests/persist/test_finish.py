"""A run that is left between two steps: ``finish()`` seals the last commit, and a restart goes on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import zoo
from test_resume_ranks import left
from test_shared_memory import Run, equal, ours, resumed, seals
from zoo import Case

from dist_stability import SharedMemory
from dist_stability.snapshot.tiers import record
from dist_stability.testing import FaultInjector, StateImage, capture_state, compare

FAULT = "gradient-scale:step=9,factor=300"


def run(
    rank: int, world: int, case: Case, folder: str, options: dict[str, Any], leave: int, prefetched: bool = False
) -> tuple[int, StateImage | None, list[tuple[int, str]]]:
    """Train from where an earlier start was left, up to attempt ``leave`` or to the end: (began with, state, verdicts).

    Without a folder it is not left: ``finish()`` is called there, and it goes on.
    """
    setup = zoo.build(case, rank, world)
    injector = FaultInjector.parse([FAULT])
    persist = SharedMemory("test", folder) if folder else None
    controller = zoo.control(case, setup, injector=injector, persist=persist, timeout=20.0, **options)
    start = controller.resume(setup.scaler).attempt if folder else 0
    verdicts = []
    for attempt in range(start, case.steps):
        zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, injector)
        verdict = controller.verdict
        assert verdict is not None
        verdicts.append((verdict.step, str(verdict.action)))
        for scheduler in setup.extra_state.values() if verdict.accepted else ():
            scheduler.step()
        if attempt + 1 == leave:
            if prefetched:
                zoo.fetch(case, setup, attempt + 1)
            controller.finish()
            if persist is not None:
                controller._close(failed=True)
                return start, None, verdicts
    controller.finish()
    image = capture_state(setup.model, setup.optimizers, setup.extra_state, setup.scaler)
    controller.close()
    return start, image, verdicts


CASES: dict[str, tuple[Case, dict[str, Any], int, int]] = {
    # attempt before which the run is left; attempt with which it goes on
    "ddp": (Case("ddp", model="conv", optimizer="sgd", scheduler=True), {}, 7, 7),
    "fsdp2": (Case("fsdp2", scheduler=True), {}, 7, 7),
    "after a refusal": (Case("ddp", scheduler=True), {}, 10, 10),
    "scaler": (Case("ddp", model="bf16", scaler=True, accumulation=2), {}, 7, 7),
    "deferred": (Case("fsdp2", draws=False, scheduler=True), {"decision": "deferred"}, 7, 7),
    "refused by finish": (Case("ddp", draws=False, scheduler=True), {"decision": "deferred"}, 10, 10),
    "unjudged": (Case("ddp", scheduler=True), {"every": 3}, 8, 6),  # attempts 6 and 7 are nobody's: made again
}


@pytest.mark.parametrize("name", list(CASES))
def test_left_between_two_steps_and_resumed_there(name: str, tmp_path: Path) -> None:
    case, options, leave, expected = CASES[name]
    pool = harness.pool(2)
    # What finish() refuses costs no other batch: a run that does not call it there would be another.
    whole = pool.run(run, case, "", options, leave if name == "refused by finish" else -1)
    pool.run(run, case, str(tmp_path), options, leave)
    again = pool.run(run, case, str(tmp_path), options, -1)
    for rank in range(2):
        assert again[rank][0] == expected
        assert compare(whole[rank][1], again[rank][1]) == []
        assert again[rank][2] == whole[rank][2][len(whole[rank][2]) - len(again[rank][2]) :]
    assert left(tmp_path) == []


def test_left_when_the_next_batch_was_fetched_already(tmp_path: Path) -> None:
    """Its loader draws from the global streams, so they must be put to where they were before."""
    case = Case("ddp")
    pool = harness.pool(2)
    whole = pool.run(run, case, "", {}, -1)
    pool.run(run, case, str(tmp_path), {}, 7, True)
    again = pool.run(run, case, str(tmp_path), {}, -1)
    assert again[0][0] == 7
    assert all(compare(whole[rank][1], again[rank][1]) == [] for rank in range(2))


def test_draws_of_the_loop_before_it_is_left_stay_if_the_loader_is_known(tmp_path: Path) -> None:
    def train(run: Run, numbers: list[int], leave: int = -1) -> None:
        for number in run.controller.batches(numbers):
            run.steps(number, number + 1)
            torch.rand(3)  # an evaluation that draws
            if number + 1 == leave:
                run.controller.finish()
                return

    whole = Run(tmp_path, job="other")
    train(whole, list(range(10)))
    first = Run(tmp_path)
    train(first, list(range(10)), leave=6)
    first.end()
    again, found = resumed(tmp_path)
    assert found.attempt == found.batches == 6
    train(again, list(range(6, 10)))
    assert equal(again.state(), whole.state())


def test_a_run_that_goes_on_after_finish_keeps_the_moment_before(tmp_path: Path) -> None:
    """No rank is sure that the others have sealed a moment before they have voted after it."""
    run = Run(tmp_path, anchors=0).steps(0, 5, bad=4)
    run.controller.finish()
    assert record.read(seals(tmp_path)[0])[0].made == 5
    run.steps(5, 6)  # the seal at its entry takes the place of the one before, of the same moment
    assert sorted(record.read(path)[0].made for path in seals(tmp_path)) == [4, 5]
    run.end()


def test_nothing_is_sealed_that_is_not_the_safe_state(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.controller.finish()
    assert seals(tmp_path) == []  # nothing was trained: a restart begins at the beginning
    run.steps(0, 3)
    run.controller.finish()
    assert record.read(seals(tmp_path)[0])[0].made == 3
    run.controller.load_state_dict(run.controller.state_dict())
    newest = record.read(seals(tmp_path)[0])[0]
    run.controller.finish()
    assert record.read(seals(tmp_path)[0])[0] == newest  # what was loaded is not a commit of this run yet
    run.controller.close()
    run.controller.finish()
    assert ours(tmp_path) == []
