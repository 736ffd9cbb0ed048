"""Where each part of a slot belongs in the state of the whole model, so that another number of ranks can use it.

A slot holds what one rank keeps: shards, shares of what others hold as well, or whole tensors. The catalogue says of
each part its key (as ``torch.distributed.checkpoint.state_dict`` names it), the shape of the whole tensor, and the box
of it (offsets and sizes) that the part is. It is plain data and lies in the body of a seal.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import parallel
from .plan import StatePlan, bare
from .tree import Held, Ref


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a whole tensor that lies in one range of bytes.

    Attributes:
        key: Of the whole tensor: "model.<name>", "optimizer.state.<name>.<what>".
        dtype: Element type.
        shape: Of the whole tensor.
        offsets: Where the part begins in it.
        sizes: Of the part.
        strides: In elements, of the part as it lies in memory.
        start: Byte at which it begins in the data of the slot.
        owner: The rank that writes it where each part is written once: several may hold it.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    owner: int

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.sizes) * self.dtype.itemsize

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """The part in the data of a slot (uint8), as a tensor whose storage is exactly its own bytes.

        So that ``torch.save`` writes these and not the slot around them. It does not keep the slot's memory.
        """
        if not self.nbytes:
            return torch.empty(self.sizes, dtype=self.dtype)
        assert data.device.type == "cpu" and self.start + self.nbytes <= data.numel()
        memory = (ctypes.c_char * self.nbytes).from_address(data.data_ptr() + self.start)
        return torch.frombuffer(memory, dtype=self.dtype).as_strided(self.sizes, self.strides)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A part of a whole tensor that is to be read.

    Attributes:
        key: Of the whole tensor.
        shape: Of it.
        offsets: Of the part.
        target: Filled with it, in place: a plain tensor of the part's shape.
    """

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """What the local tensor of an entry is a part of.

    Attributes:
        path: ("model", name) or ("optimizer", "state", name of the parameter, what): what ``key`` is made of.
        shape: Of the whole tensor.
        offsets: Of the local tensor in it.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def key(self) -> str:
        """See :class:`Box`."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Catalogue:
    """What a rank has of the whole model.

    Attributes:
        places: One for each entry of the plan.
        boxes: Of what its slot holds.
        aliases: Other names of a parameter, by its name: weights that are tied have several.
        parameters: For each optimizer and each of its groups, the names of its parameters.
        modules: Name of each module of the model, in order, as buffers are kept by number.
        passing: Buffers that are not in a state dict: (number of the module, name).
        problem: Why there are no places and boxes; "" if there are.
    """

    places: tuple[Place, ...] = ()
    boxes: tuple[Box, ...] = ()
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    parameters: tuple[tuple[tuple[str, ...], ...], ...] = ()
    modules: tuple[str, ...] = ()
    passing: frozenset[tuple[int, str]] = frozenset()
    problem: str = ""

    def buffer(self, number: int, name: str) -> str:
        """The name of a buffer, as in the state dict of the bare model."""
        return bare(f"{self.modules[number]}.{name}" if self.modules[number] else name)

    @classmethod
    def of(
        cls, model: nn.Module, plan: StatePlan, held: Sequence[Sequence[Held]], starts: Sequence[int], first: int
    ) -> Catalogue:
        """Make it; enters no collective.

        Args:
            model: As the plan was built of it.
            plan: Of the slot.
            held: Of the slot.
            starts: Byte at which each piece of the plan begins in the slot.
            first: The first of the ranks that train together.
        """
        modules = tuple(name for name, _ in model.named_modules())
        passing = frozenset(
            (number, name) for number, each in enumerate(model.modules()) for name in each._non_persistent_buffers_set
        )
        problem = parallel.without_boxes(model, plan.optimizers)
        if problem:
            return cls(modules=modules, problem=problem)
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(bare(name))
        layouts: dict[int, parallel.Wrapping | None] = {}
        for ref in (ref for of_optimizer in held for each in of_optimizer for ref in _refs(each)):
            if not ref.plain:
                return cls(modules=modules, problem=f"{plan.name(ref.path)} is of a class of several tensors")
            layouts.setdefault(plan.places[ref.start], ref.layout)
        places = []
        for index, (entry, (_, handle, *rest)) in enumerate(zip(plan.entries, plan.paths, strict=True)):
            known = names.get(handle) if isinstance(handle, int) else None
            if known is None and rest:
                return cls(modules=modules, problem=f"{entry.name} belongs to no parameter of the model")
            layout = layouts[index]
            offsets = parallel.offsets(layout, entry.shape)
            if offsets is None:
                return cls(modules=modules, problem=f"{entry.name} is laid out so that a rank's part is no range of it")
            if known is None:  # a parameter that the optimizer has and the model has not
                path = ["other", entry.name]
            elif rest:
                path = ["optimizer", "state", known[0], *map(str, rest)]
            else:
                path = ["model", known[0]]
            places.append(Place(tuple(path), tuple(entry.shape if layout is None else layout.shape), offsets))
        shared = {index for members in plan.shared.values() for index in members}
        boxes: list[Box] = []
        for (index, begin, end), start in zip(plan.pieces, starts, strict=True):
            entry, place = plan.entries[index], places[index]
            owner = parallel.this_rank()
            if index not in shared:
                owner = first if layouts[index] is None else entry.residence.ranks[0]
            strides = _contiguous(entry.shape) if entry.stride is None else entry.stride
            if not math.prod(place.shape):
                boxes.append(Box(place.key, entry.dtype, place.shape, place.offsets, place.shape, strides, 0, first))
            for low, sizes, element in ranges(entry.shape, strides, begin, end):
                boxes.append(
                    Box(
                        place.key,
                        entry.dtype,
                        place.shape,
                        tuple(a + b for a, b in zip(place.offsets, low, strict=True)),
                        sizes,
                        strides,
                        start + (element - begin) * entry.dtype.itemsize,
                        owner,
                    )
                )
        aliases = {known[0]: tuple(known[1:]) for known in names.values() if len(known) > 1}
        parameters = tuple(
            tuple(
                tuple(names.get(id(handle), ["(not in the model)"])[0] for handle in group["params"])
                for group in optimizer.param_groups
            )
            for optimizer in plan.optimizers
        )
        return cls(tuple(places), tuple(boxes), aliases, parameters, modules, passing)


