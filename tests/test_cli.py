"""The command line: what each command writes and how it ends."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from dist_stability import cli
from dist_stability.experiments import arms, demo, training
from dist_stability.report.events import read_json


def test_doctor_prints_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    for part in (
        "Versions",
        "Backends",
        "Devices",
        "Groups",
        "two processes over gloo: ok",
        "locked memory",
        "Hazards",
    ):
        assert part in printed
    summary = read_json(tmp_path / "new" / "summary.json")
    assert summary["groups"]["gloo_two_processes"] and "torch" in summary["versions"]
    assert summary["memory"].keys() == {"physical", "cgroup_limit", "memlock_limit", "shared_memory"}


def test_report_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    small = ["--steps", "5", "--batch-size", "4", "--probe-size", "4", "--warmup", "1", "--device", "cpu"]
    assert training.main([*small, "--inject", "nan:step=3,rank=0", "--out", str(tmp_path / "run")]) == 0
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "run" / "report" / "report.html"))
    assert read_json(tmp_path / "run" / "report" / "summary.json")["runs"]["run"]["refused"] == [3]
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "report.html").is_file()


def test_errors_are_one_line_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("dist-stability: error: no run in ")
    for wrong in ([], ["experiment"], ["report"], ["demo", "--steps", "3"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(wrong)
        assert stopped.value.code == 2


def test_demo_passes_its_status_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(demo, "demo", lambda out: seen.append(out) or 1)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert cli.main(["demo"]) == 1
    assert seen == [tmp_path, Path("out/demo")]

    def fail(out: Path) -> int:
        raise arms.ArmFailed("clean failed with status 1")

    monkeypatch.setattr(demo, "demo", fail)
    assert cli.main(["demo"]) == 1
    assert "error: clean failed with status 1" in capsys.readouterr().err

    def interrupt(out: Path) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demo", interrupt)
    assert cli.main(["demo"]) == 130


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dist-stability", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("dist_stability", run_name="__main__")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert all(f"\n    {command} " in shown for command in ("demo", "report", "doctor"))
