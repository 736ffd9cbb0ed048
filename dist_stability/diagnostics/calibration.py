"""From a score to a probability: only where runs of the same family say what the score has meant.

A score ranks. To read "one in five" off it needs runs of the same family (architecture, initialization, optimizer,
kind of task, learning rates) that had no part in designing the score, their outcomes, and a fit. A :class:`Calibrator`
is that fit with its provenance; without one that fits, :func:`told` says the score and that it is no probability.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Calibrator", "NotCalibrated", "fit", "load", "told"]

FEWEST_RUNS, FEWEST_OF_A_KIND = 40, 8
_CLIP = 3.0
_ROUNDS = 100


class NotCalibrated(ValueError):
    """These runs do not allow for probabilities."""


@dataclass(frozen=True, slots=True)
class Calibrator:
    """Probability = 1 / (1 + exp(-(slope score + intercept))), with where it comes from.

    Attributes:
        score: Name of the score.
        family: What it holds for, in words; probabilities are given for exactly this.
        slope: Above 0.
        intercept: At score 0.
        low: Smallest score seen; lower ones are taken as this.
        high: Largest.
        runs: Number fitted on.
        diverged: How many of them did.
        groups: Number of configurations among them.
        brier: Mean squared error of the probabilities, each group predicted by a fit on the others.
        brier_of_rate: The same for the bare rate of divergence of the others: what has to be beaten.
        sources: Names of the runs.
    """

    score: str
    family: str
    slope: float
    intercept: float
    low: float
    high: float
    runs: int
    diverged: int
    groups: int
    brier: float
    brier_of_rate: float
    sources: tuple[str, ...]

    def probability(self, score: float, *, family: str) -> float | None:
        """Of divergence; None for another family, or a score that is not a number."""
        if family != self.family or math.isnan(score):
            return None
        return _logistic(self.slope * min(max(score, self.low), self.high) + self.intercept)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load(path: Path) -> Calibrator:
    """Read what :meth:`Calibrator.save` wrote.

    Raises:
        NotCalibrated: The file is none of ours.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Calibrator(**{**found, "sources": tuple(found["sources"])})
    except (ValueError, TypeError, KeyError) as error:
        raise NotCalibrated(f"{path} is not a calibrator: {type(error).__name__}: {error}") from error


def fit(
    scores: Sequence[float],
    labels: Sequence[bool],
    *,
    groups: Sequence[Hashable],
    sources: Sequence[str],
    designed_on: Collection[str],
    score: str,
    family: str,
) -> Calibrator:
    """Fit on held-out runs (Platt's logistic fit, with his softened targets).

    Args:
        scores: Of the runs; infinite ones are taken as 3 in size, as all beyond that.
        labels: Which diverged.
        groups: Configuration of each run: left out together when the error is estimated.
        sources: Name of each run, no name twice.
        designed_on: Names of runs that the score, or its thresholds, were chosen on.
        score: Name of the score.
        family: What the runs have in common.

    Raises:
        NotCalibrated: Too few runs or of either kind, a run that the score was designed on, a score that is not a
            number, scores that do not rise with the risk, or probabilities no better than the bare rate.
    """
    _check(scores, labels, groups, sources, designed_on, family)
    clipped = [min(max(value, -_CLIP), _CLIP) for value in scores]
    slope, intercept = _platt(clipped, labels)
    if not slope > 0:
        raise NotCalibrated(f"{family}: diverged runs do not have the higher scores ({score}, slope {slope:.3g})")
    brier, brier_of_rate = _left_out(clipped, labels, groups)
    if not brier < brier_of_rate:
        raise NotCalibrated(
            f"{family}: on configurations left out, probabilities ({brier:.3f}) are no better than the bare rate "
            f"({brier_of_rate:.3f}, mean squared errors)"
        )
    return Calibrator(
        score=score,
        family=family,
        slope=slope,
        intercept=intercept,
        low=min(clipped),
        high=max(clipped),
        runs=len(scores),
        diverged=sum(labels),
        groups=len(set(groups)),
        brier=brier,
        brier_of_rate=brier_of_rate,
        sources=tuple(sources),
    )


