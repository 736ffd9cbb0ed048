"""The first half of an attempt: do all ranks want this optimizer step to happen at all?

Guards look at gradients before the step. A veto needs no snapshot: a step that does not happen changes nothing. Where
only one rank can see the fault, the ranks vote before the step; a caller's global gradient norm is the same number
everywhere, so a flag computed from it needs no vote.

Fused optimizers treat ``found_inf`` = 1 as an exact no-op, so with them the agreed flag never has to reach the host
before the step: the host reads it with the vote that follows the probe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from . import parallel
from .attempt import Attempt, Decision, Phases, one_line
from .guards import Guard
from .verdict import Action
from .vote import Ballot, Tally, Vote, from_bits


class VetoStage:
    """Guards, loss-scale overflow, and the ways in which a step is prevented.

    Args:
        guards: Asked in this order.
        optimizers: All that make the proposal.
        vote: Of this controller.
        phases: Of this controller.
    """

    def __init__(self, guards: Sequence[Guard], optimizers: Sequence[Optimizer], vote: Vote, phases: Phases) -> None:
        """Remember the parts."""
        self.guards = tuple(guards)
        self._optimizers = tuple(optimizers)
        self._vote = vote
        self._phases = phases
        self._found_inf: list[torch.Tensor | None] = []

    def look(self, attempt: Attempt) -> None:
        """Unscale the gradients; this rank's flag, left on the device. A guard that raises is a "no"."""
        attempt.overflow_flags = unscale(attempt.scaler, self._optimizers, self._vote.device)
        try:
            flags = [flag for guard in self.guards if (flag := guard.flag(attempt.gradients)) is not None]
            if flags:
                attempt.flag = torch.stack([flag.to(self._vote.device).reshape(()) != 0 for flag in flags]).any()
        except Exception as error:
            attempt.error = error

    def agree(self, attempt: Attempt, later: bool = False, now: bool = False) -> None:
        """Bring all ranks to the same veto, known to the host (``attempt.vetoed``) or to the device alone (None).

        Args:
            attempt: After :meth:`look`.
            later: The step may happen and be taken back: the flags ride in the vote that follows the probe, and
                nobody waits for them. Not with a scaler, nor with a guard that wants the norm before the step.
            now: The host has to know, even if the device alone could skip the step.

        Collectives: one all-reduce if a scaler is used, or if there are guards and no caller's norm; none if the flags
        ride in the later vote.
        """
        caller = attempt.gradients.caller_norm
        if later and self.guards and attempt.scaler is None and not any(guard.reads_norm for guard in self.guards):
            return
        if (self.guards and caller is None) or attempt.scaler is not None:
            self._phases.enter("veto vote")
            ballot = Ballot(
                no=attempt.error is not None,
                veto=attempt.flag,
                square_sum=attempt.gradients.square_sum if caller is None else None,
                overflow=attempt.overflow_flags,
                agree={**attempt.agree, "point of the protocol": 1},
            )
            attempt.pre_vote = (self._vote.reduce(self._vote.pack(ballot), attempt.index), ballot)
            attempt.flag = self._vote.refused(attempt.pre_vote[0])
            limit = min((guard.limit() for guard in self.guards), default=math.inf)
            if caller is None and limit < math.inf:
                attempt.flag = attempt.flag | (self._vote.square_sum(attempt.pre_vote[0]) > limit * limit)
        elif not self.guards:
            attempt.vetoed = False
            return
        # Without this vote, an error of a guard is known to its rank alone; it goes into the vote after the probe.
        if not now and self._can_skip_on_device(attempt):
            self._set_found_inf(attempt.flag)
            return
        tally = self.read(attempt)
        if attempt.scaler is not None and tally is not None:
            write_overflow(attempt.scaler, self._optimizers, tally.overflow)
            attempt.overflow = all(tally.overflow)
            if any(tally.overflow):
                # The scaler's business: it skips these optimizers, and the non-finite gradients are no fault.
                attempt.vetoed = False
                return
        attempt.vetoed = bool(attempt.flag) or self._refuses_norm(attempt)

    def read(self, attempt: Attempt) -> Tally | None:
        """Read the vote before the step, if there was one, and the norm; waits on the host."""
        tally = None
        if attempt.pre_vote is not None:
            tally = self._vote.read(*attempt.pre_vote, attempt.index)
            attempt.norm = tally.gradient_norm
            if "gradient norm" in tally.agreed:
                attempt.norm = from_bits(tally.agreed["gradient norm"])
        elif attempt.gradients.caller_norm is not None:
            attempt.norm = float(attempt.gradients.caller_norm)
        return tally

    def stepped(self) -> None:
        """The optimizers have run: take ``found_inf`` off them again."""
        for optimizer, before in zip(self._optimizers, self._found_inf, strict=False):
            if before is None:
                del optimizer.found_inf  # type: ignore[attr-defined]
            else:
                optimizer.found_inf = before  # type: ignore[attr-defined]
        self._found_inf = []

    def explain(self, attempt: Attempt) -> Decision:
        """The veto, in words: which rank saw what. Collectives: two all-gathers."""
        mine: str | None = attempt.reason or one_line(attempt.error)
        if attempt.provisional:
            mine = mine or self._remembered(attempt)
        for guard in self.guards if mine is None and not attempt.provisional else ():
            mine = mine or guard.explain(attempt.gradients)
        if mine is None and attempt.norm is not None and math.isfinite(attempt.norm):
            # Not for a norm that is no number: only the ranks that spoilt it are to be named.
            mine = next((said for guard in self.guards if (said := guard.veto(attempt.norm))), None)
        everyone = {r: text for r, text in self._vote.gather([mine], attempt.index).items() if text[0] is not None}
        rank = min(everyone, default=0)
        reason = everyone.get(rank, ["vetoed by a guard"])[0]
        return Decision(Action.VETO, "gradient", f"rank {rank}: {reason}", rank)

    def above_limit(self, attempt: Attempt) -> bool:
        """Whether the agreed norm is one that a guard would not have let pass; for flags that rode in the later vote.

        A caller's norm was compared before the step.
        """
        if attempt.norm is None or attempt.gradients.caller_norm is not None:
            return False
        return attempt.norm > min((guard.limit() for guard in self.guards), default=math.inf)

    @staticmethod
    def _remembered(attempt: Attempt) -> str | None:
        """What is left to say about this rank's flag when the gradients are others already."""
        if not bool(attempt.flag):
            return None
        names = attempt.gradients.spoilt()
        if names:
            more = f" (and of {len(names) - 1} more parameters)" if len(names) > 1 else ""
            return f"gradient of {names[0]}{more} was not finite"
        if attempt.norm is not None and math.isfinite(attempt.norm):
            return None  # the guards have words for such a norm
        return f"the global gradient norm was {attempt.norm}"

    def _refuses_norm(self, attempt: Attempt) -> bool:
        """Ask the guards that judge the agreed norm; the same answer on every rank."""
        for guard in self.guards if attempt.norm is not None else ():
            attempt.reason = guard.veto(attempt.norm) if guard.reads_norm else None  # type: ignore[arg-type]
            if attempt.reason is not None:
                return True
        return False

    def _can_skip_on_device(self, attempt: Attempt) -> bool:
        return (
            attempt.scaler is None
            and not any(guard.reads_norm for guard in self.guards)
            and all(_skips_exactly(optimizer) for optimizer in self._optimizers)
        )

    def _set_found_inf(self, flag: torch.Tensor | bool) -> None:
        for optimizer in self._optimizers:
            before = getattr(optimizer, "found_inf", None)
            device = parallel.local(optimizer.param_groups[0]["params"][0]).device
            mine = torch.as_tensor(flag).to(device, torch.float32)
            optimizer.found_inf = mine if before is None else torch.maximum(before.to(mine), mine)  # type: ignore[attr-defined]
            self._found_inf.append(before)


