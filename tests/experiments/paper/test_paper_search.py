"""Which values the searched arms take, on made-up results."""

from __future__ import annotations

import math

from dist_stability.experiments.paper import search
from dist_stability.experiments.paper.protocol import ROLLBACK, TUNED, protocol
from dist_stability.experiments.paper.search import Candidate, choose


def pair(epsilon: float, alpha: float, *finals: float, **others: int) -> Candidate:
    return Candidate({"epsilon": epsilon, "alpha": alpha}, finals, **others)


def taken(*candidates: Candidate) -> tuple[float, ...]:
    return tuple(choose(TUNED, candidates).values())


def test_the_smallest_mean_over_the_tuning_seeds_is_taken() -> None:
    assert taken(pair(1.0, 0.1, 0.1, 0.9), pair(0.5, 0.1, 0.4, 0.4)) == (0.5, 0.1)


def test_equals_go_to_the_larger_epsilon_then_to_the_first() -> None:
    small, large = pair(0.1, 0.1, 0.4), pair(0.5, 0.1, 0.4)
    assert taken(small, large) == taken(large, small) == (0.5, 0.1)
    assert taken(large, pair(0.5, 0.3, 0.4)) == (0.5, 0.1)
    windows = [Candidate({"loss_window": window}, (0.4,)) for window in (128, 64)]
    assert choose(ROLLBACK, windows) == {"loss_window": 128}


def test_a_candidate_that_refuses_clean_steps_or_stops_is_out() -> None:
    kept = pair(1.0, 0.1, 0.9)
    assert taken(kept, pair(0.1, 0.1, 0.1, false_refusals=1)) == (1.0, 0.1)
    assert taken(kept, pair(0.1, 0.1, 0.1, stopped=1)) == (1.0, 0.1)
    assert taken(kept, pair(0.1, 0.1, 0.1, math.nan)) == (1.0, 0.1)


def test_without_any_candidate_left_the_rules_own_values_are_taken() -> None:
    assert taken(pair(0.1, 0.3, 0.1, false_refusals=2)) == (0.5, 0.1)
    assert choose(ROLLBACK, [Candidate({"loss_window": 16}, (0.1,), stopped=1)]) == {"loss_window": 128}


def test_names_give_their_values_back() -> None:
    chosen = protocol("text")
    epsilons, alphas = search.stages(chosen, TUNED)
    assert [search.tried(name) for name in epsilons[:2]] == [{"epsilon": e, "alpha": 0.1} for e in (1.0, 0.5)]
    before = {"epsilon": 0.2, "alpha": 0.1}
    assert [search.tried(name, before) for name in alphas] == [{"epsilon": 0.2, "alpha": a} for a in (0.3, 1.0)]
    (windows,) = search.stages(chosen, ROLLBACK)
    assert [search.words(ROLLBACK, search.tried(name))[-1] for name in windows] == ["128", "64", "32", "16"]
    found = [search.origin(name) for name in (epsilons[0], alphas[0], windows[0], "guarded", TUNED)]
    assert found == [(TUNED, 1), (TUNED, 2), (ROLLBACK, 1), ("", 0), ("", 0)]


def test_the_table_says_who_is_out() -> None:
    assert pair(0.1, 0.3, 0.1, false_refusals=2).row()["objective"] is None
    assert pair(0.1, 0.3, 0.1, 0.3).row()["objective"] == 0.2
