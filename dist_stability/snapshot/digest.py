"""A 64-bit digest of tensors that is the same on every device, waits for none, and sees every changed bit.

The bytes of each tensor, in logical order and zero-padded once at its end, are read as signed 64-bit words w_p. With
pseudo-random odd 64-bit multipliers A(p) and B(p) for each position,

    d_e = sum_p w_p * A(p) + (w_p >> 32) * B(p)  mod 2**64   (tensor e; the shift keeps the sign)
    D   = sum_e (d_e + L_e) * V_e  mod 2**64                 (all of them; L_e mixes in the length in bytes, V_e is odd)

In words of 32 bits: a lower half counts with A(p), an upper one with 2**32 A(p) + B(p), and both are odd. So

* One changed half is always seen: its difference is not 0 and below 2**33 in size, and an odd number has an inverse
  modulo 2**64, so difference * multiplier * V is not 0.
* Order counts: swapping two words changes D unless 2**64 divides what the difference of their multipliers makes of it.
* Two flipped sign bits change D by 2**31 * (+-M +- M'), which is 0 for one pair of multipliers in 2**32. This is what
  the second sum is for: without it a flipped top bit changes D by 2**63 whatever the (odd) multiplier is, and any two
  such flips cancel.

It is no defence against someone who wants two states to collide.

A(p) and B(p) are products of a table entry for the position in a chunk of 32,768 words and of a number for the chunk.
On a CPU a row of words times a table is one pass over memory without a temporary (``torch.mv``), which is what makes a
digest cost little more than a copy. Large tensors are read in place, small ones of one size are gathered: the number of
kernels grows with the bytes and the number of different sizes, and temporaries stay near 16 MiB (a tensor that is not
contiguous is copied whole first).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

CHUNK = 32768
"""Words that share the tables of multipliers; a longer tensor uses them again with another factor for each chunk."""

LONG_BUCKET = 1 << 20
"""Words of one large tensor handled at a time on a device: 8 MiB, and as much for their upper halves."""

_CACHED = 1 << 17
"""The same on a CPU: the upper halves, 1 MiB, are read again while they are still in the cache."""

SMALL_BUCKET = 1 << 18
"""Words of small tensors gathered at a time: temporaries of 2 MiB."""

_WORD = 8  # bytes
_LOW, _CHUNKS, _ENTRIES, _LENGTHS, _HIGH = 0, 1 << 44, 2 << 44, 3 << 44, 4 << 44  # disjoint ranges of one function


@torch.no_grad()
def digest(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """One digest of all tensors in order.

    Args:
        tensors: Plain local tensors of any dtype, shape and stride, on the CPU and at most one other device.

    Returns:
        0-d int64 tensor on that other device if any tensor is there, else on the CPU. No host sync.
    """
    everything = list(tensors)
    return combine(entry_digests(everything), lengths(everything))


@torch.no_grad()
def entry_digests(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The digests d_e of all tensors, int64 of shape (number of tensors,), on the device :func:`digest` uses."""
    devices = {tensor.device for tensor in tensors}
    home = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    result = torch.zeros(len(tensors), dtype=torch.int64, device=home)
    for device in devices:
        here = tuple(index for index, tensor in enumerate(tensors) if tensor.device == device)
        found = _on_one_device([tensors[index] for index in here], device)
        # Towards an accelerator only, so nothing waits.
        result.index_copy_(0, _integers(here, home), found.to(home, non_blocking=True))
    return result


