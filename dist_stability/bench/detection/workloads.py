"""The training runs that are recorded: two tasks, three sizes, on one core in milliseconds per step."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_stability.experiments.data import Batch, BatchOrder, Examples, Images, Subset, evenly
from dist_stability.experiments.text import CharacterTransformer, load_windows
from dist_stability.report.extras import import_extra

SIZES = ("small", "medium", "large")
TASKS = ("english", "digits")

_TEXT = {"small": (32, 1, 2), "medium": (48, 2, 4), "large": (64, 2, 4)}  # width, layers, heads
_CHANNELS = {"small": 8, "medium": 16, "large": 24}
_SCHEDULES = {"small": "constant", "medium": "cosine", "large": "drop"}


@dataclass(frozen=True)
class Workload:
    """One training run, up to its seed.

    Attributes:
        task: "english" (next character, Transformer) or "digits" (8 x 8 images, two convolutions).
        size: One of :data:`SIZES`.
        optimizer: "adamw" or "sgd" (momentum 0.9).
        learning_rate: Peak.
        schedule: "constant", "cosine" (to a tenth) or "drop" (to 0.3 of it after 60 % of the run).
        warmup: Steps of linear warm-up.
        steps: Length of the run.
        normalized: Whether the model has its normalization layers.
    """

    task: str
    size: str
    optimizer: str
    learning_rate: float
    schedule: str
    warmup: int
    steps: int
    normalized: bool = True

    def scheduled(self, step: int) -> float:
        """Learning rate of one step."""
        part = step / self.steps
        shape = {
            "constant": 1.0,
            "cosine": 0.55 + 0.45 * math.cos(math.pi * part),
            "drop": 1.0 if part < 0.6 else 0.3,
        }[self.schedule]
        return self.learning_rate * shape * min(1.0, (step + 1) / max(1, self.warmup))


def standard(task: str, size: str, steps: int) -> Workload:
    """The clean run of a task and size: AdamW, but SGD for the medium digits."""
    sgd = (task, size) == ("digits", "medium")
    rate = 0.02 if sgd else {"english": 2e-3, "digits": 1e-3}[task]
    return Workload(task, size, "sgd" if sgd else "adamw", rate, _SCHEDULES[size], 50, steps)


@dataclass(frozen=True)
class Data:
    """Training examples, and two fixed held-out batches that share no example with them or each other.

    Attributes:
        train: What is trained on.
        probe: What rules may see.
        score: What no rule sees; damage is measured on it.
        classes: Number of characters, or of digits.
        batch_size: Examples per step.
    """

    train: Examples
    probe: Batch
    score: Batch
    classes: int
    batch_size: int


@cache
def load(task: str) -> Data:
    """Read a task's data; the held-out part is split between the probe and the score."""
    if task == "english":
        train, held_out, characters = load_windows()
        half = len(held_out) // 2  # the probe's windows come from the first half of the held-out text
        probe, score = held_out.batch(evenly(half - 64, 16)), held_out.batch(half + evenly(half, 48))
        return Data(train, probe, score, characters, 8)
    digits = import_extra("sklearn.datasets", "the benchmark's digits").load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 16
    images = Images(pixels, torch.from_numpy(digits.target).long(), (0.305,), (0.376,))
    fifth = torch.arange(len(images)) % 5
    probe, score = (images.batch((fifth == part).nonzero().flatten()) for part in (3, 4))
    return Data(Subset(images, (fifth < 3).nonzero().flatten()), probe, score, 10, 32)


class Lab:
    """A model in training whose state can be branched: what happens on a branch is undone by dropping it."""

    def __init__(self, workload: Workload, seed: int) -> None:
        """Build model, optimizer and data order from the seed."""
        self.workload, self.data = workload, load(workload.task)
        self.order = BatchOrder(len(self.data.train), self.data.batch_size, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = _model(workload, self.data.classes)
        parameters = self.model.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters)
            if workload.optimizer == "adamw"
            else torch.optim.SGD(parameters, momentum=0.9)
        )

    def branch(self) -> Lab:
        """An independent copy of model and optimizer; the data is shared."""
        twin = copy.copy(self)
        twin.model, twin.optimizer = copy.deepcopy((self.model, self.optimizer))
        return twin

    def batch(self, step: int) -> Batch:
        """The training batch of a step."""
        return self.data.train.batch(self.order.global_batch(step))

    def loss(self, batch: Batch) -> Tensor:
        """Training loss, with a graph; batch statistics move."""
        self.model.train()
        return self._cross_entropy(batch)

    def probe(self) -> float:
        """Loss on the probe set, in nats."""
        return self._evaluate(self.data.probe)

    def score(self) -> float:
        """Loss on the set that no rule sees, in nats."""
        return self._evaluate(self.data.score)

    def set_learning_rate(self, rate: float) -> None:
        """The same for all parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def gradient_norm(self) -> float:
        """Global norm of the gradients, before any clipping."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))

    def _evaluate(self, batch: Batch) -> float:
        self.model.eval()
        with torch.no_grad():
            return float(self._cross_entropy(batch))

    def _cross_entropy(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        return functional.cross_entropy(self.model(inputs), targets.flatten())


def _model(workload: Workload, classes: int) -> nn.Module:
    if workload.task == "english":
        width, layers, heads = _TEXT[workload.size]
        model: nn.Module = CharacterTransformer(classes, width=width, layers=layers, heads=heads)
    else:
        channels = _CHANNELS[workload.size]
        model = nn.Sequential(
            *(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * channels, classes)),
        )
    return model if workload.normalized else _without_normalization(model)


def _without_normalization(model: nn.Module) -> nn.Module:
    def strip(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm | nn.BatchNorm2d):
                replacement: Any = nn.Identity()
                setattr(module, name, replacement)
            else:
                strip(child)

    strip(model)
    return model
