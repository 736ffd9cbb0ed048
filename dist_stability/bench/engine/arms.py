"""Training loops that differ in nothing but what is done around the optimizer step."""

from __future__ import annotations

import copy
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_stability import LossProbe, NonFiniteGuard, PredictiveInnovation, StabilityController, parallel
from dist_stability.bench.engine.counting import made_groups
from dist_stability.experiments.data import Batch, Windows
from dist_stability.experiments.tasks import cross_entropy
from dist_stability.experiments.text import CharacterTransformer, load_windows
from dist_stability.experiments.wrapping import Processes, wrap
from dist_stability.verdict import Judgement

BATCHES = 16
NEVER = 1_000_000_000


@dataclass(frozen=True)
class Work:
    """What is trained. Windows have 64 tokens.

    Attributes:
        width: Of the transformer.
        layers: Of the transformer.
        batch: Windows in a global batch.
        probe: Windows the probe measures.
    """

    width: int
    layers: int
    batch: int
    probe: int


SMALL_WORK, CPU_WORK, GPU_WORK = Work(32, 1, 8, 4), Work(128, 4, 16, 4), Work(1024, 12, 128, 16)


class Loop(ABC):
    """One training loop, plain unless a subclass does more around the step.

    Args:
        work: What is trained.
        here: This process.
        mode: "single", "ddp" or "fsdp2".

    Attributes:
        name: For tables.
        batches: This rank's, taken in turn.
        batch: That of the present step.
        groups: Process groups of its own.
        seconds: By part, one number for each step in which the part ran; emptied by whoever reads it.
    """

    def __init__(self, name: str, work: Work, here: Processes, mode: str) -> None:
        """Build the model from a fixed seed."""
        train, held_out, characters = _windows()
        torch.manual_seed(0)
        self.name, self.here = name, here
        raw = CharacterTransformer(characters, width=work.width, layers=work.layers).to(here.device)
        self.model: nn.Module = wrap(raw, list(raw.blocks), mode, dtype=torch.float32, here=here)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        share = work.batch // here.world_size
        draw = torch.Generator().manual_seed(here.rank)
        self.batches = [self._place(train, torch.randint(len(train), (share,), generator=draw)) for _ in range(BATCHES)]
        spread = torch.linspace(0, len(held_out) - 1, work.probe).long()
        self.probe = LossProbe(cross_entropy, [self._place(held_out, spread)])
        self.groups: tuple[Any, ...] = ()
        self.seconds: dict[str, list[float]] = {}
        self._step = 0

    def step(self) -> None:
        """Forward, backward, and what the loop does with the gradients."""
        self.batch = self.batches[self._step % BATCHES]
        self._step += 1
        loss = cross_entropy(self.model, self.batch)
        loss.backward()
        self.update(loss)
        self.optimizer.zero_grad()

    @abstractmethod
    def update(self, loss: Tensor) -> None:
        """The optimizer step."""

    def close(self) -> None:
        """Give up hooks and threads."""
        return None

    def _place(self, windows: Windows, indices: Tensor) -> Batch:
        inputs, targets = windows.batch(indices)
        return inputs.to(self.here.device), targets.to(self.here.device)

    def _took(self, parts: Mapping[str, float]) -> None:
        for part, seconds in parts.items():
            self.seconds.setdefault(part, []).append(seconds)


class Plain(Loop):
    """Training without us."""

    def update(self, loss: Tensor) -> None:
        """The optimizer step and nothing else."""
        self.optimizer.step()


class Guarded(Loop):
    """With a controller.

    Args:
        *args: As for :class:`Loop`.
        **options: Of the controller; ``watch`` is called for its ``edge`` when the model is there.

    Attributes:
        controller: The controller.
        refused: Attempts it refused.
        notes: What a measuring cadence said.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Attach it."""
        super().__init__(*args)
        self.refused = 0
        self.notes: list[str] = []
        rule = options.pop("rule", None) or PredictiveInnovation()
        if (watch := options.pop("watch", None)) is not None:
            options["edge"] = watch()
        with made_groups() as groups:
            self.controller = StabilityController(
                self.model, self.optimizer, self.probe, rule, on_event=self._hear, **options
            )
        self.groups = tuple(groups)

    def update(self, loss: Tensor) -> None:
        """The guarded step."""
        verdict = self.controller.step()
        self.refused += not verdict.accepted

    def close(self) -> None:
        """Read what is pending, and close the controller."""
        self.controller.finish()
        self.controller.close()
        self.groups = ()  # a group that is referred to keeps its threads

    def _hear(self, event: Mapping[str, Any]) -> None:
        if event["action"] != "unjudged":
            self._took(event["seconds"])
        if event["cadence"] is not None:
            self.notes.append(event["cadence"])


class Reference(Loop):
    """As the published reference controller does it: keep clones, step, probe, let rank 0 decide and broadcast.

    Given the same probe as ours, which returns RNG and training mode to what they were.
    """

    def update(self, loss: Tensor) -> None:
        """Clone, step, probe, broadcast. Nothing is refused here: what is measured is the healthy path."""
        begin = time.perf_counter()
        self._safe = {name: value.clone() for name, value in self.model.state_dict().items()}
        self._safe_optimizer = copy.deepcopy(self.optimizer.state_dict())
        saved = time.perf_counter()
        self.optimizer.step()
        stepped = time.perf_counter()
        verdict = torch.zeros(1, device=self.here.device)
        if self.here.rank == 0 or parallel.has_collectives(self.model):
            reading = self.probe.measure(parallel.forward_module(self.model))
            parallel.reshard(self.model)
            assert reading.value is not None
            verdict += float(reading.value) > 1e30
        probed = time.perf_counter()
        if self.here.world_size > 1:
            dist.broadcast(verdict, 0)
        assert not bool(verdict)
        self._took({"copy": saved - begin, "probe": probed - stepped, "vote": time.perf_counter() - probed})


class RefuseEveryThird:
    """A rule that refuses every third measurement, whatever it is: to see what a rollback costs."""

    deep_restore = False

    def __init__(self) -> None:
        """Nothing was judged yet."""
        self._judged = 0

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        """Accept two, refuse one."""
        accepted = self._judged % 3 != 2
        return Judgement(accepted, deep=False, innovation=0.0, bound=float("inf"), reason="every third")

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Count."""
        self._judged += 1

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        """Count."""
        self._judged += 1

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"judged": self._judged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the count."""
        self._judged = int(state["judged"])


def make_loops(work: Work, here: Processes, mode: str) -> Sequence[Loop]:
    """The loops that ``bench step`` compares, plain first.

    Deferred verdicts are left out where this controller does not have them.
    """
    place = (work, here, mode)
    loops: list[Loop] = [Plain("plain", *place), Guarded("guarded", *place)]
    loops.append(Guarded("guarded, with a guard", *place, guards=(NonFiniteGuard(),)))
    if has_deferred():
        loops.append(Guarded("guarded, deferred", *place, decision="deferred"))
    loops.append(Guarded("guarded, every 8th", *place, every=8))
    loops.append(Guarded("guarded, none judged", *place, every=NEVER))
    loops.append(Guarded("observe", *place, mode="observe"))
    loops.append(Reference("clone + deepcopy", *place))
    return loops


def has_deferred() -> bool:
    """Whether this controller has deferred verdicts."""
    return "decision" in inspect.signature(StabilityController).parameters


_cache: list[tuple[Windows, Windows, int]] = []


def _windows() -> tuple[Windows, Windows, int]:
    if not _cache:
        _cache.append(load_windows())
    return _cache[0]
