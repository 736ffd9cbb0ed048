"""The runs of an experiment over the cores or GPUs of one machine, each as soon as those it needs have ended.

Every run is one job of a pool of spawned processes. A run on one process trains inside its worker; a distributed one
is started with ``torchrun`` by it and counts as many workers as it has processes. A run that fails does not end the
experiment: it is named at the end with the runs that needed it, and done again the next time.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from dist_stability.experiments import training
from dist_stability.experiments import workers as processes
from dist_stability.experiments.arms import Arm, ArmFailed, run_arm
from dist_stability.experiments.paper.folders import ended
from dist_stability.experiments.paper.inside import inside
from dist_stability.experiments.paper.outcomes import Outcomes
from dist_stability.experiments.paper.plan import Grid, Run, arm_of
from dist_stability.experiments.progress import Progress

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def run_in_pool(grid: Grid, runs: Sequence[Run], workers: int) -> Outcomes:
    """Run what is missing.

    Args:
        grid: The experiment.
        runs: All its runs; a run comes after those it needs.
        workers: Processes at a time.
    """
    outcomes = Outcomes(grid, runs, workers)
    waiting, flight, begun = list(runs), dict[Future[int], Run](), dict[Run, float]()
    with Progress(len(runs), f"{grid.protocol.experiment}: {len(runs)} runs") as progress:
        pool = _pool(workers)
        try:
            while waiting or flight:
                try:
                    _submit(outcomes, waiting, flight, pool, workers)
                except BrokenProcessPool:
                    pool = _pool(workers)
                    continue
                begun |= {run: time.monotonic() for run in flight.values() if run not in begun}
                progress.advance(len(outcomes.ended), outcomes.left())
                if not flight:
                    continue
                for future in wait(flight, return_when=FIRST_COMPLETED).done:
                    run = flight.pop(future)
                    outcomes.ran(run, time.monotonic() - begun[run], _problem(grid, run, future))
                    if outcomes.is_failed(run):
                        progress.note(f"  failed: {run}: {outcomes.ended[run]}")
                progress.advance(len(outcomes.ended), outcomes.left())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return outcomes


def _submit(
    outcomes: Outcomes, waiting: list[Run], flight: dict[Future[int], Run], pool: ProcessPoolExecutor, workers: int
) -> None:
    """Start runs that are ready, in their order, until the workers are busy; pass over what has ended already."""
    for run in list(waiting):
        busy = sum(other.world_size for other in flight.values())
        if busy >= workers:
            return
        if not outcomes.is_ready(run):
            continue
        if not outcomes.must_run(run):
            waiting.remove(run)
            continue
        if flight and busy + run.world_size > workers:
            return
        arm = arm_of(outcomes.grid, run)
        future = pool.submit(_perform, arm, outcomes.grid.folder(run))
        waiting.remove(run)
        flight[future] = run


def _problem(grid: Grid, run: Run, future: Future[int]) -> str:
    """Why a run that was started has no result; "" if it has one."""
    log = grid.folder(run) / "log.txt"
    try:
        status = future.result()
    except BrokenProcessPool:
        return f"its process died, or one beside it did; see {log}"
    except Exception as error:  # before the run had a log
        return f"{type(error).__name__}: {error}"
    if ended(arm_of(grid, run), grid.folder(run)):
        return ""
    return f"exit status {status}; see {log}"


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned: a forked child of a process that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    numbers: Any = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(numbers,))


def _begin(numbers: Any) -> None:
    """In a new worker: one thread, one device, and no life without the experiment."""
    processes.begin()
    number, visible = numbers.get(), os.environ.get(_VISIBLE)
    count = torch.cuda.device_count()
    if count:
        _all_devices.append(visible)
        names = visible.split(",") if visible else [str(device) for device in range(count)]
        os.environ[_VISIBLE] = names[number % count]  # before anything initializes CUDA in this process


_all_devices: list[str | None] = []
"""In a worker with a device of its own: what CUDA_VISIBLE_DEVICES was before."""


def _perform(arm: Arm, folder: Any) -> int:
    """In a worker: one run, from its start to its end; returns its exit status."""
    if arm.world_size > 1:
        with _every_device(), contextlib.redirect_stdout(io.StringIO()):  # its log is the launcher's own
            try:
                run_arm(arm, folder)
            except ArmFailed:
                return 1
        return 0
    return inside(arm.arguments, folder, "log.txt", _train)


def _train(arguments: list[str]) -> int:
    try:
        return training.main(arguments)
    except Exception:
        traceback.print_exc()  # into the run's log
        return 1


@contextlib.contextmanager
def _every_device() -> Any:
    """The ranks of a distributed run choose among all devices."""
    own = os.environ.get(_VISIBLE)
    if _all_devices:
        before = _all_devices[0]
        os.environ.pop(_VISIBLE) if before is None else os.environ.update({_VISIBLE: before})
    try:
        yield
    finally:
        if own is not None:
            os.environ[_VISIBLE] = own
