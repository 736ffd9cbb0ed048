"""All finished runs of an experiment's folder, and what they say together: the contents of ``summary.json``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dist_stability.experiments.digests import differences
from dist_stability.experiments.paper import measures, search
from dist_stability.experiments.paper.folders import ended, states
from dist_stability.experiments.paper.plan import Grid, NotReady, Run, arm_of, candidates
from dist_stability.experiments.paper.protocol import (
    ARMS,
    FAULTLESS,
    FAULTS,
    GUARDED,
    NO_FAULT,
    PARALLEL,
    TWIN,
)
from dist_stability.experiments.paper.traces import Trace, load_trace, number

Table = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The finished runs, reduced.

    Attributes:
        grid: The experiment.
        traces: By run.
    """

    grid: Grid
    traces: dict[Run, Trace]

    def of(self, task: str, parallel: str, fault: str, arm: str) -> dict[int, Trace]:
        """Traces by seed; arms without a fault are found under any."""
        place = NO_FAULT if arm in FAULTLESS else fault
        runs = {seed: Run(task, parallel, place, arm, seed) for seed in range(self.grid.seeds)}
        return {seed: self.traces[run] for seed, run in runs.items() if run in self.traces}

    def cells(self) -> Iterator[tuple[str, str, str]]:
        """Task, parallel mode and fault of what is there, the main ones first."""
        found = {(run.task, run.parallel, run.fault) for run in self.traces if run.fault != NO_FAULT}
        for task in _first(self.grid.tasks[0], self.grid.protocol.tasks):
            for parallel in _first(self.grid.parallels[0], PARALLEL):
                for fault in _first(self.grid.main_fault, FAULTS):
                    if (task, parallel, fault) in found:
                        yield task, parallel, fault

    @property
    def main(self) -> tuple[str, str, str]:
        """Task, parallel mode and fault of the figures and of the first table."""
        return self.grid.tasks[0], self.grid.parallels[0], self.grid.main_fault

    def data_name(self, task: str) -> str:
        """What a task's data are called, from its runs; the task's own name before there is one."""
        return next((trace.data for run, trace in self.traces.items() if run.task == task), task)


def load_results(grid: Grid) -> Results:
    """Every finished run of the protocol in the folder, whether this call asked for it or not.

    So an experiment may be run in parts: what was run before is shown beside what was run now. Seeds are those asked
    for. Runs with other settings are passed over.
    """
    whole = replace(
        grid,
        tasks=tuple(_first(grid.tasks[0], grid.protocol.tasks)),
        parallels=tuple(_first(grid.parallels[0], PARALLEL)),
        faults=FAULTS,
        arms=ARMS,
    )
    traces = {}
    for run in _every_run(whole):
        folder = grid.folder(run)
        if not (folder / "summary.json").is_file():
            continue
        try:
            arm = arm_of(whole, run)
        except NotReady:
            continue
        if ended(arm, folder):
            traces[run] = load_trace(folder)
    return Results(grid, traces)


def arms_table(results: Results, task: str, parallel: str, fault: str) -> Table:
    """By arm, every measure as mean, standard deviation and list over seeds."""
    injection = results.grid.protocol.injection(fault)
    reference = {name: results.of(task, parallel, fault, name) for name in ("clean", "baseline", TWIN)}
    table: Table = {}
    for arm in ARMS:
        runs = results.of(task, parallel, fault, arm)
        rows = [
            measures.measure(
                trace,
                injection,
                faulty=arm not in (*FAULTLESS, TWIN),
                clean=reference["clean"].get(seed),
                baseline=reference["baseline"].get(seed),
                twin=reference[TWIN].get(seed),
            )
            for seed, trace in runs.items()
        ]
        if rows:
            table[arm] = {**measures.statistics(rows), "seeds": list(runs)}
    return table


def twin_table(results: Results, task: str, parallel: str, fault: str) -> Table:
    """Guarded runs against their golden twins, in every bit of every rank's final state."""
    grid = results.grid
    attempts = grid.protocol.injection(fault).attempts
    counts: Table = {"equal": 0, "compared": 0, "undefined": 0, "different": []}
    for seed, guarded in results.of(task, parallel, fault, GUARDED).items():
        run = Run(task, parallel, fault, GUARDED, seed)
        twin = replace(run, arm=TWIN)
        unequal = _unequal(grid, run, twin) if twin in results.traces else None
        if unequal is None and not guarded.stopped:
            continue
        found = measures.twin_equality(guarded, attempts, unequal or ())
        if found == "undefined":
            counts["undefined"] += 1
            continue
        counts["compared"] += 1
        if found == "equal":
            counts["equal"] += 1
        else:
            counts["different"].append(seed)
    return counts


def transparency_table(results: Results, task: str, parallel: str) -> Table:
    """Runs without a fault, guarded against not, in every bit of the final state; and what was refused in them."""
    counts: Table = {"equal": 0, "compared": 0, "refused": 0, "different": []}
    for seed, trace in results.of(task, parallel, NO_FAULT, "guarded-clean").items():
        run = Run(task, parallel, NO_FAULT, "guarded-clean", seed)
        counts["refused"] += len(trace.refused)
        unequal = _unequal(results.grid, run, replace(run, arm="clean"))
        if unequal is not None:
            counts["compared"] += 1
            counts["equal"] += not unequal
            counts["different"] += [seed] if unequal else []
    return counts


