"""The page of a preflight: verdict, grounds and limits in words, a table by block, three figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_stability.diagnostics.lr_probe import Risk
from dist_stability.diagnostics.preflight import MARGIN, Level, Preflight
from dist_stability.report import html, plots
from dist_stability.report.events import write_json

HEAD = (
    *("block", "width", "tokens", "rank", "near 1", "above", "below", "rho", "kappa", "eta"),
    *("kept", "transient", "update", "gain", "note"),
)
FIGURES = {
    "eigenvalues": "Eigenvalues of the map of each block, with the unit circle and, shaded, what counts as near it. "
    "Those outside what is drawn are counted in the panel.",
    "depth": "By depth: what each block adds to the residual stream, its largest eigenvalue, and shares of its "
    "eigenvalues.",
    "learning_rate": "Score of the virtual run at each learning rate tried; above 0 it diverged. Values outside what "
    "is drawn lie on the edge of the figure.",
}
_REACH = (1.3, 2.5)  # least and most that is drawn, from the centre
_COLUMNS = 6
_LOWEST, _HIGHEST = -3.0, 3.0


def write(found: Preflight, out: Path, facts: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Write ``report.html``, a PNG for each figure and ``summary.json``; returns the summary.

    Args:
        found: The report.
        out: The folder.
        facts: Settings and versions, JSON-able.
        command: That makes it again.
    """
    title = "Preflight"
    subtitle = f"{facts.get('model', '')}, learning rate {found.lr:.3g}"
    pictures = {
        "eigenvalues": plots.to_png(eigenvalues(found, subtitle)),
        "depth": plots.to_png(depth(found, subtitle)),
    }
    if found.risk is not None:
        pictures["learning_rate"] = plots.to_png(learning_rate(found, subtitle))
    for name, picture in pictures.items():
        (out / f"{name}.png").write_bytes(picture)
    parts = [
        html.lead(found.verdict, failed=found.level in (Level.HIGH, Level.RAISED)),
        html.heading("Grounds"),
        *map(html.paragraph, found.grounds),
        html.heading("What it cannot know"),
        *map(html.paragraph, found.limits),
    ]
    if "learning_rate" in pictures:
        parts += [html.heading("Learning rate"), html.figure(pictures["learning_rate"], FIGURES["learning_rate"])]
    parts += [
        html.heading("Blocks"),
        html.table(HEAD, rows(found)),
        *(html.figure(pictures[name], FIGURES[name]) for name in ("eigenvalues", "depth")),
        html.heading("Reproduce it"),
        html.commands([command]),
        html.heading("Settings and versions"),
        html.details("settings", html.table(("setting", "value"), [(k, html.text(v)) for k, v in facts.items()])),
    ]
    (out / "report.html").write_text(html.page(title, subtitle, parts), encoding="utf-8")
    summary = {"preflight": found.to_dict(), "settings": dict(facts), "command": command}
    write_json(out / "summary.json", summary)
    return summary


def rows(found: Preflight) -> list[tuple[Any, ...]]:
    """The table by block; columns as in :data:`HEAD`."""
    return [
        (
            *(each.name, each.width, each.tokens, f"{each.rank}{'*' if each.truncated else ''}"),
            *(each.masses.near_unit, each.masses.unstable, each.masses.damped, each.radius, each.condition),
            *(each.fit_ratio, each.kept, each.transient, each.relative_update, each.gain),
            each.problem or ("degenerate" if each.degenerate else ""),
        )
        for each in found.profile.blocks
    ]


