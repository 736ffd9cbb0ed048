"""The golden-twin oracle: is a recovered run bit for bit the run that never saw the bad batches?

The golden twin of a guarded run is the same loop without any controller, which fetches each batch that the guarded run
refused (or took back later) and drops it before the forward. Both must end in the same state: not close, equal.

Use it in a test-suite of your own, on every rank of a job::

    def run(skip, guarded):
        model, optimizer, scheduler = build()  # the same seeds every time
        controller = make_controller(model, optimizer) if guarded else None
        verdicts = []
        for attempt, batch in enumerate(loader()):
            if attempt in skip:
                continue
            loss_fn(model, batch).backward()
            if controller is not None:
                injector.gradients(attempt, model.parameters())
                verdicts.append(controller.step())
            else:
                optimizer.step()
            optimizer.zero_grad()
            if controller is None or verdicts[-1].accepted:
                scheduler.step()
        return Outcome(capture_state(model, optimizer, {"scheduler": scheduler}), verdicts)

    assert_golden_twin(run, refused={5})

The oracle shares nothing with the snapshot code it judges, except how a local shard is found.
"""

from __future__ import annotations

import pickle
import random
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_stability import parallel
from dist_stability.verdict import Verdict


@dataclass(frozen=True)
class StateImage:
    """Every bit of one rank's training state, by name. Picklable, on the CPU, detached from the run.

    Attributes:
        entries: Tensors (copies) and the leaves of everything else, by a name that says where they come from.
    """

    entries: Mapping[str, Any]

    def without(self, *prefixes: str) -> StateImage:
        """The image less the entries whose name starts with one of ``prefixes``."""
        return StateImage({name: value for name, value in self.entries.items() if not name.startswith(prefixes)})


@dataclass(frozen=True)
class Outcome:
    """What one run of :func:`assert_golden_twin` hands back.

    Attributes:
        image: The state it ended in, from :func:`capture_state`.
        verdicts: The verdicts of all attempts, in order; empty without a controller.
    """

    image: StateImage
    verdicts: Sequence[Verdict] = field(default=())

    @property
    def refused(self) -> frozenset[int]:
        """Attempts that were vetoed or rolled back."""
        return frozenset(verdict.step for verdict in self.verdicts if verdict.action.refused)

    @property
    def dropped(self) -> frozenset[int]:
        """Attempts that left no trace: refused, or accepted and taken back later."""
        return self.refused.union(*(verdict.undone for verdict in self.verdicts))


class NotTheTwin(AssertionError):
    """The guarded run and its golden twin differ, or not the expected attempts were refused; raised on every rank."""


def capture_state(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    extra_state: Mapping[str, Any] | None = None,
    scaler: Any = None,
) -> StateImage:
    """Copy every bit of this rank's training state.

    That is: parameters (local shards; FSDP modules are put back to their sharded state first), all buffers including
    non-persistent ones, train/eval flags, optimizer state and per-group values, the random number generators of python,
    numpy, torch and every device in use, the ``state_dict()`` of the scaler and of each object in ``extra_state``.
    Gradients are not state. Needs no controller, enters no collective.

    Args:
        model: The model as it is trained, wrappers included.
        optimizers: Its optimizer or optimizers.
        extra_state: Further objects with a ``state_dict``, by name.
        scaler: The GradScaler, if one is used.
    """
    parallel.reshard(model)
    entries: dict[str, Any] = {}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
        _flatten(f"parameter {name}", parameter, entries)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        _flatten(f"buffer {name}", buffer, entries)
    for name, module in model.named_modules():
        entries[f"training {name}"] = module.training
    for index, optimizer in enumerate([optimizers] if isinstance(optimizers, Optimizer) else optimizers):
        for number, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key != "params":
                    _flatten(f"optimizer {index} group {number} {key}", value, entries)
            for place, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), f"group {number} parameter {place}")
                if id(parameter) not in names:  # not a registered parameter of the model: known by its place only
                    _flatten(f"optimizer {index} {name}", parameter, entries)
                _flatten(f"optimizer {index} state {name}", optimizer.state.get(parameter, {}), entries)
    for name, stateful in (extra_state or {}).items():
        _flatten(f"extra {name}", stateful.state_dict(), entries)
    if scaler is not None:
        _flatten("scaler", scaler.state_dict(), entries)
    entries.update(_random_states())
    return StateImage(entries)


