"""The form of optimizer state as plain data, and the way back: empty state of that form in a process that has none.

A fresh process has parameters and no optimizer state. Once its optimizers hold tensors of the right form, an ordinary
plan of them lists the same entries in the same order as the plan of the process that ended, and an ordinary restore
fills them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from ... import parallel
from ..plan import StatePlan
from ..slot import Slot
from ..tree import Held, Ref, tuple_like
from .record import Unusable

Tree = tuple[int | None, Any, Any]  # position of the parameter, or None and the key; the state of it


@dataclass(frozen=True, slots=True)
class At:
    """The place of a tensor in a tree.

    Attributes:
        entry: Index of its entry; those that share one share their memory.
        placements: Of a DTensor, "" for a plain tensor.
        shape: Of a DTensor, the global one.
        stride: Of the same.
    """

    entry: int
    placements: str = ""
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


def facts(plan: StatePlan) -> dict[str, Any]:
    """What two plans have in common if they are of the same state on the same rank: plain data."""
    return {
        "tensor": [
            (e.name, str(e.dtype), tuple(e.shape), e.stride, e.device.type, e.residence.ranks) for e in plan.entries
        ],
        "share of this rank": [tuple(piece) for piece in plan.pieces],
    }


def pieces_in(form: dict[str, Any], starts: Sequence[int], data: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The pieces in the data of a slot whose plan is not here: the name of each one's entry, and a view of it.

    Args:
        form: From :func:`facts`, of that slot.
        starts: Where each piece begins, in bytes.
        data: Of that slot, uint8.
    """
    found = []
    for (entry, first, last), start in zip(form["share of this rank"], starts, strict=True):
        name, dtype, shape, stride, *_ = form["tensor"][entry]
        kind = getattr(torch, dtype.removeprefix("torch."))
        elements = data[start : start + (last - first) * kind.itemsize].view(kind)
        if last - first == math.prod(shape):
            elements = elements.view(shape) if stride is None else elements.as_strided(shape, stride)
        found.append((name, elements))
    return found


def differing(saved: dict[str, Any], plan: StatePlan) -> str | None:
    """The first fact in which a plan is not the one that was saved, in words."""
    now = facts(plan)
    for what, before in saved.items():
        if len(before) != len(now[what]):
            return f"has {len(before)} {what}s where there are {len(now[what])} now"
        for old, new in zip(before, now[what], strict=True):
            if old != new:
                return f"has the {what} {old} where there is {new} now"
    return None


def trees(slot: Slot) -> list[list[Tree]]:
    """The optimizer state of a filled slot, without the contents of its tensors.

    Raises:
        Unusable: A tensor of it cannot be made again by another process.
    """
    return [
        [_tree(slot.plan, place if held.parameter is not None else None, held) for place, held in enumerate(one)]
        for one in slot.held
    ]


def _tree(plan: StatePlan, place: int | None, held: Held) -> Tree:
    if place is None and isinstance(held.key, torch.Tensor):
        raise Unusable("state under a tensor that is no parameter cannot be made again by another process")
    return place, None if place is not None else held.key, None if held.empty else _marked(plan, held.state)


def _marked(plan: StatePlan, tree: Any) -> Any:
    if isinstance(tree, Ref):
        if not tree.plain:
            raise Unusable(f"{plan.name(tree.path)} is of a class that another process cannot make again")
        entry = plan.places[tree.start]
        if tree.layout is None:
            return At(entry)
        return At(entry, str(tree.layout.placements), tuple(tree.layout.shape), tuple(tree.layout.stride))
    if isinstance(tree, dict):
        return {key: _marked(plan, item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        items = [_marked(plan, item) for item in tree]
        return items if isinstance(tree, list) else tuple_like(tree, items)
    return tree


class Rebuilt:
    """Optimizer state of a saved form, in place of what the optimizers have; its contents are arbitrary.

    Args:
        optimizers: Of this process.
        saved: From :func:`trees`.
        form: From :func:`facts`, of the same slot.
    """

    def __init__(self, optimizers: Sequence[Optimizer], saved: list[list[Tree]], form: dict[str, Any]) -> None:
        """Make it, and remember what was there.

        Raises:
            Unusable: The optimizers have other parameters, or a tensor cannot be made; nothing has changed then.
        """
        self._states = [parallel.optimizer_state(optimizer) for optimizer in optimizers]
        self._before = [dict(states) for states in self._states]
        self._tensors: dict[int, torch.Tensor] = {}
        self._form = form["tensor"]
        if len(saved) != len(optimizers):
            raise Unusable(f"is of {len(saved)} optimizers, and there are {len(optimizers)}")
        made = []
        for number, (optimizer, of_optimizer) in enumerate(zip(optimizers, saved, strict=True)):
            parameters = [handle for group in optimizer.param_groups for handle in group["params"]]
            count = sum(place is not None for place, _, _ in of_optimizer)
            if count != len(parameters):
                raise Unusable(f"has {count} parameters in optimizer {number}, and there are {len(parameters)}")
            made.append(
                {
                    (parameters[place] if place is not None else key): self._make(
                        tree, parameters[place if place is not None else 0]
                    )
                    for place, key, tree in of_optimizer
                    if tree is not None
                }
            )
        for states, new in zip(self._states, made, strict=True):
            _replace(states, new)

    def undo(self) -> None:
        """Put back what was there before."""
        for states, before in zip(self._states, self._before, strict=True):
            _replace(states, before)

    def _make(self, tree: Any, parameter: torch.Tensor) -> Any:
        if isinstance(tree, At):
            return self._tensor(tree, parameter)
        if isinstance(tree, dict):
            return {key: self._make(item, parameter) for key, item in tree.items()}
        if isinstance(tree, list | tuple):
            items = [self._make(item, parameter) for item in tree]
            return items if isinstance(tree, list) else tuple_like(tree, items)
        return tree

    def _tensor(self, at: At, parameter: torch.Tensor) -> torch.Tensor:
        name, dtype, shape, stride, kind, _ = self._form[at.entry]
        home = parallel.local(parameter).device
        if kind not in ("cpu", home.type):
            raise Unusable(f"has {name} on a {kind} device, and its parameter is on {home}")
        if at.entry not in self._tensors:
            device = home if kind == home.type else torch.device(kind)
            # The name of a dtype is "torch.float32".
            kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype.removeprefix("torch.")), "device": device}
            empty: Callable[..., torch.Tensor] = torch.empty
            self._tensors[at.entry] = (
                empty(shape, **kwargs) if stride is None else torch.empty_strided(shape, stride, **kwargs)
            )
        local = self._tensors[at.entry]
        if not at.placements:
            return local
        layout = parallel.wrapping(parameter)
        if layout is None or str(layout.placements) != at.placements:
            found = "a plain tensor" if layout is None else str(layout.placements)
            raise Unusable(f"has {name} laid out as {at.placements}, and its parameter is {found}")
        return replace(layout, shape=torch.Size(at.shape), stride=at.stride).wrap(local)


def _replace(states: Any, new: dict[Any, Any]) -> None:
    for key in list(states):
        del states[key]
    for key, value in new.items():
        states[key] = value
