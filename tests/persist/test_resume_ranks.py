"""Ranks that die at any moment go on, when they are started again, as if nothing had been: bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import harness
import pytest
import zoo
from choice import often
from torch import nn
from torch.distributed.tensor import DTensor
from zoo import Case

from dist_stability import SharedMemory, parallel
from dist_stability.testing import FaultInjector, StateImage, capture_state, compare

REFUSED = 9
FAULT = f"gradient-scale:step={REFUSED},factor=300"
"""A step that is refused: what is resumed must know of it."""


class Average:
    """A moving average of sharded weights, which is sharded itself."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def step(self) -> None:
        parallel.reshard(self.model)
        for name, parameter in self.model.named_parameters():
            self.weights[name].lerp_(parameter.detach(), 0.2)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, weight in state["weights"].items():
            assert isinstance(weight, DTensor)
            self.weights[name].copy_(weight)


class Killer:
    """Ends this process in the ``count``-th call of a phase, counted from an attempt on."""

    def __init__(self, phase: str, attempt: int, count: int, how: str) -> None:
        self.phase, self.attempt, self.count, self.how = phase, attempt, count, how

    def __call__(self, attempt: int, phase: str) -> None:
        if phase == self.phase and attempt >= self.attempt:
            self.count -= 1
            if self.count < 0:
                if self.how == "SIGKILL":
                    os.kill(os.getpid(), signal.SIGKILL)
                os._exit(3)


def run(
    rank: int,
    world: int,
    case: Case,
    folder: str,
    options: dict[str, Any],
    kill: tuple[int, str, int, int, str] | None = None,
    faults: tuple[str, ...] = (FAULT,),
) -> tuple[StateImage, list[tuple[int, str]], str]:
    """Build, resume if there is something, train to the end: (final state, verdicts, the line of resume)."""
    setup = zoo.build(case, rank, world)
    options = dict(options)
    if options.pop("average", False):
        setup.extra_state["average"] = Average(setup.model)
    injector = FaultInjector.parse(faults)
    persist = SharedMemory("test", folder) if folder else None
    controller = zoo.control(case, setup, injector=injector, persist=persist, timeout=10.0, **options)
    if kill is not None and kill[0] == rank:
        controller.add_phase_listener(Killer(*kill[1:]))
    verdicts = []
    with controller:
        start = controller.resume(setup.scaler) if folder else None
        for attempt in range(start.attempt if start else 0, case.steps):
            if kill is not None and kill[0] == rank and attempt == kill[2] and kill[1] == "forward":
                setup.model.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, injector)
            assert controller.verdict is not None
            verdicts.append((controller.verdict.step, str(controller.verdict.action)))
            for scheduler in setup.extra_state.values() if controller.verdict.accepted else ():
                scheduler.step()
        controller.finish()
    image = capture_state(setup.model, setup.optimizers, setup.extra_state, setup.scaler)
    return image, verdicts, start.line if start is not None else ""


def left(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir() if path.name.startswith("dist_stability"))


_whole: dict[tuple[str, str], list[Any]] = {}
"""What each case comes to without a death."""


def died_and_resumed(
    case: Case, folder: Path, *kills: tuple[int, str, int, int, str], **options: Any
) -> tuple[int, list[str]]:
    """Start, die, start again, as often as there are kills, and then to the end.

    Returns the attempt that was gone on with in the last start, and the lines of that; asserts that state and verdicts
    are those without a death, and that no file is left.
    """
    ranks = zoo.world_of(case)
    pool = harness.pool(ranks)
    known = (str(case), str(options))
    if known not in _whole:
        _whole[known] = pool.run(run, case, "", options)
    whole = _whole[known]
    for kill in kills:
        died = pool.run(run, case, str(folder), options, kill, expect_failure=True, grace=5.0)
        assert isinstance(died[kill[0]], harness.RankError) and died[kill[0]].type == "Died", died[kill[0]]
    again = pool.run(run, case, str(folder), options)
    for rank in range(ranks):
        assert compare(whole[rank][0], again[rank][0]) == [], f"rank {rank}: {again[rank][2]}"
        verdicts = again[rank][1]
        assert verdicts == whole[rank][1][len(whole[rank][1]) - len(verdicts) :]
    assert left(folder) == []
    return case.steps - len(again[0][1]), [each[2] for each in again]


KILLS = [  # phase, attempt, call of it, the attempt that is gone on with at least
    ("forward", 8, 0, 7),
    ("seal", 8, 0, 7),  # before anything of it is written
    ("seal", 8, 1, 7),  # half written
    ("seal", 8, 2, 7),  # not yet under its name
    ("gradients", 8, 0, 7),
    ("step", 8, 0, 8),
    ("after step", 8, 0, 8),
    ("probe", 8, 0, 8),
    ("vote", 8, 0, 8),
    ("copy", 8, 0, 8),
    ("copy", 8, 2, 8),  # torn
    ("done", 8, 0, 8),
    ("restore", 9, 0, 9),
    ("restore", 9, 2, 9),  # torn
    ("done", 9, 0, 9),
    ("seal", 10, 1, 9),  # the second seal of the same slot
]
FEW = {("seal", 8, 1), ("copy", 8, 2), ("restore", 9, 2)}


