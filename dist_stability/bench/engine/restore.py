"""``bench restore``: how long it takes to put a copy back, over a memcpy of as many bytes in the same run."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import torch

from dist_stability.bench.engine.arms import Guarded, RefuseEveryThird
from dist_stability.bench.engine.keepers import RIVALS, Keeper, Memcpy, Slots, make_keepers
from dist_stability.bench.engine.states import GPU_SIZES, QUICK, SIZES, Size, build
from dist_stability.bench.engine.step import work_for
from dist_stability.bench.engine.timing import interleave, quartiles, ratio, summarize, synchronize
from dist_stability.experiments.progress import Progress
from dist_stability.experiments.wrapping import Processes
from dist_stability.snapshot import StatePlan

ROUNDS, QUICK_ROUNDS = 15, 3
ROLLBACKS, QUICK_ROLLBACKS = 12, 2


def restore(device: torch.device, quick: bool) -> dict[str, Any]:
    """Measure every size, without a vote; see :func:`rollback` for the whole.

    Returns:
        By size and keeper: ``ms``, ``over_limit``; and the summary keys of the command.
    """
    sizes = QUICK if quick else GPU_SIZES if device.type == "cuda" else SIZES
    found = {size.name: _measure(size, device, QUICK_ROUNDS if quick else ROUNDS) for size in sizes}
    large = found[sizes[-1].name]["keepers"]
    return {
        "sizes": found,
        "restore_over_limit": large["ours"]["over_limit"]["median"],
        "rivals": {
            name: {"restore_over_limit": large[name]["over_limit"]["median"]} for name in RIVALS if name in large
        },
    }


def rollback(here: Processes, mode: str, quick: bool) -> dict[str, Any]:
    """A whole rollback in a training run: check the slot, vote, restore, compare digests, vote.

    Returns:
        ``rollback_ms`` and ``vote_ms`` (the vote of the judged step), ``limit_ms`` (memcpy of as many bytes, measured
        between the steps), ``over_limit`` and ``over_limit_less_votes`` (without two votes), with quartiles.
    """
    loop = Guarded("rollback", work_for(here.device.type, quick), here, mode, rule=RefuseEveryThird())
    wanted = 2 + (QUICK_ROLLBACKS if quick else ROLLBACKS)
    loop.step()
    plan = StatePlan.build(loop.model, [loop.optimizer], here.world_size)
    limit = Memcpy(loop.model, loop.optimizer, plan, here.device)
    limits: list[float] = []
    while loop.refused < wanted:
        before = loop.refused
        loop.step()
        if loop.refused > before:
            limits.append(_timed(limit)["ms"])
    loop.close()
    taken = [1e3 * seconds for seconds in loop.seconds["restore"][-wanted + 2 :]]
    vote = 1e3 * median(loop.seconds["vote"])
    limits = limits[-len(taken) :]
    return {
        "bytes": plan.nbytes,
        "rollback_ms": quartiles(taken),
        "limit_ms": quartiles(limits),
        "vote_ms": vote,
        "over_limit": ratio(taken, limits),
        "over_limit_less_votes": ratio([each - 2 * vote for each in taken], limits),
    }


def _measure(size: Size, device: torch.device, rounds: int) -> dict[str, Any]:
    model, optimizer, plan = build(size, device)
    keepers, missing = make_keepers(model, optimizer, plan, device)
    for keeper in keepers.values():
        for _ in range(2):  # both slots of a ring get their memory
            keeper.take()
            keeper.wait()
    # Ours goes first into the plan's tensors: load_state_dict of the others replaces optimizer state by new tensors.
    ours = keepers["ours"]
    assert isinstance(ours, Slots)
    with Progress(rounds, f"restore, {size.name}: {plan.nbytes / 1e6:.3g} MB") as bar:
        done = iter(range(-1, rounds + 2))
        times = interleave(
            {**{name: partial(_timed, keeper) for name, keeper in keepers.items()}, "check": partial(_checked, ours)},
            rounds,
            tick=lambda: bar.advance(max(0, next(done))),
        )
    found: dict[str, Any] = summarize(times)
    for name in times:
        found[name]["over_limit"] = ratio(times[name]["ms"], times["memcpy"]["ms"])
    for keeper in keepers.values():
        keeper.close()
    return {"bytes": plan.nbytes, "tensors": len(plan.entries), "keepers": found, "missing": missing}


def _timed(keeper: Keeper) -> dict[str, float]:
    synchronize(keeper.device)
    begin = time.perf_counter()
    keeper.restore()
    synchronize(keeper.device)
    return {"ms": 1e3 * (time.perf_counter() - begin)}


def _checked(ours: Slots) -> dict[str, float]:
    begin = time.perf_counter()
    ours.check()
    return {"ms": 1e3 * (time.perf_counter() - begin)}
