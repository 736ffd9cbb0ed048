"""Every rule on the same recordings.

A rule is fed one stream of a recording: the probe with the gradient norm, the norm alone, or the training loss. On a
clean track everything it refuses is a false refusal. Where a branch leaves the track, a copy of the rule in the state
it had there follows the branch until it objects for the first time.

*Missed* means: still accepted at the first measurement that can know. For the probe that is the proposal itself. A loss
can first show damage with the next batch, and the norm of a bad gradient is known at once, but that of damaged weights
one step later: rules on loss and norm are given both. They are a step late where they say so; nothing is held against
them for it here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from dist_stability.bench.detection.contestants import Contestant, Judge
from dist_stability.bench.detection.events import HARM, NAMES, SIZES, size
from dist_stability.bench.detection.recordings import Branch, Recording, Streams

LATEST = {"probe": 0, "gradient": 1, "loss": 1}
"""By stream: the last measurement on a branch at which an event is not yet missed."""

SIGHT = (30, 20)
"""A natural instability is seen if the alarm comes at most so many steps before and after the spike's half height."""

LONGEST = 30
"""Refusals in a row on a clean track beyond which a rule counts as locked out."""


@dataclass
class Item:
    """What is judged at one attempt."""

    measurement: float
    norm: float | None = None
    rate: float | None = None
    loss: float | None = None


@dataclass
class Replay:
    """What one rule did on one recording.

    Attributes:
        attempts: Measurements that were judged on the track.
        refused: Their indices, where it refused.
        branches: By branch: index of the first refusal, None if there was none.
    """

    attempts: int
    refused: list[int] = field(default_factory=list)
    branches: list[int | None] = field(default_factory=list)


def items(streams: Streams, contestant: Contestant) -> list[Item]:
    """The stream a contestant watches."""
    if contestant.watches == "loss":
        return [Item(loss) for loss in streams.loss]
    if contestant.watches == "gradient":
        return [Item(0.0, norm) for norm in streams.norm]
    nothing: Sequence[float | None] = [None] * len(streams.norm)
    norms, losses = (streams.norm, streams.loss[:-1]) if contestant.sees_norm else (nothing, nothing)
    return [Item(*each) for each in zip(streams.probe, norms, streams.rate, losses, strict=True)]


def replay(recording: Recording, contestant: Contestant, threshold: float | None, *, branches: bool = True) -> Replay:
    """Follow one recording.

    Args:
        recording: What to replay.
        contestant: Who judges.
        threshold: Its threshold; None for the one it comes with.
        branches: False to stay on the track.
    """
    rule = contestant.build(threshold)
    if contestant.watches == "probe":
        rule.commit(recording.start)
    track = items(recording.streams, contestant)
    leaving: dict[int, list[int]] = {}
    for number, branch in enumerate(recording.branches if branches else []):
        leaving.setdefault(branch.step, []).append(number)
    result = Replay(len(track), branches=[None] * len(recording.branches))
    for index, item in enumerate(track):
        for number in leaving.get(index, ()):
            followed = items(recording.branches[number].streams, contestant)
            result.branches[number] = _first_refusal(copy.deepcopy(rule), followed)
        if not _step(rule, item):
            result.refused.append(index)
    return result


def _first_refusal(rule: Judge, branch: Sequence[Item]) -> int | None:
    return next((index for index, item in enumerate(branch) if not _step(rule, item)), None)


def _step(rule: Judge, item: Item) -> bool:
    """Judge one item and tell the rule what became of it; whether it was accepted."""
    expect = getattr(rule, "expect", None)
    if expect is not None:
        expect(steps=1, learning_rate=item.rate, training_loss=item.loss)
    accepted = rule.judge(item.measurement, item.norm).accepted
    (rule.commit if accepted else rule.reject)(item.measurement, item.norm)
    return accepted


@dataclass
class FalseRefusals:
    """What was refused on clean tracks.

    Attributes:
        refused: Measurements; for what only warns, alarms, each counted once however long it lasts.
        episodes: Streaks of refusals. On a recording a refusal changes nothing about what comes next, so one slow
            ripple of the probe may be refused many times; after a real restore it may or may not come again.
        longest: Longest streak.
        attempts: Measurements judged.
    """

    refused: int = 0
    episodes: int = 0
    longest: int = 0
    attempts: int = 0

    def add(self, result: Replay, *, warns: bool) -> None:
        """Count one more track."""
        streaks = _streaks(result.refused)
        self.refused += len(streaks) if warns else len(result.refused)
        self.episodes += len(streaks)
        self.longest = max(self.longest, *streaks, 0)
        self.attempts += result.attempts


def false_refusals(recordings: Sequence[Recording], contestant: Contestant, threshold: float | None) -> FalseRefusals:
    """What a rule refuses on the clean tracks."""
    counts = FalseRefusals()
    for recording in recordings:
        if recording.kind == "clean":
            counts.add(replay(recording, contestant, threshold, branches=False), warns=contestant.warns)
    return counts


def tune(recordings: Sequence[Recording], contestant: Contestant, budget: int) -> float | None:
    """The most sensitive threshold of the sweep that stays within a budget of false refusals on these recordings.

    Args:
        recordings: Of tuning seeds.
        contestant: Who is tuned; None is returned if it is not swept or is over budget at its most tolerant.
        budget: Episodes on all clean tracks together; a streak of more than :data:`LONGEST` is over any budget. All
            more tolerant thresholds must stay within it, too.
    """
    best = None
    for threshold in contestant.grid:
        counts = false_refusals(recordings, contestant, threshold)
        if counts.episodes > budget or counts.longest > LONGEST:
            break
        best = threshold
    return best


