"""The grids can be run, resumed and read; their parts are what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_stability.cli import main
from dist_stability.experiments.spectral import predictions
from dist_stability.experiments.spectral.grids import DESIGN, EDGES, HELD_OUT, NEAR_NONE, NEAR_NORM
from dist_stability.experiments.spectral.models import INITS, NORMS, SmallGPT
from dist_stability.experiments.spectral.pool import Job, perform
from dist_stability.experiments.spectral.runs import Configuration, Run, is_diverged, run_of, train, worst
from dist_stability.experiments.spectral.tasks import IGNORED, TASKS, loss_fn, task
from dist_stability.report.events import read_json


def test_what_is_held_out_shares_nothing_with_the_design() -> None:
    def facts(configurations: Any) -> list[set[Any]]:
        return [{getattr(each, name) for each in configurations} for name in ("task", "seed")]

    searches = [configurations for part, configurations in EDGES.items() if part != "design"]
    for other in (HELD_OUT.configurations, NEAR_NONE.configurations, NEAR_NORM.configurations, *searches):
        assert all(not mine & theirs for mine, theirs in zip(facts(DESIGN.configurations), facts(other), strict=True))
    assert {each.width for each in DESIGN.configurations} & {each.width for each in HELD_OUT.configurations} == set()


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_functions_of_seed_and_number(name: str) -> None:
    data = task(name)
    (inputs, targets), again, other = data.batch(1, 2, 4), data.batch(1, 2, 4), data.batch(1, 3, 4)
    assert torch.equal(inputs, again[0]) and torch.equal(targets, again[1]) and not torch.equal(inputs, other[0])
    assert (
        inputs.shape == targets.shape == (4, data.context)
        and 0 <= int(inputs.min()) <= int(inputs.max()) < data.vocabulary
    )
    if name == "recall":
        pairs = inputs[:, :8].unflatten(1, (4, 2))
        for row in range(4):
            values = dict(pairs[row].tolist())
            assert values[int(inputs[row, -1])] == int(targets[row, -1])
        assert (targets[:, :-1] == IGNORED).all()
    else:
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("init", INITS)
def test_models(norm: str, init: str) -> None:
    state = torch.random.get_rng_state()
    first, second = (SmallGPT(64, 16, width=16, layers=2, norm=norm, init=init, seed=seed) for seed in (0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    ids = torch.randint(64, (2, 16))
    loss = float(loss_fn(first, (ids, ids)).detach())
    assert math.isfinite(loss) and loss != float(loss_fn(second, (ids, ids)).detach())
    kinds = {type(part) for part in first.modules()}
    assert (torch.nn.RMSNorm in kinds) == (norm == "rms") and (torch.nn.LayerNorm in kinds) == (
        norm not in ("rms", "none")
    )
    std = float(first.blocks[0].up.weight.detach().std())
    assert std == pytest.approx({"paper": 0.08, "torch": 1 / math.sqrt(48), "xavier": math.sqrt(2 / 80)}[init], rel=0.1)
    # Causal: the last token changes no earlier output.
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 64
    with torch.no_grad():
        a, b = (first(tokens).unflatten(0, (2, 16))[:, :-1] for tokens in (ids, other))
    assert torch.allclose(a, b, atol=1e-5)


def test_a_run_and_its_label() -> None:
    configuration = Configuration("phrase", 16, 2, "none", "paper", 5)
    quiet, loud = train(Run(configuration, 1e-3, 12)), train(Run(configuration, 3.0, 12))
    assert not quiet["diverged"] and quiet["step"] is None and len(quiet["losses"]) == 12
    assert loud["diverged"] and len(loud["losses"]) == loud["step"] + 1
    assert loud["max_loss"] > 50 or loud["max_norm"] > 500
    assert quiet == train(Run(configuration, 1e-3, 12))
    assert run_of(Run(configuration, 0.1, 3).to_dict()) == Run(configuration, 0.1, 3)
    assert [is_diverged(*pair) for pair in ((50.0, 500.0), (50.1, 1.0), (1.0, 501.0), (math.nan, 1.0))] == [
        False,
        *[True] * 3,
    ]
    assert worst([1.0, math.nan, 2.0]) == math.inf


def double(number: int) -> dict[str, Any]:
    if number < 0:
        raise ZeroDivisionError("on purpose")
    return {"twice": 2 * number, "limit": math.inf}


def test_jobs_are_done_once_and_failures_named(tmp_path: Path) -> None:
    jobs = [Job(tmp_path / "a" / f"{number}.json", {"n": number, "pair": (1, 2)}, double, number) for number in (3, -1)]
    assert perform(jobs, 1, "test") == {"-1.json": "ZeroDivisionError: on purpose"}
    assert jobs[0].result() == {"settings": {"n": 3, "pair": [1, 2]}, "twice": 6, "limit": math.inf}
    assert jobs[1].result() is None
    before = jobs[0].path.stat().st_mtime_ns
    perform(jobs[:1], 1, "test")
    assert jobs[0].path.stat().st_mtime_ns == before
    assert Job(jobs[0].path, {"n": 4}, double, 4).result() is None  # other settings: to be made again


def point(diverged: bool, norm: str, lr: float, seed: int, **scores: float) -> dict[str, Any]:
    base = dict.fromkeys(
        (
            "sign_step",
            "near_unit",
            "near_unit_log_condition",
            "radius",
            "condition",
            "relative_update",
            "gradient_norm",
        ),
        0.0,
    )
    configuration = {"task": "t", "width": 1, "layers": 1, "norm": norm, "init": "paper", "seed": seed}
    return {**base, **configuration, "has_norm": norm != "none", "lr": lr, "diverged": diverged, "risk": 0.0, **scores}


def test_a_table_says_when_a_plain_baseline_wins() -> None:
    points = [point(lr > 0.1, norm, lr, seed) for norm in ("pre", "none") for lr in (0.01, 0.3) for seed in (0, 1)]
    row = predictions.table(points, resamples=20)[0]
    assert row["scores"]["probe"]["auroc"] == 0.5 and row["scores"]["lr"]["auroc"] == 1.0
    assert "LR" in row["verdict"] and "better" in row["verdict"] and "no-norm flag better" not in row["verdict"]
    for each in points:
        each["risk"] = each["lr"]
    row = predictions.table(points, resamples=20)[0]
    assert row["verdict"] == "LR as good"
    one_kind = next(row for row in predictions.table(points) if row["slice"] == "lr 0.3")
    assert one_kind["scores"] == {} and (one_kind["runs"], one_kind["diverged"]) == (4, 4)


@pytest.mark.filterwarnings("ignore::dist_stability.diagnostics.rksp.RkspWarning")
@pytest.mark.parametrize("more", [(), pytest.param(("edges-first",), marks=pytest.mark.slow)], ids=len)
def test_the_commands(tmp_path: Path, capsys: Any, more: tuple[str, ...]) -> None:
    words = ["experiment", "rksp", "--quick", "--workers", "1", "--parts", "calibration", *more, "--out", str(tmp_path)]
    assert main(words) == 0
    summary = read_json(tmp_path / "summary.json")
    assert summary["parts"] == ["held-out", "near-none", *more, "calibration"]  # with what calibration needs
    assert summary["held-out"]["predictions"][0]["runs"] == 4
    assert not more or summary["edges-first"]["configurations"] == 2
    assert "needs 40 runs" in summary["calibration"] and "selection" not in summary
    assert (tmp_path / "report.html").is_file()
    told = (tmp_path / "tables.md").read_text()
    assert "no number of it means anything" in told and "no-norm flag x LR" in told
    assert main(["experiment", "kss", "--quick", "--workers", "1", "--out", str(tmp_path / "kss")]) == 0
    arms = read_json(tmp_path / "kss" / "summary.json")["arms"]
    assert arms["kss-local-0.15"]["runs"] == 4 and arms["none"]["fisher"] == 1.0
    assert main(["experiment", "rksp", "--parts", "nothing", "--out", str(tmp_path)]) == 1
    assert "unknown nothing" in capsys.readouterr().err
    for words in (["kss", "--parts", "paper"], ["rksp", "--seeds", "3"], ["text", "--parts", "paper"]):
        assert main(["experiment", *words, "--out", str(tmp_path / "no")]) == 1
        assert f"error: {words[1]}" in capsys.readouterr().err and not (tmp_path / "no").exists()
