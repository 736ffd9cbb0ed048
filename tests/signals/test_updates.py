"""Update RMS, update ratio and group norms against plain formulas, in one process."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_gradients import NoSync
from torch import Tensor, nn

from dist_stability.signals import (
    EffectiveStep,
    GroupNorms,
    Monitor,
    SignalValues,
    StepContext,
    UpdateRatio,
    UpdateRms,
    measure,
    step_context,
)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def backward(model: nn.Module, seed: int = 0, factor: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, generator=draw)
    model.zero_grad()
    (factor * model(x.to(next(model.parameters()).dtype)).square().mean()).backward()


def adam(model: nn.Module, kind: str = "loop", **options: Any) -> torch.optim.Optimizer:
    flags: dict[str, Any] = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[kind]
    return torch.optim.AdamW(model.parameters(), lr=0.01, **flags, **options)


def trained(kind: str = "loop", steps: int = 3, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Two()
    optimizer = adam(model, kind, **options)
    for seed in range(steps):
        backward(model, seed)
        optimizer.step()
    backward(model, steps)
    return model, optimizer


def formula(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """g^2 / max(v_hat, ...) of each element, in the words of the paper."""
    state, group = optimizer.state[parameter], optimizer.param_groups[0]
    moment = state["exp_avg_sq"].double()
    ratio = parameter.grad.double().square() / moment.clamp_min(group["eps"] ** 2)
    return ratio * (1 - group["betas"][1] ** float(state["step"]))


@pytest.mark.parametrize("kind", ["loop", "foreach", "fused"])
def test_update_rms_is_the_formula(kind: str) -> None:
    model, optimizer = trained(kind)
    single = {name: formula(optimizer, p) for name, p in model.named_parameters()}
    said = measure(step_context(model, optimizer), UpdateRms(every_tensor=True))
    for name, ratio in single.items():
        assert said.values[f"update_rms/{name}"] == pytest.approx(float(ratio.mean().sqrt()), rel=1e-6)
    everything = torch.cat([ratio.flatten() for ratio in single.values()])
    assert said.values["update_rms"] == pytest.approx(float(everything.mean().sqrt()), rel=1e-6)
    largest = max(single, key=lambda name: float(single[name].mean()))
    assert said.where == {"update_rms_max": largest}
    assert said.values["update_rms_max"] == said.values[f"update_rms/{largest}"]
    assert said.values["update_rms_median"] == sorted(said.values[f"update_rms/{name}"] for name in single)[1]


def test_update_rms_is_one_for_a_steady_gradient_and_scales_with_a_burst() -> None:
    weight = nn.Parameter(torch.zeros(6))
    optimizer = torch.optim.Adam([weight], lr=0.0)
    for _ in range(5):
        weight.grad = torch.full((6,), -2.0)
        optimizer.step()
    model = nn.Module()
    model.weight = weight
    assert measure(step_context(model, optimizer), UpdateRms()).values["update_rms"] == pytest.approx(1.0, rel=1e-5)
    weight.grad = torch.full((6,), 600.0)
    assert measure(step_context(model, optimizer), UpdateRms()).values["update_rms"] == pytest.approx(300.0, rel=1e-5)


def test_update_rms_before_the_first_step_and_without_a_second_moment_is_no_number() -> None:
    model, optimizer = trained(steps=0)
    assert measure(step_context(model, optimizer), UpdateRms()) == SignalValues()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sgd.step()
    assert measure(step_context(model, sgd), UpdateRms()) == SignalValues()


def test_a_second_moment_made_before_its_first_step_does_not_count() -> None:
    model, optimizer = trained()
    early = next(model.parameters())
    optimizer.state[early] = {"step": torch.tensor(0.0), "exp_avg_sq": torch.zeros_like(early)}
    said = measure(step_context(model, optimizer), UpdateRms(every_tensor=True)).values
    assert "update_rms/first.weight" not in said and "update_rms/first.bias" in said
    others = torch.cat([formula(optimizer, p).flatten() for p in list(model.parameters())[1:]])
    assert said["update_rms"] == pytest.approx(float(others.mean().sqrt()), rel=1e-6)


def test_a_parameter_without_gradient_is_left_out_and_no_state_appears() -> None:
    model, optimizer = trained()
    model.first.bias.grad = None
    said = measure(step_context(model, optimizer), UpdateRms(every_tensor=True)).values
    assert "update_rms/first.bias" not in said and "update_rms/first.weight" in said
    fresh = adam(model)
    measure(step_context(model, fresh), UpdateRms())
    assert not fresh.state


def test_batches_of_one_tensor_give_what_one_batch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> SignalValues:
        model, optimizer = trained()
        signals = UpdateRms(every_tensor=True), UpdateRatio(every_tensor=True), GroupNorms()
        return measure(step_context(model, optimizer), *signals, step=optimizer.step)

    whole = run()
    monkeypatch.setattr("dist_stability.signals.sums.BATCH_BYTES", 1)
    calls: list[int] = []
    original = torch._foreach_sqrt
    monkeypatch.setattr(torch, "_foreach_sqrt", lambda tensors: calls.append(len(tensors)) or original(tensors))
    assert run() == whole and calls == [1, 1, 1]


def test_bfloat16_weights_and_moments_are_compared_in_float32() -> None:
    torch.manual_seed(0)
    low = Two().bfloat16()
    optimizer = adam(low)
    for seed in range(3):
        backward(low, seed)
        optimizer.step()
    said = measure(step_context(low, optimizer), UpdateRms()).values["update_rms"]
    everything = torch.cat([formula(optimizer, p).flatten() for p in low.parameters()])
    assert said == pytest.approx(float(everything.mean().sqrt()), rel=1e-2)


def test_untouched_elements_in_float16_are_zero_and_not_nan() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.weight.grad = torch.tensor([0.0, 0.0, 2.0, 2.0], dtype=torch.float16)
    moment = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float16)
    optimizer.state[model.weight] = {"step": torch.tensor(10**5), "exp_avg_sq": moment}
    said = measure(step_context(model, optimizer), UpdateRms()).values
    assert said["update_rms"] == pytest.approx(math.sqrt(2.0), rel=1e-3)


def test_a_bf16_gradient_against_a_float32_moment() -> None:
    model, optimizer = trained()
    weight = model.second.weight
    model.second.weight.grad = None
    model.second.weight.data = weight.data.bfloat16()
    model.second.weight.grad = torch.full_like(model.second.weight, 0.5)
    said = measure(step_context(model, optimizer), UpdateRms(every_tensor=True)).values
    expected = formula(optimizer, model.second.weight).mean().sqrt()
    assert said["update_rms/second.weight"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["gradient", "moment"])
def test_what_is_not_finite_is_nan_and_has_a_name(bad: float, where: str) -> None:
    model, optimizer = trained()
    broken = model.first.bias.grad if where == "gradient" else optimizer.state[model.first.bias]["exp_avg_sq"]
    broken[1] = bad
    said = measure(step_context(model, optimizer), UpdateRms(every_tensor=True))
    if (bad, where) == (math.inf, "moment"):  # g / inf: this step is 0 there, and the parameter stands still
        assert math.isfinite(said.values["update_rms"])
        return
    assert math.isnan(said.values["update_rms"]) and math.isnan(said.values["update_rms/first.bias"])
    assert said.where["update_rms_max"] == "first.bias" and math.isfinite(said.values["update_rms/first.weight"])
    assert math.isfinite(said.values["update_rms_median"])


def test_huge_finite_gradients_do_not_overflow() -> None:
    model, optimizer = trained()
    for parameter in model.parameters():
        parameter.grad.fill_(1e25)  # its square is infinite in float32
    said = measure(step_context(model, optimizer), UpdateRms(), GroupNorms()).values
    assert 1e25 < said["update_rms"] < math.inf and 1e25 < said["gradient_norm/0"] < math.inf


def moved(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[SignalValues, dict[str, tuple[Tensor, Tensor]]]:
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    said = measure(step_context(model, optimizer), UpdateRatio(every_tensor=True), step=optimizer.step)
    return said, {name: (p.detach().double() - before[name], before[name]) for name, p in model.named_parameters()}


def test_update_ratio_is_the_formula() -> None:
    model, optimizer = trained()
    said, deltas = moved(model, optimizer)
    delta = torch.cat([d.flatten() for d, _ in deltas.values()])
    theta = torch.cat([t.flatten() for _, t in deltas.values()])
    assert said.values["effective_step"] == pytest.approx(float(delta.abs().mean()) / 0.01, rel=1e-5)
    assert said.values["update_ratio"] == pytest.approx(float(delta.norm() / theta.norm()), rel=1e-5)
    ratios = {name: float(d.norm() / t.norm()) for name, (d, t) in deltas.items()}
    for name, ratio in ratios.items():
        assert said.values[f"update_ratio/{name}"] == pytest.approx(ratio, rel=1e-5)
    assert said.where["update_ratio_max"] == max(ratios, key=ratios.__getitem__)
    assert said.values["update_ratio_max"] == pytest.approx(max(ratios.values()), rel=1e-5)


def effective(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return measure(step_context(model, optimizer), EffectiveStep(), step=optimizer.step).values


@pytest.mark.parametrize("kind", ["loop", "foreach", "fused"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_effective_step_is_what_the_weights_did(kind: str, amsgrad: bool) -> None:
    for steps in (0, 1, 7):
        model, optimizer = trained(kind, steps, weight_decay=0.0, amsgrad=amsgrad)
        expected = moved(*twin(model, optimizer, weight_decay=0.0, amsgrad=amsgrad))[0].values["effective_step"]
        assert effective(model, optimizer)["effective_step"] == pytest.approx(expected, rel=1e-4)
    for state in optimizer.state.values():
        state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"].mul_(1e4)
    backward(model, 99)
    assert effective(model, optimizer)["effective_step"] == pytest.approx(0.01 * expected, rel=0.5)


def test_effective_step_of_a_large_tensor_is_estimated_from_all_over_it() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(300, 100))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model.weight.grad = torch.zeros(300, 100)
    model.weight.grad[:75] = 1.0  # a quarter of it moves, by 1 each
    assert effective(model, optimizer)["effective_step"] == pytest.approx(0.25, abs=0.002)


def test_effective_step_weighs_tensors_by_their_elements_and_needs_both_moments() -> None:
    model, optimizer = trained(weight_decay=0.0)
    optimizer.state[model.second.weight].clear()
    optimizer.state[model.first.bias]["exp_avg"].zero_()
    optimizer.state[model.first.weight]["exp_avg"].copy_(optimizer.state[model.first.weight]["exp_avg_sq"].sqrt())
    sgd = torch.optim.SGD([model.second.weight], lr=0.1)
    context = step_context(model, optimizer)
    signal = EffectiveStep()
    signal.after_step(context)
    correction = math.sqrt(1 - 0.999**3) / (1 - 0.9**3)
    ((value),) = signal.read(signal.collect().tolist()).values.values()
    assert value == pytest.approx(correction * 12 / 16, rel=1e-4)
    only = nn.Module()
    only.weight = model.second.weight
    assert effective(only, sgd) == {}


@pytest.mark.parametrize("layout", ["plain", "transposed", "large"])
@pytest.mark.parametrize("change", ["in place", "other tensors", "other memory"])
def test_effective_step_follows_the_moments_wherever_they_go(change: str, layout: str) -> None:
    shape = (90, 100) if layout == "large" else (6, 4)
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(shape).t() if layout == "transposed" else torch.ones(shape))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model.weight.grad = torch.full_like(model.weight, 3.0)
    optimizer.step()
    signal, state = EffectiveStep(), optimizer.state[model.weight]
    signal.after_step(step_context(model, optimizer))
    for name in ("exp_avg", "exp_avg_sq"):
        new = torch.full_like(state[name], 0.05 if name == "exp_avg" else 0.001)
        if change == "in place":
            state[name].copy_(new)
        elif change == "other tensors":
            state[name] = new
        else:
            state[name].data = new
    signal.after_step(step_context(model, optimizer))
    total, count = signal.collect().tolist()
    assert total / count == pytest.approx(0.5, rel=1e-4)


def test_effective_step_changes_no_state_and_takes_low_precision() -> None:
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    model = nn.Module()
    model.weight = weight
    optimizer = torch.optim.Adam([weight], lr=0.1, foreach=False)
    weight.grad = torch.full_like(weight, 3.0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"][0])
    signal = EffectiveStep()
    signal.after_step(step_context(model, optimizer))
    after = optimizer.state_dict()["state"][0]
    assert all(torch.equal(before[name], after[name]) for name in before)
    total, count = signal.collect().tolist()
    assert total / count == pytest.approx(1.0, rel=0.02)


def test_each_group_has_its_learning_rate_and_zero_counts_for_nothing() -> None:
    model, _ = trained()
    groups: list[dict[str, Any]] = [
        {"params": [model.first.weight], "lr": 0.5},
        {"params": [model.first.bias], "lr": torch.tensor(0.25)},
        {"params": [model.second.weight], "lr": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    gradients = torch.cat([model.first.weight.grad.flatten(), model.first.bias.grad])
    said, _ = moved(model, optimizer)
    assert said.values["effective_step"] == pytest.approx(float(gradients.abs().mean()), rel=1e-4)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert "effective_step" not in moved(model, optimizer)[0].values


def test_weights_of_zero_have_no_ratio_but_count_in_the_whole() -> None:
    model, optimizer = trained()
    model.first.bias.data.zero_()
    said, deltas = moved(model, optimizer)
    assert "update_ratio/first.bias" not in said.values and said.where["update_ratio_max"] != "first.bias"
    delta = torch.cat([d.flatten() for d, _ in deltas.values()])
    theta = torch.cat([t.flatten() for _, t in deltas.values()])
    assert said.values["update_ratio"] == pytest.approx(float(delta.norm() / theta.norm()), rel=1e-5)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert "update_ratio" not in moved(model, optimizer)[0].values


def test_a_step_that_did_not_happen_has_no_ratio_and_the_next_one_is_unharmed() -> None:
    model, optimizer = trained()
    signal = UpdateRatio()
    assert measure(step_context(model, optimizer), signal).values == {}
    model.first.weight.data.mul_(2.0)  # between the steps
    expected = moved(*twin(model, optimizer))[0].values
    said = measure(step_context(model, optimizer), signal, step=optimizer.step).values
    assert said["update_ratio"] == pytest.approx(expected["update_ratio"], rel=1e-6)
    copies = [copy.data_ptr() for copy in signal._before]
    backward(model, 9)
    measure(step_context(model, optimizer), signal, step=optimizer.step)
    assert [copy.data_ptr() for copy in signal._before] == copies  # kept, not made anew


def twin(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    other = Two()
    other.load_state_dict(model.state_dict())
    again = adam(other, **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # loading shares the tensors
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        b.grad = a.grad.clone()
    return other, again


def test_a_step_to_nan_is_nan_and_has_a_name() -> None:
    model, optimizer = trained()
    model.first.bias.grad[0] = math.nan
    said, _ = moved(model, optimizer)
    assert math.isnan(said.values["update_ratio"]) and math.isnan(said.values["effective_step"])
    assert said.where["update_ratio_max"] == "first.bias"


def test_group_norms_by_name_or_number() -> None:
    model, _ = trained()
    groups = [{"params": list(model.first.parameters()), "name": "first"}, {"params": [model.second.weight]}]
    first, second = torch.optim.SGD(groups[:1], lr=0.1), torch.optim.AdamW(groups[1:], lr=0.1)
    said = measure(step_context(model, [first, second]), GroupNorms()).values
    expected = torch.cat([model.first.weight.grad.flatten(), model.first.bias.grad]).norm()
    assert said["gradient_norm/first"] == pytest.approx(float(expected), rel=1e-6)
    assert said["gradient_norm/1"] == pytest.approx(float(model.second.weight.grad.norm()), rel=1e-6)
    same = torch.optim.SGD([{**groups[0], "name": "all"}, {**groups[1], "name": "all"}], lr=0.1)
    assert set(measure(step_context(model, same), GroupNorms()).values) == {"gradient_norm/0", "gradient_norm/1"}


def test_nothing_waits_for_the_device_and_no_bit_of_the_run_changes() -> None:
    def run(watched: bool) -> list[Tensor]:
        model, optimizer = trained(steps=2)
        monitor = Monitor((UpdateRms(), UpdateRatio(), GroupNorms()))  # and the free ones
        for seed in range(3):
            backward(model, seed)
            context = step_context(model, optimizer, loss=torch.tensor(1.0)) if watched else None
            if context is not None:
                with NoSync():
                    monitor.before_step(context)
            optimizer.step()
            if context is not None:
                with NoSync():
                    monitor.after_step(context)
                    vector = monitor.collect()
                monitor.read(vector.tolist())
        assert not monitor.errors
        state = [t for entry in optimizer.state.values() for t in entry.values()]
        return [*model.parameters(), *state, *(p.grad for p in model.parameters())]

    for with_signals, without in zip(run(True), run(False), strict=True):
        assert torch.equal(with_signals, without)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["loop", "foreach", "fused"])
def test_on_cuda_nothing_synchronizes_and_the_numbers_are_those_of_the_cpu(kind: str) -> None:
    expected = measure(*_steps(kind, "cpu"))
    context, *signals = _steps(kind, "cuda")
    monitor = Monitor(signals)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        monitor.before_step(context)
        monitor.after_step(context)
        vector = monitor.collect()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not monitor.errors and vector.is_cuda
    said = monitor.read(vector.tolist())
    for name, value in expected.values.items():
        assert said.values[name] == pytest.approx(value, rel=1e-3)


def _steps(kind: str, device: str) -> tuple[StepContext, UpdateRms, GroupNorms]:
    torch.manual_seed(0)
    model = Two().to(device)
    optimizer = adam(model, kind)
    for seed in range(3):
        model.zero_grad()
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).to(device)
        loss = model(x).square().mean()
        loss.backward()
        if seed < 2:
            optimizer.step()
    return step_context(model, optimizer, loss=loss), UpdateRms(), GroupNorms()
