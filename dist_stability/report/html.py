"""One page, one file: text, tables and figures, with nothing to fetch from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { --ink: #1f2430; --faint: #6b7280; --line: #e5e7eb; --panel: #f8f9fb; --good: #14784b; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; }
h2 { font-size: 18px; margin: 44px 0 12px; }
p.lead { font-size: 17px; margin: 14px 0 0; padding: 14px 18px; background: var(--panel); }
p.lead { border-left: 4px solid var(--good); }
p.lead.failed { border-left-color: var(--bad); }
p.faint, figcaption { color: var(--faint); }
figure { margin: 26px 0; }
figure img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
figcaption { font-size: 13.5px; margin-top: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 600; font-size: 13px; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
pre { background: var(--panel); padding: 12px 14px; white-space: pre-wrap; border-radius: 6px; font-size: 13px; }
details { margin: 10px 0; }
summary { cursor: pointer; font-weight: 600; }
"""


def page(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """A complete HTML document around parts made by the other functions."""
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="faint">{escape(subtitle)}</p>\n{body}\n</main>\n</body>\n</html>\n'
    )


def lead(text: str, *, failed: bool = False) -> str:
    """What happened, in a sentence, for the top of the page."""
    return f'<p class="lead{" failed" if failed else ""}">{escape(text)}</p>'


def heading(text: str) -> str:
    """A section heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{escape(text)}</p>"


def figure(png: bytes, caption: str) -> str:
    """An image inside the page itself."""
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; cells that are numbers are set to the right, columns by their first row that has one."""
    kept = [list(row) for row in rows]
    right = [any(_is_number(row[column]) for row in kept) for column in range(len(head))]

    def line(tag: str, cells: Sequence[Any]) -> str:
        opening = (f'{tag} class="number"' if to_the_right else tag for to_the_right in right)
        shown = (f"<{start}>{escape(text(cell))}</{tag}>" for start, cell in zip(opening, cells, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    body = "\n".join(line("td", row) for row in kept)
    return f'<div class="scroll"><table><thead>{line("th", head)}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def commands(lines: Iterable[str]) -> str:
    """Command lines, one below the other."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def details(title: str, part: str) -> str:
    """A part that is folded until it is asked for."""
    return f"<details><summary>{escape(title)}</summary>\n{part}\n</details>"


def text(value: Any) -> str:
    """A value as a person wants to read it: numbers short, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.4f}".rstrip("0").rstrip(".")
    if isinstance(value, (list, tuple)):
        return ", ".join(text(item) for item in value)
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
