"""The cut that no scheduler notices, and which learning rates count as announced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from dist_stability.learning_rate import RateCut, announced


def optimizer(*rates: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates])


@pytest.mark.parametrize("tensor", [False, True])
def test_a_cut_is_put_back_to_the_bit(tensor: bool) -> None:
    made = optimizer(*(torch.tensor(rate) if tensor else rate for rate in (0.1, 0.3)))
    before = [group["lr"] for group in made.param_groups]
    values = [float(rate) for rate in before]
    cut = RateCut([made])
    cut.apply(0.3)
    assert [float(group["lr"]) for group in made.param_groups] == pytest.approx([0.03, 0.09])
    cut.undo()
    cut.undo()
    assert [float(group["lr"]) for group in made.param_groups] == values
    assert all(group["lr"] is rate for group, rate in zip(made.param_groups, before, strict=True)), "the same object"
    cut.apply(1.0)
    assert [float(group["lr"]) for group in made.param_groups] == values


def test_only_what_a_scheduler_vouches_for_is_announced() -> None:
    made = optimizer(0.1, 0.2)
    assert announced([made], []) is None
    scheduler = LambdaLR(made, lambda step: 10.0 if step == 3 else 1.0)
    assert announced([made], [scheduler, object()]) == 0.2
    assert announced([optimizer(0.1)], [scheduler]) is None, "the scheduler of somebody else's optimizer"
    for _ in range(3):
        made.step()
        scheduler.step()
    assert announced([made], [scheduler]) == 2.0
    made.param_groups[1]["lr"] = 60.0
    assert announced([made], [scheduler]) == 1.0, "the other group still is what it should be"
    made.param_groups[0]["lr"] = 30.0
    assert announced([made], [scheduler]) is None


def test_a_tensor_learning_rate_is_read_on_the_host_only() -> None:
    made = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=torch.tensor(0.5))
    scheduler = ExponentialLR(made, 0.5)
    made.step()
    scheduler.step()
    assert announced([made], [scheduler]) == 0.25
