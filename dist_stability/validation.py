"""Checks of what a caller gave, before anything is entered that other ranks wait in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import parallel
from .cadence import Cadence
from .diagnostics.kss import SpectralShaping
from .diagnostics.monitor import EdgeOfStabilityMonitor
from .diagnostics.update_rule import UpdateRule
from .rules import Rule
from .rungs import Escalation
from .signals import LossProbe
from .snapshot.tiers.checkpoints import Checkpoints
from .snapshot.tiers.peers import PeerCopies
from .snapshot.tiers.shared_memory import SharedMemory

SHAPING = "spectral shaping"
"""Its name in the extra state."""

MODES = ("enforce", "observe")
PROBE_ON = ("rank0", "mean")
DECISIONS = ("immediate", "deferred")


def check_optimizers(optimizer: Optimizer | Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    """One optimizer or several, in stepping order.

    Raises:
        TypeError: Something else, or an optimizer that calls its closure repeatedly.
        ValueError: None given, or one given twice.
    """
    given = (optimizer,) if isinstance(optimizer, Optimizer) else optimizer
    if not isinstance(given, Iterable):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer or a list of them, got {_kind(optimizer)}")
    optimizers = tuple(given)
    for index, each in enumerate(optimizers):
        if not isinstance(each, Optimizer):
            raise TypeError(
                f"optimizer[{index}]: expected a torch.optim.Optimizer, got {_kind(each)}; give the wrapped optimizer "
                f"of a wrapper (often its `.optimizer`)"
            )
        if isinstance(each, torch.optim.LBFGS):
            raise TypeError(
                f"optimizer[{index}]: LBFGS evaluates its closure several times in a step, so there is no single "
                f"proposal to judge; use an optimizer that calls it at most once"
            )
    if not optimizers:
        raise ValueError("optimizer: an empty list; give at least one")
    if len({id(each) for each in optimizers}) != len(optimizers):
        raise ValueError("optimizer: the same optimizer is listed twice")
    return optimizers


def check_shaping(shaping: Any, model: nn.Module, extra_state: Any, mode: str) -> dict[str, Any]:
    """Spectral shaping for the ladder; returns ``extra_state`` with it.

    Raises:
        TypeError: Something else.
        ValueError: Of another model, given twice, or in observe mode, where there is no ladder to switch it on.
    """
    given = {} if extra_state is None else extra_state
    if shaping is None or not isinstance(given, Mapping):
        return given
    if not isinstance(shaping, SpectralShaping):
        raise TypeError(f"shaping: expected SpectralShaping(model, ...) or None, got {_kind(shaping)}")
    if shaping.model is not model:
        raise ValueError("shaping: it was made for another model; give both the one that the loop calls")
    if any(value is shaping for value in given.values()) or SHAPING in given:
        raise ValueError(f"extra_state: leave out {SHAPING!r}; shaping= has it")
    if mode != "enforce":
        raise ValueError(f"shaping: mode={mode!r} never acts, so it would never be switched on; leave it out")
    return {**given, SHAPING: shaping}


def check_parts(
    model: nn.Module,
    probe: LossProbe,
    rule: Any,
    guards: Any,
    extra_state: Mapping[str, Any] | None,
    confirm: Any = None,
    trend: Any = None,
    reload: Any = None,
    asked_to_stop: Any = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The objects a controller is made of. Returns (guards, extra_state).

    Raises:
        TypeError: Naming the setting, what came and what was expected.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {_kind(model)}")
    if not isinstance(probe, LossProbe):
        raise TypeError(f"probe: expected LossProbe(loss_fn, batches), got {_kind(probe)}")
    if confirm is not None and not isinstance(confirm, LossProbe):
        raise TypeError(f"confirm: expected a second LossProbe(loss_fn, batches) or None, got {_kind(confirm)}")
    if confirm is probe and probe is not None:
        raise ValueError("confirm: the same probe twice confirms nothing; give it other held-out batches")
    missing = [name for name in ("commit", "restart", "settings", "state_dict") if not hasattr(trend, name)]
    if trend is not None and (missing or isinstance(trend, type)):
        raise TypeError(f"trend: expected an object like SlowDivergence() or None, got {_kind(trend)}")
    if reload is not None and not callable(reload):
        raise TypeError(f"reload: expected a function that loads the last persisted state, got {_kind(reload)}")
    if asked_to_stop is not None and not callable(asked_to_stop):
        raise TypeError(
            f"asked_to_stop: expected a function without arguments, got {_kind(asked_to_stop)}; for a Preemption "
            "asked_to_stop=lambda: preemption.raised"
        )
    if not isinstance(rule, Rule) or isinstance(rule, type):
        raise TypeError(
            f"rule: expected an object with judge, commit, reject, state_dict and load_state_dict, got {_kind(rule)}"
        )
    if not isinstance(guards, Sequence):
        raise TypeError(f"guards: expected a tuple of guards, got {_kind(guards)}; write guards=(NonFiniteGuard(),)")
    for index, guard in enumerate(guards):
        missing = [name for name in ("flag", "veto", "explain", "commit", "reject") if not hasattr(guard, name)]
        if missing or isinstance(guard, type):
            raise TypeError(
                f"guards[{index}]: {_kind(guard)} is no guard (it lacks {', '.join(missing) or 'an instance'})"
            )
    state = dict(extra_state or {})
    for name, value in state.items():
        if not (callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))):
            raise TypeError(f"extra_state[{name!r}]: {_kind(value)} has no state_dict and load_state_dict")
    return tuple(guards), state


def check_settings(
    every: Any,
    mode: str,
    probe_on: str,
    timeout: float,
    replica_check_every: int,
    anchors: int,
    escalation: Any,
    decision: str = "immediate",
    split_replicas: bool | None = None,
    shadow: bool = False,
) -> None:
    """The plain settings.

    Raises:
        TypeError: A wrong type.
        ValueError: Out of range, saying what is allowed.
    """
    whole: list[tuple[str, Any, int]] = [("replica_check_every", replica_check_every, 0), ("anchors", anchors, 0)]
    if every != "auto" and (not isinstance(every, Cadence) or isinstance(every, type)):
        whole.append(("every", every, 1))
    for name, number, least in whole:
        if not isinstance(number, int) or isinstance(number, bool):
            cadence = ' (or give "auto" or an AdaptiveCadence())' if name == "every" else ""
            raise TypeError(f"{name}: expected a whole number, got {number!r}{cadence}")
        if number < least:
            raise ValueError(f"{name}: expected at least {least}, got {number}")
    if escalation is not None and not isinstance(escalation, Escalation):
        raise TypeError(f"escalation: expected Escalation(...) or None, got {_kind(escalation)}")
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    if probe_on not in PROBE_ON:
        raise ValueError(f"probe_on: expected one of {PROBE_ON}, got {probe_on!r}")
    if decision not in DECISIONS:
        raise ValueError(f"decision: expected one of {DECISIONS}, got {decision!r}")
    if split_replicas is not None and not isinstance(split_replicas, bool):
        raise TypeError(f"split_replicas: expected True, False or None, got {split_replicas!r}")
    if not isinstance(shadow, bool):
        raise TypeError(f"shadow: expected True or False, got {shadow!r}")
    if split_replicas and not replica_check_every:
        raise ValueError(
            "split_replicas=True needs replicas that are compared: a rank would be given the bits of another. Set "
            "replica_check_every to 1 or more, or leave split_replicas out"
        )
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")


def check_edge(edge: Any, model: nn.Module, optimizers: Sequence[Optimizer], decision: str) -> None:
    """The monitor of the edge of stability, if there is one.

    Raises:
        TypeError: Something else.
        ValueError: With a deferred verdict, or it measures something else than what is trained.
        StabilityError: Nothing is known of the stability of an optimizer.
    """
    if edge is None:
        return
    where = f"rank {parallel.this_rank()}: edge:"
    if not isinstance(edge, EdgeOfStabilityMonitor):
        raise TypeError(f"{where} expected EdgeOfStabilityMonitor(...) or None, got {_kind(edge)}")
    if decision == "deferred":
        raise ValueError(
            f'{where} does not go with decision="deferred", whose verdict comes when the weights have moved on. Use '
            'decision="immediate", or give DirectionalRatio(...) in signals= and no monitor'
        )
    if edge.sharpness is None:
        return
    measured = edge.sharpness.curvature
    if measured.model is not model or {*map(id, measured.space.optimizers)} != {*map(id, optimizers)}:
        raise ValueError(
            f"{where} its Sharpness was made for another model or optimizer than the controller's; make it with the "
            "model that the loop calls, wrappers included, and the same optimizers"
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            UpdateRule.of(optimizer, group)


def check_persist(persist: Any, mode: str) -> tuple[SharedMemory | Checkpoints | PeerCopies, ...]:
    """Where states are kept, as a tuple; empty for nowhere.

    Raises:
        TypeError: Something else than the settings there are.
        ValueError: One of them twice, or in observe mode, where there are no snapshots.
    """
    if persist is None:
        return ()
    settings = (persist,) if not isinstance(persist, list | tuple) else tuple(persist)
    for setting in settings:
        if not isinstance(setting, SharedMemory | Checkpoints | PeerCopies):
            raise TypeError(
                f"persist: expected SharedMemory(...), PeerCopies(...), Checkpoints(...), a list of them, or None, got "
                f"{_kind(setting)}"
            )
    if len({type(setting) for setting in settings}) < len(settings):
        raise ValueError(f"persist: {[_kind(setting) for setting in settings]}: give each of them once")
    kinds = {type(setting) for setting in settings}
    if PeerCopies in kinds and SharedMemory not in kinds:
        raise ValueError(
            "persist: PeerCopies() copies slots that lie in shared memory; give [SharedMemory(...), PeerCopies(...)]"
        )
    if settings and mode != "enforce":
        raise ValueError(f"persist: mode={mode!r} takes no snapshots, so there is nothing to keep; leave it out")
    return settings


def check_scaler(scaler: Any) -> Any:
    """The scaler of a step, or None where there is nothing to unscale: none given, or a disabled one.

    Raises:
        TypeError: It is no GradScaler.
    """
    if scaler is None:
        return None
    if not isinstance(scaler, (torch.amp.GradScaler, torch.cuda.amp.GradScaler)):
        raise TypeError(f"step(scaler=...): expected a torch.amp.GradScaler, got {_kind(scaler)}")
    return scaler if scaler.is_enabled() else None


def check_not_fused_into_backward(optimizers: Sequence[Optimizer]) -> None:
    """Refuse an optimizer that steps inside backward: its proposal is made before anyone can look at the gradients.

    Such loops hang hooks on the parameters that step and then drop each gradient, so that none is left here.

    Raises:
        TypeError: The parameters have such hooks and no gradients are left.
    """
    parameters = [p for o in optimizers for g in o.param_groups for p in g["params"] if p.numel()]
    hooked = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
    if hooked and parameters and all(p.grad is None for p in parameters):
        raise TypeError(
            "step(): no parameter has a gradient, but the parameters carry post-accumulate-grad hooks: the optimizer "
            "is fused into backward and has changed the weights already, so this step can be neither vetoed nor "
            "judged. Call optimizer.step() (or controller.step()) after backward instead."
        )


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__}"
