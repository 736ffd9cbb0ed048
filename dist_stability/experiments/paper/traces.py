"""A run reduced to the numbers the tables and figures are made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_stability.report.runs import REFUSALS, RunRecord, load_run


@dataclass(frozen=True)
class Trace:
    """One run; lists have one entry for each attempt.

    Attributes:
        batches: Batch number.
        probe: Probe loss (nats) of the state that stands after the attempt; infinite where it is no number.
        norms: l2 norm of that state's parameters.
        actions: Outcome, as in :class:`~dist_stability.verdict.Action`.
        measurements: Probe loss of the proposal; None where it was not measured.
        innovations: None where nothing was judged.
        bounds: None where nothing was judged.
        taken_back: Attempts that were accepted and undone later.
        undone: Number of batches that were undone and not repeated.
        slowed: Whether an attempt ran at a lowered learning rate.
        final_probe: Probe loss at the end; infinite if it is no number.
        evaluation: Loss on held-out data the probe does not use; None for a run that was stopped.
        stopped: It ended before its end, its budgets spent.
        guarded: A rule judged it.
        seconds: Wall time of the loop, without what was written down.
        phases: Wall time of each phase of ``step()``, over all attempts.
        data: What the data are called.
        layout: What the run ran on, and the code, for people: device, torch, source digest.
    """

    batches: Sequence[int]
    probe: Sequence[float]
    norms: Sequence[float | None]
    actions: Sequence[str]
    measurements: Sequence[float | None]
    innovations: Sequence[float | None]
    bounds: Sequence[float | None]
    taken_back: frozenset[int]
    undone: int
    slowed: bool
    final_probe: float
    evaluation: float | None
    stopped: bool
    guarded: bool
    seconds: float
    phases: dict[str, float]
    data: str
    layout: dict[str, str]

    @property
    def refused(self) -> list[int]:
        """Attempts that were refused."""
        return [attempt for attempt, action in enumerate(self.actions) if action in REFUSALS]

    @property
    def attenuated(self) -> list[int]:
        """Attempts that were accepted in part."""
        return [attempt for attempt, action in enumerate(self.actions) if action == "attenuate"]


def load_trace(folder: Path) -> Trace:
    """Read a run folder.

    Raises:
        NoRun: It holds no event log.
    """
    return trace_of(load_run(folder))


def trace_of(run: RunRecord) -> Trace:
    """Reduce a run that finished or was stopped."""
    events, summary = run.events, run.summary
    phases: Counter[str] = Counter()
    for event in events:
        phases.update(event["seconds"])
    evaluation = summary["evaluation"]
    return Trace(
        batches=[run.batch(event) for event in events],
        probe=[number(event["probe"]) for event in events],
        norms=[event.get("parameter_norm") for event in events],
        actions=[event["action"] for event in events],
        measurements=[event["measurement"] for event in events],
        innovations=[event["innovation"] for event in events],
        bounds=[event["bound"] for event in events],
        taken_back=frozenset(attempt for event in events for attempt in event["undone"]),
        undone=len(summary["undone"]),
        slowed=any(event.get("learning_rate_factor", 1.0) != 1.0 for event in events),
        final_probe=number(summary["final_probe"]),
        evaluation=None if evaluation is None else number(evaluation),
        stopped=not summary["finished"],
        guarded=run.settings["rule"] != "off",
        seconds=summary.get("loop_seconds", summary["seconds"]),  # runs of older versions have the latter alone
        phases=dict(phases),
        data=summary["data"],
        layout=_layout(summary),
    )


def number(value: float | None) -> float:
    """A loss; one that is no number, or not there, counts as infinite."""
    return math.inf if value is None or math.isnan(value) else value


def _layout(summary: dict[str, Any]) -> dict[str, str]:
    return {
        "device": summary["device"],
        "torch": summary["versions"]["torch"],
        "source": summary["source"],
        "platform": summary["versions"]["platform"],
    }
