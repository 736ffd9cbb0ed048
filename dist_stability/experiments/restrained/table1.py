"""R6: the spread that rounding gives a trained network, against that of seeds (the paper's Table 1), on digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any

from dist_stability.diagnostics.perturbation import KScale
from dist_stability.diagnostics.twins import Twin, churn
from dist_stability.experiments.restrained.networks import small_digits
from dist_stability.experiments.restrained.parts import Check, Outcome, Part, Result, Settings, told, within
from dist_stability.experiments.restrained.twins import resnet_run

SEEDS = range(6)
SCALES = (1, 3, 5, 7, 9, 11)
EXAMPLES, BATCH, STEPS, MILESTONES = 400, 64, 200, (100, 150)
LR, CONTROL = 0.1, 0.001


def settings(quick: bool) -> list[Settings]:
    """One job for each row of the table, one with each learning rate."""
    seeds, steps = (range(1), 3) if quick else (SEEDS, STEPS)
    common = {"scales": list(SCALES), "examples": EXAMPLES, "batch": BATCH, "steps": steps, "drops": list(MILESTONES)}
    return [{"name": f"lr{lr:g}-s{seed}", "lr": lr, "seed": seed, **common} for lr in (LR, CONTROL) for seed in seeds]


def work(settings: Settings) -> Result:
    """One row: test accuracies in percent, and predictions that differ from those of k = 1, in percent."""
    build = resnet_run(
        lr=settings["lr"],
        batch=settings["batch"],
        examples=settings["examples"],
        momentum=0.9,
        milestones=tuple(settings["drops"]),
    )
    data = small_digits()
    labels = data.labels[settings["examples"] :]
    accuracies, churns, before = [], [], None
    for k in settings["scales"]:
        twin = Twin(build, settings["seed"], KScale(k))
        for step in range(settings["steps"]):
            twin.step(step)
        said = twin.predictions()
        assert said is not None
        accuracies.append(100.0 * float((said == labels).double().mean()))
        different = churn(twin, before, said)
        before = said if before is None else before
        churns += [] if different is None else [100.0 * different]
    return {"accuracies": accuracies, "churn": churns}


def conclude(results: Sequence[Result]) -> Outcome:
    """The two spreads as the paper has them: population standard deviations along rows and columns."""
    rows, found = [], {}
    for lr in (LR, CONTROL):
        lines = [result for result in results if result["settings"]["lr"] == lr]
        if not lines:
            continue
        found[lr] = _spreads(lines)
        for line in lines:
            rows.append([f"{lr:g}, seed {line['settings']['seed']}", *line["accuracies"], pstdev(line["accuracies"])])
        if len(lines) > 1:
            columns = zip(*(line["accuracies"] for line in lines), strict=True)
            rows.append([f"{lr:g}, std over seeds", *map(pstdev, columns), found[lr]["perturbation"]])
    checks: list[Check] = []
    if LR in found:
        one = found[LR]
        checks.append(within("std over k / std over seeds (std .404 / .664 in the pilot)", [one["ratio"]], 0.3, 1.5))
        n = len(small_digits()) - EXAMPLES
        accuracy = fmean(value for row in results if row["settings"]["lr"] == LR for value in row["accuracies"]) / 100
        noise = 100 * math.sqrt(accuracy * (1 - accuracy) / n)
        checks.append(told("churn at lr 0.1, percent", one["churn"], "pilot: .7 to 4.2"))
        checks.append(told("std of a test set of this size, points", [noise], "the spread's own size"))
    if CONTROL in found:
        one = found[CONTROL]
        checks.append(within("control, lr 0.001: std over k, points", one["rows"], high=0.02))
        checks.append(within("control: mean churn, percent", [fmean(one["churn"])], high=0.05))
    head = ("learning rate", *(f"k = {k}" for k in SCALES), "std over k")
    note = (
        "Test accuracy in percent, 1,397 images. The paper's own table is ResNet-56 on CIFAR-10; its printed values "
        "were not at hand."
    )
    return Outcome(checks, head, rows, note)


def _spreads(lines: Sequence[Result]) -> dict[str, Any]:
    rows = [pstdev(line["accuracies"]) for line in lines]
    columns = [pstdev(column) for column in zip(*(line["accuracies"] for line in lines), strict=True)]
    seeds = fmean(columns)
    return {
        "rows": rows,
        "perturbation": fmean(rows),
        "ratio": fmean(rows) / seeds if seeds else math.nan,
        "churn": [value for line in lines for value in line["churn"]],
    }


PART = Part("R6", "Spread over rounding and over seeds (analogue of Table 1 on digits)", settings, work, conclude)
