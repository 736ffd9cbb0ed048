"""A copy of the safe state on the device: used when it is sound on every rank, and the slot by all of them when not."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
import zoo
from torch import nn
from zoo import Case, Setup

from dist_stability import LossProbe, StabilityController
from dist_stability.snapshot import Slot, shadow
from dist_stability.testing import FaultInjector, NotTheTwin, Outcome, assert_golden_twin
from dist_stability.testing.faults import flip_largest

BAD = 9
FAULTS = (f"gradient-scale:step={BAD},factor=300,length=2",)
Found = tuple[str, list[str], list[int]]


def guarded(rank: int, world: int, case: Case, decision: str, damage: int | None, short: int | None) -> Found:
    """(what differs from the twin, where each restore took its bytes from, attempts at which a copy was damaged).

    Args:
        rank: This one.
        world: Number of ranks.
        case: What is trained.
        decision: Of the controller.
        damage: The rank whose shadow is damaged before it is looked at.
        short: The rank that has no memory for one.
    """
    injector, sources, damaged = FaultInjector.parse(FAULTS), [], []

    def watched(controller: StabilityController) -> None:
        def listen(attempt: int, phase: str) -> None:
            if phase == "restore" and rank == damage and not damaged:
                for one in controller._recovery._shadows:
                    if one.holds(controller._recovery.ring.safe):
                        damaged.append(attempt)
                        flip_largest(one._tensors, "low-mantissa")

        controller.add_phase_listener(listen)

    def first(attempt: int, setup: Setup, controller: StabilityController | None) -> None:
        if attempt == 0 and controller is not None:
            watched(controller)

    def run(skip: frozenset[int], guarded: bool) -> Outcome:
        faults = injector if guarded else None
        options = {"decision": decision, "shadow": True} if guarded else {}
        return zoo.train(case, rank, world, skip=skip, guarded=guarded, injector=faults, after_step=first, **options)

    with pytest.MonkeyPatch.context() as patch:
        original = Slot.restore

        def restore(self: Slot, on_chunk: Any = None, source: Any = None) -> None:
            sources.append("slot" if source is None else "shadow")
            original(self, on_chunk, source)

        patch.setattr(Slot, "restore", restore)
        if rank == short:
            patch.setattr(shadow, "_free", lambda device: 0.0)
        try:
            if decision == "immediate":
                assert_golden_twin(run, refused=(BAD, BAD + 1))
            else:  # the refusal of the first bad step drops the batch of the second
                assert_golden_twin(run, refused=(BAD + 1,), undone=(BAD,))
        except NotTheTwin as error:
            return str(error), sources, damaged
    return "", sources, damaged


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp1", "fsdp2", "hsdp"])
def test_a_sound_shadow_is_what_comes_back(mode: str) -> None:
    for said, sources, _ in harness.pool(zoo.MODES[mode]).run(guarded, Case(mode), "immediate", None, None):
        assert not said, said
        assert sources == ["shadow", "shadow"]


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2"])
def test_deferred_the_copy_of_a_proposal_spares_that_of_the_safe_state(mode: str) -> None:
    for said, sources, _ in harness.pool(zoo.MODES[mode]).run(guarded, Case(mode, draws=False), "deferred", None, None):
        assert not said, said
        assert sources == ["shadow"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_damaged_on_one_rank_all_use_the_slot(mode: str) -> None:
    results = harness.pool(2).run(guarded, Case(mode), "immediate", 1, None)
    assert results[1][2] == [BAD]
    for said, sources, _ in results:
        assert not said, said
        assert sources == ["slot", "slot"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_no_memory_on_one_rank_all_use_the_slot(mode: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNINGS", "ignore")
        results = harness.pool(2).run(guarded, Case(mode), "immediate", None, 0)
    for said, sources, _ in results:
        assert not said, said
        assert sources == ["slot", "slot"]


def test_without_memory_a_warning_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "_free", lambda device: 2.0**20)
    model = nn.Linear(512, 512)
    probe = LossProbe(lambda module, batch: module(batch).square().mean(), [torch.ones(1, 512)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(RuntimeWarning, match="rank 0: no copy of the state is kept on cpu: it takes 1 MiB and 1 MiB"),
        StabilityController(model, optimizer, probe, shadow=True),
    ):
        pass


def test_bad_setting() -> None:
    model = nn.Linear(2, 2)
    probe = LossProbe(lambda module, batch: module(batch).sum(), [torch.ones(1, 2)])
    with pytest.raises(TypeError, match="shadow: expected True or False, got 2"):
        StabilityController(model, torch.optim.SGD(model.parameters(), lr=0.1), probe, shadow=2)
