"""A restore keeps every object and address, so that compiled code and graphs that hold on to them stay right."""

from __future__ import annotations

import itertools
from typing import Any

import harness
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_stability import FixedInnovation, LossProbe, StabilityController, parallel
from dist_stability.testing.oracle import capture_state, compare

STEPS = 23
BAD = (4, 11, 18)


class Run:
    """A small model with dropout and BatchNorm, trained on batches that depend on nothing but their number.

    Args:
        compiled: Backend for the model and for the optimizer step; None for eager.
        mode: "single", "ddp" or "fsdp2".
        kernels: Of Adam: "foreach", "fused" or "loop".
    """

    def __init__(self, compiled: str | None = None, mode: str = "single", kernels: str = "foreach") -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
        if mode == "ddp":
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        elif mode == "fsdp2":
            fully_shard(self.model)
        options = {"foreach": kernels == "foreach", "fused": kernels == "fused"}
        rate = 0.01 if kernels == "foreach" else torch.tensor(0.01)  # foreach refuses a tensor outside a compiler
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, **options)
        self.forward: Any = self.model
        self._step: Any = self.optimizer.step
        if compiled is not None:
            self.forward = torch.compile(self.model, backend=compiled)
            self._step = torch.compile(self.optimizer.step, backend=compiled)

    def loss(self, number: int) -> torch.Tensor:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        return self.forward(x).square().mean()

    def train(self, skip: tuple[int, ...] = (), controller: StabilityController | None = None) -> Any:
        """The first steps; with a controller the bad batches are refused, without one they are skipped."""
        for number in range(STEPS):
            if number in skip:
                continue
            self.loss(number).backward()
            if controller is not None and number in BAD:
                for parameter in self.model.parameters():
                    parallel.local(parameter.grad).fill_(float("nan"))
            if controller is None:
                self._step()
            else:
                controller.step()
                assert controller.verdict is not None and controller.verdict.accepted == (number not in BAD)
            self.optimizer.zero_grad(set_to_none=False)
            if number == 1:
                self.before = self.addresses()
            if controller is not None and number > 1:
                assert self.addresses() == self.before, f"step {number}"
        parallel.reshard(self.model)
        return capture_state(self.model, self.optimizer)

    def addresses(self) -> list[tuple[int, int]]:
        """Object and storage of every parameter, gradient, buffer and state tensor, and of the learning rate."""
        parallel.reshard(self.model)
        tensors = [parallel.local(p) for group in self.optimizer.param_groups for p in group["params"]]
        objects = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        rates = [group["lr"] for group in self.optimizer.param_groups if isinstance(group["lr"], torch.Tensor)]
        kept = [*objects, *states, *rates, *self.model.buffers()]
        grads = [parallel.local(p.grad) for p in objects]
        held = [parallel.local(t) for t in (*states, *rates, *self.model.buffers())]
        return [
            *((id(tensor), 0) for tensor in kept),
            *((0, tensor.data_ptr()) for tensor in (*tensors, *held, *grads)),
        ]

    def guarded(self) -> StabilityController:
        batches = [torch.randn(8, 6, generator=torch.Generator().manual_seed(1000))]
        probe = LossProbe(lambda model, batch: model(batch).square().mean(), batches)
        return StabilityController(self.forward, self.optimizer, probe, FixedInnovation(epsilon=100.0), timeout=20.0)


def compared(run: Run, twin: Run) -> list[str]:
    with run.guarded() as controller:
        image = run.train(controller=controller)
    return compare(image, twin.train(skip=BAD))


@pytest.mark.parametrize("kernels", ["foreach", "fused", "loop"])
def test_addresses_stay_over_20_commits_and_3_restores(kernels: str) -> None:
    assert compared(Run(kernels=kernels), Run(kernels=kernels)) == []


def on_ranks(rank: int, world: int, mode: str) -> list[str]:
    return compared(Run(mode=mode), Run(mode=mode))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_addresses_stay_on_ranks(two: harness.Pool, mode: str) -> None:
    """Gradients included: under DDP they are views of its buckets."""
    assert not any(two.run(on_ranks, mode))


def compiled(rank: int, world: int, backend: str, attach: bool) -> list[str]:
    torch._dynamo.reset()
    run, twin = Run(backend), Run(backend)
    run.optimizer.step = run._step  # type: ignore[method-assign]
    controller = run.guarded()
    counted: list[int] = []
    with controller.attach() if attach else controller:
        for number in range(12):
            run.loss(number).backward()
            if number in BAD:
                for parameter in run.model.parameters():
                    parameter.grad.fill_(float("nan"))
            if attach:
                run._step()
            else:
                controller.step()
            run.optimizer.zero_grad(set_to_none=False)
            counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert controller.verdict is not None and counted[0] >= 2
    said = [] if counted[-1] == counted[3] else [f"compiled again after a restore: {counted}"]
    for number in range(12):
        if number in BAD:
            continue
        twin.loss(number).backward()
        twin._step()
        twin.optimizer.zero_grad(set_to_none=False)
    return said + compare(capture_state(run.model, run.optimizer), capture_state(twin.model, twin.optimizer))


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model_and_optimizer_step(one: harness.Pool, backend: str, attach: bool) -> None:
    """A restore is seen by compiled code, and causes no new compilation."""
    assert one.run(compiled, backend, attach, timeout=400) == [[]]


def event_before_a_restore(rank: int, world: int) -> list[str]:
    """``set_post_optim_event`` and no forward since: the next all-gather would not wait for the restore."""
    run = Run(mode="fsdp2")
    context = run.model._get_fsdp_state()._state_ctx

    class Event:
        pass

    seen = []
    with run.guarded() as controller:

        def listener(attempt: int, phase: str) -> None:
            if phase == "restore" and attempt == BAD[0]:
                run.model.set_post_optim_event(Event())  # type: ignore[operator]
            elif phase == "done":
                seen.append(context.post_optim_event is None)

        controller.add_phase_listener(listener)
        for number in range(6):
            run.loss(number).backward()
            if number == BAD[0]:
                for parameter in run.model.parameters():
                    parallel.local(parameter.grad).fill_(float("nan"))
            controller.step()
            run.optimizer.zero_grad()
    return [] if len(seen) == 6 and all(seen) else [f"an event from before the restore was left: {seen}"]


def test_a_restore_is_ordered_before_the_next_all_gather(two: harness.Pool) -> None:
    assert not any(two.run(event_before_a_restore))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_sees_the_restored_state() -> None:
    from dist_stability.snapshot import Slot, StatePlan

    weight = nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    model = nn.ParameterList([weight])
    weight.grad = torch.ones_like(weight)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        weight.data.add_(weight.grad)
    slot = Slot()
    slot.fill(StatePlan.build(model, [optimizer], 1), 0)
    slot.order()
    before = weight.clone()
    for _ in itertools.repeat(None, 3):
        graph.replay()
        slot.restore()
        assert torch.equal(weight, before)
    graph.replay()
    assert torch.equal(weight, before + 1)
