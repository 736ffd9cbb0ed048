"""The ladder: what to do about a refusal, and when to stop trying. A pure state machine, kept in checkpoints.

A refusal undoes one step. What follows depends on why steps are refused, which only shows when refusals repeat:

    skip            the batch is dropped; nearly every fault ends here
    attenuate       the direction may be right and its length wrong: try theta_safe + lambda (proposal - theta_safe)
    cut_lr          shortened steps did pass, several in a row: the learning rate is cut for a while, then ramped back
    deep_rollback   the committed state may be what is wrong: back to an older slot of the ring
    reload          nothing in memory helps: the last persisted state
    stop            with a report of what was tried and which pattern it fits

A refusal that the gradient explains (a veto, an outlying norm), an exception or a drifted replica is *loud*: skipping
is the answer as long as it lasts. A *quiet* one, which only the probe sees, is a statement about the step itself, so
only quiet refusals lead to shorter steps and smaller learning rates. Whether shorter steps pass decides about the
learning rate: if even 1/32 of a proposal does harm, its direction is wrong, and no learning rate would help.

Nothing here is ever rolled back, or nothing would ever escalate. Every rung has a budget, so whatever the verdicts are,
the ladder ends: it never goes up for ever, and never twice for the same attempt. Every rank feeds it the same agreed
facts and gets the same answers; it enters no collective.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

_REMEMBERED = 64  # refusals kept for the report
_CALM = 32  # accepted attempts in a row that end an episode
_SHORTENED_IN_A_ROW = 4  # attenuated steps, refusals between them aside, that speak against the learning rate
_CUT_GAP = 8  # attempts before the next cut: the last one must have had a chance


class Rung(StrEnum):
    """What was done about a refusal."""

    SKIP = "skip"
    ATTENUATE = "attenuate"
    CUT_LR = "cut_lr"
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
        signal: What refused it: "probe", "gradient", "error", "replica", "trend".
        reason: One line for people.
        measurement: The probe's value, or None.
        evidence: Gradient evidence of the rule's judgement, in scales.
        finite: Measurement and gradient norm were finite as far as they are known.
        wants_deep: The rule asks for an older state.
        alone: The proposal was this attempt's alone; no unjudged steps are in it.
        anchors: Older states that could be restored.
        can_reload: The controller was given a way to load a persisted state.
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


class Ladder:
    """Counts, budgets and the learning rate cut.

    Lifecycle: for every attempt exactly one of :meth:`accepted`, :meth:`refused`, or neither (a loss-scale overflow).
    After a response ATTENUATE :meth:`shortened` says whether a shorter step was committed; the attempt is then settled.

    Args:
        settings: See :class:`Escalation`.

    Attributes:
        in_a_row: Refusals since the last accepted attempt.
        total: Refusals of the whole run.
        stopped: A STOP was given; every later answer is STOP.
    """

    def __init__(self, settings: Escalation | None = None) -> None:
        """Start with nothing spent."""
        self.settings = Escalation() if settings is None else settings
        self.in_a_row = 0
        self.total = 0
        self.stopped = False
        self._quiet = 0  # quiet refusals in a row
        self._accepted_in_row = 0
        self._shortened = 0  # attenuated steps without a step of full length between them
        self._wait = 0  # quiet refusals to pass before shorter steps are tried again
        self._fruitless = 0  # tries of shorter steps that committed none, in a row
        self._level = 1.0  # of the last cut
        self._since_cut = 0  # accepted steps
        self._last_cut = -1  # attempt
        self._reloads = 0
        self._alarms = 0
        self._went_back = False  # a deep rollback, a cut or a reload was tried in this episode
        self._recent: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED)
        self._refusals: deque[int] = deque()  # attempts, within the window
        self._cuts: deque[int] = deque()
        self._deeps: deque[int] = deque()
        self._episode: Counter[str] = Counter()  # rungs and kinds of this episode
        self._batches: Counter[int] = Counter()  # how often a batch was refused, of those remembered
        self._order: deque[int] = deque()

    @property
    def learning_rate_factor(self) -> float:
        """What the learning rate is multiplied by for the next step; 1.0 while no cut is in force."""
        if self._level == 1.0:
            return 1.0
        ramped = self._since_cut - self.settings.cut_steps
        if ramped <= 0:
            return self._level
        return self._level + (1.0 - self._level) * min(1.0, ramped / self.settings.ramp_steps)

    @property
    def episode_open(self) -> bool:
        """There were refusals, and it is not yet clear that they are over."""
        return bool(self._episode)

    def accepted(self, attempt: int, *, alarm: bool | None = None) -> Pattern | None:
        """An attempt stands, in its full length.

        Args:
            attempt: Its index.
            alarm: The committed measurements diverge slowly; None if this attempt was not measured.

        Returns:
            The pattern of an episode that ends with this attempt, else None.
        """
        self._forget(attempt)
        if alarm is not None:
            self._alarms = self._alarms + 1 if alarm else 0
        self._shortened = 0
        return self._step_stands()

    def overdue(self) -> str | None:
        """Why the next proposal must be refused whatever the rule says, or None: slow divergence was only warned of."""
        after = self.settings.trend_after
        if not after or self._alarms < after:
            return None
        return f"slow divergence, warned of for {self._alarms} commits in a row"

    def refused(self, refusal: Refusal) -> Response:
        """An attempt is refused: what to do about it."""
        self._forget(refusal.attempt)
        self.in_a_row += 1
        self.total += 1
        self._accepted_in_row = 0
        self._quiet = self._quiet + 1 if refusal.quiet else 0
        self._refusals.append(refusal.attempt)
        self._remember(refusal)
        rung, deep = self._choose(refusal)
        if deep:
            self._deeps.append(refusal.attempt)
        if rung is Rung.CUT_LR:
            self._cut(refusal.attempt)
        if rung is Rung.RELOAD:
            self._reloads += 1
        if rung is Rung.RELOAD or deep:
            self._alarms = 0
        pattern = self.pattern
        self._went_back = self._went_back or deep or rung in (Rung.CUT_LR, Rung.RELOAD)
        self._episode[rung] += 1
        self._recent[-1]["rung"] = str(rung)
        self.stopped = self.stopped or rung is Rung.STOP
        return Response(rung, deep, pattern)

    def shortened(self, committed: bool) -> None:
        """What became of a response ATTENUATE: a shorter step was committed, or none did no harm."""
        if not committed:
            self._fruitless += 1
            self._wait = 2 ** min(self._fruitless, 6) - 1
            return
        self._fruitless = self._wait = 0
        self._shortened += 1
        self._step_stands()

    @property
    def pattern(self) -> Pattern:
        """What the refusals of this episode look like."""
        refusals = self._episode["refusals"]
        if 2 * self._episode["not finite"] > refusals:
            return Pattern.NUMERICS
        if self._episode["known batch"] and 2 * self._episode["known batch"] >= refusals:
            return Pattern.DATA
        if self.stopped or (self._went_back and self._episode["after going back"]):
            return Pattern.STRUCTURAL
        if self.in_a_row >= self.settings.max_refusals_in_row or self._window_spent():
            return Pattern.STRUCTURAL
        return Pattern.TRANSIENT

    def report(self) -> dict[str, Any]:
        """What was tried and what it looked like; JSON-able."""
        rungs = {str(rung): self._episode[rung] for rung in Rung if self._episode[rung]}
        pattern = self.pattern
        return {
            "pattern": str(pattern),
            "advice": ADVICE[pattern],
            "refusals_in_a_row": self.in_a_row,
            "refusals_in_window": len(self._refusals),
            "total": self.total,
            "tried": rungs,
            "signals": dict(Counter(entry["signal"] for entry in self._recent)),
            "learning_rate_factor": self.learning_rate_factor,
            "last": [*self._recent],
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON-able and exact."""
        return {
            **{name: getattr(self, f"_{name}") for name in _NUMBERS},
            "in_a_row": self.in_a_row,
            "total": self.total,
            "stopped": self.stopped,
            "recent": [dict(entry) for entry in self._recent],
            "refusals": [*self._refusals],
            "cuts": [*self._cuts],
            "deeps": [*self._deeps],
            "episode": {str(key): count for key, count in self._episode.items()},
            "batches": [*self._order],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept.

        The settings stay: a resumed run may be given others. One that had stopped may try again, with a new budget of
        refusals; what was spent on cuts, deep rollbacks and reloads stays spent.

        Raises:
            TypeError: The state is not a mapping.
            ValueError: It was not made by this class; nothing was changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"Ladder.load_state_dict expects a dictionary, got {type(state).__name__}")
        if set(state) != set(self.state_dict()):
            missing, unknown = sorted({*self.state_dict()} - {*state}), sorted({*state} - {*self.state_dict()})
            raise ValueError(
                f"Ladder.load_state_dict: missing keys {missing}, unknown keys {unknown}; was it saved by this version?"
            )
        for name in _NUMBERS:
            setattr(self, f"_{name}", state[name])
        self.in_a_row, self.total, self.stopped = int(state["in_a_row"]), int(state["total"]), False
        self._recent = deque((dict(entry) for entry in state["recent"]), maxlen=_REMEMBERED)
        self._refusals, self._cuts, self._deeps = (deque(state[name]) for name in ("refusals", "cuts", "deeps"))
        self._episode = Counter(state["episode"])
        self._order = deque(state["batches"])
        self._batches = Counter(self._order)
        if state["stopped"]:
            self.in_a_row = self._quiet = 0
            self._refusals.clear()

    # ------------------------------------------------------------------ choosing

    def _choose(self, refusal: Refusal) -> tuple[Rung, bool]:
        """The rung, and whether an older state is restored."""
        settings = self.settings
        if self.stopped or self.in_a_row >= settings.max_refusals_in_row or self._window_spent():
            return Rung.STOP, False
        may_go_back = refusal.anchors > 0 and len(self._deeps) < settings.max_deep
        if refusal.signal == "trend" or (refusal.quiet and self.overdue() is not None):
            self._alarms = 0
            if self._may_cut(refusal.attempt):
                return Rung.CUT_LR, may_go_back
            return (Rung.DEEP_ROLLBACK, True) if may_go_back else (Rung.SKIP, False)
        if settings.reload_after and self.in_a_row >= settings.reload_after and refusal.can_reload:
            # One reload per so many refusals in a row: the state it brings back must have had a chance.
            due = self.in_a_row % settings.reload_after == 0
            if due and self._reloads < settings.max_reloads:
                return Rung.RELOAD, False
        asked = refusal.wants_deep or (settings.deep_after and self.in_a_row >= settings.deep_after)
        if asked and may_go_back:
            return Rung.DEEP_ROLLBACK, True
        if self._shortened >= _SHORTENED_IN_A_ROW and self._may_cut(refusal.attempt):
            return Rung.CUT_LR, False
        # Where a shorter step has just passed, the next refusal need not wait for it.
        patience = 1 if self._shortened else settings.attenuate_after
        if refusal.quiet and refusal.alone and settings.attenuate_after and self._quiet >= patience:
            if self._wait == 0:
                return Rung.ATTENUATE, False
            self._wait -= 1
        return Rung.SKIP, False

    def _may_cut(self, attempt: int) -> bool:
        spent = len(self._cuts) >= self.settings.max_cuts
        return not spent and (self._last_cut < 0 or attempt - self._last_cut > _CUT_GAP)

    def _cut(self, attempt: int) -> None:
        self._level = self.learning_rate_factor * self.settings.cut_factor
        self._since_cut = 0
        self._last_cut = attempt
        self._cuts.append(attempt)
        self._shortened = 0

    def _window_spent(self) -> bool:
        return len(self._refusals) >= self.settings.max_refusals_in_window

    # ------------------------------------------------------------------ remembering

    def _step_stands(self) -> Pattern | None:
        self.in_a_row = self._quiet = 0
        self._accepted_in_row += 1
        self._since_cut += 1
        if self.learning_rate_factor == 1.0:
            self._level = 1.0
        if self._accepted_in_row < _CALM or not self._episode:
            return None
        ended = self.pattern
        self._episode.clear()
        self._went_back = False
        self._fruitless = self._wait = 0
        return ended

    def _forget(self, attempt: int) -> None:
        """Drop what has left the window."""
        for past in (self._refusals, self._cuts, self._deeps):
            while past and past[0] <= attempt - self.settings.window:
                past.popleft()

    def _remember(self, refusal: Refusal) -> None:
        self._episode["refusals"] += 1
        self._episode["not finite"] += not refusal.finite
        self._episode["after going back"] += self._went_back
        if refusal.batch is not None:
            self._episode["known batch"] += self._batches[refusal.batch] > 0
            self._batches[refusal.batch] += 1
            self._order.append(refusal.batch)
            if len(self._order) > 16 * _REMEMBERED:
                oldest = self._order.popleft()
                self._batches[oldest] -= 1
        self._recent.append(
            {
                "attempt": refusal.attempt,
                "signal": refusal.signal,
                "measurement": refusal.measurement,
                "reason": refusal.reason,
            }
        )


_NUMBERS = (
    "quiet",
    "accepted_in_row",
    "shortened",
    "wait",
    "fruitless",
    "level",
    "since_cut",
    "last_cut",
    "reloads",
    "alarms",
    "went_back",
)
