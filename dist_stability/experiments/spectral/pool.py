"""Jobs that leave one JSON file each, over worker processes; what is there already is not done again."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_stability.experiments import workers as processes
from dist_stability.experiments.progress import Progress
from dist_stability.report.events import from_json, read_json, to_json, write_json


@dataclass(frozen=True)
class Job:
    """One file.

    Attributes:
        path: Where the result goes.
        settings: What it was made from; a file with other settings is made again. Plain data.
        work: A function of a module, called with ``subject`` in a worker; returns plain data.
        subject: Its argument.
    """

    path: Path
    settings: dict[str, Any]
    work: Callable[[Any], dict[str, Any]]
    subject: Any

    def result(self) -> dict[str, Any] | None:
        """What the file holds; None if there is none, or one made from other settings."""
        try:
            found = read_json(self.path)
        except (OSError, ValueError):
            return None
        return found if found.get("settings") == from_json(to_json(self.settings)) else None


def perform(jobs: Sequence[Job], workers: int, title: str) -> dict[str, str]:
    """Do what is missing. A job that fails does not end the others.

    Args:
        jobs: In the order in which they are begun.
        workers: Processes at a time.
        title: For the progress.

    Returns:
        Why jobs failed, by the name of their file.
    """
    missing = [job for job in jobs if job.result() is None]
    failed: dict[str, str] = {}
    with Progress(len(jobs), title) as progress:
        progress.advance(len(jobs) - len(missing))
        if not missing:
            return failed
        # Spawned: a forked child of a process that has used torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=processes.begin) as pool:
            flight = {pool.submit(_done, job): job for job in missing}
            try:
                for number, future in enumerate(as_completed(flight), start=len(jobs) - len(missing) + 1):
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        raise error
                    if error is not None:
                        name = flight[future].path.name
                        failed[name] = f"{type(error).__name__}: {error}"
                        progress.note(f"  failed: {name}: {failed[name]}")
                    progress.advance(number)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return failed


def _done(job: Job) -> None:
    """In a worker: the work, and its file."""
    result = job.work(job.subject)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(job.path, {"settings": job.settings, **result})
