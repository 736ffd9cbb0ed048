"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_stability.report import html


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table, its cells written as in the HTML report."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(html.text(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
