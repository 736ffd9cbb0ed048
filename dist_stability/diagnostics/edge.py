"""Is the run at the edge of stability, past it, or standing still? A pure state machine over cheap readings.

Readings come at their own paces: the directional ratio rho every few steps, the margin (:mod:`.sharpness`) every fifty.
Each kind of evidence has its own hysteresis, and a state changes only after three readings in a row agree that it is
at least (or at most) the new one. Full-batch training sits at margin 1 and rho 2 for long stretches, with a falling
loss: that is EDGE, it is healthy, and nothing is done about it. The thresholds are starting points for large batches;
with small ones the margin of the whole loss stays lower, and for small-batch AdamW no threshold is established.

Pure Python floats, no tensors, no collectives. Ranks that observe the same readings are in the same state; the readings
of signals and :class:`~.sharpness.Sharpness` are the same on every rank, and :meth:`EdgeOfStability.fingerprint` can
ride in a vote to see to it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from ..rungs import Rung


class EdgeState(StrEnum):
    """Where the run stands, in the order of alarm."""

    STABLE = "stable"
    EDGE = "edge"
    OVERDRIVEN = "overdriven"
    RUNAWAY = "runaway"
    POISONED = "poisoned"


@dataclass(frozen=True, slots=True)
class EdgeSettings:
    """Thresholds.

    Attributes:
        edge_margin: Margin from which on the run is at the edge.
        overdriven_margin: Margin above which it is past it.
        runaway_margin: Margin above which a refused probe means a runaway: the simple catapult bound.
        edge_rho: Median rho from which on the run is at the edge.
        rising_rho: Median rho above which a rising loss means that the run is past the edge.
        overdriven_rho: Median rho above which it is past it, whatever the loss does.
        rho_window: Readings of rho in the median.
        patience: Readings in a row that a change of state takes.
        loss_steps: Span of the loss's mean, and how far back it is compared with.
        collapse: Effective step over its usual value below which the optimizer may be poisoned.
        spike: Gradient norm over its usual value, or root mean square of g^2 / v, from which on it is a spike.
        spike_steps: For how long after a spike a collapse is blamed on it.
        burst: Steps without a spike after which the next one is the first of another burst.
        warmup: Readings before anything counts as a spike: what is usual must be known.
        give_in: Readings after which a collapsed effective step is taken for the new usual one.
        first_margin: Step of its first measurement: Adam's moments, and the buckets that DDP chooses in its first
            backward, are settled then.
        margin_every: Steps between measurements of the margin.
        remeasure_every: Least steps between two of them, whatever calls for one: a schedule changes the learning rate
            at every step.
        margin_lasts: Steps after which a margin is no evidence any more.
        repeat: Steps after which a state that lasts is acted on again.
        cuts: Past the edge, ask for a lower learning rate. Otherwise that is reported only: nothing shows that of
            small-batch AdamW runs those past these thresholds are the ones that fail (docs/restrained.md).
    """

    edge_margin: float = 0.8
    overdriven_margin: float = 1.25
    runaway_margin: float = 2.0
    edge_rho: float = 1.6
    rising_rho: float = 2.2
    overdriven_rho: float = 2.5
    rho_window: int = 20
    patience: int = 3
    loss_steps: int = 50
    collapse: float = 0.2
    spike: float = 8.0
    spike_steps: int = 100
    burst: int = 20
    warmup: int = 20
    give_in: int = 32
    first_margin: int = 5
    margin_every: int = 50
    remeasure_every: int = 10
    margin_lasts: int = 200
    repeat: int = 100
    cuts: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: A setting is not positive, a switch no switch, or thresholds are not in ascending order.
        """
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "bool":
                if not isinstance(value, bool):
                    raise ValueError(f"EdgeSettings {each.name}: expected True or False, got {value!r}")
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"EdgeSettings {each.name}: expected a positive number, got {value!r}")
            if each.type == "int" and not isinstance(value, int):
                raise ValueError(f"EdgeSettings {each.name}: expected a whole number, got {value!r}")
        for names in (
            ("edge_margin", "overdriven_margin", "runaway_margin"),
            ("edge_rho", "rising_rho", "overdriven_rho"),
        ):
            values = [getattr(self, name) for name in names]
            if values != sorted(values):
                raise ValueError(f"EdgeSettings: expected {' <= '.join(names)}, got {values}")
        if self.collapse >= 1.0:
            raise ValueError(f"EdgeSettings collapse: expected a fraction below 1, got {self.collapse!r}")


