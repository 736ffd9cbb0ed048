"""A public trace of a real spike: BLOOM-176B, iterations 31214 to 31222.

The nine log lines are in bigscience-workshop/bigscience, ``train/tr11-176B-ml/chronicles.md``. Rules need history, of
which the log gives only that the loss was "about 2.2" before; the norm of the first line serves as its usual value. The
lead-in is therefore **made up**: 300 steps of ``2.2 + 0.02 e`` and ``0.242 exp(0.1 e')`` with Gaussian noise, twenty
times with different seeds. What a rule says about the nine lines depends on that noise, which is why the spread over
the twenty is reported.

A log line holds the loss before its own update, and no probe: a rule for the probe is given the training loss instead,
which is noisier and one step late.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import median
from typing import Any

from dist_stability.bench.detection.contestants import Contestant

FIRST_ITERATION = 31214
LOSS = (2.199, 2.220, 2.595, 2.242, 2.345, 5.098, 3.492, 3.213, 2.805)
NORM = (0.242, 0.947, 2.39, 15.9, 145.0, 960.0, 353.0, 379.0, 650.0)
PEAK = LOSS.index(max(LOSS))

LEAD_STEPS, LEAD_INS = 300, 20
_LOSS_LEVEL, _LOSS_NOISE, _NORM_NOISE = 2.2, 0.02, 0.1


@dataclass(frozen=True)
class Lead:
    """A made-up history before the trace."""

    loss: tuple[float, ...]
    norm: tuple[float, ...]


def lead_in(seed: int) -> Lead:
    """One of the twenty."""
    source = random.Random(seed)
    noise = [(source.gauss(0, 1), source.gauss(0, 1)) for _ in range(LEAD_STEPS)]
    return Lead(
        tuple(_LOSS_LEVEL + _LOSS_NOISE * e for e, _ in noise),
        tuple(NORM[0] * math.exp(_NORM_NOISE * e) for _, e in noise),
    )


def bloom(contestant: Contestant, threshold: float | None) -> dict[str, Any]:
    """When one rule first objects to the trace.

    Returns:
        ``seen`` (of ``lead_ins``) with an alarm in the nine lines; ``median``, ``earliest`` and ``latest`` line of the
        first alarm, counted from the peak (-5 is the first line, 0 the peak); ``false_in_lead``: refusals per 10,000
        steps of lead-in.
    """
    alarms: list[int] = []
    refused = 0
    for seed in range(100, 100 + LEAD_INS):
        rule, lead = contestant.build(threshold), lead_in(seed)
        measurements = [0.0 if contestant.watches == "gradient" else loss for loss in (*lead.loss, *LOSS)]
        norms = (*lead.norm, *NORM)
        sees_norm = contestant.watches == "gradient" or (contestant.watches == "probe" and contestant.sees_norm)
        first = None
        for index, (measurement, norm) in enumerate(zip(measurements, norms, strict=True)):
            given = norm if sees_norm else None
            accepted = rule.judge(measurement, given).accepted
            (rule.commit if accepted else rule.reject)(measurement, given)
            if not accepted and index < LEAD_STEPS:
                refused += 1
            elif not accepted and first is None:
                first = index - LEAD_STEPS
        if first is not None:
            alarms.append(first - PEAK)
    return {
        "seen": len(alarms),
        "lead_ins": LEAD_INS,
        "median": median(alarms) if alarms else None,
        "earliest": min(alarms, default=None),
        "latest": max(alarms, default=None),
        "false_in_lead": 1e4 * refused / (LEAD_INS * LEAD_STEPS),
    }