def ranges(
    shape: Sequence[int], strides: Sequence[int], begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """A range of a tensor's elements, in the order of its memory, as boxes: at most two for each dimension.

    Args:
        shape: Of the tensor.
        strides: In elements, of memory without gaps.
        begin: First element of the range.
        end: The one after its last.

    Yields:
        Offsets and sizes of a box, and its first element. Nothing if the range is empty.
    """
    dims = len(shape)
    order = sorted(range(dims), key=lambda dim: (strides[dim], shape[dim]), reverse=True)
    for low, sizes, first in _cut([shape[dim] for dim in order], begin, end):
        back_low, back_sizes = [0] * dims, [1] * dims
        for place, dim in enumerate(order):
            back_low[dim], back_sizes[dim] = low[place], sizes[place]
        yield tuple(back_low), tuple(back_sizes), first


def _cut(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[list[int], list[int], int]]:
    """The same for a contiguous tensor: the rest of a first row, whole rows, the beginning of a last one."""
    if begin >= end:
        return
    if not shape:
        yield [], [], begin
        return
    row = math.prod(shape[1:])
    top, bottom = -(-begin // row), end // row  # whole rows
    if top > bottom:  # within one row
        yield from _in_row(shape, bottom, begin, end)
        return
    yield from _in_row(shape, top - 1, begin, top * row)
    if top < bottom:
        yield [top, *([0] * (len(shape) - 1))], [bottom - top, *shape[1:]], top * row
    yield from _in_row(shape, bottom, bottom * row, end)


def _in_row(shape: Sequence[int], place: int, begin: int, end: int) -> Iterator[tuple[list[int], list[int], int]]:
    base = place * math.prod(shape[1:])
    for low, sizes, first in _cut(shape[1:], begin - base, end - base):
        yield [place, *low], [1, *sizes], first + base


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _refs(held: Held) -> Iterator[Ref]:
    def within(tree: Any) -> Iterator[Ref]:
        if isinstance(tree, Ref):
            yield tree
        elif isinstance(tree, dict):
            for item in tree.values():
                yield from within(item)
        elif isinstance(tree, list | tuple):
            for item in tree:
                yield from within(item)

    if held.parameter is not None:
        yield held.parameter
    if not held.empty:
        yield from within(held.state)
