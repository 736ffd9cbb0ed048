"""What a person reads: the figures as PNG files, one page with everything, and the tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dist_stability.experiments.paper import figures, tables
from dist_stability.experiments.paper.protocol import ARMS, GUARDED
from dist_stability.experiments.paper.results import Results
from dist_stability.report import html
from dist_stability.report.markdown import markdown
from dist_stability.report.plots import to_png

Section = tuple[str, str, tables.Table]
"""Heading, text below it, table."""

_PROBE_FIGURE = {"text": "figure_5_text_probe", "vision": "figure_2_vision_probe"}


def write_pages(results: Results, summary: dict[str, Any], commands: Sequence[str]) -> list[str]:
    """Write figures, ``report.html`` and ``tables.md`` into the experiment's folder; returns their names."""
    out = results.grid.out
    written, images = [], []
    for name, caption, figure in _figures(results):
        image = to_png(figure)
        (out / f"{name}.png").write_bytes(image)
        written.append(f"{name}.png")
        images.append(html.figure(image, caption))
    sections = list(_sections(results, summary))
    title, subtitle = _title(results, summary)
    parts = [html.paragraph(summary["sentence"]), html.heading("Figures"), *images]
    for head, note, table in sections:
        parts += [html.heading(head), *([html.paragraph(note)] if note else []), html.table(*table)]
    parts += [html.heading("Reproduce it"), html.commands(commands)]
    parts += [html.details("Made with", html.table(("what", "value", "runs"), _made_with(summary)))]
    (out / "report.html").write_text(html.page(title, subtitle, parts), encoding="utf-8")
    text = [f"# {title}", subtitle, summary["sentence"], f"```\n{commands[0]}\n```"]
    for head, note, table in sections:
        text += [f"## {head}", *([note] if note else []), markdown(*table).rstrip()]
    (out / "tables.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return [*written, "report.html", "tables.md"]


def _title(results: Results, summary: dict[str, Any]) -> tuple[str, str]:
    grid = results.grid
    protocol, main = grid.protocol, summary["main"]
    quick = " (quick run: no number of it means anything)" if summary["quick"] else ""
    data = results.data_name(main["task"])
    subtitle = (
        f"{protocol.steps} steps of {protocol.batch_size} examples, AdamW {protocol.lr:g}, probe of "
        f"{protocol.probe_size}, seeds 0 to {grid.seeds - 1}; {main['parallel']}"
    )
    return f"The controller paper's experiment on {data}{quick}", subtitle


def _figures(results: Results) -> Iterator[tuple[str, str, Any]]:
    """File name without its end, caption, figure; for the main fault and mode, on every task that has runs."""
    main_task, parallel, fault_name = results.main
    protocol = results.grid.protocol
    fault, steps = protocol.injection(fault_name), protocol.steps
    for task in dict.fromkeys([main_task, *protocol.tasks]):
        found = {arm: results.of(task, parallel, fault_name, arm) for arm in ARMS if arm != "guarded-clean"}
        arms = {arm: runs for arm, runs in found.items() if runs}
        if not arms.keys() - {"clean"}:
            continue
        end = "" if task == main_task else f"_{task}"
        data = results.data_name(task)
        most = max(len(runs) for runs in arms.values())
        over = f"mean and standard deviation over {most} seeds" if most > 1 else "one seed"
        subtitle = f"{fault.title}, from step {fault.start}; {over}; {parallel}"
        yield (
            f"{_PROBE_FIGURE[protocol.experiment]}{end}",
            "Probe loss of the standing state after each batch. Shaded: the faulty batches.",
            figures.probe_loss(arms, fault, steps, title=f"Probe loss: {data}", subtitle=subtitle),
        )
        judged = {arm: arms[arm] for arm in (GUARDED, "paper") if arm in arms}
        if judged:
            yield (
                f"figure_3_innovation{end}",
                "Innovation: the probe loss of a proposal minus the value predicted from committed history, and the "
                "bound it had to stay below.",
                figures.innovation(judged, fault, steps, title=f"Innovation: {data}", subtitle=subtitle),
            )
        yield (
            f"figure_4_parameter_norm{end}",
            "l2 norm of all parameters of the standing state.",
            figures.parameter_norm(arms, fault, steps, title=f"Norm of the parameters: {data}", subtitle=subtitle),
        )


def _sections(results: Results, summary: dict[str, Any]) -> Iterator[Section]:
    protocol, main = results.grid.protocol, summary["main"]
    data = results.data_name(main["task"])
    title = protocol.injection(main["fault"]).title
    yield f"Recovery: {data}, {title} ({main['parallel']})", tables.LEGEND, tables.recovery(summary["arms"])
    for task, parallels in summary["faults"].items():
        for parallel, faults in parallels.items():
            where = f"{results.data_name(task)} ({parallel})"
            named = "; ".join(f"{name}: {protocol.injection(name).title}" for name in faults)
            yield f"Recovery gap by fault: {where}", f"{named}.", tables.by_fault(faults, "recovery_gap")
            yield f"Regret by fault: {where}", "", tables.by_fault(faults, "regret")
            yield f"Final probe loss by fault: {where}", "", tables.by_fault(faults, "final_probe")
            yield f"Refused faulty steps by fault: {where}", "", tables.by_fault(faults, "refused_inside")
            yield f"False refusals by fault: {where}", "", tables.by_fault(faults, "false_refusals")
    yield "Guarded runs and their golden twins", _TWIN_NOTE, tables.twins(summary["twin"]["faults"], summary["data"])
    if summary["transparency"]:
        yield (
            "Runs without a fault, guarded against not",
            "",
            tables.transparency(summary["transparency"], summary["data"]),
        )
    if summary["overhead"]:
        note = f"{_OVERHEAD_NOTE} The paper's estimate of the probe, {tables.GAMMA}: {100 * summary['gamma']:.2f} %."
        yield "Where the overhead comes from", note, tables.overhead(summary["overhead"])
    if summary["distributed"]:
        yield "Agreement between parallel modes", "", tables.distributed(summary["distributed"], summary["data"])
    if summary["search"]:
        seeds = ", ".join(map(str, protocol.tuning_seeds))
        note = f"Objective: mean final probe loss under the paper's fault, tuning seeds {seeds} only."
        yield "The searches for paper-tuned and loss-rollback", note, tables.search(summary["search"], summary["data"])


_TWIN_NOTE = (
    "Not defined: a faulty step was committed or accepted in part, the learning rate was lowered, or the run was "
    "stopped; the twin, which never sees the fault, says nothing then."
)
_OVERHEAD_NOTE = (
    "Wall time of the parts of a guarded step, relative to the rest of the loop. Runs that share a machine disturb "
    "each other's clocks: for a figure to quote, take one worker."
)


def _made_with(summary: dict[str, Any]) -> list[list[Any]]:
    return [[name, value, runs] for name, counts in summary["made_with"].items() for value, runs in counts.items()]
