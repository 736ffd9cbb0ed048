"""Copies of a model's buffers: what a forward in training mode moves beside the random streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .. import parallel


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

    @property
    def nbytes(self) -> int:
        """Bytes of all clones."""
        return sum(copy.content.numel() * copy.content.element_size() for copy in self._copies.values())

    def _count(self) -> tuple[int, int]:
        return (
            sum(len(module._buffers) for module in self._modules),
            sum(len(module._modules) for module in self._modules),
        )


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
