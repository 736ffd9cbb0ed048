"""The searches that make rivals as strong as they honestly can be: what is tried, and what is taken.

``paper-tuned`` searches Algorithm 1's epsilon at the paper's alpha, then alpha at the best epsilon; ``loss-rollback``
searches the window of its statistics. The objective is the mean, over the tuning seeds, of the final probe loss under
the paper's fault. A candidate that refuses any step of a run without a fault, or whose budgets stop a run, is out.
Of equals the first one is taken: the larger epsilon, the paper's alpha, the longer window. If every candidate is out,
the rule's own values are taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dist_stability.experiments.paper.protocol import PAPER_ALPHA, PAPER_EPSILON, ROLLBACK, TUNED, Protocol

Values = dict[str, float]
"""Options of the training program that are searched, without their dashes."""

OWN: Mapping[str, Values] = {
    TUNED: {"epsilon": PAPER_EPSILON, "alpha": PAPER_ALPHA},
    ROLLBACK: {"loss_window": 128},
}
"""By searched arm, the values it has without a search."""

_RULES = {TUNED: "fixed", ROLLBACK: "loss-rollback"}
_PREFIXES = {
    "search-epsilon": (TUNED, 1, "epsilon"),
    "search-alpha": (TUNED, 2, "alpha"),
    "search-window": (ROLLBACK, 1, "loss_window"),
}


@dataclass(frozen=True)
class Candidate:
    """One choice of values and what came of it.

    Attributes:
        values: What was tried.
        finals: Final probe loss under the fault, by tuning seed.
        false_refusals: Steps refused or undone in the runs without a fault.
        stopped: Runs that were stopped before their end.
    """

    values: Values
    finals: tuple[float, ...]
    false_refusals: int = 0
    stopped: int = 0

    @property
    def objective(self) -> float:
        """What is minimized; infinite for a candidate that is out or ended in no number."""
        mean = math.inf if self.false_refusals or self.stopped else fmean(self.finals)
        return mean if math.isfinite(mean) else math.inf

    def row(self) -> dict[str, Any]:
        """For the table of the search."""
        return {
            "values": self.values,
            "objective": self.objective if math.isfinite(self.objective) else None,
            "finals": list(self.finals),
            "false_refusals": self.false_refusals,
            "stopped": self.stopped,
        }


def choose(arm: str, candidates: Sequence[Candidate]) -> Values:
    """The best values for a searched arm; those of the first of equals, the larger epsilon before all else."""
    ordered = sorted(candidates, key=lambda candidate: -candidate.values.get("epsilon", 0.0))
    best = min(ordered, key=lambda candidate: candidate.objective)
    return best.values if math.isfinite(best.objective) else dict(OWN[arm])


def stages(protocol: Protocol, arm: str) -> list[list[str]]:
    """Names of the candidates of a searched arm, which are names of folders, by stage."""
    if arm == ROLLBACK:
        return [[f"search-window{value}" for value in protocol.windows]]
    epsilons = [f"search-epsilon{value}" for value in protocol.epsilons]
    return [epsilons, [f"search-alpha{value}" for value in protocol.alphas]]


def origin(name: str) -> tuple[str, int]:
    """The arm a candidate belongs to, and its stage from 1; ("", 0) for any other arm."""
    arm, stage, _, _ = _parsed(name)
    return arm, stage


def tried(name: str, before: Values | None = None) -> Values:
    """The values of a candidate.

    Args:
        name: Of the candidate.
        before: What the stage before it found; None in the first one.
    """
    arm, _, option, value = _parsed(name)
    return {**OWN[arm], **(before or {}), option: value}


def words(arm: str, values: Values) -> tuple[str, ...]:
    """Command-line options of a searched arm with these values."""
    options = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ("--rule", _RULES[arm], *options)


def _parsed(name: str) -> tuple[str, int, str, float]:
    for prefix, (arm, stage, option) in _PREFIXES.items():
        if name.startswith(prefix):
            text = name.removeprefix(prefix)
            return arm, stage, option, int(text) if arm == ROLLBACK else float(text)
    return "", 0, "", math.nan
