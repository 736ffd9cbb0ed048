"""The edge of stability beside a training loop: the state machine, and the margin measured when it asks for it.

Three levels. Level 0 are signals that a controller logs anyway (``DirectionalRatio``, ``UpdateRms``, the free ones).
Level 1 is one Hessian-vector product every 50 steps (three after a change of the learning rate or an alarm). Level 2,
both ends of the spectrum, is on demand: at the start, after a rollback, or by hand.

This module changes nothing in a run. What an assessment's rung leads to is decided by the controller that is given the
monitor (``StabilityController(edge=...)``), which then calls :meth:`EdgeOfStabilityMonitor.after_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..signals import DirectionalRatio, Signal, UpdateRms
from .curvature import LossFn
from .edge import EdgeAssessment, EdgeOfStability, EdgeReading, EdgeSettings
from .sharpness import Ends, Sharpness, SharpnessReading

FIRST = 20
"""Products of the first measurement."""

RATIO_EVERY = 20
"""Steps between two directional ratios, by default: a forward each where the loop gives the loss."""

MOMENTS_EVERY = 10
"""Steps between two looks at the second moments: the gradient norm, which is free, sees a spike at every step."""


class EdgeOfStabilityMonitor:
    """Feeds a state machine. Call :meth:`after_step` on every rank, at a step boundary, after every step.

    Attributes:
        machine: The state machine.
        sharpness: What measures the margin; None leaves that to rho alone.
        signals: What a controller is to read for it, beside what is free.
        last: The last reading of the margin.
        margin: That of the last step, if it was measured there.
    """

    def __init__(
        self,
        sharpness: Sharpness | None = None,
        settings: EdgeSettings | None = None,
        signals: Sequence[Signal] = (),
    ) -> None:
        """Take what measures; see :meth:`of` for the usual.

        Args:
            sharpness: Scaled, on batches that are large enough to stand for the loss.
            settings: The thresholds.
            signals: For level 0.

        Raises:
            ValueError: The sharpness is not scaled: it has no margin.
        """
        if sharpness is not None and not sharpness.scaled:
            raise ValueError(
                "EdgeOfStabilityMonitor sharpness: expected Sharpness(..., scaled=True), which has a margin"
            )
        self.sharpness, self.machine, self.signals = sharpness, EdgeOfStability(settings), tuple(signals)
        self.last: SharpnessReading | None = None
        self.margin: float | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        loss_fn: LossFn,
        batches: Iterable[Any],
        current: Callable[[], Any],
        *,
        settings: EdgeSettings | None = None,
        ratio_every: int = RATIO_EVERY,
        reuse_loss: bool = False,
        relative_step: float | None = None,
    ) -> EdgeOfStabilityMonitor:
        """The usual monitor: margin, directional ratio, and the size of gradients against Adam's second moment.

        Args:
            model: As the loop calls it, wrappers included.
            optimizer: SGD, Adam or AdamW, or several of them.
            loss_fn: ``loss_fn(model, batch)``, the training loss, a 0-d tensor with a graph.
            batches: For the margin, of this rank's data replica. The cost is in proportion to them.
            current: Gives the batch (of this rank) whose gradients the present step is made of.
            settings: The thresholds.
            ratio_every: Steps between two ratios.
            reuse_loss: See :class:`DirectionalRatio`: the loop gives ``step(loss=...)``.
            relative_step: See :class:`Sharpness`.
        """
        ratio = DirectionalRatio(model, loss_fn, current, every=ratio_every, reuse_loss=reuse_loss)
        sharpness = Sharpness(model, optimizer, loss_fn, batches, relative_step=relative_step)
        return cls(sharpness, settings, (ratio, UpdateRms(every=MOMENTS_EVERY)))

    def after_step(
        self, step: int, values: Mapping[str, float], *, refused: bool = False, finite: bool = True
    ) -> EdgeAssessment:
        """Take in a step.

        Args:
            step: Its index.
            values: Named numbers of the signals, the same on every rank.
            refused: The probe's innovation was above its bar; the margin is not measured then.
            finite: Everything was finite, on every rank.

        Collectives: those of :meth:`Sharpness.measure` when the margin is due, the same on every rank.
        """
        margin = None
        ready = finite and not refused
        if self.sharpness is not None and ready and (products := self.machine.products_due(step)):
            # From a random direction three products would see next to nothing.
            self.last = self.sharpness.measure(FIRST if self.last is None else products)
            margin = self.last.margin
        self.margin = margin
        return self.machine.observe(EdgeReading.of(step, values, margin=margin, refused=refused, finite=finite))

    def ends(self, steps: int = 20) -> Ends | None:
        """Level 2; None without a sharpness. Collectives: see :meth:`Sharpness.ends`."""
        return None if self.sharpness is None else self.sharpness.ends(steps)

    def describe(self) -> dict[str, Any]:
        """What must be equal on all ranks; JSON-able. The signals are compared as such."""
        return {"margin": self.sharpness is not None, **asdict(self.machine.settings)}

    def state_dict(self) -> dict[str, Any]:
        """The machine's state; the direction is found anew after a restart."""
        return self.machine.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self.machine.load_state_dict(state)
