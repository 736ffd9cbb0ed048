"""Training loss, loss scale, learning rate, and the monitor that carries all signals."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_gradients import NoSync
from test_updates import Two, backward, trained
from torch import Tensor

from dist_stability.signals import (
    LearningRate,
    LossScale,
    Monitor,
    Signal,
    SignalValues,
    StepContext,
    TrainingLoss,
    UpdateRatio,
    UpdateRms,
    host_values,
    measure,
    step_context,
    verdict_values,
)

NAN, INF = math.nan, math.inf


def test_a_loss_is_compared_with_those_before_it() -> None:
    losses = [2.0, 2.1, 1.9, 2.2, 2.0, 1.8, 2.1, 2.0, 1.9, 5.0]
    signal = TrainingLoss(window=8)
    said = [signal.update(loss) for loss in losses]
    assert said[0] == {"training_loss": 2.0}
    assert "training_loss_std" not in said[7] and "training_loss_z" in said[8]
    last = said[9]
    before = losses[1:9]
    assert last["training_loss_mean"] == pytest.approx(statistics.mean(before))
    assert last["training_loss_std"] == pytest.approx(statistics.stdev(before))
    assert last["training_loss_z"] == pytest.approx((5.0 - statistics.mean(before)) / statistics.stdev(before))
    average = losses[0]
    for loss in losses[1:9]:
        average += 0.2 * (loss - average)
    assert last["training_loss_ratio"] == pytest.approx(5.0 / average)


def test_what_is_not_finite_is_reported_and_not_learned() -> None:
    clean, dirty = TrainingLoss(), TrainingLoss()
    for i in range(20):
        loss = 1.0 + 0.1 * (i % 3)
        expected = clean.update(loss)
        for bad in (NAN, INF, -INF):
            said = dirty.update(torch.tensor(bad))
            assert said["training_loss"] == pytest.approx(bad, nan_ok=True)
        assert dirty.update(loss) == expected
    assert math.isfinite(expected["training_loss_z"])


def test_losses_without_spread_or_without_a_positive_mean_have_no_ratio() -> None:
    flat, negative = TrainingLoss(), TrainingLoss()
    for _ in range(20):
        said = flat.update(0.5)
        below = negative.update(-1.0)
    assert said["training_loss_std"] == 0.0 and "training_loss_z" not in said and said["training_loss_ratio"] == 1.0
    assert "training_loss_ratio" not in below


def test_the_memory_goes_through_json_and_fits_another_window() -> None:
    first, second, short = TrainingLoss(), TrainingLoss(), TrainingLoss(window=10)
    for i in range(30):
        first.update(1.0 + 0.01 * i * (-1) ** i)
    saved = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(saved)
    short.load_state_dict(saved)
    assert second.update(1.5) == first.update(1.5)
    assert len(short.state_dict()["recent"]) == 10
    short.update(1.5)


@pytest.mark.parametrize("make", [TrainingLoss, LossScale])
@pytest.mark.parametrize(("window", "error"), [(0, ValueError), (True, TypeError), (10.0, TypeError), (-1, ValueError)])
def test_a_senseless_window_is_refused(make: Any, window: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="window must be an int >= "):
        make(window)


@pytest.mark.parametrize("loss", ["0.5", torch.ones(2), True])
def test_a_loss_that_is_no_number_is_refused(loss: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="the training loss must be"):
        TrainingLoss().update(loss)


def test_the_loss_scale_counts_halvings_below_its_recent_top() -> None:
    signal = LossScale(window=4)
    said = [signal.update(scale)["loss_scale_drop"] for scale in (256, 512, 256, 128, 64, 64, 64, 64, 128)]
    assert said == [0, 0, 1, 2, 3, 2, 1, 0, 0]
    assert signal.update(0.0) == {"loss_scale": 0.0} and signal.update(INF) == {"loss_scale": INF}
    assert signal.update(64)["loss_scale_drop"] == 1
    again = LossScale(window=4)
    again.load_state_dict(json.loads(json.dumps(signal.state_dict())))
    assert again.update(32) == signal.update(32)


def test_a_real_scaler_that_overflows_shows_as_a_drop() -> None:
    model, optimizer = trained(steps=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    signal, seen = LossScale(), []
    for seed, factor in enumerate((1.0, INF, 1.0)):
        model.zero_grad()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        scaler.scale(factor * model(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        context = step_context(model, optimizer, scaler=scaler)

        def step() -> None:
            scaler.step(optimizer)
            scaler.update()

        seen.append(measure(context, signal, step=step).values)
    assert [entry["loss_scale"] for entry in seen] == [1024.0, 1024.0, 512.0]
    assert [entry["loss_scale_drop"] for entry in seen] == [0.0, 0.0, 1.0]
    assert measure(step_context(model, optimizer), LossScale()).values == {}
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert measure(step_context(model, optimizer, scaler=off), LossScale()).values == {}


def test_the_learning_rate_is_the_largest_of_the_groups() -> None:
    model = Two()
    groups: list[dict[str, Any]] = [
        {"params": list(model.first.parameters()), "lr": torch.tensor(0.5)},
        {"params": list(model.second.parameters()), "lr": 0.25},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert measure(step_context(model, optimizer), LearningRate()).values == {"learning_rate": 0.5}


class Numbers(Signal):
    """Gives whatever it is told."""

    def __init__(self, name: str, mine: Any, width: int = 2) -> None:
        self.name, self.mine, self._width = name, mine, width

    def width(self, context: StepContext) -> int:
        return self._width

    def collect(self) -> Tensor | None:
        if isinstance(self.mine, Exception):
            raise self.mine
        return None if self.mine is None else torch.tensor(self.mine, dtype=torch.float64)

    def read(self, sums: Sequence[float]) -> SignalValues:
        return SignalValues({f"{self.name}{i}": value for i, value in enumerate(sums)})


def test_free_signals_are_always_on_and_can_be_replaced() -> None:
    free = ["learning_rate", "training_loss", "loss_scale", "effective_step"]
    assert [signal.name for signal in Monitor().signals] == free
    mine = TrainingLoss(window=9)
    names = [signal.name for signal in Monitor((UpdateRms(), mine)).signals]
    assert names == ["learning_rate", "loss_scale", "effective_step", "update_rms", "training_loss"]
    model, optimizer = trained()
    monitor = Monitor()
    monitor.before_step(step_context(model, optimizer, loss=torch.tensor(0.5)))
    assert monitor.read(monitor.collect().tolist()).values == {"learning_rate": 0.01, "training_loss": 0.5}
    monitor.before_step(step_context(model, optimizer))
    assert monitor.read(monitor.collect().tolist()).values == {"learning_rate": 0.01}


def test_sums_over_ranks_are_read_as_one() -> None:
    """Three ranks, by hand: what is not finite on one is NaN for all, the rest is a mean."""
    model, optimizer = trained()
    total, widths = torch.zeros(0), []
    for rank, loss in enumerate((1.0, 2.0, 6.0)):
        monitor = Monitor([Numbers("x", [rank, NAN if rank == 1 else 1.0]), Numbers("y", None)])
        monitor.before_step(step_context(model, optimizer, loss=loss))
        vector = monitor.collect()
        assert vector.isfinite().all() and vector.dtype == torch.float64
        widths.append(len(vector))
        total = vector if rank == 0 else total + vector
    said = monitor.read(total.tolist()).values
    assert len(set(widths)) == 1
    assert said["training_loss"] == 3.0 and said["x0"] == 3.0 and math.isnan(said["x1"])
    assert said["y0"] == said["y1"] == 0.0 and said["learning_rate"] == pytest.approx(0.01)


@pytest.mark.parametrize("wrong", [[1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]]])
def test_a_signal_of_the_wrong_length_is_nan_and_an_error(wrong: Any) -> None:
    model, optimizer = trained()
    monitor = Monitor([Numbers("x", wrong), Numbers("y", [3.0, 4.0])], free=False)
    monitor.before_step(step_context(model, optimizer))
    said = monitor.read(monitor.collect().tolist()).values
    assert math.isnan(said["x0"]) and math.isnan(said["x1"]) and (said["y0"], said["y1"]) == (3.0, 4.0)
    assert "signal x: collect() gave shape" in str(monitor.errors["x"])


@pytest.mark.parametrize("method", ["before_step", "after_step", "collect"])
def test_a_signal_that_raises_is_nan_and_an_error_and_is_forgotten_at_the_next_step(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    broken, whole = Numbers("x", [1.0, 2.0]), Numbers("y", [3.0, 4.0])
    monitor = Monitor([broken, whole], free=False)
    context = step_context(model, optimizer)
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise RuntimeError("broken on purpose")

        patch.setattr(broken, method, fail)
        monitor.before_step(context)
        monitor.after_step(context)
        said = monitor.read(monitor.collect().tolist()).values
        assert math.isnan(said["x0"]) and said["y0"] == 3.0
        assert str(monitor.errors["x"]) == "broken on purpose" and len(monitor.errors) == 1
        with pytest.raises(RuntimeError, match="broken on purpose"):
            measure(context, broken, step=lambda: None)
    monitor.before_step(context)
    assert monitor.read(monitor.collect().tolist()).values["x0"] == 1.0 and not monitor.errors


def test_a_loss_that_is_no_number_is_an_error_of_that_signal_alone() -> None:
    model, optimizer = trained()
    monitor = Monitor()
    monitor.before_step(step_context(model, optimizer, loss=torch.ones(3)))
    said = monitor.read(monitor.collect().tolist()).values
    assert said["learning_rate"] == 0.01 and math.isnan(said["training_loss"])
    assert "shape [3]" in str(monitor.errors["training_loss"])
    assert monitor.state_dict()["training_loss"] == {"recent": [], "average": None}


def test_sums_of_another_length_are_refused() -> None:
    model, optimizer = trained()
    monitor = Monitor()
    monitor.before_step(step_context(model, optimizer))
    with pytest.raises(ValueError, match="expected 16 sums"):
        monitor.read([0.0] * 11)


@pytest.mark.parametrize(
    ("signals", "error", "says"),
    [
        ([UpdateRms], TypeError, "call the class"),
        (["update_rms"], TypeError, "such as UpdateRms"),
        ([UpdateRms(), UpdateRms(every_tensor=True)], ValueError, "update_rms given more than once"),
    ],
)
def test_bad_signals_are_refused(signals: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Monitor(signals)


def test_settings_and_memory_of_a_monitor_go_through_json() -> None:
    monitor = Monitor([UpdateRms(every_tensor=True), UpdateRatio()])
    names = [name for name, _ in json.loads(json.dumps(monitor.settings()))]
    assert names == ["learning_rate", "training_loss", "loss_scale", "effective_step", "update_rms", "update_ratio"]
    assert ["update_rms", {"every_tensor": True, "every": 1}] in monitor.settings()
    model, optimizer = trained()
    for loss in (1.0, 2.0, 3.0):
        monitor.before_step(step_context(model, optimizer, loss=loss))
        monitor.read(monitor.collect().tolist())
    fresh = Monitor([UpdateRms(every_tensor=True), UpdateRatio()])
    fresh.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert fresh.state_dict() == monitor.state_dict() and monitor.state_dict()["training_loss"]["recent"] == [1, 2, 3]
    Monitor().load_state_dict({"gone": {"x": 1}})


def test_the_free_signals_wait_for_nothing() -> None:
    model, optimizer = trained()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    context = step_context(model, optimizer, loss=torch.tensor(1.0), scaler=scaler)
    monitor = Monitor()
    with NoSync():
        monitor.before_step(context)
        monitor.after_step(context)
        vector = monitor.collect()
    assert monitor.read(vector.tolist()).values["loss_scale"] == 65536.0


def test_what_the_host_knows_without_a_sum() -> None:
    model, optimizer = trained()
    assert host_values(step_context(model, optimizer, loss=0.5)) == {"learning_rate": 0.01, "training_loss": 0.5}
    assert host_values(step_context(model, optimizer, loss=torch.tensor(0.5))) == {"learning_rate": 0.01}
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    assert host_values(step_context(model, optimizer)) == {"learning_rate": 0.25}
    optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")
    assert host_values(step_context(model, optimizer)) == {}


def test_what_the_verdict_has() -> None:
    assert verdict_values(0.5, 2.0, 3.0) == {"gradient_norm": 3.0, "bar_fraction": 0.25}
    assert verdict_values(-1.0, 2.0, None) == {"bar_fraction": -0.5}
    for innovation, bound in ((None, 1.0), (NAN, 1.0), (1.0, INF), (1.0, 0.0), (1.0, None), (INF, 1.0), (1.0, NAN)):
        assert verdict_values(innovation, bound, None) == {}


def test_the_loop_in_the_docs() -> None:
    model, optimizer = trained()
    rms, ratio = UpdateRms(), UpdateRatio()
    for seed in range(3):
        backward(model, seed)
        context = step_context(model, optimizer, loss=0.5)
        said = measure(context, rms, ratio, step=optimizer.step)
        assert set(said.values) == {
            "update_rms",
            "update_rms_max",
            "update_rms_median",
            "effective_step",
            "update_ratio",
            "update_ratio_max",
        }