def measure(recordings: Sequence[Recording], contestant: Contestant, threshold: float | None) -> dict[str, Any]:
    """Everything a table says about one rule at one threshold.

    Args:
        recordings: Of reporting seeds.
        contestant: Who judges.
        threshold: Its threshold; None for the one it comes with.

    Returns:
        Of the clean tracks ``false_refusals``, ``clean_steps``, ``false_per_10k``, ``episodes_per_10k`` and
        ``longest_streak``. Of the events ``events``, ``missed`` and ``late`` (caught after the latest measurement) by
        size of damage, ``flagged_benign`` and ``median_event_delay``. Of the ramps ``ramps``, ``ramps_caught``,
        ``median_delay`` and ``median_damage`` (attempts committed, and nats, before the first alarm; a ramp that was
        not caught counts with its last damage). Of the natural runs ``natural``, ``natural_seen`` and
        ``natural_before`` (refusals long before the spike: a rule that refuses all the time sees everything). And the
        ``threshold``.
    """
    counts = FalseRefusals()
    events, missed, late = (dict.fromkeys(NAMES, 0) for _ in range(3))
    delays: list[int] = []
    ramps: list[tuple[int | None, float]] = []
    natural: list[bool] = []
    before_spike = 0
    latest = LATEST[contestant.watches]
    for recording in recordings:
        result = replay(recording, contestant, threshold)
        if recording.kind != "clean":
            spike = _spike(recording)
            if spike is not None:
                natural.append(any(spike - SIGHT[0] <= index <= spike + SIGHT[1] for index in result.refused))
                before_spike += sum(index < spike - SIGHT[0] for index in result.refused)
            continue
        counts.add(result, warns=contestant.warns)
        for branch, index in zip(recording.branches, result.branches, strict=True):
            if branch.kind == "ramp":
                ramps.append((index, _damage_at(branch, index, contestant.warns)))
                continue
            name = size(branch.damage[0][1], branch.damage[1][1])
            events[name] += 1
            caught = index is not None and index <= latest
            missed[name] += not caught
            late[name] += index is not None and not caught
            if index is not None and name in SIZES:
                delays.append(index)
    caught_ramps = [index for index, _ in ramps if index is not None]
    return {
        "threshold": contestant.original if threshold is None else threshold,
        "false_refusals": counts.refused,
        "clean_steps": counts.attempts,
        "false_per_10k": 1e4 * counts.refused / counts.attempts if counts.attempts else math.nan,
        "episodes_per_10k": 1e4 * counts.episodes / counts.attempts if counts.attempts else math.nan,
        "longest_streak": counts.longest,
        "events": events,
        "missed": missed,
        "late": late,
        "flagged_benign": events["benign"] - missed["benign"],
        "median_event_delay": median(delays) if delays else None,
        "ramps": len(ramps),
        "ramps_caught": len(caught_ramps),
        "median_delay": median(caught_ramps) if caught_ramps else None,
        "median_damage": median([damage for _, damage in ramps]) if ramps else None,
        "natural": len(natural),
        "natural_seen": sum(natural),
        "natural_before": before_spike,
    }


def harmful_share(measured: dict[str, Any]) -> float:
    """Share of the events with damage at once that were caught in time; NaN and infinities are not among them."""
    total = sum(measured["events"][name] for name in SIZES)
    return 1 - sum(measured["missed"][name] for name in SIZES) / total if total else math.nan


def guard_beside_rule(
    recordings: Sequence[Recording], guard: Contestant, rule: Contestant, *, harm: float = HARM
) -> dict[str, int]:
    """What a guard adds to a rule: counts of events by who objects to the bad step itself.

    An event counts as harmful if it did ``harm`` nats at once, or within the ordinary steps that follow (under Adam
    an enormous gradient does most of its harm later, out of the moments). Non-finite ones are left out: a guard for
    those is always on.

    Returns:
        Counts of harmful events seen by "both", "guard only", "rule only", "neither", and of "harmless" ones vetoed.
    """
    counts = dict.fromkeys(("harmful", "both", "guard only", "rule only", "neither", "harmless", "harmless vetoed"), 0)
    for recording in recordings:
        if recording.kind != "clean":
            continue
        pair = [replay(recording, contestant, None).branches for contestant in (guard, rule)]
        for branch, vetoed, refused in zip(recording.branches, *pair, strict=True):
            damage = [rise for _, rise in branch.damage]
            if branch.kind == "ramp" or not all(map(math.isfinite, damage)):
                continue
            if max(damage) < harm:
                counts["harmless"] += 1
                counts["harmless vetoed"] += vetoed == 0
                continue
            counts["harmful"] += 1
            names = {(True, True): "both", (True, False): "guard only", (False, True): "rule only"}
            counts[names.get((vetoed == 0, refused == 0), "neither")] += 1
    return counts


def _streaks(indices: Sequence[int]) -> list[int]:
    """Lengths of the runs of consecutive indices."""
    lengths: list[int] = []
    for position, index in enumerate(indices):
        if position and index == indices[position - 1] + 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths


def _damage_at(branch: Branch, index: int | None, warns: bool) -> float:
    """Rise after the attempts that were committed before an alarm; between two scores, on the line between them."""
    if index is None:
        return branch.damage[-1][1]
    committed = index + warns
    before = [0.0, 0.0]
    for after in branch.damage:
        if committed <= after[0]:
            share = (committed - before[0]) / (after[0] - before[0])
            return before[1] + share * (after[1] - before[1])
        before = after
    return before[1]


def _spike(recording: Recording) -> int | None:
    """Where the damage of a natural run first reaches half of its height; None if there was hardly any."""
    rises = [min(rise, 10.0) if math.isfinite(rise) else 10.0 for _, rise in recording.damage]
    half = max(rises) / 2
    return None if 2 * half < HARM else next(index for index, rise in enumerate(rises) if rise >= half)
