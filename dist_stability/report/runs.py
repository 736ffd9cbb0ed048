"""A finished (or crashed) run, read back from its folder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_stability.report.events import read_events, read_json
from dist_stability.testing import FaultInjector

REFUSALS = ("veto", "rollback", "deep_rollback", "reload")
PREFLIGHT = "preflight"
"""The action of an event that is about no attempt."""

FAULTS_IN_NUMBERS = ("gradient-scale", "nan", "inf", "bit-flip", "shuffled-labels", "learning-rate")


class NoRun(RuntimeError):
    """A folder does not hold what a report is made of."""


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: What it is called in tables and figures.
        events: The event log, in order; one event per attempt.
        summary: What the run wrote at its end; empty if it did not get there.
    """

    name: str
    events: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The run's options."""
        found: dict[str, Any] = self.summary.get("settings", {})
        return found

    @property
    def guarded(self) -> bool:
        """Whether a rule judged the run, or a guard spoke up in it."""
        return any(event["innovation"] is not None or event["signal"] for event in self.events)

    @property
    def refusals(self) -> list[dict[str, Any]]:
        """Events of vetoes, rollbacks and reloads."""
        return [event for event in self.events if event["action"] in REFUSALS]

    @property
    def notable(self) -> list[dict[str, Any]]:
        """Events of everything that was not simply accepted, and of the first warning of each stretch of them."""
        chosen, warned = [], False
        for event in self.events:
            warning = bool(event.get("warning"))
            if event["action"] in (*REFUSALS, "attenuate") or (warning and not warned):
                chosen.append(event)
            warned = warning
        return chosen

    @property
    def would_refuse(self) -> list[dict[str, Any]]:
        """Events of proposals that were accepted because the run only observed."""
        return [event for event in self.events if event.get("would") in REFUSALS]

    @property
    def edge(self) -> list[tuple[int, dict[str, Any]]]:
        """By batch, what the monitor of the edge of stability said; empty without one."""
        return [(self.batch(event), event["edge"]) for event in self.events if event.get("edge")]

    def batch(self, event: dict[str, Any]) -> int:
        """The batch an event is about; logs of other programs know the attempt only."""
        number: int = event.get("batch", event["attempt"])
        return number

    def series(self, field: str) -> tuple[list[int], list[float]]:
        """Batch numbers and values of one number in the events, where it is finite."""
        points = [(self.batch(event), event.get(field)) for event in self.events]
        kept = [(x, float(y)) for x, y in points if y is not None and math.isfinite(y)]
        return [x for x, _ in kept], [y for _, y in kept]

    def state_probe(self) -> tuple[list[int], list[float]]:
        """Batch numbers and probe loss of the state after each: refused proposals do not count."""
        if any("probe" in event for event in self.events):
            return self.series("probe")
        accepted = [event for event in self.events if event["action"] not in REFUSALS]
        return RunRecord(self.name, accepted, {}).series("measurement")

    def fault_windows(self) -> list[tuple[int, int]]:
        """First and last batch of each injected fault in numbers."""
        batches = {event["attempt"]: self.batch(event) for event in self.events}
        windows = []
        for fault in FaultInjector.parse(self.settings.get("inject", ())).faults:
            hit = [batches[a] for a in range(fault.step, fault.step + fault.length) if a in batches]
            if hit and fault.kind in FAULTS_IN_NUMBERS:
                windows.append((hit[0], hit[-1]))
        return windows


def load_run(folder: Path, name: str | None = None) -> RunRecord:
    """Read one run folder.

    Raises:
        NoRun: It holds no ``events.jsonl``.
        ValueError: The log is damaged.
    """
    log = folder / "events.jsonl"
    if not log.is_file():
        raise NoRun(f"no events.jsonl in {folder.absolute()}: give the folder that a training run was told with --out")
    summary = folder / "summary.json"
    events = [event for event in read_events(log) if event["action"] != PREFLIGHT]
    return RunRecord(name or folder.absolute().name, events, read_json(summary) if summary.is_file() else {})


def load_runs(folder: Path) -> list[RunRecord]:
    """The run in a folder, or all runs in the folders directly inside it, by name.

    Raises:
        NoRun: There is none.
    """
    if (folder / "events.jsonl").is_file():
        return [load_run(folder)]
    inside: Iterable[Path] = sorted(path.parent for path in folder.glob("*/events.jsonl")) if folder.is_dir() else ()
    runs = [load_run(path) for path in inside]
    if not runs:
        raise NoRun(
            f"no run in {folder.absolute()}: looked for events.jsonl there and in the folders directly inside it"
        )
    return runs
