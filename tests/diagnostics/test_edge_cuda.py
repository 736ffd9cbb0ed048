"""The same numbers on a GPU, and nothing left of the measurement there."""

from __future__ import annotations

import pytest
import torch
from edge_models import Job, build, loss_fn

from dist_stability.diagnostics.growth import Verdict
from dist_stability.diagnostics.lyapunov import lyapunov
from dist_stability.diagnostics.perturbation import KScale, OneUlp, RandomUlps
from dist_stability.diagnostics.sensitivity import sensitivity
from dist_stability.diagnostics.sharpness import Sharpness
from dist_stability.diagnostics.twins import TwinRun
from dist_stability.signals import DirectionalRatio, measure, step_context

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def moved(device: str, noise: bool = False) -> Job:
    job = build("single", 0, 1, noise=noise)
    job.model.to(device)  # parameters keep their identity, so the optimizer follows
    job.batch = (job.batch[0].to(device), job.batch[1].to(device))
    return job


def test_sharpness_is_that_of_the_cpu_and_leaves_no_trace() -> None:
    values = []
    for device in ("cpu", "cuda"):
        job = moved(device)
        for _ in range(12):
            job.step()
        before = job.image()
        values.append(Sharpness(job.model, job.optimizer, loss_fn, [job.batch]).converge(1e-4, 60).eigenvalue)
        for name, value in job.image().items():
            same = torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]
            assert same, name
    assert values[0] == pytest.approx(values[1], rel=0.01)


def test_the_ratio_is_that_of_the_cpu() -> None:
    values = []
    for device in ("cpu", "cuda"):
        job = moved(device)
        for _ in range(3):
            job.step()
        job.optimizer.zero_grad()
        loss_fn(job.model, job.batch).backward()
        for group in job.optimizer.param_groups:
            group["lr"] = 0.05
        signal = DirectionalRatio(job.model, loss_fn, lambda job=job: job.batch)
        values.append(measure(step_context(job.model, job.optimizer), signal, step=job.optimizer.step).values["rho"])
    assert values[0] == pytest.approx(values[1], rel=1e-2)


def test_twins_on_a_gpu() -> None:
    def make(seed: int) -> TwinRun:
        job = moved("cuda", noise=True)
        return TwinRun(job.model, job.optimizer, lambda step: loss_fn(job.model, job.batch))

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert sensitivity(make, KScale(2), 4, gate_steps=0).verdict is Verdict.BENIGN
        for perturbation in (KScale(3), RandomUlps(), OneUlp("embed.weight", 5)):
            assert sensitivity(make, perturbation, 4, gate_steps=0).relative_l2[-1] > 0.0
        lyapunov(make, 3)
    finally:
        torch.use_deterministic_algorithms(False)
