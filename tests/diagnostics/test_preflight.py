"""A preflight says of a rate what training would show, leaves no trace, and says what it rests on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import wrapped
from choice import often
from gpt import gpt, ids, loss
from harness import RankError
from torch import Tensor

from dist_stability import parallel
from dist_stability.diagnostics import lr_probe, rksp
from dist_stability.diagnostics.calibration import Calibrator
from dist_stability.diagnostics.preflight import MARGIN, SCORE, Level, Preflight, preflight, takes_adam_steps
from dist_stability.diagnostics.preflight import _level as level_of
from dist_stability.report.events import to_json

FAMILY = "small GPT without normalization, AdamW"
CALIBRATOR = Calibrator(SCORE, FAMILY, 2.0, 0.0, -3.0, 3.0, 81, 40, 27, 0.05, 0.25, ("a", "b"))


def looked(norm: str, lr: float, **options: Any) -> Preflight:
    batches = [ids(4, 32, seed=seed) for seed in range(2)]
    return preflight(gpt(norm, std=0.06), loss, batches, lr, **options)


def diverges(norm: str, lr: float) -> bool:
    """By training: 24 steps of AdamW, the same limits."""
    model = gpt(norm, std=0.06)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(24):
        value = loss(model, ids(4, 32, seed=step % 2))
        optimizer.zero_grad()
        value.backward()
        norm_now = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        if not (float(value.detach()) < 50 and norm_now < 500):
            return True
        optimizer.step()
    return False


def test_the_edge_lies_where_training_diverges_and_decides() -> None:
    found = looked("none", 0.01)
    assert found.search is not None and found.search.lr is not None and found.recommended is not None
    edge = found.search.lr
    assert found.recommended == edge / MARGIN
    assert diverges("none", 2 * edge) and not diverges("none", found.recommended)
    levels = {factor: looked("none", factor * edge).level for factor in (0.2, 0.7, 2.0)}
    assert levels == {0.2: Level.LOW, 0.7: Level.RAISED, 2.0: Level.HIGH}


def test_without_a_search_the_rate_and_twice_the_rate_decide() -> None:
    for lr in (1e-3, 0.02, 0.03, 0.04, 0.06, 0.3):
        found = looked("none", lr, search=False)
        assert found.risk is not None and found.margin_risk is not None
        want = Level.HIGH if found.risk.score >= 0 else Level.RAISED if found.margin_risk.score >= 0 else Level.LOW
        assert found.level is want and found.search is None and found.recommended is None
    assert looked("none", 0.3, search=False).level is Level.HIGH


@pytest.mark.parametrize(
    ("score", "margin", "edge", "level"),
    [
        (-1.0, -1.0, None, Level.LOW),
        (0.0, -1.0, None, Level.HIGH),
        (-1.0, 0.0, None, Level.RAISED),
        (-1.0, -1.0, 0.09, Level.HIGH),  # sixteen steps see more than eight
        (-1.0, -1.0, 0.15, Level.RAISED),
        (-1.0, -1.0, 0.25, Level.LOW),
        (math.inf, math.inf, 0.25, Level.HIGH),
    ],
)
def test_the_worst_of_what_was_seen_decides(score: float, margin: float, edge: float | None, level: Level) -> None:
    risk, twice = (lr_probe.Risk(lr, each, (1.0,), (1.0,)) for lr, each in ((0.1, score), (0.2, margin)))
    search = None if edge is None else lr_probe.Search(edge, 1.05 * edge, ())
    assert level_of(0.1, risk, twice, search) is level


def test_even_the_lowest_rate_may_be_too_risky_and_the_highest_safe() -> None:
    high = looked("none", 20.0)
    assert high.level is Level.HIGH and high.recommended is None and "too risky" in high.verdict
    low = looked("pre", 1e-6)
    assert low.level is Level.LOW and low.search is not None and low.search.too_risky is None
    assert "No edge" in low.verdict


def test_an_optimizer_that_takes_no_adam_steps_gets_no_verdict() -> None:
    model = gpt("none")
    found = preflight(model, loss, [ids(4, 32)], 100.0, optimizer=torch.optim.SGD(model.parameters(), lr=100.0))
    assert found.level is Level.UNKNOWN and found.risk is None and found.search is None
    assert "No verdict" in found.verdict and len(found.profile.blocks) == 2


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        *((name, True) for name in ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "PagedAdamW32bit", "Adam8bit")),
        *((name, False) for name in ("SGD", "RAdam", "NAdam", "Adamax", "AdaMuon", "AdamuonW", "Adafactor", "Muon")),
    ],
)
def test_which_optimizers_take_the_steps_of_the_probe(name: str, is_one: bool) -> None:
    optimizer = type(name, (torch.optim.SGD,), {})([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert takes_adam_steps(optimizer) is is_one


def test_the_words_name_the_baselines_and_the_limits() -> None:
    found = looked("none", 0.03, search=False)
    said = found.text()
    for words in ("normalization layers in the blocks: no", "the learning rate alone: 0.03", "1.7 times 0.018"):
        assert words in said
    assert "no part in the verdict" in said and "without warmup" in said and "blocks.1" in said
    assert "normalization layers in the blocks: yes" in looked("pre", 0.03, search=False).text()


@pytest.mark.parametrize(
    ("calibrator", "family", "tells"),
    [
        (None, "", False),
        (CALIBRATOR, FAMILY, True),
        (CALIBRATOR, "small GPT with normalization, AdamW", False),
        (replace(CALIBRATOR, score="spectral score"), FAMILY, False),
    ],
)
def test_a_probability_only_from_a_calibrator_that_fits(calibrator: Any, family: str, tells: bool) -> None:
    found = looked("none", 0.03, search=False, calibrator=calibrator, family=family)
    assert ("with probability" in found.chance) == tells == ("with probability" in found.text())
    assert ("not a probability" in found.chance) != tells


def test_eigenvalues_are_those_that_the_shares_count() -> None:
    found = looked("pre", 0.03, search=False).profile
    for block in found.blocks:
        moduli = [math.hypot(*value) for value in found.eigenvalues[block.name]]
        assert len(moduli) == block.rank and max(moduli) == pytest.approx(block.radius)
        assert sum(m > 1.05 for m in moduli) / len(moduli) == pytest.approx(block.masses.unstable)
    plain = rksp.profile(gpt("pre", std=0.06), None, ids(4, 32, seed=0), loss_fn=loss)
    assert plain.eigenvalues == {} and repr(plain.blocks) == repr(found.blocks)  # NaN is equal to itself there


def test_the_summary_is_plain_data_without_single_eigenvalues() -> None:
    summary = to_json(looked("none", 0.3).to_dict())
    assert summary["level"] == "high" and "eigenvalues" not in summary["profile"]


@pytest.mark.parametrize(("change", "words"), [({"lr": 0.0}, "lr must be"), ({"batches": []}, "batches is empty")])
def test_wrong_settings_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        preflight(**{"model": gpt(), "loss_fn": loss, "batches": [ids(2, 8)], "lr": 0.1, **change})


# ---------------------------------------------------------------------- over ranks


def share(rank: int, world: int) -> list[Tensor]:
    return [ids(4, 32, vocabulary=wrapped.VOCABULARY, seed=seed).chunk(world)[rank] for seed in range(2)]


def over_ranks(rank: int, world: int, mode: str) -> list[Any]:
    model = wrapped.wrap(mode, world, norm="none")
    before = [parallel.local(parameter).clone() for parameter in model.parameters()]
    found = preflight(model, loss, share(rank, world), 0.05, optimizer=torch.optim.AdamW(model.parameters()))
    parallel.reshard(model)
    assert all(map(torch.equal, before, (parallel.local(parameter) for parameter in model.parameters())))
    assert all(parameter.grad is None for parameter in model.parameters())
    return [found.to_dict(), dict(found.profile.eigenvalues)]


@pytest.mark.parametrize("mode", often(("ddp", "fsdp2"), ["fsdp2"]))
def test_two_ranks_say_the_same_to_the_last_bit_and_what_one_says(two: Any, mode: str) -> None:
    first, second = two.run(over_ranks, mode)
    assert repr(first) == repr(second)  # repr: NaN is equal to itself there
    torch.set_default_dtype(torch.float64)
    try:
        alone, one = over_ranks(0, 1, "plain")
    finally:
        torch.set_default_dtype(torch.float32)
    assert first[0]["level"] == alone["level"] and first[0]["risk"]["score"] == pytest.approx(alone["risk"]["score"])
    for name, values in one.items():
        near = sorted(math.hypot(*value) for value in first[1][name])
        assert near == pytest.approx(sorted(math.hypot(*value) for value in values), rel=1e-5)


def disagreeing(rank: int, world: int) -> None:
    preflight(wrapped.wrap("ddp", world), loss, share(rank, world), 0.05, search=rank == 0)


def test_ranks_that_disagree_all_stop(two: Any) -> None:
    errors = two.run(disagreeing, expect_failure=True)
    assert all(isinstance(error, RankError) and error.type == "LockstepError" for error in errors), errors


def test_the_search_tells_of_every_rate() -> None:
    heard: list[lr_probe.Risk] = []
    search = lr_probe.stable_learning_rate(gpt("none"), loss, [ids(2, 16)], low=0.01, high=0.1, told=heard.append)
    assert tuple(heard) == search.tried
