"""What the ladder is told, what it answers, and its settings: plain data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum


class Rung(StrEnum):
    """What was done about a refusal."""

    SKIP = "skip"
    ATTENUATE = "attenuate"
    CUT_LR = "cut_lr"
    SHAPE = "shape"
    DEEP_ROLLBACK = "deep_rollback"
    RELOAD = "reload"
    STOP = "stop"


class Pattern(StrEnum):
    """What the refusals so far look like."""

    TRANSIENT = "transient"
    DATA = "data"
    STRUCTURAL = "structural"
    NUMERICS = "numerics"


ADVICE = {
    Pattern.TRANSIENT: "It did not recur: nothing to do.",
    Pattern.DATA: "It recurs with the same batch: look at that batch, filter it, or lower its weight.",
    Pattern.STRUCTURAL: (
        "It recurs with every batch, also after going back: rollback cannot cure this. Known to help: a lower learning "
        "rate or a longer warm-up, QK-norm, norm layers on every residual branch, z-loss, a larger Adam epsilon or "
        "smaller beta2, embedding norm; or restart from an older checkpoint with one of them."
    ),
    Pattern.NUMERICS: (
        "Values are not finite: look for overflow in the tensor named, use bfloat16 or float32 there, raise Adam's "
        "epsilon, check the loss for log(0) and division by zero, and the device for faults."
    ),
}


@dataclass(frozen=True, slots=True)
class Escalation:
    """When each rung is taken, and how often. Counts are attempts unless said otherwise; 0 leaves a rung out.

    Attributes:
        attenuate_after: Quiet refusals in a row from which on shorter steps are tried.
        halvings: Shorter steps tried for one proposal: lambda = 1/2, 1/4, ... (per step; each costs one probe).
        max_cuts: Cuts of the learning rate per window.
        cut_factor: What a cut multiplies the learning rate by.
        cut_steps: Accepted steps at the cut learning rate.
        ramp_steps: Accepted steps over which it then returns, linearly.
        shape_after: Refusals of an episode by the probe from which on spectral shaping is switched on, if the
            controller was given it and its preflight said that the risk is high. Once in a run, and for good.
        trend_after: Commits in a row with an alarm of slow divergence before it is acted on.
        deep_after: Refusals in a row after which an older state is restored, asked for by the rule or not.
        max_deep: Deep rollbacks per window, those that the rule asks for included.
        reload_after: Refusals in a row after which the last persisted state is loaded, if the controller has one.
        max_reloads: Reloads in the whole run.
        max_refusals_in_row: Refusals without an accepted step between them after which the run stops.
        max_refusals_in_window: Refusals within the last ``window`` attempts after which the run stops.
        window: Length of that window.
    """

    attenuate_after: int = 4
    halvings: int = 5
    max_cuts: int = 4
    cut_factor: float = 0.25
    cut_steps: int = 64
    ramp_steps: int = 64
    shape_after: int = 8
    trend_after: int = 16
    deep_after: int = 64
    max_deep: int = 8
    reload_after: int = 128
    max_reloads: int = 2
    max_refusals_in_row: int = 256
    max_refusals_in_window: int = 384
    window: int = 1024

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            TypeError: A setting has the wrong type.
            ValueError: A setting is out of range.
        """
        least_one = ("halvings", "max_refusals_in_row", "max_refusals_in_window", "window", "ramp_steps")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "cut_factor":
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise TypeError(f"Escalation {field.name}: expected a number, got {value!r}")
                if not 0 < value < 1:
                    raise ValueError(f"Escalation {field.name}: expected 0 < factor < 1, got {value!r}")
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Escalation {field.name}: expected a whole number, got {value!r}")
            least = 1 if field.name in least_one else 0
            if value < least:
                raise ValueError(f"Escalation {field.name}: expected at least {least}, got {value}")
        if self.max_refusals_in_window > self.window:
            raise ValueError(
                f"Escalation max_refusals_in_window: expected at most window={self.window}, got "
                f"{self.max_refusals_in_window}; it could never be reached"
            )


@dataclass(frozen=True, slots=True)
class Refusal:
    """One refused attempt, in agreed facts.

    Attributes:
        attempt: Its index.
        signal: What refused it: "probe", "gradient", "error", "replica", "trend", "edge".
        reason: One line for people.
        measurement: The probe's value, or None.
        evidence: Gradient evidence of the rule's judgement, in scales.
        finite: Measurement and gradient norm were finite as far as they are known.
        wants_deep: The rule asks for an older state.
        alone: The proposal was this attempt's alone; no unjudged steps are in it.
        anchors: Older states that could be restored.
        can_reload: The controller was given a way to load a persisted state.
        can_shape: The controller was given spectral shaping.
        batch: Content digest of its batch, or None where batches are not known.
    """

    attempt: int
    signal: str
    reason: str = ""
    measurement: float | None = None
    evidence: float = 0.0
    finite: bool = True
    wants_deep: bool = False
    alone: bool = True
    anchors: int = 0
    can_reload: bool = False
    can_shape: bool = False
    batch: int | None = None

    @property
    def quiet(self) -> bool:
        """Only the probe speaks against the step."""
        return self.signal == "probe" and self.finite and self.evidence == 0.0


@dataclass(frozen=True, slots=True)
class Response:
    """What to do about a refusal.

    Attributes:
        rung: The highest rung taken.
        deep: Restore an older state before anything else (DEEP_ROLLBACK, and CUT_LR after a trend).
        pattern: What the refusals look like so far.
    """

    rung: Rung
    deep: bool
    pattern: Pattern
