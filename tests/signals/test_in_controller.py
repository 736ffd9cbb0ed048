"""Signals beside a controller: in its events, the same on all ranks, and without a trace in the run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_stability import FixedInnovation, LossProbe, StabilityController, parallel
from dist_stability.signals import GradientAgreement, GroupNorms, RankAgreement, UpdateRatio, UpdateRms

KEYS = {
    "learning_rate",
    "training_loss",
    "gradient_norm",
    "gradient_norm/0",
    "update_rms_median",
    "update_ratio",
    "effective_step",
    "gradient_agreement",
}


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def batch(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(1, keepdim=True).sin()


def run(rank: int, mode: str, watched: bool) -> tuple[list[Tensor], list[dict[str, Any]]]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    model = DistributedDataParallel(model) if mode == "ddp" else fully_shard(model) if mode == "fsdp2" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    agreement = GradientAgreement(optimizer)
    signals: list[Any] = [UpdateRms(), UpdateRatio(), GroupNorms(), agreement] if watched else []
    if watched and mode == "ddp":
        signals.append(RankAgreement(model))
    events: list[dict[str, Any]] = []
    probe = LossProbe(loss_fn, [batch(10**6)])
    rule = FixedInnovation(epsilon=1e9, alpha=1.0)  # refuses what is not finite, and nothing else
    with StabilityController(model, optimizer, probe, rule, signals=signals, on_event=events.append) as controller:
        for step in range(6):
            total = torch.zeros(())
            for part in range(2):
                loss = loss_fn(model, batch(100 * step + 10 * part + rank)) / 2
                (loss * (math.nan if step == 4 else 1.0)).backward()
                total += loss.detach()
                if part == 0:
                    agreement.mark()
            controller.step(loss=total)
            optimizer.zero_grad()
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    return [parallel.local(t).clone() for t in (*model.parameters(), *state)], events


def beside_a_controller(rank: int, world: int, mode: str) -> list[Any]:
    with_signals, events = run(rank, mode, watched=True)
    without, _ = run(rank, mode, watched=False)
    assert all(torch.equal(a, b) for a, b in zip(with_signals, without, strict=True))
    actions = [event["action"] for event in events]
    assert actions == ["commit"] * 4 + [actions[4], "commit"] and actions[4] in ("veto", "rollback"), actions
    said = [event["signals"] for event in events]
    assert said[1].keys() >= (KEYS | {"rank_agreement"} if mode == "ddp" else KEYS)
    assert "update_rms" not in said[0]  # no second moment yet
    assert math.isnan(said[4]["update_rms"]) and math.isfinite(said[5]["update_rms"])
    assert said[1]["gradient_norm/0"] == pytest.approx(said[1]["gradient_norm"])
    assert events[1]["where"]["update_rms_max"] in {"0.weight", "0.bias", "2.weight", "2.bias"}
    return [[{k: repr(v) for k, v in entry.items()} for entry in said], [event["where"] for event in events]]


def test_in_one_process(one: Any) -> None:
    one.run(beside_a_controller, "single", group=False)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_on_two_ranks(two: Any, mode: str) -> None:
    first, second = two.run(beside_a_controller, mode)
    assert first == second
