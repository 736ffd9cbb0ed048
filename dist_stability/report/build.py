"""The report of a run, or of several side by side: figures, tables and one self-contained page."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_stability.report import html, plots
from dist_stability.report.events import write_json
from dist_stability.report.runs import RunRecord, load_runs
from dist_stability.report.versions import versions

SHOWN_EVENTS = 200


@dataclass(frozen=True)
class Words:
    """What a report says beside its numbers.

    Attributes:
        title: Of the page.
        subtitle: Below it.
        sentence: What happened.
        failed: The sentence is bad news.
        figure_title: Of the probe-loss figure; names the data.
        figure_subtitle: What the runs have in common.
        labels: Names at the ends of the lines, by run name.
        commands: Command lines that reproduce it all.
    """

    title: str
    subtitle: str
    sentence: str
    failed: bool
    figure_title: str
    figure_subtitle: str
    labels: dict[str, str]
    commands: Sequence[str]


def report(folder: Path, out: Path) -> dict[str, Any]:
    """Report on a run folder, or on a folder of run folders.

    Args:
        folder: Holds ``events.jsonl``, or folders that do.
        out: Gets ``report.html``, ``probe_loss.png`` and ``summary.json``.

    Returns:
        What was written to ``summary.json``.

    Raises:
        NoRun: There is no event log.
    """
    runs = load_runs(folder)
    write_report(runs, out, describe(runs))
    summary = {
        "source": str(folder),
        "runs": {
            run.name: {
                "finished": run.summary.get("finished", False),
                "events": len(run.events),
                "refused": [run.batch(event) for event in run.refusals],
                "final_probe": final_probe(run),
                "evaluation": run.summary.get("evaluation"),
            }
            for run in runs
        },
        "versions": versions(),
    }
    write_json(out / "summary.json", summary)
    return summary


def write_report(runs: Sequence[RunRecord], out: Path, words: Words, rows: str | None = None) -> None:
    """Write ``probe_loss.png`` and ``report.html``.

    Args:
        runs: Drawn and listed in this order.
        out: The folder.
        words: What to say.
        rows: The main table, as HTML; default one row per run.
    """
    loss = plots.to_png(
        plots.probe_loss(runs, title=words.figure_title, subtitle=words.figure_subtitle, labels=words.labels)
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "probe_loss.png").write_bytes(loss)
    parts = [
        html.lead(words.sentence, failed=words.failed),
        html.figure(
            loss,
            "Probe loss of the state after each batch. Shaded: batches with the injected fault. Crosses: the loss that "
            "refused proposals would have had.",
        ),
        rows if rows is not None else _table(runs),
    ]
    for run in runs:
        if run.guarded:
            parts += _guard_figures(run, words)
    parts += [html.heading("Refusals"), *(_refusals(run) for run in runs if run.guarded)]
    parts += [html.heading("Where the time went"), _ledger(runs)]
    if words.commands:
        parts += [html.heading("Reproduce it"), html.commands(words.commands)]
    parts += [html.heading("Settings and versions"), *(_settings(run) for run in runs)]
    (out / "report.html").write_text(html.page(words.title, words.subtitle, parts), encoding="utf-8")


def describe(runs: Sequence[RunRecord]) -> Words:
    """Words for runs nobody has said anything about."""
    first = next((run for run in runs if run.summary), runs[0])
    data = str(first.summary.get("data", "unknown data"))
    stopped = [run for run in runs if not run.summary.get("finished")]
    said = []
    for run in runs:
        refused = [run.batch(event) for event in run.refusals]
        outcome = f"refused {_count(refused)}" if run.guarded else "was not guarded"
        if run.would_refuse:
            outcome = (
                f"would have refused {_count([run.batch(event) for event in run.would_refuse])}, but only observed,"
            )
        final = final_probe(run)
        end = f"ended at a probe loss of {final:.4f}" if final is not None else "was never measured"
        if run in stopped:
            end = f"did not finish ({run.summary.get('reason', 'no summary: it may still be running, or was killed')})"
        said.append(f"{run.name} {outcome} and {end}")
    return Words(
        title=f"Training on the {data}" if first.summary else "Training run",
        subtitle=_circumstances(first),
        sentence="; ".join(said) + ".",
        failed=bool(stopped),
        figure_title=f"Probe loss: {data}",
        figure_subtitle=_circumstances(first),
        labels={},
        commands=[_command(run) for run in runs if run.summary.get("command")],
    )


def final_probe(run: RunRecord) -> float | None:
    """Probe loss of the last state, None if it was never measured."""
    values = run.state_probe()[1]
    return values[-1] if values else None


def _circumstances(run: RunRecord) -> str:
    if not run.summary:
        return "no summary.json"
    world = run.summary["world_size"]
    return (
        f"{run.summary['parallel']} on {world} process{'es' if world != 1 else ''} ({run.summary['device']}), "
        f"{run.settings['steps']} batches of {run.settings['batch_size']}, {run.settings['optimizer']}, "
        f"seed {run.settings['seed']}"
    )


def _command(run: RunRecord) -> str:
    world = run.summary["world_size"]
    launcher = ["torchrun", f"--nproc_per_node={world}"] if world > 1 else ["python"]
    return shlex.join([*launcher, *run.summary["command"]])


def _count(refused: Sequence[int]) -> str:
    return "nothing" if not refused else f"{len(refused)} batch{'es' if len(refused) > 1 else ''}"


def _table(runs: Sequence[RunRecord]) -> str:
    head = ("run", "guarded by", "batches", "refused", "undone", "final probe", "held-out loss", "seconds")
    rows = [
        (
            run.name,
            run.settings.get("rule", "a rule" if run.guarded else "nothing"),
            len(run.events),
            len(run.refusals),
            len(run.summary.get("undone", ())),
            final_probe(run),
            run.summary.get("evaluation"),
            run.summary.get("seconds"),
        )
        for run in runs
    ]
    return html.table(head, rows)


def _guard_figures(run: RunRecord, words: Words) -> list[str]:
    parts = [
        html.figure(
            plots.to_png(plots.innovation(run, title=f"What the rule saw: {run.name}", subtitle=words.figure_title)),
            "Innovation: the probe of a proposal minus the value predicted from committed history. It is accepted up "
            "to the bound, which a rule may lower for a step with an outlying gradient norm.",
        )
    ]
    if run.series("gradient_norm")[1]:
        parts.append(
            html.figure(
                plots.to_png(plots.gradient_norm(run, title=f"Gradient norm: {run.name}", subtitle=words.figure_title)),
                "Global gradient norm before clipping.",
            )
        )
    if run.edge:
        drawn = plots.edge(run, title=f"Edge of stability: {run.name}", subtitle=words.figure_title)
        said = _edge_in_words(run)
        parts.append(html.figure(plots.to_png(drawn), f"How far from the edge of stability; see docs/edge.md. {said}"))
    return parts


def _edge_in_words(run: RunRecord) -> str:
    states = [said["state"] for _, said in run.edge]
    counted = ", ".join(f"{state} at {states.count(state)}" for state in dict.fromkeys(states))
    acted = [f"{said['rung']} at batch {batch}" for batch, said in run.edge if said["acted"]]
    done = f" Done about it: {', '.join(acted)}." if acted else " Nothing was done about it."
    return f"States, in judged attempts: {counted}.{done}"


def _refusals(run: RunRecord) -> str:
    events = run.would_refuse or run.notable
    refused = run.would_refuse or run.refusals
    verb = "would have refused" if run.would_refuse else "refused"
    if not events:
        return html.paragraph(f"{run.name} refused nothing in {len(run.events)} attempts.")
    head = [
        *("batch", "action", "rung", "signal", "rank", "probe", "innovation", "bound", "gradient norm"),
        *("undone", "pattern", "reason"),
    ]
    rows = [
        (
            run.batch(event),
            event.get("would") or event["action"],
            event.get("rung") or None,
            event["signal"],
            event["rank"],
            event["measurement"],
            event["innovation"],
            event["bound"],
            event.get("gradient_norm"),
            event["undone"] or None,
            event.get("pattern") or None,
            event.get("warning") or event["reason"],
        )
        for event in events[:SHOWN_EVENTS]
    ]
    more = len(events) - len(rows)
    note = html.paragraph(f"... and {more} more, in events.jsonl.") if more else ""
    said = html.paragraph(f"{run.name} {verb} {len(refused)} of {len(run.events)} attempts.")
    return said + html.table(head, rows) + note


def _ledger(runs: Sequence[RunRecord]) -> str:
    """Median milliseconds of each part of ``step()``."""
    phases = list(dict.fromkeys(phase for run in runs for event in run.events for phase in event.get("seconds", {})))
    rows = []
    for run in runs:
        row: list[Any] = [run.name]
        for phase in phases:
            times = [event["seconds"][phase] for event in run.events if phase in event.get("seconds", {})]
            row.append(round(1000 * statistics.median(times), 2) if times else None)
        rows.append(row)
    return html.paragraph("Median milliseconds on rank 0 of each part of a step, over all attempts.") + html.table(
        ("run", *phases), rows
    )


def _settings(run: RunRecord) -> str:
    pairs = [*run.settings.items(), *run.summary.get("versions", {}).items()]
    return html.details(run.name, html.table(("setting", "value"), [(name, html.text(value)) for name, value in pairs]))
