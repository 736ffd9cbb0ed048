"""The default rule: a step is refused when it lands improbably far above where committed history says it should land.

Prediction ``p``, scale ``s`` and bar ``q`` come from committed values only::

    prediction    p = l + k min(b, 0)                        level, slope, k steps; a rise is never predicted
    scale         s = max(1.2533 a, max(f (y0 - y_min), C max(0, -b)) / 6 + 1e-7 |l|) J sqrt(k)
    jump          J = max(1, announced learning rate / the one that a was learned under)
    evidence      x = max(0, (log (g / J) - mu_g) / S(1.2533 a_g) - 3)           of the gradient norm g
    batch         w = max(0, (L - mu_L) / (max(1.2533 a_L, 0.01 |mu_L|) J) - 6)  of the training loss L
    bar           q = c(nu) T_nu(1 - rate) sqrt(1 + 1 / min(n, 23))              Student t, nu = 2, 3, 4, 4, ...
    for this step q' = max(max(2, q / 2^(d / 4)) - w, 1)       d: refusals that nothing else explains; a commit halves d
    envelope      E = min over h of  l_h + max(1.5 q s_h J sqrt(steps since), 0.01 (y0 - y_min))   4 to 32 commits ago
                      and of         y_min + D (y0 - y_min), once that is more than 2 q max(s_falls, s_32) J
    accept  iff   y and g finite  and  y - p <= min((q' - x) s, E - p)  =  bound

Every part is there for a failure it fixed in closed loop (reject = restore, next batch):

* level *and* slope, short memory: on a falling loss an average lags above the probe and lets damage pass below it. The
  level follows a fall by 4 scales at most: after one outlier downward everything usual would look high;
* ``1.2533 a`` (a mean absolute innovation, equal to sigma for a Gaussian), with single innovations clipped at 3 scales
  upward and 8 downward: one bad commit cannot blind the rule, while a true change of scale is followed at once. The
  first steps of a run are steep; weights that grow with n forget them before the tenth commit;
* the floors: a converged, nearly constant probe, and a very smooth descent whose natural ripple would be refused for
  ever, because an exact restore brings back the momentum that makes it (``materiality``);
* *no patience with the probe*: the state is restored exactly and the probe is fixed, so a rise that every proposal
  repeats is damage, however often it is repeated. What resolves it is the controller's ladder, not a bound that gives
  way. What is known not to be damage is told: a higher learning rate by ``expect``, a moved yardstick by ``rebase``;
* suspicion ``d``: a fault that lasts draws a new proposal at every step, and sooner or later one lands under the bar.
  After a few refusals a rise is more likely the fault than noise, so the bar narrows: to half after four, to 2 scales
  after seven. Neither a deep restore nor a single commit widens it again. Noise that has grown falls as well, which no
  fault does: with one of the last eight commits 2 scales below its prediction nothing narrows (without that, 4 of 300
  series of ten times the noise were locked out for more than 30 steps). On tuning seeds 0 to 3, 52 runs through 60
  steps of a fault that only the probe sees, 3 of 3,120 bad steps stand with it and 6 without; with a floor of 1 scale
  in one run 15 good steps were refused after the fault;
* gradient evidence ``x``: under Adam the step after an enormous gradient hardly moves the probe, its harm comes later
  out of the moments. Evidence lowers the bar instead of deciding alone, since benign outliers of the norm are common.
  The mean of log g follows with gain 0.3: norms drift, and with the slow mean of the notes (1/16) a norm 300 times the
  usual one was missed in warm-up. Its scale S is kept between 0.2 and 0.5: the steep first steps of a run make norms
  look restless, and 300 times the usual one just passed in 3 of 60 runs with batch 64 (now in none). So a hundred times
  the usual is always too much. It has patience, since a norm may change for good while the probe is harmless;
* the training loss ``w``: a batch of wrong labels raises the probe by one to five scales at each step, within the bar,
  and goes on doing so out of the moments after it is over. Its own loss is far outside, tens of scales. That is no
  verdict, since a batch of another kind is no fault; but beside a rise of more than one scale it is refused. On the
  clean recordings of the tuning seeds this refuses nothing (with 4 in the place of 6, or 2 in the place of 1, neither);
* the envelope over horizons: label noise or a learning rate ten times too high lifts every commit by less than the bar.
  Over h steps a random walk spreads by sqrt(h), so the bar (1.5 of them: neighbouring steps are correlated) holds for
  the sum, in the scale of before the rise. Near the end of training the ripple of momentum is no random walk, hence the
  floor of 1 % of the descent;
* the envelope above the best: without it the guarantee grows with every step. A quarter of all descent so far may be
  lost, no more (y_min is the lowest value that the level has followed: hung on a single outlier, it locked out on heavy
  tails). That is room for the slow rise of a run that overfits; one that loses a quarter of what it gained on
  held-out data is refused, and should be stopped. A run that has not descended by far more than its noise has no such
  envelope. Noise is judged by the scale of 32 commits ago and by ``s_falls``, learned from falls only: a larger noise
  has them, a drift has not, so that no drift can lift the envelope by inflating the scale;
* deep restore: the poison was committed already and every later proposal is bad. Asked for only while refusals carry
  *no* gradient evidence, since ordinary faults must not cost 8 to 16 committed steps; or while nothing is finite.

What it does in closed loop and open loop, on noise, and beside the field's rules: ``docs/detection.md``.

What it cannot see: a second moment multiplied by 10,000 all but stops Adam and raises nothing; up to 0.07 nats of
progress were lost within 40 steps. The effective step shows it, which the controller watches beside this rule
(``collapse``).

The bound of the controller paper (Proposition 7.5) holds with the rule's own bound: ``p <= l``, and ``l`` never
exceeds the highest committed measurement M. By induction over commits: ``l' = p + 0.8 max(y - p, -4 s)`` lies between p
and y, hence below max(l, y); a deep restore brings back an earlier ``l``; clipping touches only the scale; ``rebase``
moves ``l`` and M alike. So an accepted y satisfies ``y <= p + bound <= M + bound``. The induction holds in floating
point, too: rounding is monotone, and 0.8 leaves room for the rounding of ``y - p``. (The sum ``p + bound`` rounds: an
ulp.) Besides, ``y <= envelope``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dist_stability.rules.base import checked_setting
from dist_stability.rules.learned import HORIZONS, LARGEST, NORM_WARM_UP, WARM_UP, Learned
from dist_stability.rules.student import student_quantile
from dist_stability.verdict import Judgement

_SCALE_MEMORY = 23  # samples an exponential average of gain 1/12 is worth, 2 / gain - 1
_NORM_FREE = 3.0  # scales of log norm that are no evidence at all
_LOSS_FREE = 6.0  # scales of the training loss that are no evidence at all
_LOSS_BAR = 1.0  # scales of the probe that even the most outlying training loss leaves
_SUSPECT_BAR = 2.0  # ... and that any number of unexplained refusals leaves
_NOISY_FALL = -2.0  # a recent commit this low speaks for noise that has grown, which no fault does
_SUSPICION = 4.0  # unexplained refusals that halve the bar
_DRIFT_BARS = 1.5  # bars over a horizon: neighbouring innovations are correlated, and four horizons are looked at
_RIPPLE = 1e-2  # of the descent: a rise over several commits that is no drift yet
_NOISE_ROOM = 2.0  # bars of noise that the envelope above the best must leave, or there is none

_ANCHORS = 2
_COOL_DOWN = 16  # commits between two deep restores
_RECENT = 8  # committed scores that are remembered
_SUSPECT_SCORE = 3.0  # a recent commit this high may be the poison: two refusals are enough
_SUSPECT_REFUSALS, _REFUSALS = 2, 8


class PredictiveInnovation:
    """Refuse a step whose probe lands improbably far above the prediction; one number to set.

    Affine-equivariant in the measurement (except for a relative floor of 1e-7 on the scale) and scale-free in the
    gradient norm, so the same settings serve any loss. Until three proposals were committed only finiteness is checked
    and ``bound`` is +inf; gradient norm and training loss count from their ninth value on. ``bound`` falls with
    gradient evidence (below zero when the evidence alone exceeds the bar, -inf for a norm that is not finite) and with
    an outlying training loss (to one scale). A norm of exactly 0 is no evidence and teaches nothing.

    A value that is not finite, a negative norm, or a measurement beyond 1e200 is refused. Committed all the same (in
    observe mode), such a measurement changes nothing, and such a norm is left out.

    A probe rounded to bfloat16 stands still and then jumps by a whole step; its jumps alone teach the scale, since a
    measurement equal to the one before teaches nothing (nor does a learning rate of exactly 0). Measure in float32.

    Source: this project's detector notes, rule "LS+gd" with C = 8, and closed-loop runs on its list of known failures.
    """

    def __init__(
        self,
        false_reject_rate: float = 5e-4,
        *,
        gradient_patience: float = 128.0,
        materiality: float = 8.0,
        drift: float = 0.25,
        deep_restore: bool = True,
    ) -> None:
        """Set the rate; the other settings have been measured and rarely need a change.

        Args:
            false_reject_rate: Nominal tail probability of the Student-t bar, 1e-12 <= rate < 0.5. The default puts the
                bar at 6.2 scales; the realised rate on real trajectories is far below it.
            gradient_patience: Refusals for gradient evidence in a row after which it is no evidence any more: the norm
                has changed for good. So many refusals of any kind for an outlying training loss: it is other data.
            materiality: A rise worth fewer than about this many steps of the current descent is not refused (C).
            drift: Fraction of the descent so far that may be lost above the best committed value (D); math.inf for
                no such envelope.
            deep_restore: Ask for the older anchor when refusals persist without an outlying gradient. Two anchors cost
                two host copies of the training state; a sustained fault that is invisible in the gradient can be made
                worse by it.

        Raises:
            TypeError: A setting has the wrong type.
            ValueError: A setting is outside its range.
        """
        name = type(self).__name__
        self.false_reject_rate = checked_setting(
            f"{name} false_reject_rate",
            false_reject_rate,
            "a probability with 1e-12 <= rate < 0.5",
            lambda v: 1e-12 <= v < 0.5,
        )
        self.gradient_patience = checked_setting(
            f"{name} gradient_patience", gradient_patience, "a finite number >= 1", lambda v: 1 <= v < math.inf
        )
        self.materiality = checked_setting(
            f"{name} materiality", materiality, "a number with 0 <= materiality <= 1e6", lambda v: 0 <= v <= 1e6
        )
        self.drift = checked_setting(f"{name} drift", drift, "a number with 0 < drift <= inf", lambda v: v > 0)
        if not isinstance(deep_restore, bool):
            raise TypeError(f"{name} deep_restore must be True or False, got {deep_restore!r}")
        self.deep_restore = deep_restore
        # A Student variable has variance nu / (nu - 2): dividing it out makes the bar a number of sigmas. With nu = 2
        # it has none; 0.6 was chosen so that the bar falls smoothly: 22, 8.3, 6.7, ... 6.2 scales at the default rate.
        self._quantiles = {
            2: 0.6 * student_quantile(self.false_reject_rate, 2),
            3: math.sqrt(1 / 3) * student_quantile(self.false_reject_rate, 3),
            4: math.sqrt(1 / 2) * student_quantile(self.false_reject_rate, 4),
        }
        self._learned = Learned()
        self._first: float | None = None  # y0
        self._commits = 0  # n: commits after the first measurement
        self._norms = 0  # n_g
        self._recent: list[float] = []  # scores z of the last commits
        self._refused = 0  # in a row
        self._refused_quietly = 0  # since the last commit, without gradient evidence
        self._refused_loudly = 0  # in a row with gradient evidence
        self._refused_broken = 0  # in a row because a number was not finite
        self._suspicion = 0  # refusals that nothing but the probe explains; every commit halves it
        self._steps = 1  # of the next proposal
        self._rate: float | None = None  # announced for it
        self._losses = 0
        self._loss: float | None = None  # training loss of its batch
        self._since_deep = _COOL_DOWN  # commits since the last deep restore; the first one need not wait
        self._anchors = 0

    def expect(self, *, steps: int = 1, learning_rate: float | None = None, training_loss: float | None = None) -> None:
        """See :meth:`ExpectingRule.expect`."""
        self._steps = max(1, int(steps))
        known = training_loss is not None and abs(training_loss) <= LARGEST
        self._loss = float(training_loss) if known else None  # type: ignore[arg-type]
        known = learning_rate is not None and 0.0 < learning_rate < math.inf
        self._rate = float(learning_rate) if known else None  # type: ignore[arg-type]

    @property
    def envelope(self) -> float:
        """Highest measurement that may be committed now, whatever is predicted; +inf before there is a scale."""
        if self._first is None or self._commits < WARM_UP:
            return math.inf
        learned = self._learned
        # What scales of the past are worth now.
        reach, now = self._bar() * learned.jump(self._rate), learned.clock + self._steps
        descent, highest = self._first - learned.best, math.inf
        noise = max(learned.scale_of_falls(), learned.scales[0] if learned.scales else math.inf)
        if self.drift * descent > _NOISE_ROOM * reach * noise:
            highest = learned.best + self.drift * descent
        for horizon in HORIZONS:
            if horizon > len(learned.levels):
                break
            allowed = _DRIFT_BARS * reach * learned.scales[-horizon] * math.sqrt(now - learned.times[-horizon])
            highest = min(highest, learned.levels[-horizon] + max(allowed, _RIPPLE * descent))
        return highest

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        """Compare the innovation with the bound; changes no state.

        The decision is taken in exactly the reported numbers: a usable measurement and norm are accepted if and only
        if ``innovation <= bound`` (or there is no history, and ``innovation`` is NaN).
        """
        measurement = float(measurement)
        started = self._first is not None
        innovation = measurement - self._learned.prediction(self._steps) if started else math.nan
        evidence = self._evidence(gradient_norm)
        bound = self._bound(evidence)
        usable = _usable_measurement(measurement) and _usable_norm(gradient_norm)
        accepted = usable and (not started or innovation <= bound)
        deep = not accepted and self._wants_deep(*self._refusals_after(measurement, gradient_norm)[1:])
        if not _usable_measurement(measurement):
            reason = f"measurement is {measurement:g}"
        elif not _usable_norm(gradient_norm):
            reason = f"gradient norm is {gradient_norm:g}"
        elif not started:
            reason = "no committed value yet: only checked for being finite"
        elif self._commits < WARM_UP:
            reason = f"only checked for being finite (commit {self._commits + 1} of {WARM_UP})"
        else:
            bar = self._bar_for_step()
            reason = (
                f"innovation {innovation:+.4g} {'within' if accepted else 'above'} bound {bound:.4g} "
                f"({innovation / self._scale():.3g} scales, bar {bar:.3g}"
                + (" after an outlying training loss" if self._outlying_loss() else "")
                + (f", gradient evidence {evidence:.3g}" if evidence else "")
                + (f", {self._refused} refused before in a row" if self._refused else "")
                + ")"
            )
        if deep:
            reason += "; refusals persist without an outlying gradient: back to the older anchor"
        return Judgement(accepted, innovation, bound, reason, deep, evidence)

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Learn from a proposal that stands, and forget the refusals in a row."""
        measurement = float(measurement)
        if not _usable_measurement(measurement):
            return
        anew, anew_loss = (count >= self.gradient_patience for count in (self._refused_loudly, self._refused))
        self._refused = self._refused_quietly = self._refused_loudly = self._refused_broken = 0
        self._suspicion //= 2
        if self._first is None:
            self._first, self._learned = measurement, Learned.start(measurement)
            return
        jump = self._learned.jump(self._rate)
        if measurement != self._learned.last:
            self._learn(measurement)
        if gradient_norm and _usable_norm(gradient_norm):
            self._norms += 1
            self._learned.learn_norm(float(gradient_norm), self._norms, jump, anew)
        if self._loss is not None:
            self._losses += 1
            self._learned.learn_loss(self._loss, self._losses, anew_loss)
        self._since_deep += 1
        self._steps, self._rate, self._loss = 1, None, None

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Count a refusal; it may lead to a deep restore."""
        after = self._refusals_after(float(measurement), gradient_norm)
        self._suspicion += after[1] > 0 and not self._outlying_loss()
        self._refused_loudly, self._refused_quietly, self._refused_broken = after
        self._refused += 1

    def rebase(self, measurement: float) -> None:
        """See :meth:`RebasingRule.rebase`. A measurement that is not usable changes nothing."""
        measurement = float(measurement)
        if self._first is None or not _usable_measurement(measurement):
            return
        difference = measurement - self._learned.last
        self._learned.shift(difference)
        self._learned.last = measurement  # exactly: the next equal one teaches nothing
        self._first += difference
        self._suspicion = 0  # that is what the refusals were

    def anchor(self) -> dict[str, Any]:
        """See :meth:`DeepRule.anchor`."""
        self._anchors = min(_ANCHORS, self._anchors + 1)
        return {"rule": type(self).__name__, **self._learned.state()}

    def deep(self, anchor: Mapping[str, Any]) -> None:
        """Continue from the statistics of the restored anchor, with a clean memory of refusals.

        Raises:
            TypeError: The anchor is not a mapping.
            ValueError: It was not made by this class's ``anchor()``; nothing was changed.
        """
        learned = Learned.from_state(self, anchor, "deep")
        learned.shift(self._learned.moved - learned.moved)  # what was rebased since holds for the anchor, too
        self._learned = learned
        if learned.log_norm is None:
            self._norms = 0  # the anchor is older than the first norm: learn its scale from the start
        if learned.loss is None:
            self._losses = 0
        self._recent = []
        self._refused = self._refused_quietly = self._refused_loudly = self._refused_broken = self._since_deep = 0
        self._anchors = _ANCHORS

    def settings(self) -> dict[str, Any]:
        """How the rule was built; the same on every rank."""
        return {
            "false_reject_rate": self.false_reject_rate,
            "gradient_patience": self.gradient_patience,
            "materiality": self.materiality,
            "drift": self.drift,
            "deep_restore": self.deep_restore,
        }

    def state_dict(self) -> dict[str, Any]:
        """Learned statistics and the memory of refusals: about 120 numbers, exact through JSON."""
        return {
            "rule": type(self).__name__,
            **self._learned.state(),
            "first": self._first,
            "recent": list(self._recent),
            **{name: getattr(self, f"_{name}") for name in _COUNTS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a saved state; the rule then has no anchors.

        Raises:
            TypeError: The state is not a mapping.
            ValueError: It belongs to another rule or is malformed; nothing was changed.
        """
        self._learned = Learned.from_state(
            self, state, "load_state_dict", optional=("first",), counts=_COUNTS, lists=("recent",)
        )
        self._first, self._recent = state["first"], list(state["recent"])
        for name in _COUNTS:
            setattr(self, f"_{name}", state[name])
        self._steps, self._rate, self._loss, self._anchors = 1, None, None, 0

    def __repr__(self) -> str:
        now = "nothing committed"
        if self._first is not None:
            now = f"commits={self._commits}, prediction={self._learned.prediction(1):.4g}, scale={self._scale():.3g}"
        return (
            f"{type(self).__name__}(false_reject_rate={self.false_reject_rate:g}; {now}, "
            f"refused_in_row={self._refused}, anchors={self._anchors})"
        )

    def _scale_of_step(self) -> float:
        """Of one step, at the announced learning rate."""
        descent = 0.0 if self._first is None else self._first - self._learned.best
        return self._learned.scale(descent, self.materiality) * self._learned.jump(self._rate)

    def _scale(self) -> float:
        """Standard deviation of the next innovation."""
        return self._scale_of_step() * math.sqrt(self._steps)

    def _bar(self) -> float:
        """How many scales are too many; wider while the scale rests on few commits."""
        freedom = min(4, max(2, self._commits - 1))
        return self._quantiles[freedom] * math.sqrt(1 + 1 / min(self._commits, _SCALE_MEMORY))

    def _bar_for_step(self) -> float:
        """The bar, lowered by refusals that nothing explains and by a training loss that is an outlier itself."""
        bar = self._bar()
        if min(self._recent, default=0.0) > _NOISY_FALL:
            bar = max(bar * 2 ** (-self._suspicion / _SUSPICION), min(bar, _SUSPECT_BAR))
        return max(bar - self._outlying_loss(), min(bar, _LOSS_BAR))

    def _outlying_loss(self) -> float:
        """How many scales the training loss lies beyond what needs no explanation."""
        learned = self._learned
        if self._loss is None or learned.loss is None or self._losses < NORM_WARM_UP:
            return 0.0
        if self._refused >= self.gradient_patience:
            return 0.0
        return max(0.0, learned.loss_score(self._loss, learned.jump(self._rate)) - _LOSS_FREE)

    def _evidence(self, gradient_norm: float | None) -> float:
        """How many scales the log gradient norm lies beyond what needs no explanation; +inf when it is no norm."""
        if not _usable_norm(gradient_norm):
            return math.inf
        if not gradient_norm or self._learned.log_norm is None or self._norms < NORM_WARM_UP:
            return 0.0
        # A larger learning rate that was announced may enlarge the gradient as much.
        return max(0.0, self._learned.norm_score(gradient_norm, self._learned.jump(self._rate)) - _NORM_FREE)

    def _bound(self, evidence: float) -> float:
        """Largest innovation that is accepted given this much gradient evidence."""
        if evidence == math.inf:
            return -math.inf
        if self._commits < WARM_UP:
            return math.inf
        if self._refused_loudly >= self.gradient_patience:
            evidence = 0.0
        step = (self._bar_for_step() - evidence) * self._scale()
        return min(step, self.envelope - self._learned.prediction(self._steps))

    def _refusals_after(self, measurement: float, gradient_norm: float | None) -> tuple[int, int, int]:
        """Refusals in a row with, without and for lack of evidence, once this one is counted."""
        if not (_usable_measurement(measurement) and _usable_norm(gradient_norm)):
            return self._refused_loudly, 0, self._refused_broken + 1
        if self._evidence(gradient_norm) > 0.0:
            # An outlying gradient explains its own refusal, not those before it.
            return self._refused_loudly + 1, self._refused_quietly, 0
        return self._refused_loudly, self._refused_quietly + 1, 0

    def _wants_deep(self, quiet: int, broken: int) -> bool:
        if not self.deep_restore or self._anchors < _ANCHORS or self._since_deep == 0:
            return False
        if self._since_deep < _COOL_DOWN:
            # Too few commits for new anchors: what was committed since the last deep restore is undone as well.
            return max(quiet, broken) >= 2 * _REFUSALS
        suspect = max(self._recent, default=0.0) >= _SUSPECT_SCORE
        return max(quiet, broken) >= _REFUSALS or (quiet >= _SUSPECT_REFUSALS and suspect)

    def _learn(self, measurement: float) -> None:
        scale = self._scale_of_step()
        if self._commits >= WARM_UP:
            score = (measurement - self._learned.prediction(self._steps)) / self._scale()
            self._recent = [*self._recent, min(max(score, -LARGEST), LARGEST)][-_RECENT:]
        self._commits += 1
        self._learned.learn(measurement, self._commits, self._steps, self._rate, scale)


_COUNTS = (
    "commits",
    "norms",
    "losses",
    "refused",
    "refused_quietly",
    "refused_loudly",
    "refused_broken",
    "suspicion",
    "since_deep",
)
"""Attributes that are saved as they are, without their underscore."""


def _usable_measurement(value: float) -> bool:
    return abs(value) <= LARGEST  # False for NaN


def _usable_norm(value: float | None) -> bool:
    """A norm is a finite number >= 0; unknown (None) is usable, too."""
    return value is None or 0.0 <= value < math.inf
