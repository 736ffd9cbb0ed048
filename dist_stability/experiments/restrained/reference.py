"""The published reference controller, in its order of events: what R11 compares with.

From the description of BarakOr1/runtime-stability-controller (commit 41313b4) in own words, with its example's
constants. Its "safe" state is taken right before the optimizer's step, after the forward that moved the buffers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

EPSILON, ALPHA = 0.5, 0.1


class ReferenceController:
    """Algorithm 1 as published: accept a step whose probe is at most epsilon above an average of accepted ones."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, probe: Callable[[nn.Module], Tensor]) -> None:
        """Measure the reference."""
        self._model, self._optimizer, self._probe = model, optimizer, probe
        self._average = self._measure()

    def step(self) -> bool:
        """Step the optimizer, or put everything back; whether it was accepted."""
        weights = copy.deepcopy(self._model.state_dict())
        state = copy.deepcopy(self._optimizer.state_dict())
        self._optimizer.step()
        measured = self._measure()
        if measured - self._average <= EPSILON:  # False for NaN
            self._average += ALPHA * (measured - self._average)
            return True
        self._model.load_state_dict(weights)
        self._optimizer.load_state_dict(state)
        return False

    @torch.no_grad()
    def _measure(self) -> float:
        self._model.eval()
        value = float(self._probe(self._model))
        self._model.train()
        return value
