"""A slot gives back every bit, in place, or says what is wrong with it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from mmap import PAGESIZE
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from dist_stability import SnapshotError
from dist_stability.snapshot import ForwardState, Slot, SlotState, StatePlan
from dist_stability.testing.oracle import capture_state, compare


class Training:
    """A small model that is trained on the same batches each time."""

    def __init__(self, make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer], **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(**options)
        self.optimizer = make(self.model.parameters())

    def step(self, count: int = 1) -> None:
        dtype = self.model[0].weight.dtype

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            x = torch.arange(12.0).reshape(4, 3).to(dtype) / 10
            loss = (self.model(x).float() - 1).square().sum()
            loss.backward()
            return loss

        for _ in range(count):
            self.optimizer.step(closure)

    def plan(self) -> StatePlan:
        return StatePlan.build(self.model, [self.optimizer], 1)

    def snapshot(self, attempt: int = 0) -> Slot:
        slot = Slot()
        slot.fill(self.plan(), attempt)
        slot.publish()
        return slot

    def image(self) -> Any:
        return capture_state(self.model, self.optimizer)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam-loop": lambda parameters: torch.optim.Adam(parameters, lr=0.05, foreach=False),
    "adam-foreach": lambda parameters: torch.optim.Adam(parameters, lr=0.05, foreach=True),
    "adam-fused": lambda parameters: torch.optim.Adam(parameters, lr=0.05, fused=True),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, amsgrad=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.05),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.05),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.05),
    "asgd": lambda parameters: torch.optim.ASGD(parameters, lr=0.05),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.05, max_iter=3, history_size=4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_golden_twin(name: str, before: int) -> None:
    """Restored, the run is the one that never took the further steps; state made by them is gone, not zeroed."""
    run, twin = Training(OPTIMIZERS[name]), Training(OPTIMIZERS[name])
    run.step(before)
    twin.step(before)
    slot = run.snapshot()
    run.step(3)
    assert slot.verify() == []
    slot.restore()
    assert run.plan().signature == slot.plan.signature and slot.plan.is_current()
    assert compare(run.image(), twin.image()) == []
    run.step()
    twin.step()
    assert compare(run.image(), twin.image()) == []


def test_state_that_appeared_is_deleted() -> None:
    run = Training(adam)
    slot = run.snapshot()
    run.step()
    run.optimizer.state["global"] = {"step": 1}  # type: ignore[index]
    slot.restore()
    assert dict(run.optimizer.state) == {}
    run.step()
    slot = run.snapshot()
    run.optimizer.state[run.model[0].weight]["extra"] = torch.ones(3)
    run.optimizer.state[run.model[0].bias].clear()
    slot.restore()
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in run.optimizer.state.values())
    run.optimizer.state["global"] = {}  # type: ignore[index]
    slot.restore()
    assert "global" not in run.optimizer.state, "an empty state is none, but was not there"


@pytest.mark.parametrize("name", ["momentum", "adam-loop", "adam-foreach", "adam-fused"])
def test_objects_and_addresses_stay(name: str) -> None:
    """What compiled optimizers and CUDA graphs hold on to."""
    run = Training(OPTIMIZERS[name])
    run.step()
    slot = run.snapshot()

    def identities() -> list[tuple[int, int]]:
        tensors = [*run.model.parameters(), *(t for state in run.optimizer.state.values() for t in state.values())]
        return [(id(tensor), tensor.data_ptr()) for tensor in tensors]

    before = identities()
    run.step(2)
    slot.restore()
    assert identities() == before
    state = run.optimizer.state
    assert state is run.optimizer.state and list(state) == list(run.model.parameters())


def test_low_precision_parameters_keep_their_float32_state() -> None:
    """Optimizer.load_state_dict would cast it to bfloat16."""
    run = Training(OPTIMIZERS["momentum"], dtype=torch.bfloat16)
    run.step()
    for state in run.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].float() + 1e-5
    slot, before = run.snapshot(), run.image()
    for state in run.optimizer.state.values():
        state["momentum_buffer"].zero_()
    slot.restore()
    assert compare(run.image(), before) == []
    assert {state["momentum_buffer"].dtype for state in run.optimizer.state.values()} == {torch.float32}


def test_every_bit_pattern_survives() -> None:
    """NaNs with their payload, infinities, negative zero, subnormal numbers."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    model = nn.Module()
    model.weight = nn.Parameter(patterns.view(torch.bfloat16).clone())
    slot = Slot()
    slot.fill(StatePlan.build(model, [torch.optim.SGD(model.parameters(), lr=0.1)], 1), 0)
    model.weight.data.zero_()
    slot.restore()
    assert torch.equal(model.weight.data.view(torch.int16), patterns)


