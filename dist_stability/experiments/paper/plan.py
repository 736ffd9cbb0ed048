"""Which runs an experiment consists of, in which order, and what each needs before its command line is known."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_stability.experiments.arms import PROGRAM, Arm
from dist_stability.experiments.options import show_ranges
from dist_stability.experiments.paper import search
from dist_stability.experiments.paper.protocol import (
    ARM_WORDS,
    ARMS,
    FAULTLESS,
    GUARDED,
    MAIN_FAULT,
    NO_FAULT,
    RANKS,
    TWIN,
    Protocol,
)
from dist_stability.report.events import read_json


class NotReady(RuntimeError):
    """A run's command line depends on a result that is not there; the message says which."""


@dataclass(frozen=True)
class Run:
    """One run of the training program.

    Attributes:
        task: Of the training program.
        parallel: "single", "ddp" or "fsdp2".
        fault: Name of the fault, or "none".
        arm: Name of the arm, or of a candidate of the search.
        seed: Of weights and batch order.
    """

    task: str
    parallel: str
    fault: str
    arm: str
    seed: int

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return 1 if self.parallel == "single" else RANKS

    def __str__(self) -> str:
        """Its folder below ``runs``."""
        return f"{self.task}/{self.parallel}/{self.fault}/{self.arm}/seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """What is asked for.

    Attributes:
        protocol: The numbers.
        out: The experiment's folder.
        seeds: Number of reporting seeds, from 0.
        tasks: The first one is the main one.
        parallels: The first one is the main one; the search is done in it.
        faults: Names.
        arms: Names.
        device: "auto", "cpu" or "cuda".
        data: Folder of CIFAR-10.
    """

    protocol: Protocol
    out: Path
    seeds: int
    tasks: tuple[str, ...]
    parallels: tuple[str, ...]
    faults: tuple[str, ...]
    arms: tuple[str, ...]
    device: str = "auto"
    data: Path | None = None

    @property
    def main_fault(self) -> str:
        """The fault of the figures and of the first table: the paper's, if it is asked for."""
        return MAIN_FAULT if MAIN_FAULT in self.faults else self.faults[0]

    def folder(self, run: Run) -> Path:
        """Where a run writes."""
        return self.out / "runs" / str(run)


def runs_of(grid: Grid) -> list[Run]:
    """All runs, in the order in which they are started; a run comes after those it needs."""
    wanted = [arm for arm in ARMS if arm in grid.arms or (arm == GUARDED and TWIN in grid.arms)]
    order: dict[Run, None] = {}
    for task in grid.tasks:
        for parallel in grid.parallels:
            for fault in (NO_FAULT, *grid.faults):
                for arm in wanted:
                    if (fault == NO_FAULT) != (arm in FAULTLESS):
                        continue
                    for seed in range(grid.seeds):
                        run = Run(task, parallel, fault, arm, seed)
                        order.update(dict.fromkeys([*needs(grid, run), run]))
    return list(order)


def needs(grid: Grid, run: Run) -> list[Run]:
    """The runs whose results a run's command line depends on, in their own order."""
    if run.arm == TWIN:
        return [Run(run.task, run.parallel, run.fault, GUARDED, run.seed)]
    arm, stage = (run.arm, 99) if run.arm in search.OWN else search.origin(run.arm)
    earlier = search.stages(grid.protocol, arm)[: stage - 1] if arm else []
    return [each for names in earlier for name in names for each in _candidate_runs(grid, run.task, name)]


def words(grid: Grid, run: Run) -> tuple[str, ...]:
    """The run's command line, without ``--out``; reads the results it depends on.

    Raises:
        NotReady: Such a result is missing, or rules the run out.
    """
    return (
        *grid.protocol.words(run.task),
        *("--parallel", run.parallel, "--device", grid.device, "--seed", str(run.seed)),
        *(("--data", str(grid.data)) if run.task == "cifar10" and grid.data is not None else ()),
        *_fault_words(grid, run),
        *_arm_words(grid, run),
    )


