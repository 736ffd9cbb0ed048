"""The training program is told to stop at any moment: two ranks leave together, come back, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import pytest

from dist_stability.experiments import training
from dist_stability.experiments.digests import differences
from dist_stability.report.events import read_events

SMALL = ["--task", "digits", "--steps", "9", "--batch-size", "8", "--probe-size", "8", "--warmup", "2"]
KEPT = ["--device", "cpu", "--state-digest", "--inject", "learning-rate:step=4,factor=1000"]
TOLD = 128 + signal.SIGUSR2

pytestmark = pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs /dev/shm")


class Bell:
    """Sends this process signals when it reaches a phase for the first time."""

    def __init__(self, rings: list[tuple[int, str]]) -> None:
        self.rings = list(rings)

    def __call__(self, attempt: int, phase: str) -> None:
        if (attempt, phase) in self.rings:
            self.rings.remove((attempt, phase))
            os.kill(os.getpid(), signal.SIGUSR2)


def life(
    rank: int, world: int, job: str, port: int, arguments: list[str], rings: dict[int, list[tuple[int, str]]]
) -> tuple[int, Any]:
    """One start of the program: its exit status, and whether the handler that was there before is back."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID=job)
    made, bell = training._controller, Bell(rings.get(rank, []))

    def with_bell(*given: Any) -> Any:
        if (-1, "start") in bell.rings:  # before there is a controller
            bell(-1, "start")
        controller = made(*given)
        controller.add_phase_listener(bell)
        return controller

    training._controller = with_bell
    try:
        status = training.main([*SMALL, *KEPT, *arguments])
        return status, signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    finally:
        training._controller = made
        for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
            del os.environ[name]


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


