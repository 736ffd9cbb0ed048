"""Every kind of death at every phase, on any rank: the job is started again and goes on, bit for bit, not far back.

A case is made of what is trained and of one or two deaths, one for each start but the last. After a death the seals
that are left say which moment all ranks have in common; the next start must go on with exactly that one, and it must
not be older than what is promised. What a case is can be read from its line, which a failure shows.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import zoo
from test_resume_ranks import FAULT, REFUSED, left
from zoo import Case

from dist_stability import Checkpoints, SharedMemory
from dist_stability.snapshot.arena import FoundArena
from dist_stability.snapshot.tiers import record
from dist_stability.snapshot.tiers.manifest import attempts, read_manifest
from dist_stability.snapshot.tiers.shared_memory import files
from dist_stability.testing import FaultInjector, StateImage, capture_state, compare

KINDS = ("SIGKILL", "SIGTERM", "SIGSTOP", "_exit", "exception")
PHASES = ("forward", "backward", "seal", "gradients", "step", "after step", "probe", "vote", "copy", "restore", "done")
WRITING = "delivery"
BOTH = 2
EVERY = 3
"""Attempts from one checkpoint on disk to the next."""


@dataclass(frozen=True)
class Death:
    """How, in which phase, in the how-many-th call of it from which attempt on, and on which rank (or both)."""

    how: str
    phase: str
    attempt: int
    rank: int
    call: int = 0


@dataclass(frozen=True)
class Draw:
    """What is trained, and the deaths of the starts before the last."""

    mode: str
    deaths: tuple[Death, ...]
    decision: str = "immediate"
    scheduler: bool = field(default=False)
    tiers: tuple[str, ...] = ("memory",)

    @property
    def case(self) -> Case:
        return Case(self.mode, draws=self.decision == "immediate", scheduler=self.scheduler)


class Reaper:
    """Brings a death about, and writes down in which attempt."""

    def __init__(self, death: Death, note: Path) -> None:
        self.death, self.calls, self.note, self.now = death, death.call, note, -1

    def __call__(self, attempt: int, phase: str) -> None:
        self.now = attempt
        if phase == self.death.phase and attempt >= self.death.attempt:
            self.calls -= 1
            if self.calls < 0:
                self.die(attempt)

    def hook(self, model: torch.nn.Module, attempt: int) -> None:
        """Die in the next forward, or in the middle of its backward."""
        leaves = [module for module in model.modules() if not any(module.children()) and len(list(module.parameters()))]
        inside = leaves[len(leaves) // 2]

        def forward(module: Any, given: Any, output: torch.Tensor) -> None:
            if not module.training:
                return
            if self.death.phase == "forward":
                self.die(attempt)
            output.register_hook(lambda _: self.die(attempt))

        inside.register_forward_hook(forward)

    def die(self, attempt: int) -> None:
        # In one piece: in another thread than the loop's, the process may end meanwhile.
        partly = self.note.with_suffix(".partly")
        partly.write_text(str(attempt))
        partly.replace(self.note)
        if self.death.how == "exception":
            raise ZeroDivisionError("injected")
        if self.death.how == "_exit":
            os._exit(3)
        os.kill(os.getpid(), getattr(signal, self.death.how))


def train(
    rank: int, world: int, draw: Draw, folder: str, death: Death | None
) -> tuple[int, StateImage, list[tuple[int, str]]]:
    """Build, resume what there is, train to the end: (attempt it began with, final state, verdicts)."""
    case = draw.case
    setup = zoo.build(case, rank, world)
    injector = FaultInjector.parse([FAULT])
    known = {"memory": SharedMemory("test", folder), "disk": Checkpoints(Path(folder) / "disk", EVERY, keep=2)}
    persist = [known[tier] for tier in draw.tiers] if folder else None
    controller = zoo.control(case, setup, injector=injector, persist=persist, timeout=6.0, decision=draw.decision)
    reaper = None
    if death is not None and death.rank in (rank, BOTH):
        reaper = Reaper(death, Path(folder) / f"died-{rank}")
        controller.add_phase_listener(reaper)
    verdicts = []
    with controller:
        start = controller.resume(setup.scaler).attempt if folder else 0
        for attempt in range(start, case.steps):
            hooked = (
                death is not None and death.phase in ("forward", "backward") and attempt == max(start, death.attempt)
            )
            if reaper is not None and hooked:
                reaper.hook(setup.model, attempt)
            zoo._attempt(case, setup, attempt, zoo.fetch(case, setup, attempt), controller, injector)
            assert controller.verdict is not None
            verdicts.append((controller.verdict.step, str(controller.verdict.action)))
            for scheduler in setup.extra_state.values() if controller.verdict.accepted else ():
                scheduler.step()
        controller.finish()
    return start, capture_state(setup.model, setup.optimizers, setup.extra_state, setup.scaler), verdicts


def common(folder: Path) -> int:
    """The newest attempt that both ranks could go on with: sealed in memory or written to disk, and sound."""
    found: list[set[int]] = [set(), set()]
    for path in attempts(folder / "disk") if (folder / "disk").exists() else ():
        manifest = read_manifest(path)
        assert not manifest.damaged()
        for each in found:
            each.add(manifest.head.made)
    for file in files(folder):
        if file.seal in ("a", "b"):
            head, _ = record.read(file.path)
            if FoundArena(file.slot, head.nbytes).fill == head.fill:
                found[file.rank].add(head.made)
    return max(set.intersection(*found), default=0)


def oldest_promised(draw: Draw, died: int) -> int:
    """One attempt behind the death, two where verdicts are read a step late; on disk the checkpoint before the last."""
    if "memory" in draw.tiers:
        return died - (1 if draw.decision == "immediate" else 2)
    return (died - 1) // EVERY * EVERY - EVERY  # one is begun only when the one before is whole


_whole: dict[tuple[Case, str], list[Any]] = {}


def check(draw: Draw, folder: Path) -> None:
    """Die as often as the draw says, go on each time, and end like a run that nobody killed."""
    pool = harness.pool(2)
    known = (draw.case, draw.decision)
    if known not in _whole:
        _whole[known] = pool.run(train, draw, "", None)
        assert (REFUSED, "rollback") in _whole[known][0][2] or draw.decision == "deferred"
    whole, before = _whole[known], 0
    for death in draw.deaths:
        ended = pool.run(train, draw, str(folder), death, expect_failure=True, grace=8.0, group_timeout=6.0)
        notes = [folder / f"died-{rank}" for rank in range(2)]
        died = [int(note.read_text()) for note in notes if note.exists()]
        for note in notes:
            note.unlink(missing_ok=True)
        whole_ranks = [not isinstance(result, harness.RankError) for result in ended]
        if death.phase == WRITING and all(whole_ranks):
            break  # gone on with so late that nothing was due any more
        if death.phase == WRITING and any(whole_ranks):
            return  # beside the last steps: a rank had ended before it could notice, and has removed what was its own
        assert died, f"{death} did not happen: {[str(result)[:300] for result in ended]}"
        assert_died(death, ended)
        at = common(folder)
        assert at >= max(before, oldest_promised(draw, min(died))), (death, died)
        assert at <= max(died) or death.phase == WRITING  # which goes on beside later attempts
        before = at
    else:
        ended = pool.run(train, draw, str(folder), None)
    for rank in range(2):
        start, image, verdicts = ended[rank]
        assert start == before
        assert compare(whole[rank][1], image) == [], f"rank {rank}"
        assert verdicts == whole[rank][2][len(whole[rank][2]) - len(verdicts) :]
    assert left(folder) == []


def assert_died(death: Death, ended: list[Any]) -> None:
    assert all(isinstance(result, harness.RankError) for result in ended), ended
    codes = {"SIGKILL": -signal.SIGKILL, "SIGTERM": -signal.SIGTERM, "_exit": 3}
    for rank in range(2) if death.rank == BOTH else (death.rank,):
        if death.how in codes:
            assert f"exit code {codes[death.how]} " in ended[rank].message
    if death.how == "SIGSTOP":  # found by those who wait, and named
        assert ended[death.rank].type == "Hung"
        other = ended[1 - death.rank]
        assert other.type == "LockstepError" and list(other.facts["ranks"]) == [death.rank], other


FIXED = {
    "killed in forward": Draw("fsdp2", (Death("SIGKILL", "forward", 6, 1),)),
    "terminated in backward": Draw("ddp", (Death("SIGTERM", "backward", 6, 0),), scheduler=True),
    "exception in backward": Draw("fsdp2", (Death("exception", "backward", 7, 1),)),
    "exception in a copy": Draw("ddp", (Death("exception", "copy", 7, 0, 1),)),
    "left in a copy": Draw("fsdp2", (Death("_exit", "copy", 7, 0, 2),)),
    "stopped in a vote": Draw("ddp", (Death("SIGSTOP", "vote", 5, 1),)),
    "stopped in forward": Draw("fsdp2", (Death("SIGSTOP", "forward", 5, 0),)),
    "terminated in a restore": Draw("ddp", (Death("SIGTERM", "restore", 0, 1, 2),)),
    "both, in a seal": Draw("fsdp2", (Death("SIGKILL", "seal", 6, BOTH, 1),), scheduler=True),
    "killed in a write to disk": Draw("fsdp2", (Death("SIGKILL", WRITING, 6, 0, 3),), tiers=("disk",)),
    "stopped beside a write": Draw("ddp", (Death("SIGSTOP", "seal", 3, 1, 2),), scheduler=True, tiers=("disk",)),
    "deferred, twice": Draw(
        "fsdp2", (Death("SIGKILL", "step", 3, 0), Death("_exit", "restore", 0, 1, 1)), decision="deferred"
    ),
}


LONG = ("terminated in backward", "exception in a copy", "left in a copy", "stopped in forward", "both, in a seal")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in FIXED])
def test_a_death_costs_no_more_than_is_promised(name: str, tmp_path: Path) -> None:
    check(FIXED[name], tmp_path)


def drawn(draw: random.Random) -> Draw:
    """One case: any kind at any phase, half of them twice."""

    tiers = draw.choice((("memory",), ("memory",), ("disk",), ("memory", "disk")))

    def death(low: int) -> Death:
        how, phase = draw.choice(KINDS), draw.choice((*PHASES, *([WRITING] * 3 if "disk" in tiers else ())))
        if phase == WRITING:  # in a thread of its own: an exception there ends nothing but the write
            how = draw.choice([kind for kind in KINDS if kind != "exception"])
            return Death(how, phase, draw.randrange(7), draw.randrange(2), draw.randrange(6))
        rank = draw.choice((0, 1) if how == "SIGSTOP" else (0, 1, BOTH))
        chunks: Callable[[int], int] = draw.randrange
        call = chunks(3) if phase in ("seal", "copy", "restore") else 0
        attempt = min(low + draw.randrange(4), 10)
        if phase == "restore":  # where a step is refused, and where a later start resumes
            attempt = 0
        if phase == "seal" and "memory" not in tiers:  # where a checkpoint is due, and in one part
            attempt, call = min(attempt, 6), 0
        return Death(how, phase, attempt, rank, call)

    deaths = (death(draw.randrange(8)),)
    deaths += (death(deaths[0].attempt),) if draw.random() < 0.5 else ()
    return Draw(
        draw.choice(("ddp", "fsdp2")),
        deaths,
        draw.choice(("immediate", "deferred")),
        scheduler=draw.random() < 0.5,
        tiers=tiers,
    )


@pytest.mark.slow
def test_a_hundred_random_deaths(tmp_path: Path) -> None:
    seed = int(os.environ.get("KILL_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"seed {seed} (KILL_SEED={seed} draws the same again)")
    draw = random.Random(seed)
    for number in range(int(os.environ.get("KILL_DRAWS", "100"))):
        one = drawn(draw)
        print(number, one, flush=True)
        folder = tmp_path / str(number)
        folder.mkdir()
        check(one, folder)
