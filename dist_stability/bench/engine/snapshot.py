"""``bench snapshot``: what it costs the host to take a copy, until the call returns and until the copy is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from dist_stability.bench.engine.counting import allocations
from dist_stability.bench.engine.keepers import RIVALS, Keeper, make_keepers
from dist_stability.bench.engine.states import GPU_SIZES, QUICK, SIZES, SMALL, Size, build
from dist_stability.bench.engine.timing import interleave, ratio, summarize, synchronize
from dist_stability.experiments.progress import Progress
from dist_stability.snapshot import Slot, StatePlan

ROUNDS = 15
QUICK_ROUNDS = 3


def snapshot(device: torch.device, quick: bool) -> dict[str, Any]:
    """Measure every size.

    Returns:
        By size: bytes, and for each keeper ``returns_ms`` (until the call returns), ``there_ms`` (until the copy is
        there), ``cpu_ms`` (processor time of all threads until then: what is taken from a training loop in the same
        interpreter), ``bytes_over_payload``, ``allocations_after_warmup``; and the summary keys of the command.
    """
    sizes = QUICK if quick else GPU_SIZES if device.type == "cuda" else SIZES
    found = {size.name: measure(size, device, QUICK_ROUNDS if quick else ROUNDS) for size in sizes}
    return {"sizes": found, **_headline(found, [size.name for size in sizes])}


def measure(size: Size, device: torch.device, rounds: int) -> dict[str, Any]:
    """All keepers on one state, in turn."""
    model, optimizer, plan = build(size, device)
    keepers, missing = make_keepers(model, optimizer, plan, device)
    with Progress(rounds, f"snapshot, {size.name}: {plan.nbytes / 1e6:.3g} MB in {len(plan.entries)} tensors") as bar:
        done = iter(range(-1, rounds + 2))
        times = interleave(
            {name: partial(_timed, keeper) for name, keeper in keepers.items()},
            rounds,
            tick=lambda: bar.advance(max(0, next(done))),
        )
    measured: dict[str, Any] = summarize(times)
    for name, keeper in keepers.items():
        count, taken = allocations(device, partial(_once, keeper))
        measured[name] |= {
            "bytes_over_payload": keeper.held / plan.nbytes,
            "allocations_after_warmup": count,
            "allocated_bytes_after_warmup": taken,
            "cpu_over_ours": ratio(times[name]["cpu_ms"], times["ours"]["cpu_ms"]),
            "there_over_limit": ratio(times[name]["there_ms"], times["memcpy"]["there_ms"]),
        }
        keeper.close()
    parts = interleave(_parts(plan, device), rounds)
    return {
        "bytes": plan.nbytes,
        "tensors": len(plan.entries),
        "keepers": measured,
        "parts_cpu_ms": {name: each["cpu_ms"]["median"] for name, each in summarize(parts).items()},
        "missing": missing,
    }


def _parts(plan: StatePlan, device: torch.device) -> dict[str, Callable[[], dict[str, float]]]:
    """What ours is made of: each part alone."""
    live = plan.tensors()
    digests = plan.digests(live)
    words = torch.zeros(-(-plan.nbytes // 8), dtype=torch.int64, device=device)
    slot = Slot()

    def refill() -> None:
        slot.fill(plan, 0, digests)
        slot.wait()

    refill()
    return {
        "check of the plan": partial(_cpu, plan.is_current, device),
        "check and copy": partial(_cpu, refill, device),
        "digests of the copy": partial(_cpu, slot.verify, device),
        "digests of the live state": partial(_cpu, partial(plan.digests, live), device),
        "reading as many bytes once": partial(_cpu, words.sum, device),
    }


def _cpu(action: Callable[[], object], device: torch.device) -> dict[str, float]:
    begin = time.process_time()
    action()
    synchronize(device)
    return {"cpu_ms": 1e3 * (time.process_time() - begin)}


def _timed(keeper: Keeper) -> dict[str, float]:
    synchronize(keeper.device)
    begin, used = time.perf_counter(), time.process_time()
    keeper.take()
    returned = time.perf_counter()
    keeper.wait()
    there, used = time.perf_counter(), time.process_time() - used
    return {"returns_ms": 1e3 * (returned - begin), "there_ms": 1e3 * (there - begin), "cpu_ms": 1e3 * used}


def _once(keeper: Keeper) -> None:
    keeper.take()
    keeper.wait()


def _headline(found: dict[str, Any], sizes: Sequence[str]) -> dict[str, Any]:
    """Host time at many small tensors, where it is all there is; bytes and allocations at the largest state."""
    small = found[SMALL.name]["keepers"]
    large = found[sizes[-1]]["keepers"]
    keys = ("bytes_over_payload", "allocations_after_warmup")
    return {
        "host_ms_per_snapshot": small["ours"]["cpu_ms"]["median"],
        **{key: large["ours"][key] for key in keys},
        "largest_over_limit": large["ours"]["there_over_limit"]["median"],
        "rivals": {
            name: {
                "host_ms_per_snapshot": small[name]["cpu_ms"]["median"],
                "host_over_ours": small[name]["cpu_over_ours"]["median"],
                **{key: large[name][key] for key in keys},
                "largest_over_limit": large[name]["there_over_limit"]["median"],
            }
            for name in RIVALS
            if name in small and name in large
        },
    }
