"""Every rung of the ladder, each in a training run that needs it: real text, FSDP2 on two ranks, events as evidence.

A run is ``Scenario.steps`` attempts of a small character Transformer; what goes wrong is done by the functions below at
fixed attempts, on every rank alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from dist_stability import (
    Escalation,
    LossProbe,
    NonFiniteGuard,
    PredictiveInnovation,
    StabilityController,
    StabilityStop,
)
from dist_stability.experiments.data import BatchOrder
from dist_stability.experiments.tasks import cross_entropy, make_task
from dist_stability.experiments.text import CharacterTransformer
from dist_stability.parallel import local

BAD = 40
"""The attempt at which things begin to go wrong: the rule has its history and two anchors by then."""

RATE = 2e-3

HEAVY = 17
"""The batch of each epoch that is broken, where one is."""


@dataclass(frozen=True)
class Scenario:
    """What goes wrong, and how the controller is set up."""

    fault: str
    steps: int = 80
    length: int = 10**6
    anchors: int = 2
    checkpoint_at: int = -1
    batches: bool = False
    epoch: int = 0
    escalation: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One rank's part of a run."""

    model: nn.Module
    optimizer: Optimizer
    attempt: int = 0
    last: int = BAD
    before: list[Tensor] = field(default_factory=list)

    @property
    def due(self) -> bool:
        return BAD <= self.attempt < self.last

    @property
    def states(self) -> list[dict[str, Any]]:
        return [state for state in self.optimizer.state.values() if state]


def train(rank: int, world: int, scenario: Scenario, folder: Path) -> dict[str, Any]:
    task = make_task("text")
    torch.manual_seed(11)
    model: nn.Module = CharacterTransformer(_characters(task), width=32, layers=1, heads=2)
    for block in task.blocks(model):
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    order = BatchOrder(len(task.train), 16 * world, seed=5, index=rank, count=world)
    run = Run(model, optimizer, last=BAD + scenario.length)
    fault: Callable[[Run, str], None] = globals()[scenario.fault]
    events: list[dict[str, Any]] = []

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(module, batch)

    def save() -> None:
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)

    def reload() -> int:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        return scenario.checkpoint_at

    controller = StabilityController(
        model,
        optimizer,
        LossProbe(loss_fn, task.probe_batches(32)),
        rule=PredictiveInnovation(),
        guards=(NonFiniteGuard(),),
        escalation=Escalation(**scenario.escalation),
        anchors=scenario.anchors,
        reload=reload if scenario.checkpoint_at >= 0 else None,
        on_event=events.append,
    )

    def proposed(attempt: int, phase: str) -> None:
        if phase == "after step":
            fault(run, "proposed")

    controller.add_phase_listener(proposed)
    epoch = scenario.epoch or scenario.steps
    numbers = (number % epoch for number in range(scenario.steps))
    loader = (
        (*task.train.batch(order.micro_batches(number)[0]), 1e3 if fault is heavy_batch and number == HEAVY else 1.0)
        for number in numbers
    )
    stopped: dict[str, Any] = {}
    with controller:
        try:
            for *batch, weight in controller.batches(loader) if scenario.batches else loader:
                if run.attempt == scenario.checkpoint_at + 1 and scenario.checkpoint_at >= 0:
                    save()
                fault(run, "entry")
                loss = loss_fn(model, (batch[0], batch[1])) * weight
                loss.backward()
                fault(run, "gradients")
                controller.step()
                fault(run, "verdict")
                optimizer.zero_grad()
                run.attempt += 1
        except StabilityStop as stop:
            stopped = stop.report
    return {"events": events, "stopped": stopped, "rate": optimizer.param_groups[0]["lr"]}


def _characters(task: Any) -> int:
    return task.build().token.num_embeddings


# ---------------------------------------------------------------------- what goes wrong


def spike(run: Run, place: str) -> None:
    """A burst of large gradients: a bad stretch of data."""
    if place == "gradients" and run.due:
        for parameter in run.model.parameters():
            parameter.grad.mul_(300.0)


