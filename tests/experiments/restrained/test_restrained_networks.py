"""The one-layer network against its map, the linear equation, the reference controller, the networks."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_stability.experiments.restrained import cifar, heat, linear_bounds, overdriven, poisoning, watched
from dist_stability.experiments.restrained.networks import CifarResNet, Swish, small_digits
from dist_stability.experiments.restrained.one_layer import (
    DECAY,
    Network,
    Number,
    curvature,
    exponent,
    next_number,
    number_run,
    stretch,
)
from dist_stability.experiments.restrained.reference import ReferenceController
from dist_stability.experiments.restrained.twins import resnet_run
from dist_stability.experiments.vision import import_torchvision


@pytest.mark.parametrize("m", [-7.0, -0.3, 0.0, 1.0, 3.865, 12.0])
def test_the_map_is_gradient_descent_on_the_reduced_network(m: float) -> None:
    number = Number(m)
    (slope,) = torch.autograd.grad(number(), number.m, create_graph=True)
    (bend,) = torch.autograd.grad(slope, number.m)
    assert next_number(m, 0.07) == pytest.approx(m - 0.07 * (slope.item() + DECAY * m), rel=1e-10, abs=1e-12)
    assert curvature(m) == pytest.approx(float(bend) + DECAY, rel=1e-10)
    assert stretch(m, 0.07) == pytest.approx(1.0 - 0.07 * curvature(m))


def test_the_network_is_its_map_for_a_few_steps() -> None:
    network = Network(1.0)
    assert network.number == pytest.approx(1.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.07, weight_decay=DECAY)
    m = 1.0
    for _ in range(3):
        optimizer.zero_grad()
        network().backward()
        optimizer.step()
        m = next_number(m, 0.07)
        assert network.number == pytest.approx(m, rel=1e-9)


def test_a_run_of_the_number_starts_where_its_seed_says() -> None:
    assert float(number_run(0.01)(3).model.m) == pytest.approx(1.3)
    assert exponent(1.0, 0.03, 300) == pytest.approx(math.log(abs(stretch(3.865, 0.03))), abs=0.02)


def test_kinds_of_orbits() -> None:
    assert [overdriven._kind(1.0, lr, 600) for lr in (0.03, 0.07, 0.13)] == ["converges", "bounded", "blows up"]


def test_the_heat_equations_limit_has_its_grid_correction() -> None:
    result = {**heat.work({"points": 11, "steps": 1500}), "settings": {}}
    exact = 0.5 / math.sin(math.pi * 9 / 20) ** 2
    assert result["limit"] == pytest.approx(exact, rel=2e-3) and abs(exact - 0.5) > 0.01
    assert pytest.approx(0.50137, abs=1e-5) == heat.LIMIT
    assert all(check.passed for check in heat.conclude([{**result, "limit": 0.5016}]).checks)
    assert not heat.conclude([result]).checks[1].passed


def test_the_patches_have_one_eigenvalue() -> None:
    values = torch.linalg.eigvalsh(linear_bounds.gram())
    assert float(values[-1]) == pytest.approx(225**2 * 1024, rel=1e-12) and float(values[-2].abs()) < 1e-3


def test_formulas_agree_with_spectral_radii() -> None:
    assert max(linear_bounds._formula_errors()) < 1e-4


def test_depth_and_shapes() -> None:
    with pytest.raises(ValueError, match="6 n \\+ 2"):
        CifarResNet(19)
    net = CifarResNet(14, width=4)
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 14 - 1
    x = torch.linspace(-2, 2, 5)
    assert torch.allclose(Swish(1.0)(x), nn.functional.silu(x))
    assert len(small_digits()) == 1797


def test_the_learning_rate_drops_at_its_milestones_and_predictions_are_of_the_test_set() -> None:
    run = resnet_run(lr=0.1, batch=8, examples=1700, depth=8, momentum=0.9, milestones=(1,))(0)
    assert run.predict is not None and run.after_step is not None
    assert run.predict().shape == (97,) and run.model.training
    run.optimizer.step()  # type: ignore[union-attr]
    run.after_step(0)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)  # type: ignore[union-attr]
    assert resnet_run(lr=0.1, batch=8, examples=1797, depth=8)(0).predict is None


class Counted(nn.Module):
    """A weight whose loss is set from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def test_the_reference_follows_its_algorithm() -> None:
    model = Counted()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    values = iter([1.0, 1.5, 1.56, 1.4, math.nan])
    controller = ReferenceController(model, optimizer, lambda _: torch.tensor(next(values)))
    said, weights = [], []
    for _ in range(4):
        model.weight.grad = torch.ones(1)
        said.append(controller.step())
        weights.append(float(model.weight))
    # 1.5 is 0.5 above 1.0; then the average is 1.05, and 1.56 is too much; NaN is.
    assert said == [True, False, True, False] and weights == [-1.0, -1.0, -2.0, -2.0]


