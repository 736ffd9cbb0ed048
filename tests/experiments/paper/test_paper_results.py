"""What the summary, the tables and the figures say about runs made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from paper_records import grid, trace, write_run

from dist_stability.experiments.paper import figures, tables
from dist_stability.experiments.paper.plan import Grid, Run
from dist_stability.experiments.paper.protocol import protocol
from dist_stability.experiments.paper.results import load_results, summarize

FAULT = protocol("text", quick=True).injection("g300x10")


def place(arm: str, seed: int = 0, parallel: str = "single") -> Run:
    fault = "none" if arm in ("clean", "guarded-clean") else "g300x10"
    return Run("phrase", parallel, fault, arm, seed)


def folder(out: Path, parallel: str = "single", *, guarded_final: float = 1.1) -> Grid:
    asked = grid(out, seeds=2, parallels=(parallel,))
    for seed in (0, 1):
        write_run(asked, place("clean", seed, parallel), final=1.0)
        write_run(asked, place("guarded-clean", seed, parallel), final=1.0)
        write_run(asked, place("baseline", seed, parallel), final=2.0 + seed)
        refused = tuple(FAULT.attempts) if seed == 0 else (6,)
        write_run(asked, place("guarded", seed, parallel), final=guarded_final, refused=refused)
        write_run(asked, place("twin", seed, parallel), final=1.1)
    return asked


def test_the_summary_has_every_measure_over_the_seeds(tmp_path: Path) -> None:
    found = summarize(load_results(folder(tmp_path)))
    guarded = found["arms"]["guarded"]
    assert guarded["recovery_gap"]["values"] == pytest.approx([0.1, 0.05])
    assert guarded["recovery_gap"]["mean"] == pytest.approx(0.075)
    assert guarded["regret"]["values"] == [0.0, 0.0] and guarded["seeds"] == [0, 1]
    assert guarded["refused_inside"]["values"] == [2, 1]
    assert found["arms"] == found["faults"]["phrase"]["single"]["g300x10"]
    assert found["arms"]["clean"]["overhead_ratio"]["mean"] == 1.0
    # 14 attempts of 0.2 s in a loop of 4 s
    assert guarded["overhead_ratio"]["mean"] == pytest.approx(4 / (4 - 14 * 0.2))
    assert found["gamma"] == pytest.approx(4 / 24) and protocol("vision", probe_size=16).gamma == pytest.approx(
        16 / 384
    )
    assert found["overhead"]["guarded"] == {"probe": pytest.approx(2.8 / 1.2)}


def test_twins_are_compared_where_they_say_something(tmp_path: Path) -> None:
    asked = folder(tmp_path)
    found = summarize(load_results(asked))
    # Seed 1 let a faulty step stand.
    assert (found["twin"]["equal"], found["twin"]["compared"], found["twin"]["undefined"]) == (1, 1, 1)
    write_run(asked, place("twin"), final=1.1, state={"weight": "b"})
    found = summarize(load_results(asked))
    assert (found["twin"]["equal"], found["twin"]["compared"], found["twin"]["different"]) == (0, 1, [0])


def test_clean_runs_are_compared_with_and_without_the_guard(tmp_path: Path) -> None:
    asked = folder(tmp_path)
    assert summarize(load_results(asked))["transparency"] == [
        {"task": "phrase", "parallel": "single", "equal": 2, "compared": 2, "refused": 0, "different": []}
    ]
    write_run(asked, place("guarded-clean", 1), refused=(5,), state={"weight": "b"})
    found = summarize(load_results(asked))
    row = found["transparency"][0]
    assert (row["equal"], row["refused"], row["different"]) == (1, 1, [1])
    write_run(asked, place("guarded-clean", 1), refused=(FAULT.start,))
    guarded = summarize(load_results(asked))["arms"]["guarded-clean"]  # no fault there: a false refusal
    assert guarded["false_refusals"]["values"] == [0, 1] and guarded["refused_inside"]["values"] == [0, 0]


def test_parallel_modes_are_compared_run_by_run(tmp_path: Path) -> None:
    folder(tmp_path, "ddp")
    asked = folder(tmp_path, "fsdp2", guarded_final=1.25)
    rows = summarize(load_results(asked))["distributed"]
    row = next(row for row in rows if row["arm"] == "guarded" and row["modes"] == ["ddp", "fsdp2"])
    assert (row["equal_verdicts"], row["compared"]) == (2, 2)
    assert row["largest_difference"] == pytest.approx(0.15)
    write_run(asked, place("guarded", 1, "fsdp2"), refused=(7,))
    rows = summarize(load_results(asked))["distributed"]
    row = next(row for row in rows if row["arm"] == "guarded" and row["modes"] == ["ddp", "fsdp2"])
    assert (row["equal_verdicts"], row["different"]) == (1, [1])


def test_what_an_earlier_call_ran_is_shown_and_other_settings_are_not(tmp_path: Path) -> None:
    asked = folder(tmp_path)
    assert set(load_results(replace(asked, arms=("clean",))).of(*("phrase", "single", "g300x10"), "guarded")) == {0, 1}
    other = replace(asked, protocol=replace(asked.protocol, lr=1e-3))
    assert load_results(other).traces == {}


def test_mixed_code_is_counted(tmp_path: Path) -> None:
    asked = folder(tmp_path)
    path = asked.folder(place("clean")) / "summary.json"
    path.write_text(path.read_text().replace('"source": "a"', '"source": "b"'))
    assert summarize(load_results(asked))["made_with"]["source"] == {"a": 9, "b": 1}


def test_a_cell_says_how_many_seeds_it_is_over_and_how_many_were_lost() -> None:
    assert tables.cell({"mean": 0.5, "std": 0.1, "values": [0.4, 0.6]}) == "0.5000 ± 0.1000"
    assert tables.cell({"mean": 0.5, "std": 0.0, "values": [0.5, None]}) == "0.5 (1)"
    assert tables.cell({"mean": math.inf, "std": None, "values": [0.5, math.inf]}) == "lost in 1 of 2"
    assert tables.cell({"mean": None, "std": None, "values": [None]}) == ""


def test_a_band_is_mean_and_deviation_by_batch_and_the_last_value_stands() -> None:
    runs = [trace([1.0, 2.0, 4.0]), trace([3.0, 4.0], batches=[0, 2])]
    found = figures.band(runs, 3, lambda t: t.probe)
    assert found.mean == [2.0, 2.5, 4.0]
    assert found.std == pytest.approx([math.sqrt(2), math.sqrt(0.5), 0.0])


def test_a_lost_run_leaves_a_gap_in_the_band_and_the_figure_is_drawn() -> None:
    lost = trace([1.0] * 7 + [math.inf] * 7)
    found = figures.band([lost, trace([1.0] * 14)], 14, lambda t: t.probe)
    assert found.mean[:7] == [1.0] * 7 and all(map(math.isnan, found.mean[7:]))
    arms = {"baseline": {0: lost}, "guarded": {0: trace([1.0] * 14)}}
    figure = figures.probe_loss(arms, FAULT, 14, title="Probe loss: made-up data", subtitle="")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["baseline (lost)", "guarded"]
    assert any("made-up data" in text.get_text() for text in figure.texts)
    assert math.isfinite(figure.axes[0].get_ylim()[1])


def test_the_innovation_has_one_panel_for_each_arm() -> None:
    judged = trace([1.0] * 14, innovations=[0.01] * 14, bounds=[math.inf] * 3 + [0.1] * 11)
    figure = figures.innovation({"guarded": {0: judged}, "paper": {0: judged}}, FAULT, 14, title="t", subtitle="")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["guarded", "paper"]
    assert figure.axes[0].get_position().y0 > figure.axes[1].get_position().y1
