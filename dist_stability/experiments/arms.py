"""Runs of the training program as processes of their own: started, watched, and not repeated when already done."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_stability.experiments.options import parse_options
from dist_stability.experiments.progress import Progress
from dist_stability.report.events import from_json, read_json, to_json
from dist_stability.report.versions import source_digest, versions

PROGRAM = "dist_stability.experiments.training"
POLL_SECONDS = 0.25
GRACE_SECONDS = 10.0
LOG_LINES = 30


class ArmFailed(RuntimeError):
    """A run ended with an error; the message has the end of its log."""


@dataclass(frozen=True)
class Arm:
    """One run of the training program.

    Attributes:
        name: Its folder, and what it is called.
        title: What it is, for people.
        arguments: Options, without ``--out``.
        world_size: Number of processes.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    world_size: int

    def command(self, out: Path) -> str:
        """What to type to get this run alone."""
        words = ["torchrun", "--standalone", f"--nproc_per_node={self.world_size}", "-m", PROGRAM, *self.arguments]
        return f"OMP_NUM_THREADS=1 {shlex.join([*words, '--out', str(out)])}"


def run_arm(arm: Arm, folder: Path) -> bool:
    """Run one arm to its end, unless the folder holds this very run already.

    Args:
        arm: What to run.
        folder: Gets events, summary, state digests and ``log.txt``.

    Returns:
        Whether it was run now.

    Raises:
        ArmFailed: The run did not finish.
    """
    if is_done(arm, folder):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    events = folder / "events.jsonl"
    events.unlink(missing_ok=True)
    steps = parse_options(arm.arguments, arm.world_size).steps
    with (
        (folder / "log.txt").open("w", encoding="utf-8") as log,
        _started(arm, folder, log.fileno()) as process,
        Progress(steps, arm.title) as progress,
    ):
        tail = _Tail(events)
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            last = tail.last()
            if last is not None:
                progress.advance(last["batch"] + 1, f"probe {last['probe']:.4f}")
    if process.returncode != 0:
        shown = "\n  ".join(_end_of_log(folder / "log.txt"))
        raise ArmFailed(
            f"{arm.name} failed with status {process.returncode}; the end of {folder / 'log.txt'}:\n  {shown}"
        )
    return True


def is_done(arm: Arm, folder: Path) -> bool:
    """Whether the folder holds a finished run of this arm: the same settings, the same code, the same versions."""
    try:
        summary = read_json(folder / "summary.json")
    except (OSError, ValueError):
        return False
    wanted = from_json(json.loads(json.dumps(to_json(parse_options(arm.arguments, arm.world_size).settings()))))
    return bool(
        summary.get("finished")
        and summary.get("settings") == wanted
        and summary.get("world_size") == arm.world_size
        and summary.get("versions") == versions()
        and summary.get("source") == source_digest()
        and all(path.is_file() for path in state_files(arm, folder))
    )


def state_files(arm: Arm, folder: Path) -> list[Path]:
    """The digests of the final state, one file per rank, if the arm writes them."""
    ranks = range(arm.world_size) if "--state-digest" in arm.arguments else ()
    return [folder / f"state-rank{rank}.json" for rank in ranks]


def _end_of_log(path: Path) -> list[str]:
    """The last lines the program itself wrote: the launcher's own traceback, after them, says nothing."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    launcher = [number for number, line in enumerate(lines) if "torch/distributed/elastic" in line]
    return (lines[: launcher[0]] or lines if launcher else lines)[-LOG_LINES:]


@contextmanager
def _started(arm: Arm, folder: Path, log: int) -> Iterator[subprocess.Popen[bytes]]:
    """The arm's processes; ended with the block, whatever happens in it."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={arm.world_size}", "--local-addr=127.0.0.1"]
    command = [sys.executable, "-m", *launcher, "-m", PROGRAM, *arm.arguments, "--out", str(folder)]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment())
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun passes it on to its workers
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    """One thread per process, and the loopback device: a machine's own name often leads nowhere."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        environment["GLOO_SOCKET_IFNAME"] = loopback[0]
    return environment


class _Tail:
    """The newest complete event of a log that is being written."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._rest = path, 0, b""

    def last(self) -> dict[str, Any] | None:
        """The last event since the last call, if there is one."""
        if not self._path.is_file():
            return None
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        event: dict[str, Any] | None = from_json(json.loads(lines[-1])) if lines else None
        return event
