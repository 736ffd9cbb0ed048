"""Vectors that are laid out like the parameters: one plain local tensor for each, spread over the ranks as they are.

Inner products are sums over all ranks in which each local tensor is weighed by one over its number of copies: what is
replicated (DDP, HSDP, tensor parallelism) counts once, empty shards count as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import parallel
from ..errors import StabilityError
from ..signals.gradients import local_gradient
from ..snapshot.plan import StatePlan

Vector = list[Tensor]
"""One plain tensor for each parameter, of the shape of its local part. Complex parameters count as pairs."""


class ShardSpace:
    """The space of a model's parameters, as its optimizers have them.

    Attributes:
        optimizers: As given.
        names: Of the parameters.
        handles: The parameters themselves.
        weights: One over the number of ranks that hold each parameter's elements.
        device: Where sums are made: an accelerator if any parameter is on one, else the CPU.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> None:
        """Walk model and optimizers. Puts FSDP modules back to their sharded state; enters no collective.

        Args:
            model: As the loop calls it, wrappers included.
            optimizer: One or several.

        Raises:
            StabilityError: See :meth:`StatePlan.build`; or there is no parameter.
        """
        self.optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        world = ranks()
        plan = StatePlan.build(model, self.optimizers, world)
        layout = parallel.Layout(model, world)
        self._shapes = {name: layout.shape(handle) for name, handle, _ in plan.parameters}
        self.names = [name for name, _, _ in plan.parameters]
        self.handles = [handle for _, handle, _ in plan.parameters]
        if not self.handles:
            raise StabilityError(f"rank {parallel.this_rank()}: the optimizer has no parameters")
        self.weights = [1.0 / residence.replicas for _, _, residence in plan.parameters]
        self._owners = [residence.ranks[0] for _, _, residence in plan.parameters]
        places = [parallel.local(handle).device for handle in self.handles]
        self.device = next((place for place in places if place.type != "cpu"), torch.device("cpu"))
        self._shares = torch.tensor(self.weights, dtype=torch.float64, device=self.device)

    def live(self) -> Vector:
        """The parameters themselves: writing into these tensors writes into the model. Sharded state is a must."""
        return [_real(parallel.local(handle)) for handle in self.handles]

    def gradient(self) -> Vector:
        """A copy of the gradients, 0 where there is none. Collectives: those of ``local_gradient``."""
        found = []
        for handle, live in zip(self.handles, self.live(), strict=True):
            gradient = local_gradient(handle)
            found.append(torch.zeros_like(live) if gradient is None else gradient.to(live.dtype, copy=True))
        return found

    def random(self, seed: int) -> Vector:
        """Normally distributed, not normalized; equal on the ranks that hold copies. No global stream is touched."""
        found = []
        for index, (live, owner) in enumerate(zip(self.live(), self._owners, strict=True)):
            draw = torch.Generator(live.device).manual_seed(((seed * 1_000_003 + index) * 65_537 + owner) % 2**63)
            found.append(torch.randn(live.shape, generator=draw, dtype=live.dtype, device=live.device))
        return found

    def element(self, name: str, index: int) -> Tensor | None:
        """One element of a parameter, 0-d, sharing its memory; None if it does not lie on this rank. No collective.

        Args:
            name: Of the parameter.
            index: Place in the flattened parameter before sharding.

        Raises:
            StabilityError: There is no such parameter or place, or FSDP1 keeps it in a flat one.
        """
        where = f"rank {parallel.this_rank()}:"
        if name not in self._shapes:
            raise StabilityError(f"{where} the optimizer has no parameter {name!r}; it has {', '.join(self.names)}")
        shape, handle = self._shapes[name], self.handles[self.names.index(name)]
        if not 0 <= index < math.prod(shape):
            raise StabilityError(f"{where} {name} has {math.prod(shape)} elements, there is no element {index}")
        if tuple(handle.shape) != shape:
            raise StabilityError(
                f"{where} {name} lies in a flat parameter of FSDP1, whose elements cannot be addressed"
            )
        part, offset = parallel.local(handle), parallel.offset(handle)
        place = []
        for size in reversed(shape):
            index, coordinate = divmod(index, size)
            place.append(coordinate)
        inside = [at - begin for at, begin in zip(reversed(place), offset, strict=True)]
        if not all(0 <= at < size for at, size in zip(inside, part.shape, strict=True)):
            return None
        return part[tuple(inside)]

    @torch.no_grad()
    def dots(self, pairs: Sequence[tuple[Vector, Vector]]) -> list[float]:
        """Inner products, the same numbers on every rank; NaN where anything is not finite.

        Collectives: one all-reduce over all ranks. Waits for the device.
        """
        sums = []
        for first, second in pairs:
            terms = [(a * b).sum(dtype=torch.float64) for a, b in zip(first, second, strict=True)]
            sums.append(self._weighed(terms).sum())
        return total(torch.stack(sums)) if sums else []

    @torch.no_grad()
    def squares(self, vector: Vector) -> dict[str, float]:
        """The squared norm of each parameter's part, by name. Collectives: one all-reduce. Waits for the device."""
        terms = [(part * part).sum(dtype=torch.float64) for part in vector]
        return dict(zip(self.names, total(self._weighed(terms)), strict=True))

    def length(self, vector: Vector) -> float:
        """2-norm. Collectives: one all-reduce. Waits for the device."""
        return math.sqrt(self.dots([(vector, vector)])[0])

    def sum_over_elements(self, terms: Sequence[Sequence[Tensor | float]]) -> list[float]:
        """Sums over all elements from sums over this rank's: for each quantity one number for each parameter.

        Collectives: one all-reduce. Waits for the device.
        """
        return total(torch.stack([self._weighed(row).sum() for row in terms]))

    def _weighed(self, terms: Sequence[Tensor | float]) -> Tensor:
        """One number for each parameter, times its weight; 1-d float64."""
        if not any(isinstance(term, Tensor) for term in terms):
            return torch.tensor(terms, dtype=torch.float64, device=self.device) * self._shares
        here = [torch.as_tensor(term, dtype=torch.float64, device=self.device) for term in terms]
        return torch.stack(here) * self._shares


def total(values: Tensor) -> list[float]:
    """Sums over all ranks, on the host; NaN where a summand was not finite, and no NaN travels.

    Args:
        values: 1-d float64 of the same length on every rank.

    Collectives: one all-reduce over the default group, where there is one.
    """
    if not _distributed():
        return [value if math.isfinite(value) else math.nan for value in values.tolist()]
    bad = ~values.isfinite()
    packed = torch.cat([torch.where(bad, 0.0, values), bad.to(torch.float64)])
    dist.all_reduce(packed)
    numbers = packed.tolist()
    half = len(numbers) // 2
    return [
        value if not flag and math.isfinite(value) else math.nan
        for value, flag in zip(numbers[:half], numbers[half:], strict=True)
    ]


def ranks() -> int:
    """Number of ranks of the job."""
    return dist.get_world_size() if _distributed() else 1


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
