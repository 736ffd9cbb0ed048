"""A profile in one process: the paper's signature, what is reported beside it, and that nothing is left changed."""

from __future__ import annotations

import json
import math
import random
import warnings
from typing import Any

import pytest
import torch
from gpt import GPT, gpt, ids, loss
from torch import Tensor, nn

from dist_stability.diagnostics import rksp
from dist_stability.diagnostics.rksp import Fit, NoBlocks, Profile, RkspWarning, profile
from dist_stability.report.events import to_json


@pytest.mark.parametrize(
    ("norm", "near_unit", "radius"),
    [("pre", (0.13, 0.21), (2.1, 2.6)), ("post", (0.60, 0.70), None), ("none", (0.75, 0.84), (1.08, 1.14))],
)
def test_the_signature_of_the_paper(norm: str, near_unit: Any, radius: Any) -> None:
    """Width 256, 6 layers, N(0, 0.02^2), 2,048 random tokens: Table 1's rows by norm."""
    found = profile(gpt(norm, width=256, layers=6, heads=8), None, ids(32, 64))
    assert [each.name for each in found.blocks] == [f"blocks.{number}" for number in range(6)]
    assert found.score is not None and near_unit[0] <= found.score <= near_unit[1]
    if radius:
        assert radius[0] <= found.aggregates["radius"].mean <= radius[1]
    assert found.baselines.has_norm == (norm != "none")
    assert not found.truncated and not found.degenerate and found.warnings == ()
    print(found.table())


def small(norm: str = "pre", **options: Any) -> GPT:
    return gpt(norm, **{"width": 16, "layers": 2, "vocabulary": 128, "std": 0.1, **options})


def plain(found: Profile) -> Any:
    """For comparisons: a share of no modes is NaN, which is not equal to itself."""
    return to_json(found.to_dict())


BATCH = ids(8, 32, vocabulary=128)


def test_every_number_by_plain_formulas() -> None:
    """From the hidden states of one forward, for one block."""
    model = small()
    x = (model.token(BATCH) + model.position(torch.arange(32))).detach()
    y = model.blocks[0](x).detach()
    x, y = x.flatten(0, 1).double(), y.flatten(0, 1).double()
    found = profile(model, ["blocks.0"], BATCH, loss_fn=loss)
    block = found.blocks[0]
    assert block.tokens == 256 and block.width == block.rank == 16 and block.dropped == 0
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    fitted = torch.linalg.lstsq(centred_x, centred_y).solution.T
    moduli = torch.linalg.eigvals(fitted).abs()
    assert block.radius == pytest.approx(float(moduli.max()), rel=1e-9)
    assert block.masses.near_unit == pytest.approx(float(((moduli >= 0.9) & (moduli <= 1.05)).double().mean()))
    assert block.masses.unstable == pytest.approx(float((moduli > 1.05).double().mean()))
    assert block.masses.damped == pytest.approx(float((moduli < 0.8).double().mean()))
    assert block.relative_update == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-9)
    assert block.gain == pytest.approx(float(y.norm() / x.norm()), rel=1e-9)
    loss(model, BATCH).backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    assert found.baselines.gradient_norm == pytest.approx(float(norm), rel=1e-5)
    assert profile(model, ["blocks.0"], BATCH).baselines.gradient_norm is None


def test_aggregates_are_over_blocks() -> None:
    found = profile(small(layers=3), None, BATCH)
    shares = [each.masses.near_unit for each in found.blocks]
    summary = found.aggregates["near_unit"]
    assert found.score == summary.mean == pytest.approx(sum(shares) / 3)
    assert (summary.max, summary.min) == (max(shares), min(shares))
    assert summary.std == pytest.approx(float(torch.tensor(shares, dtype=torch.float64).std(correction=0)))
    assert found.baselines.relative_update == pytest.approx(sum(each.relative_update for each in found.blocks) / 3)


