"""What the arms of Table 3 do to a loss and a model, and how their runs are counted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dist_stability.diagnostics.kss import LOCAL, SpectralShaping
from dist_stability.errors import StabilityStop
from dist_stability.experiments.spectral import arms, kss_table, protection, runs, shaping
from dist_stability.experiments.spectral.arms import ARMS, BASELINE, Arm
from dist_stability.experiments.spectral.runs import Configuration, Run
from dist_stability.experiments.spectral.tasks import loss_fn

SMALL = Configuration("phrase", 16, 2, "none", "paper", 5)


def batch_of(configuration: Configuration = SMALL) -> Any:
    return configuration.data().batch(configuration.seed, 0, 4)


def test_the_gradient_penalty_is_the_squared_norm_and_its_gradient_the_second_derivative() -> None:
    model, batch = SMALL.model().double(), batch_of()
    parameters = list(model.parameters())
    objective = protection.gradient_penalized(model, 0.3)
    task, total = objective(batch)
    alone = loss_fn(model, batch)
    squared = sum(float(g.square().sum()) for g in torch.autograd.grad(alone, parameters))
    assert task.item() == pytest.approx(alone.item(), rel=1e-12)
    assert total.item() - task.item() == pytest.approx(0.3 * squared, rel=1e-9)
    gradients = torch.autograd.grad(total, parameters)
    direction = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(sign * 1e-5 * d)
        values.append(float(objective(batch)[1].detach()))
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.sub_(sign * 1e-5 * d)
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_the_task_gradient_is_told_from_that_of_the_penalty() -> None:
    model, batch = SMALL.model(), batch_of()
    parameters = list(model.parameters())
    bare, same = protection.bare(model)(batch)
    assert bare is same
    alone = float(torch.nn.utils.get_total_norm(torch.autograd.grad(bare, parameters)))
    penalty = SpectralShaping(model, preset=replace(LOCAL, alpha=100.0))
    task, total = protection.shaped(penalty)(batch)
    assert penalty.last is not None and total.item() - task.item() == pytest.approx(penalty.last.penalty, rel=1e-4)
    assert protection.task_gradient_norm(task, parameters) == pytest.approx(alone, rel=1e-5)
    total.backward()  # the graph is still there
    assert float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])) > 2 * alone


def test_spectral_normalization_bounds_the_blocks_and_nothing_else() -> None:
    model, state = SMALL.model(), torch.random.get_rng_state()
    head = model.head.weight.detach().clone()
    protection.normalize_spectra(model.blocks, 0)
    assert torch.equal(state, torch.random.get_rng_state())
    model.eval()
    matrices = [part.weight for part in model.blocks.modules() if isinstance(part, torch.nn.Linear)]
    assert len(matrices) == 8
    for matrix in matrices:
        assert float(torch.linalg.matrix_norm(matrix.detach(), 2)) == pytest.approx(1.0, rel=0.1)
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize("name", [BASELINE, "clip-1.0", "spectral-norm", "gradient-penalty", "kss-local-0.15"])
def test_a_run_that_blows_up_is_counted_and_ends(name: str) -> None:
    found = shaping.train((Run(SMALL, 3.0, 40), name))
    assert found["diverged"] and found["task_diverged"] and not found["learned"] and found["spectra"] is None
    assert found["step"] <= found["task_step"] < 39


def test_an_arm_without_protection_is_the_run_of_the_other_tables() -> None:
    run = Run(SMALL, 3e-3, 15)
    expected = runs.train(run)
    for name in (BASELINE, "controller"):  # one that refuses nothing changes no bit
        found = shaping.train((run, name))
        assert {key: found[key] for key in ("diverged", "step", "max_loss", "max_norm", "last_loss")} == {
            key: expected[key] for key in ("diverged", "step", "max_loss", "max_norm", "last_loss")
        }
        assert found["refusals"] == {} and not found["stopped"]
        assert set(found["spectra"]) == {"leading", "all"} and found["step_seconds"] > 0


def test_a_divergence_under_the_controller_is_the_same_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It steps back, so a rate that ruins the bare run does not get these weights; the label is the same."""
    run = Run(SMALL, 0.1, 40)
    assert shaping.train((run, BASELINE))["diverged"]
    found = shaping.train((run, "controller"))
    assert sum(found["refusals"].values()) > 0 and not found["diverged"]
    monkeypatch.setattr(shaping, "is_diverged", lambda loss, norm: loss > 1.0)  # now every loss is one
    assert shaping.train((run, "controller"))["step"] == 0


