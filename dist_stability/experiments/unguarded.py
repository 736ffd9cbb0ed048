"""The training loop without a guard, but measured in the same way: what a guarded run is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_stability import LossProbe, Verdict, parallel
from dist_stability.verdict import Action


class Unguarded:
    """Has the face of a :class:`~dist_stability.StabilityController` and accepts everything.

    It steps the optimizer, measures the same probe, and writes the same events, with action "commit" and signal "".
    It takes no snapshot and enters no vote.

    Args:
        model: The wrapped model.
        optimizer: Its optimizer.
        probe: The held-out probe.
        every: Measure attempts t with (t + 1) % every == 0.
        probe_on: "rank0" or "mean", as for the controller.
        on_event: Called with one dict for each attempt.
        after_step: Called with the attempt index between the optimizer step and the measurement: a place for faults.

    Collectives: those of the probe's forward and, with ``probe_on="mean"``, one all-reduce per measured attempt.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        probe: LossProbe,
        *,
        every: int = 1,
        probe_on: str = "rank0",
        on_event: Callable[[dict[str, Any]], None] | None = None,
        after_step: Callable[[int], None] | None = None,
    ) -> None:
        """Measure nothing yet."""
        self._optimizer, self._after_step = optimizer, after_step
        self._module = parallel.forward_module(model)
        self._mean, self._every, self._on_event = probe_on == "mean", every, on_event
        self._probe = probe.share(*parallel.data_replica(model)) if self._mean else probe
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._measures = self._mean or rank == 0 or parallel.has_collectives(model)
        self._attempt = 0

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches: nothing is ever taken back."""
        return iter(loader)

    def step(self, grad_norm: float | Tensor | None = None, loss: float | Tensor | None = None) -> Verdict:
        """Step the optimizer and measure the outcome; always accepted."""
        attempt, seconds = self._attempt, {}
        begin = time.perf_counter()
        self._optimizer.step()
        seconds["step"] = time.perf_counter() - begin
        if self._after_step is not None:
            self._after_step(attempt)
        value, judged = None, (attempt + 1) % self._every == 0
        if judged:
            begin = time.perf_counter()
            value = self._measure()
            seconds["probe"] = time.perf_counter() - begin
        self._attempt += 1
        action = Action.COMMIT if judged else Action.UNJUDGED
        if self._on_event is not None:
            self._on_event(
                {
                    "step": self._attempt,
                    "attempt": attempt,
                    "rank": 0,
                    "signal": "",
                    "measurement": value,
                    "innovation": None,
                    "bound": None,
                    "prediction": None,
                    "gradient_norm": None if grad_norm is None else float(grad_norm),
                    "learning_rate_factor": 1.0,
                    "action": str(action),
                    "would": None,
                    "undone": [],
                    "final": True,
                    "cadence": None,
                    "edge": None,
                    "reason": "",
                    "rung": "",
                    "pattern": "",
                    "warning": "",
                    "signals": {} if loss is None else {"training_loss": float(loss)},
                    "where": {},
                    "signal_errors": {},
                    "seconds": seconds,
                }
            )
        return Verdict(action, attempt, measurement=value)

    def close(self) -> None:
        """Nothing to close."""

    def __enter__(self) -> Unguarded:
        """Use as a context manager."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""

    def _measure(self) -> float | None:
        """Rank 0's probe loss, or the mean over data replicas; None on a rank that does not measure."""
        if not self._measures:
            return None
        reading = self._probe.measure(self._module)
        if reading.error is not None:
            raise reading.error
        assert reading.value is not None  # a reading has either a value or an error
        value = reading.value
        if self._mean and dist.is_initialized():
            dist.all_reduce(value)
            value = value / dist.get_world_size()
        return float(value)