def test_strides_and_kinds_of_tensors() -> None:
    model = nn.Module()
    model.channels_last = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    model.turned = nn.Parameter(torch.randn(3, 5).t())
    model.scalar = nn.Parameter(torch.tensor(2.0))
    model.empty = nn.Parameter(torch.empty(0, 7))
    model.complex = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    model.spread = nn.Parameter(torch.randn(8)[::2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.scalar] = {  # type: ignore[assignment]
        "flags": torch.tensor([True, False, True]),
        "counts": torch.arange(5),
        "eight": torch.randn(7).to(torch.float8_e4m3fn),
    }
    slot = Slot()
    slot.fill(StatePlan.build(model, [optimizer], 1), 0)
    assert all(view.data_ptr() % view.element_size() == 0 for view in slot._views)
    dense = ("channels_last", "turned", "scalar", "empty", "complex")
    views = dict(zip((entry.name for entry in slot.plan.entries), slot._views, strict=True))
    assert all(views[name].stride() == getattr(model, name).stride() for name in dense), "one memcpy is enough"
    before = capture_state(model, optimizer)
    strides = [parameter.stride() for parameter in model.parameters()]
    for tensor in slot.plan.tensors():
        tensor.zero_()
    assert compare(capture_state(model, optimizer), before)
    slot.restore()
    assert compare(capture_state(model, optimizer), before) == []
    assert [parameter.stride() for parameter in model.parameters()] == strides
    assert slot.verify() == []


def test_numbers_strings_and_containers() -> None:
    run = Training(OPTIMIZERS["momentum"])
    run.step()
    state = run.optimizer.state[run.model[0].weight]
    state.update(step=3, mode="warm", last=None, history=[1.0, torch.ones(2)], nested={"a": (torch.zeros(1), 2)})
    run.optimizer.state["ema"] = {"decay": 0.5, "shadow": torch.ones(2)}  # type: ignore[index]
    slot = run.snapshot()
    history, nested, shadow = state["history"], state["nested"], run.optimizer.state["ema"]["shadow"]  # type: ignore[index]
    before = copy.deepcopy(dict(state))
    state["step"], state["mode"], state["last"] = 4, "cold", torch.ones(1)
    history[0] = 2.0
    history[1].zero_()
    nested["a"] = (nested["a"][0] + 1, 5)
    nested["b"] = 1
    shadow.zero_()
    run.optimizer.state["ema"]["decay"] = 0.9  # type: ignore[index]
    slot.restore()
    after = run.optimizer.state[run.model[0].weight]
    assert (after["step"], after["mode"], after["last"]) == (3, "warm", None)
    assert after["history"] is history and history[0] == 1.0 and torch.equal(history[1], torch.ones(2))
    assert after["nested"] is nested and set(nested) == {"a"} and nested["a"][1] == 2
    assert torch.equal(nested["a"][0], torch.zeros(1)) and set(after) == set(before)
    assert run.optimizer.state["ema"]["decay"] == 0.5 and shadow.tolist() == [1, 1]  # type: ignore[index]
    # The slot's own copy is not handed out: spoil what was restored, and restore again.
    state["history"].append(1)
    state["nested"].clear()
    slot.restore()
    assert len(state["history"]) == 2 and state["nested"]["a"][1] == 2


def test_state_that_vanished_is_made_again() -> None:
    run = Training(adam)
    run.step(2)
    slot, before = run.snapshot(), run.image()
    run.optimizer.state.clear()
    slot.restore()
    assert compare(run.image(), before) == []
    with torch.no_grad():  # what was made again is no view of the slot
        for tensor in slot.plan.tensors():
            tensor.zero_()
    assert slot.verify() == []
    # Neither is what has another form now: it is replaced.
    run.optimizer.state[run.model[0].bias]["exp_avg"] = torch.zeros(5, dtype=torch.bfloat16)
    slot.restore()
    assert compare(run.image(), before) == []


def test_wrapper_subclasses() -> None:
    """Such as 8-bit states: the inner tensors are the state."""
    run = Training(OPTIMIZERS["sgd"])
    state = TwoTensor(torch.arange(3.0), torch.arange(3.0) + 10)
    run.optimizer.state[run.model[0].bias] = {"coded": state}  # type: ignore[assignment]
    slot = run.snapshot()
    assert [entry.name for entry in slot.plan.entries if "coded" in entry.name] == [
        "coded.0 of 0.bias",
        "coded.1 of 0.bias",
    ]
    state.a.zero_()
    state.b.zero_()
    slot.restore()
    assert run.optimizer.state[run.model[0].bias]["coded"] is state
    assert state.a.tolist() == [0, 1, 2] and state.b.tolist() == [10, 11, 12]
    run.model[0].weight.data.zero_()
    run.optimizer.state.clear()
    with pytest.raises(SnapshotError, match=r"rank 0: coded of 0\.bias is no longer there.*cannot be made again"):
        slot.restore()
    assert not run.model[0].weight.any(), "nothing may be changed when the slot does not fit"


def test_a_slot_that_does_not_fit_changes_nothing() -> None:
    run = Training(adam)
    slot = run.snapshot()
    run.step()
    before = run.image()
    kept = run.model[0].bias.data
    run.model[0].bias.data = torch.zeros(6)
    with pytest.raises(SnapshotError, match=r"rank 0: 0\.bias has another shape or dtype than at .* attempt 0"):
        slot.restore()
    run.model[0].bias.data = kept
    assert compare(run.image(), before) == []
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(SnapshotError, match="other parameters than at the snapshot of attempt 0"):
        slot.restore()
    run.optimizer.param_groups.pop()
    assert compare(run.image(), before) == []


def test_every_flipped_bit_is_found_and_named() -> None:
    run = Training(adam)
    run.step()
    slot = run.snapshot()
    for entry, view in zip(slot.plan.entries, slot._views, strict=True):
        data = view.reshape(-1).view(torch.uint8)
        assert data.data_ptr() == view.data_ptr()
        for place in range(len(data)):
            bit = 1 << (place % 8)
            data[place] ^= bit
            assert slot.verify() == [entry.name]
            data[place] ^= bit
    assert slot.verify() == []


def test_several_damaged_entries_are_all_named() -> None:
    run = Training(adam)
    run.step()
    slot = run.snapshot()
    slot._views[0][0, 0] += 1
    slot._views[4][1] += 1
    assert slot.verify() == ["0.weight", "0.bias"]


def test_permutations_and_paired_flips_in_a_slot() -> None:
    run = Training(OPTIMIZERS["sgd"])
    slot = run.snapshot()
    row = slot._views[0].view(-1)
    original = row.clone()
    for one, other in itertools.combinations(range(len(row)), 2):
        row[[one, other]] = original[[other, one]]
        assert slot.verify() == ["0.weight"]
        row.copy_(original)
        row[[one, other]] *= -1
        assert slot.verify() == ["0.weight"]
        row.copy_(original)
    assert slot.verify() == []


class Stop(Exception):
    """Raised in the middle of a copy."""


def stopping(after: int) -> Callable[[], None]:
    calls = itertools.count(1)

    def stop() -> None:
        if next(calls) > after:
            raise Stop

    return stop


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_an_interrupted_fill_never_counts(after: int) -> None:
    run = Training(adam)
    run.step()
    older, newer = run.snapshot(1), Slot()
    before = run.image()
    run.step()
    later = run.image()
    with pytest.raises(Stop):
        newer.fill(run.plan(), 2, on_chunk=stopping(after))
    assert newer.state is SlotState.FILLING
    assert newer.verify() == ["the slot itself, which is filling"]
    with pytest.raises(SnapshotError, match="filling cannot be published"):
        newer.publish()
    with pytest.raises(SnapshotError, match="filling cannot be restored"):
        newer.restore()
    assert older.state is SlotState.VALID and older.verify() == []
    older.restore()
    assert compare(run.image(), before) == []
    # The torn slot can be filled again.
    run.step()
    newer.fill(run.plan(), 2)
    run.step()
    newer.restore()
    assert compare(run.image(), later) == []


def test_an_interrupted_refill_does_not_keep_the_old_content() -> None:
    run = Training(adam)
    slot = run.snapshot(1)
    run.step()
    with pytest.raises(Stop):
        slot.fill(run.plan(), 2, on_chunk=stopping(0))
    with pytest.raises(SnapshotError):
        slot.restore()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_restore_can_be_repeated(after: int) -> None:
    run = Training(adam)
    run.step()
    slot, before = run.snapshot(), run.image()
    run.step(2)
    with pytest.raises(Stop):
        slot.restore(on_chunk=stopping(after))
    slot.restore()
    assert compare(run.image(), before) == []


@pytest.mark.parametrize("layers", [1, 2, 7, 40])
def test_copies_are_made_in_at_least_four_chunks(layers: int) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers - 1)), nn.Linear(2, 500))
    slot = Slot()
    plan = StatePlan.build(model, [torch.optim.SGD(model.parameters(), lr=0.1)], 1)
    calls: list[int] = []
    slot.fill(plan, 0, on_chunk=lambda: calls.append(1))
    filled = len(calls)
    assert (filled >= 3 if layers > 1 else filled == 1) and filled <= 16
    slot.restore(on_chunk=lambda: calls.append(1))
    restored = len(calls) - filled
    assert (restored >= 3 if layers > 1 else restored == 1) and restored <= 16


