"""Runs of sharded_program.py, and what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("sharded_program.py")
SUBMIT = ROOT / "launch" / "submit.py"


def environment() -> dict[str, str]:
    """What a job of the tests starts with: nothing of an outer run's ranks, this repository's package."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def uninterrupted(out: Path) -> tuple[str, str]:
    """The program as two local processes, never told to stop: what it ends with on each rank."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--local-addr=127.0.0.1")
    command = [sys.executable, *torchrun, str(PROGRAM), "--out", str(out)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return finals(out)


def finals(out: Path) -> tuple[str, str]:
    """Steps done and digest of every bit of the final state, of both ranks."""
    return (out / "final-rank0").read_text(), (out / "final-rank1").read_text()


def lives(out: Path, rank: int) -> list[tuple[int, int, str]]:
    """First step, process id and node of each time the program was started."""
    path = out / f"lives-rank{rank}"
    rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(int(step), int(process), node) for step, process, node in rows]


def alive(out: Path) -> list[int]:
    """Ids of the program's processes that still run, of all its lives."""
    return [process for rank in range(2) for _, process, _ in lives(out, rank) if not _gone(process)]


def _gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def paused(out: Path) -> bool:
    """Whether both ranks wait to be told to stop."""
    return all((out / f"paused-rank{rank}").exists() for rank in range(2))


def until(what: str, done: Callable[[], bool], seconds: float, told: Callable[[], str] = lambda: "") -> None:
    """Wait; a wait in vain is a failure that says for what."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}\n{told()}"
        time.sleep(0.2)
