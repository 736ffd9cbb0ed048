"""How the faults of the closed-loop comparison act on a training step, with and without a guard around it.

A fault acts in three places, whichever it needs: on the batch, on the gradients (before their norm is taken), and
around ``optimizer.step()``, through the optimizer's own step hooks. So a guarded step meets it inside itself, where the
snapshot was taken before, and a plain step meets the very same thing. Which attempts it acts in is fixed beforehand: a
refusal does not make a sustained fault longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_stability.bench.detection.cells import ClosedFault
from dist_stability.experiments.data import Batch

_TOP_EXPONENT_BIT = 1 << 30  # of a float32


class FaultAction:
    """One fault, bound to one model and optimizer. It keeps nothing that a rollback would have to undo.

    Args:
        fault: What to do, and when.
        model: The bare module, not its DDP wrapper.
        optimizer: Its optimizer.
        slope: For "ascent": fills the gradients of a fixed batch at the present weights.
    """

    def __init__(self, fault: ClosedFault, model: nn.Module, optimizer: Optimizer, slope: Callable[[], None]) -> None:
        """Register the hooks."""
        self._fault, self._attempts = fault, fault.attempts
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        # The largest weight matrix: the one whose row and bits are hit.
        self._target = max((p for p in self._parameters if p.ndim >= 2), key=lambda p: p.numel())
        self._optimizer, self._slope = optimizer, slope
        self._attempt = -1
        self._direction: list[Tensor] | None = None
        self._before: list[Tensor] = []
        self._rates: list[Any] = []
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    @property
    def acts(self) -> bool:
        """Whether it acts in the present attempt."""
        return self._attempt in self._attempts

    def begin(self, attempt: int) -> None:
        """Say which attempt comes next; before its forward."""
        self._attempt = attempt
        if self.acts and self._fault.kind == "ascent" and self._direction is None:
            self._slope()
            self._direction = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None

    def batch(self, batch: Batch) -> Batch:
        """What the model is trained on in this attempt."""
        inputs, targets = batch
        if not self.acts:
            return batch
        if self._fault.kind == "shuffled-labels":
            order = torch.randperm(targets.numel(), generator=torch.Generator().manual_seed(self._attempt))
            return inputs, targets.flatten()[order].view_as(targets)
        if self._fault.kind == "repeated-token":
            first = (slice(0, 1),) * inputs.ndim if not inputs.is_floating_point() else (slice(0, 1),)
            return inputs[first].expand_as(inputs), targets.flatten()[:1].view([1] * targets.ndim).expand_as(targets)
        return batch

    @torch.no_grad()
    def gradients(self) -> None:
        """Act on the gradients; after backward, before their norm is taken."""
        if self.acts and self._fault.kind == "gradient-scale":
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self._fault.size)

    @torch.no_grad()
    def _before_step(self) -> None:
        if not self.acts:
            return
        kind, size = self._fault.kind, self._fault.size
        if kind == "learning-rate-ramp":
            size = size ** (self._attempt - self._fault.start + 1)
        if kind in ("learning-rate", "learning-rate-ramp"):
            self._rates = [group["lr"] for group in self._optimizer.param_groups]
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * size
        elif kind == "reversed-update":
            self._before = [parameter.clone() for parameter in self._parameters]
        elif kind == "second-moment":
            for state in self._optimizer.state.values():
                # SGD has none; its momentum is what decides the size of its steps.
                for name in ("exp_avg_sq", "momentum_buffer"):
                    if torch.is_tensor(state.get(name)):
                        state[name].mul_(size)

    @torch.no_grad()
    def _after_step(self) -> None:
        if not self.acts:
            return
        kind, size = self._fault.kind, self._fault.size
        if self._rates:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self._rates = []
        elif kind == "reversed-update":
            for parameter, before in zip(self._parameters, self._before, strict=True):
                parameter.copy_(before + size * (before - parameter))
        elif kind == "ascent":
            assert self._direction is not None
            square = sum(float(d.square().sum()) for d in self._direction)
            for parameter, direction in zip(self._parameters, self._direction, strict=True):
                parameter.add_(direction, alpha=size / max(square, 1e-12))  # raises a linear loss by `size` nats
        elif kind == "weight-row":
            self._target[0].mul_(size)
        elif kind == "bit-flip":
            flat = self._target.view(-1)
            place = int(flat.abs().argmax())
            flat.view(torch.int32)[place] ^= _TOP_EXPONENT_BIT
