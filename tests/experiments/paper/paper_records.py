"""Hand-made runs for the tests of the paper's experiments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_stability.experiments.options import parse_options
from dist_stability.experiments.paper.plan import Grid, Run, words
from dist_stability.experiments.paper.protocol import ARMS, FAULTS, protocol
from dist_stability.experiments.paper.traces import Trace
from dist_stability.report.events import EventLog, write_json


def grid(out: Path, experiment: str = "text", **changes: Any) -> Grid:
    """A small grid of the quick protocol: one seed, one task, one mode."""
    chosen = changes.pop("protocol", None) or protocol(experiment, quick=True)
    asked = {"seeds": 1, "tasks": chosen.tasks[:1], "parallels": ("single",), "faults": FAULTS[:1], "arms": ARMS}
    return Grid(protocol=chosen, out=out, device="cpu", **{**asked, **changes})


def trace(probe: Sequence[float], **changes: Any) -> Trace:
    """A run that committed every batch; ``probe`` is the standing loss after each."""
    steps = len(probe)
    made: dict[str, Any] = {
        "batches": list(range(steps)),
        "probe": list(probe),
        "norms": [1.0] * steps,
        "actions": ["commit"] * steps,
        "measurements": list(probe),
        "innovations": [None] * steps,
        "bounds": [None] * steps,
        "taken_back": frozenset(),
        "undone": 0,
        "slowed": False,
        "final_probe": probe[-1],
        "evaluation": 2.0,
        "stopped": False,
        "guarded": False,
        "seconds": 10.0,
        "phases": {},
        "data": "made-up data",
        "layout": {"device": "cpu", "torch": "0", "source": "a", "platform": "none"},
    }
    return Trace(**{**made, **changes})


def write_run(
    asked: Grid,
    run: Run,
    *,
    final: float = 1.0,
    refused: Sequence[int] = (),
    undone: Sequence[int] = (),
    error: str = "",
    arguments: Sequence[str] | None = None,
    state: Mapping[str, str] | None = None,
) -> Path:
    """A run folder as the training program leaves it, with the settings of the run's own command line."""
    folder = asked.folder(run)
    options = parse_options(words(asked, run) if arguments is None else arguments, run.world_size)
    steps = [step for step in range(options.steps) if step not in options.skip_batches]
    with EventLog(folder / "events.jsonl") as log:
        for attempt, batch in enumerate(steps):
            log.append(
                {
                    "attempt": attempt,
                    "batch": batch,
                    "action": "rollback" if batch in refused else "commit",
                    "measurement": final,
                    "innovation": None if options.rule == "off" else 0.1,
                    "bound": None if options.rule == "off" else 0.2,
                    "signal": "",
                    "undone": [],
                    "learning_rate_factor": 1.0,
                    "seconds": {"step": 0.1, "probe": 0.2},
                    "probe": final,
                    "parameter_norm": 3.0,
                }
            )
    write_json(
        folder / "summary.json",
        {
            "finished": not error,
            **({"error": error} if error else {}),
            "settings": options.settings(),
            "world_size": run.world_size,
            "refused": list(refused),
            "undone": list(undone),
            "final_probe": final,
            "evaluation": None if error else final,
            "seconds": 5.0,
            "loop_seconds": 4.0,
            "data": "made-up data",
            "device": "cpu",
            "versions": {"torch": "0", "platform": "none"},
            "source": "a",
        },
    )
    if options.state_digest and not error:
        for rank in range(run.world_size):
            (folder / f"state-rank{rank}.json").write_text(json.dumps(state or {"weight": "a"}))
    return folder