def test_refilling_allocates_nothing() -> None:
    run = Training(adam)
    run.step()
    plan, slot = run.plan(), Slot()
    slot.fill(plan, 0)
    places = [view.data_ptr() for view in slot._views]
    size = slot.nbytes
    assert plan.nbytes <= slot._data.numel() <= plan.nbytes * 1.01 and size == PAGESIZE and not slot.pinned
    for attempt in range(3):
        run.step()
        slot.fill(plan, attempt)
        slot.publish()
        assert [view.data_ptr() for view in slot._views] == places
    # A plan with less keeps the memory, one with more takes more.
    arena = slot._data.data_ptr()
    run.optimizer.state.clear()
    slot.fill(run.plan(), 4)
    assert slot._data.data_ptr() == arena and slot.nbytes == size
    run.optimizer.state[run.model[0].weight]["large"] = torch.zeros(10000)
    slot.fill(run.plan(), 5)
    assert slot.nbytes > 40000


def test_filling_leaves_the_rest_of_the_slot_empty() -> None:
    run = Training(adam)
    slot = run.snapshot(3)
    slot.rule_anchor, slot.forward = {"level": 1.0}, ForwardState(run.model)
    slot.forward.capture()
    kept = slot.forward
    slot.fill(run.plan(), 4)
    assert (slot.attempt, slot.state) == (4, SlotState.COMPLETE)
    assert slot.entry is None and slot.rule_anchor is None
    assert slot.forward is kept and not kept.captured
    slot.release()
    assert slot.state is SlotState.FREE
    with pytest.raises(SnapshotError, match="free cannot be restored"):
        slot.restore()


