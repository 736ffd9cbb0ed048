"""Where a statement stops being true."""

from __future__ import annotations

from collections.abc import Callable


def bisect(holds: Callable[[float], bool], yes: float, no: float, halvings: int = 40) -> float:
    """The place between ``yes``, where it holds, and ``no``, where it does not; on either side of each other.

    Raises:
        ValueError: It does not hold at ``yes``, or does at ``no``.
    """
    if not holds(yes) or holds(no):
        raise ValueError(f"bisect: expected true at {yes:g} and false at {no:g}")
    for _ in range(halvings):
        middle = (yes + no) / 2.0
        yes, no = (middle, no) if holds(middle) else (yes, middle)
    return (yes + no) / 2.0
