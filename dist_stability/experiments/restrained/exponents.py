"""R4: Lyapunov exponents of the one-layer network: by the map's derivative, and by the product's ``lyapunov``."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from dist_stability.diagnostics.lyapunov import lyapunov
from dist_stability.experiments.restrained.one_layer import exponent, number_run
from dist_stability.experiments.restrained.parts import Check, Outcome, Part, Result, Settings, every, spread

EXPONENTS = {
    0.01: -0.97,
    0.03: -0.15,
    0.035: -0.42,
    0.04: -1.37,
    0.045: -1.97,
    0.05: 0.39,
    0.06: -0.10,
    0.07: 0.80,
    0.08: 0.75,
    0.09: 0.66,
}
"""From the notes, per step."""

SEEDS = range(5)
BAND = 0.05
STEPS, MAP_STEPS = {0.01: 80, 0.03: 300, 0.035: 300, 0.04: 300, 0.045: 300}, 20_000
CHAOTIC_STEPS = 1500
"""At the other learning rates. A fifth of the steps does not count."""


def settings(quick: bool) -> list[Settings]:
    """One job for each learning rate, all seeds."""
    seeds = list(SEEDS)[:1] if quick else list(SEEDS)
    rates = list(EXPONENTS)[:2] if quick else EXPONENTS
    return [
        {"name": f"lr{lr:g}", "lr": lr, "seeds": seeds, "steps": STEPS.get(lr, CHAOTIC_STEPS), "map_steps": MAP_STEPS}
        for lr in rates
    ]


def work(settings: Settings) -> Result:
    """Both exponents of each seed, which says where m starts."""
    lr, steps = settings["lr"], settings["steps"]
    build = number_run(lr)
    return {
        "map": [exponent(1.0 + 0.1 * seed, lr, settings["map_steps"]) for seed in settings["seeds"]],
        "lyapunov": [lyapunov(build, steps, skip=steps // 5, seed=seed).per_step for seed in settings["seeds"]],
    }


def conclude(results: Sequence[Result]) -> Outcome:
    """Both within the band, signs right."""
    checks, rows, signs = [], [], []
    for result in sorted(results, key=lambda each: each["settings"]["lr"]):
        lr = result["settings"]["lr"]
        expected = EXPONENTS[lr]
        both = [*result["map"], *result["lyapunov"]]
        near = all(abs(value - expected) <= BAND for value in both)
        checks.append(Check(f"exponents at {lr:g}", f"{expected:g} +- {BAND:g}", spread(both), near))
        signs += [(value > 0.0) == (expected > 0.0) for value in both]
        rows.append([lr, expected, median(result["map"]), median(result["lyapunov"]), spread(result["lyapunov"])])
    checks.append(every("signs", signs))
    head = ("learning rate", "notes", "map's derivative", "lyapunov()", "over starts")
    return Outcome(checks, head, rows, "Per step. Medians over five starts.")


PART = Part("R4", "One-layer network: Lyapunov exponents (Figure 4, right)", settings, work, conclude)