def distributed_table(results: Results) -> list[Table]:
    """Every pair of parallel modes that ran the same thing: verdicts, and the largest difference of measurements."""
    rows: list[Table] = []
    judging = [arm for arm in ARMS if any(t.guarded for r, t in results.traces.items() if r.arm == arm)]
    for first, second in (("ddp", "fsdp2"), ("single", "ddp"), ("single", "fsdp2")):
        for task in results.grid.protocol.tasks:
            for fault in (NO_FAULT, *FAULTS):
                for arm in judging:
                    if (arm in FAULTLESS) != (fault == NO_FAULT):
                        continue
                    pairs = _pairs(results.of(task, first, fault, arm), results.of(task, second, fault, arm))
                    if pairs:
                        rows.append({"modes": [first, second], "task": task, "fault": fault, "arm": arm, **pairs})
    return rows


def search_table(results: Results) -> Table:
    """By task and searched arm, the candidates and the values that were taken."""
    table: Table = {}
    for task in results.grid.protocol.tasks:
        for arm in search.OWN:
            try:
                tried = candidates(results.grid, task, arm)
            except NotReady:
                continue
            table.setdefault(task, {})[arm] = {
                "candidates": [candidate.row() for candidate in tried],
                "taken": search.choose(arm, tried),
                "complete": len(tried) == sum(map(len, search.stages(results.grid.protocol, arm))),
            }
    return table


def codes_table(results: Results) -> Table:
    """What made the runs: number of runs by source digest, torch, device and platform."""
    table: Table = {}
    for trace in results.traces.values():
        for name, value in trace.layout.items():
            counts = table.setdefault(name, {})
            counts[value] = counts.get(value, 0) + 1
    return table


def overhead_table(results: Results, task: str, parallel: str, fault: str) -> Table:
    """By guarded arm, the mean over seeds of the overhead of each part, relative to the rest of the loop."""
    table: Table = {}
    for arm in ARMS:
        parts = [measures.overhead_parts(t) for t in results.of(task, parallel, fault, arm).values() if t.guarded]
        phases = list(dict.fromkeys(phase for part in parts for phase in part))
        if phases:
            table[arm] = {phase: sum(part.get(phase, 0.0) for part in parts) / len(parts) for phase in phases}
    return table


def summarize(results: Results) -> Table:
    """The whole of ``summary.json`` but what only the call itself knows."""
    main = results.main
    grid: Table = {}
    twins: Table = {}
    for task, parallel, fault in results.cells():
        place = grid.setdefault(task, {}).setdefault(parallel, {})
        place[fault] = arms_table(results, task, parallel, fault)
        twins.setdefault(task, {}).setdefault(parallel, {})[fault] = twin_table(results, task, parallel, fault)
    clean = {(run.task, run.parallel) for run in results.traces if run.arm == "guarded-clean"}
    return {
        "data": {task: results.data_name(task) for task in results.grid.protocol.tasks},
        "main": dict(zip(("task", "parallel", "fault"), main, strict=True)),
        "arms": arms_table(results, *main),
        "twin": {**twin_table(results, *main), "faults": twins},
        "transparency": [
            {"task": task, "parallel": parallel, **transparency_table(results, task, parallel)}
            for task, parallel in sorted(clean)
        ],
        "faults": grid,
        "overhead": overhead_table(results, *main),
        "gamma": results.grid.protocol.gamma,
        "distributed": distributed_table(results),
        "search": search_table(results),
        "made_with": codes_table(results),
    }


def _every_run(grid: Grid) -> Iterator[Run]:
    for task in grid.tasks:
        for parallel in grid.parallels:
            for fault in (NO_FAULT, *grid.faults):
                for arm in grid.arms:
                    if (arm in FAULTLESS) == (fault == NO_FAULT):
                        for seed in range(grid.seeds):
                            yield Run(task, parallel, fault, arm, seed)


def _unequal(grid: Grid, first: Run, second: Run) -> list[str] | None:
    """Entries in which the final states of two runs differ, over all ranks; None if a run left no digests."""
    try:
        images = [states(arm_of(grid, run), grid.folder(run)) for run in (first, second)]
    except NotReady:
        return None
    if images[0] is None or images[1] is None:
        return None
    return [
        f"rank {rank}: {name}"
        for rank, pair in enumerate(zip(images[0], images[1], strict=True))
        for name in differences(*pair)
    ]


def _pairs(first: dict[int, Trace], second: dict[int, Trace]) -> Table:
    """Seeds both have: whether their verdicts are the same ones, and by how much they measured apart."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return {}
    different = [seed for seed in seeds if first[seed].actions != second[seed].actions]
    measured = [
        (number(one), number(other))
        for seed in seeds
        for one, other in zip(first[seed].measurements, second[seed].measurements, strict=False)
        if one is not None and other is not None
    ]
    apart = [abs(one - other) for one, other in measured if one != other]  # both infinite: no difference
    return {
        "compared": len(seeds),
        "equal_verdicts": len(seeds) - len(different),
        "different": different,
        "largest_difference": max(apart, default=0.0),
    }


def _first(name: str, names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([name, *names]))
