"""The edge of stability beside a training loop: the state machine, and the margin measured when it asks for it.

Three levels. Level 0 are signals that a controller logs anyway (``DirectionalRatio``, ``UpdateRms``, the free ones).
Level 1 is one Hessian-vector product every 50 steps (three after a change of the learning rate or an alarm). Level 2,
both ends of the spectrum, is on demand: at the start, after a rollback, or by hand.

This module changes nothing in a run. What an assessment's rung leads to is decided by the controller's ladder: a
:class:`~dist_stability.StabilityController` that is given a monitor calls it after every judged attempt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..signals.base import Signal
from .edge import EdgeAssessment, EdgeOfStability, EdgeReading, EdgeSettings, EdgeState
from .sharpness import Ends, Sharpness, SharpnessReading

FIRST = 20
"""Products of the first measurement."""


class EdgeOfStabilityMonitor:
    """Feeds a state machine. Call :meth:`after_step` on every rank, at a step boundary, after every step.

    Attributes:
        machine: The state machine.
        sharpness: What measures the margin; None leaves that to rho alone.
        signals: What a controller is to measure for it at each judged attempt, beside what is free.
        last: The last reading of the margin.
    """

    def __init__(
        self,
        sharpness: Sharpness | None = None,
        settings: EdgeSettings | None = None,
        signals: Sequence[Signal] = (),
    ) -> None:
        """Take what measures.

        Args:
            sharpness: Scaled, on batches that are large enough to stand for the loss.
            settings: The thresholds.
            signals: Usually a ``DirectionalRatio`` and ``UpdateRms()``.

        Raises:
            ValueError: The sharpness is not scaled: it has no margin.
        """
        if sharpness is not None and not sharpness.scaled:
            raise ValueError(
                "EdgeOfStabilityMonitor sharpness: expected Sharpness(..., scaled=True), which has a margin"
            )
        self.sharpness, self.machine, self.signals = sharpness, EdgeOfStability(settings), tuple(signals)
        self.last: SharpnessReading | None = None
        self._fresh: SharpnessReading | None = None

    def after_step(
        self, step: int, values: Mapping[str, float], *, refused: bool = False, finite: bool = True
    ) -> EdgeAssessment:
        """Take in a step.

        Args:
            step: Its index.
            values: Named numbers of the signals, the same on every rank.
            refused: The probe's innovation was above its bar.
            finite: Everything was finite, on every rank.

        Collectives: those of :meth:`Sharpness.measure` when the margin is due, the same on every rank.
        """
        margin = self._fresh = None
        if self.sharpness is not None and finite and (products := self.machine.products_due(step)):
            # From a random direction three products would see next to nothing.
            self.last = self._fresh = self.sharpness.measure(FIRST if self.last is None else products)
            margin = self.last.margin
        return self.machine.observe(EdgeReading.of(step, values, margin=margin, refused=refused, finite=finite))

    def ends(self, steps: int = 20) -> Ends | None:
        """Level 2; None without a sharpness. Collectives: see :meth:`Sharpness.ends`."""
        return None if self.sharpness is None else self.sharpness.ends(steps)

    @property
    def place(self) -> int:
        """The present state as a number, which ranks can compare."""
        return list(EdgeState).index(self.machine.state)

    def describe(self) -> dict[str, Any]:
        """What must be equal on all ranks; JSON-able."""
        return {"margin": self.sharpness is not None, **asdict(self.machine.settings)}

    def event(self, said: EdgeAssessment) -> dict[str, Any]:
        """An assessment, flat and JSON-able, with the margin if it was measured for it."""
        return {
            "state": str(said.state),
            "margin": None if self._fresh is None else self._fresh.margin,
            "rho": self.machine.rho,
            "rung": None if said.rung is None else str(said.rung),
            "factor": said.factor,
            "reason": said.reason,
        }

    def state_dict(self) -> dict[str, Any]:
        """The machine's state; the direction is found anew after a restart."""
        return self.machine.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self.machine.load_state_dict(state)