@pytest.mark.slow
def test_a_nan_before_batchnorm_locks_the_reference_up_and_not_the_controller() -> None:
    results = []
    for settings in (poisoning.settings(True)[0], poisoning.settings(True)[1]):
        results.append({**poisoning.work(settings), "settings": settings})
    assert all(check.passed is not False for check in poisoning.conclude(results).checks)
    worse = {**results[0]["arms"], "guarded": results[0]["arms"]["unguarded"]}
    bad = poisoning.conclude([{**results[0], "arms": worse}, results[1]]).checks
    assert [check.what for check in bad if check.passed is False] == [
        "guarded: effective step over the clean run's, 20 steps later"
    ]


def test_a_watched_run_is_the_run_itself() -> None:
    """Watching changes no bit, and reads at its pace; a loss that is not finite ends it."""
    x, y = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss_fn(model: nn.Module, batch: object) -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    model, optimizer = made()
    trace = watched.watch(model, optimizer, loss_fn, lambda _: None, 24, [None], margin_every=5, rho_every=4)
    plain, optimizer = made()
    for _ in range(24):
        optimizer.zero_grad()
        loss_fn(plain, None).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert len(trace.losses) == len(trace.norms) == len(trace.states) == 24
    assert list(trace.margins) == [5, 10, 15, 20] and set(trace.rhos) <= {0, 4, 8, 12, 16, 20}
    model, optimizer = made()
    broken = watched.watch(
        model, optimizer, lambda m, b: loss_fn(m, b) * (math.nan if b == 3 else 1.0), lambda step: step, 9, [0],
        margin_every=5, rho_every=4,
    )  # fmt: skip
    assert len(broken.losses) == 4 and math.isnan(broken.losses[-1])


def test_crops_and_flips_are_a_function_of_seed_and_step() -> None:
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).view(2, 3, 32, 32) + 1.0
    first = cifar.augmented(images, 0, 5)
    assert torch.equal(first, cifar.augmented(images, 0, 5)) and not torch.equal(first, cifar.augmented(images, 0, 6))
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    windows = [padded[:, :, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    for image in range(2):
        assert any(
            torch.equal(first[image], one) for window in windows for one in (window[image], window[image].flip(-1))
        )


def test_the_full_scale_wants_a_gpu_and_runs_a_few_steps_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_torchvision().datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        pixels = torch.randint(256, (40, 3072), dtype=torch.uint8, generator=draw).numpy()
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [number % 10 for number in range(40)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(number) for number in range(10)]}))
    part = cifar.part(tmp_path)
    results = [{**part.work(settings), "settings": dict(settings)} for settings in part.settings(True)]
    assert all(len(result["accuracies"]) == 2 for result in results), "two epochs of one batch"
    assert part.conclude(results).rows[0][0] == 0
    full = part.settings(False)
    assert len(full) == 9 and {settings["depth"] for settings in full} == {56}
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="needs a CUDA device"):
            part.work(full[0])
    entries = [
        {"settings": {"seed": seed, "k": k}, "accuracies": [90.0 + seed + 0.5 * k]} for seed in (0, 1) for k in (1, 3)
    ]
    assert part.conclude(entries).checks[0].measured == "1"
