"""How the probe was chosen, and what its probabilities are worth: from runs to tables."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dist_stability.diagnostics.calibration import NotCalibrated
from dist_stability.experiments.spectral import probabilities, selection
from dist_stability.experiments.spectral.command import edges
from dist_stability.experiments.spectral.grids import DESIGN
from dist_stability.experiments.spectral.jobs import curve_jobs
from dist_stability.experiments.spectral.runs import BATCH, Configuration
from dist_stability.experiments.spectral.scores import RAY, WALK, aware, curves
from dist_stability.experiments.spectral.tasks import loss_fn

SMALL = Configuration("phrase", 16, 2, "none", "paper", 5)


def test_curves_are_of_the_two_ways() -> None:
    found = curves((SMALL, (1e-3, 1.0)))
    (losses, norms), (blown_up, _) = found["walk"]
    assert len(losses) == len(norms) == WALK + 1 >= len(blown_up)
    (along, _), _ = found["ray"]
    assert len(along) == RAY + 1
    model = SMALL.model()
    start = float(loss_fn(model, SMALL.data().batch(SMALL.seed, -1, BATCH)).detach())
    assert losses[0] == pytest.approx(start) and along[0] == pytest.approx(start)
    assert along[10] == aware(SMALL, [1e-3])["sign_step"][0]  # the simpler probe is the tenth point of the ray
    assert losses[3] < start < found["ray"][1][0][RAY]  # small steps learn, long ones ruin


def curve(norm: str, seed: int, walk: list[list[list[float]]]) -> dict[str, Any]:
    names = ("task", "width", "layers", "norm", "init", "seed")
    settings = dict(zip(names, ("t", 1, 1, norm, "paper", seed), strict=True))
    return {"settings": settings, "lrs": [0.1, 0.2], "walk": walk, "ray": walk}


def test_a_candidate_sees_no_further_than_its_length() -> None:
    """The second rate diverges, and its loss shows it at the second step; gradient norms show nothing."""
    calm, late = [[1.0] * 20, [1.0] * 20], [[1.0, 1.0, 90.0], [1.0, 1.0, 1.0]]
    found = [curve(norm, seed, [calm, late]) for norm in ("none", "pre") for seed in (0, 1)]
    points = [{**each["settings"], "lr": lr, "diverged": lr > 0.1} for each in found for lr in each["lrs"]]
    rows = {(row["way"], row["length"]): row for row in selection.candidates(found, points)}
    assert rows["walk", 1]["loss"] == {"all": 0.5, "none": 0.5} and rows["walk", 2]["loss"] == {"all": 1.0, "none": 1.0}
    assert rows["walk", 2]["gradient norm"]["all"] == 0.5
    assert (
        rows["walk", 8]["loss and gradient norm"]["all"] == 1.0 and rows["ray", 3]["growth of the loss"]["all"] == 1.0
    )
    assert rows["walk", 2]["runs"] == 8 and rows["walk", 2]["diverged"] == 4
    fewer = selection.candidates(found, points[:4])  # runs without a label are left out
    assert fewer[0]["runs"] == 4 and selection.CHOSEN in rows
    assert len(selection.section(list(rows.values()))[3]) == len(rows)


def test_curves_are_computed_for_the_design_grid(tmp_path: Any) -> None:
    jobs = curve_jobs(DESIGN, tmp_path)
    assert [job.subject[0] for job in jobs] == list(DESIGN.configurations)


def runs_of(task: str, *, shift: float = 0.0, seed: int = 1, norm: str = "none") -> list[dict[str, Any]]:
    return [
        {
            **dict(zip(("task", "width", "layers", "norm", "init"), (task, 8, 2, norm, "paper"), strict=True)),
            "seed": seed + place // 4,
            "lr": 0.01 * (1 + place % 4),
            "risk": risk,
            "diverged": risk + shift + 0.3 * math.sin(7.0 * place) > 0,
        }
        for place, risk in enumerate((-1 + 2 * (37 * place % 60) / 60) for place in range(60))
    ]


def test_probabilities_are_looked_at_where_they_were_not_fitted() -> None:
    grids = {"one": runs_of("recall"), "two": runs_of("english", shift=0.1)}
    rows = probabilities.calibrated(grids)
    assert [(row["fitted_on"], row["looked_at"]) for row in rows] == [("one", "two"), ("two", "one")]
    assert all(row["error"] < 0.5 * row["error_of_rate"] and row["runs"] == 60 for row in rows)
    wrong = [{**point, "diverged": not point["diverged"]} for point in grids["two"]]
    with pytest.raises(NotCalibrated, match="do not have the higher"):
        probabilities.calibrated({"one": grids["one"], "two": wrong})
    # Normalized models are another family.
    with pytest.raises(NotCalibrated, match="0 runs"):
        probabilities.calibrated({"one": runs_of("recall", norm="pre"), "two": grids["two"]})


def test_what_the_probe_was_designed_on_gives_no_probabilities() -> None:
    first = DESIGN.configurations[0]
    used = runs_of("recall")
    names = ("task", "width", "layers", "norm", "init", "seed")
    used[0] = {**used[0], **{name: getattr(first, name) for name in names}, "lr": DESIGN.lrs[0]}
    assert first.norm == "none"
    with pytest.raises(NotCalibrated, match="not held out"):
        probabilities.calibrated({"one": used, "two": runs_of("english")})


def test_the_spread_of_edges() -> None:
    settings = dict(zip(("task", "width", "layers", "norm", "init"), ("t", 1, 1, "none", "paper"), strict=True))
    results = [
        {
            "settings": settings,
            "edge": edge,
            "found": {"8": {"lr": 1.0, "seconds": 1.0}, "16": {"lr": lr, "seconds": 2.0}},
        }
        for edge, lr in ((1.0, 1.0), (math.e, math.e), (2.0, None))
    ]
    found = edges(results)
    assert found["spread"]["16"] == 0.0 and found["spread"]["8"] == pytest.approx(0.5123, rel=1e-3)
    assert found["within"] == {"8": 1, "16": 2}
