"""The figures; each names its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dist_stability.experiments.restrained.parts import Result

DRAWN: dict[str, list[tuple[str, Callable[[Sequence[Result]], Any]]]] = {}


def draw(part: str, results: Sequence[Result]) -> list[tuple[str, Any]]:
    """Name of the file and figure, of each figure of a part."""
    return [(file, function(results)) for file, function in DRAWN.get(part, [])]
