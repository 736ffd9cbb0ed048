"""``bench step``: whole training steps, plain, guarded in several ways, and as the reference controller guards them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch.distributed as dist

from dist_stability.bench.engine.arms import CPU_WORK, GPU_WORK, SMALL_WORK, Guarded, Loop, Plain, Work, make_loops
from dist_stability.bench.engine.counting import counting
from dist_stability.bench.engine.timing import Numbers, interleave, quartiles, ratio, summarize, synchronize
from dist_stability.experiments.progress import Progress
from dist_stability.experiments.wrapping import Processes
from dist_stability.measured_cadence import MeasuredCadence

BLOCK = 8
"""Steps timed at once; a cadence of 8 judges one of them."""

ROUNDS, QUICK_ROUNDS = 9, 2
AUTO_STEPS, QUICK_AUTO_STEPS = 256, 40


def work_for(device: str, quick: bool) -> Work:
    """What is trained on a device."""
    return SMALL_WORK if quick else GPU_WORK if device == "cuda" else CPU_WORK


def step(here: Processes, mode: str, quick: bool) -> dict[str, Any]:
    """Compare the loops in one parallel mode. All ranks call it together; rank 0's numbers count.

    Returns:
        By loop: ``ms`` and ``cpu_ms`` (processor time of this rank) per step, ``over_plain`` and ``cpu_over_plain``
        (over those of plain, in pairs), ``overhead_ratio`` (added share of the time),
        ``seconds`` by part of a judged step, ``collectives_per_step`` (all), ``own_collectives_per_step``,
        ``own_bytes``, ``host_syncs_per_step`` (beyond plain); the loop ``auto``; ``reference_over_guarded`` (what the
        reference adds to a plain step, over what guarded adds, probes included) and ``reference_copy_over_guarded``
        (for how long its copies hold the training thread, over ours).
    """
    work = work_for(here.device.type, quick)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    loops = {loop.name: loop for loop in make_loops(work, here, mode)}
    with Progress(rounds, f"step, {mode}: {', '.join(loops)}", shown=here.rank == 0) as bar:
        done = iter(range(-1, rounds + 2))
        times = interleave(
            {name: partial(_block, loop) for name, loop in loops.items()},
            rounds,
            tick=lambda: bar.advance(max(0, next(done))),
        )
    found = _compare(times, {name: loop.seconds for name, loop in loops.items()})
    for name, loop in loops.items():
        found[name] |= _count(loop)
        found[name]["refused"] = loop.refused if isinstance(loop, Guarded) else 0
        loop.close()
    plain = found["plain"]["host_reads_per_step"]
    for each in found.values():
        each["host_syncs_per_step"] = each["host_reads_per_step"] - plain
    return {
        "work": vars(work),
        "loops": found,
        "reference_over_guarded": _added(found, here.device.type),
        "reference_copy_over_guarded": _held(found),
        "auto": _auto(work, here, mode, QUICK_AUTO_STEPS if quick else AUTO_STEPS),
    }


def headline(modes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The summary keys of the command, from the last mode; with rivals."""
    last = list(modes.values())[-1]
    loops = last["loops"]
    keys = ("overhead_ratio", "own_collectives_per_step", "collectives_per_step", "host_syncs_per_step")
    best = "guarded, deferred" if "guarded, deferred" in loops else "guarded"
    of = {name: {key: loops[name][key] for key in keys} for name in loops if name != "plain"}
    return {
        **{key: of[best][key] for key in keys if key != "own_collectives_per_step"},
        "collectives_per_step": of[best]["own_collectives_per_step"],
        "measured_loop": best,
        "reference_over_guarded": last["reference_over_guarded"],
        "reference_copy_over_guarded": last["reference_copy_over_guarded"],
        "loops": {name: each for name, each in of.items() if name != "clone + deepcopy"},
        "rivals": {"clone + deepcopy": of["clone + deepcopy"]},
    }


def _block(loop: Loop, steps: int = BLOCK) -> dict[str, float]:
    if loop.here.world_size > 1:
        dist.barrier()
    synchronize(loop.here.device)
    begin, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        loop.step()
    synchronize(loop.here.device)
    taken, used = time.perf_counter() - begin, time.process_time() - used
    return {"ms": 1e3 * taken / steps, "cpu_ms": 1e3 * used / steps}


def _compare(times: Mapping[str, Numbers], seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    found: dict[str, Any] = summarize(times)
    for name in times:
        over = ratio(times[name]["ms"], times["plain"]["ms"])
        found[name]["over_plain"] = over
        found[name]["overhead_ratio"] = over["median"] - 1
        found[name]["cpu_over_plain"] = ratio(times[name]["cpu_ms"], times["plain"]["cpu_ms"])
        found[name]["seconds"] = {part: median(values) for part, values in seconds[name].items()}
    return found


def _added(loops: Mapping[str, Any], device: str) -> float | None:
    """What clone + deepcopy adds to a plain step, over what guarded adds; None where that adds nothing.

    In processor time where that is all there is: other programs on the machine do not change it.
    """
    metric = "over_plain" if device == "cuda" else "cpu_over_plain"
    theirs, ours = (loops[name][metric]["median"] - 1 for name in ("clone + deepcopy", "guarded"))
    return theirs / ours if ours > 0 else None


def _held(loops: Mapping[str, Any]) -> float:
    theirs, ours = (float(loops[name]["seconds"]["copy"]) for name in ("clone + deepcopy", "guarded"))
    return theirs / ours


def _count(loop: Loop) -> dict[str, Any]:
    """Per step, over a block."""
    with counting(loop.here.device, loop.groups) as counts:
        for _ in range(BLOCK):
            loop.step()
    return {
        "collectives_per_step": counts.collectives.total() / BLOCK,
        "own_collectives_per_step": counts.ours.total() / BLOCK,
        "own_bytes": counts.own_bytes,
        "host_reads_per_step": counts.host_reads.total() / BLOCK,
        "host_reads": dict(counts.host_reads),
        "collectives": dict(counts.collectives),
    }


def _auto(work: Work, here: Processes, mode: str, steps: int) -> dict[str, Any]:
    """``every="auto"``: long stretches in turn with plain ones, since it looks at the clock itself.

    The overhead is that of the stretches that began after the first choice.
    """
    plain = Plain("plain", work, here, mode)
    guarded = Guarded("guarded, auto", work, here, mode, every="auto")
    stretch = max(BLOCK, steps // 8)
    ratios: list[float] = []
    for _ in range(8):
        chosen = bool(guarded.notes)
        pair = [_block(loop, stretch)["ms"] for loop in (plain, guarded)]
        if chosen:
            ratios.append(pair[1] / pair[0])
    cadence = guarded.controller.cadence
    guarded.close()
    assert isinstance(cadence, MeasuredCadence)
    return {
        "interval": cadence.interval,
        "bound": cadence.bound,
        "notes": guarded.notes,
        "over_plain": quartiles(ratios) if ratios else None,
    }
