"""One rank of one start of a job, and how long each part of it took: what ``bench recovery`` starts again and again.

The first start trains, and ends as a preempted job does, with its state in shared memory and in a checkpoint on disk.
The others bring the state back in one way and make one step. Every start ends as a death would: nothing is tidied up.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import AdamW, Optimizer

from dist_stability import Checkpoints, LossProbe, SharedMemory, StabilityController
from dist_stability.bench.engine.keepers import Memcpy
from dist_stability.bench.engine.states import VOCABULARY
from dist_stability.bench.engine.timing import synchronize
from dist_stability.experiments.text import CharacterTransformer
from dist_stability.experiments.wrapping import Processes, processes, wrap
from dist_stability.report.events import write_json
from dist_stability.snapshot import StatePlan

TRAIN = "train"
OURS = ("shared memory", "checkpoint")
TORCH = "torch's DCP"
WAYS = (*OURS, TORCH)
PARTS = ("interpreter", "rendezvous", "model", "controller", "state", "first step")
"""What follows each other in a start: with imports; until all ranks have met; with the optimizer; its construction, and
the first snapshot; until what was trained is back; forward, backward and a judged step."""

BEGAN = "DIST_STABILITY_BENCH_BEGAN"
"""Environment: when the process was started, in seconds since the epoch."""

STEPS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """One rank; writes seconds by part, and those of a memcpy of as many bytes. Does not return."""
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=(TRAIN, *WAYS))
    parser.add_argument("mode")
    parser.add_argument("device")
    parser.add_argument("width", type=int)
    parser.add_argument("layers", type=int)
    parser.add_argument("memory", type=Path)
    parser.add_argument("disk", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    marks = [float(os.environ[BEGAN]), time.time()]
    with processes(options.mode, options.device, int(os.environ["LOCAL_RANK"])) as here:
        _meet(here)
        marks.append(time.time())
        found = _start(options, here, marks)
        write_json(options.out / f"rank-{here.rank}.json", found)
        _meet(here)
        os._exit(0)


def _start(options: argparse.Namespace, here: Processes, marks: list[float]) -> dict[str, Any]:
    torch.manual_seed(0)
    with here.device:
        plain = CharacterTransformer(VOCABULARY, width=options.width, layers=options.layers)
    model = wrap(plain, list(plain.blocks), options.mode, dtype=torch.float32, here=here)
    optimizer = AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1)).to(here.device)
    _mark(marks, here)
    memory, disk = SharedMemory("bench", options.memory), Checkpoints(options.disk, every=1000)
    persist: Any = {TRAIN: [memory, disk], OURS[0]: [memory], OURS[1]: [disk]}.get(options.way)
    controller = StabilityController(model, optimizer, LossProbe(_loss, [tokens]), persist=persist, anchors=0)
    _mark(marks, here)
    if options.way in OURS:
        start = controller.resume()
        if start.attempt != STEPS:
            raise RuntimeError(f"rank {here.rank}: expected to resume at attempt {STEPS}: {start.line}")
    elif options.way == TORCH:
        _load(model, optimizer, options.disk)
        controller.load_state_dict(controller.state_dict())  # what stands is the committed state
    _mark(marks, here)
    for _ in range(STEPS if options.way == TRAIN else 1):
        optimizer.zero_grad()
        _loss(model, tokens).backward()
        controller.step()
    _mark(marks, here)
    if options.way == TRAIN:
        controller.leave()
    plan = StatePlan.build(model, [optimizer], here.world_size)
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    limits = _limits(Memcpy(model, optimizer, plan, here.device))
    return {**dict(zip(PARTS, seconds, strict=True)), **limits, "bytes": plan.nbytes}


def _load(model: nn.Module, optimizer: Optimizer, disk: Path) -> None:
    """As a user of torch does. The state must exist to be loaded into: a step of nothing first."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    parts: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    [found] = disk.glob("attempt-*")
    dcp.load(parts, checkpoint_id=found)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])


def _limits(limit: Memcpy) -> dict[str, float]:
    """Seconds of a copy of the state's bytes into memory that was in use before, and into memory nobody has touched."""

    def timed(copy: Any) -> float:
        synchronize(limit.device)
        begin = time.perf_counter()
        copy()
        synchronize(limit.device)
        return time.perf_counter() - begin

    limit.restore()
    return {"memcpy": min(timed(limit.restore) for _ in range(3)), "memcpy into new memory": timed(limit.restore_anew)}


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).float().square().mean()


def _mark(marks: list[float], here: Processes) -> None:
    synchronize(here.device)
    marks.append(time.time())


def _meet(here: Processes) -> None:
    if here.world_size > 1:
        dist.barrier()


if __name__ == "__main__":
    main()
