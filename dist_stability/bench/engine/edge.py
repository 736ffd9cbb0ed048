"""``bench edge``: what the monitor of the edge of stability costs, by level, in one run beside a plain one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dist_stability.bench.engine.arms import CPU_WORK, GPU_WORK, SMALL_WORK, Guarded, Loop, Plain
from dist_stability.bench.engine.timing import quartiles, synchronize
from dist_stability.diagnostics.monitor import FIRST, EdgeOfStabilityMonitor
from dist_stability.diagnostics.sharpness import Sharpness, SharpnessReading
from dist_stability.experiments.progress import Progress
from dist_stability.experiments.tasks import cross_entropy
from dist_stability.experiments.wrapping import Processes
from dist_stability.signals import Signal, SignalValues, StepContext

BLOCK = 100
"""Steps timed at once: two measurements of the margin, five of the ratio."""

ROUNDS, QUICK_ROUNDS = 5, 1
QUICK_BLOCK = 20

LEVELS = ("level 0: ratio", "level 0: moments", "level 1: margin")


def edge(here: Processes, mode: str, quick: bool) -> dict[str, Any]:
    """Train a plain loop and a guarded one with the monitor's defaults, in turn.

    Processor time of this rank, which other programs on the machine do not change; on CUDA wall time.

    Returns:
        ``levels``: by level the time per step over that of a whole plain step (forward, backward, optimizer), quartiles
        over the rounds; ``monitor_over_plain``: their sum; ``first_margin_steps``: what the first margin costs, once,
        in plain steps; ``plain_ms`` and ``measured``, by level how often.
    """
    work = SMALL_WORK if quick else GPU_WORK if here.device.type == "cuda" else CPU_WORK
    rounds, block = (QUICK_ROUNDS, QUICK_BLOCK) if quick else (ROUNDS, BLOCK)
    plain, watched = Plain("plain", work, here, mode), Watched("watched", work, here, mode)
    clock = watched.clock
    ratios: dict[str, list[float]] = {level: [] for level in LEVELS}
    sums, milliseconds = [], []
    with Progress(rounds, f"edge, {mode}", shown=here.rank == 0) as bar:
        _block(plain, block, clock)
        _block(watched, block, clock)
        first = max(clock.times["level 1: margin"])
        measured = {level: 0 for level in LEVELS}
        for number in range(rounds):
            seconds = _block(plain, block, clock)
            clock.times.clear()
            _block(watched, block, clock)
            for level in LEVELS:
                ratios[level].append(sum(clock.times.get(level, ())) / seconds)
                measured[level] += len(clock.times.get(level, ()))
            sums.append(sum(ratio[-1] for ratio in ratios.values()))
            milliseconds.append(1e3 * seconds / block)
            bar.advance(number + 1)
    watched.close()
    return {
        "work": vars(work),
        "levels": {level: quartiles(values) for level, values in ratios.items()},
        "monitor_over_plain": quartiles(sums),
        "plain_ms": quartiles(milliseconds),
        "first_margin_steps": 1e3 * first / quartiles(milliseconds)["median"],
        "first_margin_products": FIRST,
        "measured": measured,
        "steps": rounds * block,
    }


class Clock:
    """Adds up the time of named parts.

    Attributes:
        times: By part, seconds of each time it took any.
    """

    def __init__(self, here: Processes) -> None:
        """Nothing was timed yet."""
        self._device = here.device
        self.now: Callable[[], float] = time.perf_counter if here.device.type == "cuda" else time.process_time
        self.times: dict[str, list[float]] = {}

    @contextmanager
    def timing(self, part: str) -> Any:
        """Time the block."""
        synchronize(self._device)
        begin = self.now()
        yield
        synchronize(self._device)
        self.times.setdefault(part, []).append(self.now() - begin)


class Watched(Guarded):
    """Guarded, with the usual monitor on a quarter of the first batch.

    Attributes:
        clock: Has the time of the monitor's parts.
    """

    def __init__(self, *args: Any) -> None:
        """Build the monitor with the model."""
        super().__init__(*args, watch=self._monitor)

    def update(self, loss: Tensor) -> None:
        """The guarded step, which is told the loss."""
        verdict = self.controller.step(loss=loss.detach())
        self.refused += not verdict.accepted

    def _monitor(self) -> EdgeOfStabilityMonitor:
        self.clock = Clock(self.here)
        inputs, targets = self.batches[0]
        quarter = max(1, len(inputs) // 4)
        usual = EdgeOfStabilityMonitor.of(
            self.model,
            self.optimizer,
            cross_entropy,
            [(inputs[:quarter], targets[:quarter])],
            lambda: self.batch,
            reuse_loss=True,
        )
        assert usual.sharpness is not None
        _time_measurements(usual.sharpness, self.clock)
        ratio, moments = (
            _TimedSignal(signal, self.clock, level) for signal, level in zip(usual.signals, LEVELS[:2], strict=True)
        )
        return EdgeOfStabilityMonitor(usual.sharpness, signals=(ratio, moments))


def _time_measurements(sharpness: Sharpness, clock: Clock) -> None:
    measure = sharpness.measure

    def timed(*args: Any, **settings: Any) -> SharpnessReading:
        with clock.timing(LEVELS[2]):
            return measure(*args, **settings)

    sharpness.measure = timed  # type: ignore[method-assign]


class _TimedSignal(Signal):
    """Another signal, and how long its two looks take."""

    def __init__(self, signal: Signal, clock: Clock, level: str) -> None:
        self._signal, self._clock, self._level = signal, clock, level
        self.name = signal.name

    def width(self, context: StepContext) -> int:
        return self._signal.width(context)

    def before_step(self, context: StepContext) -> None:
        with self._clock.timing(self._level):
            self._signal.before_step(context)

    def after_step(self, context: StepContext) -> None:
        with self._clock.timing(self._level):
            self._signal.after_step(context)

    def collect(self) -> Tensor | None:
        return self._signal.collect()

    def read(self, sums: Sequence[float]) -> SignalValues:
        return self._signal.read(sums)

    def settings(self) -> dict[str, Any]:
        return self._signal.settings()

    def state_dict(self) -> dict[str, Any]:
        return self._signal.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._signal.load_state_dict(state)


def _block(loop: Loop, steps: int, clock: Clock) -> float:
    """Seconds of some steps."""
    synchronize(loop.here.device)
    begin = clock.now()
    for _ in range(steps):
        loop.step()
    synchronize(loop.here.device)
    return clock.now() - begin
