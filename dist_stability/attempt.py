"""What is known about one attempt while it runs; plain data shared by the parts of the guarded step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .signals import Gradients, SignalValues, StepContext, verdict_values
from .snapshot import Digests, Slot, StatePlan
from .verdict import Action, Judgement, Verdict
from .vote import Ballot
from .watch import Watch

PhaseListener = Callable[[int, str], None]

OUTSIDE = ("step", "capture")
"""Parts of an attempt's time that pass while the guard does not have control: the optimizers', and in a forward."""


@dataclass(slots=True)
class Attempt:
    """One call of ``step()``, from its entry to its verdict.

    Attributes:
        index: From 0.
        judged: The proposal will be probed.
        gradients: This rank's, before the step.
        agree: Numbers that must be equal on all ranks in every vote of this attempt.
        scaler: GradScaler of this step, or None.
        error: Raised on this rank by a guard.
        step_error: Raised on this rank by an optimizer.
        flag: Some guard's "no", on the device; agreed once there was a vote on it.
        reason: What a guard that judges the norm said.
        pre_vote: The vote before the step, reduced but perhaps not read yet.
        vetoed: None while only the device knows.
        plan: Fits the proposal; the ranks re-make it together when state appears or vanishes.
        digests: Of the proposal under that plan, if the replicas are compared.
        norm: Global gradient norm before clipping, once the host knows it.
        overflow_flags: This rank's found_inf of each optimizer, with a scaler.
        overflow: Agreed: the scaled gradients of every optimizer overflowed.
        learning_rate: Largest announced learning rate of this step, None if nobody vouches for one.
        rate_factor: What the ladder multiplies the learning rates of this step by.
        context: What the signals look at, if they are read at this attempt.
        signals: What they measured, once all ranks know it; at an unjudged attempt, what this host knows anyway.
        signal_errors: What signals of this rank raised, by name.
        provisional: Its vote is under way, and it stands until that is read (deferred verdict).
        edge: What the monitor of the edge of stability says of it; None without one, or at an unjudged attempt.
        seconds: Host time by part.
        held: Host time between the moments at which the guard took over and gave back, up to the last of the latter.
        since: When it took over; None while it does not have control.
    """

    index: int
    judged: bool
    gradients: Gradients
    agree: dict[str, int | torch.Tensor]
    scaler: Any = None
    error: BaseException | None = None
    step_error: BaseException | None = None
    flag: torch.Tensor | bool = False
    reason: str | None = None
    pre_vote: tuple[torch.Tensor, Ballot] | None = None
    vetoed: bool | None = None
    plan: StatePlan | None = None
    digests: Digests | None = None
    norm: float | None = None
    overflow_flags: list[torch.Tensor] = field(default_factory=list)
    overflow: bool = False
    learning_rate: float | None = None
    rate_factor: float = 1.0
    context: StepContext | None = None
    signals: SignalValues = field(default_factory=SignalValues)
    signal_errors: dict[str, Exception] = field(default_factory=dict)
    provisional: bool = False
    edge: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    held: float = 0.0
    since: float | None = None

    def take_over(self) -> None:
        """From here on the host works for the guard."""
        self.since = time.perf_counter()

    def give_back(self) -> None:
        """From here on it works for the loop, or for an optimizer."""
        if self.since is not None:
            self.held, self.since = self.held + time.perf_counter() - self.since, None

    def parts(self) -> dict[str, float]:
        """Host time by part so far, and under ``other`` what the guard took beside its parts."""
        now = 0.0 if self.since is None else time.perf_counter() - self.since
        known = sum(seconds for name, seconds in self.seconds.items() if name not in OUTSIDE)
        return {**self.seconds, "other": max(0.0, self.held + now - known)}

    def defer(self) -> None:
        """The verdict is read later: let go of the gradients, which will be others by then."""
        self.provisional = True
        self.context = None
        self.gradients.forget()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the host time of the block to ``seconds[name]``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@dataclass(frozen=True, slots=True)
class Decision:
    """What the ranks agreed to do, before it is done.

    Attributes:
        fatal: Every rank's optimizer raised this.
        back_to: The older state to restore; None leaves the choice to the settlement.
    """

    action: Action
    signal: str = ""
    reason: str = ""
    rank: int = 0
    judgement: Judgement | None = None
    measurement: float | None = None
    confirmation: float | None = None
    fatal: BaseException | None = None
    back_to: Slot | None = None


def event_of(attempt: Attempt, verdict: Verdict, decision: Decision, steps: int) -> dict[str, Any]:
    """What listeners are told of one verdict: a flat dict of numbers and strings (see docs/guarded-step.md).

    Args:
        attempt: The attempt.
        verdict: What was done.
        decision: What was decided.
        steps: Accepted optimizer steps so far.
    """
    prediction = None
    if verdict.measurement is not None and verdict.innovation is not None:
        prediction = verdict.measurement - verdict.innovation
    return {
        "step": steps,
        "attempt": verdict.step,
        "rank": decision.rank,
        "signal": verdict.signal,
        "measurement": verdict.measurement,
        "innovation": verdict.innovation,
        "bound": verdict.bound,
        "prediction": prediction,
        "gradient_norm": attempt.norm,
        "learning_rate_factor": attempt.rate_factor,
        "action": str(verdict.action),
        "would": None if verdict.would is None else str(verdict.would),
        "undone": list(verdict.undone),
        "final": verdict.final,
        "reason": verdict.reason,
        "rung": verdict.rung,
        "pattern": verdict.pattern,
        "warning": verdict.warning,
        "signals": {
            **attempt.signals.values,
            **verdict_values(verdict.innovation, verdict.bound, attempt.norm),
        },
        "where": dict(attempt.signals.where),
        "signal_errors": {name: one_line(error) for name, error in attempt.signal_errors.items()},
        "edge": attempt.edge,
        "seconds": attempt.parts(),
    }


class Phases:
    """Says where this rank is: to the watch, for its peers, and to listeners (fault injection, tracing)."""

    def __init__(self, watch: Watch | None) -> None:
        """Nobody listens yet."""
        self.watch = watch
        self.attempt = 0
        self.listeners: list[PhaseListener] = []

    def enter(self, phase: str) -> None:
        """This rank reaches ``phase`` of the current attempt."""
        if self.watch is not None:
            self.watch.enter(self.attempt, phase)
        for listener in self.listeners:
            listener(self.attempt, phase)

    def chunk(self, phase: str) -> Callable[[], None]:
        """A callback for code that works in chunks: one more chunk of ``phase`` is done.

        A copy may go on beside the next attempt, and in another thread: its chunks belong to the attempt of this call.
        """
        attempt = self.attempt

        def tell() -> None:
            for listener in self.listeners:
                listener(attempt, phase)

        return tell


def one_line(error: BaseException | None) -> str | None:
    """An exception as one line for messages and events; None for none."""
    if error is None:
        return None
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
