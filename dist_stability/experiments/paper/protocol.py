"""What the experiments fix: sizes, faults and arms, by the names used on the command line, in folders and in tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dist_stability.experiments.vision import CIFAR10_FOLDER

EXPERIMENTS = ("text", "vision")
PARALLEL = ("single", "ddp", "fsdp2")
RANKS = 2
"""Processes of a run under "ddp" and "fsdp2"."""

NO_FAULT = "none"
"""Folder of the arms that no fault touches: they are run once."""

MAIN_FAULT = "g300x10"
"""The paper's: gradients x300 for 10 steps."""

FAULTS = (MAIN_FAULT, "g1000x1", "shuffle10", "lr30x3", "nan", "bitflip", "warmup", "two-windows")

PAPER_EPSILON, PAPER_ALPHA = 0.5, 0.1

TUNED, GUARDED, TWIN, ROLLBACK = "paper-tuned", "guarded", "twin", "loss-rollback"

ARM_WORDS: dict[str, tuple[str, ...]] = {
    "clean": ("--rule", "off", "--state-digest"),
    "guarded-clean": ("--rule", "predictive", "--state-digest"),
    "baseline": ("--rule", "off"),
    GUARDED: ("--rule", "predictive", "--state-digest"),
    TWIN: ("--rule", "off", "--state-digest"),
    "paper": ("--rule", "fixed", "--epsilon", str(PAPER_EPSILON), "--alpha", str(PAPER_ALPHA)),
    ROLLBACK: ("--rule", "loss-rollback"),
    "clip": ("--rule", "off", "--clip-grad-norm", "1.0"),
    "zclip": ("--rule", "off", "--zclip"),
    TUNED: ("--rule", "fixed"),
}
"""What each arm adds to the command line, in the order in which arms are run. The twin's dropped batches, and
what is searched for "paper-tuned" and "loss-rollback", come from other runs."""

ARMS = tuple(ARM_WORDS)
FAULTLESS = ("clean", "guarded-clean")
"""Arms without a fault. The twin has none either, but depends on one: it drops what the guarded run refused."""


@dataclass(frozen=True)
class Injection:
    """One kind of fault, placed in the run.

    Attributes:
        name: One of :data:`FAULTS`.
        title: What it is, for people.
        windows: First attempt and number of attempts of each stretch it acts in.
        specs: What ``--inject`` is given, once for each stretch.
    """

    name: str
    title: str
    windows: tuple[tuple[int, int], ...]
    specs: tuple[str, ...]

    @property
    def start(self) -> int:
        """The first faulty attempt."""
        return self.windows[0][0]

    @property
    def attempts(self) -> frozenset[int]:
        """All faulty attempts."""
        return frozenset(attempt for start, length in self.windows for attempt in range(start, start + length))


