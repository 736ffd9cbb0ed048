"""A look ahead before the first step, from within the controller: what is found is told to the ladder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .diagnostics.preflight import Level, Preflight, preflight, takes_adam_steps
from .parts import Parts


def look_ahead(
    parts: Parts,
    model: nn.Module,
    batches: Sequence[Any],
    lr: float | None,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    blocks: Sequence[str] | None,
    search: bool,
) -> Preflight:
    """See :meth:`StabilityController.preflight`."""
    optimizers = parts.optimizers
    shaping = parts.shaping
    # One that takes other steps, if there is one: then there is no verdict.
    judged = next((each for each in optimizers if not takes_adam_steps(each)), optimizers[0])
    parts.phases.enter("preflight")
    # The weights move and are put back: nobody may be copying them, nor take these forwards for the loop's.
    parts.recovery.before_step()
    parts.first_forward.paused = True
    try:
        found = preflight(
            model,
            parts.measuring.probe.loss_fn if loss_fn is None else loss_fn,
            batches,
            largest_rate(optimizers) if lr is None else lr,
            optimizer=judged,
            # Those that will be shaped must keep the shape of their input: better known now than when it is needed.
            blocks=shaping.blocks if blocks is None and shaping is not None else blocks,
            search=search,
        )
    finally:
        parts.first_forward.paused = False
        parts.phases.enter("training")
    parts.ladder.warned(found.level is Level.HIGH)
    return found


def largest_rate(optimizers: Sequence[Optimizer]) -> float:
    """The largest learning rate that the parameter groups know of: schedulers note theirs there."""
    known = ("lr", "initial_lr", "max_lr")
    rates = [group[name] for each in optimizers for group in each.param_groups for name in known if name in group]
    return max(float(rate) for rate in rates)


def event_of_preflight(found: Preflight) -> dict[str, Any]:
    """What listeners are told: plain numbers and words."""
    return {
        "action": "preflight",
        "attempt": -1,
        "level": str(found.level),
        "reason": found.verdict,
        "learning_rate": found.lr,
        "score": None if found.risk is None else found.risk.score,
        "score_at_twice_the_rate": None if found.margin_risk is None else found.margin_risk.score,
        "recommended": found.recommended,
        "spectral_score": found.profile.score,
        "has_norm": found.profile.baselines.has_norm,
    }
