"""The probe sees what Adam would do in its first steps, and leaves no bit behind."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from gpt import gpt, ids, loss
from torch import Tensor, nn

from dist_stability.diagnostics import lr_probe


def batches(count: int = 3) -> list[Tensor]:
    return [ids(4, 16, vocabulary=64, seed=number) for number in range(count)]


def small(**options: Any) -> nn.Module:
    return gpt("pre", width=16, vocabulary=64, context=16, std=0.1, **options)


def by_hand(model: nn.Module, lr: float, steps: int) -> tuple[list[float], list[float]]:
    """What torch's own Adam sees on a copy."""
    twin = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=lr)
    losses, norms = [], []
    for step in range(steps + 1):
        optimizer.zero_grad()
        value = loss(twin, batches()[step % 3])
        value.backward()
        losses.append(float(value.detach()))
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])))
        optimizer.step()
    return losses, norms


@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_the_virtual_steps_are_those_of_adam(lr: float) -> None:
    model = small()
    model.position.weight.requires_grad_(False)
    found = lr_probe.risk(model, loss, batches(), lr)
    losses, norms = by_hand(model, lr, 8)
    assert found.losses == pytest.approx(losses, rel=1e-3)
    assert found.gradient_norms == pytest.approx(norms, rel=1e-3)
    assert found.score == max(
        *(math.log10(value / 50) for value in found.losses),
        *(math.log10(value / 500) for value in found.gradient_norms),
    )


def test_more_is_riskier_and_the_limits_count() -> None:
    scores = [lr_probe.risk(small(), loss, batches(), lr).score for lr in (1e-3, 0.3, 3.0)]
    assert scores[0] < scores[1] < scores[2] and scores[0] < 0 < scores[2]
    other = lr_probe.risk(small(), loss, batches(), 1e-3, limits=lr_probe.Limits(loss=1.0))
    assert other.score == math.log10(max(other.losses)) > 0


class Untidy(nn.Module):
    """Has all that a probe could leave changed: a buffer, a frozen weight, an unused one, draws, one part in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = small(), nn.BatchNorm1d(64)
        self.drop, self.unused = nn.Dropout(0.5), nn.Parameter(torch.tensor([-0.0, math.nan]))
        self.inner.position.weight.requires_grad_(False)
        self.drop.eval()

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        return self.drop(self.norm(self.inner(x).flatten(0, 1))).unflatten(0, x.shape)


def bits(model: nn.Module) -> list[bytes]:
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors.append(torch.random.get_rng_state())
    flags = bytes(part.training for part in model.modules())
    return [*(tensor.detach().numpy().tobytes() for tensor in tensors), flags]


@pytest.mark.parametrize("fails_at", [None, 0, 3])
@pytest.mark.parametrize("search", [False, True])
def test_everything_is_undone(fails_at: int | None, search: bool) -> None:
    torch.manual_seed(3)
    model = Untidy()
    loss(model, batches()[0]).backward()
    gradients = [p.grad for p in model.parameters()]
    before, calls = bits(model), []

    def watched(called: Any, batch: Tensor) -> Tensor:
        calls.append([p.detach().clone() for p in called.parameters()])
        if len(calls) - 1 == fails_at:
            raise ZeroDivisionError("on purpose")
        return loss(called, batch)

    function = lr_probe.stable_learning_rate if search else lr_probe.risk
    arguments = {} if search else {"lr": 0.1}
    if fails_at is None:
        function(model, watched, batches(), **arguments)
        assert not torch.equal(calls[0][0], calls[1][0])  # it did move
    else:
        with pytest.raises(ZeroDivisionError):
            function(model, watched, batches(), **arguments)
    assert bits(model) == before
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))


def test_training_goes_on_from_there_as_if_nothing_had_been() -> None:
    ends = []
    for look in (False, True):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for batch in batches():
            optimizer.zero_grad()
            loss(model, batch).backward()
            if look:
                lr_probe.risk(model, loss, batches(), 1.0)
            optimizer.step()
        ends.append(bits(model))
    assert ends[0] == ends[1]


def test_low_precision_weights_are_stepped_and_come_back() -> None:
    model = small().bfloat16()
    before = [p.detach().clone() for p in model.parameters()]
    found = lr_probe.risk(model, loss, batches(), 0.05)
    assert len(found.losses) == 9 and found.losses[0] != found.losses[1]
    assert all(map(torch.equal, before, model.parameters()))


def test_what_is_not_finite_is_infinitely_risky() -> None:
    found = lr_probe.risk(small(), lambda model, batch: loss(model, batch) * math.nan, batches(), 0.1)
    assert found.score == math.inf and len(found.losses) == 1
    found = lr_probe.risk(small(), lambda model, batch: loss(model, batch).square() * 1e20, batches(), 0.1)
    assert found.score > 3 and len(found.losses) == 1


def quadratic(model: Any, batch: Tensor) -> Tensor:
    return model.weight.square().sum() * 1.0


def line(start: float = 1.0) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, start)
    return model


def test_the_search_brackets_the_first_rate_over_the_threshold() -> None:
    """The first Adam step moves by the rate: with one step and a limit of 100 on w^2, w = 1 - lr, the edge is 11."""
    settings: dict[str, Any] = {"steps": 1, "limits": lr_probe.Limits(100.0, 1e9), "high": 1000.0}
    found = lr_probe.stable_learning_rate(line(), quadratic, [None], precision=1.01, **settings)
    assert found.lr is not None and found.too_risky is not None
    assert found.lr < 11 < found.too_risky <= found.lr * 1.01
    lower = lr_probe.stable_learning_rate(line(), quadratic, [None], threshold=-2.0, low=1e-3, **settings)
    assert lower.lr is None and lower.too_risky == 1e-3  # where it starts, w^2 is a hundredth of the limit
    none = lr_probe.stable_learning_rate(line(), quadratic, [None], **{**settings, "high": 5.0})
    assert none.lr == 5.0 and none.too_risky is None and none.tried[-1].lr == 5.0
    already = lr_probe.stable_learning_rate(line(), quadratic, [None], low=20.0, **settings)
    assert already.lr is None and already.too_risky == 20.0 and len(already.tried) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.0}, "lr must be a positive"),
        ({"lr": math.nan}, "lr must be a positive"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"limits": lr_probe.Limits(loss=-1.0)}, "limits.loss must be a positive"),
        ({"batches": []}, "non-empty list"),
        ({"batches": ids(4, 16)}, "pass \\[batch\\]"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lr_probe.risk(small(), loss, **{"batches": batches(), "lr": 0.1, **change})


def test_bad_settings_of_the_search_are_named() -> None:
    for change, words in (
        ({"precision": 1.0}, "precision"),
        ({"high": 1e-9}, "high"),
        ({"threshold": math.inf}, "thr"),
    ):
        with pytest.raises(ValueError, match=words):
            lr_probe.stable_learning_rate(small(), loss, batches(), **change)
    with pytest.raises(ValueError, match="no trainable"):
        lr_probe.risk(small().requires_grad_(False), loss, batches(), 0.1)
