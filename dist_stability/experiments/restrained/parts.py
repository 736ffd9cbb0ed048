"""What an experiment of this package is: subjects, the work on one of them, and what all their results say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Settings = Mapping[str, Any]
"""Of one job: plain data, from which its work follows. ``name`` is that of its file."""

Result = dict[str, Any]
"""What a job left: plain data, with its ``settings``."""


@dataclass(frozen=True)
class Check:
    """One pass band.

    Attributes:
        what: What was measured.
        band: What it must be, for people.
        measured: What it was: with seeds, the smallest, the median and the largest.
        passed: All of it lies in the band; None for what is only told beside the bands.
    """

    what: str
    band: str
    measured: str
    passed: bool | None


@dataclass(frozen=True)
class Outcome:
    """What all results of a part say.

    Attributes:
        checks: The pass bands; empty where nothing is claimed.
        head: Of the table.
        rows: Of the table.
        note: What one must know to read it.
    """

    checks: Sequence[Check]
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Part:
    """One experiment.

    Attributes:
        name: On the command line.
        title: Says that it is an analogue where it is one.
        settings: The jobs in full, or (True) one or two that only show that it runs.
        work: One job, in a worker.
        conclude: Takes the results that are there, at least one. Incomplete ones are concluded from as they are.
        parallel: Whether jobs may run beside each other; not where they measure time.
        version: Of its work: a result of another version is made again.
    """

    name: str
    title: str
    settings: Callable[[bool], list[Settings]]
    work: Callable[[Settings], Result]
    conclude: Callable[[Sequence[Result]], Outcome]
    parallel: bool = True
    version: int = 1


def spread(values: Sequence[float]) -> str:
    """Smallest, median and largest, or the one value."""
    if not values:
        return "nothing measured"
    if len(values) == 1 or min(values) == max(values):
        return f"{values[0]:.4g}"
    return f"{min(values):.4g} .. {median(values):.4g} .. {max(values):.4g} ({len(values)})"


def within(what: str, values: Sequence[float], low: float = -math.inf, high: float = math.inf) -> Check:
    """Every value lies in [low, high]; NaN does not."""
    if low == high:
        band = f"{low:g}"
    elif math.isinf(high):
        band = f">= {low:g}"
    else:
        band = f"<= {high:g}" if math.isinf(low) else f"{low:g} .. {high:g}"
    return Check(what, band, spread(values), bool(values) and all(low <= value <= high for value in values))


def close(what: str, values: Sequence[float], expected: float, *, within_fraction: float) -> Check:
    """Every value is the expected one within a fraction of it."""
    little = within_fraction * abs(expected)
    passed = bool(values) and all(abs(value - expected) <= little for value in values)
    return Check(what, f"{expected:g} +- {100 * within_fraction:g} %", spread(values), passed)


def every(what: str, holds: Sequence[bool]) -> Check:
    """A statement holds in every case."""
    return Check(what, "all", f"{sum(holds)} of {len(holds)}", bool(holds) and all(holds))


def told(what: str, values: Sequence[float], beside: str = "") -> Check:
    """A measured spread without a band."""
    return Check(what, beside, spread(values), None)


def by_seed(results: Sequence[Result], key: str) -> dict[int, dict[Any, Result]]:
    """Results by seed and then by one of their settings, in ascending order of both."""
    found: dict[int, dict[Any, Result]] = {}
    for result in sorted(results, key=lambda each: (each["settings"]["seed"], each["settings"][key])):
        settings = result["settings"]
        found.setdefault(settings["seed"], {})[settings[key]] = result
    return found
