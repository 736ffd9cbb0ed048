"""What the signals see, and how early, in real, small training runs. ``-m slow -s`` prints docs/signals.md's figures.

Fixed before the reported runs: a series crosses when it exceeds 3 times the median of its last 50 values; crossings
less than 50 steps apart are one episode; a crossing foretells a loss spike if it comes 1 to 30 steps before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_stability.signals import (
    GradientAgreement,
    GroupNorms,
    Monitor,
    UpdateRatio,
    UpdateRms,
    measure,
    step_context,
)

FACTOR, WINDOW, HORIZON = 3.0, 50, 30
SERIES = ("gradient_norm", "update_rms", "update_rms_max", "update_rms_median")


def crossings(series: Sequence[float]) -> list[int]:
    """First steps of the episodes in which the series is far above its recent median."""
    found: list[int] = []
    last = -WINDOW
    for step in range(WINDOW, len(series)):
        if series[step] > FACTOR * statistics.median(series[step - WINDOW : step]):
            if step - last >= WINDOW:
                found.append(step)
            last = step
    return found


def leads(signal: Sequence[int], spikes: Sequence[int]) -> list[int]:
    """For each spike that was foretold, by how many steps."""
    ahead = [[spike - step for step in signal if 1 <= spike - step <= HORIZON] for spike in spikes]
    return [max(found) for found in ahead if found]


def watched(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, *signals: Any) -> dict[str, float]:
    """Backward, measure, step: the numbers of one step."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    said = measure(step_context(model, optimizer), *signals, step=optimizer.step).values
    return {"loss": float(loss.detach()), "gradient_norm": float(norm), **said}


def converged(seed: int, rate: float, steps: int) -> dict[str, list[float]]:
    """Full-batch regression with Adam, long past convergence.

    The gradient shrinks, the second moment shrinks after it, steps stay as long as ever; what then grows in the
    direction of highest curvature comes as a spike, again and again. Nothing is injected.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    x = torch.randn(128, 4)
    y = torch.sin(2 * x[:, :1]) * x[:, 1:2]
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    signal, record = UpdateRms(), [{name: 0.0 for name in ("loss", *SERIES)}]
    for _ in range(steps):
        record.append({**record[0], **watched(model, optimizer, F.mse_loss(model(x), y), signal)})
    return {name: [entry[name] for entry in record[1:]] for name in record[0]}


def test_update_rms_rises_before_the_loss_when_the_second_moment_has_fallen_behind() -> None:
    """Every loss spike of a run past convergence is foretold, at least one step and mostly several steps before."""
    run = converged(seed=100, rate=0.01, steps=1000)
    spikes = [step for step in crossings(run["loss"]) if step > 200]
    ahead = leads(crossings(run["update_rms_median"]), spikes)
    assert len(spikes) >= 2 and len(ahead) == len(spikes)
    assert min(ahead) >= 1 and statistics.median(ahead) >= 2


def poisoned(seed: int, factor: float, length: int, steps: int = 240, at: int = 80) -> list[dict[str, float]]:
    """Regression on fresh batches under AdamW; the gradients of ``length`` steps are multiplied."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    signals = UpdateRms(), UpdateRatio()
    record = []
    for step in range(steps):
        x = torch.randn(64, 4)
        loss = F.mse_loss(model(x), torch.sin(2 * x[:, :1]) * x[:, 1:2])
        for_gradient = loss * (factor if at <= step < at + length else 1.0)
        entry = watched(model, optimizer, for_gradient, *signals)
        record.append({**entry, "loss": float(loss.detach())})
    return record


def test_a_burst_shows_before_the_step_and_the_poison_it_leaves_in_the_effective_step() -> None:
    """Afterwards the loss looks fine, and every step is many times too short."""
    burst, clean = poisoned(100, 300.0, 10), poisoned(100, 1.0, 10)
    assert burst[80]["loss"] == clean[80]["loss"]  # the first bad step's own loss knows nothing of it
    assert burst[80]["update_rms"] == pytest.approx(300 * clean[80]["update_rms"], rel=1e-3)
    after = range(140, 240)
    short = statistics.mean(burst[t]["effective_step"] for t in after)
    usual = statistics.mean(clean[t]["effective_step"] for t in after)
    assert short < usual / 10
    assert statistics.mean(burst[t]["update_rms"] for t in after) < 0.1
    worst = statistics.mean(burst[t]["loss"] for t in after)
    assert worst < 3 * statistics.mean(burst[t]["loss"] for t in range(60, 80))  # no spike: it stands still


@pytest.mark.slow
def test_figures_of_natural_spikes() -> None:
    print("\nAdam past convergence, 2000 steps, learning rates 0.01 and 0.003, seeds 100 to 107")
    found: dict[str, list[int]] = {name: [] for name in SERIES}
    count, alone, ties = 0, dict.fromkeys(SERIES, 0), dict.fromkeys(SERIES, 0)
    for rate in (0.01, 0.003):
        for seed in range(100, 108):
            run = converged(seed, rate, 2000)
            spikes = [step for step in crossings(run["loss"]) if step > 200]
            count += len(spikes)
            for name in SERIES:
                crossed = [step for step in crossings(run[name]) if step > 200 - HORIZON]
                found[name] += leads(crossed, spikes)
                ties[name] += sum(spike in crossed for spike in spikes)
                alone[name] += sum(not any(-HORIZON <= s - c <= HORIZON for s in spikes) for c in crossed)
    for name, ahead in found.items():
        print(
            f"{name:18} foretold {len(ahead)} of {count}, median lead {statistics.median(ahead)}, quartiles "
            f"{statistics.quantiles(ahead)[::2]}, in the same step {ties[name]}, without a spike {alone[name]}"
        )
    assert len(found["update_rms_median"]) > count / 2


