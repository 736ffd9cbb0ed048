"""The paper's figures 2 to 5: means over seeds with a band of one standard deviation, one line per arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from dist_stability.experiments.paper.protocol import TWIN, Injection
from dist_stability.experiments.paper.traces import Trace
from dist_stability.report import plots
from dist_stability.report.plots import COLORS, FAINT, GRID, INK, REFUSED

_PALETTE = {
    "paper": "#8e6bbf",
    "paper-tuned": "#b3589a",
    "loss-rollback": "#d98b1f",
    "clip": "#0b7a75",
    "zclip": "#7f6000",
    "guarded-clean": "#9aa0a6",
    **COLORS,
}
_LATE = 8
"""The first 1/8 of a run is steep: it does not decide what part of the axis is shown."""

Arms = Mapping[str, Mapping[int, Trace]]
"""Runs by arm and seed."""


@dataclass(frozen=True)
class Band:
    """Mean and sample standard deviation over seeds, by batch; NaN where a value of a seed is no number."""

    mean: list[float]
    std: list[float]


def band(traces: Sequence[Trace], steps: int, values: Callable[[Trace], Sequence[float | None]]) -> Band:
    """One value per attempt of each run, as one per batch: where no attempt was made, the last one stands."""
    lines = [_by_batch(trace.batches, values(trace), steps) for trace in traces]
    columns = [list(column) for column in zip(*lines, strict=True)]
    whole = [all(map(math.isfinite, column)) for column in columns]
    return Band(
        [fmean(column) if fine else math.nan for column, fine in zip(columns, whole, strict=True)],
        [
            (stdev(column) if len(column) > 1 else 0.0) if fine else math.nan
            for column, fine in zip(columns, whole, strict=True)
        ],
    )


def probe_loss(arms: Arms, fault: Injection, steps: int, *, title: str, subtitle: str) -> Any:
    """Figures 2 and 5: probe loss of the standing state."""
    return _lines(arms, fault, steps, lambda t: t.probe, "probe loss (nats)", title, subtitle)


def parameter_norm(arms: Arms, fault: Injection, steps: int, *, title: str, subtitle: str) -> Any:
    """Figure 4: l2 norm of all parameters."""
    return _lines(arms, fault, steps, lambda t: t.norms, "l2 norm of the parameters", title, subtitle)


def innovation(arms: Arms, fault: Injection, steps: int, *, title: str, subtitle: str) -> Any:
    """Figure 3: innovation of each proposal with the bound it had to stay below, one panel for each arm."""
    figure, first = plots.canvas(title, subtitle)
    figure.set_size_inches(9.6, 3.0 + 2.6 * len(arms))
    panels = [first, *(figure.add_axes((0, 0, 1, 1), sharex=first) for _ in range(len(arms) - 1))]
    height = 0.74 / len(panels)
    for place, (axes, (arm, runs)) in enumerate(zip(panels, arms.items(), strict=True)):
        axes.set_position((0.09, 0.09 + (len(panels) - 1 - place) * (height + 0.03), 0.88, height - 0.03))
        _panel(axes, arm, list(runs.values()), fault, steps)
    panels[-1].set_xlabel("batch", color=FAINT)
    return figure


def _panel(axes: Any, arm: str, traces: Sequence[Trace], fault: Injection, steps: int) -> None:
    seen = band(traces, steps, lambda t: t.innovations)
    bound = band(traces, steps, lambda t: t.bounds)
    x = list(range(steps))
    axes.axhline(0, color=GRID, linewidth=1, zorder=1)
    axes.plot(x, bound.mean, color=REFUSED, linewidth=1.6, drawstyle="steps-mid", label="bound", zorder=2)
    _fill(axes, x, bound, REFUSED)
    axes.plot(x, seen.mean, color=_PALETTE[arm], linewidth=1.6, label="innovation", zorder=3)
    _fill(axes, x, seen, _PALETTE[arm])
    outside = [value for batch, value in enumerate(seen.mean) if batch in fault.attempts and math.isfinite(value)]
    late = [value for values in (seen.mean, bound.mean) for value in values[steps // _LATE :]]
    calm = [value for value in late if math.isfinite(value) and value not in outside]
    low, high = plots.innovation_range(calm, [], outside)
    axes.set_ylim(low, high)
    peak = max(outside, default=-math.inf)
    if peak > high:
        axes.text(
            max(fault.attempts) + 0.02 * steps, 0.9 * high, f"up to {peak:+.3g}", va="center", color=FAINT, size=9
        )
    plots.shade(axes, _windows(fault))
    _style(axes)
    axes.set_ylabel("nats", color=FAINT)
    axes.set_title(arm, loc="left", color=INK, size=11)
    axes.legend(loc="upper right", frameon=False, labelcolor=FAINT, ncols=2)


def _lines(
    arms: Arms,
    fault: Injection,
    steps: int,
    values: Callable[[Trace], Sequence[float | None]],
    label: str,
    title: str,
    subtitle: str,
) -> Any:
    figure, axes = plots.canvas(title, subtitle)
    axes.set_xlabel("batch")
    axes.set_ylabel(label)
    x = list(range(steps))
    shown: list[float] = []
    for arm, runs in arms.items():
        line, color = band(list(runs.values()), steps, values), _PALETTE[arm]
        if not any(map(math.isfinite, line.mean)):
            continue
        label = arm if math.isfinite(line.mean[-1]) else f"{arm} (lost)"
        if arm == TWIN:  # it lies on the guarded run: rings show both
            ring = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "markevery": max(1, steps // 24)}
            axes.plot(x, line.mean, color=color, linestyle="none", zorder=5, label=label, **ring)
        else:  # lines of rivals are dashed: they often lie on one of the others
            style: dict[str, Any] = (
                {"linewidth": 2.0} if arm in COLORS else {"linewidth": 1.5, "linestyle": (0, (4, 3))}
            )
            axes.plot(x, line.mean, color=color, zorder=3 if arm in COLORS else 4, label=label, **style)
            _fill(axes, x, line, color)
        shown += [v for v in line.mean[steps // _LATE :] if math.isfinite(v)]
        shown += [m + s for m, s in zip(line.mean, line.std, strict=True) if math.isfinite(m)][steps // _LATE :]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, 1.005 * steps)
    plots.shade(axes, _windows(fault))
    axes.set_position((0.08, 0.125, 0.74, 0.7))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, labelcolor=INK)
    return figure


def _by_batch(batches: Sequence[int], values: Sequence[float | None], steps: int) -> list[float]:
    found = {batch: math.nan if value is None else value for batch, value in zip(batches, values, strict=True)}
    line, last = [], math.nan
    for batch in range(steps):
        last = found.get(batch, last)
        line.append(last)
    return line


def _fill(axes: Any, x: Sequence[int], line: Band, color: str) -> None:
    low = [mean - std for mean, std in zip(line.mean, line.std, strict=True)]
    high = [mean + std for mean, std in zip(line.mean, line.std, strict=True)]
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0, zorder=1)


def _windows(fault: Injection) -> list[tuple[int, int]]:
    return [(start, start + length - 1) for start, length in fault.windows]


def _style(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelsize=9)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
