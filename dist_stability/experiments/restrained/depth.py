"""R7: deeper networks are more sensitive to rounding. Growth of a twin difference against depth, on digits."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from dist_stability.diagnostics.perturbation import KScale
from dist_stability.diagnostics.sensitivity import sensitivity
from dist_stability.experiments.restrained.networks import small_digits
from dist_stability.experiments.restrained.parts import Outcome, Part, Result, Settings, by_seed, every, within
from dist_stability.experiments.restrained.twins import resnet_run, summary

SEEDS = range(5)
DEPTHS, LR, BATCH, STEPS = (8, 14, 20, 32), 0.1, 128, 80
NOTES = {8: 0.023, 14: 0.086, 20: 0.285, 32: 0.749}
"""Growth per step, of one seed, from the pilot."""


def settings(quick: bool) -> list[Settings]:
    """One job for each seed and depth."""
    seeds, steps = (range(1), 3) if quick else (SEEDS, STEPS)
    common = {"lr": LR, "batch": BATCH, "steps": steps}
    return [{"name": f"s{seed}-d{depth}", "seed": seed, "depth": depth, **common} for seed in seeds for depth in DEPTHS]


def work(settings: Settings) -> Result:
    """One twin pair, k = 1 and 3."""
    build = resnet_run(
        lr=settings["lr"], batch=settings["batch"], examples=len(small_digits()), depth=settings["depth"]
    )
    return summary(sensitivity(build, KScale(3), settings["steps"], seed=settings["seed"], gate_steps=0))


def conclude(results: Sequence[Result]) -> Outcome:
    """Order and ratio of the rates in every seed."""
    twins = by_seed(results, "depth")
    rates = {depth: [row[depth]["growth"]["rate"] for row in twins.values() if depth in row] for depth in DEPTHS}
    lines = [[row[d]["growth"]["rate"] for d in DEPTHS] for row in twins.values() if set(row) == set(DEPTHS)]
    checks = [
        every("seeds whose rates rise strictly with depth", [line == sorted(set(line)) for line in lines]),
        within("rate at depth 32 over depth 8", [line[-1] / line[0] for line in lines], low=10.0),
    ]
    rows = [[depth, NOTES[depth], median(found), min(found), max(found)] for depth, found in rates.items() if found]
    head = ("depth", "notes, one seed", "median rate", "smallest", "largest")
    return Outcome(checks, head, rows, "Growth of ln(relative l2) per step, up to a distance of 1e-2.")


PART = Part("R7", "Growth against depth (on digits)", settings, work, conclude)
