"""The spectral penalty: its value and gradient by plain formulas, whom it reaches, when it is applied and when not."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from gpt import GPT, gpt, ids, loss
from torch import Tensor, nn

from dist_stability import StabilityError
from dist_stability.diagnostics import kss
from dist_stability.diagnostics.blocks import NoBlocks
from dist_stability.diagnostics.kss import BROAD, LOCAL, PAPER, Shaping, SpectralShaping
from dist_stability.diagnostics.penalty import REASONS, Skip, attached, small_map, spectral_cost
from dist_stability.diagnostics.rksp import profile

BATCH = ids(8, 32, vocabulary=64)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def small(norm: str = "none", std: float = 0.3, **options: Any) -> GPT:
    return gpt(norm, width=16, layers=3, vocabulary=64, std=std, **options).double()


def plain_cost(matrix: Tensor, beta: float, gamma: float) -> float:
    total, near = 0.0, 0.0
    moduli = [abs(value) for value in torch.linalg.eigvals(matrix).tolist()]
    for modulus in moduli:
        up = 1 / (1 + math.exp(-20 * (modulus - 1.05)))
        total += up * math.log(1 + math.exp(modulus - 1.05)) ** 2
        near += (1 - up) / (1 + math.exp(-20 * (modulus - 0.90))) / len(moduli)
    return total + beta * (near - gamma) ** 2


def test_cost_and_gradient_by_plain_formulas() -> None:
    matrix = torch.eye(6, dtype=torch.float64) + 0.4 * draws(6, 6) / 6**0.5
    cost = spectral_cost(matrix, 0.7, 0.3)
    assert cost.value == pytest.approx(plain_cost(matrix, 0.7, 0.3), rel=1e-12)
    for row, column in ((0, 0), (2, 5), (4, 1)):
        step = torch.zeros_like(matrix)
        step[row, column] = 1e-6
        slope = (plain_cost(matrix + step, 0.7, 0.3) - plain_cost(matrix - step, 0.7, 0.3)) / 2e-6
        assert float(cost.gradient[row, column]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    leaf = matrix.clone().requires_grad_()
    value = attached(leaf, cost)
    (2.0 * value).backward()
    assert float(value) == cost.value
    torch.testing.assert_close(leaf.grad, 2.0 * cost.gradient)


def test_what_cannot_be_priced_is_a_skip() -> None:
    with pytest.raises(Skip, match="defective"):
        spectral_cost(torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64), 1.0, 0.4)
    x = draws(64, 4)
    bad = x.clone()
    bad[3, 2] = math.inf
    for pair in ((bad, x), (x, bad)):
        with pytest.raises(Skip, match="non-finite activations"):
            small_map(*pair, 4, generator())
    for few in (torch.ones(64, 4), x[:7]):
        with pytest.raises(Skip, match="too little variance"):
            small_map(few, few, 4, generator())


def test_the_map_in_leading_directions() -> None:
    """With all directions its eigenvalues are those of the map; with some, those of the map seen from there."""
    turn = torch.linalg.qr(draws(12, 12, seed=1))[0]
    x = (draws(600, 12) * torch.tensor([9.0, 8.0, 7.0, 6.0, *[0.01] * 8]).double()) @ turn.T + 4.0
    matrix = torch.eye(12, dtype=torch.float64) + 0.3 * draws(12, 12, seed=2) / 12**0.5
    y = x @ matrix.T - 3.0
    whole = torch.linalg.eigvals(small_map(x, y, 12, generator())).abs().sort().values
    torch.testing.assert_close(whole, torch.linalg.eigvals(matrix).abs().sort().values, rtol=1e-6, atol=1e-6)
    leading = turn[:, :4]
    part = torch.linalg.eigvals(small_map(x, y, 4, generator())).abs().sort().values
    torch.testing.assert_close(
        part, torch.linalg.eigvals(leading.T @ matrix @ leading).abs().sort().values, rtol=1e-3, atol=1e-3
    )
    assert small_map(x[:40], y[:40], 12, generator()).shape == (5, 5)  # one direction for 8 tokens
    assert small_map(x[:40], y[:40], 12, generator(), 4).shape == (10, 10)


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    return {name: each for name, each in zip(names, found, strict=True) if each is not None and each.any()}


@pytest.mark.parametrize("local", [True, False])
def test_whom_the_penalty_reaches(local: bool) -> None:
    """Local: the block itself. Otherwise everything before it, too. Nothing after it, either way."""
    model = small()
    shaping = SpectralShaping(model, ["blocks.1"], local=local)
    total = shaping(loss, BATCH)
    assert shaping.last is not None and shaping.last.blocks == ("blocks.1",)
    assert float(total) == pytest.approx(float(loss(model, BATCH)) + shaping.last.penalty, rel=1e-12)
    own = gradients(model, total - loss(model, BATCH))
    own = {name: each for name, each in own.items() if float(each.abs().max()) > 1e-12}
    reached = {".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0] for name in own}
    assert reached == ({"blocks.1"} if local else {"blocks.1", "blocks.0", "token", "position"})


@pytest.mark.parametrize("local", [True, False])
def test_the_gradient_is_the_slope_of_the_penalty(local: bool) -> None:
    model = small()

    def penalty() -> float:
        shaping = SpectralShaping(model, ["blocks.1"], local=local, rank=16)
        shaping(loss, BATCH)
        return shaping.last.penalty

    total = SpectralShaping(model, ["blocks.1"], local=local, rank=16)(loss, BATCH)
    found = gradients(model, total - loss(model, BATCH))
    for name in ("blocks.1.down.weight", "blocks.1.mix.weight"):
        weight = model.get_parameter(name)
        weight.data[3, 5] += 1e-6
        up = penalty()
        weight.data[3, 5] -= 2e-6
        down = penalty()
        weight.data[3, 5] += 1e-6
        assert float(found[name][3, 5]) == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-9)


def test_the_loss_is_the_mean_over_blocks() -> None:
    model = small()
    alone = []
    for name in ("blocks.0", "blocks.1", "blocks.2"):
        shaping = SpectralShaping(model, [name], alpha=0.3, max_tokens=10**6, rank=16)
        shaping(loss, BATCH)
        alone.append(shaping.last.penalty)
    together = SpectralShaping(model, alpha=0.3, max_tokens=10**6, rank=16)
    together(loss, BATCH)
    assert together.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert together.last.penalty == pytest.approx(sum(alone) / 3, rel=1e-6)
    profiled = profile(model, None, BATCH)
    block = profiled.blocks[1]
    assert block.rank == 16 and block.masses.unstable > 0 and alone[1] > 0  # the same block, the same eigenvalues


def test_descending_the_penalty_tames_a_block() -> None:
    model = small()
    before = profile(model, None, BATCH)
    shaping = SpectralShaping(model, alpha=1.0, rank=16, beta=0.0)
    optimizer = torch.optim.Adam(model.blocks.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        shaping(lambda model, batch: model(batch).sum() * 0.0, BATCH).backward()
        optimizer.step()
    after = profile(model, None, BATCH)
    assert before.aggregates["unstable"].mean > 0.4
    assert after.aggregates["unstable"].mean < 0.5 * before.aggregates["unstable"].mean
    assert after.aggregates["radius"].mean < before.aggregates["radius"].mean - 0.3


def test_more_directions_tame_what_fewer_leave() -> None:
    """64 tokens of width 16: eight directions for eight tokens each, all sixteen for four."""
    few = ids(2, 32, vocabulary=64)
    left = {}
    for name, preset in (("local", LOCAL), ("broad", BROAD)):
        model = small()
        shaping = SpectralShaping(model, preset=preset, alpha=1.0, beta=0.0)
        optimizer = torch.optim.Adam(model.blocks.parameters(), lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            shaping(lambda model, batch: model(batch).sum() * 0.0, few).backward()
            optimizer.step()
        left[name] = profile(model, None, BATCH).aggregates["radius"].mean
    assert left["broad"] < left["local"] - 0.2


def test_the_schedule() -> None:
    """Every third step, half of the blocks, drawn anew, equal for equal seeds, and going on from a checkpoint."""
    model = gpt("none", width=16, layers=6, vocabulary=64)
    make = dict(every=3, layers=0.5)
    first, second = SpectralShaping(model, **make), SpectralShaping(model, **make)
    plan = [first.chosen(step) for step in range(30)]
    assert plan == [second.chosen(step) for step in range(30)]
    assert all(len(names) == (3 if step % 3 == 0 else 0) for step, names in enumerate(plan))
    assert len({names for names in plan if names}) > 3
    assert [SpectralShaping(model, seed=1, **make).chosen(step) for step in range(30)] != plan
    for step in range(4):
        first(loss, BATCH)
        assert first.last.step == step and first.last.blocks == plan[step]
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        first(loss, BATCH), second(loss, BATCH)
        assert first.last == second.last
    assert Shaping(alpha=0.15, every=10, layers=0.5, local=False) == PAPER
    assert Shaping(alpha=0.15, every=1, layers=1.0, local=True) == LOCAL
    assert SpectralShaping(model, preset=PAPER, every=20).settings == Shaping(every=20, layers=0.5, local=False)


def test_a_step_without_penalty_is_the_plain_step() -> None:
    model = small()
    shaping = SpectralShaping(model, every=2)
    shaping(loss, BATCH)
    assert torch.equal(shaping(loss, BATCH), loss(model, BATCH))
    assert shaping.last == kss.Applied(1, (), {}, 0.0)


class Wild(nn.Module):
    """A block with dropout, batch statistics and draws of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.dropout, self.norm = nn.Linear(16, 16), nn.Dropout(0.5), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training or random.random() >= 0
        return x + self.dropout(self.norm(self.body(x))) + 1e-3 * torch.randn_like(x)


