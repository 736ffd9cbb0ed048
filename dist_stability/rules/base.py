"""What a rule is: a pure object that turns measurements into accept, refuse, or refuse and go further back.

A rule holds Python floats and nothing else: no tensors, no collectives, no clock, no random numbers. Fed the same
numbers, it answers the same on every rank, and it can be tested by the million.

Who calls what (the controller, in this order)::

    commit(y0)                                    once: the probe of the starting weights, judged by nobody
    every judged attempt:  expect(...)            if the rule has it: under which conditions the proposal was made
                           judge(y, norm)         changes no state, may be asked twice
                           then exactly one of    commit(y, norm)   the proposal stands: learn from it
                                                  reject(y, norm)   the judge's "no" was carried out: count it

A proposal refused for another reason (a guard's veto, a replica that drifted, an exception) says nothing about the
rule, which is then not told.

Learned statistics change in ``commit`` only. The memory of refusals changes in ``reject`` and is never rolled back
with the weights, or nothing would ever escalate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from dist_stability.verdict import Judgement


@runtime_checkable
class Rule(Protocol):
    """Judges measurements. Any float may be NaN or infinite: that is ordinary input, never an exception.

    The controller checks every commit against prediction + bound and against the highest committed before + bound
    (``guarantees``). A rule whose bound is in other units than the measurement says ``bounded = False``.
    """

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        """Say whether the proposal may be committed; changes no state.

        Args:
            measurement: Probe value y of the proposal, in the probe's own unit.
            gradient_norm: Global gradient norm of the same step before clipping; None when unknown.
        """
        ...

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Learn from a proposal that stands. The first call is the probe of the starting weights."""
        ...

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Count a refusal; what was refused never enters the learned statistics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything the next judgement depends on, except settings and anchors; JSON-able."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned. The rule then has no anchors."""
        ...


@runtime_checkable
class ExpectingRule(Rule, Protocol):
    """A rule that knows what to expect of a larger learning rate, of several steps at once, or of an odd batch."""

    def expect(self, *, steps: int = 1, learning_rate: float | None = None, training_loss: float | None = None) -> None:
        """Say under which conditions the next proposal was made. Changes nothing that was learned.

        Args:
            steps: Optimizer steps since the last judged commit, >= 1.
            learning_rate: Largest *announced* learning rate over the parameter groups: one that a scheduler vouches
                for. None when unknown: a learning rate that nobody announced may be the fault itself.
            training_loss: Of the batch that the (last) step was made of, before the step; None when unknown.
        """
        ...


@runtime_checkable
class RebasingRule(Rule, Protocol):
    """A rule that can follow its yardstick."""

    def rebase(self, measurement: float) -> None:
        """The last committed state was restored and measured again, and now gives ``measurement``.

        Its bits are those that were committed, so the probe has moved, not the weights: shift the level by the
        difference and keep the scale.
        """
        ...


@runtime_checkable
class DeepRule(Rule, Protocol):
    """A rule that may ask for an older state than the last commit."""

    def anchor(self) -> dict[str, Any]:
        """Statistics that belong to the state just committed; the rule counts one more anchor, two at most.

        The controller keeps the returned JSON-able dictionary beside the snapshot (after every 8th judged commit).
        """
        ...

    def deep(self, anchor: Mapping[str, Any]) -> None:
        """The older anchor was restored: its statistics hold again, and both anchors are now this one."""
        ...


def supports_deep(rule: object) -> bool:
    """Whether the controller should keep two anchors for this rule and honour ``Judgement.deep``.

    A rule that has the methods can still decline with ``deep_restore = False``: each anchor costs one host copy of
    the training state.
    """
    return isinstance(rule, DeepRule) and bool(getattr(rule, "deep_restore", True))


def settings_of(rule: object) -> dict[str, Any]:
    """How the rule was built, for comparison over ranks: its class and, if it has them, its ``settings()``."""
    settings = getattr(rule, "settings", None)
    return {"rule": f"{type(rule).__module__}.{type(rule).__qualname__}", **(settings() if callable(settings) else {})}


def checked_setting(name: str, value: object, expected: str, valid: Callable[[float], bool]) -> float:
    """Return a numeric setting as a float.

    Raises:
        TypeError: It is not a real number.
        ValueError: It is outside its range (NaN always is, since ``valid`` compares).
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}")
    number = float(value)
    if not valid(number):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return number


def checked_state(
    rule: object,
    state: Mapping[str, Any],
    *,
    numbers: Iterable[str] = (),
    optional: Iterable[str] = (),
    counts: Iterable[str] = (),
    lists: Iterable[str] = (),
    where: str = "load_state_dict",
) -> dict[str, Any]:
    """Return the entries of a saved state after checking all of them, so that a bad one changes nothing.

    Args:
        rule: The rule that is to take the state.
        state: What was saved; its key "rule" names the class that saved it.
        numbers: Keys that hold a finite number.
        optional: Keys that hold a finite number or None.
        counts: Keys that hold an integer >= 0.
        lists: Keys that hold a list of finite numbers.
        where: Method named in the errors.

    Raises:
        TypeError: The state is not a mapping.
        ValueError: It was saved by another rule, or an entry is missing, unknown or malformed.
    """
    name = type(rule).__name__
    if not isinstance(state, Mapping):
        raise TypeError(f"{name}.{where} expects a dictionary made by {name}, got {type(state).__name__}")
    if state.get("rule") != name:
        raise ValueError(
            f"{name}.{where}: key 'rule' is {state.get('rule')!r}, expected {name!r}; this state belongs to another "
            "rule. Build the controller with the rule the checkpoint was saved with."
        )
    tests: dict[str, Callable[[Any], bool]] = {}
    tests.update({key: _is_finite_number for key in numbers})
    tests.update({key: lambda value: value is None or _is_finite_number(value) for key in optional})
    tests.update({key: lambda value: type(value) is int and value >= 0 for key in counts})
    tests.update({key: lambda value: isinstance(value, list) and all(map(_is_finite_number, value)) for key in lists})
    if set(state) != {"rule", *tests}:
        missing, unknown = sorted({*tests} - {*state}), sorted({*state} - {"rule", *tests}, key=str)
        raise ValueError(
            f"{name}.{where}: missing keys {missing}, unknown keys {unknown}; was it saved by this version?"
        )
    for key, test in tests.items():
        if not test(state[key]):
            raise ValueError(f"{name}.{where}: entry {key!r} is {state[key]!r}, which {name} never saves")
    return {key: state[key] for key in tests}


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
