"""What a run folder says about its run: ended or not, and whether it is the run that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

from dist_stability.experiments.arms import Arm, state_files
from dist_stability.experiments.options import parse_options
from dist_stability.report.events import from_json, read_json, to_json

FINISHED, STOPPED = "finished", "stopped"


def ended(arm: Arm, folder: Path) -> str | None:
    """How the run in a folder ended: "finished", "stopped" (its budgets were spent: a result), or None.

    None also for a run with other settings or another number of processes. The code and the versions it was made with
    do not matter here, nor where its data lay, nor, if it may run on any device, on which it did: a finished run is
    never run again, and the experiment's summary lists what was mixed.
    """
    try:
        summary = read_json(folder / "summary.json")
    except (OSError, ValueError):
        return None
    wanted = from_json(json.loads(json.dumps(to_json(parse_options(arm.arguments, arm.world_size).settings()))))
    free = {"data", "device"} if "auto" in arm.arguments else {"data"}
    found = summary.get("settings", {})
    if {**found, **{name: wanted[name] for name in free}} != wanted or summary.get("world_size") != arm.world_size:
        return None
    if summary.get("finished"):
        return FINISHED if all(path.is_file() for path in state_files(arm, folder)) else None
    return STOPPED if summary.get("error") == "StabilityStop" else None


def states(arm: Arm, folder: Path) -> list[dict[str, str]] | None:
    """Digests of the final state, one for each rank; None if the run wrote none."""
    files = state_files(arm, folder)
    if not files or not all(path.is_file() for path in files):
        return None
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]
