"""``bench recovery``: restarts from shared memory, from our checkpoint, from the same checkpoint by torch's own means.

Whole processes are started again, each way in turn; the files are put out of the page cache before each start, as they
would not be there on another host. What one start is, is in starts.py.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_stability.bench.engine.ranks import LIMIT_SECONDS, RanksFailed, environment, last_lines
from dist_stability.bench.engine.starts import BEGAN, OURS, PARTS, TRAIN, WAYS
from dist_stability.bench.engine.states import QUICK, SIZES, Size
from dist_stability.bench.engine.timing import Numbers, interleave, ratio, summarize
from dist_stability.experiments.progress import Progress
from dist_stability.report.events import read_json

ROUNDS, QUICK_ROUNDS = 5, 1
_IN_MEMORY = Path("/dev/shm")


def recovery(device: torch.device, ranks: int, quick: bool) -> dict[str, Any]:
    """Measure every size.

    Args:
        device: Where to compute.
        ranks: 1: no parallelism; more: FSDP2.
        quick: As little as possible.

    Returns:
        By size: ``bytes`` of a rank, and by way the seconds of each part, ``until state``, ``our share`` of that
        (construction of the controller, and the state), ``over memcpy``, ``over memcpy into new memory`` and ``over
        shared memory`` (of the state), ``restart over shared memory`` (until the state is there); and the summary keys
        of the command, of the largest size.

    Raises:
        RanksFailed: A start did not come to its end.
    """
    sizes = QUICK[-1:] if quick else SIZES[-2:]
    found = {size.name: _measure(size, device, ranks, QUICK_ROUNDS if quick else ROUNDS) for size in sizes}
    ways = found[sizes[-1].name]["ways"]
    return {
        "ranks": ranks,
        "sizes": found,
        "resume_over_limit": ways[OURS[0]]["over memcpy"]["median"],
        "our_share": ways[OURS[0]]["our share"]["median"],
        **{
            f"{way}_over_shared_memory": {
                "state": ways[way]["over shared memory"]["median"],
                "restart": ways[way]["restart over shared memory"]["median"],
            }
            for way in WAYS[1:]
        },
    }


def _measure(size: Size, device: torch.device, ranks: int, rounds: int) -> dict[str, Any]:
    in_memory = _IN_MEMORY if _IN_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=in_memory) as memory, tempfile.TemporaryDirectory() as disk:
        folders = Path(memory), Path(disk)
        trained = _start(TRAIN, size, device, ranks, folders)
        title = f"restarts of {ranks} ranks, {size.name}: {trained['bytes'] / 1e6:.3g} MB on each"
        with Progress(rounds, title) as bar:
            done = iter(range(1, rounds + 1))
            times = interleave(
                {way: partial(_start, way, size, device, ranks, folders) for way in WAYS},
                rounds,
                warm_up=0,
                tick=lambda: bar.advance(next(done)),
            )
    return {"bytes": int(trained["bytes"]), "ways": with_ratios(times)}


def with_ratios(times: Mapping[str, Numbers]) -> dict[str, dict[str, dict[str, float]]]:
    """Quartiles of what starts took, by way and part, and of what follows from it; see :func:`recovery`."""
    before_first_step = PARTS[:-1]
    for each in times.values():
        each["until state"] = [sum(parts) for parts in zip(*(each[part] for part in before_first_step), strict=True)]
    found = summarize(times)
    reference = times[OURS[0]]
    for way, each in times.items():
        ours = [sum(parts) for parts in zip(each["controller"], each["state"], strict=True)]
        found[way] |= {
            "our share": ratio(ours, each["until state"]),
            "over memcpy": ratio(each["state"], each["memcpy"]),
            "over memcpy into new memory": ratio(each["state"], each["memcpy into new memory"]),
            "over shared memory": ratio(each["state"], reference["state"]),
            "restart over shared memory": ratio(each["until state"], reference["until state"]),
        }
    return found


def _start(way: str, size: Size, device: torch.device, ranks: int, folders: tuple[Path, Path]) -> dict[str, float]:
    """All ranks of one start, as an agent starts them; the longest time of each part."""
    memory, disk = folders
    _put_out_of_the_page_cache(disk)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        command = [sys.executable, "-m", "dist_stability.bench.engine.starts", way]
        command += ["single" if ranks == 1 else "fsdp2", device.type, str(size.width), str(size.layers)]
        command += [str(memory), str(disk), str(out)]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), BEGAN: str(time.time())}
                with (out / f"rank-{rank}.log").open("wb") as log:
                    started.append(
                        subprocess.Popen(
                            command, env={**environment(), **common, **own}, stdout=log, stderr=subprocess.STDOUT
                        )
                    )
            _await(started, way, out)
        finally:
            for process in started:
                process.kill()
                process.wait()
        found = [read_json(out / f"rank-{rank}.json") for rank in range(ranks)]
    return {key: max(each[key] for each in found) for key in found[0]}


def _await(started: Sequence[subprocess.Popen[bytes]], way: str, out: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    for rank, process in enumerate(started):
        try:
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise RanksFailed(f"rank {rank}, {way}: no end within {LIMIT_SECONDS:g} s") from error
        if status:
            shown = "\n  ".join(last_lines((out / f"rank-{rank}.log").read_text(errors="replace")))
            raise RanksFailed(f"rank {rank}, {way}: ended with status {status}:\n  {shown}")


def _put_out_of_the_page_cache(folder: Path) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
