"""Figures show what happened, and the page needs nothing but itself."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dist_stability.report import html, plots
from dist_stability.report.build import report
from dist_stability.report.events import EventLog, read_json, write_json
from dist_stability.report.runs import NoRun, RunRecord, load_runs

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects what a page refers to, and insists that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def event(attempt: int, measurement: float | None, action: str = "commit", **more: Any) -> dict[str, Any]:
    return {
        "step": attempt,
        "attempt": attempt,
        "rank": 0,
        "signal": "probe" if action != "commit" else "",
        "measurement": measurement,
        "innovation": 0.01 if measurement is not None else None,
        "bound": math.inf if attempt < 3 else 0.1,
        "prediction": None,
        "gradient_norm": 1.0 + attempt,
        "action": action,
        "would": None,
        "undone": [],
        "reason": "",
        "seconds": {"step": 0.001, "vote": 0.002},
        **more,
    }


def guarded_events() -> list[dict[str, Any]]:
    events = [event(attempt, 3.0 - 0.05 * attempt, probe=3.0 - 0.05 * attempt) for attempt in range(20)]
    for attempt, said in ((10, "rollback"), (11, "rollback"), (12, "veto")):
        measured = {"rollback": 5.0, "veto": None}[said]
        events[attempt] = event(attempt, measured, said, probe=2.55, reason="<script>alert(1)</script> & more")
    events[11]["measurement"] = math.nan
    events[11]["innovation"] = math.nan
    return events


def write_run(folder: Path, events: list[dict[str, Any]], **summary: Any) -> None:
    with EventLog(folder / "events.jsonl") as log:
        for each in events:
            log.append(each)
    if summary:
        write_json(folder / "summary.json", summary)


SUMMARY = {
    "finished": True,
    "data": "English text of pydoc_data.topics",
    "parallel": "ddp",
    "world_size": 2,
    "device": "cpu",
    "settings": {
        "rule": "predictive",
        "steps": 20,
        "batch_size": 8,
        "optimizer": "adamw",
        "seed": 0,
        "inject": ["gradient-scale:step=10,factor=300,length=3"],
    },
    "command": ["launch/train.py", "--task", "text"],
    "versions": {"torch": "2"},
    "undone": [],
    "evaluation": 2.5,
    "seconds": 3.0,
}


def test_a_report_is_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "run", guarded_events(), **SUMMARY)
    report(tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http" not in text.replace("http-equiv", "") and "@import" not in text and "url(" not in text
    assert not page.tags & {"script", "link", "iframe"}
    words = "".join(page.words)
    assert "<script>alert(1)</script> & more" in words  # shown, not run
    assert "torchrun --nproc_per_node=2 launch/train.py --task text" in words
    assert "refused 3 batches" in words and "English text of pydoc_data.topics" in words
    assert (tmp_path / "out" / "probe_loss.png").read_bytes().startswith(b"\x89PNG")
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["runs"]["run"]["refused"] == [10, 11, 12]
    assert summary["runs"]["run"]["final_probe"] == pytest.approx(2.05)


def test_the_edge_of_stability_is_drawn_with_what_was_done_about_it(tmp_path: Path) -> None:
    events = guarded_events()
    for each in events:
        said = {"state": "stable", "margin": None, "rho": None, "rung": None, "factor": None, "acted": False}
        each["edge"] = {**said, "reason": ""}
    events[4]["edge"] |= {"margin": 0.7, "rho": 1.4}
    events[8]["edge"] |= {"state": "overdriven", "margin": 1.5, "rung": "cut_lr", "factor": 0.67, "acted": True}
    events[9]["edge"] |= {"state": "overdriven", "margin": math.nan}
    write_run(tmp_path / "run", events, **SUMMARY)
    run = load_runs(tmp_path / "run")[0]
    axes = plots.edge(run, title="t").axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["margin"] == [[4.0, 0.7], [8.0, 1.5]] and lines["median directional ratio / 2"] == [[4.0, 0.7]]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "cut_lr (1)" in labels and "overdriven, runaway or poisoned" in labels
    report(tmp_path / "run", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "stable at 18, overdriven at 2. Done about it: cut_lr at batch 8." in page


def test_a_report_of_several_runs_and_of_one_that_crashed(tmp_path: Path) -> None:
    write_run(tmp_path / "a", guarded_events(), **SUMMARY)
    write_run(tmp_path / "b", [event(0, 3.0, innovation=None), event(1, None, "unjudged", innovation=None)])
    summary = report(tmp_path, tmp_path / "out")
    assert summary["runs"].keys() == {"a", "b"} and not summary["runs"]["b"]["finished"]
    assert "may still be running" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_that_only_observed_lists_what_it_would_have_refused(tmp_path: Path) -> None:
    events = [event(attempt, 3.0) for attempt in range(6)]
    events[4] = event(4, 9.0, signal="probe", would="rollback", reason="far above")
    write_run(tmp_path / "run", events, **SUMMARY)
    assert report(tmp_path / "run", tmp_path / "out")["runs"]["run"]["refused"] == []
    words = "".join(Page((tmp_path / "out" / "report.html").read_text()).words)
    assert "would have refused 1 batch, but only observed," in words and "far above" in words


def test_an_empty_log_still_gives_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [])
    report(tmp_path / "run", tmp_path / "out")
    assert "never measured" not in (tmp_path / "out" / "report.html").read_text()  # it did not finish, which says more


def test_a_folder_without_runs_says_what_was_looked_for(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NoRun, match=r"no run in .*looked for events\.jsonl"):
            load_runs(folder)


def drawn(figure: Any) -> Any:
    plots.to_png(figure)
    return figure.axes[0]


def test_the_probe_figure_shades_the_fault_and_marks_what_was_refused() -> None:
    run = RunRecord("guarded", guarded_events(), SUMMARY)
    assert run.fault_windows() == [(10, 12)]
    axes = drawn(plots.probe_loss([run], title="Probe loss: some data"))
    (window,) = axes.patches
    assert (window.get_x(), window.get_x() + window.get_width()) == (9.5, 12.5)
    (line,) = axes.lines
    assert list(line.get_xdata()) == list(range(20)) and max(line.get_ydata()[10:]) < 2.6  # refused values are no state
    (crosses,) = axes.collections
    assert crosses.get_offsets().tolist() == [[10, 5.0]]  # the NaN and the veto have no loss to show
    assert "refused proposals (3)" in axes.get_legend().get_texts()[0].get_text()
    assert axes.figure.texts[0].get_text() == "Probe loss: some data"


def test_windows_follow_the_batches_of_a_run_that_dropped_some() -> None:
    events = [event(attempt, 3.0, batch=attempt + 5) for attempt in range(20)]
    assert RunRecord("late", events, SUMMARY).fault_windows() == [(15, 17)]
    assert RunRecord("short", events[:11], SUMMARY).fault_windows() == [(15, 15)]


def test_the_other_figures_survive_what_is_not_finite() -> None:
    events = guarded_events()
    events[4]["gradient_norm"] = math.inf
    events[5]["gradient_norm"] = None
    run = RunRecord("guarded", events, SUMMARY)
    axes = drawn(plots.innovation(run, title="x"))
    assert math.isfinite(sum(axes.get_ylim()))
    assert drawn(plots.gradient_norm(run, title="x")).get_yscale() == "log"


def test_numbers_are_written_for_people() -> None:
    said = [html.text(value) for value in (None, True, 0.25, 1e-9, 123456.0, 2.13621, math.nan, [1, 2], "a")]
    assert said == ["", "yes", "0.25", "1e-09", "1.235e+05", "2.1362", "nan", "1, 2", "a"]
    table = html.table(("name", "value"), [("a<b", 1.5), ("c", None)])
    assert "a&lt;b" in table and '<td class="number">1.5</td>' in table and '<td class="number"></td>' in table
