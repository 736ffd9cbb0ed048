"""The calibration table: do margin and rho tell which small-batch AdamW runs will fail? Three tasks, seeds kept apart.

Thresholds are chosen on the tuning seeds; everything that is told is measured on the reporting seeds. Larger is to mean
more failing, for that is how the monitor reads its numbers. A feature *separates* if on every task with
:data:`ENOUGH` failing runs, of which there must be two, the interval of its AUROC lies above 1/2, and its AUROC among
runs of one learning rate is above :data:`WITHIN_RATE`: else it only repeats what the learning rate says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from dist_stability.experiments.restrained.parts import Check, Outcome, Part, Result, Settings
from dist_stability.experiments.restrained.small_batch import FEATURES, STEPS, TASKS, train
from dist_stability.experiments.spectral.statistics import auroc, auroc_interval

TUNING, REPORTING = range(1000, 1003), range(5)
WITHIN_RATE, ENOUGH, TASKS_NEEDED = 0.6, 5, 2
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
            if name in separates and sum(r["label"] == "fails later" for r in reporting) >= ENOUGH:
                separates[name].append(holds)
    checks = [Check("runs that fail later / healthy / failed early", "", "; ".join(counts), None)]
    for name, judged in separates.items():
        counted = f"{sum(judged)} of {len(judged)} judged"
        what, band = f"tasks on which {FEATURES[name]} separates", f"all, and at least {TASKS_NEEDED}"
        checks.append(Check(what, band, counted, len(judged) >= TASKS_NEEDED and all(judged)))
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
        "All columns but the threshold are of the reporting seeds. At one learning rate: pairs of a failing and a "
        f"healthy run that the feature puts right. Tasks with fewer than {ENOUGH} failing runs are not judged."
    )
    return Outcome(checks, head, rows, note)


def _row(name: str, tuning: Sequence[Result], reporting: Sequence[Result]) -> tuple[list[Any], bool]:
    scores, labels = _scored(name, reporting)
    clusters = [str(r["settings"]["seed"]) for r in reporting]
    low, high = auroc_interval(scores, labels, clusters)
    area, (right, pairs) = auroc(scores, labels), _within_rates(name, reporting)
    bar = _threshold(*_scored(name, tuning))
    failing = [score > bar for score, fails in zip(scores, labels, strict=True) if fails]
    healthy = [score > bar for score, fails in zip(scores, labels, strict=True) if not fails]
    row = [
        *(median(s for s, fails in zip(scores, labels, strict=True) if fails is kind) for kind in (False, True)),
        f"{area:.2f} [{low:.2f}, {high:.2f}]",
        f"{right:g} of {pairs}",
        bar,
        f"{sum(failing)} of {len(failing)}",
        f"{sum(healthy)} of {len(healthy)}",
    ]
    return row, low > 0.5 and right > WITHIN_RATE * pairs


def _scored(name: str, runs: Sequence[Result]) -> tuple[list[float], list[bool]]:
    """The feature of each run, the lowest where it was not measured; and whether it fails later."""
    values = [run["features"][name] for run in runs]
    scores = [-math.inf if value is None else value for value in values]
    lowest = min((score for score in scores if math.isfinite(score)), default=0.0)
    return [score if math.isfinite(score) else lowest for score in scores], [
        run["label"] == "fails later" for run in runs
    ]


def _within_rates(name: str, runs: Sequence[Result]) -> tuple[float, int]:
    """Pairs of a failing and a healthy run of one learning rate that the feature puts right, and all of them."""
    right: list[float] = []
    for lr in {run["settings"]["lr"] for run in runs}:
        scores, labels = _scored(name, [run for run in runs if run["settings"]["lr"] == lr])
        failing = [score for score, fails in zip(scores, labels, strict=True) if fails]
        healthy = [score for score, fails in zip(scores, labels, strict=True) if not fails]
        right += [1.0 if a > b else 0.5 if a == b else 0.0 for a in failing for b in healthy]
    return sum(right), len(right)


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
