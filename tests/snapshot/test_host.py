"""Learning rates, schedulers, the loss scale and other objects come back with the state they belong to."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from dist_stability import SnapshotError
from dist_stability.snapshot import EntryState, ForwardState


def setup(lr: Any = 0.1, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "weight_decay": 0.5}]
    return model, torch.optim.Adam(groups, lr=lr, **options)


def values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def test_per_group_values() -> None:
    _, optimizer = setup()
    before = values(optimizer)
    state = EntryState.capture([optimizer])
    for group in optimizer.param_groups:
        group.update(lr=9.0, betas=(0.1, 0.2), weight_decay=3.0, foreach=True, added="later")
        del group["eps"]
    state.restore([optimizer])
    assert values(optimizer) == before
    assert all(len(group["params"]) == 2 for group in optimizer.param_groups)


def test_mutable_values_are_copies_both_ways() -> None:
    _, optimizer = setup()
    optimizer.param_groups[0]["history"] = [1]
    state = EntryState.capture([optimizer])
    optimizer.param_groups[0]["history"].append(2)
    state.restore([optimizer])
    assert optimizer.param_groups[0]["history"] == [1]
    optimizer.param_groups[0]["history"].append(2)
    state.restore([optimizer])
    assert optimizer.param_groups[0]["history"] == [1]


def test_a_tensor_learning_rate_keeps_its_object() -> None:
    lr = torch.tensor(0.1)
    _, optimizer = setup(lr, foreach=False, capturable=False)
    assert optimizer.param_groups[0]["lr"] is lr
    state = EntryState.capture([optimizer])
    lr.mul_(3)
    state.restore([optimizer])
    assert optimizer.param_groups[0]["lr"] is lr and lr.item() == pytest.approx(0.1)
    optimizer.param_groups[0]["lr"] = 5.0  # no tensor any more
    state.restore([optimizer])
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.1))
    optimizer.param_groups[0]["lr"].zero_()  # and it is not the snapshot's own
    state.restore([optimizer])
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.1))


def test_a_number_that_has_become_a_tensor() -> None:
    _, optimizer = setup()
    state = EntryState.capture([optimizer])
    optimizer.param_groups[0]["lr"] = torch.tensor(7.0)
    state.restore([optimizer])
    assert optimizer.param_groups[0]["lr"] == 0.1 and isinstance(optimizer.param_groups[0]["lr"], float)


def test_several_optimizers_and_a_changed_number_of_groups() -> None:
    (_, one), (_, two) = setup(0.1), setup(0.2)
    state = EntryState.capture([one, two])
    one.param_groups[0]["lr"] = two.param_groups[1]["lr"] = 5.0
    state.restore([one, two])
    assert (one.param_groups[0]["lr"], two.param_groups[1]["lr"]) == (0.1, 0.2)
    two.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    one.param_groups[0]["lr"] = 5.0
    with pytest.raises(SnapshotError, match="rank 0: optimizer 1 has 3 parameter groups, 2 at the snapshot"):
        state.restore([one, two])
    assert one.param_groups[0]["lr"] == 5.0, "nothing may be changed when the snapshot does not fit"


SCHEDULERS = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=20),  # moves betas, too
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o, 0.1), torch.optim.lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
}


def advance(scheduler: Any, count: int) -> None:
    for _ in range(count):
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    """Loading a scheduler's state leaves the learning rate as it is: both have to come back, the groups last."""
    (_, optimizer), (_, other) = setup(), setup()
    scheduler, twin = SCHEDULERS[name](optimizer), SCHEDULERS[name](other)
    advance(scheduler, 3)
    advance(twin, 3)
    state = EntryState.capture([optimizer], extra_state={"scheduler": scheduler})
    advance(scheduler, 4)
    state.restore([optimizer], extra_state={"scheduler": scheduler})
    for _ in range(5):
        assert values(optimizer) == values(other)
        advance(scheduler, 1)
        advance(twin, 1)


