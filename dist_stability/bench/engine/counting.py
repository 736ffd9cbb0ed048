"""Counts of what a piece of code does: collectives, reads of device values by the host, allocations of tensors.

Counting slows the code down, so it is never done while something is timed.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_stability import parallel
from dist_stability.signals.sums import nothing_on_host

HOST_READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "is_nonzero", "equal")
"""Functions of a tensor that give its values to the host, and so wait for the device."""

_CALLS = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "barrier",
    "reduce",
    "all_to_all_single",
)
_NAMESPACES = ("c10d", "_c10d_functional")
_NOT_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd")


@dataclass
class Counts:
    """What was seen.

    Attributes:
        collectives: All of them, by operation, whoever started them.
        ours: Those on the groups that were asked about, by function.
        own_bytes: Bytes of the largest tensor that was all-reduced on those groups.
        host_reads: On CUDA: calls that waited for the device. Elsewhere: reads of tensor values by Python, by function;
            the CPU is taken for a device there, and what lies on the host anyway is counted as well.
    """

    collectives: Counter[str] = field(default_factory=Counter)
    ours: Counter[str] = field(default_factory=Counter)
    own_bytes: int = 0
    host_reads: Counter[str] = field(default_factory=Counter)


class _Dispatched(TorchDispatchMode):
    """Sees operators, those that C++ starts, too (DDP's reducer)."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(parallel.is_dtensor(leaf) for leaf in tree_leaves(args)):
            return NotImplemented  # it comes again, as the operators it is made of
        name = func._opname
        if func.namespace in _NAMESPACES and name not in _NOT_COLLECTIVES:
            self._counts.collectives[name.rstrip("_")] += 1
        return func(*args, **(kwargs or {}))


class _Read(TorchFunctionMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in HOST_READS:
            self._counts.host_reads[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting(device: torch.device, groups: tuple[Any, ...] = ()) -> Iterator[Counts]:
    """Count what the block does on this thread.

    Args:
        device: Where the training state lies.
        groups: Process groups whose collectives are ours; see :func:`made_groups`.
    """
    counts = Counts()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_patched(counts, groups))
        if device.type == "cuda":
            stack.enter_context(_cuda_syncs(counts))
        else:
            stack.enter_context(nothing_on_host())
            stack.enter_context(_Read(counts))
        stack.enter_context(_Dispatched(counts))
        yield counts


@contextlib.contextmanager
def _patched(counts: Counts, groups: tuple[Any, ...]) -> Iterator[None]:
    """Operators do not say which group they are on; the functions of torch.distributed do."""
    originals = {name: getattr(dist, name) for name in _CALLS if dist.is_available() and hasattr(dist, name)}

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(kwargs.get("group") is group for group in groups):
                counts.ours[name] += 1
                if name == "all_reduce":
                    counts.own_bytes = max(counts.own_bytes, args[0].numel() * args[0].element_size())
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(dist, name, counted(name, original))
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@contextlib.contextmanager
def _cuda_syncs(counts: Counts) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    counts.host_reads["synchronize"] = sum("synchronizing CUDA operation" in str(each.message) for each in said)


@contextlib.contextmanager
def made_groups() -> Iterator[list[Any]]:
    """The process groups that are made in the block."""
    made: list[Any] = []
    original = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        made.append(original(*args, **kwargs))
        return made[-1]

    dist.new_group = new_group
    try:
        yield made
    finally:
        dist.new_group = original


def allocations(device: torch.device, action: Callable[[], object]) -> tuple[int, int]:
    """How many times tensor memory was taken on this thread while ``action`` ran, and how many bytes in all.

    On CUDA both device memory and page-locked host memory of torch's allocators count.
    """
    if device.type == "cuda":
        before = _cuda_allocations()
        action()
        after = _cuda_allocations()
        return after[0] - before[0], after[1] - before[1]
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # some builds say on stderr that the profiler starts and stops
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=False) as profile:
        action()
    events = profile.kineto_results.events() if profile.kineto_results is not None else []
    taken = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    return len(taken), sum(taken)


def _cuda_allocations() -> tuple[int, int]:
    stats = torch.cuda.memory_stats()
    host = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
    times = stats.get("allocation.all.allocated", 0) + host.get("allocation.allocated", 0)
    return times, stats.get("allocated_bytes.all.allocated", 0) + host.get("allocated_bytes.allocated", 0)
