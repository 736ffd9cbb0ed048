"""``dist-stability experiment rksp|kss``: run what is missing of the grids, and write down what they show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_stability.diagnostics.calibration import NotCalibrated
from dist_stability.experiments.spectral import kss_table, probabilities, selection
from dist_stability.experiments.spectral.grids import DESIGN, EDGES, GRIDS, HELD_OUT, NEAR_NONE
from dist_stability.experiments.spectral.jobs import cost_jobs, curve_jobs, edge_jobs, grid_jobs, kss_jobs, points
from dist_stability.experiments.spectral.pages import Section, write_pages
from dist_stability.experiments.spectral.pool import Job, perform
from dist_stability.experiments.spectral.predictions import PAPER_AUROC, SCORES, architectures, table
from dist_stability.report.versions import versions

WITHIN = 1.5
SELECTION, CALIBRATION = "selection", "calibration"
PARTS = (*GRIDS, *(f"edges-{part}" for part in EDGES), SELECTION, CALIBRATION)
NEEDS = {SELECTION: (DESIGN.name, SELECTION), CALIBRATION: (NEAR_NONE.name, HELD_OUT.name)}
"""What a part looks at where that is not only its own: it is run as well."""


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
    wanted = PARTS if parts is None else parts
    if unknown := [part for part in wanted if part not in PARTS]:
        raise ValueError(f"--parts: unknown {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    _check(workers)
    chosen = {each for part in wanted for each in (part, *NEEDS.get(part, ()))}
    failed: dict[str, str] = {}
    results: dict[str, list[dict[str, Any]]] = {}
    for part in PARTS:
        jobs = _jobs(part, out, quick)
        if part in chosen:
            failed |= perform(jobs, workers, part)
        results[part] = [result for job in jobs if (result := job.result()) is not None]
    summary: dict[str, Any] = {
        "experiment": "rksp",
        "quick": quick,
        "parts": [part for part in PARTS if part in chosen],
        "versions": versions(),
    }
    sections: list[Section] = []
    for part in PARTS:
        if any(not results[each] for each in NEEDS.get(part, (part,))):
            continue
        summary[part], shown = _told(part, results)
        sections += shown
    return write_pages(out, "Predicting divergence before training", summary, sections, failed)


def experiment_kss(out: Path, *, workers: int = 1, quick: bool = False) -> int:
    """The arms of Table 3. Arguments, result and errors as of :func:`experiment_rksp`."""
    _check(workers)
    folder = out / "quick" if quick else out
    jobs, costs = kss_jobs(folder, quick), {} if quick else cost_jobs(folder)
    failed = perform([job for each in jobs.values() for job in each], workers, "kss")
    failed |= perform(list(costs.values()), 1, "kss: cost")  # one at a time: they take the time
    found = kss_table.summarized(
        {arm: [result for job in each if (result := job.result()) is not None] for arm, each in jobs.items()},
        {arm: result["ratio"] for arm, job in costs.items() if (result := job.result()) is not None},
    )
    summary = {"experiment": "kss", "quick": quick, **found, "versions": versions()}
    return write_pages(
        out,
        "Clipping, spectral shaping and the controller against divergence",
        summary,
        kss_table.sections(found),
        failed,
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
    spread = {n: _spread([math.log(v) for v in ratios[n] if v is not None]) for n in lengths}
    return {
        "configurations": len(results),
        "within": close,
        "spread": spread,
        "slowest_seconds": slowest,
        "rows": rows,
    }


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _told(part: str, results: dict[str, list[dict[str, Any]]]) -> tuple[Any, list[Section]]:
    """What a part shows, as numbers and as tables."""
    if part in GRIDS:
        runs = points(results[part])
        grid = {"predictions": table(runs), "architectures": architectures(runs)}
        return grid, _grid_sections(part, grid)
    if part == SELECTION:
        rows = selection.candidates(results[part], points(results[DESIGN.name]))
        return rows, [selection.section(rows)]
    if part == CALIBRATION:
        try:
            rows = probabilities.calibrated({each: points(results[each]) for each in NEEDS[part]})
        except NotCalibrated as why:
            return str(why), [("Probabilities", f"None: {why}", (), [])]
        return rows, [probabilities.section(rows)]
    found = edges(results[part])
    return found, [_edge_section(part, found)]


def _jobs(part: str, out: Path, quick: bool) -> list[Job]:
    if quick:
        out = out / "quick"  # beside what counts, never in its place
    if part == CALIBRATION:
        return []
    if part.startswith("edges-"):
        jobs = edge_jobs(part.removeprefix("edges-"), out, steps=3 if quick else None)
        return jobs[:2] if quick else jobs
    grid = DESIGN if part == SELECTION else GRIDS[part]
    if quick:
        some = (grid.configurations[0], grid.configurations[-1])
        grid = replace(grid, configurations=some, lrs=(grid.lrs[0], 1e6), steps=3)
    return curve_jobs(grid, out) if part == SELECTION else grid_jobs(grid, out)


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
        f"{found['slowest_seconds'][n]:.1f} s a search{_told_spread(found['spread'][n])}"
        for n in lengths
    )
    return f"Stable-learning-rate search, {part}", f"{told}.", head, rows


def _told_spread(spread: float | None) -> str:
    return "" if spread is None else f", standard deviation of ln(edge / found) {spread:.2f}"


def _cell(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return ""
    interval = "" if measured["low"] != measured["low"] else f" [{measured['low']:.2f}, {measured['high']:.2f}]"
    return f"{measured['auroc']:.3f}{interval}"


def _check(workers: int) -> None:
    if workers < 1:
        raise ValueError(f"--workers {workers}: must be at least 1")
