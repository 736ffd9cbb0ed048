"""What the tables need: AUROC, its bootstrap by configuration, and Fisher's exact test."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Chance that a positive scores higher than a negative, ties counting half. NaN without both kinds.

    A score may be infinite; one that is NaN is refused.

    Raises:
        ValueError: The lengths differ, or a score is NaN.
    """
    if len(scores) != len(labels):
        raise ValueError(f"auroc: {len(scores)} scores for {len(labels)} labels")
    if any(math.isnan(score) for score in scores):
        raise ValueError("auroc: a score is NaN; leave the run out or give it a value")
    positives = sum(labels)
    negatives = len(labels) - positives
    if not positives or not negatives:
        return math.nan
    order = sorted(range(len(scores)), key=lambda place: scores[place])
    below, wins, start = 0, 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        tied = sum(labels[place] for place in order[start:end])
        wins += tied * (below + 0.5 * (end - start - tied))
        below += end - start - tied
        start = end
    return wins / (positives * negatives)


def auroc_interval(
    scores: Sequence[float],
    labels: Sequence[bool],
    groups: Sequence[Hashable],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the AUROC when whole groups are drawn again: runs of one group are no independent facts.

    Draws without both kinds of labels are left out. (NaN, NaN) if there is none with both.
    """
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    every = list(members.values())
    draw = random.Random(seed)
    values = []
    for _ in range(resamples):
        places = [place for _ in every for place in every[draw.randrange(len(every))]]
        value = auroc([scores[place] for place in places], [labels[place] for place in places])
        if not math.isnan(value):
            values.append(value)
    if not values:
        return math.nan, math.nan
    values.sort()
    tail = (1 - level) / 2
    return values[round(tail * (len(values) - 1))], values[round((1 - tail) * (len(values) - 1))]


def fisher(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Two-sided p-value of Fisher's exact test: (events, runs) of one arm against another.

    The sum of the probabilities of all tables, with the same margins, that are no likelier than the one seen.

    Raises:
        ValueError: More events than runs, or a negative count.
    """
    (a, n), (c, m) = first, second
    if not (0 <= a <= n and 0 <= c <= m):
        raise ValueError(f"fisher: events must be between 0 and the runs, got {first} and {second}")
    events = a + c
    weights = {k: math.comb(n, k) * math.comb(m, events - k) for k in range(max(0, events - m), min(n, events) + 1)}
    return sum(weight for weight in weights.values() if weight <= weights[a]) / sum(weights.values())
