"""The networks of the twin experiments, and the digits as they are: 8 x 8 pixels, one channel."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dist_stability.experiments.data import Images
from dist_stability.report.extras import import_extra


class Swish(nn.Module):
    """x sigmoid(beta x): the larger beta, the closer to ReLU's kink."""

    def __init__(self, beta: float) -> None:
        """Choose beta."""
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x * torch.sigmoid(self.beta * x)


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, a 1 x 1 convolution where shapes change; BatchNorm after each."""

    def __init__(self, inputs: int, outputs: int, stride: int, beta: float) -> None:
        """Build the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act = Swish(beta)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(examples, inputs, height, width) to outputs, the sides divided by the stride."""
        inner = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(inner + self.shortcut(x))  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """The ResNet of CIFAR-10 (He et al., arXiv 1512.03385): three stages of (depth - 2) / 6 blocks each, with Swish.

    Args:
        depth: 6 n + 2.
        width: Channels of the first stage; the others have twice and four times as many.
        channels: Of the images.
        beta: Of Swish; the paper's is 5.
        classes: Number of them.
    """

    def __init__(self, depth: int, width: int = 8, channels: int = 1, beta: float = 5.0, classes: int = 10) -> None:
        """Build it, initialized from the global random stream, as torch does by default."""
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"CifarResNet depth: expected 6 n + 2, n >= 1, got {depth}")
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(width), Swish(beta)
        layers = []
        for stage in range(3):
            for block in range(blocks):
                first = stage > 0 and block == 0
                inputs = width << (stage - 1 if first else stage)
                layers.append(Block(inputs, width << stage, 2 if first else 1, beta))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width << 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        features = self.layers(self.act(self.norm(self.conv(x)))).mean((2, 3))
        return self.head(features)  # type: ignore[no-any-return]


@cache
def small_digits() -> Images:
    """scikit-learn's 1,797 digits, 8 x 8, one channel, in a fixed random order."""
    loaded: Any = import_extra("sklearn.datasets", "the digits").load_digits()
    order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(loaded.images).float()[:, None] / 16
    return Images(pixels[order], torch.from_numpy(loaded.target).long()[order], mean=(0.305,), std=(0.376,))
