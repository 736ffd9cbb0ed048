"""The figures; each names its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from dist_stability.experiments.restrained import depth, edge_of_stability, exponents, overdriven, step_sizes, table1
from dist_stability.experiments.restrained.one_layer import exponent
from dist_stability.experiments.restrained.parts import Result, by_seed
from dist_stability.report import plots
from dist_stability.report.plots import FAINT, INK, OTHERS, REFUSED


def draw(part: str, results: Sequence[Result]) -> list[tuple[str, Any]]:
    """Name of the file and figure, of each figure of a part."""
    return [(file, function(results)) for file, function in DRAWN.get(part, [])]


def twin_difference(results: Sequence[Result]) -> Any:
    """R5: relative l1 distance over scaled iterations, median and range over seeds."""
    twins = by_seed([result for result in results if result["settings"]["k"] == 3], "divisor")
    figure, axes = plots.canvas(
        "Twins that differ in rounding alone part at large learning rates",
        f"Analogue of the paper's Figure 2 on digits: ResNet-20, Swish, median and range over {len(twins)} seeds",
    )
    for color, n in zip(OTHERS, step_sizes.DIVISORS, strict=False):
        lines = [row[n]["relative_l1"] for row in twins.values() if n in row]
        columns = [sorted(column) for column in zip(*lines, strict=False)]
        x = range(1, len(columns) + 1)
        axes.plot(x, [median(column) for column in columns], color=color, label=f"{step_sizes.LR / n:g}")
        axes.fill_between(x, [c[0] for c in columns], [c[-1] for c in columns], color=color, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("scaled iteration: steps at learning rate 0.1 of equal length")
    axes.set_ylabel("relative l1 distance of all weights")
    axes.legend(title="learning rate", frameon=False, labelcolor=INK, loc="upper left", ncols=4)
    return figure


def orbits(results: Sequence[Result]) -> Any:
    """R3: where the one-layer network goes at each learning rate; from the map, not from the results."""
    figure, axes = plots.canvas(
        "The one-layer network, over-driven: it stays bounded up to three times its limit",
        "The map's last 100 of 600 values; classical limit 0.0323 and blow-up 0.1 dashed",
    )
    rates = [0.01 + 0.0005 * place for place in range(180)]
    points = [(lr, m) for lr in rates for m in overdriven.orbit(1.0, lr, 600)[-100:]]
    axes.scatter([lr for lr, _ in points], [m for _, m in points], s=0.4, color=OTHERS[0], linewidths=0)
    _limits(axes)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("m")
    return figure


def exponents_of_the_map(results: Sequence[Result]) -> Any:
    """R4: the map's exponents on a fine grid, and what ``lyapunov`` measured."""
    figure, axes = plots.canvas(
        "Restrained: an exponent above 0, and no blow-up",
        "Analogue of the paper's Figure 4, right: the map's derivative (line), lyapunov() from five starts (dots)",
    )
    rates = [0.01 + 0.0005 * place for place in range(179)]
    axes.plot(rates, [max(exponent(1.0, lr, 2000), -2.5) for lr in rates], color=FAINT, linewidth=1.2)
    for result in results:
        found = result["lyapunov"]
        axes.scatter([result["settings"]["lr"]] * len(found), found, color=OTHERS[1], s=18, zorder=3)
    axes.scatter(list(exponents.EXPONENTS), list(exponents.EXPONENTS.values()), marker="x", color=INK, s=30, zorder=4)
    axes.axhline(0.0, color=INK, linewidth=0.8)
    _limits(axes)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("exponent per step (x: the notes)")
    return figure


def growth(results: Sequence[Result]) -> Any:
    """R7: growth per step against depth."""
    figure, axes = plots.canvas(
        "Deeper networks grow rounding faster", "On digits: ResNet with Swish, learning rate 0.1, a dot for each seed"
    )
    twins = by_seed(results, "depth")
    for color, (seed, row) in zip(OTHERS, twins.items(), strict=False):
        axes.plot(list(row), [each["growth"]["rate"] for each in row.values()], "o-", color=color, label=f"seed {seed}")
    axes.plot(list(depth.NOTES), list(depth.NOTES.values()), "x", color=INK, label="notes, another seed")
    axes.set_yscale("log")
    axes.set_xlabel("depth")
    axes.set_ylabel("growth of ln(distance) per step")
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def margins(results: Sequence[Result]) -> Any:
    """R8: margins over training."""
    figure, axes = plots.canvas(
        "Full-batch training sits at the edge of stability",
        "MLP on 500 digits, seed 0: margin by one product every 25 steps (lines), by exact double backward (rings)",
    )
    for color, kind in zip(OTHERS, edge_of_stability.KINDS, strict=False):
        for result in results:
            if result["settings"]["kind"] == kind and result["settings"]["seed"] == 0:
                axes.plot(*zip(*result["margins"], strict=True), color=color, label=kind)
                if result["exact"]:
                    ring = {"marker": "o", "markerfacecolor": "white", "linestyle": "none"}
                    axes.plot(*zip(*result["exact"], strict=True), color=color, **ring)
    axes.axhline(1.0, color=REFUSED, linewidth=1.0, linestyle="--")
    axes.set_ylim(0.0, 1.6)
    axes.set_xlabel("step")
    axes.set_ylabel("margin (1: the edge)")
    axes.legend(frameon=False, labelcolor=INK, ncols=4, loc="upper right")
    return figure


def accuracies(results: Sequence[Result]) -> Any:
    """R6: one column of dots for each seed, one dot for each k."""
    figure, axes = plots.canvas(
        "Rounding moves the accuracy about as much as the seed does",
        "Analogue of the paper's Table 1 on digits: ResNet-20, 1,397 test images, a dot for each k",
    )
    for color, lr in zip(OTHERS, (table1.LR, table1.CONTROL), strict=False):
        rows = sorted((r for r in results if r["settings"]["lr"] == lr), key=lambda row: row["settings"]["seed"])
        points = [(row["settings"]["seed"], value) for row in rows for value in row["accuracies"]]
        if points:
            axes.scatter(*zip(*points, strict=True), color=color, s=18, label=f"learning rate {lr:g}")
    axes.set_xlabel("seed")
    axes.set_ylabel("test accuracy, percent")
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def _limits(axes: Any) -> None:
    for place in (0.0323, 0.1):
        axes.axvline(place, color=REFUSED, linewidth=1.0, linestyle="--")


DRAWN: dict[str, list[tuple[str, Callable[[Sequence[Result]], Any]]]] = {
    "R3": [("one_layer_orbits.png", orbits)],
    "R4": [("one_layer_exponents.png", exponents_of_the_map)],
    "R5": [("twin_difference.png", twin_difference)],
    "R6": [("accuracies.png", accuracies)],
    "R7": [("growth_by_depth.png", growth)],
    "R8": [("margins.png", margins)],
}
