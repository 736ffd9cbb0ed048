"""AUROC, intervals and Fisher's test against what they are by definition."""

from __future__ import annotations

import math
import random

import pytest

from dist_stability.experiments.spectral.statistics import auroc, auroc_interval, fisher


def by_pairs(scores: list[float], labels: list[bool]) -> float:
    pairs = [
        (a, b) for a, x in zip(scores, labels, strict=True) if x for b, y in zip(scores, labels, strict=True) if not y
    ]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_is_the_chance_of_the_right_order(levels: int) -> None:
    draw = random.Random(levels)
    scores = [float(draw.randrange(levels)) for _ in range(60)]
    labels = [draw.random() < 0.3 + 0.4 * score / levels for score in scores]
    assert auroc(scores, labels) == pytest.approx(by_pairs(scores, labels))
    assert auroc([-score for score in scores], labels) == pytest.approx(1 - by_pairs(scores, labels))


def test_auroc_of_what_is_not_a_question() -> None:
    assert auroc([math.inf, math.inf, 0.0], [True, False, False]) == 0.75
    assert math.isnan(auroc([1.0, 2.0], [True, True]))
    with pytest.raises(ValueError, match="NaN"):
        auroc([1.0, math.nan], [True, False])
    with pytest.raises(ValueError, match="2 scores for 1"):
        auroc([1.0, 2.0], [True])


def test_intervals_are_by_group() -> None:
    """Ten copies of each run in one group say no more than one copy; as runs of their own they would."""
    draw = random.Random(1)
    scores = [draw.gauss(0.8 * (place % 2), 1.0) for place in range(30)]
    labels = [place % 2 == 1 for place in range(30)]
    low, high = auroc_interval(scores, labels, list(range(30)), resamples=400)
    assert low < auroc(scores, labels) < high and high - low > 0.2
    copies = list(range(30)) * 10
    grouped = auroc_interval(scores * 10, labels * 10, copies, resamples=400)
    alone = auroc_interval(scores * 10, labels * 10, list(range(300)), resamples=400)
    assert grouped == pytest.approx((low, high)) and alone[1] - alone[0] < 0.6 * (high - low)
    assert auroc_interval([1.0], [True], [0], resamples=5)[0] != 0.0  # NaN


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1, 10), (11, 14), 0.002759456185220083),  # scipy.stats.fisher_exact
        ((16, 24), (3, 24), 0.00027506701357312433),
        ((33, 48), (23, 48), 0.06182232405126738),
        ((0, 5), (0, 7), 1.0),
        ((3, 3), (0, 3), 0.1),
    ],
)
def test_fisher(first: tuple[int, int], second: tuple[int, int], expected: float) -> None:
    assert fisher(first, second) == pytest.approx(expected, rel=1e-6)
    assert fisher(second, first) == pytest.approx(expected, rel=1e-6)


def test_fisher_of_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="between 0 and the runs"):
        fisher((4, 3), (0, 3))
