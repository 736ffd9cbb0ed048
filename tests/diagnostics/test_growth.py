"""Jump, growth and verdict from distances alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_stability.diagnostics.growth import Verdict, divergence_horizon, fit_growth, judge

FALLING = [2.0 * 0.98**t for t in range(200)]


def grown(jump: float, rate: float, steps: int, ceiling: float = math.inf) -> list[float]:
    return [min(ceiling, jump * math.exp(rate * t)) for t in range(steps)]


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-9, 1e-7), st.floats(0.15, 1.0))
def test_the_exponent_is_found_whatever_the_ceiling(jump: float, rate: float) -> None:
    found = fit_growth(grown(jump, rate, 200, ceiling=0.2))
    assert found.rate == pytest.approx(rate, rel=1e-6) and found.r_squared == pytest.approx(1.0)
    assert found.saturation == next(t for t in range(200) if jump * math.exp(rate * t) > 1e-2)
    assert found.jump == pytest.approx(jump * math.exp(3 * rate)) and found.plateau == pytest.approx(0.2)


def test_a_jump_is_no_growth() -> None:
    """What Adam does with one ulp: up at once, then nothing."""
    found = fit_growth([1e-9, 8e-7, 8e-7, *[8.1e-7] * 40])
    assert abs(found.rate) < 1e-9 and found.jump == pytest.approx(8.1e-7) and found.saturation is None


@pytest.mark.parametrize(
    ("distances", "verdict"),
    [
        (grown(1e-8, 0.001, 100), Verdict.BENIGN),
        ([0.0] * 100, Verdict.BENIGN),
        (grown(1e-8, 0.3, 100, ceiling=3e-3), Verdict.BENIGN),
        (grown(1e-8, 0.3, 100, ceiling=0.1), Verdict.RESTRAINED),
        (grown(1e-8, 0.3, 100, ceiling=0.9), Verdict.UNRESTRAINED),
        (grown(1e-8, 0.13, 100), Verdict.UNRESTRAINED),
        ([*grown(1e-8, 0.3, 50), math.nan], Verdict.UNRESTRAINED),
    ],
)
def test_verdicts(distances: list[float], verdict: Verdict) -> None:
    losses = FALLING[: len(distances)]
    assert judge(distances, losses, losses)[0] is verdict


def test_a_loss_that_rises_or_breaks_is_unrestrained() -> None:
    distances = grown(1e-8, 0.3, 100, ceiling=0.1)
    rising = [2.0 + 0.05 * t for t in range(100)]
    assert judge(distances, FALLING[:100], rising)[0] is Verdict.UNRESTRAINED
    assert judge([0.0] * 3, [1.0, 1.0, math.inf], [1.0] * 3)[0] is Verdict.UNRESTRAINED


def test_the_horizon_is_measured_or_extrapolated() -> None:
    distances = grown(1e-8, 0.3, 100)
    seen = divergence_horizon(distances)
    assert (seen.steps, seen.measured) == (47, True)  # ln(1e6) / 0.3 = 46.05
    guessed = divergence_horizon(distances[:20])
    assert not guessed.measured and abs(guessed.steps - 47) <= 1
    assert divergence_horizon([0.0] * 10).steps is None
    assert divergence_horizon([1e-8] * 10).steps is None
    with pytest.raises(ValueError, match="tolerance"):
        divergence_horizon(distances, 0.0)
