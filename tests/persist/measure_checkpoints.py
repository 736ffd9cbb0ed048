"""What writing checkpoints beside the training costs: how long one takes, and a step meanwhile.

    python tests/persist/measure_checkpoints.py [parameters] [elements of each]

Prints milliseconds: the median of a step while nothing is written and while a checkpoint is, the time in ``seal`` at an
attempt that is due, the time of a delivery, and that of plain ``torch.save`` of the same state to the same folder.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure_shared_memory import Many

from dist_stability import Checkpoints, LossProbe, StabilityController
from dist_stability.persistence import Persistence
from dist_stability.snapshot.tiers.courier import Courier


def main() -> None:
    count, size = (int(word) for word in (sys.argv[1:] or ["300", "100000"]))
    sealed: list[float] = []
    delivered: list[float] = []
    seal, deliver = Persistence.seal, Courier._deliver

    def timed_seal(self: Persistence, *given: object) -> None:
        self._recovery.ring.safe.wait()
        begin = time.perf_counter()
        seal(self, *given)  # type: ignore[arg-type]
        sealed.append(time.perf_counter() - begin)

    def timed_deliver(self: Courier, job: object) -> None:
        begin = time.perf_counter()
        deliver(self, job)  # type: ignore[arg-type]
        delivered.append(time.perf_counter() - begin)

    Persistence.seal, Courier._deliver = timed_seal, timed_deliver  # type: ignore[method-assign,assignment]
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        model = Many(count, size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        probe = LossProbe(lambda module, batch: module(batch), [torch.ones(1)])
        kept = Checkpoints(Path(name) / "kept", every=20, keep=2)
        controller = StabilityController(model, optimizer, probe, persist=kept, anchors=0)
        persistence = controller._persistence
        assert persistence is not None and persistence._courier is not None
        alone, beside = [], []
        for _ in range(65):
            begin = time.perf_counter()
            optimizer.zero_grad()
            model(torch.ones(1)).backward()
            controller.step()
            took = time.perf_counter() - begin
            busy = any(not job.done.is_set() for job in persistence._courier._under_way.values())
            (beside if busy else alone).append(took)
        controller.close()
        live = controller._recovery.plan.tensors()
        begin = time.perf_counter()
        with (Path(name) / "plain").open("wb") as file:
            torch.save(live, file)
            file.flush()
            os.fsync(file.fileno())
        plain = time.perf_counter() - begin
    mib = sum(tensor.nbytes for tensor in live) / 2**20
    one, two = (1e3 * statistics.median(times) if times else float("nan") for times in (alone, beside))
    print(f"{len(live)} tensors, {mib:.0f} MiB: a step {one:.0f}, beside a delivery {two:.0f} ({len(beside)} steps)")
    print(f"seal when due {1e3 * statistics.median(sorted(sealed)[-3:]):.1f}", end=", ")
    print(f"a delivery {1e3 * statistics.median(delivered):.0f}, plain torch.save {1e3 * plain:.0f}")


if __name__ == "__main__":
    main()