def rate_too_high(run: Run, place: str) -> None:
    """Somebody's code sets a learning rate 100 times too high, and no scheduler knows."""
    if place == "entry":
        run.optimizer.param_groups[0]["lr"] = RATE * (100 if run.due else 1)


def rate_absurd(run: Run, place: str) -> None:
    """A learning rate of 20 for good: even a thirty-second part of a step is far too long."""
    if place == "entry" and run.due:
        run.optimizer.param_groups[0]["lr"] = 1e4 * RATE


def rate_creeps(run: Run, place: str) -> None:
    """A bug multiplies the learning rate by 1.04 at every step; no single step looks bad."""
    if place == "entry" and run.due:
        run.optimizer.param_groups[0]["lr"] = RATE * 1.04 ** (run.attempt - BAD)


def uphill(run: Run, place: str) -> None:
    """Every update is applied backwards and ten times as long: only the probe sees that."""
    if place == "gradients" and run.due:
        run.before = [local(parameter).detach().clone() for parameter in run.model.parameters()]
    if place == "proposed" and run.due:
        with torch.no_grad():
            for parameter, before in zip(run.model.parameters(), run.before, strict=True):
                local(parameter).copy_(before - 10 * (local(parameter) - before))


def heavy_batch(run: Run, place: str) -> None:
    """One batch of every epoch carries a weight of 1000 (a broken sample weight); see the loader."""


def poisoned_moments(run: Run, place: str) -> None:
    """The second moment collapses just after the step: the weights are fine and committed, every later step is not."""
    if place == "proposed" and run.attempt == BAD:
        for state in run.states:
            local(state["exp_avg_sq"]).mul_(1e-10)


def overflow(run: Run, place: str) -> None:
    """Every step from here on writes an infinity into one weight."""
    if place == "proposed" and run.due:
        weight = run.model.get_parameter("blocks.0.feed_forward.0.weight")
        shard = local(weight)
        if shard.numel():
            shard.view(-1)[0] = math.inf


# ---------------------------------------------------------------------- what is done about it