def unscale(scaler: Any, optimizers: Sequence[Optimizer], device: torch.device) -> list[torch.Tensor]:
    """Unscale the gradients, unless the caller did in order to clip them; each optimizer's found_inf of this rank."""
    if scaler is None:
        return []
    found = []
    for optimizer in optimizers:
        # The scaler has no public way to ask whether unscale_ was called, and a second call raises.
        if scaler._per_optimizer_states[id(optimizer)]["stage"].name == "READY":
            scaler.unscale_(optimizer)
        flags = [parallel.local(flag) for flag in scaler._found_inf_per_device(optimizer).values()]
        zero = torch.zeros((), device=device)
        found.append(torch.stack([zero, *(flag.to(device).reshape(()) for flag in flags)]).sum())
    return found


def write_overflow(scaler: Any, optimizers: Sequence[Optimizer], overflow: Sequence[bool]) -> None:
    """Give every rank's scaler the agreed outcome; its own ``step`` and ``update`` then act alike everywhere."""
    for optimizer, found in zip(optimizers, overflow, strict=True):
        for flag in scaler._found_inf_per_device(optimizer).values():
            parallel.local(flag).fill_(float(found))


def _skips_exactly(optimizer: Optimizer) -> bool:
    """Whether ``found_inf`` = 1 leaves this optimizer's weights and state exactly as they are.

    Not before its state exists: it would be created, and SGD would keep an uninitialised momentum buffer.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    for group in optimizer.param_groups:
        stateless = isinstance(optimizer, torch.optim.SGD) and not group["momentum"]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if parameter.grad is not None and not stateless and (not state or None in state.values()):
                return False
    return True
