"""``dist-stability bench snapshot|step|restore|edge|scale|recovery|gpu``: measure, write what a person reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dist_stability.bench.engine.machine import choose_device, describe, in_words
from dist_stability.bench.engine.pages import write_pages
from dist_stability.bench.engine.ranks import MODES, run_job
from dist_stability.bench.engine.recovery import recovery
from dist_stability.bench.engine.restore import restore
from dist_stability.bench.engine.scale import scale
from dist_stability.bench.engine.snapshot import snapshot
from dist_stability.bench.engine.step import headline
from dist_stability.report.events import write_json

PARTS = ("snapshot", "step", "restore", "edge", "scale")


def bench(
    name: str,
    out: Path,
    *,
    quick: bool = False,
    device: str = "auto",
    ranks: int = 1,
    link: float | None = None,
) -> dict[str, Any]:
    """Run one benchmark and write ``summary.json``, ``tables.md``, a figure and ``report.html``.

    Args:
        name: One of :data:`PARTS`, or "recovery".
        out: The folder.
        quick: Far too little for a figure; the same code.
        device: "auto", "cpu" or "cuda".
        ranks: Of ``step``, ``restore`` and ``edge``: with two or more, DDP and FSDP2 are measured on as many processes,
            too.
            Of ``recovery``: with two or more under FSDP2.
        link: Of ``scale``: GB/s from device to host; default: stated.

    Returns:
        The summary.

    Raises:
        ValueError: A setting is out of range, or there is no such device.
        RanksFailed: A job of several processes did not finish.
    """
    if ranks < 1:
        raise ValueError(f"--ranks must be at least 1, got {ranks}")
    if link is not None and not 0 < link < float("inf"):
        raise ValueError(f"--link must be GB/s above 0, got {link}")
    place = choose_device(device)
    if place.type == "cuda" and ranks > torch.cuda.device_count():
        raise ValueError(
            f"--ranks {ranks}: this machine has {torch.cuda.device_count()} CUDA devices, one for each rank"
        )
    out.mkdir(parents=True, exist_ok=True)
    machine = describe(place)
    print(in_words(machine), flush=True)
    summary = {"benchmark": name, "quick": quick, "machine": machine, **_run(name, place, ranks, quick, link)}
    write_json(out / "summary.json", summary)
    write_pages(out, summary)
    return summary


def bench_gpu(out: Path, *, quick: bool = False, ranks: int = 1) -> dict[str, Any]:
    """All benchmarks on CUDA, each in a folder of its own, and a summary of their headlines.

    Raises:
        ValueError: There is no CUDA device.
    """
    choose_device("cuda")
    headlines: dict[str, Any] = {}
    link = None
    for name in PARTS:
        found = bench(name, out / name, quick=quick, device="cuda", ranks=ranks, link=link)
        if name == "snapshot":
            link = _link(found)
        headlines[name] = {key: value for key, value in found.items() if key not in ("sizes", "modes", "rows")}
        write_json(out / "summary.json", headlines)
    return headlines


def _run(name: str, device: torch.device, ranks: int, quick: bool, link: float | None) -> dict[str, Any]:
    modes = MODES if ranks > 1 else MODES[:1]
    if name == "snapshot":
        return snapshot(device, quick)
    if name == "scale":
        return scale(quick, link)
    if name == "recovery":
        return recovery(device, ranks, quick)
    job = "rollback" if name == "restore" else name
    found = {mode: run_job(job, mode, ranks, device, quick) for mode in modes}
    for mode, each in found.items():
        each["ranks"] = 1 if mode == "single" else ranks
    if name == "step":
        return {"modes": found, **headline(found)}
    last = found[modes[-1]]
    if name == "edge":
        return {"modes": found, "monitor_over_plain": last["monitor_over_plain"]["median"]}
    return {
        **restore(device, quick),
        "rollback": found,
        "rollback_over_limit": last["over_limit"]["median"],
        "rollback_over_limit_less_votes": last["over_limit_less_votes"]["median"],
    }


def _link(found: dict[str, Any]) -> float:
    """GB/s of a memcpy of the largest state."""
    largest = max(found["sizes"].values(), key=lambda size: size["bytes"])
    return float(largest["bytes"] / 1e6 / largest["keepers"]["memcpy"]["there_ms"]["median"])
