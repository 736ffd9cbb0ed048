"""Does rounding matter to this run? Twin runs that differ by rounding alone, and how fast they part.

The instability is called restrained when two such runs part exponentially, which shows that the linearised update is
unstable, and yet the distance levels off and the loss falls: the over-driven step moves the weights to where the update
is stable again (Sun et al., arXiv 2206.02001). A run like that is healthy, but no two of its runs can be compared for
long: see :func:`~.growth.divergence_horizon`.

Entry contract: every rank calls these functions together, with the same settings. Two copies of the run are held
at a time. The random streams of the caller are left as they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .. import parallel
from ..errors import StabilityError
from .growth import Growth, Horizon, Verdict, divergence_horizon, fit_growth, judge
from .perturbation import KScale, Perturbation
from .sharpness import participation
from .twins import Build, Distance, Twin, churn, distance


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
        churn(first, first.predictions(), second.predictions()),
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
