"""Twins in one process: exact where they must be, and the exponents of a map that is known to its digits."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_stability import StabilityError
from dist_stability.diagnostics.growth import Verdict
from dist_stability.diagnostics.lyapunov import lyapunov
from dist_stability.diagnostics.perturbation import KScale, OneUlp, Perturbation, RandomUlps, Rebuilt
from dist_stability.diagnostics.sensitivity import sensitivity
from dist_stability.diagnostics.twins import Twin, TwinRun
from dist_stability.diagnostics.variance import variance_against_seeds
from dist_stability.snapshot.rng import forked

WHITE = (113**2 + 112**2) / 225**2


class Number(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self) -> Tensor:
        swish = lambda z: z * torch.sigmoid(z)  # noqa: E731
        p = WHITE * swish(self.m) + (1 - WHITE) * swish(-self.m)
        return 1024.0 * (F.softplus(p) - p)


def one_layer(lr: float) -> object:
    """SGD with weight decay 20 on the one number that matters in the published one-layer network."""

    def build(seed: int) -> TwinRun:
        model = Number(1.0 + 0.1 * seed)
        return TwinRun(model, torch.optim.SGD(model.parameters(), lr=lr, weight_decay=20.0), lambda _: model())

    return build


@pytest.mark.parametrize(
    ("lr", "exponent", "steps"),
    [
        (0.01, -0.97, 80),
        (0.03, -0.15, 300),
        (0.035, -0.42, 300),
        (0.04, -1.37, 300),
        (0.05, 0.39, 1500),
        (0.06, -0.10, 1000),
        (0.07, 0.80, 1500),
        (0.09, 0.66, 1500),
    ],
)
def test_the_one_layer_network_has_its_known_exponents(lr: float, exponent: float, steps: int) -> None:
    found = lyapunov(one_layer(lr), steps, skip=steps // 5, seed=1)  # type: ignore[arg-type]
    assert found.per_step == pytest.approx(exponent, abs=0.05)


def net(lr: float = 0.5, optimizer: str = "sgd", activation: type[nn.Module] = nn.Tanh, dropout: float = 0.1) -> object:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(96, 6, generator=draw)
    y = (torch.sin(3.0 * x.sum(1)) > 0).long()

    def build(seed: int) -> TwinRun:
        model = nn.Sequential(
            nn.Linear(6, 16), activation(), nn.Dropout(dropout), nn.Linear(16, 16), activation(), nn.Linear(16, 2)
        )
        made: torch.optim.Optimizer
        if optimizer == "sgd":
            made = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        else:
            made = getattr(torch.optim, optimizer)(model.parameters(), lr=lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(made, 1000)

        def loss(step: int) -> Tensor:
            random.random()
            rows = torch.randperm(96, generator=torch.Generator().manual_seed(step))[:32]
            return F.cross_entropy(model(x[rows]), y[rows])

        return TwinRun(model, made, loss, lambda _: schedule.step(), lambda: model(x).argmax(1))

    return build


@pytest.mark.parametrize("optimizer", ["sgd", "Adam", "AdamW"])
def test_powers_of_two_change_nothing_and_three_does(optimizer: str) -> None:
    build = net(0.3 if optimizer == "sgd" else 1e-2, optimizer)
    for k in (2, 4):
        found = sensitivity(build, KScale(k), 20, gate_steps=0)  # type: ignore[arg-type]
        assert set(found.relative_l1) == {0.0} and found.begun is None and found.verdict is Verdict.BENIGN
        assert found.churn == 0.0 and found.horizon().steps is None
    found = sensitivity(build, KScale(3), 5, gate_steps=5)  # type: ignore[arg-type]
    # The first gradients are equal: what differs is the rounding of the first update.
    assert found.begun == 0 and 0.0 < found.relative_l2[0] < 1e-6
    assert found.losses[0] == found.losses_perturbed[0]
    assert set(found.layers) == {"0.weight", "0.bias", "3.weight", "3.bias", "5.weight", "5.bias"}


def test_k_of_one_is_the_optimizers_own_step_for_sgd() -> None:
    build = net()
    twins = [Twin(build, 0, each) for each in (Perturbation(), KScale(1))]  # type: ignore[arg-type]
    for step in range(8):
        for twin in twins:
            twin.step(step)
    for one, other in zip(twins[0].space.live(), twins[1].space.live(), strict=True):
        assert torch.equal(one, other)


def test_a_twin_is_the_run_that_it_would_be_alone() -> None:
    """Dropout goes on drawing from step to step, and the other twin's draws are not seen."""
    build = net()
    twins = [Twin(build, 3, Perturbation()), Twin(build, 4, Perturbation())]  # type: ignore[arg-type]
    for step in range(5):
        for twin in twins:
            twin.step(step)
    with forked(3):
        run = build(3)  # type: ignore[operator]
        for step in range(5):
            run.optimizer.zero_grad()
            run.loss(step).backward()
            run.optimizer.step()
    for one, other in zip(twins[0].space.live(), run.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_that_is_over_driven_parts_and_one_that_is_not_does_not() -> None:
    slow = sensitivity(net(1e-3, dropout=0.0), RandomUlps(), 100)  # type: ignore[arg-type]
    fast = sensitivity(net(2.0, dropout=0.0), RandomUlps(), 100)  # type: ignore[arg-type]
    assert slow.verdict is Verdict.BENIGN and fast.verdict in (Verdict.RESTRAINED, Verdict.UNRESTRAINED)
    assert slow.growth is not None and fast.growth is not None
    assert fast.growth.rate > 0.1 > 10 * abs(slow.growth.rate)
    assert fast.growth.saturation is not None and fast.horizon().steps == fast.growth.saturation
    assert fast.ftle_per_lr_time == pytest.approx(fast.growth.rate / 2.0)
    assert sum(fast.layer_share.values()) == pytest.approx(1.0) and 1.0 <= fast.participation <= 6.0
    assert fast.churn is not None and fast.churn > slow.churn == 0.0  # type: ignore[operator]


def test_one_ulp_is_one_weight() -> None:
    build = net(0.0)
    found = sensitivity(build, OneUlp("3.weight", 17, step=1), 3, gate_steps=2)  # type: ignore[arg-type]
    assert found.begun == 1 and found.relative_l1[0] == 0.0
    assert [name for name, values in found.layers.items() if values[-1]] == ["3.weight"]
    assert found.participation == 1.0
    twin = Twin(build, 0, OneUlp("3.weight", 17))  # type: ignore[arg-type]
    before = twin.run.model[3].weight.detach().clone()
    twin.step(0)
    changed = (twin.run.model[3].weight != before).flatten().nonzero().flatten().tolist()
    assert changed == [17]
    with pytest.raises(StabilityError, match=r"no element 256"):
        sensitivity(build, OneUlp("3.weight", 256), 1, gate_steps=0)  # type: ignore[arg-type]
    with pytest.raises(StabilityError, match="no parameter 'weight'"):
        sensitivity(build, OneUlp("weight"), 1, gate_steps=0)  # type: ignore[arg-type]


def test_a_fraction_of_the_weights_changes_by_one_ulp() -> None:
    build = net(0.0)
    plain, changed = Twin(build, 0, Perturbation()), Twin(build, 0, RandomUlps(0.25))  # type: ignore[arg-type]
    plain.step(0)
    changed.step(0)
    one, other = (torch.cat([part.flatten() for part in twin.space.live()]) for twin in (plain, changed))
    moved = one != other
    assert 0.15 < moved.float().mean() < 0.35
    up = torch.nextafter(one, torch.full_like(one, math.inf))
    down = torch.nextafter(one, torch.full_like(one, -math.inf))
    assert bool(((other == up) | (other == down))[moved].all())


def test_another_way_to_build_the_same_run() -> None:
    """Summing a batch in two halves: another reduction order."""
    build = net(1.0, dropout=0.0)

    def halves(seed: int) -> TwinRun:
        run = build(seed)  # type: ignore[operator]
        whole = run.loss

        def loss(step: int) -> Tensor:
            return whole(step) / 3.0 + 2.0 * whole(step) / 3.0

        run.loss = loss
        return run

    found = sensitivity(build, Rebuilt(halves), 10, gate_steps=3)  # type: ignore[arg-type]
    assert found.begun is not None and found.relative_l2[-1] > 0.0 and found.perturbation == "rebuilt"


def test_a_run_that_does_not_repeat_itself_is_invalid() -> None:
    shared = iter(range(10**6))
    build = net()

    def unsteady(seed: int) -> TwinRun:
        run = build(seed)  # type: ignore[operator]
        steady = run.loss
        run.loss = lambda step: steady(step + next(shared))
        return run

    found = sensitivity(unsteady, steps=4)
    assert found.verdict is Verdict.INVALID and "nondeterministic" in found.reason and not found.relative_l2


def test_a_run_that_breaks_is_unrestrained() -> None:
    found = sensitivity(net(1e30, dropout=0.0), RandomUlps(), 30, gate_steps=0)  # type: ignore[arg-type]
    assert found.verdict is Verdict.UNRESTRAINED and len(found.losses) < 30


def test_the_callers_random_streams_are_left_alone() -> None:
    torch.manual_seed(7)
    random.seed(7)
    expected = torch.rand(3), random.random()
    torch.manual_seed(7)
    random.seed(7)
    sensitivity(net(), steps=3, gate_steps=2)  # type: ignore[arg-type]
    lyapunov(net(), 3)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


def test_rounding_against_seeds() -> None:
    def accuracy(run: TwinRun) -> float:
        assert run.predict is not None
        return float(run.predict().float().mean())

    perturbations = [KScale(1), KScale(2), KScale(3)]
    found = variance_against_seeds(net(0.1), accuracy, [0, 1, 2], perturbations, 15)  # type: ignore[arg-type]
    assert len(found.scores) == 3 and all(row[0] == row[1] for row in found.scores)
    assert found.std_seed > 0.0 and found.churn is not None and 0.0 <= found.ratio < 1.0
    with pytest.raises(StabilityError, match="two seeds"):
        variance_against_seeds(net(), accuracy, [0], perturbations, 1)  # type: ignore[arg-type]


def test_bad_settings_are_named() -> None:
    with pytest.raises(StabilityError, match=r"rank 0: KScale k: expected a whole number >= 1, got 0"):
        KScale(0)
    with pytest.raises(StabilityError, match="fraction"):
        RandomUlps(0.0)
    with pytest.raises(StabilityError, match="steps: expected a whole number >= 1, got 0"):
        sensitivity(net(), steps=0)  # type: ignore[arg-type]
    with pytest.raises(StabilityError, match="not RMSprop; use OneUlp"):
        sensitivity(net(1e-3, "RMSprop"), steps=2)  # type: ignore[arg-type]
    with pytest.raises(StabilityError, match="must return a TwinRun, got int"):
        sensitivity(lambda seed: 1)  # type: ignore[arg-type,return-value]
    with pytest.raises(StabilityError, match="0 <= skip < steps"):
        lyapunov(net(), 5, skip=5)  # type: ignore[arg-type]
