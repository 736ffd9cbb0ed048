"""Faults on purpose, keyed by (rank, step, phase): the same ones with the controller and without it.

A :class:`FaultInjector` holds a list of :class:`Fault` and can reach a run in these ways, which may be combined:

* ``injector.attach(controller)`` listens to the phases of the guarded step, so it can act anywhere in it;
* ``injector.gradients(step, parameters)`` between ``backward()`` and the optimizer step,
  ``injector.weights(step, parameters)`` after it, and ``injector.hook(optimizer)``, once, before the first, do the same
  in a plain loop (an unguarded baseline);
* ``batch = injector.batch(step, batch)`` before the forward lets faults act on what is trained on, in either loop;
* ``probe=LossProbe(injector.wrap_loss(loss_fn), batches)`` lets faults act in the probe's loss function.

A fault acts at most once in an attempt (on every micro-batch of it), so a loop that calls ``gradients`` before it clips
may also be attached. What fired on this rank is in ``injector.fired``. Nothing here is random:
:meth:`FaultInjector.random` draws the faults when it is built, from a seed, and labels are shuffled in an order that
depends on the attempt alone. ``step`` is the attempt index everywhere (0 for the first call of ``step()``).

Source: the list of process faults is nvidia-resiliency-ext's, the keyed injector with a fluent builder torchft's.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_stability import parallel
from dist_stability.learning_rate import RateCut

from .fault import BITS, DRAWN_KINDS, LOSS_PHASES, PHASES, PLACES, PROCESS_KINDS, Fault, parse

_LAYOUTS = {  # dtype -> (integer dtype of the same width, bits, mantissa bits)
    torch.float64: (torch.int64, 64, 52),
    torch.float32: (torch.int32, 32, 23),
    torch.bfloat16: (torch.int16, 16, 7),
    torch.float16: (torch.int16, 16, 10),
}


class InjectedFault(RuntimeError):
    """The exception that a "raise" fault raises."""


class FaultInjector:
    """A list of faults and what has become of them on this rank.

    Args:
        faults: The faults; more can be added with the methods that return ``self``.

    Attributes:
        faults: What may fire.
        fired: For each fault that acted on this rank, the attempts it acted in.
    """

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        """Nothing fires until the injector is attached or called."""
        self.faults: list[Fault] = list(faults)
        self.fired: dict[Fault, list[int]] = {}
        self._controller: Any = None
        self._now: tuple[int, str] = (-1, "")
        self._hooked: list[Optimizer] = []

    @classmethod
    def parse(cls, specs: Iterable[str]) -> FaultInjector:
        """Build from command-line texts ``kind:key=value,...``, e.g. ``bit-flip:step=9,rank=1,where=parameter``.

        Raises:
            ValueError: Unknown kind, key or value; the message lists the known ones.
        """
        return cls(parse(spec) for spec in specs)

    def spare_the_process(self) -> FaultInjector:
        """Drop the faults that end or hold a process, and return the injector: they did so in an earlier start."""
        self.faults = [fault for fault in self.faults if fault.kind not in (*PROCESS_KINDS, "sleep")]
        return self

    @classmethod
    def random(
        cls, seed: int, world_size: int, steps: int, *, start: int = 0, kinds: Sequence[str] = DRAWN_KINDS
    ) -> FaultInjector:
        """One fault whose kind, rank, step, phase and strength are drawn from a seed.

        Args:
            seed: The same seed gives the same fault on every rank and machine.
            world_size: Ranks to draw from.
            steps: Attempts of the run; the fault's step is in [start, steps).
            start: First attempt to draw.
            kinds: Kinds to draw from.
        """
        draw = random.Random(seed)
        kind = draw.choice(list(kinds))
        where = draw.choice(list(PLACES))
        phase = draw.choice(PHASES + LOSS_PHASES)
        fault = Fault(
            kind,
            draw.randrange(start, steps),
            phase=phase,
            rank=None if kind == "gradient-scale" and draw.random() < 0.5 else draw.randrange(world_size),
            factor=draw.choice([-1.0, 0.0, 0.5, 2.0, 30.0, 300.0, 1e6, 1e30]) if kind == "gradient-scale" else 300.0,
            where=where if kind == "bit-flip" else "gradient",
            bit=draw.choice(BITS) if kind == "bit-flip" else "top-exponent",
            seconds=0.05 if kind == "sleep" else 1.0,
        )
        return cls([fault])

    def add(self, fault: Fault) -> FaultInjector:
        """Add a fault and return the injector."""
        self.faults.append(fault)
        return self

    def scale_gradients(self, step: int, factor: float, *, length: int = 1, rank: int | None = None) -> FaultInjector:
        """Multiply every gradient by ``factor`` in ``length`` attempts from ``step`` on."""
        return self.add(Fault("gradient-scale", step, factor=factor, length=length, rank=rank))

    def nonfinite(self, step: int, *, rank: int, value: str = "nan", length: int = 1) -> FaultInjector:
        """Put one "nan" or "inf" in the first element of one rank's gradients."""
        return self.add(Fault(value, step, rank=rank, length=length))

    def flip(
        self, step: int, *, rank: int, where: str = "gradient", bit: str = "top-exponent", length: int = 1
    ) -> FaultInjector:
        """Flip a bit of the largest element of one rank's gradients, parameters, or safe snapshot."""
        return self.add(Fault("bit-flip", step, rank=rank, length=length, where=where, bit=bit))

    def shuffle_labels(self, step: int, *, length: int = 1, rank: int | None = None) -> FaultInjector:
        """Permute the targets of every batch in ``length`` attempts from ``step`` on."""
        return self.add(Fault("shuffled-labels", step, length=length, rank=rank))

    def scale_learning_rate(
        self, step: int, factor: float, *, length: int = 1, rank: int | None = None
    ) -> FaultInjector:
        """Multiply every learning rate by ``factor`` in ``length`` attempts from ``step`` on."""
        return self.add(Fault("learning-rate", step, factor=factor, length=length, rank=rank))

    def fail(self, step: int, phase: str, *, rank: int | None = None, length: int = 1) -> FaultInjector:
        """Raise :class:`InjectedFault` in a phase."""
        return self.add(Fault("raise", step, phase, rank, length))

    def sleep(self, step: int, phase: str, seconds: float, *, rank: int | None = None) -> FaultInjector:
        """Do nothing for a while in a phase."""
        return self.add(Fault("sleep", step, phase, rank, seconds=seconds))

    def kill(self, step: int, phase: str, *, rank: int) -> FaultInjector:
        """SIGKILL this process in a phase."""
        return self.add(Fault("kill", step, phase, rank))

    def stop(self, step: int, phase: str, *, rank: int) -> FaultInjector:
        """SIGSTOP this process in a phase."""
        return self.add(Fault("stop", step, phase, rank))

    def exit(self, step: int, phase: str, *, rank: int, code: int = 1) -> FaultInjector:
        """Leave the process with ``os._exit(code)`` in a phase."""
        return self.add(Fault("exit", step, phase, rank, code=code))

    def attach(self, controller: Any) -> FaultInjector:
        """Act in the phases of this controller's steps, on the parameters and learning rates of its optimizers.

        Args:
            controller: A :class:`~dist_stability.StabilityController`; if it is to be attached itself, it must be
                already.
        """
        self._controller = controller
        controller.add_phase_listener(self._listen)
        return self.hook(*controller._optimizers)

    def hook(self, *optimizers: Optimizer) -> FaultInjector:
        """Let learning-rate faults act around every step of these optimizers, and nowhere else.

        The learning rate is put back to the bit when the step is over. Which attempt it is was said last by the
        attached controller or, in a plain loop, by :meth:`batch` or :meth:`gradients`. Hooking an optimizer again does
        nothing.
        """
        for optimizer in optimizers:
            if not any(optimizer is known for known in self._hooked):
                self._hooked.append(optimizer)
                self._hook(optimizer)
        return self

    def batch(self, step: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What any loop calls before the forward of each micro-batch, and trains on instead.

        Args:
            step: The attempt.
            batch: Inputs and targets; never written to. Targets change places among all positions of this batch: in
                the same way on every rank, and at every micro-batch of an attempt.
        """
        self._now = (step, "batch")
        for fault in self._due(step, "batch"):
            self._note(fault, step)
            inputs, targets = batch
            order = torch.randperm(targets.numel(), generator=torch.Generator().manual_seed(step))
            batch = inputs, targets.flatten()[order.to(targets.device)].view_as(targets)
        return batch

    def gradients(self, step: int, parameters: Iterable[nn.Parameter]) -> None:
        """What a plain loop calls between ``backward()`` (and unscaling) and the optimizer step."""
        self._now = (step, "gradients")
        self._fire(step, "gradients", list(parameters))

    def weights(self, step: int, parameters: Iterable[nn.Parameter]) -> None:
        """What a plain loop calls right after the optimizer step."""
        self._fire(step, "after step", list(parameters))

    def wrap_loss(self, loss_fn: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        """The loss function for the probe: the same values, with the faults of :data:`LOSS_PHASES`.

        They act only while the attached controller probes; "loss in forward" acts when the first module without
        children is about to run, inside the model's own forward.
        """

        def loss(model: Any, batch: Any) -> Tensor:
            step, phase = self._now
            if phase != "probe":
                return loss_fn(model, batch)
            self._fire(step, "loss before forward", [])
            inside = bool(self._due(step, "loss in forward"))
            leaves = [module for module in model.modules() if inside and not any(module.children())]
            hooks = [
                leaf.register_forward_pre_hook(lambda *_: self._fire(step, "loss in forward", [])) for leaf in leaves
            ]
            try:
                value = loss_fn(model, batch)
            finally:
                for hook in hooks:
                    hook.remove()
            self._fire(step, "loss after forward", [])
            return value

        return loss

    def _listen(self, step: int, phase: str) -> None:
        self._now = (step, phase)
        if self._due(step, phase):
            # Private on purpose: what a fault may reach is nothing that a user should.
            optimizers = self._controller._optimizers
            self._fire(step, phase, [p for o in optimizers for group in o.param_groups for p in group["params"]])

    def _hook(self, optimizer: Optimizer) -> None:
        rates = RateCut([optimizer])

        def before(*_: Any) -> None:
            nonlocal rates
            rates = RateCut([optimizer])  # a step that raised has put nothing back: its rollback did
            step = self._now[0]
            factor = 1.0
            for fault in self._due(step, "optimizer"):
                self._note(fault, step)
                factor *= fault.factor
            rates.apply(factor)

        optimizer.register_step_pre_hook(before)
        handle = optimizer.register_step_post_hook(lambda *_: rates.undo())
        # First of all: an attached controller closes its attempt in such a hook, and the rate must be the true one by
        # then. Optimizers, unlike modules, have no `prepend=True` for their hooks.
        hooks: Any = optimizer._optimizer_step_post_hooks  # an OrderedDict, typed as a dict
        hooks.move_to_end(handle.id, last=False)

    def _due(self, step: int, phase: str) -> list[Fault]:
        return [fault for fault in self.faults if fault.due(_rank(), step, phase)]

    def _note(self, fault: Fault, step: int) -> None:
        steps = self.fired.setdefault(fault, [])
        if step not in steps:
            steps.append(step)

    def _fire(self, step: int, phase: str, parameters: list[nn.Parameter]) -> None:
        for fault in self._due(step, phase):
            if step in self.fired.get(fault, ()):
                continue
            if fault.where == "snapshot" and self._controller is None:
                continue  # a plain loop has no snapshot to damage
            self._note(fault, step)
            self._act(fault, parameters)

    def _act(self, fault: Fault, parameters: list[nn.Parameter]) -> None:
        grads = [parallel.local(p.grad) for p in parameters if p.grad is not None]
        match fault.kind:
            case "gradient-scale":
                torch._foreach_mul_([grad for grad in grads if grad.numel()], fault.factor)
            case "nan" | "inf":
                first = next((grad for grad in grads if grad.numel()), None)
                if first is not None:
                    first[(0,) * first.dim()] = float(fault.kind)
            case "bit-flip" if fault.where == "gradient":
                flip_largest(grads, fault.bit)
            case "bit-flip" if fault.where == "parameter":
                flip_largest([parallel.local(p) for p in parameters], fault.bit)
            case "bit-flip":
                safe = self._controller._recovery.ring.safe
                safe.wait()  # or its digest might be made of the damaged bytes
                flip_largest(safe._views, fault.bit)
            case "raise":
                raise InjectedFault(f"injected on rank {_rank()}: {fault}")
            case "sleep":
                time.sleep(fault.seconds)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exit":
                os._exit(fault.code)


def flip_largest(tensors: Iterable[Tensor], bit: str) -> None:
    """Flip one bit of the finite element of largest magnitude (the first of equals), in place.

    Args:
        tensors: Local floating-point tensors; empty ones are passed over, and nothing happens if all are.
        bit: One of :data:`~.fault.BITS`.
    """
    best, found = -1.0, None
    for tensor in tensors:
        if tensor.dtype not in _LAYOUTS or not tensor.numel():
            continue
        size = torch.where(tensor.isfinite(), tensor.abs(), 0).to(torch.float64)
        index = int(size.argmax())
        if size.flatten()[index].item() > best:
            best, found = size.flatten()[index].item(), (tensor, index)
    if found is not None:
        tensor, index = found
        integer, width, mantissa = _LAYOUTS[tensor.dtype]
        places = dict(zip(BITS, (width - 1, width - 2, mantissa, mantissa - 1, 0), strict=True))
        mask = 1 << places[bit] if bit != "sign" else -(1 << (width - 1))
        at = torch.unravel_index(torch.tensor(index), tensor.shape)
        tensor.detach().view(integer)[at] ^= mask


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