@pytest.mark.slow
def test_figures_of_text() -> None:
    """A character transformer: how often the values cross in clean training, what a burst does, how gradients agree."""
    from dist_stability.experiments import text

    train, _, characters = text.load_windows()

    def run(
        seed: int, factor: float = 1.0, steps: int = 300, at: int = 120, length: int = 10
    ) -> list[dict[str, float]]:
        torch.manual_seed(seed)
        model = text.CharacterTransformer(characters)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        agreement = GradientAgreement(optimizer)
        signals = UpdateRms(), UpdateRatio(), agreement
        draw = torch.Generator().manual_seed(seed)
        record = []
        for step in range(steps):
            scale = factor if at <= step < at + length else 1.0
            total = 0.0
            optimizer.zero_grad()
            for part in range(2):
                x, y = train.batch(torch.randint(0, len(train), (8,), generator=draw))
                loss = F.cross_entropy(model(x), y.flatten())
                (scale * loss / 2).backward()
                total += float(loss.detach()) / 2
                if part == 0:
                    agreement.mark()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            said = measure(step_context(model, optimizer), *signals, step=optimizer.step).values
            record.append({"loss": total, "gradient_norm": float(norm), **said})
        return record

    print("\ntext, AdamW 1e-3, batch 16, 300 steps, seeds 100 to 103; burst: gradients x 300 in steps 120 to 129")
    after = range(180, 300)
    for seed in range(100, 104):
        clean, burst = run(seed), run(seed, 300.0)
        counts = {name: len(crossings([entry.get(name, 0.0) for entry in clean])) for name in ("loss", *SERIES)}
        agree = [statistics.mean(entry["gradient_agreement"] for entry in clean[a:b]) for a, b in ((0, 20), (280, 300))]
        mean = lambda runs, name: statistics.mean(runs[t][name] for t in after)  # noqa: E731
        print(
            f"seed {seed}: clean crossings {counts}; agreement {agree[0]:.2f} -> {agree[1]:.2f}; burst: rms at its "
            f"first step {burst[120]['update_rms']:.0f} (clean {clean[120]['update_rms']:.2f}), loss "
            f"{burst[120]['loss']:.3f} then {burst[121]['loss']:.3f}, {burst[124]['loss']:.3f} (clean "
            f"{clean[121]['loss']:.3f}, {clean[124]['loss']:.3f}); steps 180-299: effective step "
            f"{mean(burst, 'effective_step'):.4f} (clean {mean(clean, 'effective_step'):.4f}), loss "
            f"{mean(burst, 'loss'):.3f} (clean {mean(clean, 'loss'):.3f}), median rms "
            f"{mean(burst, 'update_rms_median'):.3f} (clean {mean(clean, 'update_rms_median'):.3f}); the burst's loss "
            f"crosses {len(crossings([entry['loss'] for entry in burst]))} times"
        )
        assert burst[120]["loss"] == clean[120]["loss"]
        assert mean(burst, "effective_step") < mean(clean, "effective_step")


@pytest.mark.slow
def test_figures_of_cost() -> None:
    """Host time per step beside that of the step itself, and the numbers that ride in the all-reduce."""
    from dist_stability.experiments import text

    torch.manual_seed(100)
    train, _, characters = text.load_windows()
    model = text.CharacterTransformer(characters, width=256, layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    chosen = {"free": (), "groups": (GroupNorms(),), "rms": (UpdateRms(),), "ratio": (UpdateRatio(),)}
    monitors = {name: Monitor(signals) for name, signals in chosen.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ("step", "context", *chosen)}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        seconds[name].append(time.perf_counter() - begin)
        return result

    def forward_backward(seed: int) -> torch.Tensor:
        x, y = train.batch(torch.randint(0, len(train), (16,), generator=torch.Generator().manual_seed(seed)))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y.flatten())
        loss.backward()
        return loss

    for seed in range(24):
        begin = time.perf_counter()
        loss = forward_backward(seed)
        half = time.perf_counter() - begin
        context = timed("context", lambda loss=loss: step_context(model, optimizer, loss=loss))
        for name, monitor in monitors.items():
            timed(name, lambda m=monitor, c=context: m.before_step(c))
        begin = time.perf_counter()
        optimizer.step()
        seconds["step"].append(half + time.perf_counter() - begin)
        for name, monitor in monitors.items():
            begin = time.perf_counter()
            monitor.after_step(context)
            vector = monitor.collect()
            monitor.read(vector.tolist())
            seconds[name][-1] += time.perf_counter() - begin
    parameters = sum(p.numel() for p in model.parameters())
    middle = {name: statistics.median(values[4:]) for name, values in seconds.items()}
    print(f"\n{parameters} parameters in {len(list(model.parameters()))} tensors, batch 16 x 64, AdamW; one step takes")
    print(f"{1000 * middle['step']:.0f} ms; of that:")
    for name, value in middle.items():
        width = len(monitors[name].collect()) if name in monitors else 0
        print(f"{name:8} {100 * value / middle['step']:6.2f} %   {width} numbers")
        assert width <= 2 * (8 + 3 * len(list(model.parameters())) + 1)
