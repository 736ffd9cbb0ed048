"""R8: full-batch training sits at the edge of stability, and the cheap margin and rho see it (MLP on 500 digits)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dist_stability.diagnostics.sharpness import Sharpness
from dist_stability.experiments.restrained.networks import small_digits
from dist_stability.experiments.restrained.parts import Outcome, Part, Result, Settings, told, within
from dist_stability.experiments.restrained.watched import watch

SEEDS = range(5)
KINDS = {"gd-0.2": ("sgd", 0.2), "gd-0.4": ("sgd", 0.4), "adam-0.0003": ("adam", 3e-4), "adam-0.001": ("adam", 1e-3)}
STEPS, CHECKED, LATE = 1500, 250, 750
"""Exact margins every 250 steps. Gradient descent counts as settled, and Adam as late, from half of the run on."""

MARGIN_EVERY, RHO_EVERY = 25, 10
EXAMPLES, BETA2 = 500, 0.99


def settings(quick: bool) -> list[Settings]:
    """One job for each seed and kind."""
    seeds, steps = (range(1), 20) if quick else (SEEDS, STEPS)
    common = {"steps": steps, "checked": 10 if quick else CHECKED, "margin_every": MARGIN_EVERY}
    return [{"name": f"{kind}-s{seed}", "kind": kind, "seed": seed, **common} for kind in KINDS for seed in seeds]


def work(settings: Settings) -> Result:
    """One run."""
    torch.manual_seed(settings["seed"])
    sizes = (64, 48, 48, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    kind, lr = KINDS[settings["kind"]]
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, BETA2))
    batch = small_digits().batch(torch.arange(EXAMPLES))
    exact: dict[int, float] = {}
    whole = Sharpness(model, optimizer, square_loss, [batch], exact=True)

    def after_step(step: int) -> None:
        if (step + 1) % settings["checked"] == 0:
            exact[step + 1] = whole.converge().margin or 0.0

    trace = watch(
        model,
        optimizer,
        square_loss,
        lambda _: batch,
        settings["steps"],
        [batch],
        margin_every=settings["margin_every"],
        rho_every=RHO_EVERY,
        after_step=after_step,
    )
    # The last cheap one before each exact one: by up to `margin_every` steps older.
    warm = {at: [value for step, value in trace.margins.items() if step < at][-1] for at in exact}
    return {
        "exact": list(exact.items()),
        "warm": list(warm.items()),
        "margins": list(trace.margins.items()),
        "rhos": list(trace.rhos.items()),
        "last_loss": trace.losses[-1],
    }


def square_loss(model: nn.Module, batch: Any) -> Tensor:
    """Half the squared distance to the one-hot label, mean over examples, as in the literature on the edge."""
    inputs, labels = batch
    wanted = nn.functional.one_hot(labels, 10).to(inputs.dtype)
    return 0.5 * (model(inputs) - wanted).square().sum(1).mean()  # type: ignore[no-any-return]


def conclude(results: Sequence[Result]) -> Outcome:
    """Margins and ratios, late in the runs."""
    checks, rows = [], []
    for kind, (optimizer, _) in KINDS.items():
        found = [result for result in results if result["settings"]["kind"] == kind]
        if not found:
            continue
        exact = [value for result in found for step, value in result["exact"] if step >= LATE]
        ratios = [
            cheap / true
            for result in found
            for (step, true), (_, cheap) in zip(result["exact"], result["warm"], strict=True)
            if step >= LATE
        ]
        late = [[value for step, value in result["rhos"] if step >= LATE] for result in found]
        rhos = [median(values) for values in late if values]
        low, high = (0.95, 1.2) if optimizer == "sgd" else (0.75, 1.15)
        checks.append(within(f"{kind}: exact margin", exact, low, high))
        checks.append(within(f"{kind}: warm-started margin over the exact one", ratios, 0.8, 1.2))
        if optimizer == "sgd":
            checks.append(within(f"{kind}: median rho", rhos, 1.9, 2.1))
        else:
            checks.append(told(f"{kind}: median rho", rhos, "below 2"))
        steps = sorted({step for result in found for step, _ in result["exact"]})
        rows.append([kind, *(median(dict(map(tuple, r["exact"]))[s] for r in found) for s in steps)])
    head = ("run", *(f"step {step}" for step in range(CHECKED, STEPS + 1, CHECKED)))
    note = (
        f"Exact margins, medians over seeds. Bands hold from step {LATE} on; the warm-started margin "
        f"takes one product every {MARGIN_EVERY} steps."
    )
    return Outcome(checks, head, [row for row in rows if len(row) == len(head)], note)


PART = Part("R8", "Edge of stability, full batch (on digits)", settings, work, conclude)
