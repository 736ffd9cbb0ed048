"""The monitor of the edge of stability for the training program."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_stability.diagnostics.edge import EdgeSettings
from dist_stability.diagnostics.monitor import EdgeOfStabilityMonitor
from dist_stability.experiments.data import Batch

SHARE = 4
"""The margin is measured on this part of a batch."""


def edge_monitor(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    batch: Batch,
    current: Callable[[], Sequence[Batch]],
    *,
    dtype: torch.dtype,
    reuse_loss: bool,
    cuts: bool = False,
) -> EdgeOfStabilityMonitor:
    """The usual monitor.

    Args:
        model: Wrapped.
        optimizer: Of the loop.
        loss_fn: Training loss of a micro-batch.
        batch: For the margin, of this rank.
        current: The micro-batches of the present step.
        dtype: In which the model computes; 16 bits take a longer finite difference.
        reuse_loss: The loss that the loop reports is that of the whole batch, and draws no random numbers.
        cuts: Past the edge the learning rate is cut.
    """

    def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
        losses = [loss_fn(model, each) for each in batches]
        return sum(losses[1:], losses[0]) / len(losses)

    return EdgeOfStabilityMonitor.of(
        model,
        optimizer,
        mean_loss,
        [[batch]],
        current,
        settings=EdgeSettings(cuts=cuts),
        reuse_loss=reuse_loss,
        relative_step=None if dtype == torch.float32 else 1e-3,
    )
