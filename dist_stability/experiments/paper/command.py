"""``dist-stability experiment text|vision``: run the grid, or what is missing of it, and write down what it shows."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dist_stability.experiments.paper.group import run_in_group
from dist_stability.experiments.paper.outcomes import LEFT_OUT, Outcomes
from dist_stability.experiments.paper.pages import write_pages
from dist_stability.experiments.paper.plan import Grid, NotReady, command, runs_of
from dist_stability.experiments.paper.pool import run_in_pool
from dist_stability.experiments.paper.protocol import (
    ARMS,
    FAULTS,
    GUARDED,
    MAIN_FAULT,
    PARALLEL,
    RANKS,
    ROLLBACK,
    TUNED,
    protocol,
)
from dist_stability.experiments.paper.results import Results, load_results, summarize
from dist_stability.report.events import read_json, to_json, write_json
from dist_stability.report.versions import versions

DEFAULT_SEEDS = {"text": 20, "vision": 5}
ALL = "all"


def experiment(
    name: str,
    out: Path,
    *,
    seeds: int | None = None,
    arms: Sequence[str] | None = None,
    faults: Sequence[str] = (MAIN_FAULT,),
    parallels: Sequence[str] = ("single",),
    tasks: Sequence[str] | None = None,
    workers: int = 1,
    device: str = "auto",
    data: Path | None = None,
    probe_size: int | None = None,
    width: int | None = None,
    layers: int | None = None,
    quick: bool = False,
) -> int:
    """Run what is missing, then write ``summary.json``, the figures, ``report.html`` and ``tables.md``.

    A finished run in the folder is never run again. Everything finished in the folder is shown, whether this call
    asked for it or not, for the seeds asked for.

    Args:
        name: "text" or "vision".
        out: The folder.
        seeds: Number of reporting seeds, from 0; default 20 for text, 5 for vision, 1 when quick.
        arms: Names; default all. The golden twin brings the guarded arm with it.
        faults: Names, or "all".
        parallels: Parallel modes; the first one is the main one.
        tasks: Of the training program; default all of the experiment. The first one is the main one.
        workers: Processes at a time; without meaning under ``torchrun``.
        device: "auto", "cpu" or "cuda".
        data: Folder of CIFAR-10, for vision; without the data set in it, scikit-learn's digits.
        probe_size: Held-out examples in the probe; default: see :func:`protocol`.
        width: Of the Transformer of text; default: the usual one.
        layers: Likewise.
        quick: A few steps of everything.

    Returns:
        0, or 1 if a run failed.

    Raises:
        ValueError: A name is not known, or does not fit this machine; nothing was started.

    Collectives: under ``torchrun`` all ranks call it together, and the runs are done in their group.
    """
    chosen = protocol(name, data=data, quick=quick, probe_size=probe_size, width=width, layers=layers)
    grid = Grid(
        protocol=chosen,
        out=out,
        seeds=(1 if quick else DEFAULT_SEEDS[name]) if seeds is None else seeds,
        tasks=_known("--tasks", tasks, chosen.tasks),
        parallels=_known("--parallel", parallels, PARALLEL),
        faults=FAULTS if ALL in faults else _known("--faults", faults, FAULTS),
        arms=_known("--arms", arms, ARMS),
        device=device,
        data=data,
    )
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    _check(grid, kind, workers)
    _claim(grid)
    runs = runs_of(grid)
    begin = time.monotonic()
    if _launched():
        mine = run_in_group(grid, runs, kind)
        if mine is None:
            return 0
        outcomes = mine
    else:
        if name == "vision" and data is not None and "cifar10" not in chosen.tasks:
            print(f"no CIFAR-10 in {data.absolute()}: the digits of scikit-learn instead", flush=True)
        outcomes = run_in_pool(grid, runs, workers)
    return _conclude(grid, outcomes, quick=quick, seconds=time.monotonic() - begin)


def _conclude(grid: Grid, outcomes: Outcomes, *, quick: bool, seconds: float) -> int:
    """Write everything down; returns the exit status."""
    results = load_results(grid)
    found = summarize(results)
    failed = outcomes.failed()
    warnings = [
        f"runs of several versions are mixed: {name} {', '.join(map(str, counts))}"
        for name, counts in found["made_with"].items()
        if name in ("source", "torch", "device") and len(counts) > 1
    ]
    summary: dict[str, Any] = {
        "experiment": grid.protocol.experiment,
        "quick": quick,
        "sentence": _sentence(found),
        "seeds": {
            "reporting": list(range(grid.seeds)),
            "tuning": list(grid.protocol.tuning_seeds),
            "note": f"the tuning seeds are used in the searches for {TUNED} and {ROLLBACK}, and nowhere else",
        },
        **found,
        "failed": failed,
        "left_out": {
            str(run): how.removeprefix(LEFT_OUT) for run, how in outcomes.ended.items() if how.startswith(LEFT_OUT)
        },
        "warnings": warnings,
        "command": _own_command(grid, quick),
        "started_now": outcomes.started,
        "seconds_now": seconds,
        "versions": versions(),
    }
    commands = [summary["command"], "", *_commands(grid, results)]
    names = write_pages(results, summary, commands)
    write_json(grid.out / "summary.json", summary)
    print(f"\n{summary['sentence']}\n\n{', '.join(str(grid.out / each) for each in ('summary.json', *names))}")
    for warning in warnings:
        print(f"warning: {warning}")
    for run, why in failed.items():
        print(f"failed: {run}: {why}")
    print(f"{outcomes.started} runs were started, {len(failed)} failed ({seconds:.0f} s)", flush=True)
    return 1 if failed else 0


def _sentence(found: dict[str, Any]) -> str:
    """What the main table says about the guarded arm."""
    guarded, twin = found["arms"].get(GUARDED), found["twin"]
    main = found["main"]
    data = found["data"][main["task"]]
    if guarded is None:
        return f"No guarded run on {data} under {main['fault']} has finished yet."
    gap, refused = guarded["recovery_gap"], guarded["refused_inside"]["values"]
    told = "is not defined" if gap["mean"] is None else f"is {gap['mean']:.4f} in the mean"
    seeds = f"{len(refused)} seed{'s' if len(refused) > 1 else ''}"
    return (
        f"Guarded, {data} under {main['fault']}, {seeds}: {min(refused)} to {max(refused)} faulty steps "
        f"refused, {sum(guarded['false_refusals']['values'])} others in all; the recovery gap {told}; "
        f"{twin['equal']} of {twin['compared']} runs equal to their golden twin, every bit."
    )


def _commands(grid: Grid, results: Results) -> list[str]:
    """Command lines of the first seed's runs with the main fault and with none."""
    main = results.main
    shown = []
    for run in results.traces:
        if (run.task, run.parallel) == main[:2] and run.fault in ("none", main[2]) and run.seed == 0:
            try:
                shown.append(command(grid, run))
            except NotReady:
                continue
    return shown


