"""What keeping snapshots in shared memory costs a step, and how long a restart takes to have its state back.

    python tests/persist/measure_shared_memory.py [parameters] [elements of each]

Prints milliseconds: the lower fifth over steps of the time in ``seal``; and of the processor's time, which other
programs disturb less, that of ``resume()``, of a digest of the state, a copy of it, and a copy into memory that is new.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_stability import LossProbe, SharedMemory, StabilityController
from dist_stability.persistence import Persistence


class Many(nn.Module):
    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(size)) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([(part * x).square().mean() for part in self.parts]).mean()


def make(count: int, size: int, folder: Path) -> tuple[nn.Module, torch.optim.Optimizer, StabilityController]:
    torch.manual_seed(0)
    model = Many(count, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probe = LossProbe(lambda module, batch: module(batch), [torch.ones(1)])
    controller = StabilityController(model, optimizer, probe, persist=SharedMemory("measure", folder), anchors=0)
    return model, optimizer, controller


def processor(work: Callable[[], object]) -> float:
    """Milliseconds; a full pass of the garbage collector over torch, 200 of them, comes before and not at random."""
    gc.collect()
    begin = time.process_time()
    work()
    return 1e3 * (time.process_time() - begin)


def main() -> None:
    count, size = (int(word) for word in (sys.argv[1:] or ["300", "100000"]))
    times: list[float] = []
    original = Persistence.seal

    def seal(self: Persistence, *given: Any) -> None:
        self._recovery.ring.safe.wait()  # the copy is not what is measured
        begin = time.perf_counter()
        original(self, *given)
        times.append(time.perf_counter() - begin)

    Persistence.seal = seal  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        model, optimizer, controller = make(count, size, Path(name))
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.ones(1)).backward()
            controller.step()
        controller._close(failed=True)
        lower = sorted(times[2:])[2]
        model, optimizer, controller = make(count, size, Path(name))
        found = []
        took = processor(lambda: found.append(controller.resume()))
        live = controller._recovery.plan.tensors()
        copies = [torch.empty_like(tensor) for tensor in live]
        anew = processor(lambda: torch._foreach_copy_(copies, live))
        copied = min(processor(lambda: torch._foreach_copy_(copies, live)) for _ in range(3))
        summed = min(processor(lambda: controller._recovery.plan.digests(live)) for _ in range(3))
        controller.close()
    mib = sum(tensor.nbytes for tensor in live) / 2**20
    print(f"{len(live)} tensors, {mib:.0f} MiB: seal {1e3 * lower:.1f}; resume {took:.0f} ({found[0].attempt}),")
    print(f"a digest {summed:.0f}, a copy {copied:.0f}, into new memory {anew:.0f};")
    print(f"resume over a copy {took / copied:.1f}, over one into new memory {took / anew:.1f}")


if __name__ == "__main__":
    main()