Start = Callable[..., list[Any]]
Whole = Callable[..., Path]
DONE, LEFT = [(0, True)] * 2, [(TOLD, True)] * 2


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the program once more, as one job; afterwards nothing of it is left in shared memory."""
    job = f"leaving-{uuid.uuid4().hex[:8]}"

    def one(*arguments: str, rings: dict[int, list[tuple[int, str]]] | None = None, **options: Any) -> list:
        given = [*arguments, "--out", str(tmp_path / "cut")]
        return harness.pool(2).run(life, job, port(), given, rings or {}, group=False, **options)

    yield one
    assert [name for name in os.listdir("/dev/shm") if f".{job}." in name] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The folder of a run that nobody stopped; one for each setting."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*arguments: str) -> Path:
        if arguments not in made:
            out = tmp_path_factory.mktemp("whole")
            assert harness.pool(2).run(life, "whole", port(), [*arguments, "--out", str(out)], {}, group=False) == DONE
            assert "rollback" in [event["action"] for event in read_events(out / "events.jsonl")]
            made[arguments] = out
        return made[arguments]

    return run


def assert_equal(*folders: Path) -> None:
    for rank in range(2):
        images = [json.loads((folder / f"state-rank{rank}.json").read_text()) for folder in folders]
        assert differences(*images) == [], f"rank {rank}"
    first, second = (read_events(folder / "events.jsonl") for folder in folders)
    for name in ("attempt", "action", "measurement", "batch", "final"):
        assert [event[name] for event in first] == [event[name] for event in second]


MOMENTS = {
    # where the signal reaches which rank, and the attempt that is gone on with
    "before anything": ("ddp", "immediate", {1: [(-1, "start")]}, 0),  # nothing was trained, nothing is lost
    "before the first commit": ("fsdp2", "immediate", {0: [(0, "gradients")]}, 1),
    "after a vote": ("ddp", "immediate", {1: [(3, "copy")]}, 5),  # the next vote says so
    "in a restore": ("fsdp2", "immediate", {1: [(4, "restore")]}, 5),
    "twice": ("ddp", "immediate", {0: [(2, "veto vote"), (2, "copy"), (2, "done")], 1: [(2, "vote")]}, 3),
    "deferred": ("fsdp2", "deferred", {0: [(2, "step")]}, 4),  # its vote is read at the next step
}


LONG = ("before anything", "after a vote", "in a restore", "twice", "deferred")


@pytest.mark.parametrize("moment", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in MOMENTS])
def test_told_to_stop_and_back_bit_for_bit(start: Start, whole: Whole, tmp_path: Path, moment: str) -> None:
    parallel, decision, rings, gone_on = MOMENTS[moment]
    mode = ("--parallel", parallel, *(("--decision", decision) if decision == "deferred" else ()))
    kept = (*mode, "--persist", "shm", "--resume", "auto")
    assert start(*kept, rings=rings) == LEFT
    assert len(read_events(tmp_path / "cut" / "events.jsonl")) == gone_on
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert start(*kept) == DONE
    assert_equal(whole(*mode), tmp_path / "cut")


@pytest.mark.parametrize("decision", ["immediate", pytest.param("deferred", marks=pytest.mark.slow)])
def test_told_to_stop_and_back_on_other_hosts(start: Start, whole: Whole, tmp_path: Path, decision: str) -> None:
    """No checkpoint was due, but one is written and waited for: where shared memory is lost, nothing else is."""
    mode = ("--parallel", "fsdp2", *(("--decision", decision) if decision == "deferred" else ()))
    kept = (*mode, "--persist", "shm,disk", "--checkpoint-every", "1000", "--resume", "auto")
    assert start(*kept, rings={1: [(6, "step")]}) == LEFT
    for path in Path("/dev/shm").glob("dist_stability.*.leaving-*"):
        path.unlink()
    left = len(read_events(tmp_path / "cut" / "events.jsonl"))
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == [f"attempt-{left:08d}"]
    assert start(*kept) == DONE
    assert_equal(whole(*mode), tmp_path / "cut")


def test_told_to_stop_while_it_resumes(start: Start, whole: Whole, tmp_path: Path) -> None:
    """It leaves without another step, and what it resumed from is still there for the next start."""
    mode = ("--parallel", "ddp")
    kept = (*mode, "--persist", "shm", "--resume", "auto")
    assert start(*kept, rings={0: [(5, "gradients")]}) == LEFT
    for _ in range(2):
        assert start(*kept, rings={1: [(6, "restore")]}) == LEFT
        assert len(read_events(tmp_path / "cut" / "events.jsonl")) == 6
    assert start(*kept) == DONE
    assert_equal(whole(*mode), tmp_path / "cut")


def test_a_stuck_collective_is_left_by_force_and_the_seals_stay(start: Start, whole: Whole, tmp_path: Path) -> None:
    """Rank 1 sleeps, rank 0 waits for it inside of the backward's all-reduce, where no Python handler runs."""
    mode = ("--parallel", "ddp")
    kept = (*mode, "--persist", "shm", "--resume", "auto", "--preempt-grace", "2")
    stuck = ("--inject", "sleep:step=5,phase=done,rank=1,seconds=500")
    rings = {0: [(5, "done")], 1: [(5, "copy")]}
    ended = start(*kept, *stuck, rings=rings, expect_failure=True, grace=30.0)
    for error in ended:
        assert isinstance(error, harness.RankError) and f"exit code {TOLD}" in error.message, error
    assert start(*kept) == DONE
    assert_equal(whole(*mode), tmp_path / "cut")


def test_a_rank_that_dies_after_the_signal_does_not_make_the_job_a_failed_one(
    start: Start, whole: Whole, tmp_path: Path
) -> None:
    mode = ("--parallel", "fsdp2")
    kept = (*mode, "--persist", "shm", "--resume", "auto", "--timeout", "8")
    died = ("--inject", "kill:step=5,phase=vote,rank=1")
    ended = start(*kept, *died, rings={0: [(5, "gradients")]}, expect_failure=True, grace=30.0)
    assert [f"exit code {code}" in error.message for code, error in zip((TOLD, -9), ended, strict=True)] == [True, True]
    assert start(*kept) == DONE
    assert_equal(whole(*mode), tmp_path / "cut")
