"""``dist-stability experiment rksp|kss``: run what is missing of the grids, and write down what they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dist_stability.experiments.spectral import shaping
from dist_stability.experiments.spectral.grids import EDGES, GRIDS
from dist_stability.experiments.spectral.jobs import edge_jobs, grid_jobs, points
from dist_stability.experiments.spectral.pool import Job, perform
from dist_stability.experiments.spectral.predictions import PAPER_AUROC, SCORES, architectures, table
from dist_stability.experiments.spectral.runs import BATCH, LOSS_LIMIT, WARMUP, Run
from dist_stability.experiments.spectral.statistics import fisher
from dist_stability.report import html
from dist_stability.report.events import write_json
from dist_stability.report.markdown import markdown
from dist_stability.report.versions import versions

Section = tuple[str, str, Sequence[str], list[list[Any]]]
"""Heading, text below it, head and rows of the table."""

WITHIN = 1.5
PARTS = (*GRIDS, *(f"edges-{part}" for part in EDGES))


def experiment_rksp(out: Path, *, parts: Sequence[str] | None = None, workers: int = 1, quick: bool = False) -> int:
    """The prediction tables and the check of the stable-learning-rate search.

    Args:
        out: The folder; a finished job in it is not done again.
        parts: Some of :data:`PARTS`; default all. What an earlier call left of the others is shown, too.
        workers: Processes at a time.
        quick: Two configurations of each part, three steps a run: to see that it runs.

    Returns:
        0, or 1 if a job failed.

    Raises:
        ValueError: A part is not known, or ``workers`` is below 1; nothing was started.
    """
    chosen = tuple(PARTS if parts is None else dict.fromkeys(parts))
    if unknown := [part for part in chosen if part not in PARTS]:
        raise ValueError(f"--parts: unknown {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    _check(workers)
    failed: dict[str, str] = {}
    summary: dict[str, Any] = {"experiment": "rksp", "quick": quick, "parts": list(chosen), "versions": versions()}
    sections: list[Section] = []
    for part in PARTS:
        jobs = _jobs(part, out, quick)
        if part in chosen:
            failed |= perform(jobs, workers, part)
        results = [result for job in jobs if (result := job.result()) is not None]
        if not results:
            continue
        if part in GRIDS:
            found = points(results)
            summary[part] = {"predictions": table(found), "architectures": architectures(found)}
            sections += list(_grid_sections(part, summary[part]))
        else:
            summary[part] = edges(results)
            sections.append(_edge_section(part, summary[part]))
    return _write(out, "Predicting divergence before training", summary, sections, failed)


def experiment_kss(out: Path, *, workers: int = 1, quick: bool = False) -> int:
    """The arms of Table 3. Arguments, result and errors as of :func:`experiment_rksp`."""
    _check(workers)
    jobs: dict[str, list[Job]] = {}
    configurations = shaping.CONFIGURATIONS[:1] if quick else shaping.CONFIGURATIONS
    steps = 3 if quick else shaping.STEPS
    for arm, settings in shaping.ARMS.items():
        jobs[arm] = [
            Job(
                (out / "quick" if quick else out) / arm / f"{run}.json",
                {**run.to_dict(), **asdict(settings), "warmup": WARMUP, "batch": BATCH},
                shaping.train,
                (run, arm),
            )
            for configuration in configurations
            for run in (Run(configuration, lr, steps) for lr in shaping.LRS)
        ]
    failed = perform([job for each in jobs.values() for job in each], workers, "kss")
    arms: dict[str, dict[str, Any]] = {}
    for arm, each in jobs.items():
        results = [result for job in each if (result := job.result()) is not None]
        arms[arm] = {
            "runs": len(results),
            "diverged": sum(result["diverged"] for result in results),
            "by_loss": sum(not result["max_loss"] <= LOSS_LIMIT for result in results),
            "learned": sum(result["learned"] for result in results),
            "paper_of_24": shaping.ARMS[arm].paper,
        }
    base = arms["none"]
    for found in arms.values():
        found["fisher"] = fisher((found["diverged"], found["runs"]), (base["diverged"], base["runs"]))
        paper = found["paper_of_24"]
        found["paper_fisher"] = None if paper is None else fisher((paper, 24), (shaping.ARMS["none"].paper or 0, 24))
    head = (
        "arm",
        "runs",
        "diverged",
        "share",
        "by loss",
        "learned",
        "Fisher p against none",
        "paper's share",
        "paper's p",
    )
    rows = [
        [
            arm,
            found["runs"],
            found["diverged"],
            found["diverged"] / max(1, found["runs"]),
            found["by_loss"],
            found["learned"],
            found["fisher"],
            None if found["paper_of_24"] is None else found["paper_of_24"] / 24,
            found["paper_fisher"],
        ]
        for arm, found in arms.items()
    ]
    note = (
        "No normalization, learning rates 0.010 to 0.020; p is of the exact two-sided test, not corrected. By loss: "
        "the loss went over its limit, not only the gradient norm, which has the penalty's gradient in it."
    )
    summary = {"experiment": "kss", "quick": quick, "arms": arms, "versions": versions()}
    return _write(
        out, "Clipping and spectral shaping against divergence", summary, [("Table 3", note, head, rows)], failed
    )


def edges(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far the searches were from the true edges, by number of virtual steps: ratios of true edge to found rate."""
    lengths = list(results[0]["found"])
    ratios = {
        length: [None if r["found"][length]["lr"] is None else r["edge"] / r["found"][length]["lr"] for r in results]
        for length in lengths
    }
    close = {n: sum(v is not None and 1 / WITHIN <= v <= WITHIN for v in ratios[n]) for n in lengths}
    slowest = {n: max(result["found"][n]["seconds"] for result in results) for n in lengths}
    names = ("task", "width", "layers", "norm", "init")
    configurations = [{name: result["settings"][name] for name in names} for result in results]
    rows = [
        {**configuration, "edge": result["edge"], "ratios": {length: ratios[length][place] for length in lengths}}
        for place, (configuration, result) in enumerate(zip(configurations, results, strict=True))
    ]
    return {"configurations": len(results), "within": close, "slowest_seconds": slowest, "rows": rows}


