"""Options of ``launch/submit.py``, checked before anything is submitted."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EXECUTORS = ("slurm", "local", "debug")


@dataclass(frozen=True)
class SubmitOptions:
    """One submission; see the help of the command line for each field."""

    executor: str
    nnodes: int
    nproc_per_node: int
    gpus_per_node: int
    cpus_per_task: int | None
    partition: str | None
    time: float
    requeues: int
    restarts: int
    preempt_signal: str
    signal_delay: int
    sbatch: tuple[tuple[str, str], ...]
    name: str
    logs: Path
    on_requeue: tuple[str, ...]
    wait: bool
    script: Path
    arguments: tuple[str, ...]


def parse_options(arguments: Sequence[str] | None = None) -> SubmitOptions:
    """Read and check the command line.

    Args:
        arguments: The words after the program's name; default ``sys.argv``.

    Raises:
        SystemExit: With status 2 after naming the option that is wrong, and what is allowed.
    """
    parser = _parser()
    values = parser.parse_args(arguments)
    for problem in _problems(values):
        parser.error(problem)
    values.script = values.script.resolve()
    values.logs = values.logs.resolve()
    values.name = values.name or values.script.stem
    values.sbatch = tuple(values.sbatch)
    values.on_requeue = tuple(shlex.split(values.on_requeue))
    values.arguments = tuple(values.arguments)
    return SubmitOptions(**vars(values))


def minutes(text: str) -> float:
    """Minutes from a time limit as Slurm writes it: ``90``, ``30:00``, ``8:00:00``, ``2-12``, ``2-12:00[:00]``.

    Raises:
        argparse.ArgumentTypeError: Anything else, or no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: neither minutes nor a time such as 8:00:00 or 2-12:00")
    days, *rest = match.groups()
    parts = [float(part) for part in rest if part is not None]
    # Slurm: after days come hours; without days a lone number is minutes, two are minutes and seconds.
    units = (60.0, 1.0, 1 / 60) if days is not None or len(parts) == 3 else (1.0, 1 / 60)
    total = float(days or 0) * 1440 + sum(part * unit for part, unit in zip(parts, units, strict=False))
    if total <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: no time at all")
    return total


def _problems(v: argparse.Namespace) -> list[str]:
    """What is wrong with the values taken together, each naming its option; the first one is reported."""
    said: list[str] = []

    def refuse(wrong: bool, message: str) -> None:
        if wrong:
            said.append(message)

    refuse(not v.script.is_file(), f"{v.script}: no such script")
    refuse(
        v.executor == "slurm" and (shutil.which("sbatch") is None or shutil.which("srun") is None),
        "--executor slurm: sbatch or srun is not on the PATH; submit from a node of the cluster",
    )
    for option in ("partition", "cpus_per_task", "sbatch"):
        given = bool(getattr(v, option))
        refuse(given and v.executor != "slurm", f"--{option}: belongs to --executor slurm, not to {v.executor}")
    refuse(
        v.executor != "slurm" and v.nnodes > 1, f"--nnodes {v.nnodes}: --executor {v.executor} is this machine alone"
    )
    refuse(
        v.executor == "debug" and v.nproc_per_node > 1,
        f"--nproc_per_node {v.nproc_per_node}: --executor debug runs the script in this process; 1 is allowed",
    )
    number = getattr(signal, f"SIG{v.preempt_signal}", None)
    refuse(
        not isinstance(number, signal.Signals) or v.preempt_signal in ("KILL", "STOP", "TERM", "CONT"),
        f"--preempt_signal {v.preempt_signal}: not a signal submitit can use; USR2 is the usual one",
    )
    refuse(
        v.executor != "debug" and v.signal_delay >= v.time * 60,
        f"--signal_delay {v.signal_delay}: the signal would come before the job starts (--time is {v.time * 60:g} s)",
    )
    return said


def _whole(low: int) -> type:
    def convert(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low}")
        return value

    convert.__name__ = "whole number"
    return convert  # type: ignore[return-value]


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.removeprefix("--").partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r}: not of the form NAME=VALUE")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description="Submit a training script through submitit. It is started in every process with the environment "
        "that torchrun would set; its own arguments follow it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(name: str, **settings: object) -> None:
        parser.add_argument(f"--{name}", *((f"--{name.replace('_', '-')}",) if "_" in name else ()), **settings)  # type: ignore[arg-type]

    add("executor", choices=EXECUTORS, default="slurm", help="local: processes of this machine; debug: this process")
    add("nnodes", type=_whole(1), default=1, help="nodes")
    add("nproc_per_node", type=_whole(1), default=1, help="processes on each node")
    add("gpus_per_node", type=_whole(0), default=0, help="GPUs of each node; with 0 the local executor hides them all")
    add("cpus_per_task", type=_whole(1), default=None, help="cores of each process (slurm)")
    add("partition", default=None, help="of the cluster (slurm)")
    add("time", type=minutes, default=60.0, metavar="LIMIT", help="minutes, or a time such as 8:00:00 or 2-12")
    add("requeues", type=_whole(0), default=3, help="how often the job may run into its time limit and come back")
    add("restarts", type=_whole(0), default=3, help="how often processes that die are started again in the job (slurm)")
    add(
        "preempt_signal",
        type=lambda text: text.removeprefix("SIG"),
        default=os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"),
        metavar="NAME",
        help="announces the end",
    )
    add("signal_delay", type=_whole(1), default=90, metavar="SECONDS", help="from the signal to the time limit")
    add("sbatch", action="append", type=_setting, default=[], metavar="NAME=VALUE", help="any other option of sbatch")
    add("name", default=None, help="of the job (default: the script's)")
    add("logs", type=Path, default=Path("out/jobs"), metavar="DIR", help="one folder per job; all nodes must see it")
    add(
        "on_requeue",
        default="--resume auto",
        metavar="ARGUMENTS",
        help="appended to the script's own when it is started again; in quotes, and --on_requeue='' for none",
    )
    add("wait", action="store_true", help="print rank 0's log until the job has ended; the exit status is the job's")
    parser.add_argument("script", type=Path, help="a Python script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    return parser


def whole_minutes(limit: float) -> int:
    """A time limit as Slurm keeps it: minutes, rounded up."""
    return math.ceil(limit)
