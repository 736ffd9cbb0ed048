"""Recorded training runs: what rules are replayed on, written as they are made and not made twice.

A *recording* is a run on its main track. From it leave *branches*: a copy of the state on which something bad happens,
for one step (an event, followed a few ordinary steps further) or for many (a ramp of the learning rate). What happens
on a branch never reaches the track.

Streams are aligned by attempt ``t``: ``loss[t]`` is the loss of the attempt's own batch before the update, ``norm[t]``
the norm of its gradients, ``probe[t]`` the probe of the weights it proposed, ``loss[t + 1]`` the next batch's loss
under those weights (so there is one more loss than attempts), ``rate[t]`` the learning rate the schedule announces.
Damage is the rise of the loss on a set that no rule sees.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_stability.bench.detection.events import RANGES, Event, draw
from dist_stability.bench.detection.pool import run_jobs
from dist_stability.bench.detection.workloads import SIZES, TASKS, Lab, Workload, standard
from dist_stability.experiments.data import Batch
from dist_stability.report.events import read_json, write_json

AFTERMATH = 6
"""Ordinary steps that follow an event on its branch."""

RAMP_STEPS, RAMP_GROWTH = 150, 1.03
"""A ramp multiplies the learning rate by this growth at every step, unannounced."""

RAMP_ENDS = 2.0
"""Nats of damage after which a ramp need not go on."""

CORRUPTED = (150, 180)
"""Steps of the natural run "corrupted data" whose batches are noise."""


@dataclass
class Streams:
    """What was measured, attempt by attempt; see the module's docstring."""

    probe: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)


@dataclass
class Branch:
    """Something bad that happened to a copy of the state.

    Attributes:
        kind: Kind of event, or "ramp".
        factor: Of the event; growth per step of a ramp.
        step: Attempt of the track that its first attempt replaces.
        streams: From that attempt on.
        damage: Pairs (attempts on the branch, rise in nats). The first of an event is the rise over the state before
            it. All others (an event's second, after the ordinary steps that follow; a ramp's) are over the track at
            the same place.
    """

    kind: str
    factor: float
    step: int
    streams: Streams
    damage: list[list[float]]


@dataclass
class Recording:
    """One run.

    Attributes:
        name: Of its file.
        kind: "clean", or a kind of natural instability.
        seed: Seed of weights, data order and events.
        settings: What it was made from; another value makes it again.
        start: Probe of the first weights.
        streams: The track.
        branches: Only of clean runs.
        damage: Pairs (attempts, rise over the lowest score so far), only of natural runs.
    """

    name: str
    kind: str
    seed: int
    settings: dict[str, Any]
    start: float
    streams: Streams
    branches: list[Branch] = field(default_factory=list)
    damage: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What is to be recorded.

    Attributes:
        name: Of the recording.
        kind: "clean" or a kind of natural instability.
        seed: Its seed.
        workload: What is trained.
        slots: Steps at which events branch off.
        events: Events per slot.
        ramps: Steps at which ramps branch off.
    """

    name: str
    kind: str
    seed: int
    workload: Workload
    slots: tuple[int, ...] = ()
    events: int = 2
    ramps: tuple[int, ...] = ()


def plans(
    seeds: list[int],
    *,
    steps: int = 1300,
    slots: int = 20,
    natural_steps: int = 300,
    sizes: Sequence[str] = SIZES,
) -> list[Plan]:
    """All recordings of some seeds: for each, clean runs of both tasks in all sizes, and eight natural instabilities.

    Every clean run has one ramp, those of every other seed two: 18 over two seeds.
    """
    made = []
    for index, seed in enumerate(seeds):
        for task in TASKS:
            for size in sizes:
                first = min(80, steps // 4)
                at = tuple(first + (steps - first - 10) * slot // slots for slot in range(slots))
                ramps = (steps * 2 // 5,) if index % 2 else (steps * 2 // 5, steps * 3 // 5)
                workload = standard(task, size, steps)
                made.append(Plan(f"clean-{task}-{size}-{seed}", "clean", seed, workload, at, 2, ramps))
            made += [
                Plan(f"{kind.replace(' ', '-')}-{task}-{seed}", kind, seed, workload)
                for kind, workload in natural(task, natural_steps).items()
            ]
    return made


def natural(task: str, steps: int) -> dict[str, Workload]:
    """Runs that go wrong by themselves, or through their data; chosen on tuning seeds."""
    base = standard(task, "medium", steps)
    high = {"english": 2e-2, "digits": 0.3}[task]
    return {
        "no norm layer": replace(base, normalized=False, learning_rate=high / 2, schedule="constant"),
        "lr near the edge": replace(base, learning_rate=high * 2, schedule="constant"),
        "no warm-up": replace(base, learning_rate=high, schedule="constant", warmup=0),
        "corrupted data": replace(base, schedule="constant"),
    }


def record(plan: Plan) -> Recording:
    """Train one run and keep what was measured; about ten seconds for a clean one."""
    torch.set_num_threads(1)
    lab = Lab(plan.workload, plan.seed)
    source = random.Random(zlib.crc32(plan.name.encode()))
    kinds = tuple(RANGES)
    made = Recording(plan.name, plan.kind, plan.seed, asdict(plan), lab.probe(), Streams())
    lowest = lab.score()
    waiting: dict[int, list[list[float]]] = {}  # by step: damage from which the track's score is yet to be taken
    drawn = 0
    for step in range(plan.workload.steps):
        if step in plan.slots:
            before = lab.score()
            for _ in range(plan.events):
                # Kinds in turn, so that all are equally common; what they do is drawn.
                made.branches.append(_event(lab, step, before, draw(kinds[drawn % len(kinds)], source)))
                waiting.setdefault(step + AFTERMATH, []).append(made.branches[-1].damage[1])
                drawn += 1
        if step in plan.ramps:
            made.branches.append(_ramp(lab, step))
            for pair in made.branches[-1].damage:
                waiting.setdefault(step + int(pair[0]) - 1, []).append(pair)
        noise = plan.kind == "corrupted data" and CORRUPTED[0] <= step < CORRUPTED[1]
        _attempt(lab, step, made.streams, batch=_noise(lab, step) if noise else None)
        if step in waiting:
            score = lab.score()
            for pair in waiting.pop(step):
                pair[1] -= score
        if plan.kind != "clean":
            score = lab.score()
            made.damage.append([step + 1, score - lowest])
            lowest = min(lowest, score)
    made.streams.loss.append(_next_loss(lab, plan.workload.steps))
    return made


def load_or_record(
    wanted: list[Plan], folder: Path, *, workers: int, done: Callable[[str], None] = lambda name: None
) -> list[Recording]:
    """Read the recordings a folder has and make the others, each in a file of its own as it is finished.

    Args:
        wanted: What is needed.
        folder: Where the files are; made if it is not there.
        workers: Processes that record.
        done: Called with the name of each recording that is ready.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {plan.name: read(plan, folder) for plan in wanted}
    for name, recording in found.items():
        if recording is not None:
            done(name)
    missing = sorted((plan for plan in wanted if found[plan.name] is None), key=lambda plan: -plan.workload.steps)
    made = run_jobs([partial(_record_to, plan, folder) for plan in missing], workers, lambda i: done(missing[i].name))
    found |= {recording.name: recording for recording in made}
    return [recording for recording in found.values() if recording is not None]


