"""``dist-stability bench detection``: record, replay, count, and write what a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_stability.bench.detection.pages import write_pages
from dist_stability.bench.detection.parts import FULL, PARTS, QUICK, REPORTING, TUNING, Setup
from dist_stability.report.events import read_json, write_json
from dist_stability.report.versions import versions


def bench(
    out: Path,
    *,
    seeds: int = 2,
    quick: bool = False,
    parts: Sequence[str] = tuple(PARTS),
    workers: int = 2,
    arms: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Run some parts and write ``summary.json``, ``tables.md``, ``roc.png`` and ``report.html``.

    Recordings and finished cells of the closed loop that are in the folder are used again, the latter even if a rule
    has changed since: then delete ``closed_loop.jsonl``. Replays are not kept, since they depend on the rules. Parts
    that are not asked for keep what an earlier summary in the folder says about them.

    Args:
        out: The folder.
        seeds: Number of seeds for tuning (from 0) and, again, for reporting (from 106); 1 to 106.
        quick: Far too little for a figure; the same code.
        parts: Some of :data:`PARTS`.
        workers: Processes.
        arms: Names of the arms of the closed loop; default all, which takes hours.
        tasks: Names of the tasks of the closed loop; default all.

    Returns:
        The summary.

    Raises:
        ValueError: ``seeds`` is out of range, or a part or an arm has an unknown name.
    """
    if not 1 <= seeds <= REPORTING - TUNING:
        raise ValueError(f"--seeds must be between 1 and {REPORTING - TUNING}, got {seeds}")
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"--parts must be some of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "summary.json"
    extent = QUICK if quick else FULL
    setup = Setup(
        out,
        extent,
        tuple(range(TUNING, TUNING + seeds)),
        tuple(range(REPORTING, REPORTING + seeds)),
        workers,
        None if arms is None else tuple(arms),
        None if tasks is None else tuple(tasks),
    )
    before = read_json(path) if path.is_file() else {}
    # A part is only kept beside the others if it was made with the same seeds and extent.
    same = before.get("seeds") == _seeds(setup) and before.get("quick") == quick
    summary: dict[str, Any] = before if same else {}
    summary |= {"quick": quick, "seeds": _seeds(setup), "versions": versions()}
    for name, part in PARTS.items():
        if name in parts:
            summary |= part(setup, summary)
            write_json(path, summary)
            write_pages(out, summary)
    return summary


def _seeds(setup: Setup) -> dict[str, Any]:
    return {
        "tuning": list(setup.tuning),
        "reporting": list(setup.reporting),
        "note": "thresholds are tuned on the tuning seeds only; every other figure is from the reporting seeds",
    }
