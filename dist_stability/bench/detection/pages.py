"""What a person reads: Markdown tables, the ROC figure, and one page with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_stability.bench.detection import figures, tables
from dist_stability.report import html
from dist_stability.report.markdown import markdown
from dist_stability.report.plots import save_png, to_png


def write_pages(out: Path, summary: dict[str, Any]) -> None:
    """Tables, figure and page from whatever parts the summary has."""
    sections: list[tuple[str, str, tables.Table]] = []
    if "rules" in summary:
        kept, tuning = summary["recordings"], summary["tuning"]
        text = (
            f"Reporting seeds {summary['seeds']['reporting']}: {kept['clean_steps']} clean steps, {kept['events']} "
            f"events, {kept['ramps']} ramps, {kept['natural']} natural instabilities. Events: missed, of all. Ramps: "
            "caught, median attempts until the alarm, median damage then (nats; of all ramps). Tuned on seeds "
            f"{summary['seeds']['tuning']} to at most {tuning['budget']} episodes of false refusals in "
            f"{tuning['steps']} steps."
        )
        sections += [
            ("Recordings", text, tables.rules_table(summary["rules"])),
            ("Lock-out and NaN", "", tables.robustness_table(summary["rules"])),
            ("What the gradient-norm guard adds", "", tables.guard_table(summary["guard"])),
        ]
    if "noise" in summary:
        sections.append(("Noise", "Refusals per 10,000 steps without any fault.", tables.noise_table(summary["noise"])))
    if "bloom" in summary:
        text = "Iterations 31214 to 31222, with a made-up history before them."
        sections.append(("The BLOOM-176B trace", text, tables.bloom_table(summary["bloom"])))
    if "closed_loop" in summary:
        sections.append(("Closed loop", "", tables.closed_loop_table(summary["closed_loop"])))
        sections.append(("Closed loop without a fault", "", tables.clean_table(summary["closed_loop_clean"])))
    title = "Detection: which rule sees a bad update" + (
        " (quick run: no figure here means anything)" * summary["quick"]
    )
    text = f"# {title}\n\n" + "\n".join(
        f"## {head}\n\n{note + chr(10) * 2 if note else ''}{markdown(*table)}" for head, note, table in sections
    )
    (out / "tables.md").write_text(text, encoding="utf-8")
    parts = []
    if "roc" in summary:
        kept = summary["recordings"]
        subtitle = (
            f"{kept['clean_steps']} clean steps and {kept['events']} events, seeds {summary['seeds']['reporting']}"
        )
        figure = figures.roc(summary["roc"], subtitle=subtitle)
        save_png(figure, out / "roc.png")
        parts.append(html.figure(to_png(figure), "Harmful updates caught in time over false refusals, by threshold."))
    for head, note, table in sections:
        parts += [html.heading(head), html.paragraph(note), html.table(*table)]
    (out / "report.html").write_text(html.page(title, "dist-stability bench detection", parts), encoding="utf-8")
