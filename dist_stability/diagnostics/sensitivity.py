"""Does rounding matter to this run? Twin runs that differ by rounding alone, and how fast they part.

The instability is called restrained when two such runs part exponentially, which shows that the linearised update is
unstable, and yet the distance levels off and the loss falls: the over-driven step moves the weights to where the update
is stable again (Sun et al., arXiv 2206.02001). A run like that is healthy, but no two of its runs can be compared for
long: see :func:`~.growth.divergence_horizon`.

Entry contract: every rank calls these functions together, with the same settings. Two or three copies of the run are
held at a time. The random streams of the caller are left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .. import parallel
from ..errors import StabilityError
from ..snapshot.rng import forked
from .growth import Growth, Horizon, Verdict, divergence_horizon, fit_growth, judge
from .perturbation import KScale, Perturbation
from .scaling import noise
from .sharpness import participation
from .space import total
from .twins import Build, Distance, Twin, TwinRun, distance


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What a perturbation of rounding size did to a run; the same on every rank. Distances: see :class:`Distance`.

    Attributes:
        perturbation: Its name.
        verdict: See :func:`~.growth.judge`; INVALID when twins without a perturbation differ.
        reason: One line for people.
        relative_l1: After each step.
        relative_l2: After each step.
        losses: Training loss of the unperturbed run at each step.
        losses_perturbed: Of the other.
        growth: Jump, exponent and plateau of ``relative_l2`` from the first step at which the twins differ.
        begun: That step; None if they never did.
        ftle_per_lr_time: Growth per step over the learning rate: comparable between learning rates.
        layers: ``relative_l1`` of each parameter after each step.
        layer_share: Share of each parameter in the squared distance, at the step at which the runs became different
            (or the last one).
        participation: 1 / sum of squares of the shares: 1 if one parameter has all of it. NaN without a distance.
        churn: Fraction of predictions that differ at the end; None without predictions.
        left_out: Elements that do not count at the last step, by parameter: noise under Adam.
    """

    perturbation: str
    verdict: Verdict
    reason: str
    relative_l1: tuple[float, ...] = ()
    relative_l2: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    losses_perturbed: tuple[float, ...] = ()
    growth: Growth | None = None
    begun: int | None = None
    ftle_per_lr_time: float = math.nan
    layers: dict[str, tuple[float, ...]] = field(default_factory=dict)
    layer_share: dict[str, float] = field(default_factory=dict)
    participation: float = math.nan
    churn: float | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    def horizon(self, tolerance: float = 1e-2) -> Horizon:
        """Up to which step runs that differ like this may be compared; counted from the first step of the run."""
        if self.begun is None:
            return Horizon(None, False, tolerance)
        found = divergence_horizon(self.relative_l2[self.begun :], tolerance)
        return found if found.steps is None else Horizon(found.steps + self.begun, found.measured, tolerance)


