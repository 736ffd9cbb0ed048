"""Optimizer state as a tree: its tensors in a fixed order, and the rest as a copy that can be laid over live state.

``optimizer.state`` maps parameters (and, for some optimizers, other keys) to dicts whose values are tensors, numbers,
None, strings, or containers of them. :class:`Walk` takes such a tree apart; :class:`Overlay` puts a copy back into the
live tree, changing as little as it can: tensors and containers that are still there stay the same objects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import parallel
from ..errors import SnapshotError

IMMUTABLE = (int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device)
PLAIN = (torch.Tensor, torch.nn.Parameter)
MISSING = object()


@dataclass(frozen=True, slots=True)
class Ref:
    """The place of a tensor in a copied tree.

    Attributes:
        start: Number of its first plain part among all parts of the walk.
        count: Number of plain parts: 1, or more for a wrapper subclass (an 8-bit state has codes and scales).
        path: Where it is, for messages.
        layout: How to make a DTensor around a part; None for a plain tensor.
        device: Where its first part lies.
        plain: It can be made again from its one part.
        dtype: Of the tensor as the optimizer has it.
        shape: Of the same; a DTensor's is the global one.
        forms: Dtype and shape of each part; empty for a tensor of torch's own classes, which is its own part.
    """

    start: int
    count: int
    path: tuple[Any, ...]
    layout: parallel.Wrapping | None
    device: torch.device
    plain: bool
    dtype: torch.dtype
    shape: torch.Size
    forms: tuple[tuple[torch.dtype, torch.Size], ...]


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain local tensors that make up a tensor: itself, its shard, or what a wrapper subclass holds."""
    shard = parallel.local(tensor)
    if not is_traceable_wrapper_subclass(shard):
        return [shard]
    names, _ = shard.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in parts(getattr(shard, name))]


