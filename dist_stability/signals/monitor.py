"""All signals of a run, packed into one vector that rides in somebody's all-reduce, and read back as named numbers.

In a controller (which makes the :class:`Monitor`) the vector rides in the vote. Anywhere else :func:`measure` makes the
all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_stability.signals.base import Signal, SignalValues, StepContext
from dist_stability.signals.effective_step import EffectiveStep
from dist_stability.signals.gradients import Gradients
from dist_stability.signals.learning_rate import LearningRate
from dist_stability.signals.loss import TrainingLoss
from dist_stability.signals.loss_scale import LossScale
from dist_stability.signals.sums import constants, joined, on_host
from dist_stability.snapshot.plan import StatePlan


class Monitor:
    """Runs signals in lockstep with the other ranks' monitors.

    Call :meth:`before_step`, step the optimizers, :meth:`after_step`, :meth:`collect`, sum that vector over all ranks,
    :meth:`read`. A signal that raises on one rank gives NaN on all of them, and the exception is in :attr:`errors`: the
    vector has the same length on every rank whatever happens on one.

    Attributes:
        signals: In the order of the vector.
        errors: What signals of this rank raised at the present step, by name.
    """

    def __init__(self, signals: Iterable[Signal] = (), *, free: bool = True) -> None:
        """Take the signals.

        Args:
            signals: In any order, the same one on every rank.
            free: Put those in front that cost nothing: :class:`LearningRate`, :class:`TrainingLoss`,
                :class:`LossScale`, :class:`EffectiveStep`, each unless ``signals`` has one of its name.

        Raises:
            TypeError: Something is not a signal.
            ValueError: Two signals have the same name.
        """
        chosen = tuple(signals)
        for signal in chosen:
            if isinstance(signal, type) or not isinstance(signal, Signal):
                hint = "; call the class to make one" if isinstance(signal, type) else ""
                raise TypeError(f"signals must be signals such as UpdateRms(), got {signal!r}{hint}")
        names = [signal.name for signal in chosen]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"signals: {', '.join(twice)} given more than once; give each signal once")
        always = (LearningRate(), TrainingLoss(), LossScale(), EffectiveStep()) if free else ()
        self.signals: tuple[Signal, ...] = (*(each for each in always if each.name not in names), *chosen)
        self.errors: dict[str, Exception] = {}
        self._widths: list[int] = []
        self._device = torch.device("cpu")

    def before_step(self, context: StepContext) -> None:
        """After backward, unscaling and clipping, before the optimizers step. Collectives: those of the signals."""
        self.errors = {}
        self._device = context.gradients.device
        self._widths = [signal.width(context) for signal in self.signals]
        for signal in self.signals:
            with self._caught(signal):
                signal.before_step(context)

    def after_step(self, context: StepContext) -> None:
        """After the optimizers have stepped, before anybody else touches the weights. Left out if they did not step."""
        for signal in self.signals:
            if signal.name not in self.errors:
                with self._caught(signal):
                    signal.after_step(context)

    def collect(self) -> Tensor:
        """This rank's summands: 1-d float64, finite, of a length that is the same on every rank. Waits for nothing.

        The first half are the numbers (0 for one that is not finite), the second half says which are not.
        """
        parts: list[Tensor | list[float]] = []
        for signal, width in zip(self.signals, self._widths, strict=True):
            if signal.name not in self.errors:
                with self._caught(signal):
                    parts.append(self._summands(signal, width))
            if signal.name in self.errors:
                parts.append([math.nan] * width)
        if all(isinstance(part, list) for part in parts):
            numbers = [number for part in parts for number in part]
            finite = [math.isfinite(number) for number in numbers]
            known = [number if good else 0.0 for number, good in zip(numbers, finite, strict=True)]
            return constants(self._device, [*known, *(float(not good) for good in finite)])
        values = joined(self._device, [one for part in parts for one in (part if isinstance(part, list) else [part])])
        bad = ~values.isfinite()
        return torch.cat([torch.where(bad, 0.0, values), bad.to(torch.float64)])

    def read(self, sums: Sequence[float]) -> SignalValues:
        """What the sums over all ranks say. Call it once per step: signals with a memory learn from it.

        Args:
            sums: Sum of what :meth:`collect` gave on every rank, on the host.

        Raises:
            ValueError: Their number is not that of ``collect``.
        """
        half = sum(self._widths)
        if len(sums) != 2 * half:
            raise ValueError(f"signals: expected {2 * half} sums, as collect() gave, got {len(sums)}")
        numbers = [value if bad == 0.0 else math.nan for value, bad in zip(sums[:half], sums[half:], strict=True)]
        values: dict[str, float] = {}
        where: dict[str, str] = {}
        begin = 0
        for signal, width in zip(self.signals, self._widths, strict=True):
            said = signal.read(numbers[begin : begin + width])
            values.update(said.values)
            where.update(said.where)
            begin += width
        return SignalValues(values, where)

    def settings(self) -> list[list[Any]]:
        """Names and settings in order, JSON-able: must be equal on all ranks."""
        return [[signal.name, signal.settings()] for signal in self.signals]

    def state_dict(self) -> dict[str, Any]:
        """The memory of the signals that have one, by name; JSON-able."""
        return {signal.name: state for signal in self.signals if (state := signal.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a saved memory. A signal that was not saved starts anew: signals may come and go between runs."""
        for signal in self.signals:
            if signal.name in state:
                signal.load_state_dict(state[signal.name])

    def _summands(self, signal: Signal, width: int) -> Tensor | list[float]:
        """Numbers where the host has them anyway; else a tensor, which nobody waits for."""
        mine = signal.collect()
        if mine is None:
            return [0.0] * width
        if mine.shape != (width,):
            raise ValueError(
                f"signal {signal.name}: collect() gave shape {list(mine.shape)}, expected [{width}] as in width()"
            )
        return mine.tolist() if on_host(mine) else mine.to(self._device, torch.float64)

    @contextmanager
    def _caught(self, signal: Signal) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.errors[signal.name] = error