def _record_to(plan: Plan, folder: Path) -> Recording:
    made = record(plan)
    write_json(folder / f"{plan.name}.json", asdict(made))
    return made


def read(plan: Plan, folder: Path) -> Recording | None:
    """The recording of a plan, or None if the folder has none that was made from exactly this plan."""
    path = folder / f"{plan.name}.json"
    if not path.is_file():
        return None
    saved = read_json(path)
    settings = asdict(plan)
    if saved["settings"] != {**settings, "slots": list(plan.slots), "ramps": list(plan.ramps)}:
        return None
    branches = [Branch(**{**branch, "streams": Streams(**branch["streams"])}) for branch in saved["branches"]]
    return Recording(**{**saved, "streams": Streams(**saved["streams"]), "branches": branches})


def _attempt(
    lab: Lab,
    step: int,
    streams: Streams,
    *,
    event: Event | None = None,
    batch: Batch | None = None,
    factor: float = 1.0,
) -> None:
    """One optimizer step of a lab, measured."""
    parameters = list(lab.model.parameters())
    announced = lab.workload.scheduled(step)
    batch = lab.batch(step) if batch is None else batch
    loss = lab.loss(event.batch(batch) if event else batch)
    lab.optimizer.zero_grad()
    loss.backward()
    if event:
        event.gradients(parameters)
    norm = lab.gradient_norm()
    lab.set_learning_rate(announced * factor * (event.learning_rate if event else 1.0))
    lab.optimizer.step()
    if event:
        event.weights(parameters)
    streams.loss.append(float(loss.detach()))
    streams.norm.append(norm)
    streams.rate.append(announced)
    streams.probe.append(lab.probe())


def _event(track: Lab, step: int, before: float, event: Event) -> Branch:
    lab, streams = track.branch(), Streams()
    _attempt(lab, step, streams, event=event)
    damage = [[1, lab.score() - before]]
    for later in range(step + 1, step + 1 + AFTERMATH):
        _attempt(lab, later, streams)
    damage.append([1 + AFTERMATH, lab.score()])
    streams.loss.append(_next_loss(lab, step + 1 + AFTERMATH))
    return Branch(event.kind, event.factor, step, streams, damage)


def _ramp(track: Lab, step: int) -> Branch:
    lab, streams = track.branch(), Streams()
    before = lab.score()
    damage: list[list[float]] = []
    for index in range(min(RAMP_STEPS, lab.workload.steps - step)):
        _attempt(lab, step + index, streams, factor=RAMP_GROWTH ** (index + 1))
        if index % 3 == 2:
            damage.append([index + 1, lab.score()])
            if not damage[-1][1] - before <= RAMP_ENDS:  # True for NaN
                break
    streams.loss.append(_next_loss(lab, step + len(streams.probe)))
    return Branch("ramp", RAMP_GROWTH, step, streams, damage)


def _noise(lab: Lab, step: int) -> Batch:
    """A batch of the same shape that means nothing: random inputs, random targets."""
    inputs, targets = lab.batch(step)
    generator = torch.Generator().manual_seed(step)
    random_targets = torch.randint(lab.data.classes, targets.shape, generator=generator)
    if inputs.dtype == torch.int64:
        return torch.randint(lab.data.classes, inputs.shape, generator=generator), random_targets
    return torch.randn(inputs.shape, generator=generator), random_targets


def _next_loss(lab: Lab, step: int) -> float:
    with torch.no_grad():
        return float(lab.loss(lab.batch(step)))
