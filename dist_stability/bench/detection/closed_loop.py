"""Faults in closed loop: every arm trains the same task through the same fault, and what it lost is scored.

The guarded arms run the real :class:`StabilityController` with its ladder; what one arm does is in ``closed_runs``.
Results go to ``closed_loop.jsonl`` as they come, one line for each (cell, arm); what is there is not run again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_stability.bench.detection.cells import Cell, ClosedFault, ClosedTask
from dist_stability.bench.detection.closed_runs import Arms, Group
from dist_stability.experiments.workers import begin

_PIECE = 9  # faults of one job


def run(
    out: Path,
    *,
    seeds: Iterable[int],
    cells: Iterable[Cell],
    arms: Arms,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run what is missing and return every result of these cells and arms.

    Args:
        out: Folder of ``closed_loop.jsonl``.
        seeds: Only cells with one of these seeds are run.
        cells: See :func:`cells.fault_cells`.
        arms: Rules by name; "none" and "perfect" are not rules. Factories must be picklable.
        workers: Processes (a DDP cell starts its ranks in addition).
        progress: Called with (cells done, cells in all).

    Returns:
        One dict per (cell, arm): task, fault, seed, arm; final (score-set loss, nats); regret (against perfect
        rejection, or the fault-free run for a lasting fault; at most ``closed_runs.LOST``); fault_committed and
        fault_attempts; extra_refused (refusals outside the fault); deep (deeper restores); stopped; warned (attempts
        from the fault's start to the first warning of slow divergence, or None); damage_at_warning (nats above the
        reference's run then, or None); attenuated (steps accepted at a part of their length); false_warnings (before
        the fault).
    """
    seeds = set(seeds)
    wanted = [cell for cell in cells if cell.seed in seeds]
    path = out / "closed_loop.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    done = {_key(row): row for row in _read(path)}
    groups: dict[tuple[ClosedTask, int], list[tuple[ClosedFault, list[str]]]] = {}
    for cell in wanted:
        missing = [arm for arm in arms if (cell.task.name, cell.fault.name, cell.seed, arm) not in done]
        if missing:
            groups.setdefault((cell.task, cell.seed), []).append((cell.fault, missing))
    total, finished = len(wanted), len(wanted) - sum(map(len, groups.values()))

    def take(rows: list[dict[str, Any]]) -> None:
        nonlocal finished
        with path.open("a", encoding="utf-8") as file:
            for row in rows:
                done[_key(row)] = row
                file.write(json.dumps(row) + "\n")
        finished += 1
        if progress is not None:
            progress(finished, total)

    jobs = []
    for (task, seed), faults in groups.items():
        # Faults that begin together share their prefix; in pieces, so that results come while others are running.
        faults.sort(key=lambda each: each[0].start)
        for _, same in groupby(faults, key=lambda each: each[0].start):
            kept = list(same)
            jobs += [(task, seed, kept[i : i + _PIECE]) for i in range(0, len(kept), _PIECE)]
    if workers <= 1:
        for job in jobs:
            run_group(*job, arms, take)
    elif jobs:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=begin) as pool:
            futures = [pool.submit(_collect, task, seed, faults, arms) for task, seed, faults in jobs]
            for future in as_completed(futures):
                for rows in future.result():
                    take(rows)
    return [
        row
        for cell in wanted
        for arm in arms
        if (row := done.get((cell.task.name, cell.fault.name, cell.seed, arm))) is not None
    ]


def run_group(
    task: ClosedTask,
    seed: int,
    faults: Sequence[tuple[ClosedFault, Sequence[str]]],
    arms: Arms,
    take: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Run faults that begin together, one after the other; ``take`` gets the results of each.

    Args:
        task: What is trained.
        seed: Of the weights and the data order.
        faults: Each with the names of the arms to run.
        arms: See :func:`run`.
        take: Called once for each fault.
    """
    if task.ranks == 1:
        Group(task, seed, arms).run(faults, take)
        return
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, folder, task, seed, list(faults), dict(arms), results))
            for rank in range(task.ranks)
        ]
        for process in processes:
            process.start()
        for _ in faults:
            rows = results.get()
            if rows is None:
                break
            take(rows)
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"task {task.name}, seed {seed}: a rank ended with an error; its traceback is above")


def _collect(
    task: ClosedTask, seed: int, faults: Sequence[tuple[ClosedFault, Sequence[str]]], arms: Arms
) -> list[list[dict[str, Any]]]:
    results: list[list[dict[str, Any]]] = []
    run_group(task, seed, faults, arms, results.append)
    return results


def _rank(
    rank: int,
    folder: str,
    task: ClosedTask,
    seed: int,
    faults: Sequence[tuple[ClosedFault, Sequence[str]]],
    arms: Arms,
    results: Any,
) -> None:
    """One process of a DDP task."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=task.ranks)
    try:
        Group(task, seed, arms, rank, task.ranks).run(faults, results.put if rank == 0 else lambda rows: None)
    except BaseException:
        if rank == 0:
            results.put(None)
        raise
    dist.destroy_process_group()


def _key(row: Mapping[str, Any]) -> tuple[str, str, int, str]:
    return row["task"], row["fault"], row["seed"], row["arm"]


def _read(path: Path) -> list[dict[str, Any]]:
    """What was written so far; a line that an interrupted run left incomplete is passed over."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows
