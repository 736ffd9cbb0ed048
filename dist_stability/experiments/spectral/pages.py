"""What an experiment leaves to be looked at: one page, its tables as Markdown, its numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_stability.report import html
from dist_stability.report.events import write_json
from dist_stability.report.markdown import markdown

Section = tuple[str, str, Sequence[str], list[list[Any]]]
"""Heading, text below it, head and rows of the table."""


def write_pages(
    out: Path, title: str, summary: dict[str, Any], sections: Sequence[Section], failed: dict[str, str]
) -> int:
    """Write ``report.html``, ``tables.md`` and ``summary.json``, and say where they are and what failed.

    Args:
        out: The folder.
        title: Of the page.
        summary: For the JSON file; "failed" is added to it, and its "quick" says so in the title.
        sections: In their order.
        failed: Why jobs failed, by the name of their file.

    Returns:
        0, or 1 if a job failed.
    """
    summary["failed"] = failed
    if summary["quick"]:
        title += " (quick run: no number of it means anything)"
    out.mkdir(parents=True, exist_ok=True)
    parts, text = [], [f"# {title}"]
    for heading, note, head, rows in sections:
        parts += [html.heading(heading), html.paragraph(note), html.table(head, rows)]
        text += [f"## {heading}", note, markdown(head, rows).rstrip()]
    (out / "report.html").write_text(html.page(title, "CPU scale", parts), encoding="utf-8")
    (out / "tables.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    write_json(out / "summary.json", summary)
    for name in ("report.html", "tables.md", "summary.json"):
        print(out / name)
    for name, why in failed.items():
        print(f"failed: {name}: {why}")
    return 1 if failed else 0
