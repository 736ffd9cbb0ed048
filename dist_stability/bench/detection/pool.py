"""Independent jobs over a few processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

from dist_stability.experiments.workers import begin

Result = TypeVar("Result")


def run_jobs(
    jobs: Sequence[Callable[[], Result]], workers: int, done: Callable[[int], None] = lambda index: None
) -> list[Result]:
    """Results in the order of the jobs.

    Args:
        jobs: Picklable, unless there is one worker: then they run here, one after the other.
        workers: Processes.
        done: Called with the index of each job as it is finished.
    """
    results: dict[int, Result] = {}
    if workers <= 1 or len(jobs) <= 1:
        for index, job in enumerate(jobs):
            results[index] = job()
            done(index)
    else:
        # Spawned: a forked child of a process that has used torch's threads may hang.
        context = get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=begin) as pool:
            futures = {pool.submit(job): index for index, job in enumerate(jobs)}
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                done(futures[future])
    return [results[index] for index in range(len(jobs))]