@dataclass(frozen=True, slots=True)
class EdgeReading:
    """What is known after one step, the same on every rank; None for what was not measured. NaN is no evidence.

    Attributes:
        step: Index of the step, ascending.
        margin: See :class:`~.sharpness.SharpnessReading`; only where it was measured at this step.
        rho: See :class:`~dist_stability.signals.DirectionalRatio`.
        effective_step: Mean |update| / learning rate.
        gradient_norm: Global, before clipping.
        update_rms: Root mean square of g^2 / v under Adam, of the tensor in the middle: rows of an embedding that are
            rarely used make that of all tensors jump.
        learning_rate: Of the step.
        loss: Training loss.
        refused: The probe's innovation was above its bar. Its other numbers then are of a step that does not stand:
            only what speaks for a collapse counts.
        finite: Loss, gradients and measurement were finite.
    """

    step: int
    margin: float | None = None
    rho: float | None = None
    effective_step: float | None = None
    gradient_norm: float | None = None
    update_rms: float | None = None
    learning_rate: float | None = None
    loss: float | None = None
    refused: bool = False
    finite: bool = True

    @classmethod
    def of(cls, step: int, values: Mapping[str, float], **more: Any) -> EdgeReading:
        """From the named numbers of the signals of a step."""
        names = {name: name for name in ("rho", "effective_step", "gradient_norm", "learning_rate")}
        names |= {"loss": "training_loss", "update_rms": "update_rms_median"}
        known: dict[str, Any] = {field: values[name] for field, name in names.items() if name in values}
        return cls(step, **(known | more))


@dataclass(frozen=True, slots=True)
class EdgeAssessment:
    """What a reading led to.

    Attributes:
        state: The state after it.
        changed: It was another one before.
        rung: What the ladder should do now; None for nothing, always None for STABLE and EDGE.
        factor: With CUT_LR, what to multiply the learning rate by.
        reason: One line for people.
    """

    state: EdgeState
    changed: bool
    rung: Rung | None = None
    factor: float | None = None
    reason: str = ""


_LEVELS = (EdgeState.STABLE, EdgeState.EDGE, EdgeState.OVERDRIVEN)


