"""The command: parts, what is written, and what is kept from an earlier call."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dist_stability.bench.detection import command, parts, tables
from dist_stability.bench.detection.command import bench
from dist_stability.bench.detection.events import NAMES
from dist_stability.cli import main
from dist_stability.report.events import read_json
from dist_stability.report.markdown import markdown

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

RULE_KEYS = {"false_per_10k", "missed", "median_delay", "ramps_caught", "locked_out", "survives_nan"}


def cell(arm: str, regret: float, *, warned: int | None = None, fault: str = "g300x10") -> dict:
    return {
        **{"task": "english", "fault": fault, "seed": 100, "arm": arm, "regret": regret, "fault_committed": 2},
        **{"extra_refused": 1, "deep": 0, "stopped": False, "warned": warned},
    }


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One quick run of everything but the closed loop."""
    out = tmp_path_factory.mktemp("bench")
    words = ["--quick", "--seeds", "1", "--workers", "1", "--parts", "open-loop", "noise", "bloom"]
    assert main(["bench", "detection", "--out", str(out), *words]) == 0
    return out


class TestQuickRun:
    def test_the_summary_has_what_is_relied_on(self, quick: Path) -> None:
        summary = read_json(quick / "summary.json")
        json.loads((quick / "summary.json").read_text(), parse_constant=pytest.fail)  # strict JSON: no bare NaN
        assert {"predictive", "olmo-loss", "olmo-loss, tuned", "zclip", "holt", "norm guard"} <= set(summary["rules"])
        for rule in summary["rules"].values():
            assert set(rule) >= RULE_KEYS and set(rule["missed"]) >= {"mild", "moderate", "severe"}
        assert summary["seeds"]["tuning"] == [0] and summary["seeds"]["reporting"] == [106]
        assert summary["quick"] is True and set(summary) >= {"noise", "bloom", "guard", "tuning", "roc"}

    def test_the_tables_have_every_rule(self, quick: Path) -> None:
        text = (quick / "tables.md").read_text()
        for name in read_json(quick / "summary.json")["rules"]:
            assert f"| {name} |" in text
        assert "no figure here means anything" in text
        assert (quick / "roc.png").read_bytes().startswith(b"\x89PNG")
        assert "<table>" in (quick / "report.html").read_text()

    def test_later_parts_use_the_tuned_thresholds(self) -> None:
        settings = parts._settings({"rules": {"metaseq, tuned": {"threshold": 3.0}}})
        found = {name: (contestant.name, threshold) for name, contestant, threshold in settings}
        assert found["metaseq, tuned"] == ("metaseq", 3.0) and found["metaseq"] == ("metaseq", None)
        assert "holt, tuned" not in found

    def test_nominal_rates_are_those_of_the_default_rule(self, quick: Path) -> None:
        noise = read_json(quick / "summary.json")["noise"]
        nominal = {name: row["nominal_per_10k"] for name, row in noise.items() if "nominal_per_10k" in row}
        assert nominal == {"predictive at 0.001": 10, "predictive at 0.0005": 5, "predictive at 0.0001": 1}
        assert all(set(row["families"]) == set(parts.noise.FAMILIES) for row in noise.values())

    def test_thresholds_are_tuned_on_tuning_seeds_and_reported_on_others(
        self, quick: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seeds: dict[str, set[int]] = {"tuned": set(), "measured": set()}

        def tune(recordings, contestant, budget):
            seeds["tuned"] |= {recording.seed for recording in recordings}
            return contestant.grid[0]

        def measure(recordings, contestant, threshold):
            seeds["measured"] |= {recording.seed for recording in recordings}
            return {"false_per_10k": 0.0, "events": dict.fromkeys(NAMES, 1), "missed": dict.fromkeys(NAMES, 0)}

        monkeypatch.setattr(parts.open_loop, "tune", tune)
        monkeypatch.setattr(parts.open_loop, "measure", measure)
        setup = parts.Setup(quick, parts.QUICK, (0,), (106,), 1)
        found = parts._replay_contestant(setup, "metaseq", 0)
        assert seeds == {"tuned": {0}, "measured": {106}} and found["tuned"] is not None
        assert parts._replay_contestant(setup, "predictive", 0)["tuned"] is None  # it sets the budget

    def test_a_second_call_redoes_no_recording_and_keeps_the_other_parts(self, quick: Path) -> None:
        before = read_json(quick / "summary.json")
        stamps = {path.name: path.stat().st_mtime_ns for path in (quick / "recordings").iterdir()}
        bench(quick, seeds=1, quick=True, parts=["bloom"], workers=1)
        after = read_json(quick / "summary.json")
        assert stamps == {path.name: path.stat().st_mtime_ns for path in (quick / "recordings").iterdir()}
        assert repr(after) == repr(before)

    def test_other_seeds_start_a_new_summary(self, quick: Path, tmp_path: Path) -> None:
        (tmp_path / "summary.json").write_text((quick / "summary.json").read_text())
        bench(tmp_path, seeds=2, quick=True, parts=["bloom"], workers=1)
        assert "rules" not in read_json(tmp_path / "summary.json")


class TestClosedLoop:
    def test_arms_are_tuned_and_rows_are_summarized(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = {}

        def run(out, *, seeds, cells, arms, workers, progress):
            asked.update(out=out, seeds=seeds, cells=cells, arms=arms, workers=workers)
            progress(1, 1)
            return [cell(arm, 0.01) for arm in arms]

        monkeypatch.setattr("dist_stability.bench.detection.closed_loop.run", run)
        known = {"rules": {"holt, tuned": {"threshold": 9.0}, "olmo-loss on the probe, tuned": {"threshold": 4.0}}}
        setup = parts.Setup(tmp_path, parts.FULL, (0,), (106, 109), 1)
        summary = parts.PARTS["closed-loop"](setup, known)["closed_loop"]
        assert {each.seed for each in asked["cells"]} == {106, 109} and asked["out"] == tmp_path
        assert len({each.task.name for each in asked["cells"]}) > 4
        assert set(summary) == set(asked["arms"]) >= {"none", "perfect", "predictive", "holt"}
        assert asked["arms"]["none"] is None and asked["arms"]["perfect"] is None
        assert asked["arms"]["holt"]().threshold == 9.0
        assert asked["arms"]["olmo-loss on the probe"]().threshold == 4.0
        assert asked["arms"]["metaseq on the probe"]().threshold == 1.25  # nothing tuned: as it comes
        some = parts.Setup(tmp_path, parts.FULL, (0,), (100,), 1, ("none", "holt"))
        assert list(parts.PARTS["closed-loop"](some, known)["closed_loop"]) == ["none", "holt"] == list(asked["arms"])
        few = parts.Setup(tmp_path, parts.FULL, (0,), (100,), 1, ("none",), ("english", "cnnA"))
        parts.PARTS["closed-loop"](few, known)
        assert {each.task.name for each in asked["cells"]} == {"english", "cnnA"}
        with pytest.raises(ValueError, match=r"--tasks must be some of phrase, english, .*; got german"):
            parts.PARTS["closed-loop"](parts.Setup(tmp_path, parts.FULL, (0,), (100,), 1, None, ("german",)), known)
        with pytest.raises(ValueError, match=r"--arms must be some of none, perfect, predictive, .*; got hold"):
            parts.PARTS["closed-loop"](parts.Setup(tmp_path, parts.FULL, (0,), (100,), 1, ("hold",)), known)

    def test_summary_of_rows(self) -> None:
        rows = [cell("a", 0.01), cell("a", 0.03, warned=5), cell("a", 0.3, fault="row100"), cell("b", math.nan)]
        summary = tables.summarize_closed_loop(rows)
        a = summary["a"]
        assert (a["cells"], a["fault_committed"], a["extra_refused"], a["warned"]) == (3, 6, 3, 1)
        shares = [a[key] for key in ("within_0.02", "within_0.05", "above_0.2")]
        assert shares == pytest.approx([1 / 3, 2 / 3, 1 / 3])
        assert a["worst"] == 0.3 and a["worst_cell"] == "english, row100, seed 100"
        assert summary["b"]["above_0.2"] == 1 and summary["b"]["within_0.05"] == 0
        text = markdown(*tables.closed_loop_table(summary))
        assert "| a | 3 | 33 % | 67 % | 33 % | 0.3 (english, row100, seed 100) |" in text


class TestBadInput:
    @pytest.mark.parametrize("seeds", [0, 107])
    def test_seeds(self, tmp_path: Path, seeds: int) -> None:
        with pytest.raises(ValueError, match="--seeds must be between 1 and 106, got"):
            bench(tmp_path, seeds=seeds)

    def test_parts(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="--parts must be some of open-loop, noise, bloom, closed-loop; got half"):
            bench(tmp_path, parts=["half"])

    def test_on_the_command_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "detection", "--seeds", "0"]) == 1
        assert "--seeds must be between 1 and 106" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["bench", "nothing"])

    def test_the_command_line_knows_the_parts(self) -> None:
        from dist_stability import cli

        assert tuple(parts.PARTS) == cli.BENCH_PARTS

    def test_tuning_and_reporting_seeds_never_meet(self) -> None:
        assert command.TUNING + 100 <= command.REPORTING