def test_variants_of_the_paper() -> None:
    model = small(std=0.02)
    found = {method: profile(model, None, BATCH, fit=Fit(method, rank=8)) for method in ("full", "randomized", "pca")}
    default = profile(model, None, BATCH)
    assert found["full"].score == pytest.approx(default.score)  # nothing lacks variance here, and a similarity
    assert not found["full"].truncated
    for method in ("randomized", "pca"):
        assert found[method].truncated and [each.rank for each in found[method].blocks] == [8, 8]
        assert any("not comparable" in each for each in found[method].warnings)
    strict = profile(model, None, BATCH, tau=1e-6)
    assert all(each.kept == 0.0 for each in strict.blocks)
    assert all(each.kept > 0.0 for each in profile(model, None, BATCH, tau=10.0).blocks)
    assert math.isnan(strict.aggregates["filtered_near_unit"].mean) and strict.score == default.score


def test_a_repeated_phrase_is_told() -> None:
    phrase = ids(1, 9, vocabulary=128).repeat(8, 4)[:, :32]

    class NoPositions(GPT):
        def forward(self, batch: Tensor) -> Tensor:
            x = self.token(batch)
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model = NoPositions("pre", width=16)
    with pytest.warns(RkspWarning, match="repeated phrase"):
        found = profile(model, None, phrase)
    assert found.blocks[0].rank == 8  # nine points span eight directions
    assert found.blocks[0].masses.near_unit != profile(model, None, phrase, fit=Fit("full")).blocks[0].masses.near_unit


def test_blocks_that_start_as_the_identity_get_no_score() -> None:
    model = small()
    for block in model.blocks:
        nn.init.zeros_(block.out.weight)
        nn.init.zeros_(block.down.weight)
    with pytest.warns(RkspWarning, match="not informative"):
        found = profile(model, None, BATCH)
    assert found.score is None and found.degenerate and all(each.degenerate for each in found.blocks)
    assert found.aggregates["near_unit"].mean == 1.0 and found.blocks[0].relative_update == 0.0


def test_too_few_tokens_are_told() -> None:
    with pytest.warns(RkspWarning, match="too few tokens: 32 for width 16"):
        assert profile(small(), None, BATCH, max_tokens=32).blocks[0].tokens == 32


def test_the_same_tokens_for_every_block() -> None:
    """A cap draws them from the seed; a mask leaves out padding."""
    model = small()
    first, again = (profile(model, None, BATCH, max_tokens=128) for _ in range(2))
    assert plain(first) == plain(again) and [each.tokens for each in first.blocks] == [128, 128]
    assert profile(model, None, BATCH, max_tokens=128, seed=1) != first
    mask = torch.ones(8, 32, dtype=torch.bool)
    mask[:, 20:] = False  # causal: what comes later changes nothing before
    masked = profile(model, None, BATCH, mask=mask)
    cut = profile(model, None, BATCH[:, :20])
    assert masked.blocks[0].tokens == 160
    for a, b in zip(masked.blocks, cut.blocks, strict=True):
        assert a.radius == pytest.approx(b.radius, rel=1e-5)
    with pytest.raises(ValueError, match=r"mask has the shape \[8, 31\]"):
        profile(model, None, BATCH, mask=mask[:, 1:])
    with pytest.raises(ValueError, match="mask must be bool"):
        profile(model, None, BATCH, mask=mask.long())


def test_less_memory_means_more_forwards_and_the_same_numbers() -> None:
    model = small(layers=4)
    forwards: list[int] = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    whole = profile(model, None, BATCH)
    assert len(forwards) == 2  # one for the shapes
    tight = profile(model, None, BATCH, memory=1)
    assert len(forwards) == 2 + 1 + 4
    assert plain(tight) == plain(whole)
    handle.remove()


def test_a_wide_model_is_truncated_and_says_so(monkeypatch: Any) -> None:
    """The same code, with the limit at width 8; the fit in a sketched basis is the fit in principal directions."""
    model = small()
    exact = profile(model, None, BATCH, fit=Fit("pca", rank=12))
    monkeypatch.setattr(rksp, "WIDEST_FULL_FIT", 8)
    monkeypatch.setattr(rksp, "_WIDE_RANK", 12)
    with pytest.warns(RkspWarning, match="truncated"):
        found = profile(model, None, BATCH)
    assert found.truncated and [each.rank for each in found.blocks] == [12, 12]
    for a, b in zip(found.blocks, exact.blocks, strict=True):
        assert a.radius == pytest.approx(b.radius, rel=1e-6)
        assert a.relative_update == pytest.approx(b.relative_update, rel=1e-9)