class EdgeOfStability:
    """The state machine. Its whole state is plain numbers."""

    def __init__(self, settings: EdgeSettings | None = None) -> None:
        """Nothing seen: STABLE."""
        self.settings = EdgeSettings() if settings is None else settings
        self.state = EdgeState.STABLE
        self._margins: list[int] = []  # the last levels of each kind, at most `patience`
        self._ratios: list[int] = []
        self._held = {"margin": 0, "rho": 0}
        self._margin: float | None = None
        self._margin_step: int | None = None
        self._rhos: list[float] = []
        self._loss: float | None = None
        self._past: list[float] = []
        self._usual: float | None = None
        self._usual_norm: float | None = None
        self._rate: float | None = None
        self._spike: int | None = None
        self._burst: int | None = None
        self._seen = 0  # readings
        self._low = False  # the last effective step was below half of the usual one
        self._collapsed = 0
        self._recovered = 0
        self._poisoned = False
        self._acted: int | None = None
        self._remeasure = True

    @property
    def rho(self) -> float | None:
        """Median of the last ratios."""
        return sorted(self._rhos)[len(self._rhos) // 2] if self._rhos else None

    @property
    def burst(self) -> int | None:
        """The step at which the last burst of spikes began, whose harm, if any, the state before it does not have.

        A spike that comes while the effective step is falling belongs to the burst before.
        """
        return self._burst

    def suspects(self, step: int) -> bool:
        """Whether a spike may still turn out to have poisoned the optimizer, or has."""
        recent = self._spike is not None and step - self._spike <= self.settings.spike_steps
        return recent or self._poisoned

    def products_due(self, step: int) -> int:
        """How many Hessian-vector products to measure the margin with at this step; 0 for no measurement.

        One every ``margin_every`` steps; three the first time, after a change of the learning rate and after an alarm.
        """
        if step < self.settings.first_margin:
            return 0
        if self._margin_step is None:
            return 3
        since = step - self._margin_step
        if self._remeasure and since >= self.settings.remeasure_every:
            return 3
        return 1 if since >= self.settings.margin_every else 0

    def observe(self, reading: EdgeReading) -> EdgeAssessment:
        """Take in one reading. Everything that follows from it depends on readings alone."""
        before = self.state
        self._look_at_rate(reading)
        self._look_at_loss(reading)
        self._look_at_margin(reading)
        self._look_at_rho(reading)
        self._look_at_moments(reading)
        self.state, reason = self._decide(reading)
        changed = self.state is not before
        if changed and self.state not in (EdgeState.STABLE, EdgeState.EDGE):
            self._remeasure = True
        rung, factor = self._response(reading, changed)
        if rung is not None:
            self._acted = reading.step
        return EdgeAssessment(self.state, changed, rung, factor, reason)

    def fingerprint(self) -> int:
        """A whole number below 2^63 that is the same on two ranks exactly if their machines are (but for chance)."""
        text = json.dumps(self.state_dict(), sort_keys=True)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def state_dict(self) -> dict[str, Any]:
        """Everything seen, JSON-able."""
        own = {name.lstrip("_"): value for name, value in vars(self).items() if name != "settings"}
        return json.loads(json.dumps(own))  # type: ignore[no-any-return]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        for name in [name for name in vars(self) if name not in ("settings", "state")]:
            setattr(self, name, json.loads(json.dumps(state[name.lstrip("_")])))
        self.state = EdgeState(state["state"])

    def _look_at_rate(self, reading: EdgeReading) -> None:
        rate = reading.learning_rate
        if rate is None or not math.isfinite(rate):
            return
        if self._rate is not None and not math.isclose(rate, self._rate, rel_tol=0.1):
            self._remeasure = True
            drift = self._rate < 2.0 * rate and rate < 2.0 * self._rate
            if not (drift and self.suspects(reading.step)):
                # Another learning rate is another regime: what was usual before says nothing about it. A schedule
                # gets there in small steps, and must not blind the eye on what a spike has done meanwhile.
                self._usual, self._collapsed = None, 0
            self._rate = rate
        elif self._rate is None:
            self._rate = rate

    def _look_at_loss(self, reading: EdgeReading) -> None:
        if reading.loss is None or not math.isfinite(reading.loss):
            return
        weight = 2.0 / (self.settings.loss_steps + 1.0)
        self._loss = reading.loss if self._loss is None else self._loss + weight * (reading.loss - self._loss)
        self._past = [*self._past, self._loss][-self.settings.loss_steps - 1 :]

    @property
    def _rising(self) -> bool:
        full = len(self._past) > self.settings.loss_steps
        return full and self._past[-1] > self._past[0]

    def _look_at_margin(self, reading: EdgeReading) -> None:
        margin = reading.margin
        if margin is None:
            if self._margin_step is not None and reading.step - self._margin_step > self.settings.margin_lasts:
                self._margin, self._margins, self._held["margin"] = None, [], 0
            return
        self._margin_step, self._remeasure = reading.step, False
        if not math.isfinite(margin):
            return
        self._margin = margin
        level = 2 if margin > self.settings.overdriven_margin else int(margin >= self.settings.edge_margin)
        self._margins = self._hold("margin", self._margins, level)

    def _look_at_rho(self, reading: EdgeReading) -> None:
        if reading.rho is None or not math.isfinite(reading.rho):
            return
        self._rhos = [*self._rhos, reading.rho][-self.settings.rho_window :]
        middle = self.rho
        assert middle is not None
        past = self.settings.rising_rho if self._rising else self.settings.overdriven_rho
        level = 2 if middle > past else int(middle >= self.settings.edge_rho)
        self._ratios = self._hold("rho", self._ratios, level)

    def _hold(self, kind: str, recent: list[int], level: int) -> list[int]:
        """Hysteresis: up to the least of the last readings, down to the largest of them."""
        recent = [*recent, level][-self.settings.patience :]
        if len(recent) == self.settings.patience:
            self._held[kind] = min(max(self._held[kind], min(recent)), max(recent))
        return recent

    def _look_at_moments(self, reading: EdgeReading) -> None:
        norm, settings = reading.gradient_norm, self.settings
        known = self._seen >= settings.warmup
        self._seen += 1
        if norm is not None and math.isfinite(norm) and norm > 0.0:
            if known and self._usual_norm and norm > settings.spike * self._usual_norm:
                self._see_spike(reading.step)
            else:
                old = self._usual_norm
                self._usual_norm = norm if old is None else old * (norm / old) ** 0.05
        if known and reading.update_rms is not None and reading.update_rms > settings.spike:
            self._see_spike(reading.step)
        size = reading.effective_step
        if size is None or not math.isfinite(size) or size <= 0.0:
            return
        if self._usual is None:
            self._usual = None if reading.refused else size
            return
        ratio = size / self._usual
        self._low = ratio < 0.5
        if self._poisoned:
            self._collapsed += 1
            self._recovered = self._recovered + 1 if ratio > 0.5 else 0
            if self._recovered >= settings.patience or self._collapsed >= settings.give_in:
                self._poisoned, self._collapsed, self._recovered, self._spike = False, 0, 0, None
                self._burst = None
                self._usual = size
            return
        blamed = self._spike is not None and reading.step - self._spike <= settings.spike_steps
        self._collapsed = self._collapsed + 1 if blamed and ratio < settings.collapse else 0
        self._poisoned = self._collapsed >= settings.patience
        if not blamed and not reading.refused:
            # Right after a spike the usual size is not learned: it would follow the collapse.
            self._usual *= ratio**0.05

    def _see_spike(self, step: int) -> None:
        another = self._spike is None or step - self._spike > self.settings.burst
        if another and not self._low:
            self._burst = step
        self._spike = step

    def _decide(self, reading: EdgeReading) -> tuple[EdgeState, str]:
        if not reading.finite:
            return EdgeState.RUNAWAY, "something is not finite"
        if reading.refused and self._margin is not None and self._margin > self.settings.runaway_margin:
            return EdgeState.RUNAWAY, f"margin {self._margin:.3g} and the probe's innovation above its bar"
        if self._poisoned:
            usual = "" if self._usual is None else f" (usually {self._usual:.3g})"
            return EdgeState.POISONED, f"the effective step collapsed after a gradient spike{usual}"
        level = max(self._held.values())
        said = [] if self._margin is None else [f"margin {self._margin:.3g}"]
        said += [] if self.rho is None else [f"median rho {self.rho:.3g}"]
        said += ["loss rising"] if self._rising else []
        return _LEVELS[level], ", ".join(said)

    def _response(self, reading: EdgeReading, changed: bool) -> tuple[Rung | None, float | None]:
        """What to do: on entry, and again after a while in a state that lasts. Never at the edge."""
        if self.state in (EdgeState.STABLE, EdgeState.EDGE):
            return None, None
        waited = self._acted is None or reading.step - self._acted >= self.settings.repeat
        if self.state is EdgeState.RUNAWAY:
            return Rung.SKIP, None  # refuse the proposal, each time; the ladder escalates by itself
        if not (changed or waited):
            return None, None
        if self.state is EdgeState.POISONED:
            return Rung.DEEP_ROLLBACK, None
        if not self.settings.cuts:
            return None, None
        return Rung.CUT_LR, max(0.5, 1.0 / self._margin) if self._margin and self._margin > 1.0 else 0.5
