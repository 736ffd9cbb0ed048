"""A residual network on digits as a twin run: what R5, R6 and R7 perturb."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_stability.diagnostics.sensitivity import Sensitivity
from dist_stability.diagnostics.twins import Build, TwinRun
from dist_stability.experiments.data import BatchOrder
from dist_stability.experiments.restrained.networks import CifarResNet, small_digits

WEIGHT_DECAY = 5e-4
"""The paper's, coupled."""


def resnet_run(
    *,
    lr: float,
    batch: int,
    examples: int,
    depth: int = 20,
    momentum: float = 0.0,
    milestones: tuple[int, ...] = (),
) -> Build:
    """Builds runs of the ResNet of the CIFAR papers (Swish, beta 5, width 8) on the first digits; others are the test.

    Args:
        lr: Learning rate of SGD.
        batch: Examples in a batch.
        examples: How many digits are trained on.
        depth: Of the network.
        momentum: Nesterov's; 0 for none.
        milestones: Steps at which the learning rate drops to a tenth.
    """

    def build(seed: int) -> TwinRun:
        data = small_digits()
        order = BatchOrder(examples, batch, seed=seed)
        model = CifarResNet(depth)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0.0, weight_decay=WEIGHT_DECAY
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)

        def loss(step: int) -> Tensor:
            inputs, labels = data.batch(order.global_batch(step))
            return functional.cross_entropy(model(inputs), labels)

        def predict() -> Tensor:
            model.eval()
            try:
                return model(data.batch(torch.arange(examples, len(data)))[0]).argmax(1)  # type: ignore[no-any-return]
            finally:
                model.train()

        return TwinRun(model, optimizer, loss, lambda _: schedule.step(), predict if examples < len(data) else None)

    return build


def summary(found: Sensitivity, every: int = 1) -> dict[str, Any]:
    """The plain data of a twin pair; distances after each ``every``-th step."""
    return {
        "verdict": str(found.verdict),
        "reason": found.reason,
        "relative_l1": list(found.relative_l1[every - 1 :: every]),
        "largest_l1": max(found.relative_l1, default=None),
        "growth": None if found.growth is None else asdict(found.growth),
        "ftle_per_lr_time": found.ftle_per_lr_time,
        "first_loss": found.losses[0] if found.losses else None,
        "last_loss": found.losses[-1] if found.losses else None,
    }
