"""The formulas against the update's own matrix, and both bounds against systems whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_stability import StabilityError
from dist_stability.diagnostics.bounds import stability_bounds
from dist_stability.diagnostics.update_rule import UpdateRule

rates = st.floats(1e-3, 1.0)
momenta = st.floats(0.0, 0.98)
decays = st.floats(0.0, 0.5)


def radius(*rows: list[float]) -> float:
    return float(torch.linalg.eigvals(torch.tensor(rows, dtype=torch.float64)).abs().max())


def sgd_radius(s: float, lr: float, mu: float, dampening: float, nesterov: bool, decay: float) -> float:
    g = s + decay  # buffer' = mu buffer + (1 - dampening) g x;  x' = x - lr (g x + mu buffer') or x - lr buffer'
    d = 1.0 - dampening
    if nesterov:
        return radius([1 - lr * g * (1 + mu), -lr * mu * mu], [g, mu])
    return radius([1 - lr * d * g, -lr * mu], [d * g, mu])


def adam_radius(s: float, lr: float, beta1: float, coupled: float, decoupled: float) -> float:
    g = (1 - beta1) * (s + coupled)
    return radius([1 - lr * decoupled - lr * g, -lr * beta1], [g, beta1])


def assert_bounds(rule: UpdateRule, of: object) -> None:
    """Inside it contracts, outside it grows, within a part in 10,000 of the width."""
    lower, upper = rule.stable.lower, rule.stable.upper
    little = 1e-4 * (upper - lower)
    assert of(lower + little) < 1.0 < of(lower - little)  # type: ignore[operator]
    assert of(upper - little) < 1.0 < of(upper + little)  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(rates, momenta, decays, st.booleans(), st.sampled_from([0.0, 0.3]))
def test_the_range_of_sgd_is_where_its_matrix_contracts(
    lr: float, mu: float, decay: float, nesterov: bool, dampening: float
) -> None:
    mu = mu if mu > 0.01 else 0.0
    nesterov, dampening = (nesterov and mu > 0), (dampening if mu and not nesterov else 0.0)
    rule = UpdateRule.sgd(lr, mu, dampening=dampening, nesterov=nesterov, weight_decay=decay)
    assert_bounds(rule, lambda s: sgd_radius(s, lr, mu, dampening, nesterov, decay))


@settings(max_examples=60, deadline=None)
@given(rates, momenta, decays, st.booleans())
def test_the_range_of_adam_is_where_its_matrix_contracts(
    lr: float, beta1: float, decay: float, decoupled: bool
) -> None:
    rule = UpdateRule.adam(lr, beta1, weight_decay=decay, decoupled=decoupled)
    coupled, direct = (0.0, decay) if decoupled else (decay, 0.0)
    assert_bounds(rule, lambda s: adam_radius(s, lr, beta1, coupled, direct))


def test_the_numbers_of_the_literature() -> None:
    assert UpdateRule.adam(1.0).stable.upper == pytest.approx(38.0)
    assert UpdateRule.sgd(0.1, 0.9, nesterov=True).stable.upper == pytest.approx(13.571, abs=1e-3)
    assert UpdateRule.sgd(0.1, 0.9).stable.upper == pytest.approx(38.0)
    assert 0.0 not in UpdateRule.sgd(0.1).stable and 1.0 in UpdateRule.sgd(0.1).stable


class Vector(nn.Module):
    """Parameters without a network: the loss is a function of them."""

    def __init__(self, *parts: Tensor) -> None:
        super().__init__()
        self.parts = nn.ParameterList([part.clone() for part in parts])

    def forward(self) -> Tensor:
        return torch.cat([part.flatten() for part in self.parts])


def quadratic(eigenvalues: Tensor) -> object:
    return lambda model, _: 0.5 * (eigenvalues * model() ** 2).sum()


ALPHAS = [
    (1.1e7, False),
    (1.2e7, False),
    (1.3e7, True),
    (1.9e8, True),
    (1.9999e8, True),
    (2.1e8, False),
    (2.2e8, False),
]


@pytest.mark.parametrize(("alpha", "stable"), ALPHAS)
def test_the_linear_equation_is_stable_between_its_two_bounds(alpha: float, stable: bool) -> None:
    """The published linear example: 32 x 32 kernel on a checkerboard, a = -0.5, beta = 1, step 1e-8.

    Every patch is plus or minus one pattern, so the Gram matrix has one eigenvalue, 225^2 * 1024.
    """
    sign = torch.ones(1024, dtype=torch.float64)
    sign[::2] = -1.0
    model = Vector(torch.linspace(-1, 1, 1024, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8, weight_decay=alpha)
    found = stability_bounds(model, optimizer, lambda m, _: -0.125 * 225**2 * (sign @ m()) ** 2, [None], steps=4)
    assert found.stable is stable
    assert found.upper_margin == pytest.approx(alpha / 2e8, rel=1e-3)
    assert found.lower_violation == pytest.approx(max(0.0, 1e-8 * (0.25 * 225**2 * 1024 - alpha)), rel=1e-3)
    assert "At this point" in found.text()


WHITE = (113**2 + 112**2) / 225**2


def one_layer(model: nn.Module, _: object) -> Tensor:
    """The published one-layer network on the checkerboard, reduced to the one number that matters."""
    m = model()[0]
    swish = lambda z: z * torch.sigmoid(z)  # noqa: E731
    p = WHITE * swish(m) + (1 - WHITE) * swish(-m)
    return 1024.0 * (F.softplus(p) - p)


def test_the_one_layer_network_has_its_known_curvatures() -> None:
    """Weight decay 20: curvature 20 - 256 at 0; the fixed point at 3.865 has 62.0, stable up to 0.0323."""
    model = Vector(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, weight_decay=20.0)
    at_zero = stability_bounds(model, optimizer, one_layer, [None], steps=2)
    assert at_zero.lower_violation == pytest.approx(0.03 * 236.0, rel=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        one_layer(model, None).backward()
        with torch.no_grad():
            for part in model.parameters():
                part.grad += 1e-3 if part.item() == 0.0 else 0.0
        optimizer.step()
    assert abs(model().item()) == pytest.approx(3.865, abs=1e-3)
    found = stability_bounds(model, optimizer, one_layer, [None], steps=2)
    assert found.lower_violation == 0.0 and found.stable
    assert 2.0 * found.upper_margin / 0.03 == pytest.approx(62.0, abs=0.05)
    assert 0.03 * found.headroom == pytest.approx(0.0323, rel=0.01)


def test_adam_sees_the_hessian_through_its_second_moment() -> None:
    """Groups with their own learning rate and decay; the reference is the dense scaled matrix."""
    torch.manual_seed(0)
    eigenvalues = torch.tensor([3.0, -1.0, 40.0, 0.1], dtype=torch.float64)
    model = Vector(torch.randn(2, dtype=torch.float64), torch.randn(2, dtype=torch.float64))
    loss = quadratic(eigenvalues)
    one, two = model.parameters()
    groups = [{"params": [one], "lr": 1e-2, "weight_decay": 0.0}, {"params": [two], "lr": 3e-2, "weight_decay": 0.3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-3)
    for _ in range(7):
        optimizer.zero_grad()
        loss(model, None).backward()  # type: ignore[operator]
        optimizer.step()
    scale, shrink = [], []
    for group in optimizer.param_groups:
        state = optimizer.state[group["params"][0]]
        denominator = (state["exp_avg_sq"] / (1 - 0.95**7)).sqrt() + 1e-3
        scale.append(group["lr"] / denominator / (1 - 0.8**8))
        shrink += [group["lr"] * group["weight_decay"]] * 2
    gain = (1 - 0.8) / (1 + 0.8)
    sharp = eigenvalues * torch.cat(scale)
    decay = torch.tensor(shrink, dtype=torch.float64)
    found = stability_bounds(model, optimizer, loss, [None], steps=4, peak_factor=4.0)  # type: ignore[arg-type]
    assert found.upper_margin == pytest.approx(float((gain * sharp + decay).max()) / 2, rel=1e-6)
    assert found.lower_violation == pytest.approx(-float((sharp + decay).min()), rel=1e-6)
    assert found.peak_margin == pytest.approx(4 * found.upper_margin)
    assert found.headroom * found.upper_margin == pytest.approx(1.0)
    assert found.largest_shares[0][0] == "parts.1" and found.reliable


def test_bad_settings_are_named() -> None:
    model = Vector(torch.ones(2))
    loss = quadratic(torch.ones(2))
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(StabilityError, match="no second moments yet"):
        stability_bounds(model, adam, loss, [None])  # type: ignore[arg-type]
    with pytest.raises(StabilityError, match="maximize"):
        stability_bounds(model, torch.optim.SGD(model.parameters(), maximize=True), loss, [None])  # type: ignore[arg-type]
    with pytest.raises(StabilityError, match="no stability limit is known for Adagrad"):
        stability_bounds(model, torch.optim.Adagrad(model.parameters()), loss, [None])  # type: ignore[arg-type]
    sgd = torch.optim.SGD(model.parameters())
    with pytest.raises(StabilityError, match="batches is empty"):
        stability_bounds(model, sgd, loss, [])  # type: ignore[arg-type]
    with pytest.raises(StabilityError, match="peak_factor"):
        stability_bounds(model, sgd, loss, [None], peak_factor=math.nan)  # type: ignore[arg-type]
    with pytest.raises(StabilityError, match="steps must be at least 1"):
        stability_bounds(model, sgd, loss, [None], steps=0)  # type: ignore[arg-type]
    with pytest.raises(StabilityError, match="0-d tensor"):
        stability_bounds(model, sgd, lambda m, _: m(), [None])
    with pytest.raises(StabilityError, match="reached no parameter"):
        stability_bounds(model, sgd, lambda m, _: torch.ones((), requires_grad=True), [None])
