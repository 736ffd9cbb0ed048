"""Table 3 from the runs of its arms: counts, Fisher's tests, spectra in the end, and what a step costs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dist_stability.experiments.spectral.arms import ARMS, BASELINE, COMPARISONS
from dist_stability.experiments.spectral.pages import Section
from dist_stability.experiments.spectral.statistics import fisher

Result = Mapping[str, Any]

COUNTS = ("diverged", "task_diverged", "by_loss", "learned", "stopped")
PAPER_RUNS = 24


def summarized(results: Mapping[str, Sequence[Result]], costs: Mapping[str, float]) -> dict[str, Any]:
    """From the results of each arm and its cost: "arms" by name, and "comparisons" of those pairs that have runs."""
    arms = {name: _counted(ARMS[name].paper, each) for name, each in results.items() if each}
    for name, found in arms.items():
        base = arms.get(BASELINE, {})
        found["fisher"] = _fisher(found, base) if base else None
        found["cost"] = costs.get(name)
    return {
        "arms": arms,
        "comparisons": [
            {
                "arm": first,
                "against": second,
                "diverged": [arms[name]["diverged"] for name in (first, second)],
                "runs": [arms[name]["runs"] for name in (first, second)],
                "fisher": _fisher(arms[first], arms[second]),
            }
            for first, second in COMPARISONS
            if first in arms and second in arms
        ],
    }


def sections(found: Mapping[str, Any]) -> list[Section]:
    """What :func:`summarized` found, as tables."""
    arms: Mapping[str, dict[str, Any]] = found["arms"]
    lrs = sorted({lr for each in arms.values() for lr in each["by_lr"]}, key=float)
    counts = [
        [
            name,
            each["runs"],
            each["diverged"],
            each["diverged"] / each["runs"],
            each["fisher"],
            *(each[count] for count in COUNTS[1:]),
            *(each["by_lr"].get(lr) for lr in lrs),
            each["median_step"],
            None if each["paper_of_24"] is None else each["paper_of_24"] / PAPER_RUNS,
        ]
        for name, each in arms.items()
    ]
    spectra = [
        [
            name,
            each["survivors"],
            *(each["spectra"].get(fit, {}).get(number) for fit in ("leading", "all") for number in _NUMBERS),
            each["cost"],
            each["refused"],
            ", ".join(f"{rung} {count}" for rung, count in sorted(each["refusals"].items())),
        ]
        for name, each in arms.items()
    ]
    pairs = [
        [
            row["arm"],
            row["against"],
            *(f"{n} of {m}" for n, m in zip(row["diverged"], row["runs"], strict=True)),
            row["fisher"],
        ]
        for row in found["comparisons"]
    ]
    return [
        (
            "Table 3",
            "No normalization. Diverged: loss above 50, norm of the gradient of what is minimised above 500, or not "
            "finite, at any attempted step. By the task: the same with the gradient of the task alone. By loss: the "
            "loss went over its limit. Stopped: the controller gave up. p is of Fisher's exact two-sided test against "
            f'"{BASELINE}", not corrected.',
            (
                *("arm", "runs", "diverged", "share", "Fisher p", "by the task", "by loss", "learned", "stopped"),
                *(f"LR {lr}" for lr in lrs),
                *("median step of diverging", "paper's share"),
            ),
            counts,
        ),
        (
            "Spectra of the runs that came to their end, and what it costs",
            "Means over these runs, over blocks, at the end; leading: in the 32 leading directions of the input. Cost: "
            f'CPU time of a step at this size, as a ratio to "{BASELINE}" measured in turn. Refused: '
            "steps a run that the controller did not take whole, and what it did about them in all runs.",
            ("arm", "runs", "M>1, leading", "rho, leading", "M>1, all", "rho, all", "cost", "refused a run", "rungs"),
            spectra,
        ),
        (
            "Arms against each other",
            "Diverged runs, and p of Fisher's exact two-sided test, not corrected.",
            ("arm", "against", "diverged", "against: diverged", "Fisher p"),
            pairs,
        ),
    ]


_NUMBERS = ("unstable", "radius")


def _counted(paper: int | None, results: Sequence[Result]) -> dict[str, Any]:
    steps = [result["step"] for result in results if result["step"] is not None]
    ended = [result["spectra"] for result in results if result["spectra"] is not None]
    refusals = Counter[str]()
    by_lr = Counter[str]()
    for result in results:
        refusals.update(result["refusals"])
        by_lr[f"{result['settings']['lr']:g}"] += result["diverged"]
    return {
        "runs": len(results),
        **{name: sum(result[name] for result in results) for name in COUNTS},
        "by_lr": dict(by_lr),
        "median_step": statistics.median(steps) if steps else None,
        "paper_of_24": paper,
        "survivors": len(ended),
        "spectra": {
            fit: {number: statistics.fmean(each[fit][number] for each in ended) for number in _NUMBERS}
            for fit in (ended[0] if ended else ())
        },
        "refused": sum(refusals.values()) / len(results),
        "refusals": dict(refusals),
    }


def _fisher(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    return fisher((first["diverged"], first["runs"]), (second["diverged"], second["runs"]))