def verdict_values(innovation: float | None, bound: float | None, gradient_norm: float | None) -> dict[str, float]:
    """The free signals that the verdict itself has: ``gradient_norm`` and ``bar_fraction``.

    Args:
        innovation: Of the judgement; None or NaN when nothing was predicted.
        bound: Largest innovation that would have been accepted.
        gradient_norm: Global, before clipping; None when nobody computed it.

    Returns:
        ``bar_fraction`` is innovation / bound, 1 at the bar, only where both are finite and the bound is positive.
    """
    values = {} if gradient_norm is None else {"gradient_norm": gradient_norm}
    if innovation is not None and bound is not None and math.isfinite(innovation) and 0.0 < bound < math.inf:
        values["bar_fraction"] = innovation / bound
    return values


def host_values(context: StepContext) -> dict[str, float]:
    """The free signals that this rank's host knows without waiting, for steps at which no sum over ranks is made.

    ``learning_rate`` unless it lies on an accelerator, ``training_loss`` of this rank if the loop gave a float. No
    collective, no host sync, and nothing is learned from it.
    """
    values = {}
    rates = [group["lr"] for _, group in context.groups if "lr" in group]
    if rates and all(_on_host(rate) for rate in rates):
        values["learning_rate"] = max(float(rate) for rate in rates)
    if isinstance(context.loss, int | float):
        values["training_loss"] = float(context.loss)
    return values


def _on_host(value: object) -> bool:
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def step_context(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    grad_norm: object = None,
    loss: object = None,
    scaler: Any = None,
    group: dist.ProcessGroup | None = None,
) -> StepContext:
    """What signals look at, from a model and its optimizers; for loops without a controller.

    Args:
        model: As the loop calls it, wrappers included. FSDP modules are put back to their sharded state.
        optimizer: One or several.
        grad_norm: Global norm before clipping, if the gradients were clipped and it is known.
        loss: Training loss of this step.
        scaler: GradScaler that has unscaled the gradients.
        group: The ranks that train this model; None for all.
    """
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
    world = dist.get_world_size(group) if _distributed() else 1
    plan = StatePlan.build(model, optimizers, world)
    return StepContext(Gradients(plan.parameters, grad_norm), optimizers, loss, scaler)


def measure(
    context: StepContext,
    *signals: Signal,
    step: Callable[[], Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> SignalValues:
    """Read signals once, in any training loop.

    For example::

        loss.backward()
        context = step_context(model, optimizer, loss=loss)
        print(measure(context, UpdateRms(), UpdateRatio(), step=optimizer.step).values)

    Waits for the device. Collectives: one all-reduce over ``group`` where torch.distributed is initialized, and those
    of the signals; every rank must call it.

    Args:
        context: From :func:`step_context`, made after backward.
        *signals: Only these; the same objects at every step if they have a memory.
        step: Steps the optimizers, for signals that compare weights before and after.
        group: The ranks that train this model; None for all.

    Raises:
        Exception: What a signal raised on this rank, after the all-reduce.
    """
    monitor = Monitor(signals, free=False)
    monitor.before_step(context)
    if step is not None:
        step()
        monitor.after_step(context)
    sums = monitor.collect()
    if _distributed():
        dist.all_reduce(sums, group=group)
    for error in monitor.errors.values():
        raise error
    return monitor.read(sums.tolist())


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
