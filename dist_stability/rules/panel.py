"""Everything that judges measurements in one run: the rule, an optional second opinion, an optional trend.

The second opinion is a rule of the same kind on a disjoint probe. A step is refused only if both refuse it, so the
first can be run at a higher rate, and see smaller harm, without more benign steps being refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from dist_stability.rules.base import (
    DeepRule,
    ExpectingRule,
    RebasingRule,
    Rule,
    settings_of,
    supports_deep,
)
from dist_stability.verdict import Judgement

_NEW_LEVEL = 2.0
"""An announced learning rate this many times the one before takes the measurement to another level."""


class Trend(Protocol):
    """Watches committed measurements for a slow divergence, which no single step shows."""

    def commit(self, measurement: float, steps: int = 1) -> str | None:
        """Take one committed measurement; a one-line reason while it alarms, else None.

        Args:
            measurement: Of the probe.
            steps: Optimizer steps since the commit before.
        """
        ...

    def restart(self) -> None:
        """The run goes on from another state: forget the history."""
        ...

    def settings(self) -> dict[str, Any]:
        """How it was built; the same on every rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything the next alarm depends on; JSON-able."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        ...


class Collapse(Protocol):
    """Watches the effective step, mean |update| / learning rate, for a collapse that the probe cannot see."""

    def judge(self, effective_step: float | None) -> str | None:
        """Why the step must be refused, or None; changes no state."""
        ...

    def commit(self, effective_step: float | None) -> None:
        """The step stands."""
        ...

    def reject(self, effective_step: float | None) -> None:
        """The step was refused."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything the next judgement depends on; JSON-able."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        ...


class Panel:
    """Asks the parts in the right order. Pure numbers, no collectives; the same answers on every rank.

    Args:
        rule: Judges the probe.
        confirmed: Whether there is a second probe; it is judged by a fresh copy of the rule.
        trend: Told of every committed measurement, or None.
        collapse: Judges the effective step, where it is measured; or None.
    """

    def __init__(
        self, rule: Rule, confirmed: bool = False, trend: Trend | None = None, collapse: Collapse | None = None
    ) -> None:
        """Nothing is measured yet."""
        self.rule = rule
        self.second: Rule | None = copy.deepcopy(rule) if confirmed else None
        self.trend = trend
        self.collapse = collapse
        self._steps = 1
        self._effective_step: float | None = None
        self._rate: float | None = None

    @property
    def _rules(self) -> tuple[Rule, ...]:
        return (self.rule,) if self.second is None else (self.rule, self.second)

    @property
    def supports_deep(self) -> bool:
        """Whether :meth:`anchor` and :meth:`deep` may be called."""
        return supports_deep(self.rule)

    @property
    def bounded(self) -> bool:
        """Whether a commit never exceeds prediction + bound and the highest before + bound.

        A rule is taken to promise it unless it says ``bounded = False``.
        """
        return bool(getattr(self.rule, "bounded", True))

    @property
    def envelope(self) -> float | None:
        """Highest measurement that may be committed now, whatever was predicted; None for a rule without a limit."""
        limit = getattr(self.rule, "envelope", None)
        return None if limit is None else float(limit)

    def start(self, measurement: float, second: float | None = None) -> None:
        """The probes of the starting weights."""
        self.rule.commit(measurement)
        if self.second is not None and second is not None:
            self.second.commit(second)
        if self.trend is not None:
            self.trend.commit(measurement)

    def expect(
        self,
        *,
        steps: int,
        learning_rate: float | None,
        effective_step: float | None = None,
        training_loss: float | None = None,
    ) -> None:
        """See :class:`ExpectingRule`; rules that cannot take it are not told.

        Args:
            steps: Optimizer steps in the next proposal.
            learning_rate: Announced.
            effective_step: Of the last of these steps; None where it is not measured.
            training_loss: Of the last of these steps' batch; None where it is not known.
        """
        self._steps, self._effective_step = steps, effective_step
        if learning_rate is not None:
            before, self._rate = self._rate, learning_rate
            if self.trend is not None and before is not None and learning_rate >= _NEW_LEVEL * before:
                self.trend.restart()  # the measurement will settle on another level: an announced rise is no divergence
        for rule in self._rules:
            if isinstance(rule, ExpectingRule):
                rule.expect(steps=steps, learning_rate=learning_rate, training_loss=training_loss)

    def judge(self, measurement: float, second: float | None = None, norm: float | None = None) -> Judgement:
        """The rule's judgement; a refusal that the second probe does not share is none. Changes no state."""
        first = self.rule.judge(measurement, norm)
        if first.accepted and self.collapse is not None:
            collapsed = self.collapse.judge(self._effective_step)
            if collapsed is not None:
                return replace(first, accepted=False, bound=-math.inf, reason=collapsed, evidence=math.inf)
        if first.accepted or self.second is None or second is None or not math.isfinite(measurement):
            return first
        other = self.second.judge(second, norm)
        if not other.accepted:
            return replace(first, reason=f"{first.reason}; second probe: {other.reason}")
        # The guarantee now holds for the second probe; for the first one nothing is bounded.
        reason = f"not shared by the second probe ({other.reason}); first: {first.reason}"
        return replace(first, accepted=True, bound=math.inf, reason=reason, deep=False)

    def commit(self, measurement: float, second: float | None = None, norm: float | None = None) -> str | None:
        """A proposal stands: learn from it. A one-line reason if the trend alarms."""
        if self.collapse is not None:
            self.collapse.commit(self._effective_step)
        self.rule.commit(measurement, norm)
        if self.second is not None and second is not None:
            self.second.commit(second, norm)
        return None if self.trend is None else self.trend.commit(measurement, self._steps)

    def reject(self, measurement: float, second: float | None = None, norm: float | None = None) -> None:
        """A refusal was carried out: count it."""
        if self.collapse is not None:
            self.collapse.reject(self._effective_step)
        self.rule.reject(measurement, norm)
        if self.second is not None and second is not None:
            self.second.reject(second, norm)

    def anchor(self) -> dict[str, Any] | None:
        """Statistics that belong to the state just committed; None if the rule keeps none."""
        if not self.supports_deep:
            return None
        return {"rules": [rule.anchor() for rule in self._rules if isinstance(rule, DeepRule)]}

    def remember(self) -> dict[str, Any]:
        """Like :meth:`anchor`, for any rule, and without the rule's counting it as one."""
        kept = [
            copy.deepcopy(rule).anchor() if isinstance(rule, DeepRule) else rule.state_dict() for rule in self._rules
        ]
        return {"rules": kept}

    def deep(self, anchor: Mapping[str, Any] | None) -> None:
        """An older state was restored: what was kept with it (:meth:`anchor`, :meth:`remember`) holds again."""
        for rule, kept in zip(self._rules, [] if anchor is None else anchor["rules"], strict=False):
            if isinstance(rule, DeepRule):
                rule.deep(kept)
            else:
                rule.load_state_dict(kept)
        if self.trend is not None:
            self.trend.restart()

    def rebase(self, measurement: float, second: float | None = None) -> bool:
        """The standing state measures something else now. Whether the rule could follow."""
        followed = False
        for rule, value in zip(self._rules, (measurement, second), strict=False):
            if value is not None and isinstance(rule, RebasingRule):
                rule.rebase(value)
                followed = True
        if self.trend is not None:
            self.trend.restart()
        return followed

    def settings(self) -> dict[str, Any]:
        """How everything was built, for comparison over ranks."""
        trend = None if self.trend is None else settings_of(self.trend)
        return {"rule": settings_of(self.rule), "second opinion": self.second is not None, "trend": trend}

    def state_dict(self) -> dict[str, Any]:
        """The memory of all parts; JSON-able."""
        return {
            "rule": self.rule.state_dict(),
            "second": None if self.second is None else self.second.state_dict(),
            "trend": None if self.trend is None else self.trend.state_dict(),
            "collapse": None if self.collapse is None else self.collapse.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned.

        Raises:
            ValueError: The checkpoint has other parts than this controller.
        """
        parts = (("second", self.second), ("trend", self.trend), ("collapse", self.collapse))
        for name, part in parts:
            if (state[name] is None) != (part is None):
                has, lacks = ("", "no ") if part is None else ("no ", "")
                raise ValueError(
                    f"{name}: the checkpoint has {has}state of it, and this controller has {lacks}such part"
                )
        self.rule.load_state_dict(state["rule"])
        for name, part in parts:
            if part is not None:
                part.load_state_dict(state[name])
