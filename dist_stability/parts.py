"""What one controller is made of, for the objects that work with most of it; and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from .attempt import Phases, one_line
from .cadence import Cadence
from .diagnostics.kss import SpectralShaping
from .diagnostics.monitor import EdgeOfStabilityMonitor
from .errors import LockstepError
from .escalation import Ladder
from .guards import Guard
from .hooks import FirstForward
from .learning_rate import RateCut
from .ledger import Ledger
from .measuring import Measuring
from .persistence import Persistence
from .recovery import Recovery
from .rules import Guarantees, settings_of
from .rules.panel import Panel
from .signals import Monitor
from .vote import Vote


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one controller; each is described where it is defined.

    Attributes:
        enforced: Refusals are acted on (``mode="enforce"``).
        optimizers: In the order in which they step.
        extra_state: The caller's.
        cadence: Which attempts are judged.
        guards: Look at the gradients.
        measuring: Runs the probes.
        panel: Judges what they measure.
        ladder: Says what follows a refusal.
        guarantees: Checked at every commit and restore.
        monitor: Reads the signals.
        rates: Cuts the learning rate for one step.
        ledger: Counts.
        recovery: Plan, ring and captured state.
        persistence: Keeps slots beyond the process, or None.
        phases: Says where this rank is.
        vote: With the other ranks.
        first_forward: Hears the first training forward of an attempt.
        edge: Says how far the run is from the edge of stability, or None.
        shaping: Spectral shaping of the loss that the ladder may switch on, or None.
    """

    enforced: bool
    optimizers: Sequence[Optimizer]
    extra_state: Mapping[str, Any]
    cadence: Cadence
    guards: Sequence[Guard]
    measuring: Measuring
    panel: Panel
    ladder: Ladder
    guarantees: Guarantees
    monitor: Monitor
    rates: RateCut
    ledger: Ledger
    recovery: Recovery
    persistence: Persistence | None
    phases: Phases
    vote: Vote
    first_forward: FirstForward
    edge: EdgeOfStabilityMonitor | None = None
    shaping: SpectralShaping | None = None

    def settings(self) -> dict[str, Any]:
        """What must be equal on all ranks, by name."""
        probes = [probe.describe() for probe in (self.measuring.probe, self.measuring.confirm) if probe is not None]
        return {
            "every": self.cadence.settings(),
            "escalation": str(self.ladder.settings),
            "persist": [] if self.persistence is None else self.persistence.described(),
            **self.panel.settings(),
            "guards": [settings_of(guard) for guard in self.guards],
            "probe": probes,
            "signals": self.monitor.settings(),
            "edge": None if self.edge is None else self.edge.describe(),
            "shaping": None if self.shaping is None else f"{self.shaping.settings} for {self.shaping.blocks}",
            "extra_state": sorted(self.extra_state),
            "model and optimizer": self.recovery.plan.signature,
        }

    def state_dict(self) -> dict[str, Any]:
        """Counters, the memory of rule and guards, budgets; JSON-able and exact."""
        return {
            **self.ledger.state_dict(),
            "panel": self.panel.state_dict(),
            "guards": [guard.state_dict() for guard in self.guards],
            "ladder": self.ladder.state_dict(),
            "cadence": self.cadence.state_dict(),
            "signals": self.monitor.state_dict(),
            "guarantees": self.guarantees.state_dict(),
            "edge": None if self.edge is None else self.edge.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: The controller it came from had another number of guards.
        """
        if len(state["guards"]) != len(self.guards):
            raise ValueError(f"guards: the checkpoint has {len(state['guards'])}, this controller {len(self.guards)}")
        self.panel.load_state_dict(state["panel"])
        for guard, saved in zip(self.guards, state["guards"], strict=True):
            guard.load_state_dict(saved)
        self.ladder.load_state_dict(state["ladder"])
        self.cadence.load_state_dict(state["cadence"])
        self.monitor.load_state_dict(state["signals"])
        self.guarantees.load_state_dict(state["guarantees"])
        if self.edge is not None and state.get("edge") is not None:  # a monitor may come and go between runs
            self.edge.load_state_dict(state["edge"])
        self.ledger.load_state_dict(state)
        self.phases.attempt = self.ledger.attempt

    @contextmanager
    def noted(self) -> Iterator[None]:
        """An exception in the block leaves the other ranks a note: see :meth:`note`."""
        try:
            yield
        except Exception as error:
            self.note(error)
            raise

    def note(self, error: Exception) -> None:
        """Tell the other ranks why this one stops: they may be waiting for it inside a collective.

        A LockstepError needs no note: its origin is known to all, or was noted where it was found out.
        """
        if self.phases.watch is not None and not isinstance(error, LockstepError):
            self.phases.watch.fail(self.ledger.attempt, one_line(error) or "")
