"""The experiment's tables: head and rows, for the page and for Markdown alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_stability.experiments.paper.measures import DAMAGE_NEEDED
from dist_stability.experiments.paper.protocol import ARMS, FAULTS

Table = tuple[Sequence[str], list[list[Any]]]
"""Head and rows."""

COLUMNS = {
    "recovery_gap": "recovery gap",
    "twin_gap": "gap to the twin",
    "regret": "regret",
    "peak_degradation": "peak degradation",
    "detection_delay": "detection delay",
    "refused_inside": "refused inside",
    "false_refusals": "false refusals",
    "undone": "undone",
    "final_probe": "final probe",
    "evaluation": "held-out loss",
    "overhead_ratio": "overhead",
}

GAMMA = "gamma = |probe| / (3 |batch|)"
"""Cost of a forward on the probe over that of forward and backward on a batch, as the paper counts it."""

LEGEND = (
    "Mean and standard deviation over seeds. Losses in nats. Recovery gap: (final - clean) / (baseline - clean), 0 is "
    f"perfect, 1 is useless; not defined (empty) where the baseline was harmed by less than {DAMAGE_NEEDED} nats or "
    "ended in no number. Gap to the twin: the same against the golden twin. Regret: final - twin. Peak degradation: "
    "largest standing probe loss from the fault on, minus that before it. Detection delay: attempts from the first "
    "faulty one to the first refusal. Overhead: wall time over that of the same run without the controller's work, by "
    "the run's own clock; 1 by definition for an arm without a rule. A number in brackets: seeds a mean is over, where "
    "not all are."
)


def recovery(arms: Mapping[str, Any]) -> Table:
    """Arms by measures."""
    rows = [[arm, *(cell(measured[name]) for name in COLUMNS), _stopped(measured)] for arm, measured in arms.items()]
    return ["arm", *COLUMNS.values(), "stopped runs"], rows


def by_fault(faults: Mapping[str, Mapping[str, Any]], measure: str) -> Table:
    """Arms by faults, one measure."""
    shown = [fault for fault in FAULTS if fault in faults]
    arms = [arm for arm in ARMS if any(arm in faults[fault] for fault in shown)]
    rows = [
        [arm, *(cell(faults[fault][arm][measure]) if arm in faults[fault] else "" for fault in shown)] for arm in arms
    ]
    return ["arm", *shown], rows


def twins(grid: Mapping[str, Any], data: Mapping[str, str]) -> Table:
    """Guarded runs against golden twins, by task, mode and fault; ``data`` has what a task's data are called."""
    rows = [
        [data[task], parallel, fault, f"{row['equal']} of {row['compared']}", row["undefined"], row["different"]]
        for task, parallel, fault, row in _cells(grid)
        if row["compared"] or row["undefined"]
    ]
    return ["data", "mode", "fault", "equal, every bit", "not defined", "different seeds"], rows


def transparency(rows: Sequence[Mapping[str, Any]], data: Mapping[str, str]) -> Table:
    """Runs without a fault."""
    return ["data", "mode", "equal, every bit", "refused in all", "different seeds"], [
        [data[row["task"]], row["parallel"], f"{row['equal']} of {row['compared']}", row["refused"], row["different"]]
        for row in rows
    ]


def overhead(arms: Mapping[str, Mapping[str, float]]) -> Table:
    """Percent of the rest of the loop, by part."""
    phases = list(dict.fromkeys(phase for parts in arms.values() for phase in parts))
    rows = [
        [arm, *(f"{100 * parts[phase]:.2f} %" if phase in parts else "" for phase in phases), _percent(parts)]
        for arm, parts in arms.items()
    ]
    return ["arm", *phases, "all"], rows


def distributed(rows: Sequence[Mapping[str, Any]], data: Mapping[str, str]) -> Table:
    """Pairs of parallel modes."""
    return ["modes", "data", "fault", "arm", "equal verdicts", "largest difference (nats)"], [
        [
            " / ".join(row["modes"]),
            *(data[row["task"]], row["fault"], row["arm"]),
            f"{row['equal_verdicts']} of {row['compared']}",
            f"{row['largest_difference']:.3g}",
        ]
        for row in rows
    ]


def search(found: Mapping[str, Any], data: Mapping[str, str]) -> Table:
    """Candidates of the searches, and which one was taken."""
    rows = [
        [
            *(data[task], arm, ", ".join(f"{name} {value:g}" for name, value in row["values"].items())),
            "out" if row["objective"] is None else row["objective"],
            *(row["false_refusals"], row["stopped"]),
            "taken" if row["values"] == table["taken"] else "",
        ]
        for task, arms in found.items()
        for arm, table in arms.items()
        for row in table["candidates"]
    ]
    return ["data", "arm", "values", "objective", "refused in clean runs", "stopped runs", ""], rows


def cell(statistic: Mapping[str, Any]) -> str:
    """One measure, as a person reads it."""
    mean, std, values = statistic["mean"], statistic["std"], statistic["values"]
    if mean is None:
        return ""
    if not math.isfinite(mean):
        lost = sum(value is not None and not math.isfinite(value) for value in values)
        return f"lost in {lost} of {len(values)}"
    defined = sum(value is not None for value in values)
    share = f" ({defined})" if defined < len(values) else ""
    return f"{mean:.4f} ± {std:.4f}{share}" if std else f"{mean:.4g}{share}"


def _stopped(measured: Mapping[str, Any]) -> str:
    return str(int(sum(measured["stopped"]["values"]))) if any(measured["stopped"]["values"]) else ""


def _percent(parts: Mapping[str, float]) -> str:
    return f"{100 * sum(parts.values()):.2f} %"


def _cells(grid: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    for task, parallels in grid.items():
        for parallel, faults in parallels.items():
            for fault, row in faults.items():
                yield task, parallel, fault, row
