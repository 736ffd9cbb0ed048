"""How long a restart takes, from shared memory, from our checkpoint, and from the same checkpoint by torch's own means.

    python tests/persist/measure_recovery.py [width] [layers] [rounds]

Trains a transformer with FSDP2 on two ranks for three steps, ends it as a preemption does, and starts it again in every
way in turn. Prints seconds by part (median of the rounds, of the slower rank), and ratios of the same rounds. Files are
put out of the page cache before each start.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

BEGAN = float(os.environ.get("MEASURE_BEGAN", "0"))
WAYS = ("shared memory", "checkpoint", "torch's DCP")
PARTS = ("interpreter, imports", "rendezvous", "model, optimizer", "controller", "state", "first step")


def rank(way: str, width: int, layers: int, folder: Path) -> None:
    """One rank of one start: prints its times as JSON."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from dist_stability import Checkpoints, LossProbe, SharedMemory, StabilityController
    from dist_stability.experiments.text import CharacterTransformer
    from dist_stability.experiments.wrapping import Processes, wrap

    marks = [time.time()]
    dist.init_process_group("gloo")
    dist.barrier()
    marks.append(time.time())
    torch.manual_seed(0)
    here = Processes(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    plain = CharacterTransformer(256, width=width, layers=layers)
    model = wrap(plain, list(plain.blocks), "fsdp2", dtype=torch.float32, here=here)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    marks.append(time.time())
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))

    def loss_fn(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return module(batch).float().square().mean()

    memory, disk = SharedMemory("measure", folder / "memory"), Checkpoints(folder / "disk", every=1000)
    persist = {"train": [memory, disk], "shared memory": [memory], "checkpoint": [disk]}.get(way)
    controller = StabilityController(model, optimizer, LossProbe(loss_fn, [tokens]), persist=persist, anchors=0)
    marks.append(time.time())
    if way in ("shared memory", "checkpoint"):
        assert controller.resume().attempt == 3
    elif way == "torch's DCP":
        # The state must exist to be loaded into; a step with gradients of zero makes it.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        parts: Any = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        [found] = (folder / "disk").glob("attempt-*")
        dcp.load(parts, checkpoint_id=found)
        set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        controller.load_state_dict(controller.state_dict())
    marks.append(time.time())
    for _ in range(3 if way == "train" else 1):
        optimizer.zero_grad()
        loss_fn(model, tokens).backward()
        if way == "train":
            controller.step()
    marks.append(time.time())
    if way == "train":
        controller.leave()
    print(json.dumps([after - before for before, after in zip([BEGAN, *marks], marks, strict=False)]), flush=True)
    controller._close(failed=True)
    os._exit(0)


def start(way: str, width: int, layers: int, folder: Path) -> list[float]:
    """Both ranks; the longer time of each part."""
    for path in (folder / "disk").rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank", way, str(width), str(layers), str(folder)]
    ranks = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                **common,
                "GLOO_SOCKET_IFNAME": "lo",
                "RANK": str(rank),
                "MEASURE_BEGAN": str(time.time()),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [each.communicate(timeout=300)[0] for each in ranks]
    assert all(each.returncode == 0 for each in ranks), said
    return [max(pair) for pair in zip(*(json.loads(text.splitlines()[-1]) for text in said), strict=True)]


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    given = [int(word) for word in sys.argv[1:]]
    width, layers, rounds = [*given, *(576, 8, 5)[len(given) :]]
    times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "memory").symlink_to(memory)
        start("train", width, layers, folder)
        size = sum(path.stat().st_size for path in (folder / "disk").rglob("*") if path.is_file())
        for _ in range(rounds):
            for way in WAYS:
                times[way].append(start(way, width, layers, folder))
    print(f"{size / 2**20:.0f} MiB in the checkpoint, two ranks, {rounds} rounds")
    for way in WAYS:
        parts = [median(row[place] for row in times[way]) for place in range(len(PARTS))]
        shown = ", ".join(f"{part} {seconds:.2f}" for part, seconds in zip(PARTS, parts, strict=True))
        ours = median((row[3] + row[4]) / sum(row[:5]) for row in times[way])
        print(f"{way}: {shown}; until the state is there {sum(parts[:5]):.2f} s, {ours:.0%} of it controller and state")
    for way in WAYS[1:]:
        pairs = list(zip(times[way], times[WAYS[0]], strict=True))
        state = median(a[4] / b[4] for a, b in pairs)
        whole = median(sum(a[:5]) / sum(b[:5]) for a, b in pairs)
        print(f"{way} over {WAYS[0]}: state {state:.2f}, whole restart {whole:.2f}")


if __name__ == "__main__":
    main()
