"""Gradient agreement of micro-batches in one process, against the cosine written out. Ranks: test_signal_ranks.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_gradients import NoSync
from test_updates import Two
from torch import Tensor

from dist_stability.parallel import clip_grad_norm_
from dist_stability.signals import GradientAgreement, RankAgreement, measure, step_context


def setup(sgd: float = 0.0) -> tuple[Two, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Two()
    return model, torch.optim.SGD(model.parameters(), lr=sgd)


def micro_backward(model: Two, seed: int, scale: Any = 1.0) -> None:
    draw = torch.Generator().manual_seed(seed)
    (scale * (model(torch.randn(4, 3, generator=draw)) - torch.randn(2, generator=draw)).square().mean()).backward()


def gradient(model: Two, *seeds: int) -> Tensor:
    other = Two()
    other.load_state_dict(model.state_dict())
    for seed in seeds:
        micro_backward(other, seed)
    return torch.cat([p.grad.flatten() for p in other.parameters()]).double()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("marked", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, 0.05, 100.0])
@pytest.mark.parametrize("base", [0, 10, 20])
def test_it_is_the_cosine_of_the_two_parts(marked: int, clip: float | None, base: int) -> None:
    model, optimizer = setup()
    agreement = GradientAgreement(optimizer)
    for number in range(4):
        micro_backward(model, base + number)
        if number + 1 == marked:
            agreement.mark()
    norm = None if clip is None else clip_grad_norm_(model, model.parameters(), clip)
    said = measure(step_context(model, optimizer, grad_norm=norm), agreement).values
    first = gradient(model, *range(base, base + marked))
    rest = gradient(model, *range(base + marked, base + 4))
    assert said["gradient_agreement"] == pytest.approx(cosine(first, rest), abs=2e-6)


def test_equal_parts_agree_and_opposite_parts_do_not() -> None:
    model, optimizer = setup()
    agreement = GradientAgreement(optimizer)
    for second, expected in ((1.0, 1.0), (-0.5, -1.0)):
        model.zero_grad()
        micro_backward(model, 0)
        agreement.mark()
        micro_backward(model, 0, second)
        said = measure(step_context(model, optimizer), agreement).values
        assert said["gradient_agreement"] == pytest.approx(expected, abs=1e-6)


def test_half_precision_gradients_whose_products_would_be_zero() -> None:
    model = Two()
    model.half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    agreement = GradientAgreement(optimizer)
    for second in (1e-5, 2e-5):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, second)
        if second == 1e-5:
            agreement.mark()
    said = measure(step_context(model, optimizer), agreement).values
    assert said["gradient_agreement"] == pytest.approx(1.0, abs=1e-6)


def test_a_scaler_changes_nothing() -> None:
    model, optimizer = setup()
    agreement, scaler = GradientAgreement(optimizer), torch.amp.GradScaler("cpu", init_scale=64.0)
    micro_backward(model, 0, scaler.scale(torch.ones(())))
    agreement.mark()
    micro_backward(model, 1, scaler.scale(torch.ones(())))
    scaler.unscale_(optimizer)
    said = measure(step_context(model, optimizer, scaler=scaler), agreement).values
    assert said["gradient_agreement"] == pytest.approx(cosine(gradient(model, 0), gradient(model, 1)), abs=2e-6)


def test_without_a_mark_or_without_a_second_part_there_is_nothing_to_say() -> None:
    model, optimizer = setup()
    agreement = GradientAgreement(optimizer)
    micro_backward(model, 0)
    assert measure(step_context(model, optimizer), agreement).values == {}
    agreement.mark()
    assert measure(step_context(model, optimizer), agreement).values == {}  # the mark came last
    micro_backward(model, 1)
    agreement.mark()
    micro_backward(model, 2)
    assert measure(step_context(model, optimizer), agreement).values != {}
    micro_backward(model, 3)
    assert measure(step_context(model, optimizer), agreement).values == {}  # one mark, one reading
    model.zero_grad()
    agreement.mark()  # no gradients yet
    micro_backward(model, 1)
    assert measure(step_context(model, optimizer), agreement).values == {}


@pytest.mark.parametrize("clip", [0.01, 0.1])
def test_a_mark_after_the_last_backward_is_known_through_the_rounding_of_a_clip(clip: float) -> None:
    model, optimizer = setup()
    agreement = GradientAgreement(optimizer)
    for seed in range(5):
        model.zero_grad()
        micro_backward(model, seed)
        agreement.mark()
        norm = clip_grad_norm_(model, model.parameters(), clip)
        assert measure(step_context(model, optimizer, grad_norm=norm), agreement).values == {}


def test_a_parameter_that_only_one_part_uses() -> None:
    model, optimizer = setup()
    agreement = GradientAgreement(optimizer)
    micro_backward(model, 9)
    agreement.mark()  # what it remembers of the bias is not to come back
    model.zero_grad()
    model.first.bias.requires_grad_(False)
    micro_backward(model, 0)
    agreement.mark()
    first = torch.cat([torch.zeros(4) if p.grad is None else p.grad.flatten() for p in model.parameters()]).double()
    model.first.bias.requires_grad_(True)
    micro_backward(model, 1)
    said = measure(step_context(model, optimizer), agreement).values
    assert said["gradient_agreement"] == pytest.approx(cosine(first, gradient(model, 1)), abs=2e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("early", [True, False])
def test_what_is_not_finite_is_nan(bad: float, early: bool) -> None:
    model, optimizer = setup()
    agreement = GradientAgreement(optimizer)
    micro_backward(model, 0, bad if early else 1.0)
    agreement.mark()
    micro_backward(model, 1, 1.0 if early else bad)
    assert math.isnan(measure(step_context(model, optimizer), agreement).values["gradient_agreement"])


def test_no_host_sync_and_no_new_memory_after_the_first_mark() -> None:
    model, optimizer = setup()
    agreement = GradientAgreement(optimizer)
    pointers = []
    for seed in range(3):
        model.zero_grad()
        micro_backward(model, seed)
        with NoSync():
            agreement.mark()
        micro_backward(model, seed + 10)
        context = step_context(model, optimizer, grad_norm=torch.tensor(1.0))
        kept = [p.grad.clone() for p in model.parameters()]
        with NoSync():
            agreement.before_step(context)
            agreement.collect()
        assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), kept, strict=True))
        pointers.append([copy.data_ptr() for copy in agreement._copies.values()])
    assert pointers[0] == pointers[1] == pointers[2]


@pytest.mark.parametrize(("replicas", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_senseless_replicas_are_refused(replicas: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="replicas must be an int >= 1"):
        GradientAgreement(setup()[1], replicas=replicas)


def test_rank_agreement_needs_ddp() -> None:
    with pytest.raises(TypeError, match="must be a DistributedDataParallel module, got Two"):
        RankAgreement(Two())
