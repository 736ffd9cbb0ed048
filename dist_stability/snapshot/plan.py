"""What training state is: every tensor and value that an optimizer step may change, planned once.

Lifecycle. ``StatePlan.build`` walks the optimizers' parameters and states. Afterwards the plan holds no tensor of the
state and no address: ``image`` (and ``tensors``) look everything up in the optimizers each time. When state appears
or vanishes (Adam's moments at its first step), ``is_current`` is False and all ranks together make a new plan.

Each look-up is also the check: one pass over parameters and state, along the pass that made the plan. No device work,
no collective (what it takes: docs/performance.md).

A rank keeps its share of every entry that other ranks hold as well (:mod:`.share`), if the plan is made so: ``pieces``
are what it keeps. Without that, and of what nobody else holds, a piece is a whole entry.

Tensors that are the same memory (address, dtype, shape, strides) have one entry. Those that only overlap, as a view of
a part of another does, have one each: the shared bytes are kept twice, and since all copies are of one moment, a
restore writes the same bytes twice.

Entry contract: parameters are in their sharded state (``parallel.reshard``) whenever a plan is built or used.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .. import parallel
from ..errors import SnapshotError, StabilityError
from .copier import is_dense
from .digest import FixedSums, Sums, combine, select
from .retrace import Changed, Outline, Retrace
from .share import Piece, share
from .tree import Held, Ref, mark, walk_optimizers

# What wrappers put into the names of the modules they wrap.
_WRAPPERS = re.compile(r"^((_orig_mod|module)\.)+|\b(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One plain local tensor of the state.

    Attributes:
        name: For messages: the parameter's name, or "exp_avg of <name>".
        residence: The ranks that hold the same elements.
        dtype: Element type.
        shape: Shape of the local part; may have 0 elements.
        stride: Of the local part, in elements; None where its memory has gaps, so that it is not one range of elements.
        device: Where it lies.
    """

    name: str
    residence: parallel.Residence
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...] | None
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.shape.numel() * self.dtype.itemsize


class Digests(dict[tuple[int, ...], torch.Tensor]):
    """One digest for each set of ranks that hold the same state: 0-d int64, equal on all ranks of the set.

    Attributes:
        entries: The digests of the single entries, from which the others are made; they name a damaged one.
    """

    def __init__(self, classes: dict[tuple[int, ...], torch.Tensor], entries: torch.Tensor) -> None:
        """Keep both."""
        super().__init__(classes)
        self.entries = entries


@dataclass(frozen=True, slots=True)
class Image:
    """The live state of one moment: its tensors by reference, the rest as a copy.

    Attributes:
        tensors: One for each entry of the plan: plain local tensors that share the live storage. Some are parameters
            themselves: to be used under ``no_grad``, and detached by whoever keeps them (``param.data = other`` changes
            what a parameter stands for).
        held: For each optimizer, every parameter in order and then every other key that has state.
        devices: Of the tensors.
    """

    tensors: list[torch.Tensor]
    held: tuple[tuple[Held, ...], ...]
    devices: tuple[torch.device, ...]


