"""The parts of the experiment, in the order in which they are done: what is cheap first."""

from __future__ import annotations

from dist_stability.experiments.restrained import depth, exponents, heat, linear_bounds, overdriven, step_sizes, table1
from dist_stability.experiments.restrained.parts import Part

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        heat.PART,
        linear_bounds.PART,
        overdriven.PART,
        exponents.PART,
        step_sizes.PART,
        table1.PART,
        depth.PART,
    )
}
