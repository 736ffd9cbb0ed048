"""The calibration table: do margin and rho tell which small-batch AdamW runs will fail? Two tasks, seeds kept apart.

Thresholds and directions are chosen on the tuning seeds; everything that is told is measured on the reporting seeds.
A feature *separates* if on every task the interval of its AUROC lies above 1/2 and its AUROC among runs of one
learning rate is above :data:`WITHIN_RATE`: else it only repeats what the learning rate says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from dist_stability.experiments.restrained.parts import Check, Outcome, Part, Result, Settings, every
from dist_stability.experiments.restrained.small_batch import FEATURES, STEPS, TASKS, train
from dist_stability.experiments.spectral.statistics import auroc, auroc_interval

TUNING, REPORTING = range(1000, 1003), range(5)
WITHIN_RATE = 0.6
MONITORED = ("margin", "margin_median", "rho", "rho_high")
"""What the monitor has; the other features are plain numbers that it must be compared with."""


def settings(quick: bool) -> list[Settings]:
    """One job for each task, learning rate and seed: the reporting seeds, then those for tuning."""
    found: list[Settings] = [
        {"name": f"{task}-lr{lr:g}-s{seed}", "task": task, "lr": lr, "seed": seed, "steps": STEPS}
        for task, rates in TASKS.items()
        for lr in rates
        for seed in (*TUNING, *REPORTING)
    ]
    return [{**found[place], "steps": 62} for place in (0, -1)] if quick else found


def conclude(results: Sequence[Result]) -> Outcome:
    """The table, and whether anything separates."""
    known = [result for result in results if result["label"] != "failed early"]
    rows: list[list[Any]] = []
    separates: dict[str, list[bool]] = {name: [] for name in MONITORED}
    counts = []
    for task in TASKS:
        tuning = [r for r in known if r["settings"]["task"] == task and r["settings"]["seed"] in TUNING]
        reporting = [r for r in known if r["settings"]["task"] == task and r["settings"]["seed"] in REPORTING]
        counts.append(_count(task, [r for r in results if r["settings"]["task"] == task]))
        if any(len({r["label"] for r in runs}) < 2 for runs in (tuning, reporting)):
            continue
        for name, said in FEATURES.items():
            row, holds = _row(name, tuning, reporting)
            rows.append([task, said, *row])
            if name in separates:
                separates[name].append(holds)
    checks = [Check("runs that fail later / healthy / failed early", "", "; ".join(counts), None)]
    checks += [every(f"tasks on which {FEATURES[name]} separates", holds) for name, holds in separates.items() if holds]
    head = (
        "task",
        "feature, steps 20 to 59",
        "median, healthy",
        "median, fails later",
        "AUROC [95 %]",
        "at one learning rate",
        "threshold of the tuning runs",
        "failing runs past it",
        "healthy runs past it",
    )
    note = (
        "All columns but the threshold are of the reporting seeds. AUROC: larger value, more failing, unless the "
        "tuning runs say otherwise (then the threshold has a <)."
    )
    return Outcome(checks, head, rows, note)


def _row(name: str, tuning: Sequence[Result], reporting: Sequence[Result]) -> tuple[list[Any], bool]:
    sign = 1.0 if auroc(*_scored(name, tuning, 1.0)) >= 0.5 else -1.0
    scores, labels = _scored(name, reporting, sign)
    clusters = [str(r["settings"]["seed"]) for r in reporting]
    low, high = auroc_interval(scores, labels, clusters)
    area, inside = auroc(scores, labels), _within_rates(name, reporting, sign)
    bar = _threshold(*_scored(name, tuning, sign))
    failing = [score > bar for score, fails in zip(scores, labels, strict=True) if fails]
    healthy = [score > bar for score, fails in zip(scores, labels, strict=True) if not fails]
    row = [
        *(median(sign * s for s, fails in zip(scores, labels, strict=True) if fails is kind) for kind in (False, True)),
        f"{area:.2f} [{low:.2f}, {high:.2f}]",
        inside,
        f"{'>' if sign > 0 else '<'} {sign * bar:.3g}",
        f"{sum(failing)} of {len(failing)}",
        f"{sum(healthy)} of {len(healthy)}",
    ]
    return row, low > 0.5 and inside is not None and inside > WITHIN_RATE


def _scored(name: str, runs: Sequence[Result], sign: float) -> tuple[list[float], list[bool]]:
    """The feature of each run, the lowest where it was not measured; and whether it fails later."""
    values = [run["features"][name] for run in runs]
    scores = [-math.inf if value is None else sign * value for value in values]
    lowest = min((score for score in scores if math.isfinite(score)), default=0.0)
    return [score if math.isfinite(score) else lowest for score in scores], [
        run["label"] == "fails later" for run in runs
    ]


def _within_rates(name: str, runs: Sequence[Result], sign: float) -> float | None:
    """Share of pairs of a failing and a healthy run of one learning rate that the feature puts right; None without."""
    right: list[float] = []
    for lr in {run["settings"]["lr"] for run in runs}:
        scores, labels = _scored(name, [run for run in runs if run["settings"]["lr"] == lr], sign)
        failing = [score for score, fails in zip(scores, labels, strict=True) if fails]
        healthy = [score for score, fails in zip(scores, labels, strict=True) if not fails]
        right += [1.0 if a > b else 0.5 if a == b else 0.0 for a in failing for b in healthy]
    return sum(right) / len(right) if right else None


def _threshold(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The score above which failing and healthy runs are told apart best, by the mean of both rates."""

    def balance(bar: float) -> float:
        past = [score > bar for score in scores]
        hits = sum(p for p, fails in zip(past, labels, strict=True) if fails) / sum(labels)
        misses = sum(p for p, fails in zip(past, labels, strict=True) if not fails) / (len(labels) - sum(labels))
        return hits - misses

    return max(sorted(set(scores)), key=balance)


def _count(task: str, runs: Sequence[Result]) -> str:
    def numbers(seeds: range) -> str:
        labels = [run["label"] for run in runs if run["settings"]["seed"] in seeds]
        return " / ".join(str(labels.count(kind)) for kind in ("fails later", "healthy", "failed early"))

    return f"{task}: tuning {numbers(TUNING)}, reporting {numbers(REPORTING)}"


PART = Part("calibration", "Margin and rho of small-batch AdamW runs that fail later", settings, train, conclude)
