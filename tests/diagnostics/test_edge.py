"""The state machine: what it takes to change its mind, and that the edge is left alone."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from dist_stability.diagnostics.edge import EdgeAssessment, EdgeOfStability, EdgeReading, EdgeSettings, EdgeState
from dist_stability.rungs import Rung


def feed(machine: EdgeOfStability, begin: int, count: int, **values: Any) -> list[EdgeAssessment]:
    return [machine.observe(EdgeReading(begin + i, **values)) for i in range(count)]


def states(assessments: list[EdgeAssessment]) -> list[str]:
    return [each.state.value for each in assessments]


def test_a_state_takes_three_readings_in_a_row() -> None:
    machine = EdgeOfStability()
    assert states(feed(machine, 0, 3, margin=1.0)) == ["stable", "stable", "edge"]
    assert states(feed(machine, 3, 2, margin=1.4)) == ["edge", "edge"]
    assert states(feed(machine, 5, 2, margin=1.0)) == ["edge", "edge"]
    assert states(feed(machine, 7, 3, margin=1.4)) == ["edge", "edge", "overdriven"]
    assert states(feed(machine, 10, 3, margin=0.3)) == ["overdriven", "overdriven", "stable"]


def test_steps_without_a_margin_are_no_further_readings_of_it() -> None:
    machine = EdgeOfStability()
    feed(machine, 0, 1, margin=1.4)
    assert states(feed(machine, 1, 40, loss=1.0)) == ["stable"] * 40


def test_mixed_readings_raise_to_what_they_share() -> None:
    machine = EdgeOfStability()
    for step, margin in enumerate([1.4, 1.0, 1.4, 1.0, 1.4, 1.0]):
        last = machine.observe(EdgeReading(step, margin=margin))
    assert last.state is EdgeState.EDGE and last.rung is None


def test_the_edge_is_never_acted_on() -> None:
    draw = random.Random(1)
    machine = EdgeOfStability()
    for step in range(500):
        found = machine.observe(
            EdgeReading(step, margin=draw.uniform(0.85, 1.25), rho=draw.uniform(1.8, 2.2), loss=2.0 - 1e-3 * step)
        )
        assert found.rung is None and found.factor is None
    assert found.state is EdgeState.EDGE


def test_past_the_edge_the_learning_rate_is_cut_and_again_after_a_while() -> None:
    settings = EdgeSettings(cuts=True)
    machine = EdgeOfStability(settings)
    found = feed(machine, 0, 150, margin=1.6)
    acted = [(i, each.rung, each.factor) for i, each in enumerate(found) if each.rung is not None]
    assert acted == [(2, Rung.CUT_LR, 1 / 1.6), (102, Rung.CUT_LR, 1 / 1.6)]
    assert machine.products_due(150) == 1 - 1 and machine.products_due(200) == 1
    assert feed(machine, 150, 3, margin=50.0)[-1].factor is None  # acted a moment ago
    assert feed(EdgeOfStability(settings), 0, 3, margin=50.0)[-1].factor == 0.5
    reported = feed(EdgeOfStability(), 0, 150, margin=1.6)
    assert states(reported) == states(found) and not any(each.rung for each in reported)


def test_a_rising_loss_makes_a_middling_ratio_an_alarm() -> None:
    for slope, expected in ((-1e-3, EdgeState.EDGE), (1e-3, EdgeState.OVERDRIVEN)):
        machine = EdgeOfStability()
        for step in range(120):
            found = machine.observe(EdgeReading(step, rho=2.35, loss=1.0 + slope * step))
        assert found.state is expected
    assert feed(EdgeOfStability(), 0, 3, rho=2.6)[-1].state is EdgeState.OVERDRIVEN


def test_a_median_does_not_follow_one_reading() -> None:
    machine = EdgeOfStability()
    feed(machine, 0, 20, rho=0.5)
    assert feed(machine, 20, 3, rho=9.0)[-1].state is EdgeState.STABLE


def test_a_runaway_needs_both_or_something_that_is_not_finite() -> None:
    machine = EdgeOfStability()
    assert feed(machine, 0, 1, margin=2.5)[0].state is EdgeState.STABLE
    assert feed(machine, 1, 1, refused=True)[0].rung is Rung.SKIP
    assert feed(machine, 2, 1)[0].state is EdgeState.STABLE
    assert feed(EdgeOfStability(), 0, 1, margin=1.5, refused=True)[0].state is EdgeState.STABLE
    assert feed(EdgeOfStability(), 0, 1, finite=False)[0].state is EdgeState.RUNAWAY
    # An old margin is no evidence.
    stale = EdgeOfStability()
    feed(stale, 0, 1, margin=2.5)
    assert feed(stale, 300, 1, refused=True)[0].state is EdgeState.STABLE


def healthy(machine: EdgeOfStability, steps: int = 40) -> int:
    feed(machine, 0, steps, gradient_norm=1.0, effective_step=0.4, learning_rate=1e-3)
    return steps


@pytest.mark.parametrize("spike", [{"gradient_norm": 300.0}, {"update_rms": 50.0}])
def test_a_collapse_after_a_spike_is_poison(spike: dict[str, float]) -> None:
    machine = EdgeOfStability()
    step = healthy(machine)
    feed(machine, step, 10, effective_step=1.0, learning_rate=1e-3, **spike)
    found = feed(machine, step + 10, 5, gradient_norm=1.0, effective_step=0.007, learning_rate=1e-3)
    assert states(found) == ["stable", "stable", "poisoned", "poisoned", "poisoned"]
    assert [each.rung for each in found] == [None, None, Rung.DEEP_ROLLBACK, None, None]
    back = feed(machine, step + 15, 3, gradient_norm=1.0, effective_step=0.39, learning_rate=1e-3)
    assert states(back) == ["poisoned", "poisoned", "stable"]


def test_a_collapse_without_a_spike_or_with_another_rate_is_not() -> None:
    machine = EdgeOfStability()
    step = healthy(machine)
    assert set(states(feed(machine, step, 20, gradient_norm=1.0, effective_step=0.05))) == {"stable"}
    machine = EdgeOfStability()
    step = healthy(machine)
    feed(machine, step, 1, gradient_norm=300.0)
    assert set(states(feed(machine, step + 1, 20, effective_step=0.05, learning_rate=1e-4))) == {"stable"}


def test_poison_that_stays_is_given_in_to() -> None:
    machine = EdgeOfStability()
    step = healthy(machine)
    feed(machine, step, 1, gradient_norm=300.0)
    found = states(feed(machine, step + 1, 60, effective_step=0.01, learning_rate=1e-3))
    assert found[10] == "poisoned" and found[-1] == "stable"


def test_when_the_margin_is_measured() -> None:
    machine = EdgeOfStability()
    assert [machine.products_due(step) for step in (0, 4, 5)] == [0, 0, 3]
    feed(machine, 5, 1, margin=0.5, learning_rate=1e-3)
    assert [machine.products_due(step) for step in (6, 54, 55)] == [0, 0, 1]
    feed(machine, 6, 1, learning_rate=2e-3)
    # A schedule that moves all the time does not make every step a measurement.
    assert [machine.products_due(step) for step in (7, 14, 15, 16)] == [0, 0, 3, 3]


def test_no_evidence_changes_nothing() -> None:
    machine = EdgeOfStability()
    feed(machine, 0, 3, margin=1.0, rho=2.0)
    nan = math.nan
    values = {"margin": nan, "rho": nan, "effective_step": nan, "gradient_norm": nan, "update_rms": nan, "loss": nan}
    assert set(states(feed(machine, 3, 10, learning_rate=nan, **values))) == {"edge"}


def test_the_state_travels_and_tells_two_machines_apart() -> None:
    machine, other = EdgeOfStability(), EdgeOfStability()
    for one in (machine, other):
        feed(one, 0, 5, margin=1.0, rho=2.0, loss=1.0, gradient_norm=1.0, effective_step=0.3, learning_rate=1e-3)
    assert machine.fingerprint() == other.fingerprint() < 2**63
    restored = EdgeOfStability()
    restored.load_state_dict(machine.state_dict())
    assert restored.fingerprint() == machine.fingerprint() and restored.state is EdgeState.EDGE
    feed(other, 5, 1, rho=math.nextafter(2.0, 3.0))
    feed(machine, 5, 1, rho=2.0)
    feed(restored, 5, 1, rho=2.0)
    assert restored.fingerprint() == machine.fingerprint() != other.fingerprint()


def test_readings_are_made_of_signals() -> None:
    reading = EdgeReading.of(3, {"rho": 1.0, "training_loss": 2.0, "other": 9.0}, margin=0.5)
    assert reading == EdgeReading(3, rho=1.0, loss=2.0, margin=0.5)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="EdgeSettings patience: expected a positive number, got 0"):
        EdgeSettings(patience=0)
    with pytest.raises(ValueError, match="rho_window: expected a whole number"):
        EdgeSettings(rho_window=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="edge_margin <= overdriven_margin"):
        EdgeSettings(edge_margin=1.5)
    with pytest.raises(ValueError, match="collapse"):
        EdgeSettings(collapse=1.0)
    with pytest.raises(ValueError, match="cuts: expected True or False, got 1"):
        EdgeSettings(cuts=1)  # type: ignore[arg-type]
