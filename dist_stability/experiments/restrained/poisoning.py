"""R11: a burst of gradients x300 under AdamW, and one NaN in front of BatchNorm: what is left of the run (on digits).

The burst does its harm through Adam's second moment: the run hardly moves for hundreds of steps, at a probe loss that
looks well. So the effective step is measured, mean |change of the weights| / learning rate, from outside, alike in all
arms, at each attempt: a refused attempt moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_stability import LossProbe, NonFiniteGuard, StabilityController
from dist_stability.diagnostics.monitor import EdgeOfStabilityMonitor
from dist_stability.diagnostics.sharpness import Sharpness
from dist_stability.experiments.data import BatchOrder
from dist_stability.experiments.restrained.networks import small_digits
from dist_stability.experiments.restrained.parts import Outcome, Part, Result, Settings, every, told, within
from dist_stability.experiments.restrained.reference import ReferenceController
from dist_stability.signals import DirectionalRatio, UpdateRms
from dist_stability.testing import FaultInjector

SEEDS = range(20)
LR, BATCH, EXAMPLES, PROBED = 1e-3, 64, 1437, 32
STEPS, BEGIN, LENGTH, FACTOR = 220, 120, 10, 300.0
NAN_STEPS, NAN_AT = 120, 60
WITHIN, MEAN_OF, MUCH_LATER = 20, 5, 70
"""Steps after the window at which the effective step is read, as the mean of the last five; and a much later one."""

BACK = 0.8
ARMS = ("clean", "unguarded", "reference", "guarded", "watched")
"""Without fault; with the fault: alone, under the published reference, under the controller, with its edge monitor."""

Step = Callable[[Tensor, float], bool]


def settings(quick: bool) -> list[Settings]:
    """One job for each seed and fault, with all arms."""
    seeds = range(1) if quick else SEEDS
    window = {"fault": "window", "steps": STEPS, "begin": BEGIN, "length": LENGTH, "factor": FACTOR}
    nan = {"fault": "nan", "steps": NAN_STEPS, "begin": NAN_AT}
    return [{"name": f"{fault['fault']}-s{seed}", "seed": seed, **fault} for fault in (window, nan) for seed in seeds]


def work(settings: Settings) -> Result:
    """Effective steps and accepted attempts, by arm."""
    return {"arms": {arm: _run(settings, arm) for arm in ARMS}}


def conclude(results: Sequence[Result]) -> Outcome:
    """Who is back, and who never is."""
    window = [result for result in results if result["settings"]["fault"] == "window"]
    nan = [result for result in results if result["settings"]["fault"] == "nan"]
    checks, rows = [], []
    for arm in ARMS[1:]:
        soon = [_ratio(result, arm, BEGIN + LENGTH + WITHIN) for result in window]
        later = [_ratio(result, arm, BEGIN + LENGTH + MUCH_LATER) for result in window]
        bad = [sum(result["arms"][arm]["accepted"][BEGIN : BEGIN + LENGTH]) for result in window]
        after = [sum(result["arms"][arm]["accepted"][NAN_AT + 1 :]) for result in nan]
        finite = [math.isfinite(result["arms"][arm]["probe"]) for result in nan]
        guards = arm in ("guarded", "watched")
        if window and guards:
            checks.append(within(f"{arm}: effective step over the clean run's, {WITHIN} steps later", soon, low=BACK))
        elif window:
            checks.append(told(f"{arm}: effective step over the clean run's", later, f"{MUCH_LATER} steps later"))
        if window and arm == "reference":
            checks.append(within("reference: bad steps accepted, of 10", bad, LENGTH, LENGTH))
        if nan and guards:
            checks.append(within(f"{arm}: accepted of the 59 after the NaN", after, low=58))
            checks.append(every(f"{arm}: finite probe at the end", finite))
        if nan and arm == "reference":
            checks.append(within("reference: accepted of the 59 after the NaN", after, 0, 0))
        if window and nan:
            probes = [result["arms"][arm]["probe"] for result in window]
            rows.append([arm, *map(median, (soon, later, bad, probes, after))])
    head = (
        "arm",
        f"effective step / clean, {WITHIN} steps after the window",
        f"{MUCH_LATER} steps after",
        "bad steps accepted",
        "last probe loss",
        "accepted of 59 after the NaN",
    )
    note = (
        f"Medians over {max(len(window), len(nan))} seeds. MLP 64-48-48-10, AdamW {LR:g}, batch {BATCH}; gradients x"
        f"{FACTOR:g} at steps {BEGIN} to {BEGIN + LENGTH - 1}. The NaN: one pixel at step {NAN_AT}, with BatchNorm."
    )
    return Outcome(checks, head, rows, note)


def _ratio(result: Result, arm: str, last: int) -> float:
    clean, found = (result["arms"][name]["effective"][last - MEAN_OF : last] for name in ("clean", arm))
    return fmean(found) / fmean(clean)


def _run(settings: Settings, arm: str) -> dict[str, Any]:
    nan = settings["fault"] == "nan"
    torch.manual_seed(settings["seed"])
    model = _network(norm=nan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    data, order = small_digits(), BatchOrder(EXAMPLES, BATCH, seed=settings["seed"])
    probed = data.batch(torch.arange(EXAMPLES, EXAMPLES + PROBED))
    current: list[Any] = [probed]
    injector = FaultInjector()
    if not nan and arm != "clean":
        injector.scale_gradients(step=settings["begin"], factor=settings["factor"], length=settings["length"])
    step, close = _stepper(arm, model, optimizer, current, probed)
    parameters = list(model.parameters())
    effective, accepted = [], []
    for attempt in range(settings["steps"]):
        inputs, labels = data.batch(order.global_batch(attempt))
        if nan and arm != "clean" and attempt == settings["begin"]:
            inputs[0, 0, 3, 3] = math.nan
        current[0] = (inputs, labels)
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.zero_grad()
        loss = cross_entropy(model, current[0])
        loss.backward()  # type: ignore[no-untyped-call]
        injector.gradients(attempt, parameters)
        norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        accepted.append(step(loss, norm))
        moved = [(p.detach() - old).abs().sum() for p, old in zip(parameters, before, strict=True)]
        effective.append(float(torch.stack(moved).sum()) / sum(p.numel() for p in parameters) / LR)
    close()
    model.eval()
    with torch.no_grad():
        probe = float(cross_entropy(model, probed))
    return {"effective": effective, "accepted": accepted, "probe": probe}


def _stepper(
    arm: str, model: nn.Module, optimizer: torch.optim.Optimizer, current: list[Any], probed: Any
) -> tuple[Step, Callable[[], None]]:
    """How an arm steps, and how it ends."""
    if arm in ("clean", "unguarded"):

        def plain(loss: Tensor, norm: float) -> bool:
            optimizer.step()
            return True

        return plain, lambda: None
    if arm == "reference":
        reference = ReferenceController(model, optimizer, lambda m: cross_entropy(m, probed))
        return lambda loss, norm: reference.step(), lambda: None
    edge = None
    if arm == "watched":
        ratio = DirectionalRatio(model, cross_entropy, lambda: current[0], reuse_loss=True)
        edge = EdgeOfStabilityMonitor(Sharpness(model, optimizer, cross_entropy, [probed]), None, [ratio, UpdateRms()])
    probe = LossProbe(cross_entropy, [probed])
    controller = StabilityController(model, optimizer, probe, guards=(NonFiniteGuard(),), edge=edge)
    return lambda loss, norm: controller.step(grad_norm=norm, loss=loss).accepted, controller.close


def _network(norm: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, 48):
        layers += [nn.Linear(inputs, 48), *([nn.BatchNorm1d(48)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(48, 10))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Mean over the batch."""
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels)


PART = Part("R11", "A poisoned second moment, and a NaN before BatchNorm (on digits)", settings, work, conclude)
