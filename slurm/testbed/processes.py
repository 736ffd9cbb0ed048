"""The processes of a testbed: started in the background, written down, stopped by their ids and by nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

MARK = "testbed-processes"
"""Name of the file in the state folder with one line per process: name, process id, start time."""


class TestbedError(RuntimeError):
    """The testbed cannot be started or stopped; the message says what to do."""


def wait_for(what: str, done: Callable[[], bool], seconds: float, hint: str = "") -> None:
    """Wait until ``done()``.

    Raises:
        TestbedError: It was not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TestbedError(f"waited {seconds:g} s for {what}, in vain{hint and f'; see {hint}'}")
        time.sleep(0.1)


def start(state: Path, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
    """Start a process that outlives this one, with its output in ``state/<name>.out``, and write its id down."""
    with open(state / f"{name}.out", "ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    with open(state / MARK, "a", encoding="utf-8") as file:
        file.write(f"{name} {process.pid} {_start_time(process.pid)}\n")


def running(state: Path) -> list[tuple[str, int]]:
    """Name and id of the processes that still run, in the order in which they were started."""
    if not (state / MARK).exists():
        return []
    lines = (state / MARK).read_text(encoding="utf-8").splitlines()
    rows = [(name, int(pid), started) for name, pid, started in (line.split() for line in lines)]
    # A process id may have gone to somebody else since: the start time tells.
    return [(name, pid) for name, pid, started in rows if started != "-" and _start_time(pid) == started]


def stop(state: Path, seconds: float = 20.0) -> None:
    """End every process that was written down, the last one first.

    Raises:
        TestbedError: One of them outlives SIGKILL.
    """
    for name, pid in reversed(running(state)):
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 5.0)):
            try:
                os.kill(pid, number)
                wait_for(f"{name} (process {pid}) to end", lambda pid=pid: pid not in _ids(state), patience)
                break
            except ProcessLookupError:
                break
            except TestbedError:
                if number == signal.SIGKILL:
                    raise
    if (state / MARK).exists():
        (state / MARK).write_text("", encoding="utf-8")  # the file stays: it marks the folder as a testbed's


def _ids(state: Path) -> list[int]:
    return [pid for _, pid in running(state)]


def _start_time(pid: int) -> str:
    """When a process started, in clock ticks since boot; "-" for one that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return "-"
    return "-" if fields[0] in "ZX" else fields[19]
