"""Copies of a model's buffers: what a forward in training mode moves beside the random streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .. import parallel
from ..errors import SnapshotError


@dataclass(slots=True)
class _Copy:
    """One tensor object used as a buffer, and its content at the capture."""

    tensor: torch.Tensor
    content: torch.Tensor


class BufferCopies:
    """Copies of every buffer of a model, persistent or not, on the buffers' own devices.

    ``capture`` fills clones that are made once; ``restore`` writes them back in place. A buffer that the forward
    replaced (``self.count = self.count + 1``), removed, or set to or from None gets its object of the capture back,
    so that compiled code and other modules that share it see the same tensor again. A buffer registered after the
    capture is removed.

    Modules are found again only when the number of buffers or submodules changed; a wrapper put around a part of the
    model keeps both modules and buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember the model; nothing is copied yet."""
        self._model = model
        self._modules: list[nn.Module] = []
        self._counts = (-1, -1)
        self._slots: list[tuple[nn.Module, dict[str, torch.Tensor | None]]] = []
        self._copies: dict[int, _Copy] = {}

    @torch.no_grad()
    def capture(self) -> None:
        """Copy every buffer into its clone. Allocates only for buffers that are new or changed their shape."""
        if self._count() != self._counts:
            self._modules = list(self._model.modules())
            self._counts = self._count()
        before, self._copies = self._copies, {}
        self._slots = [(module, dict(module._buffers)) for module in self._modules]
        for _, buffers in self._slots:
            for tensor in buffers.values():
                if tensor is not None and id(tensor) not in self._copies:
                    self._copies[id(tensor)] = _copy_of(tensor, before.get(id(tensor)))

    @torch.no_grad()
    def restore(self) -> None:
        """Write every buffer's content back in place and put replaced objects back. May be called repeatedly."""
        for copy in self._copies.values():
            if parallel.local(copy.tensor).shape != copy.content.shape:
                copy.tensor.resize_(copy.content.shape)
            parallel.local(copy.tensor).copy_(copy.content)
        for module, buffers in self._slots:
            for name in [name for name in module._buffers if name not in buffers]:
                delattr(module, name)
            for name, tensor in buffers.items():
                if name not in module._buffers:
                    # A plain attribute that took the name would hide the buffer.
                    module.__dict__.pop(name, None)
                if module._buffers.get(name, self) is not tensor:
                    module._buffers[name] = tensor

    def export(self) -> list[tuple[int, str, torch.Tensor | None]]:
        """The capture for another process: (number of the module, name of the buffer, content). Waits for devices."""
        return [
            (number, name, None if tensor is None else self._copies[id(tensor)].content.cpu())
            for number, (_, buffers) in enumerate(self._slots)
            for name, tensor in buffers.items()
        ]

    @torch.no_grad()
    def load(self, saved: Sequence[tuple[int, str, torch.Tensor | None]]) -> None:
        """Write what another process exported into the model as it is now.

        Raises:
            SnapshotError: The model has other buffers; nothing was changed then.
        """
        self.check(saved)
        modules = list(self._model.modules())
        for number, name, content in saved:
            live = modules[number]._buffers[name]
            if content is None or live is None or parallel.local(live).shape != content.shape:
                fresh = None if content is None else content.to(_device_of(self._model, live))
                modules[number]._buffers[name] = fresh
            else:
                parallel.local(live).copy_(content)

    def check(self, saved: Sequence[tuple[int, str, torch.Tensor | None]]) -> None:
        """Raise SnapshotError if the model has not these buffers. Changes nothing."""
        modules = list(self._model.modules())
        now = {(number, name) for number, module in enumerate(modules) for name in module._buffers}
        if now != {(number, name) for number, name, _ in saved}:
            raise SnapshotError(
                f"rank {parallel.this_rank()}: the model has {len(now)} buffers, and not those of the snapshot, which "
                f"has {len(saved)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all clones."""
        return sum(copy.content.numel() * copy.content.element_size() for copy in self._copies.values())

    def _count(self) -> tuple[int, int]:
        return (
            sum(len(module._buffers) for module in self._modules),
            sum(len(module._modules) for module in self._modules),
        )


def _device_of(model: nn.Module, buffer: torch.Tensor | None) -> torch.device:
    """Where a buffer belongs: where it is, or else where the first parameter is."""
    found = buffer if buffer is not None else next(model.parameters(), None)
    return torch.device("cpu") if found is None else parallel.local(found).device


def _copy_of(tensor: torch.Tensor, previous: _Copy | None) -> _Copy:
    shard = parallel.local(tensor)
    if (
        previous is None
        or previous.content.shape != shard.shape
        or previous.content.dtype != shard.dtype
        or previous.content.device != shard.device
    ):
        return _Copy(tensor, shard.clone())
    previous.content.copy_(shard)
    return previous
