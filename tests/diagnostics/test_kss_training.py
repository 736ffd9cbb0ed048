"""What shaping does to a training run that it is meant for: a GPT without norms at too high a learning rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpt import gpt
from torch import Tensor

from dist_stability.diagnostics.kss import SpectralShaping
from dist_stability.diagnostics.rksp import Fit, profile

PHRASE = "the quick brown fox jumps over a lazy dog and "[:45]
ALPHABET = {letter: number for number, letter in enumerate(sorted(set(PHRASE)))}
TEXT = torch.tensor([ALPHABET[letter] for letter in PHRASE * 4])


def windows(draw: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(PHRASE), (8,), generator=draw)
    return torch.stack([TEXT[start : start + 33] for start in starts.tolist()])


def next_token(model: Any, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def run(lr: float, seed: int, shaped: bool) -> dict[str, tuple[float, float]] | None:
    """None if it diverged (loss above 50, gradient norm above 500, or not finite).

    Else the share above 1.05 and the radius at the end, in the 32 leading directions and in all.
    """
    model = gpt("none", seed, width=64, layers=4, vocabulary=len(ALPHABET), context=32, std=0.04)
    shaping = SpectralShaping(model) if shaped else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    draw = torch.Generator().manual_seed(seed)
    for step in range(80):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10)
        batch = windows(draw)
        loss = shaping(next_token, batch) if shaping else next_token(model, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf))
        if not (float(loss.detach()) <= 50.0 and norm <= 500.0):
            return None
        optimizer.step()
    tokens = torch.randint(0, len(ALPHABET), (32, 32), generator=draw)
    ends = {"leading": profile(model, None, tokens, fit=Fit("pca", 32)), "all": profile(model, None, tokens)}
    return {where: (p.aggregates["unstable"].mean, p.aggregates["radius"].mean) for where, p in ends.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dist_stability.diagnostics.rksp.RkspWarning")
def test_local_shaping_reshapes_what_it_fits() -> None:
    """The 32 leading directions of runs that survive, robustly; of all 64, much less.

    That it prevents divergence is not asserted: docs/rksp.md has the numbers.
    """
    grid = [(lr, seed) for lr in (0.010, 0.0125) for seed in range(4)]
    ends: dict[bool, dict[str, list[float]]] = {}
    for shaped in (False, True):
        alive = [end for end in (run(lr, seed, shaped) for lr, seed in grid) if end is not None]
        ends[shaped] = {
            where: [sum(column) / len(alive) for column in zip(*(end[where] for end in alive), strict=True)]
            for where in ("leading", "all")
        }
        print(f"shaped={shaped}: {len(grid) - len(alive)} of {len(grid)} diverged; at the end {ends[shaped]}")
    unstable, radius = ends[False]["leading"]
    assert unstable >= 0.4 and radius >= 2.2
    unstable, radius = ends[True]["leading"]
    assert unstable <= 0.30 and radius <= 2.0
