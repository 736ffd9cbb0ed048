"""Takes optimizer state apart once more, along an earlier walk: the check of a plan and its look-up in one pass."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer

from .. import parallel
from .tree import IMMUTABLE, MISSING, PLAIN, Held, Ref, mark, parts, tuple_like

TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
"""What torch.compile looks at its inputs with: one call for many tensors, in C++. Without it everything is walked."""

_parameters = operator.itemgetter("params")


class Changed(Exception):
    """A tree no longer has the form it was walked in."""


@dataclass(frozen=True, slots=True)
class Outline:
    """One optimizer as it was walked, laid flat: enough to see in a few loops of C that only contents have changed.

    There is one only where every parameter and every value of every state is a plain tensor or a DTensor of one, in
    dictionaries whose keys are strings. It holds the parameters, and no tensor of the state. Lists "of all tensors"
    have the parameters first, then the values of the states.

    Attributes:
        handles: The parameters.
        owners: The parameters that have a state, in the order of the states.
        lengths: How many values each state has.
        keys: Of all states, one after the other.
        wrapped: Which of all tensors are DTensors.
        layouts: Of those.
        guards: Class, dtype, device, shape and strides of all tensors and then of the DTensors' shards.
        order: For each part of the walk, its number among those.
    """

    handles: list[torch.Tensor]
    owners: list[torch.Tensor]
    lengths: list[int]
    keys: list[str]
    wrapped: list[int]
    layouts: list[Any]
    guards: Any
    order: list[int]

    @classmethod
    def of(cls, optimizer: Optimizer, held: Sequence[Held]) -> Outline | None:
        """Of what was just walked; None if there is none."""
        states = parallel.optimizer_state(optimizer)
        trees = {id(each.key): each.state for each in held if not each.empty}
        parameters = [each.parameter for each in held if each.parameter is not None]
        if TensorGuards is None or len(parameters) < len(held) or [id(key) for key in states if id(key) not in trees]:
            return None  # state under other keys, or an empty one
        if not all(type(state) is dict and all(type(key) is str for key in state) for state in states.values()):
            return None
        handles = [each.key for each in held]
        places = [*parameters, *(place for key in states for place in trees[id(key)].values())]
        if not all(type(place) is Ref and (not place.forms or (place.layout and place.plain)) for place in places):
            return None
        everything = [*handles, *chain.from_iterable(state.values() for state in states.values())]
        wrapped = [index for index, place in enumerate(places) if place.layout is not None]
        found = parallel.shards([everything[index] for index in wrapped])
        if found is None:
            return None
        shards, layouts = found
        number = {index: len(places) + at for at, index in enumerate(wrapped)}
        outline = cls(
            handles,
            list(states),
            list(map(len, states.values())),
            list(chain.from_iterable(states.values())),
            wrapped,
            layouts,
            TensorGuards(*everything, *shards, dynamic_dims_sizes=None, dynamic_dims_strides=None),
            [number.get(index, index) for index in sorted(range(len(places)), key=lambda index: places[index].start)],
        )
        return None if outline.tensors(optimizer) is None else outline  # the same tensor twice never fits

    @torch.no_grad()
    def tensors(self, optimizer: Optimizer) -> list[torch.Tensor] | None:
        """The live tensors in the order of the walk. None: something may have changed, which a walk has to find out."""
        handles = list(chain.from_iterable(map(_parameters, optimizer.param_groups)))
        states = parallel.optimizer_state(optimizer)
        # By identity: comparing tensors would compare their elements.
        if len(handles) != len(self.handles) or not all(map(operator.is_, handles, self.handles)):
            return None
        if len(states) != len(self.owners) or not all(map(operator.is_, states, self.owners)):
            return None
        values = list(states.values())
        if set(map(type, values)) - {dict} or list(map(len, values)) != self.lengths:
            return None
        if list(chain.from_iterable(values)) != self.keys:
            return None
        everything = [*handles, *chain.from_iterable(map(dict.values, values))]
        if self.wrapped:
            found = parallel.shards([everything[index] for index in self.wrapped])
            if found is None or found[1] != self.layouts:
                return None
            everything += found[0]
        return list(map(everything.__getitem__, self.order)) if self.guards.check(*everything) else None


class Retrace:
    """Walks trees along what an earlier :class:`Walk` made of them.

    Checked are keys, lengths, the dtype and shape of every tensor and of its parts, its class (a gathered parameter is
    no shard) and a DTensor's layout. What has not changed is not copied again. Where there is an :class:`Outline` that
    still fits, this takes 0.1 microseconds for each tensor while it is in the cache, elsewhere 0.6.

    Attributes:
        parts: As in the earlier walk, of this moment; but plain tensors are not detached.
        outlined: All outlines were there and fit: devices are those of the earlier walk, too.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.parts: list[torch.Tensor] = []
        self.outlined = True

    def optimizers(
        self,
        optimizers: Sequence[Optimizer],
        before: Sequence[tuple[Held, ...]],
        outlines: Sequence[Outline | None],
    ) -> tuple[tuple[Held, ...], ...]:
        """What :func:`walk_optimizers` would give now.

        Args:
            optimizers: The optimizers.
            before: What it gave.
            outlines: Of each optimizer, of that moment.

        Raises:
            Changed: Parameters, state or their forms are not those of ``before``.
        """
        everything = []
        for optimizer, held, outline in zip(optimizers, before, outlines, strict=True):
            found = None if outline is None else outline.tensors(optimizer)
            if found is None:
                self.outlined = False
                held = self._optimizer(optimizer, held)
            else:
                self.parts += found
            everything.append(held)
        return tuple(everything)

    def follow(self, live: Any, copied: Any) -> Any:
        """The copy of a tree now; ``copied`` itself if nothing but contents of tensors can differ.

        Raises:
            Changed: It has another form than at the copy.
        """
        if type(copied) is Ref:
            return self._tensor(live, copied)
        if isinstance(copied, dict):
            if not isinstance(live, dict) or len(live) != len(copied):
                raise Changed
            items = [
                self._tensor(live.get(key), item) if type(item) is Ref else self.follow(live.get(key, MISSING), item)
                for key, item in copied.items()
            ]
            same = all(map(operator.is_, items, copied.values()))
            return copied if same else dict(zip(copied, items, strict=True))
        if isinstance(copied, list | tuple):
            if not isinstance(live, list | tuple) or len(live) != len(copied):
                raise Changed
            items = [self.follow(now, item) for now, item in zip(live, copied, strict=True)]
            return items if isinstance(live, list) else tuple_like(live, items)
        if live is MISSING or isinstance(live, torch.Tensor | dict | list | tuple):
            raise Changed
        return live if isinstance(live, IMMUTABLE) else copy.deepcopy(live)

    def _optimizer(self, optimizer: Optimizer, before: tuple[Held, ...]) -> tuple[Held, ...]:
        states = parallel.optimizer_state(optimizer)
        handles = [handle for group in optimizer.param_groups for handle in group["params"]]
        found = []
        known = 0
        for handle, held in zip(handles, before, strict=False):
            if handle is not held.key or held.parameter is None:
                raise Changed
            place = self._tensor(handle, held.parameter)
            # Not states[handle]: it is a defaultdict, and looking would make an entry.
            state = states.get(handle)
            known += state is not None
            if bool(state) == held.empty:
                raise Changed
            tree = None if held.empty else self.follow(state, held.state)
            same = place is held.parameter and tree is held.state
            found.append(held if same else Held(handle, place, tree, held.empty))
        others = before[len(handles) :]
        if len(handles) > len(before) or any(held.parameter is not None for held in others):
            raise Changed
        if others or len(states) > known:
            found += self._others(states, {id(handle) for handle in handles}, others)
        return tuple(found)

    def _others(self, states: Mapping[Any, Any], members: set[int], before: Sequence[Held]) -> list[Held]:
        """State under keys that are no parameters."""
        live = [(k, s) for k, s in states.items() if id(k) not in members and not (isinstance(s, dict) and not s)]
        if [mark(key) for key, _ in live] != [mark(held.key) for held in before]:
            raise Changed
        return [
            Held(key, None, self.follow(state, held.state), False)
            for (key, state), held in zip(live, before, strict=True)
        ]

    def _tensor(self, live: Any, ref: Ref) -> Ref:
        if type(live) in PLAIN:
            if ref.forms or live.dtype is not ref.dtype or live.shape != ref.shape:
                raise Changed
            self.parts.append(live)
            return ref if live.device == ref.device else replace(ref, device=live.device)
        if not isinstance(live, torch.Tensor) or live.dtype is not ref.dtype or live.shape != ref.shape:
            raise Changed
        if not parallel.is_wrapped_as(live, ref.layout):
            raise Changed
        found = parts(live)
        if tuple((part.dtype, part.shape) for part in found) != ref.forms:
            raise Changed
        self.parts.extend(found)
        return ref if found[0].device == ref.device else replace(ref, device=found[0].device)