def eigenvalues(found: Preflight, subtitle: str) -> Any:
    """A panel per block (of many, evenly chosen ones) with its eigenvalues and the unit circle."""
    figure, whole = plots.canvas("Eigenvalues by block", subtitle)
    whole.set_axis_off()
    names = list(found.profile.eigenvalues)
    shown = [names[round(place)] for place in _even(len(names), 2 * _COLUMNS)]
    columns = min(_COLUMNS, max(1, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    farthest = max((max(abs(x), abs(y)) for name in shown for x, y in found.profile.eigenvalues[name]), default=1.0)
    reach = min(max(1.1 * farthest, _REACH[0]), _REACH[1])
    for place, name in enumerate(shown):
        line, column = divmod(place, columns)
        width, height = 0.94 / columns, 0.8 / lines
        axes = figure.add_axes((0.035 + column * width, 0.81 - (line + 1) * height, 0.86 * width, 0.78 * height))
        _circle(axes, found.profile.eigenvalues[name], reach)
        axes.set_title(name[-24:], size=8, color=plots.INK)
    return figure


def depth(found: Preflight, subtitle: str) -> Any:
    """Relative update, spectral radius and shares of eigenvalues over the blocks, in the order of the model."""
    figure, whole = plots.canvas("By depth", subtitle)
    whole.set_axis_off()
    blocks = found.profile.blocks
    places = range(len(blocks))
    panels: Sequence[tuple[str, Sequence[tuple[str, list[float]]]]] = (
        ("relative update", [("", [each.relative_update for each in blocks])]),
        ("largest |eigenvalue|", [("", [each.radius for each in blocks])]),
        (
            "share of eigenvalues",
            [
                ("near 1", [each.masses.near_unit for each in blocks]),
                ("above", [each.masses.unstable for each in blocks]),
                ("below", [each.masses.damped for each in blocks]),
            ],
        ),
    )
    for number, (title, lines) in enumerate(panels):
        axes = figure.add_axes((0.06 + 0.32 * number, 0.13, 0.26, 0.62))
        for place, (label, values) in enumerate(lines):
            axes.plot(places, values, "o-", markersize=4, linewidth=1.4, color=plots.OTHERS[place], label=label or None)
        axes.set_title(title, size=10, color=plots.INK)
        axes.set_xlabel("block", color=plots.FAINT)
        axes.tick_params(colors=plots.FAINT, labelsize=8)
        axes.grid(axis="y", color=plots.GRID, linewidth=0.8)
        axes.set_ylim(
            0.0, 1.08 * max((y for _, values in lines for y in values if math.isfinite(y)), default=1.0) or 1.0
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=plots.FAINT, fontsize=8)
    return figure


def learning_rate(found: Preflight, subtitle: str) -> Any:
    """Score over learning rate: the search's curve, the rate in question and the recommended one."""
    figure, axes = plots.canvas("Risk by learning rate", subtitle)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("score: log10 of the largest excess over the limits")
    axes.axhspan(0.0, _HIGHEST, color=plots.WINDOW, linewidth=0, zorder=0, alpha=0.5)
    axes.axhline(0.0, color=plots.REFUSED, linewidth=1.2)
    if found.search is not None:
        curve = sorted(found.search.tried, key=lambda each: each.lr)
        axes.plot(
            [each.lr for each in curve],
            [_drawn(each) for each in curve],
            "o-",
            color=plots.COLORS["guarded"],
            markersize=4,
            linewidth=1.6,
            label="search, 16 steps",
        )
    steps = [each for each in (found.risk, found.margin_risk) if each is not None]
    axes.plot(
        [each.lr for each in steps],
        [_drawn(each) for each in steps],
        linestyle="none",
        marker="D",
        color=plots.COLORS["baseline"],
        label=f"the rate, and {MARGIN:g} times it, 8 steps",
    )
    axes.axvline(found.lr, color=plots.COLORS["baseline"], linewidth=1.0, linestyle=":")
    if found.recommended is not None:
        axes.axvline(found.recommended, color=plots.COLORS["twin"], linewidth=1.6, label="recommended at most")
    axes.set_ylim(_LOWEST - 0.1, _HIGHEST + 0.1)
    axes.legend(loc="upper left", frameon=False, labelcolor=plots.FAINT)
    return figure


def _circle(axes: Any, values: Sequence[tuple[float, float]], reach: float) -> None:
    turn = [2 * math.pi * place / 180 for place in range(181)]
    inner, outer = ([(r * math.cos(t), r * math.sin(t)) for t in turn] for r in (0.90, 1.05))
    axes.fill(*zip(*(outer + inner[::-1]), strict=True), color=plots.WINDOW, linewidth=0, zorder=0)
    axes.plot([math.cos(t) for t in turn], [math.sin(t) for t in turn], color=plots.FAINT, linewidth=0.6)
    inside = [(x, y) for x, y in values if max(abs(x), abs(y)) <= reach]
    if inside:
        axes.scatter(*zip(*inside, strict=True), s=8, linewidths=0, alpha=0.7, color=plots.COLORS["guarded"])
    if len(inside) < len(values):
        axes.text(-reach * 0.95, -reach * 0.93, f"{len(values) - len(inside)} outside", size=6.5, color=plots.REFUSED)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal", anchor="N")
    axes.tick_params(colors=plots.FAINT, labelsize=6)


def _even(count: int, most: int) -> list[float]:
    if count <= most:
        return [float(place) for place in range(count)]
    return [place * (count - 1) / (most - 1) for place in range(most)]


def _drawn(risk: Risk) -> float:
    return min(max(risk.score, _LOWEST), _HIGHEST)