class StatePlan:
    """The list of every tensor and value that is training state. Make one with :meth:`build`.

    Attributes:
        optimizers: The optimizers, in the caller's order.
        parameters: (name, handle, residence) of every parameter of the optimizers, in their order.
        entries: Every tensor of the state, once (tensors that share memory exactly have one entry).
        residences: The different sets of ranks among the entries, sorted.
        shared: By set of ranks, the entries of which each of them keeps a share. Not among them are entries that lie
            elsewhere than the first parameter (Adam's step counters on the CPU) and those with gaps in their memory:
            they are small, or rare, and kept whole.
        pieces: What this rank keeps.
        paths: Of each entry: (number of the optimizer, id of the parameter), and below it what its state is called.
        signature: 64-bit number, the same on every rank that trains the same model with the same optimizers. Made of
            parameters only: ranks whose shards are empty may have no state for them.
        nbytes: Bytes of all entries on this rank.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        parameters: Sequence[tuple[str, torch.Tensor, parallel.Residence]],
        state_residences: dict[int, parallel.Residence],
        signature: int,
        split: bool,
    ) -> None:
        """Use :meth:`build`."""
        self.optimizers = tuple(optimizers)
        self.parameters = tuple(parameters)
        self.signature = signature
        self._names = {id(handle): name for name, handle, _ in self.parameters}
        walk, self._walked = walk_optimizers(self.optimizers)
        self._outlines = [Outline.of(one, held) for one, held in zip(self.optimizers, self._walked, strict=True)]
        # Parts that are the same memory (tied weights, shared state) have one entry, that of the first of them.
        entry_of: dict[Any, int] = {}
        self.places: list[int] = []
        self._tied: list[tuple[int, int]] = []
        owners: list[int] = []
        for part, tensor in enumerate(walk.parts):
            place = entry_of.setdefault(_memory(tensor) if tensor.numel() else part, len(owners))
            if place == len(owners):
                owners.append(part)
            else:
                self._tied.append((owners[place], part))
            self.places.append(place)
        self._owners = tuple(owners)
        self.paths = tuple(walk.paths[part] for part in owners)
        self._devices = tuple(walk.parts[part].device for part in owners)
        self._sums: Sums | None = None
        homes = {id(handle): home for _, handle, home in self.parameters}
        # What is kept under a key that is no parameter may differ between ranks, for all we know.
        own = parallel.Residence((parallel.this_rank(),))
        self.entries = tuple(
            Entry(
                self.name(walk.paths[part]),
                (state_residences if len(walk.paths[part]) > 2 else homes).get(walk.paths[part][1], own),
                walk.parts[part].dtype,
                walk.parts[part].shape,
                walk.parts[part].stride() if is_dense(walk.parts[part]) else None,
                walk.parts[part].device,
            )
            for part in owners
        )
        self.shared = self._shared() if split else {}
        self._strides = [(i, self.entries[i].stride) for members in self.shared.values() for i in members]
        self.pieces = self._pieces()

    @classmethod
    def build(cls, model: nn.Module, optimizers: Sequence[Optimizer], world: int, *, split: bool = False) -> StatePlan:
        """Walk model and optimizers. Puts FSDP modules back to their sharded state; enters no collective.

        Handles come from the optimizers: what ``model.parameters()`` yields may be gathered copies.
        Parameters that no optimizer has are not state. An optimizer may have some parameters that the model lacks.

        Args:
            model: The model as the training loop holds it, wrappers included.
            optimizers: Its optimizers.
            world: Number of ranks of the job.
            split: Keep a share of what other ranks hold as well, instead of all of it.

        Raises:
            StabilityError: An optimizer has no parameter of the model, or two optimizers share one.
        """
        parallel.reshard(model)
        layout = parallel.Layout(model, world)
        known = {id(parameter): bare(name) for name, parameter in model.named_parameters()}
        parameters: list[tuple[str, torch.Tensor, parallel.Residence]] = []
        state_residences: dict[int, parallel.Residence] = {}
        facts: list[Any] = []
        seen: dict[int, int] = {}
        for number, optimizer in enumerate(optimizers):
            _check_owned(number, optimizer, known)
            for place, group in enumerate(optimizer.param_groups):
                for position, handle in enumerate(group["params"]):
                    name = known.get(id(handle), f"optimizer {number} group {place} parameter {position}")
                    if seen.setdefault(id(handle), number) != number:
                        raise StabilityError(
                            f"optimizers {seen[id(handle)]} and {number} both have the parameter {name}; "
                            "give each parameter to one optimizer"
                        )
                    parameters.append((name, handle, layout.residence(handle)))
                    state_residences[id(handle)] = layout.state_residence(handle, optimizer)
                    facts.append((number, place, name, str(handle.dtype), layout.shape(handle)))
        signature = int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=8).digest(), "big")
        return cls(optimizers, parameters, state_residences, signature, split)

    def is_current(self) -> bool:
        """Whether parameters, state keys, dtypes, shapes and layouts are still those of the plan.

        An empty state is no state. Costs what :meth:`look` costs.
        """
        return self.look() is not None

    def image(self) -> Image:
        """The live state now.

        Raises:
            SnapshotError: The plan is no longer current.
        """
        found = self.look()
        if found is None:
            raise SnapshotError(
                f"rank {parallel.this_rank()}: optimizer state appeared, vanished or changed its shape since the plan "
                "was made; all ranks have to make a new plan"
            )
        return found

    def tensors(self) -> list[torch.Tensor]:
        """The live local tensors, one for each entry, detached; see :meth:`image`."""
        return [tensor.detach() if tensor.requires_grad else tensor for tensor in self.image().tensors]

    @property
    def values(self) -> dict[str, Any]:
        """The optimizer state that is no tensor (step counters, None, strings), by name: copies."""
        return {
            self.name((number, mark(held.key), *path)): value
            for number, of_optimizer in enumerate(walk_optimizers(self.optimizers)[1])
            for held in of_optimizer
            if not held.empty
            for path, value in _values(held.state, ())
        }

    def name(self, path: tuple[Any, ...]) -> str:
        """What lies at a path of a walk, for messages: "weight", "exp_avg of weight", "step of state 'ema' ..."."""
        number, mark, *rest = path
        owner = self._names.get(mark, f"state {mark!r} of optimizer {number}")
        return f"{'.'.join(map(str, rest))} of {owner}" if rest else owner

    @torch.no_grad()
    def digests(self, tensors: Sequence[torch.Tensor] | FixedSums, into: Digests | None = None) -> Digests:
        """A digest for each set of ranks, over this rank's part of the entries that lie on exactly those ranks.

        Args:
            tensors: One for each entry: live ones from :meth:`image` or :meth:`tensors`, or their copies in a slot.
            into: What this gave earlier for tensors on the same device, to be overwritten: then nothing is allocated.

        Returns:
            On the tensors' device; no host sync, no collective.
        """
        out = None if into is None else into.entries
        single = tensors.now(out) if isinstance(tensors, FixedSums) else self._sums_of(tensors).of(tensors, out)
        everything = len(self.entries)
        found = Digests({}, single) if into is None else into
        for ranks, members in self._classes.items():
            chosen = single if len(members) == everything else select(single, members)
            found[ranks] = combine(chosen, self._sizes[ranks], found.get(ranks))
        return found

    def pieces_of(self, ranks: tuple[int, ...], rank: int) -> list[Piece]:
        """What one of the ranks that share entries keeps of them."""
        sizes = [entry.shape.numel() for entry in self.entries]
        return share(self.shared[ranks], sizes, self.itemsizes, ranks.index(rank), len(ranks))

    def cut(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's pieces of tensors of the plan's form: whole ones as they are, parts as flat views."""
        if not self.shared:
            return list(tensors)
        return [
            tensors[entry] if whole else flat(tensors[entry])[first:last]
            for (entry, first, last), whole in zip(self.pieces, self._whole, strict=True)
        ]

    def devices_of(self, image: Image) -> tuple[torch.device, ...]:
        """Where this rank's pieces of an image lie."""
        return tuple(image.devices[piece.entry] for piece in self.pieces) if self.shared else image.devices

    @cached_property
    def itemsizes(self) -> list[int]:
        """Bytes of one element of each entry."""
        return [entry.dtype.itemsize for entry in self.entries]

    @cached_property
    def bytes_kept(self) -> int:
        """Bytes of this rank's pieces."""
        return sum((last - first) * self.itemsizes[entry] for entry, first, last in self.pieces)

    @cached_property
    def residences(self) -> tuple[tuple[int, ...], ...]:
        """See the class."""
        return tuple(self._classes)

    @cached_property
    def nbytes(self) -> int:
        """See the class."""
        return sum(entry.nbytes for entry in self.entries)

    @cached_property
    def _sizes(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Bytes of the entries of each set of ranks."""
        return {ranks: tuple(self.entries[i].nbytes for i in members) for ranks, members in self._classes.items()}

    @cached_property
    def _classes(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        members: dict[tuple[int, ...], list[int]] = {}
        for index, entry in enumerate(self.entries):
            members.setdefault(entry.residence.ranks, []).append(index)
        return {ranks: tuple(members[ranks]) for ranks in sorted(members)}

    @cached_property
    def _whole(self) -> list[bool]:
        return [last - first == self.entries[entry].shape.numel() for entry, first, last in self.pieces]

    def _shared(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        home = parallel.local(self.parameters[0][1]).device.type
        found = {
            ranks: tuple(
                index
                for index in members
                if self.entries[index].device.type == home and self.entries[index].stride is not None
            )
            for ranks, members in self._classes.items()
            if len(ranks) > 1
        }
        return {ranks: members for ranks, members in found.items() if members}

    def _pieces(self) -> tuple[Piece, ...]:
        mine = {index for members in self.shared.values() for index in members}
        whole = [Piece(i, 0, entry.shape.numel()) for i, entry in enumerate(self.entries) if i not in mine]
        parts = [piece for ranks in self.shared for piece in self.pieces_of(ranks, parallel.this_rank())]
        return tuple(sorted([*whole, *parts]))

    def look(self) -> Image | None:
        """The live state now; None if it has another form than the plan."""
        retrace = Retrace()
        try:
            held = retrace.optimizers(self.optimizers, self._walked, self._outlines)
        except Changed:
            return None
        parts = retrace.parts
        if self._tied:
            # Parts that shared an entry must share memory still, or one of them would be left out.
            if any(_memory(parts[first]) != _memory(parts[second]) for first, second in self._tied):
                return None
            parts = [parts[owner] for owner in self._owners]
        if not retrace.outlined:  # of the same form, but with other strides, say, or in another order
            self._devices = tuple(tensor.device for tensor in parts)
            self._outlines = [
                outline and Outline.of(one, of_optimizer)
                for outline, one, of_optimizer in zip(self._outlines, self.optimizers, held, strict=True)
            ]
        # Ranks cut what they share in the order of its memory.
        if any(parts[index].stride() != stride for index, stride in self._strides):
            return None
        return Image(parts, held, self._devices)

    def _sums_of(self, tensors: Sequence[torch.Tensor]) -> Sums:
        """How tensors of the entries' forms on these devices are added up."""
        if self._sums is None or self._sums.devices != tuple(tensor.device for tensor in tensors):
            self._sums = Sums(tensors)
        return self._sums


def bare(name: str) -> str:
    """The name of a parameter or buffer without what wrappers put into it: the same under every kind of parallelism."""
    return _WRAPPERS.sub("", name)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor without gaps, in the order of its memory: a view."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _values(tree: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield from _values(item, (*path, key))
    elif isinstance(tree, list | tuple):
        for index, item in enumerate(tree):
            yield from _values(item, (*path, index))
    elif not isinstance(tree, Ref):
        yield path, tree


def _check_owned(number: int, optimizer: Optimizer, known: dict[int, str]) -> None:
    handles = [handle for group in optimizer.param_groups for handle in group["params"]]
    if not any(id(handle) in known for handle in handles):
        raise StabilityError(
            f"optimizer {number} ({type(optimizer).__name__}) has none of the model's parameters; probably the model "
            "was wrapped after the optimizer was made (FSDP2's fully_shard, tensor parallelism and FSDP1 without "
            "use_orig_params replace parameters): make the optimizer after wrapping"
        )
