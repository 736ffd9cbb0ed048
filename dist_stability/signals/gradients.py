"""The gradients of one step as the guards see them: this rank's shards, and the caller's global norm.

Lifecycle. Made anew for each step, after backward (and after any clipping, unscaling and accumulation) and before
``optimizer.step()``. Nothing is computed before it is asked for, nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dist_stability.parallel import Residence, is_dtensor, local
from dist_stability.signals.scalar import as_scalar

_FOREACH_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Gradients:
    """This rank's gradients, by the names of their parameters.

    Attributes:
        caller_norm: The global norm before clipping that the caller of ``step()`` gave, as a 0-d float64 tensor on
            ``device``; None if none was given.
        device: Where ``square_sum`` and ``caller_norm`` are: an accelerator if any gradient is on one, else the CPU.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor, Residence]], caller_norm: object = None) -> None:
        """Look up the gradients; computes nothing.

        Enters a collective only if ``caller_norm`` is a DTensor that is not replicated.

        Args:
            parameters: Name, parameter (the optimizer's handle) and the ranks that hold the same elements. Parameters
                without a gradient are left out.
            caller_norm: Float, tensor of one element of any dtype and device, or DTensor; None if unknown. May be NaN.

        Raises:
            TypeError: ``caller_norm`` is not a number.
            ValueError: It is a tensor of several elements, or a negative float.
        """
        everything = list(parameters)
        self._owned = [entry for entry in everything if entry[1].grad is not None]
        norm = None if caller_norm is None else _checked_norm(caller_norm)
        places = [parameter.device for _, parameter, _ in self._owned or everything]
        places += [] if norm is None else [norm.device]
        self.device = next((place for place in places if place.type != "cpu"), torch.device("cpu"))
        # To an accelerator only (see `device`): a copy in that direction waits for nothing.
        self.caller_norm = None if norm is None else norm.to(self.device, non_blocking=True)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Name and local gradient of every parameter that has one, in the optimizer's order. No collective.

        A sparse gradient gives its values (coalesced, which waits for the device), an empty shard 0 elements, a partial
        sum this rank's summand.
        """
        for name, parameter, _ in self._owned:
            yield name, _dense(local(_gradient(parameter)))

    @cached_property
    def square_sum(self) -> Tensor:
        """Sum of |g|^2 over the local gradients, each divided by its number of replicas; 0-d float64 on ``device``.

        The sum of this over all ranks is the squared global norm. Squares are added up in float64: no finite gradient
        of 32 bits or fewer gives infinity, and a NaN or an infinity never gives a finite number. (A float64 gradient
        overflows above 1e154.)

        Enters a collective for every DTensor gradient that is laid out differently from its parameter, as the Partial
        gradients of a layer under sequence parallelism are; every rank must then read this. No host sync, except for
        sparse gradients.
        """
        groups: dict[tuple[torch.device, torch.dtype, int], list[Tensor]] = {}
        with torch.no_grad():
            for _, parameter, residence in self._owned:
                part = _real(_dense(local(_placed(parameter))))
                groups.setdefault((part.device, part.dtype, residence.replicas), []).append(part)
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for (_, _, replicas), parts in groups.items():
                norms = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float64))
                total += norms.square().sum().to(self.device, non_blocking=True) / replicas
        return total


def _checked_norm(value: object) -> Tensor:
    if isinstance(value, Real) and value < 0:  # a tensor's sign is not known on the host
        raise ValueError(f"grad_norm must be a global gradient norm, which is never negative, got {value!r}")
    return as_scalar(value, "grad_norm (the global gradient norm before clipping)", one_element=True)


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None  # parameters without one were left out
    return gradient


def _placed(parameter: Tensor) -> Tensor:
    """The gradient, laid out like its parameter: the summands of a Partial gradient have the wrong squares."""
    gradient: Any = _gradient(parameter)
    owner: Any = parameter
    if is_dtensor(gradient) and is_dtensor(owner) and tuple(gradient.placements) != tuple(owner.placements):
        return gradient.redistribute(placements=owner.placements)
    return gradient


def _dense(gradient: Tensor) -> Tensor:
    # Duplicate indices of an uncoalesced gradient add up before they are squared.
    return gradient if gradient.layout == torch.strided else gradient.coalesce().values()


def _real(gradient: Tensor) -> Tensor:
    if gradient.is_complex():
        return torch.view_as_real(gradient.resolve_conj())
    return gradient if gradient.dtype in _FOREACH_DTYPES else gradient.float()
