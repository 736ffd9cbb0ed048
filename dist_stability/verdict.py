"""Plain data passed between the parts: what a rule thinks, and what the job did."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """The agreed outcome of one attempt (one call of ``step()``)."""

    COMMIT = "commit"
    UNJUDGED = "unjudged"
    VETO = "veto"
    ROLLBACK = "rollback"
    DEEP_ROLLBACK = "deep_rollback"
    ATTENUATE = "attenuate"
    RELOAD = "reload"
    SCALER_SKIP = "scaler_skip"

    @property
    def accepted(self) -> bool:
        """Whether the proposal stands, if only as a part of its length."""
        return self in (Action.COMMIT, Action.UNJUDGED, Action.ATTENUATE)

    @property
    def refused(self) -> bool:
        """Whether a proposal was turned down. A loss-scale overflow is neither accepted nor refused."""
        return self in (Action.VETO, Action.ROLLBACK, Action.DEEP_ROLLBACK, Action.RELOAD)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a rule says about one measurement.

    Attributes:
        accepted: The measurement may be committed.
        innovation: Measurement minus the value predicted from committed history; NaN before there is any.
        bound: Largest innovation that would have been accepted; +inf while only finiteness is checked.
        reason: One line for people.
        deep: The rule asks for the older anchor instead of the last committed state (only when refusing).
        evidence: How far the gradient norm alone speaks against the step, in scales; 0 for not at all, +inf for a norm
            that is no number.
    """

    accepted: bool
    innovation: float
    bound: float
    reason: str
    deep: bool = False
    evidence: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the whole job did with one attempt; equal on every rank.

    Attributes:
        action: The outcome.
        step: Attempt index, from 0, one for each call of ``step()``.
        undone: Earlier attempts, accepted then, that this verdict took back.
        final: False only for a provisional verdict (deferred decision).
        would: In observe mode, what would have been done; None in enforce mode.
        signal: What decided: "probe", "gradient", "trend", "error", "replica", "scaler", or "" when nothing was judged.
        measurement: The probe's value; None when it was not measured.
        innovation: See :class:`Judgement`; None when nothing was judged.
        bound: See :class:`Judgement`; None when nothing was judged.
        reason: One line for people.
        rung: How far up the ladder a refusal led: "skip", "attenuate", "cut_lr", "shape", "deep_rollback", "reload",
            "stop"; "" when nothing was refused.
        pattern: What the refusals so far look like: "transient", "data", "structural", "numerics"; also given by the
            accepted attempt that ends an episode; else "".
        warning: What slow divergence was noticed in the committed measurements; "" for none.
    """

    action: Action
    step: int
    undone: tuple[int, ...] = ()
    final: bool = True
    would: Action | None = None
    signal: str = ""
    measurement: float | None = None
    innovation: float | None = None
    bound: float | None = None
    reason: str = ""
    rung: str = ""
    pattern: str = ""
    warning: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the proposal stands: step the scheduler, log the loss."""
        return self.action.accepted
