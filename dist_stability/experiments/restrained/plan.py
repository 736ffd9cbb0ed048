"""The parts of the experiment, in the order in which they are done: what is cheap first."""

from __future__ import annotations

from dist_stability.experiments.restrained import (
    calibration,
    depth,
    edge_of_stability,
    exponents,
    heat,
    linear_bounds,
    overdriven,
    poisoning,
    step_sizes,
    table1,
)
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
        poisoning,
        calibration,
    )
}
