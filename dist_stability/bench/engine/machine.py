"""Where a benchmark ran."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from dist_stability.report.versions import versions


def choose_device(name: str) -> torch.device:
    """The device to measure on.

    Args:
        name: "auto", "cpu" or "cuda".

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda: this torch ({torch.__version__}) sees no CUDA device; use --device cpu, or run "
            f"`dist-stability doctor` to see what is there"
        )
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, torch and threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU",
        "cores": cores,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": [round(load, 2) for load in os.getloadavg()],
        "versions": versions(),
    }


def in_words(machine: dict[str, Any]) -> str:
    """One line for the top of a page."""
    return (
        f"{machine['cores']} cores ({machine['processor']}), {machine['device']}, torch {machine['torch']}, "
        f"{machine['threads']} threads, load {machine['load'][0]} at the start"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