class Moody(GPT):
    """Draws random numbers in every mode, and counts its forwards in a buffer."""

    def __init__(self) -> None:
        super().__init__("pre", width=16, vocabulary=128)
        self.dropout, self.batch_norm = nn.Dropout(0.5), nn.BatchNorm1d(16)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: Tensor) -> Tensor:
        self.seen += 1
        x = self.dropout(self.token(batch))
        x = x + 0.01 * torch.randn_like(x) * random.random()
        for block in self.blocks:
            x = block(x)
        return self.head(self.batch_norm(x.transpose(1, 2)).transpose(1, 2))


def test_nothing_is_left_changed() -> None:
    model = Moody()
    model.blocks[0].eval()
    loss(model, BATCH).backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    flags = [module.training for module in model.modules()]
    streams = torch.random.get_rng_state(), random.getstate()
    first = profile(model, None, BATCH, loss_fn=loss)
    assert plain(first) == plain(profile(model, None, BATCH, loss_fn=loss))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), streams[0]) and random.getstate() == streams[1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


class Broken(GPT):
    def forward(self, batch: Tensor) -> Tensor:
        super().forward(batch)
        raise RuntimeError("out of memory, say")


def test_nothing_is_left_changed_by_a_forward_that_raises() -> None:
    model = Broken("pre", width=16)
    with pytest.raises(RuntimeError, match="out of memory"):
        profile(model, None, BATCH)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules()) and torch.backends.mha.get_fastpath_enabled()


def test_activations_that_are_not_finite() -> None:
    """Some tokens: left out and told. All of them: no spectrum, no score, and no crash."""
    model = small()
    with torch.no_grad():
        model.token.weight[3] = math.nan
    with pytest.warns(RkspWarning, match="not finite"):
        found = profile(model, ["blocks.0"], BATCH)
    assert found.blocks[0].dropped > 0 and found.score is not None
    assert found.blocks[0].tokens + found.blocks[0].dropped == BATCH.numel()
    with torch.no_grad():
        model.token.weight.fill_(math.nan)
    with pytest.warns(RkspWarning, match="no finite token"):
        found = profile(model, None, BATCH)
    assert found.score is None and found.blocks[0].problem == "no finite token"
    assert math.isnan(found.blocks[0].radius) and math.isnan(found.baselines.relative_update)


def test_a_constant_stream_has_no_spectrum() -> None:
    model = small()
    nn.init.zeros_(model.token.weight)
    nn.init.zeros_(model.position.weight)
    with pytest.warns(RkspWarning, match="the same for every token"):
        assert profile(model, None, BATCH).score is None


def test_results_are_plain() -> None:
    found = profile(small(), None, BATCH, loss_fn=loss)
    text = json.dumps(to_json(found.to_dict()), allow_nan=False)
    assert json.loads(text)["blocks"][0]["masses"]["near_unit"] == found.blocks[0].masses.near_unit
    assert "blocks.1" in found.table() and "gradient norm" in found.table()
    with pytest.raises(AttributeError):
        found.score = 0.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 0.0}, "tau must be"),
        ({"memory": 0}, "memory must be"),
        ({"max_tokens": 1}, "max_tokens must be"),
        ({"blocks": "blocks.0"}, "blocks must be a list of names"),
        ({"blocks": []}, "blocks must be a list of names"),
        ({"blocks": ["blocks.7"]}, "no module 'blocks.7'.*Candidates: blocks.0, blocks.1"),
        ({"blocks": ["blocks.0", "blocks.0"]}, "a name twice"),
        ({"blocks": ["head"]}, r"head: its input is \[8, 32, 16\], its output \[8, 32, 128\]"),
        ({"blocks": ["token"]}, "token: it was not called, or has no tensor"),
    ],
)
def test_senseless_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile(small(), arguments.pop("blocks", None), BATCH, **arguments)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(NoBlocks, match="found no list of like modules in Sequential"):
        profile(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), None, torch.randn(8, 4))


def test_half_precision_models_are_summed_in_double() -> None:
    model = small("none")
    single, half = profile(model, None, BATCH), profile(model.to(torch.bfloat16), None, BATCH)
    assert half.score == pytest.approx(single.score, abs=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile(model, None, BATCH)
