"""R10: what the monitor costs a training step, in processor time, on a ResNet-20 and a small GPT.

Four copies of one run take turns, step by step: plain, under an observing controller, with the margin, and with the
whole monitor at its defaults. A round is a hundred steps of each, two margins and five ratios. Processor time, not
wall time: other programs on the machine disturb it less. What is told is the median over rounds of
(with - observed) / plain. A full pass of Python's garbage collector over everything torch has imported takes as long
as ten steps, and is charged to whichever arm it falls into: what is alive before the first step is frozen.
(``bench edge`` times the parts of the monitor one by one.)
"""

from __future__ import annotations

import gc
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

ROUNDS, BLOCK = 6, 100
ARMS = ("plain", "observed", "margin", "all")
Loss = Callable[[nn.Module, Any], Tensor]


def settings(quick: bool) -> list[Settings]:
    """One job for each model."""
    rounds, block = (1, 5) if quick else (ROUNDS, BLOCK)
    return [{"name": name, "rounds": rounds, "block": block} for name in ("resnet", "gpt")]


def work(settings: Settings) -> Result:
    """Seconds of processor time of each block, by arm. The first round, with the first margin, does not count."""
    loops = {arm: _loop(settings["name"], arm) for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    gc.collect()
    gc.freeze()
    try:
        for number in range(settings["rounds"] + 1):
            taken = dict.fromkeys(ARMS, 0.0)
            for place in range(settings["block"]):
                first = place % len(ARMS)
                for arm in ARMS[first:] + ARMS[:first]:
                    begin = time.process_time()
                    loops[arm](number * settings["block"] + place)
                    taken[arm] += time.process_time() - begin
            if number:
                for arm in ARMS:
                    seconds[arm].append(taken[arm])
    finally:
        gc.unfreeze()
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
        checks.append(within(f"{name}: the whole monitor, median percent of a step", [median(both)], high=8.0))
        step = 1e3 * median(seconds["plain"]) / result["settings"]["block"]
        rows.append([name, step, median(margin), min(margin), max(margin), median(both), min(both), max(both)])
    head = ("model", "step, ms", "margin, %", "least", "most", "all, %", "least", "most")
    return Outcome(checks, head, rows, "Margin on a batch as large as the training batch; reuse_loss=True.")


def _loop(name: str, arm: str) -> Callable[[int], None]:
    """One step of an arm's own run."""
    torch.manual_seed(0)
    model, batch, loss_fn = _resnet() if name == "resnet" else _gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    current = [batch(0)]
    controller = None
    if arm != "plain":
        edge = None
        if arm == "margin":
            edge = EdgeOfStabilityMonitor(Sharpness(model, optimizer, loss_fn, [batch(-1)]))
        elif arm == "all":
            edge = EdgeOfStabilityMonitor.of(
                model, optimizer, loss_fn, [batch(-1)], lambda: current[0], reuse_loss=True
            )
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
