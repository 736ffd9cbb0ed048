"""A training program whose state is sharded: told to stop, it saves at the step boundary and hands over.

Every rank writes its own shards. A slot counts only if every rank has it. With ``--pause-at K`` the first life waits
before step K until it is told to stop, so that a test knows where a run was cut without racing it.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from dist_stability.submission import Preemption


def shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """This rank's part of the parameters and of the optimizer's tensors, in a fixed order, as views."""
    parameters = list(model.parameters())
    tensors: list[Tensor] = list(parameters)
    for parameter in parameters:
        tensors += [value for _, value in sorted(optimizer.state[parameter].items())]
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    inputs = torch.randn(8, 16, generator=generator)
    loss = (model(inputs) - inputs.roll(1, 1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pause-at", type=int, default=-1)
    parser.add_argument("--resume", choices=("auto",))
    options = parser.parse_args()
    dist.init_process_group("gloo")
    with Preemption() as preemption:
        run(options, preemption)
    # gloo's threads need the GIL to let go of the last collective; asking an ending interpreter for it aborts the
    # process (seen: status 134). This gives them time, and FSDP's objects give the group back before it is destroyed.
    gc.collect()
    dist.destroy_process_group()


def run(options: argparse.Namespace, preemption: Preemption) -> None:
    rank = dist.get_rank()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 33), nn.GELU(), nn.Linear(33, 16))
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    slot = options.out / f"rank{rank}.pt"
    step = 0
    here = torch.tensor([torch.load(slot)["step"] if options.resume and slot.exists() else 0])
    dist.all_reduce(here, op=dist.ReduceOp.MIN)
    if here.item():
        saved = torch.load(slot)
        assert saved["step"] == here.item(), "the ranks saved different steps"
        train_step(model, optimizer, 0)  # makes the optimizer's state, to be overwritten
        with torch.no_grad():
            for tensor, value in zip(shards(model, optimizer), saved["shards"], strict=True):
                tensor.copy_(value)
        step = saved["step"]
    with open(options.out / f"lives-rank{rank}", "a") as file:
        print(step, os.getpid(), os.environ.get("SLURMD_NODENAME", "local"), file=file, flush=True)

    mark = options.out / f"paused-rank{rank}"
    pause_at = -1 if mark.exists() else options.pause_at
    while step < options.steps:
        stop = preemption.agreed()
        while step == pause_at and not stop:
            mark.touch()
            time.sleep(0.1)
            stop = preemption.agreed()
        if stop:
            held = {"step": step, "shards": [shard.clone() for shard in shards(model, optimizer)]}
            torch.save(held, slot.with_suffix(".tmp"))
            os.replace(slot.with_suffix(".tmp"), slot)
            print(f"rank {rank}: saved before step {step}", flush=True)
            preemption.hand_over()
        train_step(model, optimizer, step)
        step += 1
    digest = hashlib.sha256()
    for shard in shards(model, optimizer):
        digest.update(shard.detach().contiguous().numpy().tobytes())
    (options.out / f"final-rank{rank}").write_text(f"{step} {digest.hexdigest()}\n")


if __name__ == "__main__":
    main()
