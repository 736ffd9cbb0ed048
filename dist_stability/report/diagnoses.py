"""The pages of ``diagnose sensitivity`` and ``diagnose bounds``: the verdict in words, a figure, the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_stability.diagnostics.bounds import LOWER_NOTABLE, StabilityBounds
from dist_stability.diagnostics.growth import APART, BENIGN_BELOW, SPREAD, Verdict
from dist_stability.diagnostics.sensitivity import Sensitivity
from dist_stability.report import html, plots
from dist_stability.report.events import write_json
from dist_stability.report.versions import versions

_LARGEST = 8

MEANING = {
    Verdict.BENIGN: "Rounding does not matter to this run over these steps.",
    Verdict.RESTRAINED: "Rounding decides which run this is, not whether it is a good one: the twins part "
    "exponentially and then stay at a bounded distance, while the loss falls.",
    Verdict.UNRESTRAINED: "The run is unstable: what begins as a rounding error is still growing, or the loss "
    "diverges. Lower the learning rate, or look for what amplifies.",
    Verdict.INVALID: "Nothing can be said: runs that must be equal are not.",
}


def in_words(found: Sensitivity, tolerance: float) -> str:
    """The verdict for people, with what follows for comparing runs."""
    lines = [MEANING[found.verdict], f"Grounds: {found.reason}."]
    if found.verdict is Verdict.INVALID:
        return "\n".join(lines)
    horizon = found.horizon(tolerance)
    if horizon.steps is None:
        lines.append(f"Within these steps two runs that differ in rounding stay within {tolerance:g} of each other.")
    else:
        how = "measured" if horizon.measured else "extrapolated from the growth"
        lines.append(
            f"Two runs that differ in rounding may be compared for {horizon.steps} steps ({how}; distance up to "
            f"{tolerance:g}); beyond that a test of replay, restart or ranks must not compare weights."
        )
    return "\n".join(lines)


def bounds_in_words(found: StabilityBounds) -> str:
    """The verdict for people."""
    if not (math.isfinite(found.upper_margin) and math.isfinite(found.lower_violation)):
        return "Nothing can be said: something was not finite."
    if found.reliable is False:
        return "Nothing can be said: two lengths of the finite difference disagree; try --relative-step."
    if found.upper_margin >= 1.0:
        return (
            f"Past the edge of stability at this point: margin {found.upper_margin:.3g}, of which 1 is the limit. "
            "Large batches live there for long stretches without harm; a learning rate that only begins there does not."
        )
    if found.lower_violation > LOWER_NOTABLE:
        return "Below the edge, but negative curvature grows faster than weight decay takes back, at any learning rate."
    if found.peak_margin >= 1.0:
        return (
            f"Stable now, past the edge at the schedule's peak if curvature stayed what it is (margin "
            f"{found.peak_margin:.3g}): warm up, and look again on the way."
        )
    return f"Below the edge of stability at this point: margin {found.upper_margin:.3g}, of which 1 is the limit."


def write_sensitivity(
    found: Sensitivity, tolerance: float, out: Path, settings: Mapping[str, Any], command: str
) -> None:
    """Write ``report.html``, ``sensitivity.png`` and ``summary.json``.

    Args:
        found: What was measured.
        tolerance: Of the horizon.
        out: The folder; made if it is not there.
        settings: JSON-able.
        command: That makes it again.
    """
    words, horizon = in_words(found, tolerance), found.horizon(tolerance)
    pictures, rows = {}, []
    if found.relative_l2:
        subtitle = f"{settings['model']}, learning rate {settings['lr']:.3g}, {found.perturbation}"
        pictures["sensitivity"] = (
            plots.to_png(_distances(found, subtitle)),
            "Relative distance of the twins' weights.",
        )
        ranked = sorted(found.layer_share.items(), key=lambda share: -share[1])[:_LARGEST]
        rows = [(name, share, found.layers[name][-1]) for name, share in ranked]
    numbers = {
        "growth per step": None if found.growth is None else found.growth.rate,
        "growth per learning rate": found.ftle_per_lr_time,
        "fit (R squared)": None if found.growth is None else found.growth.r_squared,
        "last distance": found.relative_l2[-1] if found.relative_l2 else None,
        "last loss": found.losses[-1] if found.losses else None,
        "last loss of the twin": found.losses_perturbed[-1] if found.losses_perturbed else None,
        "parameters it lies in": found.participation,
        "elements left out": sum(found.left_out.values()),
    }
    parts = [html.heading("Where the difference lies"), html.table(("parameter", "share", "distance"), rows)]
    summary = {**asdict(found), "horizon": asdict(horizon), "growth": found.growth and asdict(found.growth)}
    failed = found.verdict in (Verdict.UNRESTRAINED, Verdict.INVALID)
    _write("Sensitivity to rounding", words, failed, numbers, pictures, parts if rows else [], out, settings, command)
    _summarize("sensitivity", summary, words, out, settings, command)


def write_bounds(found: StabilityBounds, out: Path, settings: Mapping[str, Any], command: str) -> None:
    """Write ``report.html``, ``bounds.png`` and ``summary.json``. See :func:`write_sensitivity`."""
    words = f"{bounds_in_words(found)}\n{found.text()}"
    subtitle = f"{settings['model']}, learning rate {settings['lr']:.3g}, after {settings['train_steps']} steps"
    pictures = {}
    if math.isfinite(found.upper_margin) and math.isfinite(found.lower_violation):
        caption = "What the step takes of each bound: 1 is the limit. The lower one is drawn over what is notable."
        pictures["bounds"] = (plots.to_png(_gauges(found, subtitle)), caption)
    numbers = {
        "margin": found.upper_margin,
        "residual": found.upper_residual,
        "margin at the peak": found.peak_margin,
        "learning rate could grow by": found.headroom,
        "warm-up may begin at (of the peak)": found.warmup,
        "growth of negative curvature per step": found.lower_violation,
        "reliable": found.reliable,
        "loss": found.loss,
        "Hessian-vector products": found.products,
    }
    parts = [html.heading("The sharpest direction"), html.table(("parameter", "share"), found.largest_shares)]
    failed = not found.upper_margin < 1.0 or found.reliable is False
    _write("Stability bounds", words, failed, numbers, pictures, parts, out, settings, command)
    _summarize("bounds", asdict(found), words, out, settings, command)


def _write(
    title: str,
    words: str,
    failed: bool,
    numbers: Mapping[str, Any],
    pictures: Mapping[str, tuple[bytes, str]],
    parts: Sequence[str],
    out: Path,
    settings: Mapping[str, Any],
    command: str,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, (picture, _) in pictures.items():
        (out / f"{name}.png").write_bytes(picture)
    first, *rest = words.splitlines()
    facts = {**settings, **versions()}
    page = [
        html.lead(first, failed=failed),
        *map(html.paragraph, rest),
        *(html.figure(picture, caption) for picture, caption in pictures.values()),
        html.table(("number", "value"), [(name, html.text(value)) for name, value in numbers.items()]),
        *parts,
        html.heading("Reproduce it"),
        html.commands([command]),
        html.heading("Settings and versions"),
        html.details("settings", html.table(("setting", "value"), [(k, html.text(v)) for k, v in facts.items()])),
    ]
    (out / "report.html").write_text(html.page(title, str(settings["model"]), page), encoding="utf-8")


def _summarize(
    name: str, found: Mapping[str, Any], words: str, out: Path, settings: Mapping[str, Any], command: str
) -> None:
    summary = {name: dict(found), "verdict": words, "settings": dict(settings), "command": command}
    write_json(out / "summary.json", {**summary, "versions": versions()})


def _distances(found: Sensitivity, subtitle: str) -> Any:
    figure, axes = plots.canvas(f"Twins that differ by rounding: {found.verdict}", subtitle)
    axes.set_xlabel("step")
    axes.set_ylabel("relative distance of the weights")
    steps = range(len(found.relative_l2))
    shown = [(step, value) for step, value in zip(steps, found.relative_l2, strict=True) if value > 0.0]
    axes.plot([x for x, _ in shown], [y for _, y in shown], color=plots.COLORS["guarded"], linewidth=2.0, zorder=3)
    for level, what in ((BENIGN_BELOW, "rounding"), (APART, "different runs"), (SPREAD, "restrained below")):
        axes.axhline(level, color=plots.FAINT, linewidth=1, linestyle=":", zorder=1)
        axes.annotate(what, (0, level), xytext=(4, 3), textcoords="offset points", color=plots.FAINT, size=9)
    if shown:
        axes.set_yscale("log")
    return figure


def _gauges(found: StabilityBounds, subtitle: str) -> Any:
    figure, axes = plots.canvas("Stability bounds at this point", subtitle)
    axes.set_position((0.28, 0.125, 0.69, 0.7))
    bars = [("upper bound, now", found.upper_margin)]
    if found.peak_factor != 1.0:
        bars.append((f"upper bound, at {found.peak_factor:.3g} times the rate", found.peak_margin))
    bars.append((f"lower bound (growth / {LOWER_NOTABLE:g})", found.lower_violation / LOWER_NOTABLE))
    for place, (_, value) in enumerate(bars):
        over = plots.COLORS["baseline"] if value >= 1.0 else plots.COLORS["guarded"]
        axes.barh(place, value, 0.5, color=over, zorder=2)
        axes.annotate(f"{value:.3g}", (value, place), xytext=(5, 0), textcoords="offset points", va="center", size=9.5)
    axes.axvline(1.0, color=plots.INK, linewidth=1, zorder=3)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=2.0)  # what is far beyond a limit must not hide the limit
    axes.set_xlim(0, 1.3 * max(1.0, *(value for _, value in bars)))
    axes.set_xlabel("1 = limit")
    return figure
