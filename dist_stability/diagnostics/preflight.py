"""Before the first step: is this learning rate likely to diverge, by what grounds, and how far can they be trusted?

One report out of what is measured elsewhere: the learning-rate probe (:mod:`.lr_probe`), which decides; the spectral
profile of the blocks (:mod:`.rksp`), which does not, since it does not see the learning rate; and the plain numbers
that predict about as well. docs/preflight.md says how to read it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dist_stability.diagnostics import calibration, lr_probe, rksp
from dist_stability.diagnostics.baselines import USUAL_EDGES
from dist_stability.diagnostics.calibration import Calibrator
from dist_stability.diagnostics.ranks import Ranks

__all__ = ["MARGIN", "SCORE", "Level", "Preflight", "preflight", "takes_adam_steps"]

MARGIN = 2.0
"""A recommended rate is the edge over this. Edges were found up to 1.5 times too high (docs/lr-probe.md)."""

SPAN = 32.0
"""The search goes from the learning rate over this to the learning rate times this."""

SCORE = "learning-rate probe"
"""What a calibrator of the score must say that it is one of."""

_PLAIN = (
    "Who knows the edges of models with and without normalization does about as well without any probe: AUROC 0.992 "
    "against 0.985 for the probe over wide steps in learning rate, 0.932 against 0.975 without normalization near the "
    "edge."
)
_LIMITS = (
    "The probe takes Adam steps (betas 0.9 and 0.999, epsilon 1e-8) in evaluation mode, without warmup, weight decay "
    "or gradient clipping: it does not see what a warmup saves or clipping prevents, nor what happens later than its "
    "steps reach.",
    "It was measured on small GPTs (up to 0.43 million parameters, 60 steps, on the CPU). Right at their edge it "
    "does not tell normalized models apart (AUROC 0.65 and 0.78 at one rate).",
    "The edge is an estimate: found up to 1.5 times too high without normalization, up to 2.2 times too low with it. A "
    "rate that does not diverge need not be one that learns well.",
)


_ADAM = re.compile(r"(?<![RN])AdamW?(?=$|\d|_)")


class Level(StrEnum):
    """What is found about a learning rate."""

    LOW = "low"
    RAISED = "raised"
    HIGH = "high"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Preflight:
    """The report; the same on every rank.

    Attributes:
        lr: The learning rate it is about.
        level: HIGH: the virtual run at this rate itself diverged, or the rate is past the edge. RAISED: the same at
            twice the rate. UNKNOWN: the optimizer takes no Adam steps.
        verdict: In a sentence.
        grounds: What it rests on, and what would have said the same for less.
        limits: What it cannot know.
        risk: Of the learning rate; None if UNKNOWN.
        margin_risk: Of :data:`MARGIN` times the rate.
        search: For the edge; None if it was not searched.
        recommended: Half the largest rate found stable; None if none was found, or nothing was searched.
        profile: Of the blocks, with eigenvalues.
        chance: The score in words, with a probability only from a calibrator that fits.
    """

    lr: float
    level: Level
    verdict: str
    grounds: tuple[str, ...]
    limits: tuple[str, ...]
    risk: lr_probe.Risk | None
    margin_risk: lr_probe.Risk | None
    search: lr_probe.Search | None
    recommended: float | None
    profile: rksp.Profile
    chance: str

    def to_dict(self) -> dict[str, Any]:
        """All of it but the single eigenvalues, as dictionaries, lists and numbers."""
        found = asdict(self)
        del found["profile"]["eigenvalues"]
        return found

    def text(self) -> str:
        """For people: the verdict, its grounds and limits, and a line per block."""
        parts = [self.verdict, *(f"  - {each}" for each in self.grounds), "It cannot know:"]
        return "\n".join([*parts, *(f"  - {each}" for each in self.limits), "", self.profile.table()])


def preflight(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Sequence[Any],
    lr: float,
    *,
    optimizer: Optimizer | None = None,
    blocks: Sequence[str] | None = None,
    search: bool = True,
    calibrator: Calibrator | None = None,
    family: str = "",
    seed: int = 0,
    told: Callable[[str], None] | None = None,
) -> Preflight:
    """Look ahead. Every rank calls it, at a step boundary, each with its own data; everything is undone, bit for bit.

    Collectives: a small all-reduce, and those of ``lr_probe.risk`` (twice), ``rksp.profile`` and
    ``lr_probe.stable_learning_rate``.

    Args:
        model: As the training loop holds it; a sharded one without gradients.
        loss_fn: ``loss_fn(model, batch)`` gives the training loss, a 0-d tensor, and calls the model once.
        batches: This rank's data, as large as those of training; the first one is profiled. Four are good.
        lr: The largest of the run, > 0.
        optimizer: Of the run. Unless it is a kind of Adam, the learning rate is not judged; default: AdamW.
        blocks: Names without wrappers; None to find them.
        search: Look for the largest stable rate as well, between ``lr`` / 32 and ``lr`` x 32: up to 15 rates, each of
            17 forwards and backwards.
        calibrator: Turns the score into a probability, if it is one of this score and of ``family``.
        family: What this run is one of, in the calibrator's words.
        seed: Of every random stream meanwhile.
        told: Called on every rank with a line for each part that is done; must not enter collectives.

    Raises:
        NoBlocks: No blocks were found, or none keeps the shape of its input.
        ValueError: A setting is out of range, there are no batches, or a sharded model holds gradients.
        LockstepError: The ranks disagree, or another one raised.
    """
    say = told or (lambda line: None)
    judged = optimizer is None or takes_adam_steps(optimizer)
    ranks = Ranks(model)
    settings = f"{lr}, {len(batches)} batches, blocks {blocks and list(blocks)}, search {search}, seed {seed}, {judged}"
    ranks.agree(settings, _wrong(lr, batches, ranks.rank), "preflight")
    risk = margin_risk = found = None
    if judged:
        risk = lr_probe.risk(model, loss_fn, batches, lr, seed=seed)
        say(f"learning rate {lr:.3g}: score {risk.score:+.2f}")
        margin_risk = lr_probe.risk(model, loss_fn, batches, MARGIN * lr, seed=seed)
        say(f"learning rate {MARGIN * lr:.3g}: score {margin_risk.score:+.2f}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rksp.RkspWarning)  # they are among the limits
        profile = rksp.profile(model, blocks, batches[0], loss_fn=loss_fn, with_eigenvalues=True, seed=seed)
    say(f"{len(profile.blocks)} blocks profiled")
    if judged and search:
        found = lr_probe.stable_learning_rate(
            model,
            loss_fn,
            batches,
            low=lr / SPAN,
            high=lr * SPAN,
            seed=seed,
            told=lambda each: say(f"search: {each.lr:.3g} scores {each.score:+.2f}"),
        )
    recommended = None if found is None or found.lr is None else found.lr / MARGIN
    level = _level(lr, risk, margin_risk, found)
    chance = _chance(risk, calibrator, family)
    return Preflight(
        lr=lr,
        level=level,
        verdict=_verdict(lr, level, recommended, found),
        grounds=tuple(_grounds(lr, risk, margin_risk, found, profile, chance)),
        limits=(*(_LIMITS if judged else ()), *(f"profile: {each}" for each in profile.warnings)),
        risk=risk,
        margin_risk=margin_risk,
        search=found,
        recommended=recommended,
        profile=profile,
        chance=chance,
    )


def _wrong(lr: float, batches: Sequence[Any], rank: int) -> ValueError | None:
    if not (0.0 < lr < math.inf):
        return ValueError(f"preflight: rank {rank}: lr must be a positive number, got {lr}")
    if not batches:
        return ValueError(f"preflight: rank {rank}: batches is empty; give this rank's first batches, four are good")
    return None


def takes_adam_steps(optimizer: Optimizer) -> bool:
    """Whether the probe's virtual steps are those of this optimizer, told by its name.

    Adam and AdamW, also fused and 8-bit ones; not RAdam, NAdam, Adamax and others that scale their steps otherwise.
    """
    return _ADAM.search(type(optimizer).__name__) is not None


def _level(
    lr: float, risk: lr_probe.Risk | None, margin: lr_probe.Risk | None, search: lr_probe.Search | None
) -> Level:
    if risk is None or margin is None:
        return Level.UNKNOWN

    def past(rate: float, score: float) -> bool:
        return score >= 0.0 or (search is not None and (search.lr is None or rate > search.lr))

    if past(lr, risk.score):
        return Level.HIGH
    return Level.RAISED if past(MARGIN * lr, margin.score) else Level.LOW


def _verdict(lr: float, level: Level, recommended: float | None, search: lr_probe.Search | None) -> str:
    advice = ""
    if search is not None and search.lr is None:
        advice = f" Even {search.too_risky:.3g} is too risky: look at the initialization, the loss and the data."
    elif search is not None and search.too_risky is None:
        advice = f" No edge up to {search.lr:.3g}."
    elif recommended is not None and search is not None:
        advice = f" Recommended: at most {recommended:.3g}, half of the edge found at {search.lr:.3g}."
    if level is Level.UNKNOWN:
        return f"No verdict on the learning rate {lr:.3g}: the probe takes Adam steps, and the optimizer does not."
    if level is Level.HIGH:
        return f"High risk: a run at the learning rate {lr:.3g} is likely to diverge.{advice}"
    if level is Level.RAISED:
        return f"Raised risk: the learning rate {lr:.3g} is within a factor of {MARGIN:g} of the edge.{advice}"
    return f"Nothing against the learning rate {lr:.3g} was found, nor against twice as much.{advice}"


def _grounds(
    lr: float,
    risk: lr_probe.Risk | None,
    margin: lr_probe.Risk | None,
    search: lr_probe.Search | None,
    profile: rksp.Profile,
    chance: str,
) -> list[str]:
    said = []
    if risk is not None and margin is not None:
        limits = lr_probe.Limits()
        said += [
            f"{_walked(each)}; score {each.score:+.2f}, above 0 beyond loss {limits.loss:g} or gradient norm "
            f"{limits.gradient_norm:g}"
            for each in (risk, margin)
        ]
        said.append(chance)
    if search is not None:
        safe = "none of those tried" if search.lr is None else f"{search.lr:.3g}"
        risky = "none of those tried" if search.too_risky is None else f"{search.too_risky:.3g}"
        said.append(f"search over {len(search.tried)} rates: largest stable {safe}, smallest too risky {risky}")
    has_norm = profile.baselines.has_norm
    edge = USUAL_EDGES[has_norm]
    said.append(
        f"plain baselines: normalization layers in the blocks: {'yes' if has_norm else 'no'}; the learning rate alone: "
        f"{lr:.3g}; both together: {lr / edge:.2g} times {edge:g}, the usual edge of small models "
        f"{'with' if has_norm else 'without'} normalization under AdamW. {_PLAIN}"
    )
    score = "not informative" if profile.score is None else f"{profile.score:.2f}"
    said.append(
        f"spectral score {score} (mean share of eigenvalues near 1). It does not see the learning rate and has no "
        "part in the verdict: within a family of models it was at chance"
    )
    return said


def _walked(risk: lr_probe.Risk) -> str:
    steps = len(risk.losses) - 1
    return (
        f"{steps} virtual steps at {risk.lr:.3g}: loss {risk.losses[0]:.4g} to at most "
        f"{_worst(risk.losses):.4g}, gradient norm at most {_worst(risk.gradient_norms):.4g}"
    )


def _worst(values: Sequence[float]) -> float:
    return max(values) if all(map(math.isfinite, values)) else math.inf


def _chance(risk: lr_probe.Risk | None, calibrator: Calibrator | None, family: str) -> str:
    if risk is None:
        return "no score"
    return calibration.told(risk.score, calibrator, name=SCORE, family=family or "this model")