def sensitivity(
    build: Build,
    perturbation: Perturbation | None = None,
    steps: int = 60,
    *,
    seed: int = 0,
    gate_steps: int = 20,
    jump_steps: int = 4,
) -> Sensitivity:
    """Run a twin pair in lock step and judge it.

    First the gate: twins without a perturbation, and twins with k = 1 and k = 2 where the optimizer allows it, must be
    equal to the bit for ``gate_steps`` steps; else nothing can be said, and the verdict is INVALID.

    Args:
        build: Makes a run from a seed.
        perturbation: Of the second twin; by default ``KScale(3)``.
        steps: Of the pair; fewer if something is no longer finite.
        seed: For ``build``.
        gate_steps: Steps of the gate; 0 leaves it out.
        jump_steps: Steps after the first difference that do not count as growth.

    Collectives: those of the runs, and one all-reduce for each step, two with an Adam.

    Raises:
        StabilityError: A setting is out of range, or see :class:`Twin` and the perturbation.
    """
    for name, value, least in (("steps", steps, 1), ("gate_steps", gate_steps, 0), ("jump_steps", jump_steps, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise StabilityError(
                f"rank {parallel.this_rank()}: sensitivity {name}: expected a whole number >= {least}, got {value!r}"
            )
    perturbation = KScale(3) if perturbation is None else perturbation
    if gate_steps and (why := _gate(build, perturbation, seed, gate_steps)):
        return Sensitivity(perturbation.name, Verdict.INVALID, why)
    first = Twin(build, seed, perturbation.reference())
    second = Twin(build, seed, perturbation)
    rate = first.learning_rate
    trace: list[Distance] = []
    for step in range(steps):
        trace.append(distance(first, second, (first.step(step), second.step(step))))
        if not all(map(math.isfinite, (trace[-1].relative_l2, *trace[-1].losses))):
            break
    l2 = [each.relative_l2 for each in trace]
    begun = next((index for index, value in enumerate(l2) if value != 0.0), None)
    losses, other = [each.losses[0] for each in trace], [each.losses[1] for each in trace]
    growth = None if begun is None else fit_growth(l2[begun:], jump_steps)
    verdict, reason = judge(l2, losses, other)
    where = len(trace) - 1
    if growth is not None and begun is not None and growth.saturation is not None:
        where = begun + growth.saturation
    shares = trace[where].shares
    return Sensitivity(
        perturbation.name,
        verdict,
        reason,
        tuple(each.relative_l1 for each in trace),
        tuple(l2),
        tuple(losses),
        tuple(other),
        growth,
        begun,
        growth.rate / rate if growth is not None and rate else math.nan,
        {name: tuple(each.layers[name] for each in trace) for name in first.space.names},
        shares,
        participation(shares) if shares else math.nan,
        _churn(first, second),
        trace[-1].left_out,
    )


def _gate(build: Build, perturbation: Perturbation, seed: int, steps: int) -> str | None:
    """Why twins that must be equal are not."""
    reference = perturbation.reference()
    pairs = [(reference, reference)]
    probe = Twin(build, seed, reference)
    if all(KScale.knows(optimizer) for optimizer in probe.space.optimizers):
        pairs.append((KScale(1), KScale(2)))
    del probe
    for one, other in pairs:
        first, second = Twin(build, seed, one), Twin(build, seed, other)
        for step in range(steps):
            found = distance(first, second, (first.step(step), second.step(step)))
            if found.relative_l1 != 0.0:
                if math.isnan(found.relative_l1):
                    return f"the run itself is not finite at step {step}"
                worst = max(found.layers, key=lambda name: found.layers[name])
                same = f"{one.name} and {other.name}" if one.name != other.name else "two unperturbed runs"
                return (
                    f"nondeterministic: {same} differ at step {step}, most in {worst}. Fix seeds, data order and "
                    "kernels (torch.use_deterministic_algorithms) first"
                )
    return None


def _churn(first: Twin, second: Twin) -> float | None:
    """Fraction of predictions that differ. Collectives: one all-reduce, and those of the forwards."""
    one, other = first.predictions(), second.predictions()
    if one is None or other is None:
        return None
    return _fraction(one, other, first)


def _fraction(one: torch.Tensor, other: torch.Tensor, twin: Twin) -> float:
    different = (one != other).sum(dtype=torch.float64).to(twin.space.device)
    count = torch.full_like(different, float(one.numel()))
    summed, examples = total(torch.stack([different, count]))
    return summed / examples if examples else math.nan


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
    mean = _mean(stretches)
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


@dataclass(frozen=True, slots=True)
class Variance:
    """Does rounding move the outcome as much as the seed does?

    Attributes:
        scores: By seed, then in the order of ``perturbations``.
        perturbations: Their names.
        std_perturbation: Population standard deviation over perturbations, mean over seeds.
        std_seed: Over seeds, mean over perturbations.
        ratio: Variance over perturbations / variance over seeds, of the means above; inf where seeds do not matter.
        churn: Mean fraction of predictions that differ from the first perturbation's, at one seed; None without.
    """

    scores: tuple[tuple[float, ...], ...]
    perturbations: tuple[str, ...]
    std_perturbation: float
    std_seed: float
    ratio: float
    churn: float | None


def variance_against_seeds(
    build: Build,
    score: Callable[[TwinRun], float],
    seeds: Sequence[int],
    perturbations: Sequence[Perturbation],
    steps: int,
) -> Variance:
    """Train once for each seed and perturbation and compare the spread of the final scores.

    Args:
        build: Makes a run from a seed.
        score: Of a finished run, for example its test accuracy; the same on every rank. Its draws are the same each
            time.
        seeds: At least two.
        perturbations: At least two, for example ``KScale(k)`` for k in 1, 3, 5.
        steps: Of each run.

    Collectives: those of the runs, and one all-reduce for each run after a seed's first.

    Raises:
        StabilityError: Fewer than two seeds or perturbations.
    """
    if len(seeds) < 2 or len(perturbations) < 2 or steps < 1:
        raise StabilityError(
            f"rank {parallel.this_rank()}: variance_against_seeds needs two seeds, two perturbations and one step at "
            f"least, got {len(seeds)}, {len(perturbations)} and {steps}"
        )
    table, churns = [], []
    for seed in seeds:
        row = []
        before: torch.Tensor | None = None
        for perturbation in perturbations:
            twin = Twin(build, seed, perturbation)
            for step in range(steps):
                twin.step(step)
            with forked(0):
                row.append(float(score(twin.run)))
            said = twin.predictions()
            if said is not None and before is not None:
                churns.append(_fraction(said, before, twin))
            before = said if before is None else before
        table.append(tuple(row))
    across = _mean([_std(row) for row in table])
    between = _mean([_std([row[i] for row in table]) for i in range(len(perturbations))])
    return Variance(
        tuple(table),
        tuple(each.name for each in perturbations),
        across,
        between,
        (across / between) ** 2 if between else math.inf,
        _mean(churns) if churns else None,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    centre = _mean(values)
    return math.sqrt(_mean([(value - centre) ** 2 for value in values]))
