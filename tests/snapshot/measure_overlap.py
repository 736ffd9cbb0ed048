"""What a snapshot adds to two training steps, for each way to make it on the CPU: the table of docs/guarded-step.md.

python tests/snapshot/measure_overlap.py THREADS
"""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

from dist_stability.snapshot import Copier, HostWork, SlotRing, StatePlan

SIZES = ((64, 2, 256), (128, 4, 512), (384, 4, 256), (640, 4, 128))
"""Width, layers, tokens in a batch."""

REPEATS = 17


def measure(threads: int, width: int, layers: int, tokens: int) -> str:
    """One row: threads, MB of state, ms of two plain steps, and what each way adds (and takes until it returns)."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True), layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(tokens // 64, 64, width)

    def backward() -> None:
        model(x).square().mean().backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    backward()
    update()
    plan = StatePlan.build(model, [optimizer], 1)
    rings = {work: SlotRing(0, Copier(work)) for work in HostWork}
    whole: dict[HostWork | None, list[float]] = {None: [], **{work: [] for work in HostWork}}
    calls: dict[HostWork, list[float]] = {work: [] for work in HostWork}
    for repeat in range(REPEATS):
        for work in whole:
            begin = time.perf_counter()
            backward()
            update()
            if work is not None:
                at = time.perf_counter()
                slot = rings[work].begin()
                slot.fill(plan, repeat)
                slot.publish()
                rings[work].commit(slot)
                calls[work].append(time.perf_counter() - at)
            backward()
            if work is not None:
                rings[work].order()
            update()
            whole[work].append(time.perf_counter() - begin)
            if work is not None:
                rings[work].safe.wait()
    plain = low(whole[None])
    rows = [f"{low(whole[work]) - plain:+.1f} ({low(calls[work]):.1f})" for work in HostWork]
    return f"| {threads} | {plan.nbytes / 1e6:.1f} | {plain:.0f} | " + " | ".join(rows) + " |"


def low(seconds: list[float]) -> float:
    """The lower fifth of all but the first two, in ms: other programs can only add."""
    kept = sorted(seconds[2:])
    return kept[len(kept) // 5] * 1e3


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print("| threads | MB | two steps, ms | " + " | ".join(HostWork) + " |", flush=True)
    for size in SIZES:
        print(measure(int(sys.argv[1]), *size), flush=True)
