"""The batches since the last judged commit, kept on the host: copies counted in bytes, given back as they came."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .snapshot.digest import digest as digest_of_tensors

_PLAIN = (int, float, bool, complex, str, bytes, type(None))


class _KeptTensor:
    """Host copy of one tensor; a copy from a device is queued on its current stream and waits for nothing."""

    __slots__ = ("_copied", "_device", "_host", "_requires_grad")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._device, self._requires_grad = tensor.device, tensor.requires_grad
        self._copied: Any = None
        source = tensor.detach()
        if self._device.type == "cpu":
            self._host = source.clone()
            return
        # Pinned, or the host would wait for the device at every batch.
        self._host = torch.empty_like(source, device="cpu", pin_memory=True)
        self._host.copy_(source, non_blocking=True)
        module = torch.get_device_module(self._device)
        self._copied = module.Event()
        self._copied.record(module.current_stream(self._device))

    def restore(self) -> torch.Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        tensor = self._host.to(self._device, copy=True)
        return tensor.requires_grad_() if self._requires_grad else tensor


class _KeptMapping:
    """A mapping that is no pytree node, such as a ``UserDict``: what collate functions of tokenizers return."""

    __slots__ = ("_empty", "_leaves", "_spec")

    def __init__(self, mapping: MutableMapping[Any, Any], kept: Mapping[int, _KeptTensor]) -> None:
        leaves, self._spec = pytree.tree_flatten(dict(mapping))
        self._leaves = _kept(leaves, kept)
        self._empty = copy.copy(mapping)
        self._empty.clear()

    def restore(self, made: dict[int, torch.Tensor]) -> MutableMapping[Any, Any]:
        mapping = copy.copy(self._empty)
        mapping.update(pytree.tree_unflatten(_restored(self._leaves, made), self._spec))
        return mapping


class KeptBatch:
    """A batch that can be given back any number of times, each time as new tensors.

    Tensors come back on their device with equal bits, dtype and, where dense, strides; one that occurs twice is one
    again. They are found in pytrees and mappings; any other object is kept by reference, with what it holds.

    Attributes:
        bytes: Of its host copies.
    """

    __slots__ = ("_leaves", "_spec", "bytes")

    def __init__(self, batch: Any) -> None:
        """Copy every tensor of the batch.

        Raises:
            TypeError: A tensor is sparse, nested or of another layout that has no plain copy.
        """
        leaves, self._spec = pytree.tree_flatten(batch)
        self.bytes = _bytes(leaves)
        self._leaves = _kept(leaves, {key: _KeptTensor(tensor) for key, tensor in _tensors(leaves).items()})

    def restore(self) -> Any:
        """The batch, in new tensors."""
        return pytree.tree_unflatten(_restored(self._leaves, {}), self._spec)


def _kept(leaves: Iterable[Any], kept: Mapping[int, _KeptTensor]) -> list[Any]:
    return [
        _KeptMapping(leaf, kept) if isinstance(leaf, MutableMapping) else kept.get(id(leaf), leaf) for leaf in leaves
    ]


def _restored(leaves: Iterable[Any], made: dict[int, torch.Tensor]) -> list[Any]:
    restored = []
    for leaf in leaves:
        if isinstance(leaf, _KeptMapping):
            leaf = leaf.restore(made)
        elif isinstance(leaf, _KeptTensor):
            leaf = made[id(leaf)] if id(leaf) in made else made.setdefault(id(leaf), leaf.restore())
        restored.append(leaf)
    return restored


def digest(batch: Any) -> int:
    """A 64-bit number for the content of this rank's batch, by which it is known when it comes again.

    Values, dtypes, shapes, structure and plain values (numbers, strings) count; other objects by their type alone, and
    the device not at all. Waits for tensors on a device.
    """
    leaves, spec = pytree.tree_flatten(batch)
    tensors = [leaf.detach().cpu() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    said: list[Any] = [str(spec), int(digest_of_tensors(tensors))]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            said.append((str(leaf.dtype), tuple(leaf.shape)))
        elif isinstance(leaf, MutableMapping):
            said.append((type(leaf).__qualname__, digest(dict(leaf))))
        else:
            said.append((type(leaf).__qualname__, repr(leaf) if isinstance(leaf, _PLAIN) else ""))
    return int.from_bytes(hashlib.blake2b(repr(said).encode(), digest_size=8).digest(), "little")


def _tensors(leaves: Iterable[Any]) -> dict[int, torch.Tensor]:
    """Every tensor once, by its id."""
    found: dict[int, torch.Tensor] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            found[id(leaf)] = leaf
        elif isinstance(leaf, MutableMapping):
            found.update(_tensors(pytree.tree_leaves(dict(leaf))))
    return found


def _bytes(leaves: Iterable[Any]) -> int:
    """What host copies of these leaves take."""
    size = 0
    for tensor in _tensors(leaves).values():
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"batches(): a tensor of layout {tensor.layout} cannot be kept for replay; let the loader give its "
                f"parts as plain tensors and put them together in the loop"
            )
        size += tensor.numel() * tensor.element_size()
    return size


class BatchWindow:
    """Batches kept on the host, within a budget of bytes.

    Args:
        max_bytes: For all of them together, on this rank.

    Attributes:
        bytes: Taken at present.

    Raises:
        TypeError, ValueError: ``max_bytes`` is not a whole number >= 1.
    """

    def __init__(self, max_bytes: int) -> None:
        """Keep nothing yet."""
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool):
            raise TypeError(f"max_bytes: expected a whole number of bytes, got {max_bytes!r}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes: expected at least 1, got {max_bytes}")
        self.max_bytes = max_bytes
        self.bytes = 0
        self._seen = False

    def keep(self, batch: Any, of: int = 1) -> KeptBatch:
        """Copy a batch to the host.

        Args:
            batch: What the loader gave.
            of: Batches that may have to be kept at once. The first batch is taken for the typical one, so that a
                budget that is too small is found out before any training.

        Raises:
            ValueError: The budget is too small; nothing was copied.
            TypeError: See :class:`KeptBatch`.
        """
        size = _bytes(pytree.tree_leaves(batch))
        needed = self.bytes + size if self._seen else size * of
        if needed > self.max_bytes:
            what = f"{self.bytes} bytes are kept already" if self._seen else f"{of} of its size may have to be kept"
            raise ValueError(
                f"batches(): max_bytes={self.max_bytes} is too small for replay: this batch takes {size} bytes on the "
                f"host, {what}, so {needed} are needed. Raise max_bytes, judge more often (a smaller `every`, or a "
                f"cadence with a smaller `most`), or iterate over the loader itself, without replay."
            )
        kept = KeptBatch(batch)
        self._seen = True
        self.bytes += kept.bytes
        return kept

    def retain(self, kept: Iterable[KeptBatch]) -> None:
        """Only these are still wanted."""
        self.bytes = sum(each.bytes for each in kept)
