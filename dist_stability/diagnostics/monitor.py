"""The edge of stability beside a training loop: the state machine, and the margin measured when it asks for it.

Three levels. Level 0 are signals that a controller logs anyway (``DirectionalRatio``, ``UpdateRms``, the free ones).
Level 1 is one Hessian-vector product every 50 steps (three after a change of the learning rate or an alarm). Level 2,
both ends of the spectrum, is on demand: at the start, after a rollback, or by hand.

This module changes nothing in a run. What an assessment's rung leads to is the controller's decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .edge import EdgeAssessment, EdgeOfStability, EdgeReading, EdgeSettings
from .sharpness import Ends, Sharpness, SharpnessReading

FIRST = 20
"""Products of the first measurement."""


class EdgeOfStabilityMonitor:
    """Feeds a state machine. Call :meth:`after_step` on every rank, at a step boundary, after every step.

    Attributes:
        machine: The state machine.
        sharpness: What measures the margin; None leaves that to rho alone.
        last: The last reading of it.
    """

    def __init__(self, sharpness: Sharpness | None = None, settings: EdgeSettings | None = None) -> None:
        """Take a scaled :class:`Sharpness`, whose batches are large enough to stand for the loss, and the thresholds.

        Raises:
            ValueError: The sharpness is not scaled: it has no margin.
        """
        if sharpness is not None and not sharpness.scaled:
            raise ValueError(
                "EdgeOfStabilityMonitor sharpness: expected Sharpness(..., scaled=True), which has a margin"
            )
        self.sharpness, self.machine = sharpness, EdgeOfStability(settings)
        self.last: SharpnessReading | None = None

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
        margin = None
        if self.sharpness is not None and finite and (products := self.machine.products_due(step)):
            # From a random direction three products would see next to nothing.
            self.last = self.sharpness.measure(FIRST if self.last is None else products)
            margin = self.last.margin
        return self.machine.observe(EdgeReading.of(step, values, margin=margin, refused=refused, finite=finite))

    def ends(self, steps: int = 20) -> Ends | None:
        """Level 2; None without a sharpness. Collectives: see :meth:`Sharpness.ends`."""
        return None if self.sharpness is None else self.sharpness.ends(steps)

    def state_dict(self) -> dict[str, Any]:
        """The machine's state; the direction is found anew after a restart."""
        return self.machine.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self.machine.load_state_dict(state)