def _jobs(part: str, out: Path, quick: bool) -> list[Job]:
    if quick:
        out = out / "quick"  # beside what counts, never in its place
    if part not in GRIDS:
        jobs = edge_jobs(part.removeprefix("edges-"), out, steps=3 if quick else None)
        return jobs[:2] if quick else jobs
    grid = GRIDS[part]
    if quick:
        some = (grid.configurations[0], grid.configurations[-1])
        grid = replace(grid, configurations=some, lrs=(grid.lrs[0], 1e6), steps=3)
    return grid_jobs(grid, out)


def _grid_sections(part: str, found: dict[str, Any]) -> list[Section]:
    first = [*SCORES]
    head = ("slice", "runs", "diverged", *(SCORES[name][0] for name in first), "plain baselines")
    rows = [
        [
            *(row[name] for name in ("slice", "runs", "diverged")),
            *(_cell(row["scores"].get(name)) for name in first),
            row.get("verdict", "one kind only"),
        ]
        for row in found["predictions"]
    ]
    note = (
        "AUROC of diverging; in brackets the 95% interval, bootstrap by configuration. The last column names plain "
        "baselines that are better than the probe, or as good."
    )
    sections: list[Section] = [(f"Table 2, {part}", note, head, rows)]
    if part == "paper":
        head = ("norm", "runs", "diverged", "M≈1", "M>1", "rho", "paper: diverged", "M≈1", "M>1", "rho")
        rows = [
            [row[name] for name in ("norm", "runs", "diverged", "near_unit", "unstable", "radius")]
            + [*row["paper"][1:]]
            for row in found["architectures"]
        ]
        told = ", ".join(f"{SCORES[name][0]} {value}" for name, value in PAPER_AUROC.items())
        sections.insert(
            0, ("Table 1", f"Means over configurations. The paper's AUROC (its Table 2): {told}.", head, rows)
        )
    return sections


def _edge_section(part: str, found: dict[str, Any]) -> Section:
    lengths = list(found["within"])
    head = ("task", "width", "layers", "norm", "init", "true edge", *(f"edge / found, {n} steps" for n in lengths))
    names = ("task", "width", "layers", "norm", "init", "edge")
    rows = [[*(row[name] for name in names), *(row["ratios"][n] for n in lengths)] for row in found["rows"]]
    told = "; ".join(
        f"{n} virtual steps: {found['within'][n]} of {found['configurations']} within a factor {WITHIN:g}, at most "
        f"{found['slowest_seconds'][n]:.1f} s a search"
        for n in lengths
    )
    return f"Stable-learning-rate search, {part}", f"{told}.", head, rows


def _cell(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return ""
    interval = "" if measured["low"] != measured["low"] else f" [{measured['low']:.2f}, {measured['high']:.2f}]"
    return f"{measured['auroc']:.3f}{interval}"


def _write(out: Path, title: str, summary: dict[str, Any], sections: list[Section], failed: dict[str, str]) -> int:
    summary["failed"] = failed
    if summary["quick"]:
        title += " (quick run: no number of it means anything)"
    out.mkdir(parents=True, exist_ok=True)
    parts, text = [], [f"# {title}"]
    for heading, note, head, rows in sections:
        parts += [html.heading(heading), html.paragraph(note), html.table(head, rows)]
        text += [f"## {heading}", note, markdown(head, rows).rstrip()]
    (out / "report.html").write_text(html.page(title, "CPU scale", parts), encoding="utf-8")
    (out / "tables.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    write_json(out / "summary.json", summary)
    for name in ("report.html", "tables.md", "summary.json"):
        print(out / name)
    for name, why in failed.items():
        print(f"failed: {name}: {why}")
    return 1 if failed else 0


def _check(workers: int) -> None:
    if workers < 1:
        raise ValueError(f"--workers {workers}: must be at least 1")
