"""What the closed-loop comparison is made of: small tasks, faults, and the cells (task, fault, seed) they form.

Everything here is plain data; how a task is trained is in ``closed_tasks``, how a fault acts in ``closed_faults``.

Most faults start at attempt 120, when the small models descend fast: a lost step costs most there. A lasting fault is
measured against the run without it, every other one against *perfect rejection*, a run that leaves out exactly the
attempts the fault acts in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

TUNING_SEEDS = range(0, 100)
"""Seeds the rules were tuned on. Anything reported uses seeds >= 100."""

START = 120
"""First attempt of most faults."""

TAIL = 40
"""Attempts that follow the last one of a fault."""


@dataclass(frozen=True)
class ClosedTask:
    """How one small model is trained.

    Attributes:
        name: Name of the task in the results.
        data: "phrase", "english" or "digits".
        optimizer: "adamw" or "sgd" (momentum 0.9).
        learning_rate: Largest learning rate of the schedule.
        batch: Examples per step, over all ranks.
        clip: Gradients are clipped to this norm (the guard is given the norm before it); None for no clipping.
        ranks: Processes under DDP.
        schedule: "constant", "cosine", "steps", or "jumpN": N times the learning rate from attempt 200 on, announced.
    """

    name: str
    data: str
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    batch: int = 16
    clip: float | None = None
    ranks: int = 1
    schedule: str = "constant"


@dataclass(frozen=True)
class ClosedFault:
    """What goes wrong, in which attempts.

    Attributes:
        name: Name of the fault in the results.
        kind: What is done: see ``closed_faults.FaultAction``; "clean" for nothing at all.
        size: How strong, in the kind's own unit.
        start: First attempt it acts in.
        length: Attempts in a row.
        again: Start of a second window of the same length; None for none.
        lasting: Compared with the run without the fault instead of perfect rejection.
        tail: Attempts that follow.
    """

    name: str
    kind: str
    size: float = 1.0
    start: int = START
    length: int = 1
    again: int | None = None
    lasting: bool = False
    tail: int = TAIL

    @property
    def attempts(self) -> frozenset[int]:
        """The attempts it acts in."""
        first = set(range(self.start, self.start + self.length))
        return frozenset(first if self.again is None else first | set(range(self.again, self.again + self.length)))

    @property
    def end(self) -> int:
        """Attempts of the whole run."""
        return max(self.attempts, default=self.start - 1) + 1 + self.tail


@dataclass(frozen=True)
class Cell:
    """One comparison: all arms train this task with this seed through this fault."""

    task: ClosedTask
    fault: ClosedFault
    seed: int


MAIN_TASKS = (
    ClosedTask("phrase", "phrase"),
    ClosedTask("english", "english"),
    ClosedTask("cnnA", "digits", batch=32),
    ClosedTask("cnnS", "digits", optimizer="sgd", learning_rate=0.02, batch=32),
)
"""The four tasks that meet every fault."""

VARIANT_TASKS = (
    ClosedTask("phrase64", "phrase", batch=64),
    ClosedTask("english64", "english", batch=64),
    ClosedTask("english-clip", "english", clip=1.0),
    ClosedTask("cnnA-clip", "digits", batch=32, clip=1.0),
    ClosedTask("cnnS-clip", "digits", optimizer="sgd", learning_rate=0.02, batch=32, clip=1.0),
    ClosedTask("english-ddp2", "english", ranks=2),
    ClosedTask("cnnA-ddp2", "digits", batch=32, ranks=2),
)
"""Larger batches, clipped gradients and two ranks: they meet :data:`VARIANT_FAULTS`."""

SCHEDULES = ("constant", "cosine", "steps", "jump10", "jump50")
"""Schedules of the clean runs. The last two raise the learning rate at once, and say so."""

FAULTS = (
    # The twelve faults of this project's detector notes, and the ramp.
    ClosedFault("g300x1", "gradient-scale", 300.0),
    ClosedFault("g300x10", "gradient-scale", 300.0, length=10),
    ClosedFault("g300x30", "gradient-scale", 300.0, length=30),
    ClosedFault("g300x60", "gradient-scale", 300.0, length=60),
    ClosedFault("g30x10", "gradient-scale", 30.0, length=10),
    ClosedFault("lr30x3", "learning-rate", 30.0, length=3),
    ClosedFault("row100", "weight-row", 100.0),
    ClosedFault("flip10x5", "gradient-scale", -10.0, length=5),
    ClosedFault("shuf10", "shuffled-labels", length=10),
    ClosedFault("two60", "gradient-scale", 300.0, length=10, again=START + 60),
    ClosedFault("nan", "gradient-scale", float("nan")),
    ClosedFault("warm12", "gradient-scale", 300.0, start=12, length=10),
    ClosedFault("ramp", "learning-rate-ramp", 1.03, length=100, lasting=True),
    # Six more that the notes never tuned on.
    ClosedFault("lr30x30", "learning-rate", 30.0, length=30),
    ClosedFault("lr10x20", "learning-rate", 10.0, length=20),
    ClosedFault("g100x20", "gradient-scale", 100.0, length=20),
    ClosedFault("row10", "weight-row", 10.0),
    ClosedFault("flip100x3", "gradient-scale", -100.0, length=3),
    ClosedFault("shuf40", "shuffled-labels", length=40),
    # Sustained, and nothing but the probe can see it.
    ClosedFault("ascent60", "ascent", 0.2, length=60),
    ClosedFault("back60", "reversed-update", 10.0, length=60),
    ClosedFault("lr30x60", "learning-rate", 30.0, length=60),
    # Others.
    ClosedFault("warm20", "gradient-scale", 300.0, start=20, length=3),
    ClosedFault("repeat10", "repeated-token", length=10),
    ClosedFault("bits", "bit-flip"),
    ClosedFault("moment1e4", "second-moment", 1e4),
    ClosedFault("moment0", "second-moment", 0.0),
)
"""All faults."""

_VARIANT_NAMES = (
    "g300x1",
    "g300x10",
    "g30x10",
    "lr30x3",
    "row100",
    "flip10x5",
    "shuf10",
    "shuf40",
    "ascent60",
    "warm12",
)
VARIANT_FAULTS = tuple(fault for fault in FAULTS if fault.name in _VARIANT_NAMES)
"""The faults that variants of a task meet."""

CLEAN = ClosedFault("clean", "clean", start=0, length=0, lasting=True, tail=400)
"""No fault; 400 attempts."""


def fault_cells(seeds: Iterable[int]) -> Iterator[Cell]:
    """Every fault on the main tasks, and the variants' faults on the variants."""
    seeds = list(seeds)
    for tasks, faults in ((MAIN_TASKS, FAULTS), (VARIANT_TASKS, VARIANT_FAULTS)):
        for task in tasks:
            yield from (Cell(task, fault, seed) for seed in seeds for fault in faults)


def clean_cells(seeds: Iterable[int]) -> Iterator[Cell]:
    """Every main task on every schedule, without a fault."""
    seeds = list(seeds)
    for task in MAIN_TASKS:
        for schedule in SCHEDULES:
            named = replace(task, name=f"{task.name}-{schedule}", schedule=schedule)
            yield from (Cell(named, CLEAN, seed) for seed in seeds)


def announces_jump(task: str) -> bool:
    """Whether a clean cell's task, by name, raises its learning rate at once."""
    return "-jump" in task
