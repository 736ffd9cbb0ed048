"""Figures. matplotlib is imported when the first one is drawn, without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_stability.report.extras import import_extra
from dist_stability.report.runs import REFUSALS, RunRecord

INK, FAINT, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = {"clean": "#6b7280", "baseline": "#d1495b", "guarded": "#1d6fb8", "twin": "#1b9e77"}
OTHERS = ("#1d6fb8", "#d1495b", "#1b9e77", "#8e6bbf", "#d98b1f", "#6b7280")
REFUSED = "#e07b00"
WINDOW = "#f6d9a8"


def probe_loss(
    runs: Sequence[RunRecord], *, title: str, subtitle: str = "", labels: Mapping[str, str] | None = None
) -> Any:
    """Probe loss of the state over batches, one line per run; fault windows shaded, refused proposals marked.

    Args:
        runs: One line each, drawn in this order.
        title: First line; names the data.
        subtitle: Second line, smaller.
        labels: By run name, what is written at the end of a line.

    Returns:
        A matplotlib figure.
    """
    figure, axes = canvas(title, subtitle)
    axes.set_xlabel("batch")
    axes.set_ylabel("probe loss (nats)")
    ends: list[tuple[float, str, str]] = []
    last = 0
    for number, run in enumerate(runs):
        color = COLORS.get(run.name, OTHERS[number % len(OTHERS)])
        x, y = run.state_probe()
        if not x:
            continue
        label = (labels or {}).get(run.name, run.name)
        if run.name == "twin":
            # It lies on the guarded run: rings show both.
            ring = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "markevery": max(1, len(x) // 24)}
            axes.plot(x, y, color=color, linestyle="none", zorder=5, label=label, **ring)
        else:
            axes.plot(x, y, color=color, linewidth=2.0, zorder=3)
            ends.append((y[-1], label, color))
        last = max(last, x[-1])
        _mark_refusals(axes, run)
    shade(axes, [window for run in runs for window in run.fault_windows()])
    _frame_interesting(axes, runs)
    axes.set_xlim(0, 1.005 * max(last, 1))
    _label_ends(figure, axes, last, ends)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(loc="upper right", frameon=False, labelcolor=FAINT)
    return figure


def innovation(run: RunRecord, *, title: str, subtitle: str = "") -> Any:
    """Innovation of each proposal against the bound it had to stay below."""
    figure, axes = canvas(title, subtitle)
    axes.set_xlabel("batch")
    axes.set_ylabel("probe minus prediction (nats)")
    bound = run.series("bound")
    refused = [event for event in run.refusals if _finite(event["innovation"])]
    accepted = [e for e in run.events if e["action"] not in REFUSALS and _finite(e["innovation"])]
    axes.axhline(0, color=GRID, linewidth=1, zorder=1)
    axes.plot(*bound, color=REFUSED, linewidth=1.6, drawstyle="steps-mid", label="bound", zorder=2)
    axes.scatter(
        [run.batch(e) for e in accepted],
        [e["innovation"] for e in accepted],
        s=9,
        color=COLORS["guarded"],
        linewidths=0,
        label="accepted",
        zorder=3,
    )
    low, high = innovation_range([e["innovation"] for e in accepted], bound[1], [e["innovation"] for e in refused])
    for event in refused:  # what lies outside is drawn at the edge
        place = min(max(event["innovation"], 0.95 * low), 0.95 * high)
        axes.scatter(run.batch(event), place, marker="x", s=34, color=COLORS["baseline"], zorder=4)
    if refused:
        axes.scatter([], [], marker="x", s=34, color=COLORS["baseline"], label=f"refused ({len(refused)})")
    outside = [event["innovation"] for event in refused if event["innovation"] > high]
    if outside:
        axes.text(
            run.batch(refused[-1]) + 3, 0.95 * high, f"up to {max(outside):+.3g}", va="center", color=FAINT, size=9
        )
    axes.set_ylim(low, high)
    shade(axes, run.fault_windows())
    axes.legend(loc="upper right", frameon=False, labelcolor=FAINT, ncols=3)
    return figure


def gradient_norm(run: RunRecord, *, title: str, subtitle: str = "") -> Any:
    """Global gradient norm before the step, on a logarithmic axis."""
    figure, axes = canvas(title, subtitle)
    axes.set_xlabel("batch")
    axes.set_ylabel("global gradient norm")
    x, y = run.series("gradient_norm")
    axes.plot(x, y, color=COLORS["guarded"], linewidth=1.4, zorder=2)
    refused = [event for event in run.refusals if _finite(event.get("gradient_norm"))]
    axes.scatter(
        [run.batch(event) for event in refused],
        [event["gradient_norm"] for event in refused],
        marker="x",
        s=34,
        color=COLORS["baseline"],
        label=f"refused ({len(refused)})",
        zorder=3,
    )
    if y and min(y) > 0:
        axes.set_yscale("log")
    shade(axes, run.fault_windows())
    if refused:
        axes.legend(loc="upper right", frameon=False, labelcolor=FAINT)
    return figure


def edge(run: RunRecord, *, title: str, subtitle: str = "") -> Any:
    """Margin and half the directional ratio over batches: 1 is the edge of stability. Interventions are marked.

    Args:
        run: Has events of a monitor, see :attr:`RunRecord.edge`.
        title: First line.
        subtitle: Second line, smaller.
    """
    figure, axes = canvas(title, subtitle)
    axes.set_xlabel("batch")
    axes.set_ylabel("1 = edge of stability")
    margins = [(batch, said["margin"]) for batch, said in run.edge if _finite(said["margin"])]
    ratios = [(batch, 0.5 * said["rho"]) for batch, said in run.edge if _finite(said["rho"])]
    axes.axhline(1.0, color=INK, linewidth=1, zorder=1)
    axes.plot(*_columns(ratios), color=COLORS["clean"], linewidth=1.2, label="median directional ratio / 2", zorder=2)
    axes.plot(
        *_columns(margins), color=COLORS["guarded"], linewidth=1.8, marker="o", markersize=3.5, label="margin", zorder=3
    )
    alarms = [batch for batch, said in run.edge if said["state"] in ("overdriven", "runaway", "poisoned")]
    if alarms:
        shade(axes, _stretches(alarms))
        axes.fill_between([], [], color=WINDOW, linewidth=0, label="overdriven, runaway or poisoned")
    for rung, color in (("cut_lr", COLORS["baseline"]), ("deep_rollback", REFUSED)):
        acted = [batch for batch, said in run.edge if said["acted"] and said["rung"] == rung]
        for batch in acted:
            axes.axvline(batch, color=color, linewidth=1.4, linestyle="--", zorder=4)
        if acted:
            axes.plot([], [], color=color, linewidth=1.4, linestyle="--", label=f"{rung} ({len(acted)})")
    late = [value for series in (margins, ratios) for _, value in series[len(series) // 8 :]]
    axes.set_ylim(min(0.0, *late, 0.0), 1.4 * max(1.0, *late, 1.0))  # the steep start may leave the picture
    axes.set_xlim(0, 1.01 * max((batch for batch, _ in run.edge), default=1))
    axes.legend(loc="upper right", frameon=False, labelcolor=FAINT, ncols=2)
    return figure


def save_png(figure: Any, path: Path) -> None:
    """Write a figure to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_png(figure))


