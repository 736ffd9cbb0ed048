"""Taking over a state that was written under another kind of parallelism, or by another number of ranks.

What is saved is known by name and as whole tensors (catalogue.py). So a process makes optimizer state that is laid out
like its own parameters, looks up which part of which whole tensor each of its tensors is, and has those parts read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ... import parallel
from ..catalogue import Catalogue, Wanted
from ..plan import StatePlan
from .form import At, Rebuilt, Tree
from .record import Unusable

Buffers = Sequence[tuple[int, str, torch.Tensor | None]]


class Reshaped(Rebuilt):
    """Optimizer state as it was saved, each tensor laid out like the parameter it belongs to is now.

    Args:
        optimizers: Of this process.
        saved: From :func:`~.form.trees`, of some rank.
        form: From :func:`~.form.facts`, of the same.
        catalogue: Of the same.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], saved: list[list[Tree]], form: dict[str, Any], catalogue: Catalogue
    ) -> None:
        """See Rebuilt."""
        if catalogue.problem:
            raise Unusable(f"can only be read as it was written: {catalogue.problem}")
        self._catalogue = catalogue
        super().__init__(optimizers, saved, form)

    def _tensor(self, at: At, parameter: torch.Tensor) -> torch.Tensor:
        name, dtype, shape, _, kind, _ = self._form[at.entry]
        whole = self._catalogue.places[at.entry].shape
        layout, local = parallel.wrapping(parameter), parallel.local(parameter)
        element = getattr(torch, dtype.removeprefix("torch."))
        if whole == tuple(parameter.shape):
            made = torch.empty_like(local, dtype=element)
            return made if layout is None else layout.wrap(made)
        if tuple(shape) != whole:
            raise Unusable(f"has {name} in parts of {tuple(shape)}, and its parameter is of another shape")
        # A counter: beside the parameter, or on the host, as it was.
        return torch.empty(whole, dtype=element, device="cpu" if kind == "cpu" else local.device)


def wanted(model: nn.Module, plan: StatePlan, first: int) -> list[Wanted]:
    """Which part of which whole tensor each live tensor of a plan is.

    Raises:
        Unusable: Some are no parts of whole tensors.
    """
    image = plan.image()
    live = Catalogue.of(model, plan, image.held, [0] * len(plan.pieces), first)
    if live.problem:
        raise Unusable(f"cannot be read under this kind of parallelism: {live.problem}")
    each = zip(live.places, plan.tensors(), strict=True)
    return [Wanted(place.key, place.shape, place.offsets, tensor) for place, tensor in each]


def renumbered(buffers: Buffers, catalogue: Catalogue, model: nn.Module) -> list[tuple[int, str, torch.Tensor | None]]:
    """Buffers by the modules' numbers in this model: wrappers move them.

    Raises:
        Unusable: The model has other buffers.
    """
    saved = {catalogue.buffer(number, name): content for number, name, content in buffers}
    here = Catalogue(modules=tuple(name for name, _ in model.named_modules()))
    now = {
        here.buffer(number, name): (number, name)
        for number, module in enumerate(model.modules())
        for name in module._buffers
    }
    if set(now) != set(saved):
        raise Unusable(f"has the buffers {sorted(set(saved) ^ set(now))[:3]} that the model lacks, or lacks them")
    return [(*now[key], content) for key, content in saved.items()]