def compare(a: StateImage, b: StateImage) -> list[str]:
    """Name every entry that differs, bit by bit; an empty list means equal.

    NaN equals NaN of the same bits, -0.0 differs from 0.0; a different dtype, shape or type, or an entry that only one
    image has, is a difference.
    """
    said = [f"{name}: only in the first" for name in a.entries if name not in b.entries]
    said += [f"{name}: only in the second" for name in b.entries if name not in a.entries]
    for name, first in a.entries.items():
        if name in b.entries:
            difference = _difference(first, b.entries[name])
            if difference:
                said.append(f"{name}: {difference}")
    return said


def assert_golden_twin(
    run: Callable[[frozenset[int], bool], Outcome],
    *,
    refused: Iterable[int] | None = None,
    undone: Iterable[int] = (),
) -> Outcome:
    """Run guarded, then run the twin without the dropped batches, and compare every bit on every rank.

    Args:
        run: ``run(skip, guarded)`` builds everything anew from fixed seeds and trains to the end. Called first with
            ``(frozenset(), True)``, then with ``(dropped attempts, False)``: then it must use no controller, inject
            nothing, and fetch the batches of the attempts in ``skip`` but drop them before the forward.
        refused: The attempts that must be refused; by default any, but at least one, lest the test prove nothing.
        undone: The further attempts that must have been taken back (ignored if ``refused`` is None).

    Returns:
        The guarded run's outcome.

    Raises:
        NotTheTwin: On every rank, if on any rank another set of attempts was refused or a bit differs; the message
            names rank and entries.

    Collectives: those of the two runs and, in a distributed job, two ``all_gather_object``.
    """
    guarded = run(frozenset(), True)
    dropped = guarded.dropped
    said = []
    if refused is None and not dropped:
        said.append("nothing was refused, so there is nothing to compare")
    if refused is not None and guarded.refused != frozenset(refused):
        said.append(f"refused attempts {sorted(guarded.refused)} instead of {sorted(refused)}")
    if refused is not None and dropped - guarded.refused != frozenset(undone):
        said.append(f"took back attempts {sorted(dropped - guarded.refused)} instead of {sorted(undone)}")
    # Before the twin: its ranks would not meet in the same collectives if they dropped different batches.
    everyone = _gather(sorted(dropped))
    if any(other != everyone[0] for other in everyone):
        raise NotTheTwin(f"the ranks dropped different attempts: {dict(enumerate(everyone))}")
    said += compare(guarded.image, run(dropped, False).image)
    lines = [f"rank {rank}: {line}" for rank, found in enumerate(_gather(said)) for line in found]
    if lines:
        shown = "\n  ".join(lines[:20] + ([f"... and {len(lines) - 20} more"] if len(lines) > 20 else []))
        raise NotTheTwin(f"the guarded run is not its golden twin (dropped {sorted(dropped)}):\n  {shown}")
    return guarded


def _flatten(name: str, value: Any, entries: dict[str, Any]) -> None:
    """Put the leaves of nested containers under names of their own; tensors as detached copies of the local shard."""
    if isinstance(value, Tensor):
        entries[name] = parallel.local(value).detach().cpu().clone()
    elif isinstance(value, Mapping):
        for key in value:
            _flatten(f"{name} {key}", value[key], entries)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _flatten(f"{name} {index}", item, entries)
    else:
        entries[name] = value if isinstance(value, bool | int | float | str | type(None)) else pickle.dumps(value)


def _random_states() -> Iterator[tuple[str, Any]]:
    yield "random python", pickle.dumps(random.getstate())
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        yield "random numpy", pickle.dumps((kind, keys.tolist(), *rest))
    yield "random torch", torch.get_rng_state()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        device = torch.get_device_module(accelerator)
        if getattr(device, "is_initialized", lambda: False)():
            for index in range(device.device_count()):
                yield f"random {accelerator.type} {index}", device.get_rng_state(index)


def _difference(a: Any, b: Any) -> str:
    """What differs between two leaves, or an empty string."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        if type(a) is not type(b):
            return f"{_show(a)} != {_show(b)}"
        equal = struct.pack("d", a) == struct.pack("d", b) if isinstance(a, float) else a == b
        return "" if equal else f"{_show(a)} != {_show(b)}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {tuple(a.shape)} != {b.dtype} {tuple(b.shape)}"
    if not a.numel():
        return ""
    left, right = (t.contiguous().reshape(-1).view(torch.uint8).reshape(t.numel(), -1) for t in (a, b))
    wrong = (left != right).any(dim=1).nonzero().flatten()
    if not wrong.numel():
        return ""
    first = int(wrong[0])
    values = f"{a.flatten()[first].item()!r} != {b.flatten()[first].item()!r}"
    return f"{wrong.numel()} of {a.numel()} elements differ, first at {first}: {values}"


def _show(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} pickled bytes"
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _gather(mine: Any) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
