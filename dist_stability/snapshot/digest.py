"""A 64-bit digest of tensors that is the same on every device, waits for none, and sees every changed bit.

The bytes of each tensor, in logical order and zero-padded once at its end, are read as signed 32-bit words w_p. With a
pseudo-random odd 64-bit multiplier M(p) for each position,

    d_e = sum_p w_p * M(p)  mod 2**64        (tensor e)
    D   = sum_e (d_e + L_e) * V_e  mod 2**64 (all of them; L_e mixes in the length in bytes, V_e is odd)

* One changed word is always seen: its difference is not 0 and below 2**33 in size, and an odd number has an inverse
  modulo 2**64, so difference * M * V is not 0.
* Order counts: swapping two words changes D unless 2**64 divides (w_p - w_q) * (M(p) - M(q)).
* Two flipped sign bits change D by 2**31 * (+-M(p) +- M(q)), which is 0 for one pair of multipliers in 2**32. This is
  why words have 32 bits: with 64-bit words a flipped top bit changes D by 2**63 whatever the (odd) multiplier is, and
  any two such flips cancel.

It is no defence against someone who wants two states to collide.

M(p) is the product of a table entry for the position in a chunk of 65,536 words and of a number for the chunk. Large
tensors are read in place, small ones are gathered: the number of kernels grows with the bytes and not with the number
of tensors, and temporaries stay near 16 MiB (a tensor that is not contiguous is copied whole first).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

CHUNK = 65536
"""Words that share the table of multipliers; a longer tensor uses it again with another factor for each chunk."""

LONG_BUCKET = 1 << 21
"""Words of one large tensor handled at a time: 16 MiB once widened to 64 bits."""

SMALL_BUCKET = 1 << 19
"""Words of small tensors gathered at a time: four temporaries of 4 MiB."""

_WORD = 4  # bytes
_TABLE, _CHUNKS, _ENTRIES, _LENGTHS = 0, 1 << 44, 2 << 44, 3 << 44  # disjoint ranges of one random function


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
    small: dict[int, torch.Tensor] = {}
    waiting = 0
    for index, tensor in enumerate(tensors):
        words = -(-tensor.numel() * tensor.element_size() // _WORD)
        if words > CHUNK:
            result[index] = _of_long(bytes_of(tensor))
            continue
        if waiting + words > SMALL_BUCKET:
            _of_many(small, result)
            small, waiting = {}, 0
        if words:
            small[index] = bytes_of(tensor)
            waiting += words
    if small:
        _of_many(small, result)
    return result


def _of_long(data: torch.Tensor) -> torch.Tensor:
    """d_e of the bytes of one tensor of more than CHUNK words, one bucket at a time."""
    table = _odd(_TABLE, CHUNK, data.device)
    chunk_bytes = CHUNK * _WORD
    whole, rest = divmod(data.numel(), chunk_bytes)
    # The next power of two, so that tensors of many sizes share a few tables.
    factors = _odd(_CHUNKS, 1 << whole.bit_length(), data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for first in range(0, whole, LONG_BUCKET // CHUNK):
        last = min(first + LONG_BUCKET // CHUNK, whole)
        rows = _words(data[first * chunk_bytes : last * chunk_bytes]).view(last - first, CHUNK)
        total += (rows.mul_(table).sum(1) * factors[first:last]).sum()
    if rest:
        words = _words(torch.nn.functional.pad(data[whole * chunk_bytes :], (0, -rest % _WORD)))
        total += words.mul_(table[: words.numel()]).sum() * factors[whole]
    return total


def _of_many(small: dict[int, torch.Tensor], result: torch.Tensor) -> None:
    """Write d_e of many tensors of at most CHUNK words each, gathered into one row of words."""
    device = result.device
    table = _odd(_TABLE, CHUNK, device)
    padding = torch.zeros(_WORD, dtype=torch.uint8, device=device)
    pieces: list[torch.Tensor] = []
    ends: list[int] = []
    for data in small.values():
        pieces += [data, padding[: -data.numel() % _WORD]] if data.numel() % _WORD else [data]
        ends.append((ends[-1] if ends else 0) - (-data.numel() // _WORD))
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    multipliers = torch.cat([table[:size] for size in sizes])
    # The sum over each tensor as a difference of running sums: exact, since all is modulo 2**64.
    running = _words(torch.cat(pieces)).mul_(multipliers).cumsum(0)[_integers(tuple(end - 1 for end in ends), device)]
    sums = torch.diff(running, prepend=torch.zeros(1, dtype=torch.int64, device=device))
    result.index_copy_(0, _integers(tuple(small), device), sums * _odd(_CHUNKS, 1, device))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in logical order as bytes; a view where the tensor is contiguous."""
    if tensor.dtype is torch.uint8 and tensor.dim() == 1 and tensor.is_contiguous():
        return tensor
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # Not view(-1) or reshape(-1): a row (or single element) with gaps may keep its stride, which has no view as bytes.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def _words(data: torch.Tensor) -> torch.Tensor:
    """Bytes as signed 32-bit words, widened to 64 bits (a new tensor)."""
    if data.storage_offset() % _WORD:
        data = data.clone()  # bytes that begin between two words cannot be viewed as words
    return data.view(torch.int32).to(torch.int64)


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
