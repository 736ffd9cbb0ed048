"""The ladder: what to do about a refusal, and when to stop trying. A pure state machine, kept in checkpoints.

A refusal undoes one step. What follows depends on why steps are refused, which only shows when refusals repeat:

    skip            the batch is dropped; nearly every fault ends here
    attenuate       the direction may be right and its length wrong: try theta_safe + lambda (proposal - theta_safe)
    cut_lr          shortened steps did pass, several in a row: the learning rate is cut for a while, then ramped back
    shape           the preflight said that the risk is high, and so it is: spectral shaping from here on, if given
    deep_rollback   the committed state may be what is wrong: back to an older slot of the ring
    reload          nothing in memory helps: the last persisted state
    stop            with a report of what was tried and which pattern it fits

A refusal that the gradient explains (a veto, an outlying norm), an exception or a drifted replica is *loud*: skipping
is the answer as long as it lasts. A *quiet* one, which only the probe sees, is a statement about the step itself, so
only quiet refusals lead to shorter steps and smaller learning rates. Whether shorter steps pass decides about the
learning rate: if even 1/32 of a proposal does harm, its direction is wrong, and no learning rate would help. After two
such tries no part of a step is committed before the episode is over: one part in many passes by chance.

Nothing here is ever rolled back, or nothing would ever escalate. Every rung has a budget, so whatever the verdicts are,
the ladder ends: it never goes up for ever, and never twice for the same attempt. Every rank feeds it the same agreed
facts and gets the same answers; it enters no collective.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from .errors import StabilityStop
from .rungs import ADVICE, Escalation, Pattern, Refusal, Response, Rung

_REMEMBERED = 64  # refusals kept for the report
_CALM = 32  # accepted attempts in a row that end an episode
_SHORTENED_IN_A_ROW = 4  # attenuated steps, refusals between them aside, that speak against the learning rate
_FRUITLESS = 2  # tries after which the direction counts as wrong, not the length
_CUT_GAP = 8  # attempts before the next cut: the last one must have had a chance


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
        self._risky = False  # a look ahead before the first step said that the risk is high
        self._shaping = False
        self._went_back = False  # a deep rollback, a cut, shaping or a reload was tried in this episode
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
    def shaping(self) -> bool:
        """Spectral shaping is switched on: a change of regime, which no rollback takes back."""
        return self._shaping

    def warned(self, risky: bool) -> None:
        """Take note of a look ahead before the first step: whether the risk of divergence is high."""
        self._risky = risky

    @property
    def episode_open(self) -> bool:
        """There were refusals, and it is not yet clear that they are over."""
        return bool(self._episode)

    @property
    def halvings(self) -> int:
        """How often a step may be halved; 0 once its direction counts as wrong: the safe state is only measured."""
        return self.settings.halvings if self._fruitless < _FRUITLESS else 0

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

    def may_go_back(self, attempt: int) -> bool:
        """Whether the budget has another deep rollback."""
        self._forget(attempt)
        return len(self._deeps) < self.settings.max_deep

    def cut(self, attempt: int, factor: float) -> bool:
        """Somebody who watches the run asks for a smaller learning rate, though the attempt may stand.

        Args:
            attempt: Its index.
            factor: What the present learning rate is multiplied by.

        Returns:
            Whether it is cut, from the next attempt on: the budget of cuts holds here, too.
        """
        self._forget(attempt)
        if not self._may_cut(attempt):
            return False
        self._cut(attempt, factor)
        return True

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
            self._cut(refusal.attempt, self.settings.cut_factor)
        if rung is Rung.RELOAD:
            self._reloads += 1
        if rung is Rung.SHAPE:
            self._shaping = True
        if rung is Rung.RELOAD or deep:
            self._alarms = 0
        pattern = self.pattern
        self._went_back = self._went_back or deep or rung in (Rung.CUT_LR, Rung.SHAPE, Rung.RELOAD)
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

    def stop(self, attempt: int, reason: str) -> StabilityStop:
        """What ends the run once the budget is spent, with the report.

        Args:
            attempt: That was refused last.
            reason: Of that refusal.
        """
        report = self.report()
        tried = ", ".join(f"{rung} x{count}" for rung, count in report["tried"].items())
        return StabilityStop(
            f"stopped at attempt {attempt}: {report['refusals_in_a_row']} refusals in a row, "
            f"{report['refusals_in_window']} in the last {self.settings.window} attempts; tried {tried}. The "
            f"pattern is {report['pattern']}: {report['advice']} The last refusal: {reason}. The model is in "
            f"its last committed state.",
            report,
        )

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
        if refusal.signal == "edge":  # who refused it knows the state to go back to, and asked for the budget
            return Rung.DEEP_ROLLBACK, True
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
        if self._may_shape(refusal):
            return Rung.SHAPE, False
        # Where a shorter step has just passed, the next refusal need not wait for it.
        patience = 1 if self._shortened else settings.attenuate_after
        if refusal.quiet and refusal.alone and settings.attenuate_after and self._quiet >= patience:
            if self._wait == 0:
                return Rung.ATTENUATE, False
            self._wait -= 1
        return Rung.SKIP, False

    def _may_shape(self, refusal: Refusal) -> bool:
        after = self.settings.shape_after
        wanted = self._risky and refusal.can_shape and self._about_the_step(refusal) and not self._shaping
        return wanted and 0 < after <= self._episode["by probe"]

    @staticmethod
    def _about_the_step(refusal: Refusal) -> bool:
        """The probe saw harm, quietly or not: at a rate too high for the model the gradients say so as well."""
        return refusal.signal == "probe" and refusal.finite

    def _may_cut(self, attempt: int) -> bool:
        spent = len(self._cuts) >= self.settings.max_cuts
        return not spent and (self._last_cut < 0 or attempt - self._last_cut > _CUT_GAP)

    def _cut(self, attempt: int, factor: float) -> None:
        self._level = self.learning_rate_factor * factor
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
        self._episode["by probe"] += self._about_the_step(refusal)
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
    "risky",
    "shaping",
    "went_back",
)