@dataclass(frozen=True)
class Protocol:
    """The numbers of an experiment.

    Attributes:
        experiment: One of :data:`EXPERIMENTS`.
        tasks: Of the training program; the first one is the main one.
        steps: Batches of a run.
        batch_size: Examples, over all processes.
        lr: Learning rate, constant.
        probe_size: Held-out examples in the probe.
        start: First faulty attempt.
        length: Attempts of a stretch of faults.
        early: First attempt of the fault "warmup".
        second: First attempt of the second of "two-windows".
        tuning_seeds: Of the searches, and of nothing else.
        epsilons: Searched first, with the paper's alpha; from large to small.
        alphas: Searched then, with the best epsilon.
        windows: Losses in the statistics of the rollback on training-loss spikes; from long to short.
        batch_statistics: BatchNorm in the probe uses the probe's own statistics.
        width: Of the Transformer; None for the usual one, or for another model.
        layers: Likewise.
    """

    experiment: str
    tasks: tuple[str, ...]
    steps: int = 250
    batch_size: int = 64
    lr: float = 5e-4
    probe_size: int = 16
    start: int = 120
    length: int = 10
    early: int = 12
    second: int = 180
    tuning_seeds: tuple[int, ...] = (1000, 1001, 1002)
    epsilons: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
    alphas: tuple[float, ...] = (0.3, 1.0)
    windows: tuple[int, ...] = (128, 64, 32, 16)
    batch_statistics: bool = False
    width: int | None = None
    layers: int | None = None

    @property
    def gamma(self) -> float:
        """The paper's estimate of the probe's cost, relative to forward and backward: |probe| / (3 |batch|)."""
        return self.probe_size / (3 * self.batch_size)

    def words(self, task: str) -> tuple[str, ...]:
        """The part of the command line that every run of a task shares."""
        return (
            *("--task", task, "--steps", str(self.steps), "--batch-size", str(self.batch_size), "--lr", str(self.lr)),
            *("--warmup", "0", "--schedule", "constant", "--optimizer", "adamw"),
            *("--probe-size", str(self.probe_size), "--parameter-norm"),
            *(("--probe-batch-statistics",) if self.batch_statistics else ()),
            *(() if self.width is None else ("--width", str(self.width))),
            *(() if self.layers is None else ("--layers", str(self.layers))),
        )

    def injection(self, name: str, world_size: int = 1) -> Injection:
        """A fault by its name, for so many processes.

        Raises:
            ValueError: Unknown name.
        """
        start, length = self.start, self.length
        window = ((start, length),)
        match name:
            case "g300x10":
                return _scaled(name, f"gradients x300 for {length} steps", 300, *window)
            case "g1000x1":
                return _scaled(name, "gradients x1000 for one step", 1000, (start, 1))
            case "shuffle10":
                spec = f"shuffled-labels:step={start},length={length}"
                return Injection(name, f"labels shuffled for {length} steps", window, (spec,))
            case "lr30x3":
                spec = f"learning-rate:step={start},factor=30,length=3"
                return Injection(name, "learning rate x30 for 3 steps", ((start, 3),), (spec,))
            case "nan":
                spec = f"nan:step={start},rank={world_size - 1}"
                return Injection(name, "one NaN in one rank's gradient", ((start, 1),), (spec,))
            case "bitflip":
                # The bit that does harm: the run is lost to inf or NaN. What the other bits of the largest weight do,
                # sign, mantissa, low exponent, is trained away within a few steps.
                spec = f"bit-flip:step={start},rank=0,where=parameter,bit=top-exponent"
                return Injection(name, "top exponent bit of the largest weight flipped", ((start, 1),), (spec,))
            case "warmup":
                return _scaled(name, f"gradients x300 for {length} steps from {self.early}", 300, (self.early, length))
            case "two-windows":
                title = f"gradients x300 for {length} steps, twice"
                return _scaled(name, title, 300, (start, length), (self.second, length))
        raise ValueError(f"unknown fault {name!r}; known: {', '.join(FAULTS)}")


def protocol(
    experiment: str,
    *,
    data: Path | None = None,
    quick: bool = False,
    probe_size: int | None = None,
    width: int | None = None,
    layers: int | None = None,
) -> Protocol:
    """The protocol of an experiment.

    Args:
        experiment: One of :data:`EXPERIMENTS`.
        data: Folder that may hold CIFAR-10; without it, vision is scikit-learn's digits.
        probe_size: Held-out examples in the probe; default 16 for text, 128 for vision.
        width: Of the Transformer of text, if not the usual one.
        layers: Likewise.
        quick: A few steps of everything, to see that it runs; no number of it means anything.

    Raises:
        ValueError: Unknown experiment, or a probe of nothing.
    """
    if probe_size is not None and probe_size < 1:
        raise ValueError(f"--probe-size {probe_size}: must be at least 1")
    if experiment == "text":
        chosen = Protocol("text", ("phrase", "text"), width=width, layers=layers)
    elif experiment == "vision":
        if width is not None or layers is not None:
            raise ValueError("--width, --layers: are of the Transformer; ResNet-18 has its own")
        has_cifar10 = data is not None and (data / CIFAR10_FOLDER).is_dir()
        tasks = ("cifar10",) if has_cifar10 else ("distorted-digits", "digits")
        chosen = Protocol(
            "vision", tasks, batch_size=128, lr=1e-3, probe_size=128, batch_statistics=True, tuning_seeds=(1000,)
        )
    else:
        raise ValueError(f"unknown experiment {experiment!r}: choose from {', '.join(EXPERIMENTS)}")
    if not quick:
        return chosen if probe_size is None else replace(chosen, probe_size=probe_size)
    return replace(
        chosen,
        steps=14,
        batch_size=8,
        probe_size=4 if probe_size is None else probe_size,
        start=6,
        length=2,
        early=3,
        second=10,
        tuning_seeds=(1000,),
        epsilons=(1.0, 0.1),
        alphas=(0.3,),
        windows=(128, 8),
    )


def _scaled(name: str, title: str, factor: int, *windows: tuple[int, int]) -> Injection:
    specs = [
        f"gradient-scale:step={start},factor={factor}" + (f",length={length}" if length > 1 else "")
        for start, length in windows
    ]
    return Injection(name, title, windows, tuple(specs))
