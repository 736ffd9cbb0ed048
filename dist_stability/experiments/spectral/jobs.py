"""The grids as jobs, and what they left."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_stability.experiments.spectral import arms, shaping
from dist_stability.experiments.spectral.grids import EDGE_STEPS, EDGES, Grid
from dist_stability.experiments.spectral.pool import Job
from dist_stability.experiments.spectral.runs import BATCH, WARMUP, Run
from dist_stability.experiments.spectral.scores import RAY, WALK, curves, edge, grid_point

_PROTOCOL = {"warmup": WARMUP, "batch": BATCH, "optimizer": "AdamW, no clipping", "version": 1}


def grid_jobs(grid: Grid, out: Path) -> list[Job]:
    """One job for each configuration: its scores and its runs."""
    return [
        Job(
            out / grid.name / f"{configuration}.json",
            {**asdict(configuration), "lrs": list(grid.lrs), "steps": grid.steps, **_PROTOCOL},
            grid_point,
            (configuration, tuple(grid.runs(configuration))),
        )
        for configuration in grid.configurations
    ]


def edge_jobs(part: str, out: Path, steps: int | None = None) -> list[Job]:
    """One job for each configuration of one part of the check of the search; ``steps`` of a run other than usual."""
    steps = EDGE_STEPS if steps is None else steps
    return [
        Job(
            out / f"edges-{part}" / f"{configuration}.json",
            {**asdict(configuration), "steps": steps, **_PROTOCOL},
            edge,
            (configuration, steps),
        )
        for configuration in EDGES[part]
    ]


def curve_jobs(grid: Grid, out: Path) -> list[Job]:
    """One job for each configuration: what the candidates for the probe see."""
    return [
        Job(
            out / "selection" / f"{configuration}.json",
            {**asdict(configuration), "lrs": list(grid.lrs), "walk": WALK, "ray": RAY, **_PROTOCOL},
            curves,
            (configuration, grid.lrs),
        )
        for configuration in grid.configurations
    ]


def kss_jobs(out: Path, quick: bool = False) -> dict[str, list[Job]]:
    """By arm of Table 3, one job for each run; ``quick``: one configuration, three steps a run."""
    configurations = arms.CONFIGURATIONS[:1] if quick else arms.CONFIGURATIONS
    steps = 3 if quick else arms.STEPS
    runs = [Run(configuration, lr, steps) for configuration in configurations for lr in arms.LRS]
    return {
        name: [
            Job(
                out / name / f"{run}.json",
                {**run.to_dict(), **asdict(arm), "warmup": WARMUP, "batch": BATCH, "version": 2},
                shaping.train,
                (run, name),
            )
            for run in runs
        ]
        for name, arm in arms.ARMS.items()
    }


def cost_jobs(out: Path) -> dict[str, Job]:
    """By arm of Table 3, what a step of it costs. The settings hold all that the number depends on but the machine."""
    protocol = {"steps": shaping.COST_STEPS, "pairs": shaping.COST_PAIRS}
    return {
        name: Job(out / "cost" / f"{name}.json", {**asdict(arm), **protocol}, shaping.cost, name)
        for name, arm in arms.ARMS.items()
    }


def points(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One flat record for each run: configuration, scores, learning rate, label and maxima."""
    found = []
    for result in results:
        settings, scores = result["settings"], dict(result["scores"])
        lrs, risks, sign_steps = (scores.pop(name) for name in ("lrs", "risk", "sign_step"))
        for lr, risk, sign_step, run in zip(lrs, risks, sign_steps, result["runs"], strict=True):
            names = ("task", "width", "layers", "norm", "init", "seed")
            configuration = {name: settings[name] for name in names}
            found.append({**configuration, **scores, "lr": lr, "risk": risk, "sign_step": sign_step, **run})
    return found