@torch.no_grad()
def combine(entries: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The digest D of several tensors from their own digests d_e and their lengths in bytes."""
    factors = _odd(_ENTRIES, len(sizes), entries.device)
    return ((entries + _length_marks(tuple(sizes), entries.device)) * factors).sum()


@torch.no_grad()
def select(entries: torch.Tensor, members: tuple[int, ...]) -> torch.Tensor:
    """Some of the digests d_e, by index."""
    return entries.index_select(0, _integers(members, entries.device))


def lengths(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Bytes of each tensor's elements."""
    return [tensor.numel() * tensor.element_size() for tensor in tensors]


def _on_one_device(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    result = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    small: dict[int, list[int]] = {}  # by their length in bytes
    for index, tensor in enumerate(tensors):
        size = tensor.numel() * tensor.element_size()
        if size > CHUNK * _WORD:
            result[index] = _of_long(bytes_of(tensor))
        elif size:
            small.setdefault(size, []).append(index)
    for size, members in small.items():
        most = max(1, SMALL_BUCKET * _WORD // size)
        for first in range(0, len(members), most):
            part = tuple(members[first : first + most])
            found = _of_equal([tensors[index] for index in part], size)
            result.index_copy_(0, _integers(part, device), found)
    return result


def _of_long(data: torch.Tensor) -> torch.Tensor:
    """d_e of the bytes of one tensor of more than CHUNK words, one bucket at a time."""
    chunk_bytes = CHUNK * _WORD
    whole, rest = divmod(data.numel(), chunk_bytes)
    # The next power of two, so that tensors of many sizes share a few tables.
    factors = _odd(_CHUNKS, 1 << whole.bit_length(), data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    bucket = (_CACHED if data.device.type == "cpu" else LONG_BUCKET) // CHUNK
    for first in range(0, whole, bucket):
        last = min(first + bucket, whole)
        rows = _words(data[first * chunk_bytes : last * chunk_bytes]).view(last - first, CHUNK)
        total += (_of_rows(rows) * factors[first:last]).sum()
    if rest:
        words = _words(torch.nn.functional.pad(data[whole * chunk_bytes :], (0, -rest % _WORD)))
        total += _of_rows(words.view(1, -1))[0] * factors[whole]
    return total


def _of_equal(tensors: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """d_e of tensors that all have ``size`` bytes, at most CHUNK words."""
    alike = len({tensor.dtype for tensor in tensors}) == 1 and not any(t.is_conj() or t.is_neg() for t in tensors)
    if len(tensors) > 1 and alike:  # one alone would not be copied, and keep odd strides
        joined = torch._utils._flatten_dense_tensors(list(tensors)).view(torch.uint8)
    else:
        joined = torch.cat([bytes_of(tensor) for tensor in tensors])
    rows = joined.view(len(tensors), size)
    if size % _WORD:
        rows = torch.nn.functional.pad(rows, (0, -size % _WORD))
    return _of_rows(_words(rows.view(-1)).view(len(tensors), -1)) * _odd(_CHUNKS, 1, joined.device)


def _of_rows(rows: torch.Tensor) -> torch.Tensor:
    """sum_p w_p A(p) + (w_p >> 32) B(p) of each row of words."""
    low, high = (_odd(start, CHUNK, rows.device)[: rows.shape[1]] for start in (_LOW, _HIGH))
    if rows.device.type == "cpu":
        return torch.mv(rows, low).add_(torch.mv(rows >> 32, high))
    return (rows * low).add_((rows >> 32).mul_(high)).sum(1)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in logical order as bytes; a view where the tensor is contiguous."""
    if tensor.dtype is torch.uint8 and tensor.dim() == 1 and tensor.is_contiguous():
        return tensor
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # Not view(-1) or reshape(-1): a row (or single element) with gaps may keep its stride, which has no view as bytes.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def _words(data: torch.Tensor) -> torch.Tensor:
    """Bytes as signed 64-bit words: a view, where they begin at a word."""
    if data.storage_offset() % _WORD:
        data = data.clone()  # bytes that begin between two words cannot be viewed as words
    return data.view(torch.int64)


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """An odd 64-bit number for each number: splitmix64 of it with the last bit set. The same on every device.

    Plain integer arithmetic, because no random number generator of the program may be touched.
    """
    z = (numbers + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return (z ^ _shifted(z, 31)) | 1


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift: torch's own copies the sign bit."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


# Constants are sent to a device once: sending them anew each time would make the host wait for it.


@lru_cache(maxsize=256)
def _odd(start: int, count: int, device: torch.device) -> torch.Tensor:
    """``count`` consecutive odd multipliers of one of the ranges."""
    return _mixed(torch.arange(start, start + count, dtype=torch.int64, device=device))


@lru_cache(maxsize=256)
def _integers(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device)


@lru_cache(maxsize=256)
def _length_marks(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return _mixed(torch.tensor(sizes, dtype=torch.int64) + _LENGTHS).to(device)
