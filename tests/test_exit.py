"""A process that ends without close(): nothing of the controller's may still run when the interpreter goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from choice import often

LOOP = """
import atexit, json, os, sys

def left_over():  # registered first, so called last
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    print("threads:", json.dumps(names))

atexit.register(left_over)
import torch, torch.distributed as dist
from dist_stability import LossProbe, StabilityController

rank, folder, ending = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batch = torch.ones(4, 4)
probe = LossProbe(lambda module, batch: module(batch).square().mean(), [batch])
controller = StabilityController(model, optimizer, probe)
for _ in range(3):
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    controller.step()
if ending == "closed":
    controller.close()
    controller.close()
if ending != "left":
    dist.destroy_process_group()
if ending == "forgotten":
    del controller
"""


@pytest.mark.parametrize("ending", often(("closed", "open", "forgotten", "left"), ("closed", "left")))
def test_no_thread_of_the_vote_outlives_the_loop(ending: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LOOP, str(rank), str(tmp_path), ending],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(ranks):
            printed, errors = process.communicate(timeout=120)
            assert process.returncode == 0, f"rank {rank}: {errors}"
            threads = json.loads(printed.rsplit("threads:", 1)[1])
            assert threads.count("python") == 1  # no watch
            assert threads.count("pt_gloo_runloop") <= 2  # those of the loop's own group, as DDP still refers to it
    finally:
        for process in ranks:
            process.kill()
            process.wait()