def go(two: harness.Pool, scenario: Scenario, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events, which all ranks share but for their timings, and the report of a stop."""
    results = two.run(train, scenario, folder, timeout=240)
    for event in (event for result in results for event in result["events"]):
        event.pop("seconds")
    first, second = results
    assert repr(first["events"]) == repr(second["events"])
    assert repr(first["stopped"]) == repr(second["stopped"])
    return first["events"], first["stopped"]


def actions(events: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Attempts by rung, or by action where nothing was refused."""
    found: dict[str, list[int]] = {}
    for event in events:
        found.setdefault(event["rung"] or event["action"], []).append(event["attempt"])
    return found


def committed(events: list[dict[str, Any]]) -> list[float]:
    return [event["measurement"] for event in events if event["action"] in ("commit", "attenuate")]


def test_skip(two: harness.Pool, tmp_path: Path) -> None:
    events, stopped = go(two, Scenario("spike", length=10), tmp_path)
    assert actions(events)["skip"] == list(range(BAD, BAD + 10)) and not stopped
    ended = [event["pattern"] for event in events if event["action"] == "commit" and event["pattern"]]
    assert ended == [] or ended == ["transient"]


def test_attenuate_then_cut_the_learning_rate_and_ramp_it_back(two: harness.Pool, tmp_path: Path) -> None:
    quick = {"cut_steps": 12, "ramp_steps": 12}
    events, stopped = go(two, Scenario("rate_too_high", steps=140, length=40, escalation=quick), tmp_path)
    said = actions(events)
    assert not stopped
    assert said["attenuate"] and said["cut_lr"]
    for event in events:
        if event["action"] == "attenuate":
            assert "of the step was committed" in event["reason"]
    factors = [event["learning_rate_factor"] for event in events]
    assert min(factors) <= 0.25 and factors[-1] == 1.0
    assert committed(events)[-1] < committed(events)[BAD]


def test_slow_divergence_is_warned_of_and_then_the_learning_rate_is_cut(two: harness.Pool, tmp_path: Path) -> None:
    events, stopped = go(two, Scenario("rate_creeps", steps=180, escalation={"trend_after": 4}), tmp_path)
    warned = [event["attempt"] for event in events if event["warning"]]
    cut = next(event for event in events if event["rung"] == "cut_lr")
    assert cut["signal"] == "trend" and cut["attempt"] - warned[0] == 4 and not stopped
    assert cut["action"] == "deep_rollback" and cut["undone"]
    assert events[cut["attempt"] + 1]["learning_rate_factor"] == 0.25


def test_a_batch_that_is_refused_in_every_epoch_is_the_data(two: harness.Pool, tmp_path: Path) -> None:
    events, stopped = go(two, Scenario("heavy_batch", steps=120, epoch=40, batches=True), tmp_path)
    refused = {event["attempt"]: event["pattern"] for event in events if event["rung"]}
    assert refused == {17: "transient", 57: "data", 97: "data"} and not stopped


def test_deep_rollback(two: harness.Pool, tmp_path: Path) -> None:
    events, stopped = go(two, Scenario("poisoned_moments"), tmp_path)
    said = actions(events)
    assert len(said["deep_rollback"]) == 1 and not stopped
    (went_back,) = said["deep_rollback"]
    undone = events[went_back]["undone"]
    assert BAD in undone, "the step whose moments were poisoned is taken back"
    assert all(event["action"] == "commit" for event in events[went_back + 1 :])


def test_reload(two: harness.Pool, tmp_path: Path) -> None:
    """No older state in memory: the checkpoint is what is left."""
    scenario = Scenario("poisoned_moments", anchors=0, checkpoint_at=31, escalation={"reload_after": 12})
    events, stopped = go(two, scenario, tmp_path)
    said = actions(events)
    assert len(said["reload"]) == 1 and not stopped
    (reloaded,) = said["reload"]
    assert events[reloaded]["undone"][-1] == BAD and events[reloaded]["undone"][0] == 32
    assert all(event["action"] == "commit" for event in events[reloaded + 1 :])


def test_of_sixty_steps_uphill_none_stands(two: harness.Pool, tmp_path: Path) -> None:
    """Many of them rise by less than the bar of a calm run, which the refusals have lowered."""
    events, stopped = go(two, Scenario("uphill", steps=120, length=60), tmp_path)
    undone = {attempt for event in events for attempt in event["undone"]}
    stands = {event["attempt"] for event in events if event["action"] in ("commit", "attenuate")} - undone
    assert not stopped and not stands & {*range(BAD, BAD + 60)} and stands >= {*range(BAD + 60, 120)}
    refused = [event["reason"] for event in events if event["rung"] and event["attempt"] < BAD + 60]
    assert sum(float(reason.split("(")[1].split(" scales")[0]) < 6.2 for reason in refused) > 5


def test_stop_and_say_that_it_is_structural(two: harness.Pool, tmp_path: Path) -> None:
    limits = {"max_refusals_in_row": 40, "deep_after": 24}
    events, stopped = go(two, Scenario("rate_absurd", steps=120, escalation=limits), tmp_path)
    assert stopped["pattern"] == "structural" and "QK-norm" in stopped["advice"]
    assert events[-1]["rung"] == "stop"
    tries = [event["reason"].rpartition("; ")[2] for event in events if event["rung"] == "attenuate"]
    assert tries[:2] == ["even 1/32 of the step does harm"] * 2, "then the direction counts as wrong"
    assert set(tries[2:]) == {"the restored weights measure what they measured before"}


def test_stop_and_name_the_tensor_that_overflows(two: harness.Pool, tmp_path: Path) -> None:
    events, stopped = go(two, Scenario("overflow", escalation={"max_refusals_in_row": 12}), tmp_path)
    assert stopped["pattern"] == "numerics"
    assert "blocks.0.feed_forward.0.weight" in stopped["last"][-1]["reason"]
    assert events[-1]["rung"] == "stop"
