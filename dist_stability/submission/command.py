"""``launch/submit.py``: submit a script, say where it runs and logs, and follow it if asked to."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_stability.report.extras import MissingExtra
from dist_stability.submission.options import SubmitOptions, parse_options, whole_minutes
from dist_stability.submission.script import SubmittedScript

SLURM_ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
"""States from which a job does not come back. While it is requeued it shows COMPLETING, then PENDING."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2: nothing was submitted)."""
    options = parse_options(arguments)
    try:
        executor = make_executor(options)
    except MissingExtra as error:
        print(f"submit.py: error: {error}", file=sys.stderr)
        return 2
    job = executor.submit(SubmittedScript(str(options.script), options.arguments, options.on_requeue))
    if options.executor == "debug":
        job.results()
        return 0
    ranks = options.nnodes * options.nproc_per_node
    print(f"job {job.job_id}: {options.nnodes} x {options.nproc_per_node} processes on {options.executor}")
    print(f"log of rank 0: {job.paths.stdout}")
    print(f"errors of rank 0: {job.paths.stderr}", flush=True)
    if ranks > 1:
        print(f"all {ranks} ranks: {job.paths.folder}/{job.job_id}_RANK_log.out and .err", flush=True)
    if not options.wait:
        return 0
    try:
        follow(job.paths.stdout, ended=_slurm_ended(job.job_id) if options.executor == "slurm" else job.done)
    except KeyboardInterrupt:
        print(f"no longer followed; job {job.job_id} is not cancelled by this", file=sys.stderr)
        return 130
    failures = failed_ranks([job.task(rank).paths.result_pickle for rank in range(ranks)])
    for rank, reason in failures.items():
        print(f"submit.py: rank {rank}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def make_executor(options: SubmitOptions) -> Any:
    """The submitit executor that these options describe.

    Raises:
        MissingExtra: submitit is not installed.
    """
    if importlib.util.find_spec("submitit") is None:
        raise MissingExtra("submitting needs 'submitit', which is not installed: pip install 'dist-stability[slurm]'")
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = options.preempt_signal  # read when submitit is imported; jobs inherit it
    import submitit

    folder = options.logs / "%j"
    if options.executor == "debug":
        return submitit.DebugExecutor(folder)
    if options.executor == "local":
        executor: Any = submitit.LocalExecutor(folder, max_num_timeout=options.requeues)
        executor.update_parameters(
            timeout_min=options.time,
            tasks_per_node=options.nproc_per_node,
            gpus_per_node=options.gpus_per_node,
            signal_delay_s=options.signal_delay,
        )
        return executor
    executor = submitit.SlurmExecutor(folder, max_num_timeout=options.requeues)
    chosen: dict[str, Any] = {
        "partition": options.partition,
        "cpus_per_task": options.cpus_per_task,
        "gpus_per_node": options.gpus_per_node or None,
    }
    executor.update_parameters(
        job_name=options.name,
        time=whole_minutes(options.time),
        nodes=options.nnodes,
        ntasks_per_node=options.nproc_per_node,
        signal_delay_s=options.signal_delay,
        # A rank that dies leaves the others waiting in a collective: end them, do not spend the time limit.
        srun_args=["--kill-on-bad-exit=1"],
        setup=_start_again(options.restarts),
        additional_parameters={"requeue": True, **dict(options.sbatch)},
        **{name: value for name, value in chosen.items() if value is not None},
    )
    return executor


def _start_again(restarts: int) -> list[str]:
    """Lines for the batch script: a step that failed is started again on the same nodes, where shared memory is.

    The line with srun is submitit's; a function of that name takes its place.
    """
    return [
        "srun() {",
        f"    for ((starts = 0; starts <= {restarts}; starts++)); do",
        '        command srun "$@" && return',
        "        status=$?",
        "    done",
        '    return "$status"',
        "}",
    ]


def follow(log: Path, ended: Callable[[], bool], poll: float = 2.0) -> None:
    """Print what a log file gains, over every restart of its job, until the job has ended."""
    position = 0
    last = False
    while True:
        if log.exists():
            with log.open("rb") as file:
                file.seek(position)
                gained = file.read()
            position += len(gained)
            sys.stdout.write(gained.decode(errors="replace"))
            sys.stdout.flush()
        if last:
            return
        last = ended()
        if not last:
            time.sleep(poll)


def failed_ranks(results: Sequence[Path]) -> dict[int, str]:
    """The ranks that did not end well, with the reason, from the files in which submitit keeps what each returned."""
    failures: dict[int, str] = {}
    for rank, path in enumerate(results):
        if not path.exists():
            failures[rank] = f"ended without a result ({path}): see its log"
            continue
        outcome, what = pickle.loads(path.read_bytes())
        if outcome != "success":
            failures[rank] = str(what)
    return failures


def _slurm_ended(job: str) -> Callable[[], bool]:
    """Asks squeue, which needs no accounting database (submitit asks sacct, which does)."""

    def ended() -> bool:
        command = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if asked.returncode != 0:
            return "Invalid job id" in asked.stderr  # ended a while ago; anything else is trouble that may pass
        return asked.stdout.strip() in SLURM_ENDED

    return ended
