"""``dist-stability doctor``: what this machine has, what limits it, and what would go wrong in a guarded run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_stability.report.extras import INSTALL_HINT
from dist_stability.report.versions import versions

GROUP_SECONDS = 60.0
CGROUPS = Path("/sys/fs/cgroup")
TRAIN_EXTRA = ("torchvision", "numpy", "sklearn", "matplotlib", "rich")

_PEER = """
import sys, torch, torch.distributed as dist
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
value = torch.ones(4, dtype=torch.float64)
dist.all_reduce(value)
assert value.tolist() == [2.0] * 4
dist.destroy_process_group()
"""


def examine() -> dict[str, Any]:
    """Everything the doctor looks at, as plain data.

    Starts two short-lived processes to see whether a process group forms on this machine.
    """
    found: dict[str, Any] = {
        "versions": versions(),
        "backends": backends(),
        "devices": devices(),
        "groups": two_processes(),
        "memory": memory(),
        "extras": {name: importlib.util.find_spec(name) is not None for name in TRAIN_EXTRA},
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
        "threads": {"omp_num_threads": os.environ.get("OMP_NUM_THREADS"), "torch": torch.get_num_threads()},
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    found["hazards"] = hazards(found)
    return found


def backends() -> dict[str, bool]:
    """Which communication backends this torch was built with."""
    if not dist.is_available():
        return {"gloo": False, "nccl": False, "mpi": False}
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}


def devices() -> dict[str, Any]:
    """Processors this process may use, and accelerators."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    names = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "cpus": usable,
        "accelerator": accelerator.type if accelerator is not None else None,
        "accelerators": torch.accelerator.device_count() if accelerator is not None else 0,
        "names": names,
        "cuda": torch.version.cuda,
    }


