"""The closed-loop comparison: its references are right, its faults act, its results resume, on one rank and on two."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_stability.bench.detection import closed_loop, closed_runs, tables
from dist_stability.bench.detection.cells import (
    CLEAN,
    FAULTS,
    MAIN_TASKS,
    Cell,
    ClosedFault,
    ClosedTask,
    announces_jump,
    clean_cells,
    fault_cells,
)
from dist_stability.bench.detection.closed_tasks import Training, factor
from dist_stability.rules import FixedInnovation, PredictiveInnovation, Rule
from dist_stability.verdict import Judgement

pytest.importorskip("sklearn")

CNN = ClosedTask("cnnA", "digits", batch=32)
SHORT = {"start": 20, "tail": 13}
ROW = ClosedFault("row", "weight-row", 3000.0, **SHORT)


def open_to_all() -> Rule:
    return FixedInnovation(1e9)


class Never(FixedInnovation):
    """Refuses everything."""

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        return replace(super().judge(measurement, gradient_norm), accepted=False)


def refuses_everything() -> Rule:
    return Never(1.0)


def default() -> Rule:
    return PredictiveInnovation()


ARMS: dict[str, Any] = {"none": None, "perfect": None, "open": open_to_all, "default": default}


def results(out: Path, *faults: ClosedFault, task: ClosedTask = CNN, arms: dict[str, Any] = ARMS, **more: Any) -> Any:
    rows = closed_loop.run(out, seeds=[3], cells=[Cell(task, fault, 3) for fault in faults], arms=arms, **more)
    return {(row["fault"], row["arm"]): row for row in rows}


class TestArms:
    def test_regret_against_perfect_rejection(self, tmp_path: Path) -> None:
        fault = ROW
        found = results(tmp_path, fault)
        none, perfect, all_in, ours = (found["row", arm] for arm in ARMS)
        assert perfect["regret"] == 0 and perfect["fault_committed"] == 0
        assert none["regret"] > 0.05 and none["fault_committed"] == none["fault_attempts"] == 1
        # A guard that accepts everything trains exactly like no guard; one that refuses just the fault is perfect.
        assert all_in["final"] == none["final"] and all_in["fault_committed"] == 1 and all_in["extra_refused"] == 0
        assert ours["final"] == perfect["final"] and ours["fault_committed"] == ours["extra_refused"] == 0

    def test_a_rule_that_refuses_in_the_prefix_trains_from_the_start(self, tmp_path: Path) -> None:
        fault = ClosedFault("late", "gradient-scale", 300.0, start=40, tail=13)
        row = results(tmp_path, fault, arms={"never": refuses_everything})["late", "never"]
        assert row["extra_refused"] == 53 and row["fault_committed"] == 0

    def test_a_lasting_fault_is_compared_with_the_run_without_it(self, tmp_path: Path) -> None:
        ramp = ClosedFault("ramp", "learning-rate-ramp", 1.2, length=15, lasting=True, **SHORT)
        found = results(tmp_path, ramp, arms={"none": None, "perfect": None})
        clean = results(tmp_path, ClosedFault("same", "clean", lasting=True, start=20, length=15, tail=13))
        assert found["ramp", "perfect"]["final"] == clean["same", "none"]["final"]
        assert found["ramp", "none"]["regret"] != 0 and found["ramp", "none"]["fault_committed"] == 15

    def test_a_run_that_ends_non_finite_has_lost(self, tmp_path: Path) -> None:
        nan = ClosedFault("nan", "gradient-scale", math.nan, **SHORT)
        row = results(tmp_path, nan, arms={"none": None})["nan", "none"]
        assert row["regret"] == closed_runs.LOST and row["final"] is None

    def test_clean_cells_count_every_refusal_as_extra(self, tmp_path: Path) -> None:
        short = ClosedFault("clean", "clean", start=0, length=0, lasting=True, tail=20)
        row = results(tmp_path, short, arms={"never": refuses_everything})["clean", "never"]
        assert row["extra_refused"] == 20 and row["fault_attempts"] == 0

    def test_clean_runs_are_counted_by_schedule(self) -> None:
        row = {"arm": "rule", "task": "cnnA-cosine", "extra_refused": 2, "false_warnings": 1, "regret": 0.25}
        jump = {**row, "task": "cnnA-jump10", "extra_refused": 3, "regret": -1.0}
        summary = tables.summarize_clean([row, row, jump, {**row, "arm": "perfect"}], 400, announces_jump)
        assert summary == {
            "rule": {
                "smooth_steps": 800,
                "smooth_refusals": 4,
                "jump_steps": 400,
                "jump_refusals": 3,
                "warnings": 3,
                "worst": 0.25,
            }
        }
        head, rows = tables.clean_table(summary)
        assert len(head) == len(rows[0])
        every = list(clean_cells([7]))
        assert len({cell.task.name for cell in every}) == len(every) == 20
        assert sum(announces_jump(cell.task.name) for cell in every) == 8


class TestFaults:
    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
    def test_acts_in_its_attempts_and_in_no_other(self, fault: ClosedFault) -> None:
        """Compared with a clean twin: equal before, different in the attempt, and nothing left behind but damage."""
        early = ClosedFault(fault.name, fault.kind, fault.size, start=2, length=1)
        task = MAIN_TASKS[0] if fault.kind == "repeated-token" else CNN
        torch.set_num_threads(1)
        twin, hit = Training(task, 3, CLEAN, 10), Training(task, 3, early, 10)
        for attempt in range(4):
            norms = [each.backward(attempt) for each in (twin, hit)]
            gradients = [[p.grad.clone() for p in each.module.parameters()] for each in (twin, hit)]
            if attempt < 2:
                assert norms[0] == norms[1]
            for each in (twin, hit):
                each.optimizer.step()
                each.optimizer.zero_grad()
            same = all(
                torch.equal(a, b) for a, b in zip(twin.module.parameters(), hit.module.parameters(), strict=True)
            )
            assert same == (attempt < 2)
            if attempt == 2:
                seen = not all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
                assert seen == (fault.kind in ("gradient-scale", "shuffled-labels", "repeated-token"))
                assert [group["lr"] for group in hit.optimizer.param_groups] == [task.learning_rate]
                if not seen:
                    assert norms[0] == norms[1]  # nothing but the probe can see it in time

    def test_ascent_raises_the_loss_by_about_its_size(self) -> None:
        fault = ClosedFault("ascent", "ascent", 0.2, start=5)
        twin, hit = Training(CNN, 3, CLEAN, 10), Training(CNN, 3, fault, 10)
        for attempt in range(6):
            for each in (twin, hit):
                each.backward(attempt)
                each.optimizer.step()
                each.optimizer.zero_grad()
        rise = hit.loss(hit.parts.probe) - twin.loss(twin.parts.probe)
        assert 0.05 < rise < 0.5  # in a straight line it would be 0.2


class TestResults:
    def test_finished_cells_are_not_run_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fault = ROW
        first = results(tmp_path, fault, arms={"none": None})
        with (tmp_path / "closed_loop.jsonl").open("a") as file:
            file.write('{"task": "cnnA", "fau')  # what an interruption leaves
        ran: list[Any] = []
        original = closed_loop.run_group
        monkeypatch.setattr(closed_loop, "run_group", lambda *a: (ran.append([n for _, n in a[2]]), original(*a))[1])
        again = results(tmp_path, fault, arms={"none": None, "perfect": None})
        assert ran == [[["perfect"]]]
        assert again["row", "none"] == first["row", "none"] and ("row", "perfect") in again

    def test_other_processes_find_the_same(self, tmp_path: Path) -> None:
        fault = ROW
        told: list[tuple[int, int]] = []
        here = results(tmp_path / "a", fault)
        there = results(tmp_path / "b", fault, workers=2, progress=lambda done, all_: told.append((done, all_)))
        assert here == there and told == [(1, 1)]
        lines = (tmp_path / "b" / "closed_loop.jsonl").read_text().splitlines()
        assert [json.loads(line)["arm"] for line in lines] == list(ARMS)

    def test_only_cells_of_the_seeds_asked_for(self, tmp_path: Path) -> None:
        cells = [Cell(CNN, ROW, seed) for seed in (3, 4)]
        rows = closed_loop.run(tmp_path, seeds=[4], cells=cells, arms={"none": None})
        assert [row["seed"] for row in rows] == [4]

    @pytest.mark.slow
    def test_two_ranks(self, tmp_path: Path) -> None:
        fault = ROW
        two = ClosedTask("cnn-ddp2", "digits", batch=32, ranks=2)
        found = results(tmp_path, fault, task=two)
        assert found["row", "default"]["final"] == found["row", "perfect"]["final"]
        assert found["row", "open"]["final"] == found["row", "none"]["final"]
        assert found["row", "none"]["regret"] > 0.05


class TestSuite:
    def test_every_fault_meets_every_main_task_and_names_are_unique(self) -> None:
        cells = list(fault_cells([0, 1]))
        keys = [(cell.task.name, cell.fault.name, cell.seed) for cell in cells]
        assert len(set(keys)) == len(keys)
        assert len(cells) == 2 * (4 * len(FAULTS) + 7 * 10)
        assert {f.name for f in FAULTS} >= {"g300x1", "shuf40", "ascent60", "ramp", "nan", "bits", "moment1e4"}

    def test_schedules(self) -> None:
        assert factor("jump10", 199, 400) == 0.1 and factor("jump10", 200, 400) == 1
        assert factor("cosine", 0, 400) < factor("cosine", 20, 400) > factor("cosine", 399, 400) > 0
        assert factor("steps", 300, 400) == 0.1
        with pytest.raises(ValueError, match="schedule must be"):
            factor("linear", 0, 10)
