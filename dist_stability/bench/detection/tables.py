"""What was measured, as tables in Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from dist_stability.bench.detection.events import SIZES

Table = tuple[Sequence[str], list[list[Any]]]
"""Head and rows."""


def rules_table(rules: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every rule on the recordings of the reporting seeds."""
    sizes = ("delayed", *SIZES, "non-finite")
    head = ["rule", "watches", "threshold", "false / 10k", "episodes", "benign flagged", *sizes, "late"]
    head += ["ramps", "delay", "damage", "natural", "before"]
    rows = []
    for name, rule in rules.items():
        events: Mapping[str, int] = rule["events"]
        missed = [f"{rule['missed'][size]} / {events[size]}" for size in sizes]
        late = sum(rule["late"][size] for size in SIZES)
        rows.append(
            [
                *(
                    name,
                    rule["watches"],
                    _short(rule["threshold"]),
                    _short(rule["false_per_10k"], 2),
                    _short(rule["episodes_per_10k"], 2),
                ),
                *(f"{rule['flagged_benign']} / {events['benign']}", *missed, late),
                *(f"{rule['ramps_caught']} / {rule['ramps']}", _short(rule["median_delay"])),
                *(
                    _short(rule["median_damage"], 2),
                    f"{rule['natural_seen']} / {rule['natural']}",
                    rule["natural_before"],
                ),
            ]
        )
    return head, rows


def robustness_table(rules: Mapping[str, Mapping[str, Any]]) -> Table:
    """Lock-out and NaN, by rule."""
    rows = [
        [name, "yes" if rule["locked_out"] else "no", "yes" if rule["survives_nan"] else "no", rule["longest_streak"]]
        for name, rule in rules.items()
    ]
    return ["rule", "locked out", "survives NaN", "longest streak of false refusals"], rows


def guard_table(guard: Mapping[str, Any]) -> Table:
    """What the gradient-norm guard adds to the default rule."""
    head = ["rule", "harmful events", "both", "guard only", "rule only", "neither", "harmless vetoed", "vetoes / 10k"]
    keys = ("harmful", "both", "guard only", "rule only", "neither")
    rows = [
        [name, *(row[key] for key in keys), f"{row['harmless vetoed']} / {row['harmless']}", _short(row["per_10k"], 2)]
        for name, row in guard.items()
    ]
    return head, rows


def noise_table(noise: Mapping[str, Mapping[str, Any]]) -> Table:
    """Refusals per 10,000 by family, one row per rule and threshold; the nominal rate where there is one."""
    families = list(next(iter(noise.values()))["families"]) if noise else []
    rows = []
    for name, row in noise.items():
        cells = [_noise_cell(row["families"][family]) for family in families]
        nominal = row.get("nominal_per_10k")
        rows.append([name, "" if nominal is None else _short(nominal), *cells])
    return ["rule", "nominal", *families], rows


def _noise_cell(outcome: Mapping[str, Any]) -> str:
    text = _short(outcome["per_10k"], 2)
    if outcome["longest"] > 8:
        text += f" (longest {outcome['longest']}"
        text += ", never back)" if outcome["came_back"] is None else ")"
    return text


def bloom_table(bloom: Mapping[str, Mapping[str, Any]]) -> Table:
    """When each rule first objects to the public trace."""
    rows = [
        [
            *(name, f"{row['seen']} / {row['lead_ins']}", "never" if row["median"] is None else f"{row['median']:+g}"),
            *("" if row["earliest"] is None else f"{row['earliest']:+d} to {row['latest']:+d}",),
            _short(row["false_in_lead"], 1),
        ]
        for name, row in bloom.items()
    ]
    return ["rule", "seen (lead-ins)", "first alarm, from the peak", "range", "false / 10k in the lead-in"], rows


def summarize_closed_loop(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """One line per arm over all its cells.

    Args:
        rows: Dicts with task, fault, seed, arm, regret (nats; may be NaN), fault_committed, extra_refused, deep,
            stopped, warned.
    """
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    summary = {}
    for arm, cells in arms.items():
        regrets = [cell["regret"] if math.isfinite(cell["regret"]) else math.inf for cell in cells]
        worst = cells[max(range(len(cells)), key=regrets.__getitem__)]
        summary[arm] = {
            "cells": len(cells),
            "within_0.02": sum(r <= 0.02 for r in regrets) / len(cells),
            "within_0.05": sum(r <= 0.05 for r in regrets) / len(cells),
            "above_0.2": sum(r > 0.2 for r in regrets) / len(cells),
            "median_regret": median(regrets),
            "worst": worst["regret"],
            "worst_cell": f"{worst['task']}, {worst['fault']}, seed {worst['seed']}",
            **{key: sum(int(cell[key]) for cell in cells) for key in ("fault_committed", "extra_refused", "deep")},
            "stopped": sum(bool(cell["stopped"]) for cell in cells),
            "warned": sum(cell["warned"] is not None and cell["warned"] is not False for cell in cells),
        }
    return summary


def summarize_clean(
    rows: Sequence[Mapping[str, Any]], steps: int, announces_jump: Callable[[str], bool]
) -> dict[str, dict[str, Any]]:
    """What each guarded arm did in runs without a fault.

    Args:
        rows: As for :func:`summarize_closed_loop`; regret is the change of the final loss.
        steps: Attempts of each run.
        announces_jump: Whether a task, by name, raises its learning rate at once, and says so.
    """
    summary: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        if arm in ("none", "perfect"):
            continue
        mine = [row for row in rows if row["arm"] == arm]
        smooth = [row for row in mine if not announces_jump(row["task"])]
        jumps = [row for row in mine if announces_jump(row["task"])]
        summary[arm] = {
            "smooth_steps": steps * len(smooth),
            "smooth_refusals": sum(row["extra_refused"] for row in smooth),
            "jump_steps": steps * len(jumps),
            "jump_refusals": sum(row["extra_refused"] for row in jumps),
            "warnings": sum(row.get("false_warnings", 0) for row in mine),
            "worst": max(row["regret"] for row in mine),
        }
    return summary


def clean_table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    """Clean runs in closed loop, one row per arm."""
    head = ["arm", "smooth steps", "refused", "steps with an announced jump", "refused", "warnings", "worst change"]
    rows = [
        [
            *(arm, row["smooth_steps"], row["smooth_refusals"], row["jump_steps"], row["jump_refusals"]),
            *(row["warnings"], _short(row["worst"], 3)),
        ]
        for arm, row in summary.items()
    ]
    return head, rows


def closed_loop_table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    """The closed loop, one row per arm."""
    head = ["arm", "cells", "regret <= .02", "<= .05", "> .2", "worst cell", "fault steps committed", "extra refused"]
    rows = [
        [
            *(arm, row["cells"], *(f"{100 * row[key]:.0f} %" for key in ("within_0.02", "within_0.05", "above_0.2"))),
            *(f"{_short(row['worst'], 3)} ({row['worst_cell']})", row["fault_committed"], row["extra_refused"]),
            *(row["deep"], row["stopped"], row["warned"]),
        ]
        for arm, row in summary.items()
    ]
    return [*head, "deep", "stopped", "warned"], rows


def _short(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    if math.isfinite(value) and value != 0 and abs(value) < 10.0**-digits:
        return f"{value:.0e}"
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if abs(value) < 1e4 else f"{value:.3g}"
