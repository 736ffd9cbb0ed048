"""Times of several things, measured in turn again and again: what disturbs the machine then disturbs all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles
from typing import Any

import torch

Numbers = dict[str, list[float]]
"""By metric: one number for each round."""


def synchronize(device: torch.device) -> None:
    """Wait until the device is done. Sleeps between looks, so that waiting takes no CPU time."""
    if device.type == "cpu":
        return
    module = torch.get_device_module(device)
    event = module.Event()
    event.record(module.current_stream(device))
    while not event.query():
        time.sleep(2e-5)
    module.synchronize(device)


def interleave(
    contestants: Mapping[str, Callable[[], Mapping[str, float]]],
    rounds: int,
    warm_up: int = 2,
    tick: Callable[[], object] | None = None,
) -> dict[str, Numbers]:
    """Run every contestant once per round, each round beginning with another one.

    Args:
        contestants: By name: does its work once and returns what it measured.
        rounds: Rounds that count.
        warm_up: Rounds before them that do not.
        tick: Called after every round.

    Returns:
        For each contestant, its numbers of the rounds that count, in the order of the rounds.
    """
    names = list(contestants)
    found: dict[str, Numbers] = {name: {} for name in names}
    for number in range(warm_up + rounds):
        gc.collect()  # one contestant's garbage is not collected at another's expense
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for metric, value in contestants[name]().items():
                if number >= warm_up:
                    found[name].setdefault(metric, []).append(value)
        if tick is not None:
            tick()
    return found


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def summarize(found: Mapping[str, Numbers]) -> dict[str, dict[str, dict[str, float]]]:
    """Quartiles of everything that :func:`interleave` returned."""
    return {name: {metric: quartiles(values) for metric, values in each.items()} for name, each in found.items()}


def ratio(numbers: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """Quartiles of the ratios within each round: a slow moment of the machine is in both numbers."""
    return quartiles([mine / other for mine, other in zip(numbers, to, strict=True)])


def shown(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """Quartiles as a person reads them: median, and the quartiles in brackets."""
    if value is None:
        return ""
    return f"{value['median']:.{digits}g} ({value['low']:.{digits}g} to {value['high']:.{digits}g})"