def to_png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def canvas(title: str, subtitle: str) -> tuple[Any, Any]:
    """An empty figure in the project's style, and its axes."""
    # The object interface with the Agg canvas: no display, no global state, no leak over many figures.
    figure_module = import_extra("matplotlib.figure", "a figure")
    backend = import_extra("matplotlib.backends.backend_agg", "a figure")
    figure = figure_module.Figure(figsize=(9.6, 4.8))
    backend.FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.125, 0.89, 0.7))
    figure.text(0.022, 0.945, title, size=14, weight="bold", color=INK, va="center")
    figure.text(0.022, 0.885, subtitle, size=10, color=FAINT, va="center")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelsize=9)
    axes.xaxis.label.set_color(FAINT)
    axes.yaxis.label.set_color(FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def shade(axes: Any, windows: Iterable[tuple[int, int]]) -> None:
    """Mark stretches of attempts, first and last one given, as those with a fault."""
    for begin, end in sorted(set(windows)):
        axes.axvspan(begin - 0.5, end + 0.5, color=WINDOW, linewidth=0, zorder=0)


def innovation_range(
    accepted: Sequence[float], bounds: Sequence[float], refused: Sequence[float]
) -> tuple[float, float]:
    """Limits of the axis that show the steady part of a run well, and refusals where they are not far outside."""
    late = [abs(value) for values in (accepted, bounds) for value in values[len(values) // 4 :]]
    steady = max(late, default=0.0) or 1.0
    high = max(1.3 * steady, min(1.3 * max(refused, default=0.0), 5 * steady))
    return -0.5 * high, high


def _mark_refusals(axes: Any, run: RunRecord) -> None:
    """A cross at the loss each refused proposal would have had."""
    points = [(run.batch(event), event["measurement"]) for event in run.refusals if _finite(event["measurement"])]
    if points:
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            marker="x",
            s=26,
            linewidths=1.3,
            color=REFUSED,
            zorder=4,
            label=f"refused proposals ({len(run.refusals)})",
        )


def _frame_interesting(axes: Any, runs: Sequence[RunRecord]) -> None:
    """Cut off the steep start, so that what happens later can be seen."""
    values = [run.state_probe()[1] for run in runs]
    late = [y for series in values for y in series[len(series) // 8 :]]
    if late:
        low, high = min(late), max(late)
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def _label_ends(figure: Any, axes: Any, last: int, ends: list[tuple[float, str, str]]) -> None:
    """Name each line at its end, pushed apart so that no two names overlap."""
    if not ends:
        return
    low, high = axes.get_ylim()
    gap = 0.062 * (high - low)
    place = -math.inf
    for value, label, color in sorted(ends):
        place = max(value, place + gap)
        axes.annotate(
            label,
            (last, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            size=9.5,
            weight="bold",
            annotation_clip=False,
        )
    longest = max(len(label) for _, label, _ in ends)
    axes.set_position((0.08, 0.125, 0.88 - 0.0088 * longest, 0.7))


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _stretches(places: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending whole numbers as stretches, first and last one given."""
    found: list[tuple[int, int]] = []
    for place in places:
        if found and place <= found[-1][1] + 1:
            found[-1] = (found[-1][0], place)
        else:
            found.append((place, place))
    return found


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)
