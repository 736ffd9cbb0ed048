"""R5: twins that differ in rounding alone, at several learning rates (the paper's Figure 2, right), on digits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from dist_stability.diagnostics.perturbation import KScale
from dist_stability.diagnostics.sensitivity import sensitivity
from dist_stability.experiments.restrained.networks import small_digits
from dist_stability.experiments.restrained.parts import Outcome, Part, Result, Settings, by_seed, every, within
from dist_stability.experiments.restrained.twins import resnet_run, summary

SEEDS = range(5)
LR, DIVISORS, SCALED, BATCH = 0.1, (1, 2, 4, 8), 60, 128
NOTES = {1: 6.6e-2, 2: 3.3e-2, 4: 1.5e-4, 8: 3.8e-5}
"""Relative l1 at the end, of one seed, from the pilot."""


def settings(quick: bool) -> list[Settings]:
    """One job for each seed and divisor, and for each seed one with k = 2."""
    seeds, scaled = (range(1), 3) if quick else (SEEDS, SCALED)
    kinds = [*((n, 3) for n in DIVISORS), (1, 2)]
    common = {"lr": LR, "scaled": scaled, "batch": BATCH, "depth": 20}
    return [{"name": f"s{s}-n{n}-k{k}", "seed": s, "divisor": n, "k": k, **common} for s in seeds for n, k in kinds]


def work(settings: Settings) -> Result:
    """One twin pair; k = 2 must stay equal to the bit, and k = 3 at the whole rate passes the gate first."""
    n, k = settings["divisor"], settings["k"]
    build = resnet_run(lr=settings["lr"] / n, batch=settings["batch"], examples=len(small_digits()))
    gate = 20 if n == 1 and k == 3 else 0
    found = sensitivity(build, KScale(k), settings["scaled"] * n, seed=settings["seed"], gate_steps=gate)
    return summary(found, every=n)


def conclude(results: Sequence[Result]) -> Outcome:
    """Ratio and order of growth in every seed; k = 2 exactly zero."""
    twins = by_seed([result for result in results if result["settings"]["k"] == 3], "divisor")
    equal = [result["largest_l1"] for result in results if result["settings"]["k"] == 2]
    whole = [row for row in twins.values() if set(row) == set(DIVISORS)]
    ends = {n: [row[n]["relative_l1"][-1] for row in twins.values() if n in row] for n in DIVISORS}
    rates = {n: [row[n]["growth"]["rate"] for row in twins.values() if n in row] for n in DIVISORS}
    falling = [all(a > b for a, b in pairwise(row[n]["growth"]["rate"] for n in DIVISORS)) for row in whole]
    checks = [
        within("k = 2: largest distance", equal, 0.0, 0.0),
        within(
            "distance at n = 1 over n = 8",
            [row[1]["relative_l1"][-1] / row[8]["relative_l1"][-1] for row in whole],
            low=100.0,
        ),
        every("seeds whose growth per step falls strictly with n", falling),
    ]
    rows = [
        [f"{LR / n:g}", NOTES[n], median(ends[n]), min(ends[n]), max(ends[n]), median(rates[n]), _verdicts(twins, n)]
        for n in DIVISORS
        if ends[n]
    ]
    head = ("learning rate", "notes, one seed", "median l1", "smallest", "largest", "growth per step", "verdicts")
    return Outcome(checks, head, rows, "Relative l1 distance of all weights after 60 scaled iterations, k = 1 and 3.")


def _verdicts(twins: dict[int, dict[int, Result]], n: int) -> str:
    said = [row[n]["verdict"] for row in twins.values() if n in row]
    return ", ".join(f"{kind} {said.count(kind)}" for kind in sorted(set(said)))


PART = Part("R5", "Twin difference over scaled iterations (analogue of Figure 2 on digits)", settings, work, conclude)
