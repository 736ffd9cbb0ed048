"""How the probe was chosen: what each candidate would have said of the design grid, and how often it was right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_stability.experiments.spectral.pages import Section
from dist_stability.experiments.spectral.runs import LOSS_LIMIT, NORM_LIMIT, worst
from dist_stability.experiments.spectral.statistics import auroc

LENGTHS = {"walk": (1, 2, 4, 8, 16), "ray": (1, 3, 10, 20)}
TITLES = {"walk": "virtual Adam steps", "ray": "distances along one ray"}
JUDGED = ("loss", "growth of the loss", "gradient norm", "loss and gradient norm")
CHOSEN = ("walk", 8)


def candidates(curves: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """AUROC of every candidate, over all runs and over those without normalization.

    Of the values on the way the largest counts.

    Args:
        curves: Results of :func:`~dist_stability.experiments.spectral.scores.curves`, with their settings.
        points: The runs of the same configurations, as of ``jobs.points``.
    """
    names = ("task", "width", "layers", "norm", "init", "seed")
    labels = {(*(point[name] for name in names), point["lr"]): bool(point["diverged"]) for point in points}
    runs = [
        (found, place, (*(found["settings"][name] for name in names), lr))
        for found in curves
        for place, lr in enumerate(found["lrs"])
    ]
    known = [(found, place, key) for found, place, key in runs if key in labels]
    bare = [key[names.index("norm")] == "none" for _, _, key in known]
    truth = [labels[key] for _, _, key in known]
    rows = []
    for way, lengths in LENGTHS.items():
        for length in lengths:
            scores = [_scores(found[way][place], length) for found, place, _ in known]
            row: dict[str, Any] = {"way": way, "length": length, "runs": len(known), "diverged": sum(truth)}
            for judged in JUDGED:
                values = [each[judged] for each in scores]
                row[judged] = {
                    "all": auroc(values, truth),
                    "none": auroc(
                        [value for value, kept in zip(values, bare, strict=True) if kept],
                        [label for label, kept in zip(truth, bare, strict=True) if kept],
                    ),
                }
            rows.append(row)
    return rows


def section(rows: Sequence[Mapping[str, Any]]) -> Section:
    """The candidates as a table."""
    return (
        "How the probe was chosen",
        f"AUROC on the design grid ({rows[0]['runs']} runs, {rows[0]['diverged']} diverged): all / without "
        f"normalization. The probe is {CHOSEN[1]} {TITLES[CHOSEN[0]]}, judged by {JUDGED[-1]}.",
        ("candidate", *JUDGED),
        [
            [
                f"{row['length']} {TITLES[row['way']]}",
                *(f"{row[judged]['all']:.3f} / {row[judged]['none']:.3f}" for judged in JUDGED),
            ]
            for row in rows
        ],
    )


def _scores(curve: Sequence[Sequence[float]], length: int) -> dict[str, float]:
    losses, norms = (values[: length + 1] for values in curve)
    loss, norm = worst(losses), worst(norms)
    both = max(loss / LOSS_LIMIT, norm / NORM_LIMIT)
    return dict(zip(JUDGED, (loss, loss / losses[0], norm, both), strict=True))
