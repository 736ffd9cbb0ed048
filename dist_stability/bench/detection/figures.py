"""The ROC figure: what a rule catches against what it refuses by mistake, over its threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_stability.bench.detection.contestants import DEFAULT
from dist_stability.report.extras import import_extra
from dist_stability.report.plots import COLORS, FAINT, GRID, INK

_STYLES = {"probe": "-", "loss": "--", "gradient": ":"}
_PALETTE = ("#d1495b", "#1b9e77", "#8e6bbf", "#d98b1f", "#0b7a75", "#b3589a", "#7f6000")


def roc(curves: Mapping[str, Sequence[Mapping[str, Any]]], *, subtitle: str) -> Any:
    """One curve per rule.

    Args:
        curves: By name: points with "watches", "false_per_10k" and "caught" (share), from tolerant to sensitive.
        subtitle: What was replayed.

    Returns:
        A matplotlib figure. Points without any false refusal are drawn at the left edge.
    """
    figure = import_extra("matplotlib.figure", "the ROC figure").Figure(figsize=(9.6, 5.6))
    import_extra("matplotlib.backends.backend_agg", "the ROC figure").FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.11, 0.655, 0.74))
    figure.text(
        0.02, 0.95, "Harmful updates caught in time, against good ones refused", size=14, weight="bold", color=INK
    )
    figure.text(0.02, 0.905, subtitle, size=10, color=FAINT)
    positive = [p["false_per_10k"] for points in curves.values() for p in points if p["false_per_10k"] > 0]
    edge = min(positive, default=1.0) / 2
    colors = {style: iter(_PALETTE) for style in _STYLES}  # rules on one stream share a line style, not a colour
    for name, points in curves.items():
        if not points:
            continue
        own = name == DEFAULT
        axes.plot(
            [max(p["false_per_10k"], edge) for p in points],
            [100 * p["caught"] for p in points],
            linestyle=_STYLES[points[0]["watches"]],
            color=COLORS["guarded"] if own else next(colors[points[0]["watches"]]),
            linewidth=2.8 if own else 1.4,
            zorder=4 if own else 2,
            marker="o" if own else None,
            markersize=3.5,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_ylim(-2, 102)
    axes.axvline(edge, color=GRID, linewidth=1, zorder=0)
    axes.annotate("none", (edge, -2), xytext=(0, -14), textcoords="offset points", ha="center", size=9, color=FAINT)
    axes.set_xlabel("false refusals per 10,000 clean steps", color=FAINT)
    axes.set_ylabel("events of 0.02 nats and more caught (%)", color=FAINT)
    axes.tick_params(colors=FAINT, labelsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if any(curves.values()):
        title = "probe -   loss - -   norm ..."
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8.5, title=title)
    return figure
