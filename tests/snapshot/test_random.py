"""Random streams: every draw after a restore is the draw it would have been."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import dist_stability
from dist_stability.snapshot import RandomState, forked, rng


def draws() -> tuple[Any, ...]:
    return (
        random.random(),
        random.gauss(0, 1),  # keeps a second number for the next call
        numpy.random.standard_normal(),  # so does this
        numpy.random.randint(1 << 30),
        torch.rand(3).tolist(),
        torch.randn(1).item(),
        torch.nn.functional.dropout(torch.ones(20)).tolist(),
    )


def test_round_trip() -> None:
    draws()
    state = RandomState.capture()
    expected = draws()
    assert draws() != expected
    state.restore()
    assert draws() == expected
    state.restore()  # any number of times
    assert draws() == expected


def test_capture_draws_nothing() -> None:
    before = RandomState.capture()
    expected = draws()
    before.restore()
    RandomState.capture()
    RandomState.capture().restore()
    assert draws() == expected


def test_every_stream_counts() -> None:
    for draw in (random.random, numpy.random.rand, torch.rand(1).uniform_):
        state = RandomState.capture()
        expected = draws()
        state.restore()
        draw()
        assert draws() != expected
        state.restore()


def test_forked_starts_from_the_seed_and_leaves_no_trace() -> None:
    state = RandomState.capture()
    expected = draws()
    state.restore()
    with forked(5):
        first = draws()
    with forked(5):
        assert draws() == first
    with forked(6):
        assert draws() != first
    assert draws() == expected


def test_forked_leaves_no_trace_when_the_body_raises() -> None:
    state = RandomState.capture()
    expected = draws()
    state.restore()
    with pytest.raises(ZeroDivisionError), forked(0):
        draws()
        raise ZeroDivisionError
    assert draws() == expected


def test_a_large_seed() -> None:
    with forked(2**63 - 1):
        draws()


def test_works_without_numpy() -> None:
    script = """
import sys
sys.modules["numpy"] = None
from dist_stability.snapshot import RandomState, forked
state = RandomState.capture()
with forked(0):
    pass
state.restore()
print("fine")
"""
    root = Path(dist_stability.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=root)
    assert done.stdout == "fine\n", done.stderr


class Tracker:
    """What DTensor's tracker looked like up to torch 2.8: states of its own beside the device's generator."""

    def __init__(self) -> None:
        self.rng_states = {"parallel-rng": torch.zeros(16, dtype=torch.uint8)}

    def _manual_seed(self, seed: int) -> None:
        self.rng_states["parallel-rng"] = torch.full((16,), seed, dtype=torch.uint8)


def test_the_states_that_dtensor_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.tensor._random as dtensor_random

    tracker = Tracker()
    monkeypatch.setattr(dtensor_random, "_rng_tracker", tracker)
    tracker.rng_states["parallel-rng"][3] = 7
    state = RandomState.capture()
    with forked(9):
        assert tracker.rng_states["parallel-rng"].tolist() == [9] * 16
    assert tracker.rng_states["parallel-rng"][3] == 7
    tracker.rng_states["parallel-rng"][3] = 8
    tracker.rng_states["another"] = torch.zeros(16, dtype=torch.uint8)
    state.restore()
    assert tracker.rng_states["parallel-rng"][3] == 7 and list(tracker.rng_states) == ["parallel-rng"]
    tracker.rng_states["parallel-rng"][3] = 9  # the restored states are copies
    state.restore()
    assert tracker.rng_states["parallel-rng"][3] == 7


def test_generators_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.Generator()
    monkeypatch.setattr(rng, "_device_generators", lambda: [device])
    state = RandomState.capture()
    expected = torch.rand(3, generator=device)
    with forked(1):
        first = torch.rand(3, generator=device)
    with forked(1):
        assert torch.equal(torch.rand(3, generator=device), first)
    state.restore()
    assert torch.equal(torch.rand(3, generator=device), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda() -> None:
    torch.rand(1, device="cuda")
    state = RandomState.capture()
    expected = torch.rand(3, device="cuda")
    state.restore()
    with forked(0):
        torch.rand(1, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_an_unused_device_stays_unused() -> None:
    if not torch.cuda.is_initialized():
        RandomState.capture().restore()
        assert not torch.cuda.is_initialized()
