"""What torchrun starts in test_lost_host.py: a small guarded run that goes on from wherever its state is.

    host_worker.py MODE STEPS FOLDER HOST OUT [ATTEMPT]

Writes to OUT what it resumed, the whole state at the beginning of each attempt, and the digest it ended with. With
ATTEMPT this rank and its agent die there as if the power had gone, in the first start.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zoo
from torch.distributed.tensor import DTensor
from zoo import Case, Setup

from dist_stability import PeerCopies, SharedMemory, parallel
from dist_stability.testing import capture_state


def whole(setup: Setup) -> dict[str, Any]:
    """Parameters and optimizer state by name, as whole tensors. All ranks together."""
    parallel.reshard(setup.model)
    names = {id(p): name.removeprefix("module.") for name, p in setup.model.named_parameters()}
    found: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()

    for optimizer in setup.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                put(names[id(parameter)], parameter)
                for key, value in sorted(optimizer.state[parameter].items()):
                    put(f"{key} of {names[id(parameter)]}", value)
    return found


def main(mode: str, steps: int, folder: str, host: str, out: Path, death: int) -> None:
    warnings.simplefilter("always")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    rank, world, start_number = dist.get_rank(), dist.get_world_size(), len(list(out.glob(f"started-{host}-*")))
    (out / f"started-{host}-{start_number}").touch()
    case = Case(mode, scheduler=True, steps=steps)
    setup = zoo.build(case, rank, world)
    persist = [SharedMemory(folder=folder), PeerCopies(every=2, host=host)]
    with zoo.control(case, setup, persist=persist, timeout=10.0) as controller:
        start = controller.resume()
        said = {"attempt": start.attempt, "line": start.line, "rank": rank, "world": world}
        (out / f"resumed-{host}-{start_number}.json").write_text(json.dumps(said))
        if start:
            torch.save(whole(setup), out / f"resumed-{host}-{start_number}.pt")
        for attempt in range(start.attempt, steps):
            if not start:
                torch.save(whole(setup), out / f"whole-{host}-{attempt}.pt")
            if attempt == death and start_number == 0:
                os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, None)
            for scheduler in setup.extra_state.values():
                scheduler.step()
        controller.finish()
        torch.save(capture_state(setup.model, setup.optimizers, setup.extra_state), out / f"end-{host}.pt")
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


if __name__ == "__main__":
    mode, steps, folder, host, out, *rest = sys.argv[1:]
    main(mode, int(steps), folder, host, Path(out), int(rest[0]) if rest else -1)
