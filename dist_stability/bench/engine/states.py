"""Training states to copy: a model and its AdamW after one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from dist_stability.experiments.text import CharacterTransformer
from dist_stability.snapshot import StatePlan

VOCABULARY = 256


@dataclass(frozen=True)
class Size:
    """A state to measure.

    Attributes:
        name: For tables.
        width: Of the transformer; 0 for the state of many small tensors.
        layers: Of the transformer; or a quarter of the number of small tensors.
    """

    name: str
    width: int
    layers: int


SMALL = Size("1,200 tensors of 64", 0, 300)
"""Each of 300 parameters with both its moments and its step counter: 1,200 tensors."""

SIZES = (SMALL, Size("4 MB", 96, 3), Size("40 MB", 256, 4), Size("400 MB", 576, 8))
GPU_SIZES = (SMALL, Size("40 MB", 256, 4), Size("400 MB", 576, 8), Size("1.8 GB", 1024, 12))
QUICK = (Size("1,200 tensors of 64", 0, 300), Size("under 1 MB", 32, 2))


class ManyTensors(nn.Module):
    """Parameters of 64 elements each."""

    def __init__(self, count: int) -> None:
        """Make ``count`` of them."""
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(64)) for _ in range(count))

    def forward(self) -> torch.Tensor:
        """A number that depends on all of them."""
        return torch.stack([part.sum() for part in self.parts]).sum()


def build(size: Size, device: torch.device) -> tuple[nn.Module, Optimizer, StatePlan]:
    """Model, optimizer with its state, and the plan of both."""
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = (
            CharacterTransformer(VOCABULARY, width=size.width, layers=size.layers)
            if size.width
            else ManyTensors(size.layers)
        )
        optimizer = AdamW(model.parameters(), lr=1e-4)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, StatePlan.build(model, [optimizer], 1)
