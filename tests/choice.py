"""Which cases of a large matrix every run of the tests takes, and which only ``make test-slow``."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest
import zoo
from zoo import Case

THIRDS = 3


def slow(value: Any) -> Any:
    """A parameter for the slow tests only; a tuple for several parameters."""
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


def often(values: Iterable[Any], chosen: Container[Any]) -> list[Any]:
    """Parameters of a test: the chosen ones as they are, the others marked slow."""
    return [value if value in chosen else slow(value) for value in values]


def in_thirds(which: int) -> pytest.MarkDecorator:
    """Parameters ``mode`` and ``third`` for :func:`third_of`: one third in every run, the whole marked slow.

    Of tests with different ``which`` each takes another third of each mode, so that three of them see all of its cases.
    """
    thirds = [pytest.param(mode, which + place, id=mode) for place, mode in enumerate(zoo.MODES)]
    wholes = [pytest.param(mode, None, id=f"{mode}-whole", marks=pytest.mark.slow) for mode in zoo.MODES]
    return pytest.mark.parametrize(("mode", "third"), [*thirds, *wholes])


def third_of(cases: list[Case], third: int | None) -> list[Case]:
    """Every third case from the given one on; all for None."""
    return cases if third is None else cases[third % THIRDS :: THIRDS]