def _own_command(grid: Grid, quick: bool) -> str:
    """What to type to get all of it."""
    start = ["torchrun", f"--nproc_per_node={RANKS}", "-m", "dist_stability"] if _launched() else ["dist-stability"]
    words = [*start, "experiment", grid.protocol.experiment, "--seeds", str(grid.seeds)]
    for option, names in (("tasks", grid.tasks), ("parallel", grid.parallels), ("faults", grid.faults)):
        words += [f"--{option}", *names]
    if grid.arms != ARMS:
        words += ["--arms", *grid.arms]
    usual = protocol(grid.protocol.experiment, data=grid.data, quick=quick).probe_size
    if grid.protocol.probe_size != usual:
        words += ["--probe-size", str(grid.protocol.probe_size)]
    for option in ("width", "layers"):
        if (value := getattr(grid.protocol, option)) is not None:
            words += [f"--{option}", str(value)]
    words += ["--device", grid.device, *(["--data", str(grid.data)] if grid.data is not None else [])]
    words += [*(["--quick"] if quick else []), "--out", str(grid.out)]
    return shlex.join(words)


def _known(option: str, names: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """The names, once each, in the order given; all that are known if None."""
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"{option}: unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    return tuple(dict.fromkeys(known if names is None else names))


def _check(grid: Grid, device: str, workers: int) -> None:
    """Refuse what could not work, before anything is started.

    Raises:
        ValueError: With what to do instead.
    """
    if grid.seeds < 1 or grid.seeds > min(grid.protocol.tuning_seeds):
        raise ValueError(f"--seeds {grid.seeds}: must be 1 to {min(grid.protocol.tuning_seeds)}")
    if workers < 1:
        raise ValueError(f"--workers {workers}: must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no CUDA device")
    spread = [parallel for parallel in grid.parallels if parallel != "single"]
    if device == "cuda" and spread and torch.cuda.device_count() < RANKS:
        raise ValueError(f"--parallel {spread[0]}: needs {RANKS} CUDA devices, or --device cpu")
    if _launched():
        world = int(os.environ["WORLD_SIZE"])
        if world != RANKS:
            raise ValueError(f"torchrun has started {world} processes; the experiment takes {RANKS}")
        if len(spread) < len(grid.parallels):
            raise ValueError("--parallel single: does not go with torchrun; choose ddp or fsdp2, or start it alone")


def _claim(grid: Grid) -> None:
    """Leave the protocol in the folder, or find it there: runs of another one would be overwritten.

    Raises:
        ValueError: The folder is another protocol's.
    """
    mine = {name: value for name, value in asdict(grid.protocol).items() if name != "tasks"}
    path = grid.out / "protocol.json"
    if path.is_file() and read_json(path) != to_json(mine):
        raise ValueError(f"--out {grid.out}: holds runs of another protocol (see {path}); choose another folder")
    if int(os.environ.get("RANK", "0")) == 0:
        grid.out.mkdir(parents=True, exist_ok=True)
        write_json(path, mine)


def _launched() -> bool:
    """Whether ``torchrun`` has started this process."""
    return "WORLD_SIZE" in os.environ