def test_digests_of_the_caller_are_kept() -> None:
    run = Training(adam)
    plan, slot = run.plan(), Slot()
    digests = plan.digests(plan.tensors())
    slot.fill(plan, 0, digests)
    assert slot.digests is digests and slot.verify() == []
    # They are of the state and not of the copy: what changed in between shows.
    with torch.no_grad():
        run.model[0].bias[0] += 1
    slot.fill(plan, 0, digests)
    assert slot.verify() == ["0.bias"]


def test_a_plan_that_is_not_current() -> None:
    run = Training(adam)
    plan, slot = run.plan(), Slot()
    with pytest.raises(SnapshotError, match="never filled"):
        _ = slot.plan
    run.step()
    with pytest.raises(SnapshotError, match="new plan"):
        slot.fill(plan, 0)
    assert slot.state is SlotState.FILLING


def test_no_memory_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training(adam)
    plan = run.plan()

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    slot = Slot()
    monkeypatch.setattr("dist_stability.snapshot.arena.mmap.mmap", refuse)
    with pytest.raises(SnapshotError, match=r"rank 0: no host memory for a snapshot of .*allocate memory"):
        slot.fill(plan, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["momentum", "adam-foreach", "adam-fused"])
def test_on_a_gpu(name: str) -> None:
    def build() -> Training:
        return Training(OPTIMIZERS[name], device="cuda")

    def step(run: Training, count: int) -> None:
        for _ in range(count):
            run.optimizer.zero_grad()
            run.model(torch.ones(4, 3, device="cuda")).square().sum().backward()
            run.optimizer.step()

    run, twin = build(), build()
    step(run, 2)
    step(twin, 2)
    plan, slot = run.plan(), Slot()
    slot.fill(plan, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        slot.fill(plan, 1) if name == "adam-fused" else None  # foreach keeps its step counters on the CPU
    finally:
        torch.cuda.set_sync_debug_mode("default")
    slot.publish()
    slot.order()
    step(run, 3)
    assert slot.pinned and slot.verify() == []
    slot.restore()
    assert compare(run.image(), twin.image()) == []
    step(run, 1)
    step(twin, 1)
    assert compare(run.image(), twin.image()) == []
