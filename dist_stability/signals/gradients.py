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
from dist_stability.signals.sums import constants, norms, row

_FOREACH_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Gradients:
    """This rank's gradients, by the names of their parameters.

    Attributes:
        parameters: Name, parameter and the ranks that hold the same elements, as given, with or without a gradient.
        caller_norm: The global norm before clipping that the caller of ``step()`` gave, as a 0-d float64 tensor on
            ``device``; None if none was given.
        device: Where ``square_sum`` and ``caller_norm`` are: an accelerator if any gradient is on one, else the CPU.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor, Residence]], caller_norm: object = None) -> None:
        """Look up the gradients; computes nothing.

        Enters a collective only if ``caller_norm`` is a DTensor that is not replicated.

        Args:
            parameters: Name, parameter (the optimizer's handle) and the ranks that hold the same elements. A parameter
                without a gradient counts as 0.
            caller_norm: Float, tensor of one element of any dtype and device, or DTensor; None if unknown. May be NaN.

        Raises:
            TypeError: ``caller_norm`` is not a number.
            ValueError: It is a tensor of several elements, or a negative float.
        """
        self.parameters = tuple(parameters)
        self._owned = [entry for entry in self.parameters if entry[1].grad is not None]
        norm = None if caller_norm is None else _checked_norm(caller_norm)
        places = [parameter.device for _, parameter, _ in self._owned or self.parameters]
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
    def local(self) -> tuple[Tensor | None, ...]:
        """For each parameter this rank's part of its gradient, laid out like the parameter, as dense real numbers.

        None without a gradient. Enters a collective for every DTensor gradient that is laid out differently from its
        parameter, as the Partial gradients of a layer under sequence parallelism are; every rank must then read this.
        No host sync, except for sparse gradients.
        """
        with torch.no_grad():
            return tuple(_local_gradient(parameter) for _, parameter, _ in self.parameters)

    @cached_property
    def squares(self) -> Tensor:
        """Of each parameter the sum of |g|^2 over the local gradient, divided by its number of replicas.

        1-d float64 on ``device``, 0 without a gradient. Summed over all ranks it is the squared norm of each gradient.
        Squares are added up in float64: no finite gradient of 32 bits or fewer gives infinity, and a NaN or an infinity
        never gives a finite number. (A float64 gradient overflows above 1e154.)

        Collectives and host syncs: those of :attr:`local`.
        """
        with torch.no_grad():
            lengths = norms([part for part in self.local if part is not None], self.device)
            if len(lengths) < len(self.local):
                owned = iter(lengths.unbind())
                lengths = row(self.device, *[0.0 if part is None else next(owned) for part in self.local])
            replicas = [float(residence.replicas) for _, _, residence in self.parameters]
            squares = lengths.square_()
            return squares if set(replicas) == {1.0} else squares.div_(constants(self.device, replicas))

    def forget(self) -> None:
        """Let go of the gradients, which are about to change; numbers that were computed from them stay."""
        self.__dict__.pop("local", None)

    def spoilt(self) -> list[str]:
        """Parameters whose :attr:`squares` are not finite, as far as those were computed. Waits for the device."""
        squares = self.__dict__.get("squares")
        if squares is None:
            return []
        names = (name for name, _, _ in self.parameters)
        return [name for name, finite in zip(names, squares.isfinite().tolist(), strict=True) if not finite]

    @cached_property
    def square_sum(self) -> Tensor:
        """Sum of :attr:`squares`, 0-d: summed over all ranks it is the squared global norm."""
        return self.squares.sum()


def local_gradient(parameter: Tensor) -> Tensor | None:
    """This rank's part of one parameter's gradient; see :attr:`Gradients.local`."""
    with torch.no_grad():
        return _local_gradient(parameter)


def _local_gradient(parameter: Tensor) -> Tensor | None:
    gradient = parameter.grad
    if gradient is None:
        return None
    if type(gradient) is Tensor and gradient.layout is torch.strided and gradient.dtype in _FOREACH_DTYPES:
        return gradient  # nearly all of them: spare the questions
    return _real(_dense(local(_placed(parameter))))


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
