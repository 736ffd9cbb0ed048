"""The experiment can be run, resumed and read; bands fail where they must."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dist_stability.cli import main
from dist_stability.experiments.restrained import calibration, depth, overhead, sharded, step_sizes, table1
from dist_stability.experiments.restrained.bisection import bisect
from dist_stability.experiments.restrained.command import experiment
from dist_stability.experiments.restrained.parts import Check, Result, by_seed, close, every, spread, within
from dist_stability.experiments.restrained.plan import PARTS, parts
from dist_stability.experiments.restrained.small_batch import DECIDED, FEATURES, SPAN, TASKS, label
from dist_stability.report.events import read_json


def passed(checks: Any, what: str) -> bool | None:
    (found,) = [check for check in checks if check.what.startswith(what)]
    return found.passed  # type: ignore[no-any-return]


def test_bands() -> None:
    assert within("x", [1.0, 2.0], 1.0, 2.0).passed and not within("x", [1.0, 2.1], 1.0, 2.0).passed
    assert not within("x", [math.nan], 0.0).passed and not within("x", []).passed
    assert [within("x", [0.0], *band).band for band in ((0.0, 0.0), (1.0,), (-math.inf, 2.0), (1.0, 2.0))] == [
        "0",
        ">= 1",
        "<= 2",
        "1 .. 2",
    ]
    assert close("x", [99.1, 100.9], 100.0, within_fraction=0.01).passed
    assert not close("x", [100.0, 101.1], 100.0, within_fraction=0.01).passed
    assert close("x", [-236.1], -236.0, within_fraction=1e-3).passed
    assert not every("x", []).passed and every("x", [True]) == Check("x", "all", "1 of 1", True)
    assert spread([3.0, 1.0, 2.0]) == "1 .. 2 .. 3 (3)" and spread([2.0, 2.0]) == "2"


def test_bisection() -> None:
    assert bisect(lambda x: x < 0.7, 0.0, 1.0) == pytest.approx(0.7, abs=1e-9)
    assert bisect(lambda x: x > 0.7, 1.0, 0.0) == pytest.approx(0.7, abs=1e-9)
    with pytest.raises(ValueError, match=r"expected true at 0\.8"):
        bisect(lambda x: x < 0.7, 0.8, 1.0)


def test_jobs_have_names_of_their_own_and_seeds_are_kept_apart() -> None:
    for part in PARTS.values():
        names = [settings["name"] for settings in part.settings(False)]
        assert len(names) == len(set(names)) and 1 <= len(part.settings(True)) <= max(5, len(names))
    assert not set(calibration.TUNING) & set(calibration.REPORTING)
    runs = calibration.settings(False)
    assert {run["task"] for run in runs} == set(TASKS) and len(TASKS) >= 2
    assert sum(run["seed"] in calibration.REPORTING for run in runs) >= 40
    assert "R12" not in parts(None) and list(parts(Path("x")))[-1] == "R12"


def test_it_is_run_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["experiment", "restrained", "--quick", "--workers", "1", "--out", str(tmp_path), "--parts"]
    assert main([*command, "R1", "R4"]) == 0
    folder = tmp_path / "quick"
    files = sorted(folder.glob("R*/*.json"))
    assert [file.parent.name for file in files] == ["R1", "R4", "R4"]
    assert (folder / "one_layer_exponents.png").stat().st_size > 10_000
    stamps = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    assert main([*command, "R1"]) == 0
    assert [file.stat().st_mtime_ns for file in files[1:]] == stamps[1:], "what is there is not done again"
    summary = read_json(folder / "summary.json")
    assert files[0].exists() and {"R1", "R4"} <= set(summary) and summary["quick"]
    assert "no number of it means anything" in (folder / "report.html").read_text()
    assert "R4: Inside its bands." in capsys.readouterr().out
    assert main([*command, "R13"]) == 1 and "unknown R13" in capsys.readouterr().err
    assert main([*command, "R12"]) == 1 and "R12 needs --data" in capsys.readouterr().err
    assert main(["experiment", "restrained", "--seeds", "3", "--out", str(tmp_path)]) == 1
    assert "--seeds: does not go with restrained" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--workers 0"):
        experiment(tmp_path, workers=0)


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    assert experiment(tmp_path, quick=True) == 0
    assert {file.parent.name for file in (tmp_path / "quick").glob("*/*.json")} == set(PARTS)


def twins(rates: dict[int, float], distances: dict[int, float], seed: int = 0) -> list[Result]:
    return [
        {
            "settings": {"seed": seed, "divisor": n, "depth": n, "k": 3},
            "relative_l1": [distances[n]],
            "growth": {"rate": rate},
            "verdict": "benign",
        }
        for n, rate in rates.items()
    ]


def test_a_seed_out_of_order_or_a_bit_of_difference_is_seen() -> None:
    far = {1: 1e-2, 2: 1e-3, 4: 1e-4, 8: 1e-4}
    good = twins({1: 0.3, 2: 0.2, 4: 0.1, 8: 0.05}, far)
    control: Result = {"settings": {"seed": 0, "divisor": 1, "k": 2}, "largest_l1": 0.0}
    checks = step_sizes.conclude([*good, control]).checks
    assert [check.passed for check in checks] == [True, True, True]
    off = step_sizes.conclude([*good, {**control, "largest_l1": 1e-9}]).checks
    assert passed(off, "k = 2") is False
    mixed = [*good, *twins({1: 0.3, 2: 0.2, 4: 0.05, 8: 0.05}, {**far, 8: 1.1e-4}, seed=1), control]
    checks = step_sizes.conclude(mixed).checks
    assert passed(checks, "distance at n = 1") is False and passed(checks, "seeds whose growth") is False
    assert list(by_seed(mixed[:-1], "divisor")) == [0, 1]


def test_growth_must_rise_with_depth_in_every_seed() -> None:
    some = {d: 1.0 for d in depth.DEPTHS}
    good = twins({8: 0.01, 14: 0.02, 20: 0.05, 32: 0.2}, some)
    assert all(check.passed for check in depth.conclude(good).checks)
    bad = depth.conclude([*good, *twins({8: 0.01, 14: 0.05, 20: 0.05, 32: 0.09}, some, seed=1)]).checks
    assert [check.passed for check in bad] == [False, False]


def rows(lr: float, accuracies: list[list[float]]) -> list[Result]:
    return [
        {"settings": {"lr": lr, "seed": seed}, "accuracies": row, "churn": [0.0]} for seed, row in enumerate(accuracies)
    ]


def test_the_spreads_are_those_of_rows_and_columns() -> None:
    results = [*rows(table1.LR, [[94.0, 95.0], [95.0, 96.0]]), *rows(table1.CONTROL, [[90.0, 90.0], [80.0, 80.0]])]
    checks = table1.conclude(results).checks
    assert passed(checks, "std over k / std over seeds") is True and passed(checks, "control, lr") is True
    one = next(check for check in checks if check.what.startswith("std over k"))
    assert one.measured == "1", "0.5 along rows, 0.5 along columns"
    checks = table1.conclude([*rows(table1.LR, [[94.0, 95.0], [94.1, 95.1]]), *results[2:]]).checks
    assert passed(checks, "std over k") is False


def test_overhead_is_told_as_a_part_of_the_plain_step() -> None:
    seconds = {"plain": [1.0, 1.0], "observed": [1.1, 1.1], "margin": [1.14, 1.14], "margin and rho": [1.2, 1.2]}
    result: Result = {"settings": {"name": "gpt", "block": 50}, "seconds": seconds}
    checks = overhead.conclude([result]).checks
    assert [check.passed for check in checks] == [True, False]
    assert [check.measured for check in checks] == ["4", "10"]


def test_a_rank_that_leaves_a_trace_or_measures_otherwise_is_seen() -> None:
    def result(mode: str, value: float, changed: tuple[str, ...] = ()) -> Result:
        exact = 1.0 if mode == "single" else None
        settings = {"mode": mode, "ranks": 1}
        return {"settings": settings, "eigenvalue": value, "exact": exact, "changed": list(changed)}

    good = [result("single", 0.999), result("ddp", 0.995)]
    assert all(check.passed for check in sharded.conclude(good).checks)
    bad = sharded.conclude([*good, result("fsdp2", 0.97, ("parameter x",))]).checks
    assert [check.passed for check in bad] == [False, False, False]


def test_labels() -> None:
    start = [4.0] * (DECIDED - SPAN) + [2.0] * SPAN
    assert label([*start, *[2.1] * 40], False) == "healthy"
    assert label([*start, *[2.3] * 40], False) == "fails later"
    assert label([*start, *[2.0] * 5], True) == "fails later"
    assert label(start[:-1], True) == "failed early"
    assert label([1.0, *start, 1.0], False) == "failed early"


def test_what_only_repeats_the_learning_rate_does_not_separate() -> None:
    """Rho tells failing runs at every learning rate; the margin is a function of the learning rate alone."""
    results: list[Result] = []
    for task, rates in TASKS.items():
        for place, lr in enumerate(rates):
            for seed in (*calibration.TUNING, *calibration.REPORTING):
                fails = (seed + place) % 6 < place
                values = {name: 0.0 for name in FEATURES} | {"lr": lr, "margin": lr, "rho": 1.0 + fails}
                settings = {"task": task, "lr": lr, "seed": seed}
                results.append(
                    {"settings": settings, "label": "fails later" if fails else "healthy", "features": values}
                )
    outcome = calibration.conclude(results)
    assert passed(outcome.checks, "tasks on which median rho") is True
    assert passed(outcome.checks, "tasks on which largest margin") is False
    row = next(row for row in outcome.rows if row[1] == FEATURES["rho"])
    failing = row[-2].split(" of ")
    assert row[4].startswith("1.00") and failing[0] == failing[1] and row[-1].startswith("0 of ")
    early = calibration.conclude([{**each, "label": "failed early"} for each in results])
    assert not early.rows and len(early.checks) == 1