def kills() -> list[Any]:
    """The few that tell most in every run of the tests, all of them in the slow ones."""
    return [
        pytest.param(
            mode,
            killed,
            id=f"{mode}-{'-'.join(map(str, killed[:3]))}",
            marks=() if killed[:3] in FEW else pytest.mark.slow,
        )
        for mode in ("ddp", "fsdp2")
        for killed in KILLS
    ]


@pytest.mark.parametrize(("mode", "killed"), kills())
def test_killed_at_any_phase(mode: str, killed: tuple[str, int, int, int], tmp_path: Path) -> None:
    phase, attempt, count, least = killed
    made, lines = died_and_resumed(Case(mode, scheduler=True), tmp_path, (1, phase, attempt, count, "SIGKILL"))
    assert least <= made <= attempt
    assert all(f"resumed at attempt {made} from shared memory (job test" in line for line in lines)


def flipped(rank: int, world: int, case: Case, folder: str) -> None:
    """Resume, while a bit of what rank 1 sends the others flips after its digest was compared."""
    setup = zoo.build(case, rank, world)
    controller = zoo.control(case, setup, persist=SharedMemory("test", folder), timeout=10.0)

    def flip(attempt: int, phase: str) -> None:
        if phase == "restore" and rank == 1 and not calls:
            calls.append(attempt)
            [slot] = [slot for slot in controller._recovery.ring._slots if slot.state == "complete"]
            slot.memory.data[0] ^= 1

    calls: list[int] = []
    controller.add_phase_listener(flip)
    controller.resume()


def test_what_comes_over_a_link_is_checked_when_it_is_there(tmp_path: Path) -> None:
    pool = harness.pool(2)
    pool.run(run, Case("ddp"), str(tmp_path), {}, (1, "step", 8, 0, "SIGKILL"), expect_failure=True, grace=5.0)
    for error in pool.run(flipped, Case("ddp"), str(tmp_path), expect_failure=True):
        assert error.type == "LockstepError" and "resume at attempt 8 failed on rank 0" in error.message, error
        assert "is not what was committed" in error.message and "start the job without resume" in error.message


def test_left_without_goodbye(tmp_path: Path) -> None:
    made, _ = died_and_resumed(Case("ddp"), tmp_path, (0, "vote", 8, 0, "_exit"))
    assert made == 8


@pytest.mark.parametrize("mode", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_killed_again_while_it_resumes(mode: str, tmp_path: Path) -> None:
    """In the middle of the restore, of the copy that follows it, and of its first two seals."""
    again = [("restore", 8, 1), ("copy", 8, 1), ("seal", 8, 1), ("seal", 9, 1)]
    kills = [(rank % 2, *each, "SIGKILL") for rank, each in enumerate([("step", 8, 0), *again])]
    made, _ = died_and_resumed(Case(mode), tmp_path, *kills)
    assert made == 8


CASES = {
    "single": Case("single"),
    "fsdp1": Case("fsdp1"),
    "fsdp1-flat": Case("fsdp1-flat"),
    "uneven": Case("fsdp2-uneven"),
    "empty": Case("fsdp2-empty", optimizer="adamw-fused"),
    "tp": Case("tp"),
    "buffers": Case("ddp", model="conv", optimizer="sgd"),
    "scaler": Case("ddp", model="bf16", scaler=True, accumulation=2),
    "several": Case("fsdp2", optimizers=2, scheduler=True, clip=1.0),
    "schedule in the loss": Case("ddp", shape=3),
    "tensor lr": Case("ddp", tensor_lr=True, optimizer="adam-loop"),
}


@pytest.mark.parametrize("name", often(CASES, ("fsdp1-flat", "tp", "buffers", "scaler")))
def test_every_kind_of_state(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    made, _ = died_and_resumed(case, tmp_path, (zoo.world_of(case) - 1, "step", 10, 0, "SIGKILL"))
    assert made == 10


@pytest.mark.parametrize("mode", ["hsdp", "fsdp2+tp"])
@pytest.mark.slow
def test_four_ranks(mode: str, tmp_path: Path) -> None:
    made, _ = died_and_resumed(Case(mode), tmp_path, (3, "step", 10, 0, "SIGKILL"))
    assert made == 10


def test_deferred_a_rank_ahead_still_has_what_the_other_sealed_last(tmp_path: Path) -> None:
    """Under DDP rank 0 probes alone, so nothing holds it up before it copies the next proposal."""
    case = Case("ddp", draws=False)
    made, lines = died_and_resumed(case, tmp_path, (1, "seal", 7, 1, "SIGKILL"), decision="deferred", anchors=0)
    assert made == 6
    assert "attempt 7 is not on ranks [1]" in lines[0]


OPTIONS: dict[str, dict[str, Any]] = {
    "deferred": {"decision": "deferred"},
    "whole replicas": {"split_replicas": False},
    "shadow": {"shadow": True},
    "every third": {"every": 3},
    "sharded extra state": {"average": True},
}


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize(
    "phase", ["seal", pytest.param("step", marks=pytest.mark.slow), pytest.param("copy", marks=pytest.mark.slow)]
)
def test_every_setting(name: str, phase: str, tmp_path: Path) -> None:
    case = Case("fsdp2" if name in ("deferred", "sharded extra state") else "ddp", draws=name != "deferred")
    made, _ = died_and_resumed(case, tmp_path, (1, phase, 7, 1 if phase != "step" else 0, "SIGKILL"), **OPTIONS[name])
    assert 6 <= made <= 9
