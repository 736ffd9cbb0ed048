"""``dist-stability experiment restrained``: do what is missing of the parts, and write down what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_stability.experiments.restrained.figures import draw
from dist_stability.experiments.restrained.parts import Outcome, Part, Result
from dist_stability.experiments.restrained.plan import parts as all_parts
from dist_stability.experiments.spectral.pool import Job, perform
from dist_stability.report import html, plots
from dist_stability.report.events import write_json
from dist_stability.report.markdown import markdown
from dist_stability.report.versions import versions

TITLE = "Restrained instabilities and the edge of stability"
CHECK_HEAD = ("pass", "what", "band", "measured: smallest .. median .. largest (seeds)")


def experiment(
    out: Path, *, parts: Sequence[str] | None = None, workers: int = 1, quick: bool = False, data: Path | None = None
) -> int:
    """Do what is missing of some parts; show what is there of all.

    Args:
        out: The folder; a finished job in it is not done again.
        parts: Some of :data:`~.plan.PARTS`, and R12 with ``data``; default all.
        workers: Processes at a time. Parts that measure time take one.
        data: Folder of CIFAR-10, for R12; without it there is no R12.
        quick: A job or two of each part, a few steps: to see that it runs. In a folder of its own.

    Returns:
        0, or 1 if a job failed. A band that is missed is a result.

    Raises:
        ValueError: A part is not known, or ``workers`` is below 1; nothing was started.
    """
    known = all_parts(data)
    chosen = tuple(known if parts is None else dict.fromkeys(parts))
    if unknown := [name for name in chosen if name not in known]:
        more = "" if data is not None else " (R12 needs --data DIR)"
        raise ValueError(f"--parts: unknown {', '.join(unknown)}; choose from {', '.join(known)}{more}")
    if workers < 1:
        raise ValueError(f"--workers {workers}: must be at least 1")
    folder = out / "quick" if quick else out
    failed: dict[str, str] = {}
    results: dict[str, list[Result]] = {}
    for name, part in known.items():
        jobs = _jobs(part, folder, quick)
        if name in chosen:
            why = perform(jobs, workers if part.parallel else 1, name)
            failed |= {f"{name}/{job}": reason for job, reason in why.items()}
        found = [result for job in jobs if (result := job.result()) is not None]
        if found:
            results[name] = found
    outcomes = {name: known[name].conclude(found) for name, found in results.items()}
    _write(folder, known, outcomes, results, failed, quick)
    return 1 if failed else 0


def _jobs(part: Part, folder: Path, quick: bool) -> list[Job]:
    return [
        Job(
            folder / part.name / f"{settings['name']}.json",
            {**settings, "version": part.version},
            part.work,
            settings,
        )
        for settings in part.settings(quick)
    ]


def _write(
    folder: Path,
    known: Mapping[str, Part],
    outcomes: dict[str, Outcome],
    results: dict[str, list[Result]],
    failed: dict[str, str],
    quick: bool,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    title = TITLE + (" (quick run: no number of it means anything)" if quick else "")
    pages, text = [], [f"# {title}"]
    summary: dict[str, Any] = {"experiment": "restrained", "quick": quick, "failed": failed, "versions": versions()}
    for name, outcome in outcomes.items():
        heading = f"{name}: {known[name].title}"
        verdict = _verdict(outcome)
        jobs = len(_jobs(known[name], folder, quick))
        done = f"{len(results[name])} of {jobs} jobs. {verdict}"
        pages += [html.heading(heading), html.paragraph(done)]
        text += [f"## {heading}", done]
        checks = [["" if c.passed is None else c.passed, c.what, c.band, c.measured] for c in outcome.checks]
        for head, rows in ((CHECK_HEAD, checks), (outcome.head, outcome.rows)):
            if rows:
                pages.append(html.table(head, rows))
                text.append(markdown(head, rows).rstrip())
        if outcome.note:
            pages.append(html.paragraph(outcome.note))
            text.append(outcome.note)
        for file, figure in draw(name, results[name]):
            png = plots.to_png(figure)
            (folder / file).write_bytes(png)
            pages.append(html.figure(png, heading))
        summary[name] = {"verdict": verdict, "checks": [asdict(check) for check in outcome.checks]}
    (folder / "report.html").write_text(html.page(title, "CPU scale, digits", pages), encoding="utf-8")
    (folder / "tables.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    write_json(folder / "summary.json", summary)
    for name in ("report.html", "tables.md", "summary.json"):
        print(folder / name)
    for name, outcome in outcomes.items():
        print(f"{name}: {_verdict(outcome)}")
    for name, why in failed.items():
        print(f"failed: {name}: {why}")


def _verdict(outcome: Outcome) -> str:
    banded = [check for check in outcome.checks if check.passed is not None]
    missed = [check.what for check in banded if not check.passed]
    if not banded:
        return "Nothing claimed."
    return f"Missed: {'; '.join(missed)}." if missed else "Inside its bands."
