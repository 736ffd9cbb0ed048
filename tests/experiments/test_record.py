"""The recorder knows the probe loss of the state, whatever was refused or taken back."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_stability.experiments.options import parse_options
from dist_stability.experiments.record import RunRecorder
from dist_stability.experiments.tasks import make_task
from dist_stability.experiments.wrapping import Processes
from dist_stability.report.events import read_events, read_json


def event(attempt: int, action: str, measurement: float | None, undone: tuple[int, ...] = ()) -> dict[str, Any]:
    rung = {"commit": "", "unjudged": "", "rollback": "skip", "veto": "skip"}.get(action, action)
    facts = {"attempt": attempt, "action": action, "measurement": measurement, "undone": list(undone)}
    return {**facts, "rung": rung, "warning": ""}


def test_the_state_goes_back_with_a_refusal(tmp_path: Path) -> None:
    options = parse_options(["--out", str(tmp_path)], 1)
    task = make_task("text")
    with RunRecorder(options, task, Processes(0, 1, torch.device("cpu")), task.build()) as record:
        said = [
            (0, event(0, "rollback", 9.0), math.nan),
            (1, event(1, "commit", 5.0), 5.0),
            (3, event(2, "commit", 4.0), 4.0),
            (4, event(3, "unjudged", None), 4.0),
            (5, event(4, "rollback", 8.0, (3,)), 4.0),
            (6, event(5, "commit", 3.0), 3.0),
            (7, event(6, "veto", None), 3.0),
            (8, event(7, "deep_rollback", math.inf, (2, 3, 5)), 5.0),
            (9, event(8, "commit", None), math.nan),  # observed: would have been vetoed
            (10, event(9, "commit", 4.5), 4.5),
        ]
        for batch, what, probe in said:
            record.begin_batch(batch)
            record.event(what)
            assert record.probe == probe or (math.isnan(record.probe) and math.isnan(probe))
        record.finish(evaluation=1.0)
    summary = read_json(tmp_path / "summary.json")
    assert summary["refused"] == [0, 5, 7, 8]
    assert summary["undone"] == [3, 4, 6]  # batches, not attempts
    assert summary["final_probe"] == 4.5
    assert summary["probe"]["batch"] == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]
    events = read_events(tmp_path / "events.jsonl")
    assert [(e["batch"], e["attempt"]) for e in events[:4]] == [(0, 0), (1, 1), (3, 2), (4, 3)]
    assert events[7]["measurement"] == math.inf and events[7]["probe"] == 5.0


def test_a_batch_that_stands_after_its_replay_was_not_refused(tmp_path: Path) -> None:
    options = parse_options(["--out", str(tmp_path)], 1)
    task = make_task("text")
    with RunRecorder(options, task, Processes(0, 1, torch.device("cpu")), task.build()) as record:
        said = [
            (0, event(0, "unjudged", None)),
            (1, event(1, "unjudged", None)),
            (2, event(2, "rollback", 9.0, (0, 1))),
            (0, event(3, "commit", 5.0)),
            (1, event(4, "rollback", 9.0)),
            (2, event(5, "attenuate", 4.5)),
            (3, event(6, "reload", 9.0, (3, 5))),
            (4, event(7, "attenuate", 4.6)),
            (5, event(8, "commit", 4.5)),
        ]
        for batch, what in said:
            record.begin_batch(batch)
            record.event(what)
        record.finish()
    summary = read_json(tmp_path / "summary.json")
    assert summary["refused"] == [2, 1, 3] and summary["undone"] == [0, 1, 2]
    assert summary["rungs"] == {"skip": 2, "attenuate": 2, "reload": 1}
    assert summary["attenuated"] == [4], "that of batch 2 was taken back"


def test_the_norm_is_of_the_state_after_each_attempt_and_asked_for_on_every_rank(tmp_path: Path) -> None:
    options = parse_options(["--out", str(tmp_path)], 2)
    task, here = make_task("text"), torch.device("cpu")
    for rank in (0, 1):
        norms = iter([7.0, math.inf])
        with RunRecorder(options, task, Processes(rank, 2, here), task.build(), lambda: next(norms)) as record:  # noqa: B023
            record.begin_batch(0)
            record.event(event(0, "commit", 1.0))
            record.event(event(1, "rollback", 2.0))
        assert next(norms, None) is None
    assert [e["parameter_norm"] for e in read_events(tmp_path / "events.jsonl")] == [7.0, math.inf]


def test_what_it_writes_down_is_not_time_of_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> float:
        now[0] += seconds
        return 1.0

    options = parse_options(["--out", str(tmp_path)], 1)
    task = make_task("text")
    with RunRecorder(options, task, Processes(0, 1, torch.device("cpu")), task.build(), lambda: work(100.0)) as record:
        work(1000.0)  # the start
        for attempt in range(3):
            record.begin_batch(attempt)
            work(1.0)
            record.event(event(attempt, "commit", 1.0))
            work(10.0)
        work(1000.0)  # the evaluation
        record.finish()
    summary = read_json(tmp_path / "summary.json")
    assert summary["loop_seconds"] == 1 + 11 + 11 and summary["seconds"] == 2000 + 3 * 111


def test_other_ranks_keep_quiet_and_an_old_summary_is_removed(tmp_path: Path) -> None:
    options = parse_options(["--out", str(tmp_path)], 2)
    task = make_task("text")
    (tmp_path / "summary.json").write_text("{}")
    with RunRecorder(options, task, Processes(1, 2, torch.device("cpu")), task.build()) as quiet:
        quiet.finish()
        quiet.finish(error=RuntimeError("late"))
    assert (tmp_path / "summary.json").read_text() == "{}" and not (tmp_path / "events.jsonl").exists()
    with RunRecorder(options, task, Processes(0, 2, torch.device("cpu")), task.build()):
        assert not (tmp_path / "summary.json").exists()
    with RunRecorder(options, task, Processes(1, 2, torch.device("cpu")), task.build()) as witness:
        witness.finish()
        assert not (tmp_path / "summary.json").exists()
        witness.finish(error=RuntimeError("rank 0 was ended by the launcher"))
    assert "ended by the launcher" in read_json(tmp_path / "summary.json")["reason"]
