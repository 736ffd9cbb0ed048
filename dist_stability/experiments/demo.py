"""The demo: the same training run four times, with and without a fault, with and without the guard.

A small character Transformer is trained under FSDP2 on two processes. For ten steps its gradients are multiplied by
300, the fault of the controller paper's protocol. The arms are:

* ``clean``: no fault, no guard: how good the run can be;
* ``baseline``: the fault, no guard: what it costs;
* ``guarded``: the fault, and the guard with its default rule;
* ``twin``: no fault, no guard, and the batches that ``guarded`` refused are fetched and dropped before the forward.
  ``guarded`` has to end in the same state, bit for bit.

Protocol, fixed on runs without the guard: cosine schedule with warm-up, as in common practice. It matters that the
scheduler only counts accepted steps: ten batches less then cost ten steps of the tail, where the learning rate is
almost 0, and the recovery gap measures the damage that got through rather than ten missing batches.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_stability.experiments.arms import Arm, run_arm, state_files
from dist_stability.experiments.digests import differences
from dist_stability.experiments.options import show_ranges
from dist_stability.experiments.text import DATA_NAME
from dist_stability.report import html
from dist_stability.report.build import Words, write_report
from dist_stability.report.events import write_json
from dist_stability.report.runs import RunRecord, load_run
from dist_stability.report.versions import versions

WORLD_SIZE = 2
PARALLEL = "fsdp2"
STEPS = 300
FAULT_STEP, FAULT_LENGTH, FAULT_FACTOR = 120, 10, 300
FAULT = f"gradient-scale:step={FAULT_STEP},factor={FAULT_FACTOR},length={FAULT_LENGTH}"
INJECTED = list(range(FAULT_STEP, FAULT_STEP + FAULT_LENGTH))

DAMAGE_NEEDED = 0.05
"""Smallest baseline - clean, in nats, that makes the recovery gap worth computing."""

GAP_ALLOWED = 0.02
"""Largest recovery gap of a demo that shows what it promises."""

COMMON = (
    *("--task", "text", "--parallel", PARALLEL, "--device", "cpu", "--steps", str(STEPS), "--batch-size", "64"),
    *("--lr", "2e-3", "--warmup", "20", "--schedule", "cosine", "--probe-size", "64", "--seed", "0", "--state-digest"),
)


@dataclass(frozen=True)
class Outcome:
    """What the four runs show.

    Attributes:
        summary: For ``summary.json``.
        sentence: What happened.
        problems: What the demo failed to show; empty if it succeeded.
    """

    summary: dict[str, Any]
    sentence: str
    problems: list[str]


def demo(out: Path) -> int:
    """Run what is missing, then write the table, the figure, the report and the summary.

    Args:
        out: The folder; finished arms in it are used again if their settings and versions are the same.

    Returns:
        0 if the demo shows what it promises, else 1.

    Raises:
        ArmFailed: A run ended with an error.
    """
    begin = time.monotonic()
    arms = [
        _arm("clean", "1/4 clean: no fault, no guard", "--rule", "off"),
        _arm("baseline", "2/4 baseline: fault, no guard", "--rule", "off", "--inject", FAULT),
        _arm("guarded", "3/4 guarded: fault and guard", "--rule", "predictive", "--inject", FAULT),
    ]
    for arm in arms:
        _run(arm, out)
    guarded = load_run(out / "guarded")
    dropped = sorted({*guarded.summary["refused"], *guarded.summary["undone"]})
    skip = ("--skip-batches", show_ranges(dropped)) if dropped else ()
    twin = _arm("twin", "4/4 golden twin of guarded", "--rule", "off", *skip)
    _run(twin, out)
    arms.append(twin)

    runs = {arm.name: load_run(out / arm.name) for arm in arms}
    unequal = _unequal(arms[2], twin, out)
    outcome = judge(runs, unequal)
    seconds = time.monotonic() - begin
    commands = [arm.command(out / arm.name) for arm in arms]
    write_json(
        out / "summary.json",
        {
            **outcome.summary,
            "sentence": outcome.sentence,
            "problems": outcome.problems,
            "twin_differences": unequal,
            "total_seconds": seconds,
            "commands": commands,
            "versions": versions(),
        },
    )
    write_report(list(runs.values()), out, _words(outcome, commands), _html_table(outcome.summary))
    print(f"\n{_text_table(outcome.summary)}\n\n{outcome.sentence}\n")
    print(f"{out / 'report.html'}, {out / 'probe_loss.png'}, {out / 'summary.json'} ({seconds:.0f} s)", flush=True)
    return 1 if outcome.problems else 0


def judge(runs: dict[str, RunRecord], unequal: Sequence[str]) -> Outcome:
    """Turn four runs into what the demo says.

    Args:
        runs: By arm name.
        unequal: Names of state entries in which the guarded run and its twin differ, over all ranks.
    """
    arms = {name: _measures(runs[name]) for name in ("clean", "baseline", "guarded")}
    clean, baseline, guarded = (arms[name]["final_probe"] for name in ("clean", "baseline", "guarded"))
    damage = baseline - clean
    # Not >=: an unguarded run that ended in NaN did damage, but there is no gap to compute.
    gap = (guarded - clean) / damage if damage >= DAMAGE_NEEDED and math.isfinite(damage) else None
    refused = arms["guarded"]["refused_steps"]
    problems = []
    if gap is None:
        problems.append(f"the fault did too little damage to measure a recovery (baseline - clean = {damage:.4f})")
    elif not gap <= GAP_ALLOWED:
        problems.append(f"the recovery gap is {gap:.4f}, more than {GAP_ALLOWED}")
    if refused != INJECTED:
        problems.append(
            f"the guarded run refused the steps {show_ranges(refused) or 'none'} instead of {show_ranges(INJECTED)}"
        )
    if unequal:
        problems.append(f"the guarded run is not its golden twin: {len(unequal)} entries differ, first {unequal[0]}")
    if problems:
        sentence = f"The demo failed: {'; '.join(problems)}."
    else:
        sentence = (
            f"Gradients multiplied by {FAULT_FACTOR} for {FAULT_LENGTH} steps raised the final probe loss of the "
            f"unguarded run from {clean:.3f} to {baseline:.3f}; the guarded run refused exactly those {FAULT_LENGTH} "
            f"steps on both ranks, ended at {guarded:.3f}, and is bit for bit the run that never saw the "
            f"{FAULT_LENGTH} batches."
        )
    summary = {
        "world_size": WORLD_SIZE,
        "parallel": PARALLEL,
        "recovery_gap": gap,
        "golden_twin_equal": not unequal,
        "arms": arms,
        "twin": _measures(runs["twin"]),
        "data": DATA_NAME,
        "steps": STEPS,
        "fault": FAULT,
        "injected_steps": INJECTED,
    }
    return Outcome(summary, sentence, problems)


def _arm(name: str, title: str, *arguments: str) -> Arm:
    return Arm(name, title, (*COMMON, *arguments), WORLD_SIZE)


def _run(arm: Arm, out: Path) -> None:
    if not run_arm(arm, out / arm.name):
        print(f"{arm.title}: already there in {out / arm.name}", flush=True)


def _unequal(guarded: Arm, twin: Arm, out: Path) -> list[str]:
    """Entries of the final state in which two arms differ, on any rank."""
    said = []
    pairs = zip(state_files(guarded, out / guarded.name), state_files(twin, out / twin.name), strict=True)
    for rank, (first, second) in enumerate(pairs):
        images = [json.loads(path.read_text(encoding="utf-8")) for path in (first, second)]
        said += [f"rank {rank}: {name}" for name in differences(*images)]
    return said


def _measures(run: RunRecord) -> dict[str, Any]:
    """What the summary says about one arm."""
    probe = dict(zip(run.summary["probe"]["batch"], run.summary["probe"]["value"], strict=True))
    refused = run.summary["refused"]
    return {
        "final_probe": run.summary["final_probe"],
        "probe_before_fault": probe[FAULT_STEP - 1],
        "peak_probe": max(math.inf if math.isnan(y) else y for batch, y in probe.items() if batch >= FAULT_STEP),
        "refused_steps": refused,
        "false_refusals": len(set(refused) - set(INJECTED)),
        "seconds": run.summary["seconds"],
        "held_out_loss": run.summary["evaluation"],
    }


_HEAD = ("run", "before the fault", "peak after", "final", "other held-out text", "refused", "seconds")


def _rows(summary: dict[str, Any]) -> list[tuple[Any, ...]]:
    arms = {**summary["arms"], "twin": summary["twin"]}
    return [
        (
            name,
            f"{arm['probe_before_fault']:.4f}",
            f"{arm['peak_probe']:.4f}",
            f"{arm['final_probe']:.4f}",
            f"{arm['held_out_loss']:.4f}",
            show_ranges(arm["refused_steps"]) or "-",
            f"{arm['seconds']:.0f}",
        )
        for name, arm in arms.items()
    ]


def _text_table(summary: dict[str, Any]) -> str:
    rows = [_HEAD, *_rows(summary)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _html_table(summary: dict[str, Any]) -> str:
    gap = summary["recovery_gap"]
    facts = (
        f"Recovery gap (guarded - clean) / (baseline - clean): {'not defined' if gap is None else f'{gap:.4f}'}; 0 is "
        f"perfect, 1 is useless. Guarded run equal to its golden twin, every bit of the state on every rank: "
        f"{'yes' if summary['golden_twin_equal'] else 'no'}."
    )
    return html.table(_HEAD, _rows(summary)) + html.paragraph(facts)


def _words(outcome: Outcome, commands: Sequence[str]) -> Words:
    return Words(
        title="A training run that undoes its own bad updates",
        subtitle=f"Character Transformer on the {DATA_NAME}, {PARALLEL.upper()} on {WORLD_SIZE} processes",
        sentence=outcome.sentence,
        failed=bool(outcome.problems),
        figure_title=f"Ten bad updates, refused: {DATA_NAME}" if not outcome.problems else f"Probe loss: {DATA_NAME}",
        figure_subtitle=(
            f"Character Transformer, {PARALLEL.upper()} on {WORLD_SIZE} processes; gradients x{FAULT_FACTOR} at steps "
            f"{FAULT_STEP} to {FAULT_STEP + FAULT_LENGTH - 1}"
        ),
        labels={
            "clean": "no fault",
            "baseline": "fault, unguarded",
            "guarded": "fault, guarded",
            "twin": "golden twin",
        },
        commands=["dist-stability demo --out out/demo", "", *commands],
    )
