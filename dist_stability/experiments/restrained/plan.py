"""The parts of the experiment, in the order in which they are done: what is cheap first."""

from __future__ import annotations

from pathlib import Path

from dist_stability.experiments.restrained import (
    calibration,
    depth,
    edge_of_stability,
    exponents,
    heat,
    linear_bounds,
    overdriven,
    overhead,
    poisoning,
    sharded,
    step_sizes,
    table1,
)
from dist_stability.experiments.restrained.cifar import part as full_scale
from dist_stability.experiments.restrained.parts import Part

PARTS: dict[str, Part] = {
    module.PART.name: module.PART
    for module in (
        heat,
        linear_bounds,
        overdriven,
        exponents,
        step_sizes,
        table1,
        depth,
        edge_of_stability,
        sharded,
        overhead,
        poisoning,
        calibration,
    )
}


def parts(data: Path | None) -> dict[str, Part]:
    """All of them; R12 only with a folder of CIFAR-10."""
    return PARTS if data is None else {**PARTS, "R12": full_scale(data)}
