"""What copies on another host cost beside a step: two ranks, each as if it were alone on its host.

    torchrun --nproc_per_node=2 tests/persist/measure_peer_copies.py [parameters] [elements of each]

Prints the time of a delivery as a ratio to a plain copy of the bytes that are sent, and what a due attempt itself costs
the training, in milliseconds. Over the loopback of one machine; lower fifths.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure_shared_memory import Many
from torch.nn.parallel import DistributedDataParallel

from dist_stability import LossProbe, PeerCopies, SharedMemory, StabilityController
from dist_stability.persistence import Persistence
from dist_stability.snapshot.tiers.courier import Courier


def lower(times: list[float]) -> float:
    return sorted(times)[len(times) // 5]


def main() -> None:
    count, size = (int(word) for word in (sys.argv[1:] or ["300", "100000"]))
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    sealed: dict[bool, list[float]] = {True: [], False: []}
    carried: list[float] = []
    seal, deliver = Persistence.seal, Courier._deliver

    def timed_seal(self: Persistence, made: int, *given: Any) -> None:
        self._recovery.ring.safe.wait()
        begin = time.perf_counter()
        seal(self, made, *given)
        sealed[made % 4 == 0].append(time.perf_counter() - begin)

    def timed_deliver(self: Courier, job: Any) -> None:
        begin = time.perf_counter()
        deliver(self, job)
        carried.append(time.perf_counter() - begin)

    Persistence.seal, Courier._deliver = timed_seal, timed_deliver  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        torch.manual_seed(0)
        model = DistributedDataParallel(Many(count, size))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        probe = LossProbe(lambda module, batch: module(batch), [torch.ones(1)])
        persist = [SharedMemory("measure", Path(folder)), PeerCopies(every=4, host=f"host{rank}")]
        with StabilityController(model, optimizer, probe, persist=persist, anchors=0) as controller:
            for attempt in range(24):
                optimizer.zero_grad()
                model(torch.ones(1)).backward()
                controller.step()
                if attempt % 4 == 1:  # so that a delivery runs beside nothing else
                    while controller._persistence._courier._under_way:  # type: ignore[union-attr]
                        time.sleep(0.01)
                        controller._persistence._courier.poll()  # type: ignore[union-attr]
            data = controller._recovery.ring.safe.memory.data
            into = torch.empty_like(data)
            into.copy_(data)
            copies = []
            for _ in range(10):
                begin = time.perf_counter()
                into.copy_(data)
                copies.append(time.perf_counter() - begin)
    if rank == 0:
        took, copied = lower(carried[1:]), lower(copies)
        print(f"{data.numel() / 2**20:.0f} MiB sent by each rank: a delivery {1e3 * took:.0f} ms, {took / copied:.1f}")
        print(f"times a plain copy ({1e3 * copied:.0f} ms); a seal {1e3 * lower(sealed[False]):.1f} ms, of a due")
        print(f"attempt {1e3 * lower(sealed[True]):.1f} ms")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
