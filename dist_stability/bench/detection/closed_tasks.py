"""The small models of the closed-loop comparison: data in three disjoint parts, a model, one training step.

Training data, the probe's data and the data on which regret is scored are disjoint; no rule ever sees the last part.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from dist_stability.bench.detection.cells import ClosedFault, ClosedTask
from dist_stability.bench.detection.closed_faults import FaultAction
from dist_stability.experiments.data import Batch, BatchOrder, Examples, Subset, Windows, evenly
from dist_stability.experiments.tasks import cross_entropy
from dist_stability.experiments.text import CONTEXT, CharacterTransformer, load_text
from dist_stability.parallel import clip_grad_norm_
from dist_stability.report.extras import import_extra

_PHRASE = "the quick brown fox jumps over the lazy dog and runs away from the angry bear. "
_PHRASE_CHARACTERS = 120_000
_CORRUPTED = 0.02
PROBE_WINDOWS, SCORE_WINDOWS = 32, 128
CHANGE = 200
"""Attempt at which the schedules "steps" and "jumpN" change the learning rate."""


@dataclass(frozen=True)
class Parts:
    """A data set in three disjoint parts, and the model that learns it.

    Attributes:
        train: Training examples.
        probe: One batch: what the rule sees.
        score: One batch: what regret is scored on.
        build: Makes the model, from the global random stream.
    """

    train: Examples
    probe: Batch
    score: Batch
    build: Callable[[], nn.Module]


@cache
def load(data: str) -> Parts:
    """Load "phrase", "english" or "digits".

    "phrase" is one sentence over and over with 2 % of its characters replaced at random, so that held-out text differs
    from what was trained on.

    Raises:
        MissingExtra, TextUnavailable: The data are not on this machine.
    """
    if data == "digits":
        return _digits()
    text = load_text()
    if data == "phrase":
        draw = random.Random(0)
        alphabet = sorted(set(_PHRASE))
        text = (_PHRASE * (_PHRASE_CHARACTERS // len(_PHRASE) + 1))[:_PHRASE_CHARACTERS]
        text = "".join(draw.choice(alphabet) if draw.random() < _CORRUPTED else character for character in text)
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([numbers[character] for character in text])
    cut = [0, round(0.8 * len(tokens)), round(0.9 * len(tokens)), len(tokens)]
    train, probe, score = (Windows(tokens[a:b], CONTEXT) for a, b in pairwise(cut))
    return Parts(
        train,
        probe.batch(evenly(len(probe), PROBE_WINDOWS)),
        score.batch(evenly(len(score), SCORE_WINDOWS)),
        lambda: CharacterTransformer(len(numbers)),
    )


@dataclass(frozen=True)
class _Pixels:
    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    def batch(self, indices: Tensor) -> Batch:
        return self.pixels[indices], self.labels[indices]


def _digits() -> Parts:
    """1,797 digits of 8 x 8 pixels: three fifths for training, one for the probe, one for the score."""
    loaded = import_extra("sklearn.datasets", "the closed-loop comparison").load_digits()
    images = _Pixels(
        (torch.from_numpy(loaded.images).float()[:, None] / 16 - 0.305) / 0.375, torch.from_numpy(loaded.target).long()
    )
    fifth = torch.arange(len(images)) % 5
    train, probe, score = (
        Subset(images, torch.nonzero(mask).flatten()) for mask in (fifth < 3, fifth == 3, fifth == 4)
    )
    everything = (part.batch(torch.arange(len(part))) for part in (probe, score))
    return Parts(train, next(everything), next(everything), _small_cnn)


def _small_cnn() -> nn.Module:
    """Two convolutions with BatchNorm, on 8 x 8 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )


class Training:
    """One run of one task: model, optimizer, scheduler, data order. The same on every rank of a DDP job.

    Args:
        task: What to train.
        seed: Seed of the weights and of the data order.
        fault: What goes wrong, or None.
        attempts: Attempts of the whole run: the length of a cosine schedule.
        rank: This process.
        world: All of them.
    """

    def __init__(
        self, task: ClosedTask, seed: int, fault: ClosedFault, attempts: int, rank: int = 0, world: int = 1
    ) -> None:
        """Build everything from the seed."""
        self.task, self.parts, self._world = task, load(task.data), world
        torch.manual_seed(seed)
        self.module = self.parts.build()
        self.model: nn.Module = DistributedDataParallel(self.module) if world > 1 else self.module
        if task.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                self.model.parameters(), lr=task.learning_rate, momentum=0.9
            )
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=task.learning_rate)
        self.scheduler = LambdaLR(self.optimizer, lambda step: factor(task.schedule, step, attempts))
        self._order = BatchOrder(len(self.parts.train), task.batch, seed=seed, index=rank, count=world)
        self.fault = FaultAction(fault, self.module, self.optimizer, self._slope)

    def backward(self, attempt: int) -> tuple[float, float]:
        """Forward and backward of one attempt, with the fault's part in it; clips.

        Returns:
            The training loss, mean over ranks, and the global gradient norm before clipping.

        Collectives: under DDP those of its forward and backward, and one all-reduce.
        """
        self.fault.begin(attempt)
        self.model.train()
        batch = self.parts.train.batch(self._order.micro_batches(attempt)[0])
        loss = cross_entropy(self.model, self.fault.batch(batch))
        loss.backward()
        self.fault.gradients()
        norm = clip_grad_norm_(self.model, list(self.model.parameters()), self.task.clip or math.inf)
        loss = loss.detach()
        if self._world > 1:
            dist.all_reduce(loss.div_(self._world))
        return float(loss), float(norm)

    def loss(self, batch: Batch) -> float:
        """Mean cross-entropy on one batch, in eval mode; leaves the training flag alone."""
        training = self.module.training
        self.module.eval()
        with torch.no_grad():
            value = float(cross_entropy(self.module, batch))
        self.module.train(training)
        return value

    def agreed(self, *numbers: float) -> tuple[float, ...]:
        """Rank 0's numbers on every rank: under DDP, BatchNorm's buffers differ between two forwards.

        Collectives: under DDP one broadcast.
        """
        if self._world > 1:
            values = torch.tensor(numbers, dtype=torch.float64)
            dist.broadcast(values, 0)
            numbers = tuple(values.tolist())
        return numbers

    def snapshot(self) -> dict[str, Any]:
        """A deep copy of the training state."""
        parts = {"model": self.module, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}  # type: ignore[attr-defined]

    def load(self, snapshot: dict[str, Any]) -> None:
        """Take back a snapshot."""
        self.module.load_state_dict(snapshot["model"])
        self.optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))
        self.scheduler.load_state_dict(copy.deepcopy(snapshot["scheduler"]))

    def _slope(self) -> None:
        """Gradients of a fixed training batch, in eval mode so that BatchNorm's buffers stay."""
        self.module.eval()
        inputs, targets = self.parts.train.batch(evenly(len(self.parts.train), 64))
        functional.cross_entropy(self.module(inputs), targets.flatten()).backward()
        self.module.train()


def factor(schedule: str, step: int, steps: int) -> float:
    """Learning rate after so many accepted steps, as a fraction of the largest (``jumpN``: starts at 1 / N of it)."""
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        warm_up = 20
        return (step + 1) / warm_up if step < warm_up else 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps))
    if schedule == "steps":
        return 1.0 if step < CHANGE else 0.1
    if schedule.startswith("jump"):
        return 1.0 if step >= CHANGE else 1.0 / float(schedule.removeprefix("jump"))
    raise ValueError(f"schedule must be 'constant', 'cosine', 'steps' or 'jumpN', got {schedule!r}")