class Meddler:
    """An object that writes into the groups when its state is loaded, and keeps what it is given."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.state: dict[str, Any] = {"list": [1]}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state
        self.optimizer.param_groups[0]["lr"] = 77.0


def test_groups_are_written_after_every_object_was_loaded() -> None:
    _, optimizer = setup()
    meddler = Meddler(optimizer)
    state = EntryState.capture([optimizer], extra_state={"meddler": meddler})
    meddler.state["list"].append(2)
    for _ in range(2):
        state.restore([optimizer], extra_state={"meddler": meddler})
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert meddler.state == {"list": [1]}
        meddler.state["list"].append(3)  # what is loaded is a copy each time


def scaled_step(scaler: Any, model: nn.Module, optimizer: torch.optim.Optimizer, value: float = 1.0) -> None:
    optimizer.zero_grad()
    scaler.scale(model(torch.full((1, 2), value)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()


def test_grad_scaler() -> None:
    model, optimizer = setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
    scaled_step(scaler, model, optimizer)
    state = EntryState.capture([optimizer], scaler)
    expected, scale = scaler.state_dict(), scaler._scale
    for value in (1.0, 1.0, float("inf")):
        scaled_step(scaler, model, optimizer, value)
    scaler.set_growth_factor(5.0)
    assert scaler.state_dict() != expected
    state.restore([optimizer], scaler)
    assert scaler.state_dict() == expected and scaler._scale is scale
    scaled_step(scaler, model, optimizer)
    scaled_step(scaler, model, optimizer)
    assert scaler.get_scale() == 32.0, "two more good steps make three"
    state.restore([optimizer], scaler)
    assert scaler.state_dict() == expected


@pytest.mark.parametrize("stage", ["unscaled", "stepped"])
def test_grad_scaler_can_go_on_after_a_refused_step(stage: str) -> None:
    model, optimizer = setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scaled_step(scaler, model, optimizer)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    if stage == "unscaled":
        scaler.unscale_(optimizer)
    state = EntryState.capture([optimizer], scaler)
    scaler.step(optimizer)
    state.restore([optimizer], scaler)
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def test_grad_scaler_before_its_first_use() -> None:
    model, optimizer = setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    state = EntryState.capture([optimizer], scaler)
    scaled_step(scaler, model, optimizer, float("inf"))
    assert scaler.get_scale() == 8.0
    state.restore([optimizer], scaler)
    assert scaler.get_scale() == 16.0
    scaled_step(scaler, model, optimizer)


def test_a_disabled_grad_scaler() -> None:
    model, optimizer = setup()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = EntryState.capture([optimizer], scaler)
    scaled_step(scaler, model, optimizer)
    state.restore([optimizer], scaler)
    scaled_step(scaler, model, optimizer)


class Count:
    """Moved by a forward, or not."""

    def __init__(self, moved_by_forward: bool) -> None:
        self.moved_by_forward = moved_by_forward
        self.calls: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def test_forward_state_takes_along_what_a_forward_moves() -> None:
    moved, other = Count(True), Count(False)
    state = ForwardState(nn.Linear(1, 1), {"moved": moved, "other": other})
    moved.calls, other.calls = [1], [1]
    state.capture()
    for _ in range(2):
        moved.calls.append(2)
        other.calls = [1, 2]
        assert state.moved == {"moved": {"calls": [1]}}
        state.restore()
        assert moved.calls == [1] and other.calls == [1, 2]
    state.clear()
    assert state.moved == {}


def test_forward_state() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
    state = ForwardState(model)
    random.seed(1)
    kept = (random.getstate(), torch.get_rng_state(), model[0].running_mean.clone())
    state.restore()  # nothing captured: nothing done
    state.capture()
    assert state.captured
    for _ in range(2):
        random.random()
        model(torch.randn(4, 2))
        state.restore()
        assert random.getstate() == kept[0]
        assert torch.equal(torch.get_rng_state(), kept[1]) and torch.equal(model[0].running_mean, kept[2])
    model(torch.randn(4, 2))
    moved = model[0].running_mean.clone()
    state.clear()
    assert not state.captured
    state.restore()
    assert torch.equal(model[0].running_mean, moved)
    state.capture()
    model(torch.randn(4, 2))
    state.restore()
    assert torch.equal(model[0].running_mean, moved)
