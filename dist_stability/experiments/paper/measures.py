"""What is measured on a run: pure functions of traces, in the words of the paper's tables.

Losses are probe losses in nats. A loss that is no number counts as infinite. None means not defined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from dist_stability.experiments.paper.protocol import Injection
from dist_stability.experiments.paper.traces import Trace

DAMAGE_NEEDED = 0.02
"""Smallest harm of the unguarded run, in nats, for which a gap is defined."""

MEASURES = (
    *("recovery_gap", "peak_degradation", "detection_delay", "refused_inside", "false_refusals", "final_probe"),
    *("overhead_ratio", "regret", "twin_gap", "undone", "attenuated", "evaluation", "stopped"),
)

STEP = "step"
"""The phase of ``step()`` that an unguarded run has too."""


def measure(
    run: Trace,
    fault: Injection,
    *,
    faulty: bool,
    clean: Trace | None = None,
    baseline: Trace | None = None,
    twin: Trace | None = None,
) -> dict[str, float | None]:
    """All of :data:`MEASURES` for one run.

    Args:
        run: The run.
        fault: The fault its peers were given: where peak and delay are counted from.
        faulty: Whether this run was given it; if not, every refusal is a false one.
        clean: The run without a fault, same seed.
        baseline: The unguarded run with the fault, same seed.
        twin: The golden twin of the guarded run, same seed and fault.
    """
    attempts = fault.attempts if faulty else frozenset()
    return {
        "recovery_gap": gap(run, clean, baseline),
        "peak_degradation": peak_degradation(run, fault.start),
        "detection_delay": detection_delay(run, fault.start) if faulty else None,
        "refused_inside": len(attempts.intersection(run.refused)),
        "false_refusals": len(set(run.refused) - attempts),
        "final_probe": run.final_probe,
        "overhead_ratio": overhead_ratio(run),
        "regret": None if twin is None else _difference(run, twin),
        "twin_gap": gap(run, twin, baseline),
        "undone": run.undone,
        "attenuated": len(run.attenuated),
        "evaluation": run.evaluation,
        "stopped": int(run.stopped),
    }


def gap(run: Trace, best: Trace | None, baseline: Trace | None) -> float | None:
    """How much of the harm is left: (final - best) / (baseline - best); 0 is perfect, 1 is useless.

    None if the harm is below :data:`DAMAGE_NEEDED`, if the baseline ended in no number, or if a run is missing.
    """
    if best is None or baseline is None:
        return None
    damage = _difference(baseline, best)
    if damage is None or not DAMAGE_NEEDED <= damage < math.inf:
        return None
    return (run.final_probe - best.final_probe) / damage


def peak_degradation(run: Trace, start: int) -> float | None:
    """Largest probe loss of a standing state from batch ``start`` on, minus that before it; None without both."""
    first = next((place for place, batch in enumerate(run.batches) if batch >= start), 0)
    if first == 0:
        return None
    return max(run.probe[first:]) - run.probe[first - 1]


def detection_delay(run: Trace, start: int) -> int | None:
    """Attempts from ``start`` to the first refusal at or after it, whatever that was for; None if there is none."""
    return next((attempt - start for attempt in run.refused if attempt >= start), None)


def overhead_ratio(run: Trace) -> float:
    """Wall time of the loop over the same without what the controller does, from the run's own clock.

    1 + (all that the controller does, but the optimizer's own step) / (the rest of the loop: data, forward, backward,
    optimizer). What the experiment writes down, the norm of the parameters among it, is in neither. By definition 1
    for an unguarded run: it measures the probe only for the record.
    """
    return 1.0 + sum(overhead_parts(run).values())


def overhead_parts(run: Trace) -> dict[str, float]:
    """The overhead by part, each relative to the rest of the loop; empty for an unguarded run."""
    if not run.guarded:
        return {}
    own = {phase: seconds for phase, seconds in run.phases.items() if phase != STEP}
    rest = run.seconds - sum(own.values())
    return {phase: seconds / rest for phase, seconds in own.items()}


def twin_equality(guarded: Trace, attempts: Iterable[int], unequal: Sequence[str]) -> str:
    """Whether a guarded run is its twin: "equal", "different", or "undefined".

    Args:
        guarded: The run.
        attempts: The faulty ones.
        unequal: Names of the entries of the final state in which the two differ.

    The twin has no fault and drops what was refused or undone. It says nothing about a run in which a faulty attempt
    stands, in which a proposal was accepted in part, or which trained at a lowered learning rate.
    """
    gone = guarded.taken_back.union(guarded.refused)
    if guarded.stopped or guarded.slowed or guarded.attenuated or not gone.issuperset(attempts):
        return "undefined"
    return "different" if unequal else "equal"


def statistic(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds for which a measure is defined, beside all values.

    Both are None if it is defined for none; the deviation is None if a value is infinite.
    """
    defined = [float(value) for value in values if value is not None]
    spread = None
    if defined and all(map(math.isfinite, defined)):
        spread = stdev(defined) if len(defined) > 1 else 0.0
    return {"mean": fmean(defined) if defined else None, "std": spread, "values": list(values)}


def statistics(runs: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """:func:`statistic` of every measure."""
    return {name: statistic([run[name] for run in runs]) for name in MEASURES}


def _difference(run: Trace, other: Trace) -> float | None:
    difference = run.final_probe - other.final_probe
    return None if math.isnan(difference) else difference