def arm_of(grid: Grid, run: Run) -> Arm:
    """The run as the launcher of ``torchrun`` knows it."""
    return Arm(str(run), str(run), words(grid, run), run.world_size)


def command(grid: Grid, run: Run) -> str:
    """What to type to get this run alone."""
    arm = arm_of(grid, run)
    if run.world_size > 1:
        return arm.command(grid.folder(run))
    return "OMP_NUM_THREADS=1 " + shlex.join(["python", "-m", PROGRAM, *arm.arguments, "--out", str(grid.folder(run))])


def candidates(grid: Grid, task: str, arm: str, stages: int | None = None) -> list[search.Candidate]:
    """The finished candidates of a task's search, in the order of preference.

    Args:
        grid: The experiment.
        task: Of the training program.
        arm: The searched arm.
        stages: Only these first stages; None for all, where a later one may be unfinished.

    Raises:
        NotReady: A run is missing that is not of a later stage of an unfinished search.
    """
    found: list[search.Candidate] = []
    for number, names in enumerate(search.stages(grid.protocol, arm)[:stages]):
        for name in names:
            try:
                found.append(_candidate(grid, task, name))
            except NotReady:
                if number == 0 or stages is not None:
                    raise
                return found
    return found


def _fault_words(grid: Grid, run: Run) -> Iterator[str]:
    if run.fault != NO_FAULT and run.arm != TWIN:
        for spec in grid.protocol.injection(run.fault, run.world_size).specs:
            yield from ("--inject", spec)


def _arm_words(grid: Grid, run: Run) -> tuple[str, ...]:
    if run.arm in search.OWN:
        stages = len(search.stages(grid.protocol, run.arm))
        return search.words(run.arm, search.choose(run.arm, candidates(grid, run.task, run.arm, stages)))
    arm, stage = search.origin(run.arm)
    if arm:
        before = search.choose(arm, candidates(grid, run.task, arm, stage - 1)) if stage > 1 else None
        return search.words(arm, search.tried(run.arm, before))
    if run.arm == TWIN:
        guarded = Run(run.task, run.parallel, run.fault, GUARDED, run.seed)
        summary = _summary(grid, guarded)
        if not summary["finished"]:
            raise NotReady(f"{guarded} was stopped before its end: it has no twin")
        dropped = sorted({*summary["refused"], *summary["undone"]})
        return (*ARM_WORDS[TWIN], *(("--skip-batches", show_ranges(dropped)) if dropped else ()))
    return ARM_WORDS[run.arm]


def _candidate_runs(grid: Grid, task: str, arm: str) -> list[Run]:
    """A candidate's runs with the paper's fault, then those without any."""
    return [
        Run(task, grid.parallels[0], fault, arm, seed)
        for fault in (MAIN_FAULT, NO_FAULT)
        for seed in grid.protocol.tuning_seeds
    ]


def _candidate(grid: Grid, task: str, arm: str) -> search.Candidate:
    summaries = {run: _summary(grid, run) for run in _candidate_runs(grid, task, arm)}
    settings = next(iter(summaries.values()))["settings"]
    searched, _ = search.origin(arm)
    faulty = [summary for run, summary in summaries.items() if run.fault != NO_FAULT]
    clean = [summary for run, summary in summaries.items() if run.fault == NO_FAULT]
    return search.Candidate(
        values={name: settings[name] for name in search.OWN[searched]},
        finals=tuple(summary["final_probe"] for summary in faulty),
        false_refusals=sum(len(summary["refused"]) + len(summary["undone"]) for summary in clean),
        stopped=sum(not summary["finished"] for summary in (*faulty, *clean)),
    )


def _summary(grid: Grid, run: Run) -> dict[str, Any]:
    path = grid.folder(run) / "summary.json"
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise NotReady(f"{run} has no result ({type(error).__name__})") from error
