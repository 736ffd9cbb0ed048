"""The tasks of the training program: a data set with held-out parts, a model, a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_stability.experiments import text, vision
from dist_stability.experiments.data import Batch, Examples, Subset, evenly

TEXT_TASKS = ("text", "phrase")
TASKS = (*TEXT_TASKS, "digits", "distorted-digits", "cifar10")

EVALUATION_EXAMPLES = 256
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Task:
    """What is trained, and on what.

    Attributes:
        name: Name on the command line.
        data: What the data are called in titles.
        train: Training examples.
        probe: Held-out examples the probe may use.
        evaluation: Held-out examples that neither training nor the probe touches.
        build: Makes the model, from the global random stream.
        blocks: The parts of a built model that FSDP shards one by one.
    """

    name: str
    data: str
    train: Examples
    probe: Examples
    evaluation: Examples
    build: Callable[[], nn.Module]
    blocks: Callable[[nn.Module], Sequence[nn.Module]]

    def probe_batches(self, size: int, pieces: int = 1) -> list[Batch]:
        """A fixed probe set of ``size`` examples, spread evenly over the probe's part, in ``pieces`` equal batches."""
        if size % pieces:
            raise ValueError(f"a probe of {size} examples cannot be cut into {pieces} equal batches")
        return [self.probe.batch(piece) for piece in evenly(len(self.probe), size).chunk(pieces)]

    def evaluation_batches(self) -> list[Batch]:
        """A fixed evaluation set, disjoint from training and probe, in batches of equal size."""
        batches = max(1, min(EVALUATION_EXAMPLES, len(self.evaluation)) // EVALUATION_BATCH)
        size = min(EVALUATION_BATCH, len(self.evaluation))
        return [self.evaluation.batch(piece) for piece in evenly(len(self.evaluation), batches * size).chunk(batches)]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats: over positions for text, over images for classification."""
    inputs, targets = batch
    # In float32 whatever the model computes in: a loss rounded to bfloat16 moves in steps that look like noise.
    return functional.cross_entropy(model(inputs).float(), targets.flatten())


def make_task(
    name: str,
    *,
    data: Path | None = None,
    dropout: float = 0.0,
    width: int = text.WIDTH,
    layers: int = text.LAYERS,
) -> Task:
    """Load a task's data and describe its model.

    Args:
        name: One of :data:`TASKS`.
        data: Folder with the data set, for ``cifar10``.
        dropout: Dropout probability of the Transformer, for ``text`` and ``phrase``.
        width: Of its residual stream.
        layers: Its blocks.

    Raises:
        ValueError: Unknown name.
        DataMissing, MissingExtra, TextUnavailable: What the task needs is not there; the message says what to do.
    """
    train: Examples
    held_out: Examples
    if name in TEXT_TASKS:
        corpus = text.repeated_phrase() if name == "phrase" else text.load_text()
        train, held_out, characters = text.load_windows(corpus)
        build: Callable[[], nn.Module] = partial(
            text.CharacterTransformer, characters, width=width, layers=layers, dropout=dropout
        )
        blocks: Callable[[nn.Module], Sequence[nn.Module]] = _transformer_blocks
        title = text.PHRASE_NAME if name == "phrase" else text.DATA_NAME
    elif name in TASKS:
        if name == "cifar10":
            (train, held_out), title = vision.load_cifar10(data), vision.CIFAR10_NAME
        elif name == "digits":
            (train, held_out), title = vision.load_digits(), vision.DIGITS_NAME
        else:
            (train, held_out), title = vision.load_distorted_digits(), vision.DISTORTED_NAME
        build, blocks = vision.resnet18, vision.resnet_blocks
    else:
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    half = len(held_out) // 2
    # Windows overlap their neighbours: the gap keeps the probe's text out of the evaluation's.
    gap = text.CONTEXT if name in TEXT_TASKS else 0
    return Task(
        name=name,
        data=title,
        train=train,
        probe=Subset(held_out, torch.arange(half)),
        evaluation=Subset(held_out, torch.arange(half + gap, len(held_out))),
        build=build,
        blocks=blocks,
    )


def _transformer_blocks(model: nn.Module) -> Sequence[nn.Module]:
    return list(model.get_submodule("blocks").children())