def tuple_like(model: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    """A tuple, or a named tuple of the same class."""
    return type(model)(*items) if hasattr(model, "_fields") else tuple(items)


class Walk:
    """Takes trees apart, one after the other.

    Attributes:
        parts: The plain local tensors of all trees so far, in order.
        paths: Where each part is.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.parts: list[torch.Tensor] = []
        self.paths: list[tuple[Any, ...]] = []

    def take(self, value: Any, path: tuple[Any, ...] = ()) -> Any:
        """Copy a tree, with a :class:`Ref` in place of each tensor. Values that can change are deep copies."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, dict):
            return {key: self.take(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [self.take(item, (*path, index)) for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple_like(value, items)
        return value if isinstance(value, IMMUTABLE) else copy.deepcopy(value)

    def _tensor(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> Ref:
        layout = None
        forms: tuple[tuple[torch.dtype, torch.Size], ...] = ()
        if type(tensor) in PLAIN:  # nearly all of them: spare the questions
            found, plain = [tensor.detach()], True
        else:
            layout = parallel.wrapping(tensor)
            shard = parallel.local(tensor)
            plain = not is_traceable_wrapper_subclass(shard)
            found = [shard] if plain else parts(shard)
            forms = tuple((part.dtype, part.shape) for part in found)
        self.paths.extend([path] if plain else [(*path, index) for index in range(len(found))])
        self.parts.extend(found)
        start = len(self.parts) - len(found)
        return Ref(start, len(found), path, layout, found[0].device, plain, tensor.dtype, tensor.shape, forms)


class Held(NamedTuple):
    """What belongs to one key of ``optimizer.state``.

    Attributes:
        key: The parameter, or a key that is none.
        parameter: The place of the parameter itself; None if the key is none.
        state: A copy of its state, with places for tensors (see :class:`Walk`).
        empty: There is no state: an empty dict is what looking into ``optimizer.state`` leaves behind.
    """

    key: Any
    parameter: Ref | None
    state: Any
    empty: bool


def walk_optimizers(optimizers: Sequence[Optimizer]) -> tuple[Walk, tuple[tuple[Held, ...], ...]]:
    """Every parameter, each followed by its state, then the state under other keys; one optimizer after the other."""
    walk = Walk()
    everything = []
    for number, optimizer in enumerate(optimizers):
        of_optimizer = []
        members = set()
        states = parallel.optimizer_state(optimizer)
        for group in optimizer.param_groups:
            for handle in group["params"]:
                members.add(id(handle))
                place = walk.take(handle, (number, id(handle)))
                # Not states[handle]: it is a defaultdict, and looking would make an entry.
                state = states.get(handle)
                tree = walk.take(state, (number, id(handle))) if state else None
                of_optimizer.append(Held(handle, place, tree, not state))
        for key, state in states.items():
            if id(key) not in members and not (isinstance(state, dict) and not state):
                of_optimizer.append(Held(key, None, walk.take(state, (number, mark(key))), False))
        everything.append(tuple(of_optimizer))
    return walk, tuple(everything)


def mark(key: Any) -> Any:
    """What stands for a key of ``optimizer.state`` in a path: comparing tensors would compare their elements."""
    return id(key) if isinstance(key, torch.Tensor) else key


class Overlay:
    """Lays a copied tree over a live one.

    Containers are changed at once; tensor contents are only noted, as pairs in ``copies``.
    """

    def __init__(self, saved: Callable[[int], torch.Tensor], name: Callable[[tuple[Any, ...]], str]) -> None:
        """Nothing laid yet.

        Args:
            saved: The copy of a part, by its number in the walk that made the tree.
            name: Names what lies at a path, for messages.
        """
        self._saved = saved
        self._name = name
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def check(self, live: Any, copied: Any) -> None:
        """Raise SnapshotError if ``lay`` could not succeed. Changes nothing."""
        if isinstance(copied, Ref):
            if not copied.plain and not self.matches(live, copied):
                raise SnapshotError(
                    f"rank {parallel.this_rank()}: {self._name(copied.path)} is no longer there, or has another form, "
                    "and a tensor of its class cannot be made again"
                )
        elif isinstance(copied, dict):
            for key, item in copied.items():
                self.check(live.get(key, MISSING) if isinstance(live, dict) else MISSING, item)
        elif isinstance(copied, list | tuple):
            same = isinstance(live, list | tuple) and len(live) == len(copied)
            for index, item in enumerate(copied):
                self.check(live[index] if same else MISSING, item)

    def matches(self, live: Any, ref: Ref) -> bool:
        """Whether ``live`` is a tensor of the copied one's form, so that the copy can be written into it."""
        return self._matching(live, ref) is not None

    def lay(self, live: Any, copied: Any) -> Any:
        """The value that belongs where ``live`` was: ``live`` itself, changed in place, wherever that is possible."""
        if isinstance(copied, Ref):
            return self._tensor(live, copied)
        if isinstance(copied, dict):
            return self._dict(live if isinstance(live, dict) else {}, copied)
        if isinstance(copied, list):
            if not isinstance(live, list) or len(live) != len(copied):
                return [self.lay(MISSING, item) for item in copied]
            live[:] = [self.lay(old, item) for old, item in zip(live, copied, strict=True)]
            return live
        if isinstance(copied, tuple):
            same = isinstance(live, tuple) and len(live) == len(copied)
            return tuple_like(copied, [self.lay(live[i] if same else MISSING, x) for i, x in enumerate(copied)])
        return copied if isinstance(copied, IMMUTABLE) else copy.deepcopy(copied)

    def _dict(self, live: dict[Any, Any], copied: dict[Any, Any]) -> dict[Any, Any]:
        for key in [key for key in live if key not in copied]:
            del live[key]
        for key, item in copied.items():
            old = live.get(key, MISSING)
            new = self.lay(old, item)
            if new is not old:
                live[key] = new
        return live

    def _tensor(self, live: Any, ref: Ref) -> torch.Tensor:
        found = self._matching(live, ref)
        if found is not None:
            self.copies.extend((part, self._saved(ref.start + index)) for index, part in enumerate(found))
            return live
        fresh = torch.empty_like(self._saved(ref.start), device=ref.device)
        self.copies.append((fresh, self._saved(ref.start)))
        return fresh if ref.layout is None else ref.layout.wrap(fresh)

    def _matching(self, live: Any, ref: Ref) -> list[torch.Tensor] | None:
        """The parts of a live tensor that has the form of the copied one, or None."""
        if not isinstance(live, torch.Tensor) or parallel.wrapping(live) != ref.layout:
            return None
        found = parts(live)
        saved = [self._saved(ref.start + index) for index in range(ref.count)]
        same = len(found) == ref.count and all(
            part.shape == kept.shape and part.dtype == kept.dtype for part, kept in zip(found, saved, strict=True)
        )
        return found if same else None
