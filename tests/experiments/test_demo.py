"""What the demo concludes from its four runs, and that it does not repeat finished ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dist_stability.experiments import arms, demo
from dist_stability.experiments.arms import Arm, ArmFailed, is_done, run_arm
from dist_stability.experiments.options import parse_options
from dist_stability.report.events import EventLog, read_json, write_json
from dist_stability.report.runs import RunRecord, load_run
from dist_stability.report.versions import source_digest, versions

KEYS = {"world_size", "parallel", "recovery_gap", "golden_twin_equal", "arms"}
ARM_KEYS = {"final_probe", "probe_before_fault", "peak_probe", "refused_steps", "false_refusals", "seconds"}


def series(name: str, *, harmed: bool = False, skipped: tuple[int, ...] = ()) -> dict[int, float]:
    """Made-up probe losses: a smooth descent, with a bump that stays in the unguarded run."""
    fall = {batch: 2.0 + math.exp(-batch / 60) for batch in range(demo.STEPS) if batch not in skipped}
    return {batch: y + (0.5 if harmed and batch >= demo.FAULT_STEP else 0.0) for batch, y in fall.items()}


def write_run(folder: Path, arguments: tuple[str, ...], probe: dict[int, float], refused: list[int]) -> None:
    """A run folder as the training program leaves it."""
    settings = parse_options(arguments, 2).settings()
    with EventLog(folder / "events.jsonl") as log:
        for attempt, (batch, value) in enumerate(probe.items()):
            no = batch in refused
            log.append(
                {
                    "attempt": attempt,
                    "batch": batch,
                    "step": attempt,
                    "rank": 0,
                    "signal": "probe" if no else "",
                    "action": "rollback" if no else "commit",
                    "measurement": value + 0.3 * no,
                    "innovation": None if settings["rule"] == "off" else 0.3 * no,
                    "bound": None if settings["rule"] == "off" else math.inf if attempt < 3 else 0.1,
                    "prediction": None,
                    "gradient_norm": 300.0 if no else 1.0,
                    "undone": [],
                    "reason": "innovation +0.3 above <bound>" if no else "",
                    "seconds": {"step": 0.001, "probe": 0.002},
                    "probe": value,
                }
            )
    summary: dict[str, Any] = {
        "finished": True,
        "task": "text",
        "data": demo.DATA_NAME,
        "parallel": "fsdp2",
        "world_size": 2,
        "device": "cpu",
        "settings": settings,
        "command": ["-m", arms.PROGRAM, *arguments],
        "versions": versions(),
        "source": source_digest(),
        "refused": refused,
        "undone": [],
        "final_probe": list(probe.values())[-1],
        "evaluation": 2.0,
        "seconds": 1.0,
        "probe": {"batch": list(probe), "value": list(probe.values())},
    }
    write_json(folder / "summary.json", summary)
    for rank in range(2):
        (folder / f"state-rank{rank}.json").write_text(json.dumps({"weight": "a", "random": "b"}))


def fake(
    monkeypatch: pytest.MonkeyPatch, *, refused: list[int] | None = None, harmed: bool = True, worse: float = 0.0
) -> list[str]:
    """Runs of the training program end at once with made-up losses; returns the names of those started."""
    started: list[str] = []
    no = demo.INJECTED if refused is None else refused

    def run(arm: Arm, folder: Path) -> bool:
        if is_done(arm, folder):
            return False
        started.append(arm.name)
        skipped = parse_options(arm.arguments, 2).skip_batches
        probe = series(arm.name, harmed=harmed and arm.name == "baseline", skipped=skipped)
        if arm.name in ("guarded", "twin"):
            probe = {batch: y + worse for batch, y in probe.items()}
        write_run(folder, arm.arguments, probe, no if arm.name == "guarded" else [])
        return True

    monkeypatch.setattr(demo, "run_arm", run)
    return started


def test_a_successful_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started = fake(monkeypatch, worse=0.005)
    assert demo.demo(tmp_path) == 0
    assert started == ["clean", "baseline", "guarded", "twin"]
    summary = read_json(tmp_path / "summary.json")
    assert summary.keys() >= KEYS
    assert summary["arms"].keys() == {"clean", "baseline", "guarded"}
    assert all(arm.keys() >= ARM_KEYS for arm in summary["arms"].values())
    assert (summary["world_size"], summary["parallel"], summary["golden_twin_equal"]) == (2, "fsdp2", True)
    assert summary["recovery_gap"] == pytest.approx(0.01)
    guarded, baseline = summary["arms"]["guarded"], summary["arms"]["baseline"]
    assert guarded["refused_steps"] == list(range(120, 130)) and guarded["false_refusals"] == 0
    assert baseline["refused_steps"] == [] and baseline["peak_probe"] == pytest.approx(2.5 + math.exp(-2))
    assert baseline["probe_before_fault"] == pytest.approx(2.0 + math.exp(-119 / 60))
    assert (tmp_path / "probe_loss.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert summary["sentence"] in page and "bit for bit" in page and "innovation +0.3 above &lt;bound&gt;" in page
    assert all(command.replace("'", "&#x27;") in page for command in summary["commands"])
    printed = capsys.readouterr().out
    assert "120-129" in printed and summary["sentence"] in printed


def test_the_twin_drops_exactly_what_the_guarded_run_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, refused=[7, *demo.INJECTED])
    assert demo.demo(tmp_path) == 1
    assert load_run(tmp_path / "twin").settings["skip_batches"] == [7, *demo.INJECTED]
    summary = read_json(tmp_path / "summary.json")
    assert summary["arms"]["guarded"]["false_refusals"] == 1
    assert "refused the steps 7,120-129 instead of 120-129" in summary["sentence"]


def test_finished_arms_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = fake(monkeypatch)
    demo.demo(tmp_path)
    started.clear()
    assert demo.demo(tmp_path) == 0
    assert started == []
    (tmp_path / "baseline" / "state-rank1.json").unlink()
    demo.demo(tmp_path)
    assert started == ["baseline"]


def outcome(tmp_path: Path, unequal: tuple[str, ...] = (), **finals: float) -> demo.Outcome:
    probes = {"clean": 2.0, "baseline": 2.5, "guarded": 2.002, "twin": 2.002, **finals}
    runs = {}
    for name, final in probes.items():
        write_run(tmp_path / name, demo.COMMON, {**series(name), demo.STEPS - 1: final}, [])
        run = load_run(tmp_path / name)
        runs[name] = RunRecord(name, run.events, {**run.summary, "refused": demo.INJECTED if name == "guarded" else []})
    return demo.judge(runs, unequal)


def test_what_makes_the_demo_fail(tmp_path: Path) -> None:
    good = outcome(tmp_path)
    assert good.problems == [] and good.summary["recovery_gap"] == pytest.approx(0.004)
    too_little = outcome(tmp_path, baseline=2.049)
    assert too_little.summary["recovery_gap"] is None and "too little damage" in too_little.sentence
    nan = outcome(tmp_path, baseline=math.nan)
    assert nan.summary["recovery_gap"] is None and nan.problems
    gap = outcome(tmp_path, guarded=2.02)
    assert gap.summary["recovery_gap"] == pytest.approx(0.04) and "recovery gap is 0.0400" in gap.sentence
    assert outcome(tmp_path, guarded=math.nan).problems
    assert outcome(tmp_path, guarded=1.9).problems == []  # better than clean is no failure
    unequal = outcome(tmp_path, ("rank 1: weight",))
    assert unequal.summary["golden_twin_equal"] is False and "first rank 1: weight" in unequal.sentence


def test_states_are_compared_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    demo.demo(tmp_path)
    (tmp_path / "twin" / "state-rank1.json").write_text(json.dumps({"weight": "x", "random": "b"}))
    assert demo.demo(tmp_path) == 1
    summary = read_json(tmp_path / "summary.json")
    assert summary["golden_twin_equal"] is False and summary["twin_differences"] == ["rank 1: weight"]


ARM = Arm("tiny", "tiny", ("--steps", "4", "--warmup", "1", "--batch-size", "4", "--probe-size", "4"), 2)


def test_an_arm_is_done_only_if_everything_is_the_same(tmp_path: Path) -> None:
    write_run(tmp_path, ARM.arguments, {0: 1.0}, [])
    assert is_done(ARM, tmp_path)
    for changes in (
        {"finished": False},
        {"world_size": 4},
        {"versions": {}},
        {"source": "other"},
        {"settings": {**read_json(tmp_path / "summary.json")["settings"], "lr": 1.0}},
    ):
        write_run(tmp_path / "changed", ARM.arguments, {0: 1.0}, [])
        write_json(tmp_path / "changed" / "summary.json", {**read_json(tmp_path / "summary.json"), **changes})
        assert not is_done(ARM, tmp_path / "changed"), changes
    assert not is_done(ARM, tmp_path / "absent")
    (tmp_path / "summary.json").write_text("{")
    assert not is_done(ARM, tmp_path)


def test_a_failing_arm_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "PROGRAM", "dist_stability.experiments.no_such_program")
    with pytest.raises(ArmFailed, match=r"tiny failed with status 1; the end of .*log\.txt(?s:.)*No module named"):
        run_arm(ARM, tmp_path)


def test_the_log_ends_before_the_launchers_traceback(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("[rank0]: ValueError: why\nE1 torch/distributed/elastic/api.py failed\nTraceback\n")
    assert arms._end_of_log(log) == ["[rank0]: ValueError: why"]
    log.write_text("E1 torch/distributed/elastic/api.py failed\n")
    assert arms._end_of_log(log) == ["E1 torch/distributed/elastic/api.py failed"]


def test_a_log_that_grows_is_read_event_by_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = arms._Tail(path)
    assert tail.last() is None
    path.write_text('{"batch":0,"probe":1.5}\n{"batch":1,"pro')
    assert tail.last() == {"batch": 0, "probe": 1.5}
    assert tail.last() is None
    with path.open("a") as file:
        file.write('be":"NaN"}\n')
    last = tail.last()
    assert last is not None and last["batch"] == 1 and math.isnan(last["probe"])
