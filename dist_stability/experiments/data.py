"""Training data in an order that depends on the seed and the attempt alone, not on how many processes share it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

Batch = tuple[Tensor, Tensor]
"""Inputs and targets; the first dimension counts examples."""


class Examples(Protocol):
    """A data set that lies in memory and is read by index."""

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, indices: Tensor) -> Batch:
        """Inputs and targets of the examples with these indices (1-d, int64)."""


@dataclass(frozen=True)
class Windows:
    """Every window of ``context`` tokens of one long text; the target of each position is the next token.

    Attributes:
        tokens: The text, 1-d int64.
        context: Length of a window.
    """

    tokens: Tensor
    context: int

    def __len__(self) -> int:
        """Number of start positions."""
        return max(0, self.tokens.numel() - self.context)

    def batch(self, indices: Tensor) -> Batch:
        """Two tensors of shape (examples, context)."""
        windows = self.tokens[indices[:, None] + torch.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Images:
    """Images with labels.

    Attributes:
        pixels: uint8 or float, (examples, channels, height, width); uint8 is scaled to [0, 1].
        labels: int64, (examples,).
        mean: Per channel, subtracted.
        std: Per channel, divided by.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        """Number of images."""
        return self.labels.numel()

    def batch(self, indices: Tensor) -> Batch:
        """Normalized float32 images and their labels."""
        return self.normalized(self.pixels[indices]), self.labels[indices]

    def normalized(self, pixels: Tensor) -> Tensor:
        """Pixels like those of this set, as a model gets them: float32."""
        scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (self.mean, self.std))
        return (scaled - mean) / std


class Distorted:
    """Every image in several affine distortions, each fixed: a larger set, and never the same image twice in an epoch.

    Rotated by up to 20 degrees, sheared by up to 0.2, scaled by 0.8 to 1.2 in each direction (the ranges of affNIST,
    Tieleman 2013) and moved by up to an eighth of the picture (the usual crop of CIFAR-10).

    Args:
        images: What is distorted; float pixels.
        copies: Distortions of each image; example ``i`` is image ``i // copies``.
        seed: Of the distortions.
    """

    def __init__(self, images: Images, copies: int, seed: int) -> None:
        """Draw the distortions; images are made when they are asked for."""
        self._images, self._copies = images, copies
        drawn = torch.rand(copies * len(images), 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        angle, shear, wide, high, right, down = (drawn * torch.tensor([math.radians(20), 0.2, 0.2, 0.2, 0.25, 0.25])).T
        cos, sin, wide, high = angle.cos(), angle.sin(), 1 / (1 + wide), 1 / (1 + high)
        rows = (wide * cos, wide * (shear * cos - sin), right, high * sin, high * (shear * sin + cos), down)
        self._maps = torch.stack(rows, dim=1).view(-1, 2, 3)

    def __len__(self) -> int:
        """Number of distorted images."""
        return len(self._maps)

    def batch(self, indices: Tensor) -> Batch:
        """Normalized float32 images and their labels; what comes in from outside the picture is background."""
        chosen = indices // self._copies
        pixels = self._images.pixels[chosen]
        grid = functional.affine_grid(self._maps[indices], list(pixels.shape), align_corners=False)
        moved = functional.grid_sample(pixels, grid, align_corners=False)
        return self._images.normalized(moved), self._images.labels[chosen]


@dataclass(frozen=True)
class Subset:
    """Some examples of another set, in a fixed order."""

    examples: Examples
    indices: Tensor

    def __len__(self) -> int:
        """Number of examples kept."""
        return self.indices.numel()

    def batch(self, indices: Tensor) -> Batch:
        """The batch of the underlying set."""
        return self.examples.batch(self.indices[indices])


class BatchOrder:
    """Which examples are in which batch.

    Examples are drawn without replacement, epoch by epoch; an incomplete last batch is left out. The order is a
    function of (seed, batch number): nothing is consumed, so a run that drops batches, or is continued, sees every
    other batch unchanged, and the content of a global batch is the same for any number of processes.

    Args:
        examples: Size of the training set.
        batch_size: Global batch, in examples, over all data replicas and micro-batches.
        seed: Seed of the order.
        index: Data replica of this process.
        count: Number of data replicas.
        accumulate: Micro-batches in which a process reads its share.
    """

    def __init__(
        self, examples: int, batch_size: int, *, seed: int, index: int = 0, count: int = 1, accumulate: int = 1
    ) -> None:
        """Check the sizes; draw nothing yet."""
        if not 0 < batch_size <= examples:
            raise ValueError(f"a batch of {batch_size} does not fit a training set of {examples} examples")
        if batch_size % (count * accumulate):
            raise ValueError(
                f"a batch of {batch_size} is not divisible by {count} replicas x {accumulate} micro-batches"
            )
        if not 0 <= index < count:
            raise ValueError(f"data replica {index} of {count} does not exist")
        self._examples, self._batch_size, self._seed = examples, batch_size, seed
        self._index, self._count, self._accumulate = index, count, accumulate
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def global_batch(self, number: int) -> Tensor:
        """Indices of all examples of one batch, over all replicas."""
        epoch, position = divmod(number, self._examples // self._batch_size)
        if epoch != self._epoch:
            # A generator of its own: the global streams belong to the model (dropout) and are part of the snapshot.
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self._examples, generator=generator)
        return self._order[position * self._batch_size : (position + 1) * self._batch_size]

    def micro_batches(self, number: int) -> tuple[Tensor, ...]:
        """Indices this process reads for one batch, one tensor per micro-batch."""
        share = self.global_batch(number).chunk(self._count)[self._index]
        return share.chunk(self._accumulate)


def evenly(examples: int, count: int) -> Tensor:
    """Indices of ``count`` examples spread evenly over a set: what a probe is made of."""
    if not 0 < count <= examples:
        raise ValueError(f"cannot take {count} examples from {examples}")
    return torch.arange(count) * examples // count
