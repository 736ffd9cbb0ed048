"""The courier: in order, one at a time, what fails is told and the good one before stays, nothing outlives the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from choice import slow
from torch import nn

from dist_stability.snapshot import SlotRing, StatePlan
from dist_stability.snapshot.catalogue import Catalogue
from dist_stability.snapshot.tiers import courier as module
from dist_stability.snapshot.tiers.courier import Channel, Courier, Undelivered
from dist_stability.snapshot.tiers.record import Head
from dist_stability.snapshot.tiers.tier import Delivery, Found, Listing


class Noted:
    """A tier that notes what it is given."""

    def __init__(self, every: int, keeps: bool = False, name: str = "the noted") -> None:
        self.name = self.where = name
        self.every, self.keeps = every, keeps
        self.seen: list[int] = []
        self.trouble: Callable[[], None] = lambda: None
        self.data: list[torch.Tensor] = []

    def list(self, world: int, signature: int) -> Listing:
        return Listing([], [])

    def begin(self, made: int, found: Found | None) -> None: ...

    def close(self, keep: bool) -> None: ...

    def deliver(self, delivery: Delivery, channel: Channel) -> None:
        channel.together("noting", lambda: self.trouble())
        assert delivery.slot is not None
        self.data.append(delivery.slot.memory.data.clone())
        self.seen.append(delivery.head.made)

    def settle(self, channel: Channel) -> None: ...


class Training:
    """A ring that is filled, and a courier; no ranks beside this one."""

    def __init__(self, *tiers: Noted) -> None:
        self.model = nn.Linear(3, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.plan = StatePlan.build(self.model, [self.optimizer], 1)
        self.ring = SlotRing(0, spare=Courier.slots(tiers))
        self.courier = Courier(tiers, self.ring, None, (0,), 0)

    def step(self, made: int, sound: bool = True) -> None:
        with torch.no_grad():
            self.model.weight.fill_(made)
        slot = self.ring.begin()
        slot.fill(self.plan, made - 1)
        slot.publish()
        self.ring.commit(slot)
        head = Head("", 0, 1, 1, made, made - 1, 0, 0, slot.payload, 0.0)
        self.courier.poll()
        self.courier.offer(Delivery(head, b"", slot if sound else None, lambda: None))

    def settle(self) -> None:
        for job in self.courier._under_way.values():
            assert job.done.wait(60)


@pytest.fixture
def noted() -> Noted:
    return Noted(2)


def test_what_is_due_arrives_in_order_as_it_was(noted: Noted) -> None:
    other = Noted(3, keeps=True, name="the other")
    run = Training(noted, other)
    for made in range(1, 14):
        run.step(made)
    run.courier.close(wait=True)
    assert noted.seen == [2, 4, 6, 8, 10, 12] and other.seen == [3, 6, 9, 12]
    for tier in (noted, other):
        for made, data in zip(tier.seen, tier.data, strict=True):
            assert made in data.view(torch.float32).tolist()


def test_a_slot_under_way_is_not_filled_again(noted: Noted) -> None:
    noted.every = 1000
    run, go = Training(noted), threading.Event()
    noted.trouble = lambda: None if go.wait(60) else pytest.fail("never let go")
    run.step(1000)
    for made in range(1001, 1010):
        run.step(made)
    go.set()
    run.courier.close(wait=True)
    assert noted.seen == [1000] and 1000.0 in noted.data[0].view(torch.float32).tolist()
    assert run.ring._guests == []


def test_a_tier_that_keeps_holds_the_good_one_until_the_next(noted: Noted) -> None:
    noted.keeps = True
    run = Training(noted)
    run.step(2)
    run.settle()
    run.step(3)
    assert [slot.attempt for slot in run.ring._guests] == [1]
    noted.trouble = lambda: 1 / 0  # type: ignore[assignment,return-value]
    run.step(4)
    run.settle()
    with pytest.warns(RuntimeWarning, match="attempt 4 failed"):
        run.step(5)
    assert [slot.attempt for slot in run.ring._guests] == [1]
    noted.trouble = lambda: None
    run.step(6)
    run.settle()
    run.step(7)
    assert [slot.attempt for slot in run.ring._guests] == [5]
    run.courier.close(wait=True)
    assert run.ring._guests == [] and noted.seen == [2, 6]


def test_a_failure_is_told_once_and_the_next_is_tried(noted: Noted) -> None:
    def trouble() -> None:
        raise OSError(28, "No space left on device")

    run = Training(noted)
    noted.trouble = trouble
    run.step(2)
    run.settle()
    with pytest.warns(RuntimeWarning, match=r"rank 0: the noted: attempt 2 failed \(noting: rank 0: OSError: .*space"):
        run.step(3)
    noted.trouble = lambda: None
    run.step(4)
    run.courier.close(wait=True)
    assert noted.seen == [4]


def test_nothing_sound_to_give_is_a_failure_of_that_one_only(noted: Noted) -> None:
    run = Training(noted)
    run.step(2, sound=False)
    run.settle()
    with pytest.warns(RuntimeWarning, match="this rank has no sound copy of that state"):
        run.step(3)
    run.step(4)
    run.courier.close(wait=True)
    assert noted.seen == [4]


def test_an_error_outside_of_the_protocol_ends_it(noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    def deliver(*_: object) -> None:
        raise ValueError("a mistake")

    run = Training(noted)
    monkeypatch.setattr(noted, "deliver", deliver)
    run.step(2)
    run.settle()
    with pytest.warns(RuntimeWarning, match="a mistake.*No more are tried"):
        run.step(3)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.step(4)
        run.courier.close(wait=True)
    assert noted.seen == [] and run.ring._guests == []


def test_training_waits_for_one_that_is_late_and_says_so(noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NOTICE", 0.0)
    run, waiting = Training(noted), threading.Event()

    def late() -> None:
        assert waiting.wait(60)

    noted.trouble = late
    run.step(2)
    threading.Timer(0.2, waiting.set).start()
    with pytest.warns(RuntimeWarning, match=r"training waited .* s for the noted of attempt 2.*raise every= \(now 2\)"):
        run.step(4)
    run.courier.close(wait=True)
    assert noted.seen == [2, 4]


def test_a_run_that_begins_later_delivers_what_is_due_after_that(noted: Noted) -> None:
    noted.every = 10
    run = Training(noted)
    run.courier.start_at(17)
    for made in range(18, 32):
        run.step(made)
    run.courier.close(wait=True)
    assert noted.seen == [20, 30]


def test_given_up_at_once(noted: Noted) -> None:
    begun, go = threading.Event(), threading.Event()

    def late() -> None:
        begun.set()
        assert go.wait(60)
        raise Undelivered("too late")

    run = Training(noted)
    noted.trouble = late
    run.step(2)
    assert begun.wait(60)
    threading.Timer(0.1, go.set).start()
    with pytest.warns(RuntimeWarning, match="too late"):
        run.courier.close(wait=False)
    run.courier.close(wait=False)
    assert noted.seen == [] and run.ring._guests == []


def test_views_of_a_slot_are_its_bytes_and_no_copy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(5, 7))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    plan, ring = StatePlan.build(model, [optimizer], 1), SlotRing(0)
    slot = ring.begin()
    slot.fill(plan, 0)
    slot.wait()
    catalogue = Catalogue.of(model, plan, slot.held, slot.starts, 0)
    assert catalogue.problem == ""
    data = slot.memory.data
    live = dict(zip((place.key for place in catalogue.places), plan.tensors(), strict=True))
    assert {box.key for box in catalogue.boxes} == set(live)
    assert "optimizer.state.0.weight.exp_avg_sq" in live and "model.1.bias" in live
    for box in catalogue.boxes:
        view = box.view(data)
        assert view.data_ptr() == data.data_ptr() + box.start and view.untyped_storage().nbytes() == view.nbytes
        assert torch.equal(view, live[box.key])


# ---------------------------------------------------------------------- two ranks

LOOP = """
import atexit, json, os, sys

def left_over():  # registered first, so called last
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    print("threads:", json.dumps(names))

atexit.register(left_over)
import torch, torch.distributed as dist
from dist_stability import Checkpoints, LossProbe, StabilityController

rank, folder, ending = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batch = torch.ones(4, 4)
probe = LossProbe(lambda module, batch: module(batch).square().mean(), [batch])
controller = StabilityController(model, optimizer, probe, persist=Checkpoints(f"{folder}/kept", every=1))
for _ in range(4):
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    controller.step()
if ending == "closed":
    controller.close()
    controller.close()
if ending != "left":
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("ending", [slow("closed"), slow("open"), "left"])
def test_no_thread_outlives_the_loop(ending: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LOOP, str(rank), str(tmp_path), ending],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(ranks):
            printed, errors = process.communicate(timeout=120)
            assert process.returncode == 0, f"rank {rank}: {errors}"
            threads = json.loads(printed.rsplit("threads:", 1)[1])
            assert threads.count("python") == 1  # neither watch nor courier
            assert threads.count("pt_gloo_runloop") <= 2  # those of the loop's own group, as DDP still refers to it
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    if ending == "closed":
        assert (tmp_path / "kept" / "attempt-00000003").is_dir()
