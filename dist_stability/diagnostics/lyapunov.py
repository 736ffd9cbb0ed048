"""The largest Lyapunov exponent along a training run, by Benettin's method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import parallel
from ..errors import StabilityError
from .perturbation import Perturbation
from .scaling import noise
from .twins import Build, Twin


@dataclass(frozen=True, slots=True)
class Lyapunov:
    """The largest Lyapunov exponent along a run.

    Attributes:
        per_step: Mean growth of ln(distance) per step.
        error: Standard error of that mean, of blocks of ten stretches; NaN with fewer than two blocks.
        stretches: Growth of ln(distance) from each rescaling to the next, after the skipped steps.
        every: Steps from one rescaling to the next.
    """

    per_step: float
    error: float
    stretches: tuple[float, ...]
    every: int


def lyapunov(
    build: Build,
    steps: int,
    *,
    every: int = 1,
    skip: int = 0,
    relative_distance: float | None = None,
    seed: int = 0,
) -> Lyapunov:
    """Benettin's method: the difference of two runs is brought back to a small length every few steps.

    Weights and moments are rescaled together, by what the weights need; second moments stay
    non-negative. What :func:`.scaling.noise` names does not count as distance. The distance
    must be large enough for rounding not to matter and small enough for the update to be linear over it.

    Args:
        build: Makes a run from a seed.
        steps: In all.
        every: Steps from one rescaling to the next.
        skip: First steps that do not count, while the difference turns to the direction that grows most.
        relative_distance: Length of the difference over that of the weights (or over 1): by default 1e-5 for float32
            weights, 1e-8 for float64 ones.
        seed: For ``build`` and for the first difference.

    Collectives: those of the runs, and one all-reduce for each rescaling, two with an Adam.

    Raises:
        StabilityError: A setting is out of range; or the difference vanished or is not finite, with the step.
    """
    where = f"rank {parallel.this_rank()}: lyapunov"
    if not (0 <= skip < steps and 1 <= every <= steps - skip):
        raise StabilityError(
            f"{where}: expected 0 <= skip < steps and 1 <= every <= steps - skip, got steps={steps}, skip={skip}, "
            f"every={every}"
        )
    first, second = Twin(build, seed, Perturbation()), Twin(build, seed, Perturbation())
    if relative_distance is None:
        doubles = all(part.dtype == torch.float64 for part in first.space.live())
        relative_distance = 1e-8 if doubles else 1e-5
    with torch.no_grad():
        small = relative_distance * max(1.0, first.space.length(first.space.live()))
        direction = first.space.random(seed)
        length = small / first.space.length(direction)
        for weights, part in zip(second.space.live(), direction, strict=True):
            weights.add_(part, alpha=length)
    stretches = []
    for step in range(steps):
        first.step(step)
        second.step(step)
        # The skipped steps are rescaled as well: from a difference that has grown nothing can be learned.
        if (step + 1 - skip) % every:
            continue
        found = _rescale(first, second, small)
        if not (math.isfinite(found) and found > 0.0):
            raise StabilityError(f"{where}: the difference is {found:g} after step {step}; no exponent can be given")
        if step >= skip:
            stretches.append(math.log(found / small))
    mean = sum(stretches) / len(stretches)
    blocks = [stretches[i : i + 10] for i in range(0, len(stretches) - 9, 10)]
    means = [sum(block) / len(block) for block in blocks]
    error = math.nan
    if len(means) > 1:
        centre = sum(means) / len(means)
        error = math.sqrt(sum((m - centre) ** 2 for m in means) / (len(means) - 1) / len(means)) / every
    return Lyapunov(mean / every, error, tuple(stretches), every)


@torch.no_grad()
def _rescale(first: Twin, second: Twin, small: float) -> float:
    """Bring the difference of two twins to a length; the length it had."""
    a, b = first.space, second.space
    here, there = a.live(), b.live()
    gaps = [other - one for one, other in zip(here, there, strict=True)]
    for gap, mask in zip(gaps, noise(a), strict=True):
        if mask is not None:
            gap.masked_fill_(mask, 0.0)
    found = a.length(gaps)
    if not (math.isfinite(found) and found > 0.0):
        return found
    for one, other in zip(here, there, strict=True):
        other.copy_(one + (other - one) * (small / found))
    for of_one, of_other in zip(a.optimizers, b.optimizers, strict=True):
        states, others = parallel.optimizer_state(of_one), parallel.optimizer_state(of_other)
        for key, twin in zip(_keys(of_one), _keys(of_other), strict=True):
            for name, value in (states.get(key) or {}).items():
                image = (others.get(twin) or {}).get(name)
                if name == "step" or not isinstance(value, torch.Tensor) or not isinstance(image, torch.Tensor):
                    continue
                one, other = parallel.local(value), parallel.local(image)
                if one.is_floating_point() or one.is_complex():
                    other.copy_(one + (other - one) * (small / found))
                    if name.endswith("_sq"):
                        other.clamp_min_(0.0)
    return found


def _keys(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [handle for group in optimizer.param_groups for handle in group["params"]]