def test_training_itself_is_not_touched() -> None:
    """Draws, batch statistics, flags and hooks are those of the forward alone."""
    torch.manual_seed(0)
    model = nn.Sequential(Wild(), Wild())
    model[1].dropout.eval()
    x = torch.randn(128, 16)

    def run(call: Any) -> list[Any]:
        torch.manual_seed(1)
        random.seed(1)
        for part in model:
            part.norm.reset_running_stats()
        call()
        state = [part.norm.running_mean.clone() for part in model]
        return [*state, torch.random.get_rng_state(), torch.tensor(hash(random.getstate()))]

    shaping = SpectralShaping(model)
    plain = run(lambda: model(x).square().mean())
    shaped = run(lambda: shaping(lambda model, x: model(x).square().mean(), x))
    assert shaping.last.blocks == ("0", "1")
    assert all(map(torch.equal, plain, shaped))
    assert model[0].training and model[0].dropout.training and not model[1].dropout.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_skips_are_counted_and_the_rest_goes_on(monkeypatch: Any) -> None:
    model = small()
    shaping = SpectralShaping(model)
    with torch.no_grad():
        model.blocks[2].down.bias[0] = math.nan
    shaping(lambda model, batch: model(batch).nan_to_num().square().mean(), BATCH).backward()
    assert shaping.last.blocks == ("blocks.0", "blocks.1")
    assert shaping.last.skipped == {"blocks.2": "non-finite activations"}
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.blocks[1].parameters())

    def fails(*arguments: Any) -> Any:
        raise Skip(REASONS[2])

    monkeypatch.setattr(kss, "spectral_cost", fails)
    assert torch.equal(shaping(loss, BATCH).nan_to_num(), loss(model, BATCH).nan_to_num())
    assert shaping.last.blocks == () and shaping.last.penalty == 0.0
    assert shaping.skips["non-finite activations"] == 2 and shaping.skips["no convergence"] == 2
    assert shaping.state_dict()["skips"]["no convergence"] == 2


