"""Which ranks are on one host, and which rank of another host keeps a copy of what each of them has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_host() -> str:
    """A name that this host's ranks have in common, and no other host's: the id of its boot.

    Not the host name, which clones share and the containers of one machine do not: they are lost together. "" where the
    system has no such id.
    """
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def keepers(hosts: Mapping[int, str]) -> dict[int, int]:
    """Who keeps whose copy: for each rank, the one of the same place on the next host, the last host's on the first.

    Where the next host has fewer ranks, they take turns; where it has more, some keep none. So the loss of one host
    loses either what a rank has or its copy, never both.

    Args:
        hosts: The host of each rank.

    Returns:
        By rank, the rank that keeps its copy; empty if there is one host only.
    """
    ranks_of: dict[str, list[int]] = {}
    for rank in sorted(hosts):
        ranks_of.setdefault(hosts[rank], []).append(rank)
    lists = list(ranks_of.values())  # in the order of their first ranks
    if len(lists) < 2:
        return {}
    return {
        rank: following[place % len(following)]
        for here, following in zip(lists, [*lists[1:], lists[0]], strict=True)
        for place, rank in enumerate(here)
    }
