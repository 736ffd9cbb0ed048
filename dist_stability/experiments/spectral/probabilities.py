"""Probabilities from the probe's score: fitted on the runs of one grid, looked at on those of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_stability.diagnostics import calibration
from dist_stability.diagnostics.calibration import Calibrator
from dist_stability.experiments.spectral.grids import DESIGN
from dist_stability.experiments.spectral.pages import Section
from dist_stability.experiments.spectral.runs import Configuration

FAMILY = "small GPT without normalization, AdamW, 10 steps of warmup, no clipping"
SCORE = "risk"

Point = Mapping[str, Any]


def calibrated(grids: Mapping[str, Sequence[Point]]) -> list[dict[str, Any]]:
    """For every ordered pair of grids: a fit on the first, and its mean squared error on the second.

    Only runs without normalization; what the probe was designed on is refused.

    Raises:
        NotCalibrated: A grid has too few of these runs.
    """
    families = {name: [point for point in points if point["norm"] == "none"] for name, points in grids.items()}
    rows = []
    for fitted, own in families.items():
        found = _fit(own)
        for other, points in families.items():
            if other != fitted:
                rows.append({"fitted_on": fitted, "looked_at": other, **_errors(found, points)})
    return rows


def section(rows: Sequence[Mapping[str, Any]]) -> Section:
    """The errors as a table."""
    names = ("fitted_on", "fitted_runs", "looked_at", "runs", "left_out", "error", "error_of_rate")
    return (
        "Probabilities",
        f"Of divergence, for one family ({FAMILY}). Mean squared errors: of the fit on its own grid, with "
        "configurations left out, of its probabilities on another grid, and there of the bare rate of the first.",
        ("fitted on", "runs", "looked at", "runs", "error, left out", "error", "error of the bare rate"),
        [[row[name] for name in names] for row in rows],
    )


def _fit(points: Sequence[Point]) -> Calibrator:
    return calibration.fit(
        [point["risk"] for point in points],
        [bool(point["diverged"]) for point in points],
        groups=[_configuration(point) for point in points],
        sources=[f"{_configuration(point)}-lr{point['lr']:.4g}" for point in points],
        designed_on={f"{configuration}-lr{lr:.4g}" for configuration in DESIGN.configurations for lr in DESIGN.lrs},
        score=SCORE,
        family=FAMILY,
    )


def _errors(found: Calibrator, points: Sequence[Point]) -> dict[str, Any]:
    rate = found.diverged / found.runs
    of_fit = of_rate = 0.0
    for point in points:
        probability = found.probability(point["risk"], family=FAMILY)
        assert probability is not None  # of this family, and a number
        of_fit += (probability - point["diverged"]) ** 2
        of_rate += (rate - point["diverged"]) ** 2
    return {
        "fitted_runs": found.runs,
        "runs": len(points),
        "left_out": found.brier,
        "error": of_fit / len(points),
        "error_of_rate": of_rate / len(points),
    }


def _configuration(point: Point) -> str:
    return str(Configuration(**{name: point[name] for name in ("task", "width", "layers", "norm", "init", "seed")}))
