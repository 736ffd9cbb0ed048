"""R10: what the monitor costs a training step, in processor time, on a ResNet-20 and a small GPT.

Four copies of one run take turns, fifty steps each: plain, under an observing controller, with the margin, and with
margin and rho at their defaults. Fifty steps hold one margin and five ratios. Processor time, not wall time: other
programs on the machine disturb it less. What is told is the median over rounds of (with - observed) / plain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_stability import LossProbe, StabilityController
from dist_stability.diagnostics.monitor import EdgeOfStabilityMonitor
from dist_stability.diagnostics.sharpness import Sharpness
from dist_stability.experiments.data import BatchOrder
from dist_stability.experiments.restrained.networks import CifarResNet, small_digits
from dist_stability.experiments.restrained.parts import Outcome, Part, Result, Settings, within
from dist_stability.experiments.spectral import tasks
from dist_stability.experiments.spectral.models import SmallGPT
from dist_stability.signals import DirectionalRatio

ROUNDS, BLOCK = 9, 50
ARMS = ("plain", "observed", "margin", "margin and rho")
Loss = Callable[[nn.Module, Any], Tensor]


def settings(quick: bool) -> list[Settings]:
    """One job for each model."""
    rounds, block = (1, 5) if quick else (ROUNDS, BLOCK)
    return [{"name": name, "rounds": rounds, "block": block} for name in ("resnet", "gpt")]


def work(settings: Settings) -> Result:
    """Seconds of processor time of each block, by arm. The first round, with the first margin, does not count."""
    loops = {arm: _loop(settings["name"], arm) for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(settings["rounds"] + 1):
        for arm, step in loops.items():
            begin = time.process_time()
            for place in range(settings["block"]):
                step(number * settings["block"] + place)
            if number:
                seconds[arm].append(time.process_time() - begin)
    return {"seconds": seconds}


def conclude(results: Sequence[Result]) -> Outcome:
    """Medians over rounds."""
    checks, rows = [], []
    for result in results:
        name, seconds = result["settings"]["name"], result["seconds"]
        rounds = list(zip(*(seconds[arm] for arm in ARMS), strict=True))
        margin = [100 * (one - observed) / plain for plain, observed, one, _ in rounds]
        both = [100 * (two - observed) / plain for plain, observed, _, two in rounds]
        checks.append(within(f"{name}: margin, median percent of a step", [median(margin)], high=5.0))
        checks.append(within(f"{name}: margin and rho, median percent of a step", [median(both)], high=8.0))
        step = 1e3 * median(seconds["plain"]) / result["settings"]["block"]
        rows.append([name, step, median(margin), min(margin), max(margin), median(both), min(both), max(both)])
    head = ("model", "step, ms", "margin, %", "least", "most", "both, %", "least", "most")
    return Outcome(checks, head, rows, "Margin on a batch as large as the training batch; rho with reuse_loss=True.")


def _loop(name: str, arm: str) -> Callable[[int], None]:
    """One step of an arm's own run."""
    torch.manual_seed(0)
    model, batch, loss_fn = _resnet() if name == "resnet" else _gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    current = [batch(0)]
    controller = None
    if arm != "plain":
        edge = None
        if arm != "observed":
            ratio = DirectionalRatio(model, loss_fn, lambda: current[0], reuse_loss=True)
            signals = [ratio] if arm == "margin and rho" else []
            edge = EdgeOfStabilityMonitor(Sharpness(model, optimizer, loss_fn, [batch(-1)]), None, signals)
        probe = LossProbe(loss_fn, [tuple(part[:2] for part in batch(-1))])
        controller = StabilityController(model, optimizer, probe, mode="observe", edge=edge)

    def step(number: int) -> None:
        current[0] = batch(number)
        optimizer.zero_grad()
        loss = loss_fn(model, current[0])
        loss.backward()  # type: ignore[no-untyped-call]
        if controller is None:
            optimizer.step()
        else:
            controller.step(loss=loss)

    return step


def _resnet() -> tuple[nn.Module, Callable[[int], Any], Loss]:
    data = small_digits()
    order = BatchOrder(len(data), 128, seed=0)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    return CifarResNet(20), lambda number: data.batch(order.global_batch(max(number, 0))), loss_fn


def _gpt() -> tuple[nn.Module, Callable[[int], Any], Loss]:
    data = tasks.task("english")
    model = SmallGPT(data.vocabulary, data.context, width=64, layers=2, norm="pre", init="paper", seed=0)
    return model, lambda number: data.batch(0, number, 16), tasks.loss_fn


PART = Part("R10", "What the monitor costs", settings, work, conclude, parallel=False)