def test_under_autocast() -> None:
    """The second forward runs as the first did; the algebra does not."""
    model = gpt("pre", width=16, layers=2, vocabulary=64, std=0.3)
    kinds: list[torch.dtype] = []
    model.blocks[0].up.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    shaping = SpectralShaping(model)

    def inside(model: Any, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, batch)

    total = shaping(inside, BATCH)
    total.backward()
    assert kinds == [torch.bfloat16, torch.bfloat16] and shaping.last.blocks == ("blocks.0", "blocks.1")
    assert total.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in model.blocks.parameters())


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x += self.body(x).detach()
        return x


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.0}, "alpha must be a positive number"),
        ({"every": 0}, "every must be at least 1"),
        ({"layers": 1.5}, "layers must be above 0"),
        ({"rank": 0}, "rank must be"),
        ({"tokens_each": 0}, "tokens_each must be"),
        ({"max_tokens": 7}, "max_tokens must be at least tokens_each = 8"),
        ({"beta": -1.0}, "beta must be"),
        ({"gamma": 2.0}, "gamma must be"),
    ],
)
def test_senseless_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"SpectralShaping: {message}"):
        SpectralShaping(small(), **change)


def test_models_that_cannot_be_shaped_are_refused() -> None:
    with pytest.raises(TypeError, match="apha"):
        SpectralShaping(small(), apha=1.0)
    with pytest.raises(NoBlocks, match=r"no module 'h\.0'.*Candidates: blocks\.0"):
        SpectralShaping(small(), ["h.0"])
    with pytest.raises(NoBlocks, match="found no list"):
        SpectralShaping(nn.Linear(2, 2))
    with pytest.raises(StabilityError, match="compiled"):
        SpectralShaping(torch.compile(small()))
    x = torch.randn(64, 4)
    with pytest.raises(NoBlocks, match="did not call 0 with a tensor, or got none of the same shape"):
        SpectralShaping(nn.Sequential(Growing()), ["0"])(lambda model, x: model(x).sum(), x)
    with pytest.raises(NoBlocks, match="writes into its input"):
        SpectralShaping(nn.Sequential(InPlace(), InPlace()))(lambda model, x: model(x.clone()).sum(), x)
    frozen = small()
    for parameter in frozen.parameters():
        parameter.requires_grad = False
    with pytest.raises(NoBlocks, match="has no gradient"):
        SpectralShaping(frozen, local=False)(loss, BATCH)