def test_a_run_that_the_controller_gives_up_is_no_survivor(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise StabilityStop("enough", {})

    monkeypatch.setattr(shaping.StabilityController, "step", stop)
    found = shaping.train((Run(SMALL, 1e-3, 5), "controller"))
    assert found["stopped"] and not found["learned"] and found["spectra"] is None


def test_shaping_goes_back_with_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARMS, "both", Arm(shaping=LOCAL, controller=True))
    seen = []
    real = shaping.StabilityController

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(set(kwargs["extra_state"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(shaping, "StabilityController", noted)
    shaping.train((Run(SMALL, 1e-3, 2), "both"))
    assert seen == [{"scheduler", "shaping"}]


def result(diverged: bool, lr: float = 0.01, **other: Any) -> dict[str, Any]:
    base = {
        "settings": {"lr": lr},
        "diverged": diverged,
        "task_diverged": diverged,
        "by_loss": diverged,
        "learned": not diverged,
        "stopped": False,
        "step": 7 if diverged else None,
        "refusals": {},
        "spectra": None if diverged else {fit: {"unstable": 0.2, "radius": 1.5} for fit in ("leading", "all")},
    }
    return {**base, **other}


def test_the_table() -> None:
    found = kss_table.summarized(
        {
            BASELINE: [result(True)] * 6 + [result(False)] * 2,
            "clip-1.0": [result(False)] * 8,
            "controller": [result(False, refusals={"skip": 3, "cut_lr": 1})] * 8,
            "kss-local-0.15": [],
        },
        {BASELINE: 1.0, "controller": 2.0},
    )
    assert set(found["arms"]) == {BASELINE, "clip-1.0", "controller"}
    base, controller = found["arms"][BASELINE], found["arms"]["controller"]
    assert (base["diverged"], base["by_lr"], base["median_step"], base["survivors"]) == (6, {"0.01": 6}, 7, 2)
    assert base["spectra"]["leading"] == {"unstable": pytest.approx(0.2), "radius": pytest.approx(1.5)}
    assert base["fisher"] == 1.0 and controller["fisher"] == pytest.approx(0.006993, rel=1e-3)
    assert controller["cost"] == 2.0 and controller["refused"] == 4.0
    assert found["arms"]["clip-1.0"]["cost"] is None
    assert {(row["arm"], row["against"]) for row in found["comparisons"]} == {
        ("controller", BASELINE),
        ("controller", "clip-1.0"),
    }
    sections = kss_table.sections(found)
    assert all(len(row) == len(head) for _, _, head, rows in sections for row in rows)
    assert "cut_lr 8, skip 24" in str(sections[1]) and not any(
        isinstance(cell, float) and math.isnan(cell) for _, _, _, rows in sections for row in rows for cell in row
    )


def test_costs_are_ratios_of_runs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([3.0, 1.0, 8.0, 2.0, 5.0, 1.0, 6.0, 3.0, 1.0, 1.0])
    made = []

    def noted(subject: tuple[Run, str]) -> dict[str, float]:
        made.append(subject)
        return {"step_seconds": next(taken)}

    monkeypatch.setattr(shaping, "train", noted)
    assert shaping.cost("controller") == {"ratio": 3.0, "ratios": [3.0, 4.0, 5.0, 2.0, 1.0]}
    assert [name for _, name in made] == ["controller", BASELINE] * 5
    assert len({run for run, _ in made}) == 1 and made[0][0].steps == 20  # two applications of the sparse schedule


def test_settings_were_not_tried_on_what_is_reported() -> None:
    assert {each.seed for each in arms.CONFIGURATIONS} & set(range(401, 413)) == set()
    assert len(arms.CONFIGURATIONS) * len(arms.LRS) >= 48
    assert {name for pair in arms.COMPARISONS for name in pair} <= set(ARMS)