def told(score: float, calibrator: Calibrator | None, *, name: str, family: str) -> str:
    """A score in words, with a probability only from a calibrator of this score and family."""
    value = None
    if calibrator is not None and calibrator.score == name:
        value = calibrator.probability(score, family=family)
    if value is None or calibrator is None:
        return f"{name} {score:.2f} (not a probability: no calibrator for {family!r})"
    return f"{name} {score:.2f}: diverges with probability {value:.2f}, from {calibrator.runs} runs of {family!r}"


def _check(
    scores: Sequence[float],
    labels: Sequence[bool],
    groups: Sequence[Hashable],
    sources: Sequence[str],
    designed_on: Collection[str],
    family: str,
) -> None:
    if not family:
        raise NotCalibrated("family is empty: say what the runs have in common")
    if len({len(scores), len(labels), len(groups), len(sources)}) > 1:
        sizes = f"{len(scores)}, {len(labels)}, {len(groups)}, {len(sources)}"
        raise NotCalibrated(f"scores, labels, groups and sources must be equally many, got {sizes}")
    if len(set(sources)) < len(sources):
        raise NotCalibrated("a run is among the sources twice")
    used = sorted(set(sources) & set(designed_on))
    if used:
        raise NotCalibrated(
            f"{len(used)} run(s) are not held out: the score was designed on {', '.join(used[:3])}; leave them out"
        )
    diverged = sum(labels)
    kinds = min(diverged, len(labels) - diverged)
    if len(labels) < FEWEST_RUNS or kinds < FEWEST_OF_A_KIND:
        raise NotCalibrated(
            f"{family}: {len(labels)} runs, {diverged} diverged; needs {FEWEST_RUNS} runs and {FEWEST_OF_A_KIND} of "
            "each kind"
        )
    if any(map(math.isnan, scores)):
        raise NotCalibrated("a score is not a number; leave the run out")


def _left_out(scores: Sequence[float], labels: Sequence[bool], groups: Sequence[Hashable]) -> tuple[float, float]:
    """Mean squared errors of the fit and of the bare rate, each group predicted from the others."""
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    if len(members) < 2:
        raise NotCalibrated("all runs are of one configuration: nothing can be left out to estimate the error")
    of_fit = of_rate = 0.0
    for inside in members.values():
        own = set(inside)
        rest = [place for place in range(len(scores)) if place not in own]
        slope, intercept = _platt([scores[place] for place in rest], [labels[place] for place in rest])
        rate = sum(labels[place] for place in rest) / len(rest)
        for place in inside:
            of_fit += (_logistic(slope * scores[place] + intercept) - labels[place]) ** 2
            of_rate += (rate - labels[place]) ** 2
    return of_fit / len(scores), of_rate / len(scores)


def _platt(scores: Sequence[float], labels: Sequence[bool]) -> tuple[float, float]:
    """Slope and intercept by Newton's method with step halving; the targets keep them finite."""
    positives = sum(labels)
    negatives = len(labels) - positives
    high, low = (positives + 1) / (positives + 2), 1 / (negatives + 2)
    targets = [high if label else low for label in labels]
    slope, intercept = 0.0, math.log((positives + 1) / (negatives + 1))

    def cost(a: float, b: float) -> float:
        values = [a * s + b for s in scores]
        return math.fsum(
            max(v, 0.0) - t * v + math.log1p(math.exp(-abs(v))) for v, t in zip(values, targets, strict=True)
        )

    now = cost(slope, intercept)
    for _ in range(_ROUNDS):
        found = [_logistic(slope * s + intercept) for s in scores]
        errors = [p - t for p, t in zip(found, targets, strict=True)]
        weights = [p * (1 - p) for p in found]
        ga, gb = math.fsum(e * s for e, s in zip(errors, scores, strict=True)), math.fsum(errors)
        haa = math.fsum(w * s * s for w, s in zip(weights, scores, strict=True)) + 1e-9
        hab, hbb = math.fsum(w * s for w, s in zip(weights, scores, strict=True)), math.fsum(weights) + 1e-9
        determinant = haa * hbb - hab * hab
        if max(abs(ga), abs(gb)) < 1e-8 or determinant <= 0:
            break
        da, db = (hbb * ga - hab * gb) / determinant, (haa * gb - hab * ga) / determinant
        size = 1.0
        while size > 1e-10 and (then := cost(slope - size * da, intercept - size * db)) > now:
            size /= 2
        if size <= 1e-10:
            break
        slope, intercept, now = slope - size * da, intercept - size * db, then
    return slope, intercept


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