def memory(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> dict[str, int | None]:
    """Bytes of memory, and the limits on it; None where there is no limit, or none could be read.

    Args:
        cgroups: Where the control groups are mounted.
        own: The file that names this process's control group.
    """
    return {
        "physical": _physical(),
        "cgroup_limit": _cgroup_limit(cgroups, own),
        "memlock_limit": _memlock(),
        "shared_memory": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
    }


def two_processes() -> dict[str, Any]:
    """Start two processes that form a gloo group over the loopback device and add up a vector."""
    if not (dist.is_available() and dist.is_gloo_available()):
        return {"gloo_two_processes": False, "seconds": 0.0, "error": "this torch has no gloo backend"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        environment["GLOO_SOCKET_IFNAME"] = loopback[0]
    begin = time.monotonic()
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", _PEER, str(rank), str(port)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    try:
        for rank, peer in enumerate(peers):
            _, errors = peer.communicate(timeout=max(0.1, GROUP_SECONDS - (time.monotonic() - begin)))
            if peer.returncode != 0:
                said.append(f"rank {rank}: {(errors.strip().splitlines() or ['no message'])[-1]}")
    except subprocess.TimeoutExpired:
        said.append(f"no answer within {GROUP_SECONDS:.0f} s")
    finally:
        for peer in peers:
            if peer.poll() is None:
                peer.kill()
                peer.wait()
    return {"gloo_two_processes": not said, "seconds": time.monotonic() - begin, "error": "; ".join(said) or None}


def hazards(found: Mapping[str, Any]) -> list[str]:
    """What would go wrong, or be slow, in a guarded run on this machine; one sentence each, with the remedy."""
    said = []
    memory_found, devices_found = found["memory"], found["devices"]
    if not found["groups"]["gloo_two_processes"]:
        said.append(
            f"Two local processes could not form a gloo group ({found['groups']['error']}): no distributed run will "
            f"start. Check the loopback device and GLOO_SOCKET_IFNAME."
        )
    missing = [name for name, there in found["extras"].items() if not there]
    if missing:
        said.append(
            f"Not installed: {', '.join(missing)}. The demo, the tasks and the figures need them: {INSTALL_HINT}"
        )
    limit, physical = memory_found["cgroup_limit"], memory_found["physical"]
    if limit is not None and (physical is None or limit < physical):
        said.append(
            f"The control group allows {_bytes(limit)}, the machine has {_bytes(physical)}: host copies of the state "
            f"(one, with deep restores three) count against the former, and a job that passes it is killed."
        )
    if devices_found["accelerators"] and memory_found["memlock_limit"] is not None:
        said.append(
            f"At most {_bytes(memory_found['memlock_limit'])} may be locked (ulimit -l): pinned snapshots may not fit; "
            f"raise the limit to unlimited for the job."
        )
    shared = memory_found["shared_memory"]
    if shared is not None and shared < 256 * 2**20:
        said.append(f"/dev/shm holds only {_bytes(shared)}: NCCL and data-loader workers need more.")
    if found["threads"]["omp_num_threads"] is None and (devices_found["cpus"] or 1) > 1:
        said.append(
            "OMP_NUM_THREADS is not set: several processes on this machine will each start "
            f"{found['threads']['torch']} threads. Set it to the processors each one may use."
        )
    if devices_found["accelerator"] == "cuda" and not found["deterministic_algorithms"]:
        said.append(
            "torch.use_deterministic_algorithms is off: rollbacks are exact all the same, but two runs, and so a run "
            "and its golden twin, may differ by the order of atomic additions."
        )
    if devices_found["accelerators"] > 1 and not found["backends"]["nccl"]:
        said.append("Several accelerators, but this torch has no NCCL: they cannot train together.")
    if found["compiler"] is None:
        said.append("No C++ compiler found: torch.compile on the CPU (--compile) will fail.")
    return said


def show(found: Mapping[str, Any]) -> str:
    """The findings as text for a terminal."""
    gpu = found["devices"]
    groups, limits, threads = found["groups"], found["memory"], found["threads"]
    lines = ["Versions"]
    lines += [f"  {name:<16}{version}" for name, version in found["versions"].items()]
    lines += [
        "Backends",
        "  " + ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in found["backends"].items()),
        "Devices",
        f"  {gpu['cpus']} processors, "
        + (
            f"{gpu['accelerators']} x {gpu['accelerator']} {', '.join(gpu['names'])}"
            if gpu["accelerator"]
            else "no accelerator"
        ),
        f"  threads: OMP_NUM_THREADS={threads['omp_num_threads']}, torch uses {threads['torch']}",
        "Groups",
        f"  two processes over gloo: {groups['error'] or 'ok'} ({groups['seconds']:.1f} s)",
        "Memory",
        f"  physical          {_bytes(limits['physical'])}",
        f"  cgroup limit      {_bytes(limits['cgroup_limit'], 'none')}",
        f"  locked memory     {_bytes(limits['memlock_limit'], 'unlimited')}",
        f"  /dev/shm          {_bytes(limits['shared_memory'])}",
        "Hazards",
    ]
    lines += [f"  - {hazard}" for hazard in found["hazards"]] or ["  none found"]
    return "\n".join(lines)


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _memlock() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _cgroup_limit(cgroups: Path, own: Path) -> int | None:
    """The smallest limit on the way from this process's control group to the root: each of them binds."""
    try:
        entries = [line.split(":", 2) for line in own.read_text().splitlines() if line.count(":") >= 2]
    except OSError:
        entries = []
    # Version 2 has one hierarchy without controllers in its entry; version 1 one for memory, mounted below its name.
    places = [(cgroups, path, "memory.max") for _, controllers, path in entries if not controllers]
    places += [
        (cgroups / "memory", path, "memory.limit_in_bytes")
        for _, controllers, path in entries
        if "memory" in controllers.split(",")
    ]
    limits = []
    for root, path, name in places:
        inside = root / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if folder == root.parent:
                break
            limits += _limit(folder / name)
    return min(limits, default=None)


def _limit(file: Path) -> list[int]:
    """The limit in a file, if there is one; version 1 spells "none" as a number near 2**63."""
    try:
        text = file.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() and int(text) < 2**60 else []


def _bytes(number: int | None, absent: str = "unknown") -> str:
    if number is None:
        return absent
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
