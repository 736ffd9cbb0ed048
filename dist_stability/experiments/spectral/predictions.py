"""How well scores tell diverging runs from others: AUROC by slice, with the plain baselines beside them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dist_stability.experiments.spectral.models import INITS, NORMS
from dist_stability.experiments.spectral.statistics import auroc, auroc_interval

Point = Mapping[str, Any]

NO_NORM_EDGE_RATIO = 31.0
"""How much lower the edge of "none" lies than that of the other norms: 0.018 and 0.56, medians of the design grid."""

SCORES: dict[str, tuple[str, Callable[[Point], float]]] = {
    "probe": ("probe: eight virtual steps", lambda p: p["risk"]),
    "sign_step": ("loss after one sign step of 10 LR", lambda p: p["sign_step"]),
    "near_unit": ("M≈1", lambda p: p["near_unit"]),
    "near_unit_log_condition": ("M≈1 log10 kappa", lambda p: p["near_unit_log_condition"]),
    "radius": ("rho", lambda p: p["radius"]),
    "condition": ("kappa", lambda p: p["condition"]),
    "small_update": ("small relative update", lambda p: -p["relative_update"]),
    "gradient_norm": ("initial gradient norm", lambda p: p["gradient_norm"]),
    "no_norm": ("no-norm flag", lambda p: float(not p["has_norm"])),
    "lr": ("LR", lambda p: p["lr"]),
    "no_norm_lr": ("no-norm flag x LR", lambda p: p["lr"] * (not p["has_norm"])),
    "tuned_no_norm_lr": ("LR, x 31 without norm", lambda p: p["lr"] * (1 if p["has_norm"] else NO_NORM_EDGE_RATIO)),
}
"""Title and value of each score, higher meaning riskier. The factor of the last is fitted on the design grid."""

BASELINES = ("no_norm", "lr", "no_norm_lr", "tuned_no_norm_lr")

PAPER_AUROC = {
    "near_unit": 0.995,
    "near_unit_log_condition": 0.873,
    "radius": 0.845,
    "condition": 0.687,
    "gradient_norm": 0.621,
}
"""Table 2 of the paper. Its value for rho needs the sign turned: its No-Norm row has the smallest rho."""

PAPER_TABLE = {
    "pre": (25, 0.0, 0.16, 0.54, 2.29),
    "post": (69, 0.0, 0.66, 0.31, 7.48),
    "rms": (12, 0.0, 0.16, 0.54, 2.28),
    "deep": (12, 0.0, 0.00, 1.00, 3.94),
    "sub": (12, 0.0, 0.13, 0.54, 2.23),
    "none": (84, 0.964, 0.80, 0.19, 1.11),
}
"""Table 1 of the paper: runs, share diverged, M≈1, M>1, rho."""


def slices(points: Sequence[Point]) -> dict[str, list[Point]]:
    """All runs; by norm, init, task and learning rate, where that has more than one value."""
    found: dict[str, list[Point]] = {"all": list(points)}
    for field, order in (("norm", NORMS), ("init", INITS), ("task", None), ("lr", None)):
        values = sorted({p[field] for p in points}, key=(lambda v: v) if order is None else order.index)
        if len(values) > 1:
            for value in values:
                name = f"{field} {value:g}" if isinstance(value, float) else f"{field} {value}"
                found[name] = [p for p in points if p[field] == value]
    return found


def measured(points: Sequence[Point], name: str, *, resamples: int = 1000) -> dict[str, Any]:
    """AUROC of a score with its 95% interval by configuration; runs where it is not a number are left out."""
    value = SCORES[name][1]
    kept = [p for p in points if not math.isnan(value(p))]
    scores, labels = [value(p) for p in kept], [bool(p["diverged"]) for p in kept]
    groups = [tuple(p[field] for field in ("task", "width", "layers", "norm", "init", "seed")) for p in kept]
    low, high = auroc_interval(scores, labels, groups, resamples=resamples) if resamples else (math.nan, math.nan)
    return {"auroc": auroc(scores, labels), "low": low, "high": high, "left_out": len(points) - len(kept)}


def table(points: Sequence[Point], *, resamples: int = 1000) -> list[dict[str, Any]]:
    """A row for each slice with both kinds of runs. Intervals for the probe and M≈1 only where there are slices."""
    rows = []
    for name, part in slices(points).items():
        positives = sum(p["diverged"] for p in part)
        row: dict[str, Any] = {"slice": name, "runs": len(part), "diverged": positives, "scores": {}}
        if 0 < positives < len(part):
            for score in SCORES:
                count = resamples if name == "all" or score in ("probe", "near_unit") else 0
                row["scores"][score] = measured(part, score, resamples=count)
            row["verdict"] = verdict(row["scores"])
        rows.append(row)
    return rows


def verdict(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Which of the plain baselines does better than the probe, or as well; "" if none."""
    ours = scores["probe"]["auroc"]
    better = [SCORES[name][0] for name in BASELINES if scores[name]["auroc"] > ours]
    equal = [SCORES[name][0] for name in BASELINES if scores[name]["auroc"] == ours]
    told = [f"{', '.join(better)} better"] if better else []
    return "; ".join([*told, *([f"{', '.join(equal)} as good"] if equal else [])])


def architectures(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Table 1: by norm, the share of diverged runs and the means of the profile, over configurations."""
    rows = []
    for norm in NORMS:
        part = [p for p in points if p["norm"] == norm]
        if not part:
            continue
        row: dict[str, Any] = {"norm": norm, "runs": len(part)}
        row["diverged"] = statistics.fmean(bool(p["diverged"]) for p in part)
        for name in ("near_unit", "unstable", "radius"):
            row[name] = statistics.fmean(p[name] for p in part)
        rows.append({**row, "paper": PAPER_TABLE[norm]})
    return rows
