"""Probabilities come only from held-out runs of the same family, and say where they come from."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_stability.diagnostics import calibration
from dist_stability.diagnostics.calibration import NotCalibrated

FAMILY = "small GPT without normalization, AdamW"


def runs(count: int = 400, slope: float = 3.0, seed: int = 0) -> dict[str, Any]:
    draw = random.Random(seed)
    scores = [draw.uniform(-2, 2) for _ in range(count)]
    return {
        "scores": scores,
        "labels": [draw.random() < 1 / (1 + math.exp(-slope * score - 1)) for score in scores],
        "groups": [place // 8 for place in range(count)],
        "sources": [f"run {place}" for place in range(count)],
        "designed_on": {"another"},
        "score": "risk",
        "family": FAMILY,
    }


@pytest.mark.slow
def test_the_fit_finds_the_probabilities() -> None:
    found = calibration.fit(**runs(4000))
    assert found.slope == pytest.approx(3.0, abs=0.3) and found.intercept == pytest.approx(1.0, abs=0.2)
    assert found.brier < found.brier_of_rate and found.groups == 500 and found.runs == 4000
    assert found.probability(-0.5, family=FAMILY) == pytest.approx(1 / (1 + math.exp(0.5)), abs=0.05)
    assert found.probability(math.inf, family=FAMILY) == found.probability(2.0, family=FAMILY)  # as the largest seen


def test_separable_scores_stay_finite() -> None:
    found = calibration.fit(**{**runs(), "labels": [score > 0 for score in runs()["scores"]]})
    assert math.isfinite(found.slope) and 0.9 < found.probability(1.0, family=FAMILY) < 1.0


def test_another_family_gets_no_probability() -> None:
    found = calibration.fit(**runs())
    assert found.probability(0.0, family="small GPT with normalization, AdamW") is None
    assert found.probability(math.nan, family=FAMILY) is None
    said = calibration.told(0.5, found, name="risk", family=FAMILY)
    assert "probability 0.9" in said and "400 runs" in said
    for calibrator, name, family in (
        (None, "risk", FAMILY),
        (found, "risk", "another"),
        (found, "near_unit", FAMILY),
    ):
        said = calibration.told(0.5, calibrator, name=name, family=family)
        assert "not a probability" in said and "0.50" in said and "0.9" not in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"designed_on": {"run 3"}}, "not held out.*run 3"),
        ({"sources": ["run 1"] * 400}, "twice"),
        ({"family": ""}, "family is empty"),
        ({"labels": [False] * 397 + [True] * 3}, "400 runs, 3 diverged"),
        ({"scores": [math.nan] * 400}, "not a number"),
        ({"scores": [-score for score in runs()["scores"]]}, "do not have the higher"),
        (
            {"scores": [float(place % 2) for place in range(400)], "labels": [place % 3 == 0 for place in range(400)]},
            "no better|higher",
        ),
        ({"groups": [0] * 400}, "one configuration"),
        ({"groups": [0]}, "equally many"),
    ],
)
def test_what_allows_for_no_probabilities(change: dict[str, Any], words: str) -> None:
    with pytest.raises(NotCalibrated, match=words):
        calibration.fit(**{**runs(), **change})


def test_too_few_runs() -> None:
    with pytest.raises(NotCalibrated, match="20 runs"):
        calibration.fit(**runs(20))


def test_it_is_saved_with_its_provenance(tmp_path: Path) -> None:
    found = calibration.fit(**runs())
    found.save(tmp_path / "c.json")
    again = calibration.load(tmp_path / "c.json")
    assert again == found and again.sources[:2] == ("run 0", "run 1")
    assert replace(again, family="x") != found
    (tmp_path / "c.json").write_text('{"slope": 1}')
    with pytest.raises(NotCalibrated, match=r"c\.json is not a calibrator"):
        calibration.load(tmp_path / "c.json")
