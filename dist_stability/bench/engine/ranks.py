"""A benchmark in several processes: started by torchrun, rank 0 writes what it measured."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_stability.bench.engine.edge import edge
from dist_stability.bench.engine.restore import rollback
from dist_stability.bench.engine.step import step
from dist_stability.experiments.restrained.sharded_run import sharpness
from dist_stability.experiments.wrapping import Processes, processes
from dist_stability.report.events import read_json, write_json

JOBS: dict[str, Callable[[Processes, str, bool], dict[str, Any]]] = {
    "step": step,
    "rollback": rollback,
    "sharpness": sharpness,
    "edge": edge,
}
MODES = ("single", "ddp", "fsdp2")
LIMIT_SECONDS = 900.0
LOG_LINES = 30


class RanksFailed(RuntimeError):
    """A job of several processes did not finish; the message has the end of what it printed."""


def run_job(job: str, mode: str, ranks: int, device: torch.device, quick: bool) -> dict[str, Any]:
    """Run a job in a parallel mode: here without parallelism, else in ``ranks`` processes of their own.

    Args:
        job: One of :data:`JOBS`.
        mode: One of :data:`MODES`.
        ranks: Number of processes of the other modes.
        device: Where to compute.
        quick: As little as possible.

    Raises:
        RanksFailed: The processes ended with an error, or not at all.
    """
    if mode == "single":
        return JOBS[job](Processes(0, 1, device), mode, quick)
    print(f"{job}, {mode}: {ranks} processes", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["--local-addr=127.0.0.1", "-m", __name__, job, mode, device.type, str(out)]
        try:
            done = subprocess.run(
                command + ["--quick"] * quick,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise RanksFailed(f"{job} under {mode} on {ranks} ranks: no end within {LIMIT_SECONDS:g} s") from error
        if done.returncode:
            shown = "\n  ".join(last_lines(done.stdout))
            raise RanksFailed(f"{job} under {mode} on {ranks} ranks failed with status {done.returncode}:\n  {shown}")
        return read_json(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("mode", choices=MODES[1:])
    parser.add_argument("device")
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    with processes(options.mode, options.device, int(os.environ["LOCAL_RANK"])) as here:
        found = JOBS[options.job](here, options.mode, options.quick)
        if here.rank == 0:
            write_json(options.out, found)


def last_lines(printed: str) -> list[str]:
    """The last lines of the program itself: the launcher's own traceback, after them, says nothing."""
    lines = printed.splitlines()
    launcher = [number for number, line in enumerate(lines) if "torch/distributed/" in line and "run.py" in line]
    return (lines[: launcher[0]] or lines if launcher else lines)[-LOG_LINES:]


def environment() -> dict[str, str]:
    """One thread per process unless told otherwise, and the loopback device."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return environment | ({"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {})


if __name__ == "__main__":
    main()
