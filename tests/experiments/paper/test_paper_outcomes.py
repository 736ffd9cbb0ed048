"""What is run, what is not run again, and what becomes of runs whose predecessors failed."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
from paper_records import grid, write_run

from dist_stability.experiments.paper.folders import FINISHED, STOPPED, ended, states
from dist_stability.experiments.paper.outcomes import Outcomes
from dist_stability.experiments.paper.plan import Grid, Run, arm_of, runs_of, words
from dist_stability.experiments.paper.pool import _problem

CLEAN, GUARDED = Run("phrase", "single", "none", "clean", 0), Run("phrase", "single", "nan", "guarded", 0)
TWIN = replace(GUARDED, arm="twin")


def small(out: Path) -> Grid:
    return grid(out, faults=("nan",), arms=("clean", "guarded", "twin"))


def test_a_finished_run_is_done_whatever_code_made_it(tmp_path: Path) -> None:
    asked = small(tmp_path)
    folder = write_run(asked, CLEAN)  # its source digest is "a"
    assert ended(arm_of(asked, CLEAN), folder) == FINISHED
    assert ended(arm_of(asked, CLEAN), tmp_path / "nowhere") is None


def test_a_run_with_other_settings_is_not_this_run(tmp_path: Path) -> None:
    asked = small(tmp_path)
    folder = write_run(asked, CLEAN, arguments=[*words(asked, CLEAN), "--weight-decay", "0.5"])
    assert ended(arm_of(asked, CLEAN), folder) is None
    folder = write_run(asked, CLEAN)
    assert ended(replace(arm_of(asked, CLEAN), world_size=2, arguments=_distributed(asked)), folder) is None
    (folder / "state-rank0.json").unlink()  # the run was asked to leave its digests
    assert ended(arm_of(asked, CLEAN), folder) is None


def test_a_run_that_may_run_anywhere_is_done_wherever_it_ran(tmp_path: Path) -> None:
    asked = small(tmp_path)
    folder = write_run(asked, CLEAN)
    path = folder / "summary.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    assert ended(arm_of(asked, CLEAN), folder) is None  # asked for on the CPU
    assert ended(arm_of(replace(asked, device="auto"), CLEAN), folder) == FINISHED


def _distributed(asked: Grid) -> tuple[str, ...]:
    return words(asked, replace(CLEAN, parallel="ddp"))


def test_a_run_stopped_by_its_budgets_is_a_result_and_a_crash_is_not(tmp_path: Path) -> None:
    asked = small(tmp_path)
    assert ended(arm_of(asked, GUARDED), write_run(asked, GUARDED, error="StabilityStop")) == STOPPED
    assert ended(arm_of(asked, GUARDED), write_run(asked, GUARDED, error="RuntimeError")) is None


def test_only_what_is_missing_must_run(tmp_path: Path) -> None:
    asked = small(tmp_path)
    outcomes = Outcomes(asked, runs_of(asked), 2)
    write_run(asked, CLEAN)
    assert not outcomes.must_run(CLEAN) and outcomes.ended == {CLEAN: FINISHED}
    assert outcomes.must_run(GUARDED) and not outcomes.is_ready(TWIN)
    write_run(asked, GUARDED, refused=(6,))
    outcomes.ran(GUARDED, 3.0)
    assert outcomes.is_ready(TWIN) and outcomes.must_run(TWIN)
    assert outcomes.started == 1 and outcomes.failed() == {}


def test_what_needs_a_failed_run_is_not_run(tmp_path: Path) -> None:
    asked = small(tmp_path)
    outcomes = Outcomes(asked, runs_of(asked), 2)
    outcomes.ran(GUARDED, 1.0, "exit status 1; see log.txt")
    assert not outcomes.must_run(TWIN)
    assert outcomes.failed() == {str(GUARDED): "exit status 1; see log.txt", str(TWIN): f"not run: it needs {GUARDED}"}


def test_a_stopped_guarded_run_has_no_twin_and_that_is_no_failure(tmp_path: Path) -> None:
    asked = small(tmp_path)
    outcomes = Outcomes(asked, runs_of(asked), 2)
    write_run(asked, GUARDED, error="StabilityStop")
    assert not outcomes.must_run(GUARDED) and not outcomes.must_run(TWIN)
    assert outcomes.failed() == {} and "it has no twin" in outcomes.ended[TWIN]


def test_the_estimate_counts_what_is_left_over_all_workers(tmp_path: Path) -> None:
    asked = grid(tmp_path, seeds=5, arms=("clean",), parallels=("single", "ddp"))
    runs = runs_of(asked)
    outcomes = Outcomes(asked, runs, 2)
    assert outcomes.seconds_left() is None and "not known" in outcomes.left()
    write_run(asked, runs[0])
    outcomes.ran(runs[0], 10.0)
    # Four runs on one process and, for want of better, five that take as long on two.
    assert outcomes.seconds_left() == pytest.approx((4 * 10 + 5 * 10 * 2) / 2)


def test_a_dead_worker_fails_its_run_only(tmp_path: Path) -> None:
    asked, future = small(tmp_path), Future[int]()
    future.set_exception(BrokenProcessPool())
    assert "its process died" in _problem(asked, CLEAN, future)
    future = Future()
    future.set_result(1)
    assert "exit status 1" in _problem(asked, CLEAN, future)
    write_run(asked, CLEAN)
    assert _problem(asked, CLEAN, future) == ""


def test_states_are_there_for_every_rank_or_not_at_all(tmp_path: Path) -> None:
    asked = grid(tmp_path, parallels=("ddp",))
    run = replace(CLEAN, parallel="ddp")
    folder = write_run(asked, run)
    assert states(arm_of(asked, run), folder) == [{"weight": "a"}, {"weight": "a"}]
    (folder / "state-rank1.json").unlink()
    assert states(arm_of(asked, run), folder) is None
