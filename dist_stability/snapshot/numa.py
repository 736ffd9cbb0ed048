"""Which memory of the machine is nearest to a device, and a wish to get pages there.

A machine with several sockets has a part of its memory at each of them; a copy from a GPU to the part at another socket
goes over the link between them, which eight ranks would share. Linux says in ``/sys`` where a device is, and takes a
preference for a range of addresses before its pages are made: where that part of the memory is full, others are used.
Nothing depends on it, so whatever does not work is left as it is.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import torch

_MBIND = {"x86_64": 237, "aarch64": 235}.get(platform.machine())
_PREFERRED = 1  # MPOL_PREFERRED
_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


def node_of(device: torch.device, root: Path = Path("/")) -> int | None:
    """The number of the memory node that a CUDA device is at; None if the system does not say.

    Args:
        device: A CUDA device.
        root: Where ``sys`` is.
    """
    properties = torch.cuda.get_device_properties(device)
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")  # not in every torch
    domain, bus, number = (int(getattr(properties, name, -1)) for name in names)
    place = f"{domain:04x}:{bus:02x}:{number:02x}.0"
    try:
        node = int((root / "sys/bus/pci/devices" / place / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # -1: the system does not know


def prefer(first: int, size: int, node: int) -> bool:
    """Ask for pages of a range of addresses from one node; those that are there already stay where they are.

    Args:
        first: Where the range begins, at a page.
        size: Its bytes.
        node: See :func:`node_of`.

    Returns:
        Whether the system took it.
    """
    if sys.platform != "linux" or _MBIND is None:
        return False
    words = node // _BITS + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // _BITS] = 1 << node % _BITS
    # The kernel looks at one bit less than it is told of.
    numbers = (ctypes.c_long(_MBIND), ctypes.c_void_p(first), ctypes.c_ulong(size), ctypes.c_long(_PREFERRED))
    return bool(ctypes.CDLL(None).syscall(*numbers, mask, ctypes.c_ulong(words * _BITS + 1), ctypes.c_uint(0)) == 0)
