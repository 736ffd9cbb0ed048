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
digest cost little more than a copy. Large tensors are read in place; small ones of one shape are gathered, or read
where they lie if they lie side by side: the number of kernels grows with the bytes and the number of different shapes.

Temporaries are made once for each thread (on an accelerator, for each stream of a thread) and used again, at most
18 MiB beside a few words for each tensor and each chunk. Only a large tensor that is not contiguous is copied whole,
each time.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

CHUNK = 32768
"""Words that share the tables of multipliers; a longer tensor uses them again with another factor for each chunk."""

LONG_BUCKET = 1 << 20
"""Words of one large tensor handled at a time on a device: 8 MiB, and as much for their upper halves."""

_CACHED = 1 << 18
"""The same on a CPU: the upper halves, 2 MiB, are read again while they are still in the cache."""

SMALL_BUCKET = 1 << 17
"""Words of small tensors handled at a time: 1 MiB."""

_WORD = 8  # bytes
_LOW, _CHUNKS, _ENTRIES, _LENGTHS, _HIGH = 0, 1 << 44, 2 << 44, 3 << 44, 4 << 44  # disjoint ranges of one function
_HALF = torch.tensor(32, device="cpu")
"""Bits of half a word, as a tensor: a number would be made into one at each use."""

_STREAMS = 4
"""How many streams of a thread keep their temporaries."""

_device = operator.attrgetter("device")


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
    return Sums(tensors).of(tensors)


@torch.no_grad()
def combine(entries: torch.Tensor, sizes: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
    """The digest D of several tensors from their own digests d_e and their lengths in bytes; 0-d, or ``out``."""
    device = entries.device
    mixed = _scratch("mixed", len(sizes), device)
    torch.add(entries, _length_marks(tuple(sizes), device), out=mixed)
    mixed.mul_(_odd(_ENTRIES, len(sizes), device))
    return torch.sum(mixed, 0, out=out)


@torch.no_grad()
def select(entries: torch.Tensor, members: tuple[int, ...]) -> torch.Tensor:
    """Some of the digests d_e, by index. The next call overwrites what this one gives."""
    chosen = _scratch("selected", len(members), entries.device)
    return torch.index_select(entries, 0, _integers(members, entries.device), out=chosen)


def lengths(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Bytes of each tensor's elements."""
    return [tensor.numel() * tensor.element_size() for tensor in tensors]


class _Part(NamedTuple):
    """Tensors that are added up in one go.

    Attributes:
        members: Their indices.
        size: Bytes of each.
        dtype: Of each.
        shape: Of each.
        rows: Their bytes, one tensor a row, if they lie side by side and stay there; None: look them up and gather.
    """

    members: tuple[int, ...]
    size: int
    dtype: torch.dtype
    shape: torch.Size
    rows: torch.Tensor | None


class Sums:
    """How tensors of certain forms are added up: which of them are long, and which are taken together.

    Keeps no tensor. For tensors that are added up again and again: nothing is allocated but the result.

    Attributes:
        devices: Of the tensors it was made for.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take the forms (dtype, shape, device) from these tensors; they may be on the CPU and one other device."""
        self.devices = tuple(map(_device, tensors))
        kinds = sorted(set(self.devices), key=lambda device: (device.type == "cpu", str(device)))
        self._home = kinds[0] if kinds else torch.device("cpu")
        self._long: list[tuple[torch.device, int]] = []
        self._parts: list[tuple[torch.device, _Part]] = []
        groups: dict[Any, list[int]] = {}
        for index, (tensor, size) in enumerate(zip(tensors, lengths(tensors), strict=True)):
            if size > CHUNK * _WORD:
                self._long.append((tensor.device, index))
            elif size:
                groups.setdefault((tensor.device, size, tensor.dtype, tensor.shape), []).append(index)
        for (device, size, dtype, shape), members in groups.items():
            for part in self._split(tensors, members, size, dtype, shape):
                self._parts.append((device, part))
        # Results come in the order in which they are made; what has no bytes, and the digest 0, is one after the last.
        order = [index for _, index in self._long] + [index for _, part in self._parts for index in part.members]
        self._count = len(order)
        places = [self._count] * len(tensors)
        for place, index in enumerate(order):
            places[index] = place
        self._places = _integers(tuple(places), self._home)

    @torch.no_grad()
    def of(self, tensors: Sequence[torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
        """The digests d_e of tensors of these forms.

        Args:
            tensors: As many, of the same dtypes, shapes and devices, in the same order.
            out: Where to write them, int64 of shape (number of tensors,); by default a new tensor.

        Returns:
            On the device :func:`digest` uses. No host sync.
        """
        found = _scratch("found", self._count + 1, self._home)
        found[self._count :].zero_()
        place = 0
        for device, index in self._long:
            target = found[place : place + 1]
            result = _near(target, device)
            _add_up_long(bytes_of(tensors[index]), result)
            _deliver(result, target)
            place += 1
        for device, part in self._parts:
            target = found[place : place + len(part.members)]
            result = _near(target, device)
            rows = _gather([tensors[i] for i in part.members], part, device) if part.rows is None else part.rows
            _add_up_rows(_padded(rows), result)
            _deliver(result, target)
            place += len(part.members)
        found[len(self._long) : place].mul_(_odd(_CHUNKS, 1, self._home))  # each is within the first chunk
        return torch.index_select(found, 0, self._places, out=out)

    def _split(
        self, tensors: Sequence[torch.Tensor], members: Sequence[int], size: int, dtype: torch.dtype, shape: torch.Size
    ) -> Iterator[_Part]:
        """Tensors of one form as parts that are not too large."""
        most = _most(size)
        for first in range(0, len(members), most):
            yield _Part(tuple(members[first : first + most]), size, dtype, shape, None)


class FixedSums(Sums):
    """The same for tensors that stay where they are: those of one size that lie side by side are not even gathered.

    Keeps the tensors, and so their memory.

    Attributes:
        tensors: The tensors.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take forms and places from these tensors."""
        super().__init__(tensors)
        self.tensors = tuple(tensors)

    def now(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """Their digests d_e; see :meth:`Sums.of`."""
        return self.of(self.tensors, out)

    def _split(
        self, tensors: Sequence[torch.Tensor], members: Sequence[int], size: int, dtype: torch.dtype, shape: torch.Size
    ) -> Iterator[_Part]:
        """Runs of neighbours as parts that are read in place; the others as in :meth:`Sums._split`."""
        runs: list[list[int]] = []
        for index in sorted(members, key=lambda index: tensors[index].data_ptr()):
            if runs and _follows(tensors[runs[-1][-1]], tensors[index], size):
                runs[-1].append(index)
            else:
                runs.append([index])
        alone: list[int] = []
        for run in runs:
            if len(run) == 1:
                alone += run
                continue
            data = bytes_of(tensors[run[0]])
            rows = data.as_strided((len(run), size), (size, 1))
            for first in range(0, len(run), _most(size)):
                part = slice(first, first + _most(size))
                yield _Part(tuple(run[part]), size, dtype, shape, rows[part])
        yield from super()._split(tensors, alone, size, dtype, shape)


def _most(size: int) -> int:
    """How many tensors of so many bytes are handled at a time."""
    return max(1, SMALL_BUCKET // -(-size // _WORD))


def _follows(one: torch.Tensor, other: torch.Tensor, size: int) -> bool:
    """Whether one begins where the other ends, in one piece of memory."""
    return (
        one.data_ptr() + size == other.data_ptr()
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and all(each.is_contiguous() and not (each.is_conj() or each.is_neg()) for each in (one, other))
    )


def _near(place: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Where results of a device are written: their place, or a temporary if that is on another device."""
    return place if device == place.device else _scratch("result", len(place), device)


def _deliver(result: torch.Tensor, place: torch.Tensor) -> None:
    if result is not place:
        # Towards an accelerator only, so nothing waits.
        place.copy_(result, non_blocking=True)


def _add_up_long(data: torch.Tensor, out: torch.Tensor) -> None:
    """d_e of the bytes of one tensor of more than CHUNK words, one bucket at a time."""
    chunk_bytes = CHUNK * _WORD
    whole, rest = divmod(data.numel(), chunk_bytes)
    count = whole + (rest > 0)
    # The next power of two, so that tensors of many sizes share a few tables.
    factors = _odd(_CHUNKS, 1 << whole.bit_length(), data.device)
    sums = _scratch("sums", count, data.device)
    bucket = (_CACHED if data.device.type == "cpu" else LONG_BUCKET) // CHUNK
    for first in range(0, whole, bucket):
        last = min(first + bucket, whole)
        rows = data[first * chunk_bytes : last * chunk_bytes].view(last - first, chunk_bytes)
        _add_up_rows(_padded(rows), sums[first:last])
    if rest:
        _add_up_rows(_padded(data[whole * chunk_bytes :].view(1, rest)), sums[whole:])
    torch.sum(sums.mul_(factors[:count]), 0, keepdim=True, out=out)


def _gather(tensors: list[torch.Tensor], part: _Part, device: torch.device) -> torch.Tensor:
    """The bytes of tensors of one form, one a row."""
    count, size = len(tensors), part.size
    if count == 1 and tensors[0].is_contiguous():
        return bytes_of(tensors[0]).view(1, size)
    rows = _scratch("gathered", -(-count * size // _WORD), device).view(torch.uint8)[: count * size]
    torch.stack(tensors, out=rows.view(part.dtype).view(count, *part.shape))
    return rows.view(count, size)


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """Rows of bytes as rows of signed 64-bit words, zero-padded: a view where they begin and end at words."""
    count, size = rows.shape
    if size % _WORD == 0 and rows.storage_offset() % _WORD == 0:
        return rows.view(torch.int64)
    words = _scratch("padded", count * -(-size // _WORD), rows.device).view(count, -1)
    words[:, -1].zero_()
    words.view(torch.uint8)[:, :size].copy_(rows)
    return words


def _add_up_rows(rows: torch.Tensor, out: torch.Tensor) -> None:
    """sum_p w_p A(p) + (w_p >> 32) B(p) of each row of words."""
    device = rows.device
    low, high = _tables(rows.shape[1], device)
    upper = _scratch("upper", rows.numel(), device).view(rows.shape)
    if device.type == "cpu":
        torch.bitwise_right_shift(rows, _HALF, out=upper)
        torch.mv(rows, low, out=out)
        out.addmv_(upper, high)
        return
    torch.bitwise_right_shift(rows, 32, out=upper)
    lower = torch.mul(rows, low, out=_scratch("lower", rows.numel(), device).view(rows.shape))
    torch.sum(lower.add_(upper.mul_(high)), 1, out=out)


class _Kept(threading.local):
    """Temporaries of a thread, by stream (None: the CPU) and name."""

    def __init__(self) -> None:
        self.by_stream: dict[Any, dict[str, torch.Tensor]] = {}


_kept = _Kept()


def _scratch(name: str, count: int, device: torch.device) -> torch.Tensor:
    """So many words of memory that are overwritten when they are asked for again under this name.

    By this thread, and on an accelerator on this stream, whose order is that of the uses. Memory that is let go was
    taken on the same stream, so its next user comes later as well.
    """
    stream = None if device.type == "cpu" else torch.get_device_module(device).current_stream(device)
    named = _kept.by_stream.get(stream)
    if named is None:
        streams = [key for key in _kept.by_stream if key is not None]
        if len(streams) >= _STREAMS:
            del _kept.by_stream[streams[0]]
        named = _kept.by_stream[stream] = {}
    memory = named.get(name)
    if memory is None or memory.numel() < count:
        with torch.inference_mode(False):  # or nobody could write to it outside of that mode
            size = max(1 << 10, 1 << (count - 1).bit_length())
            named[name] = memory = torch.empty(size, dtype=torch.int64, device=device)
    return memory[:count]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in logical order as bytes; a view where the tensor is contiguous."""
    if tensor.dtype is torch.uint8 and tensor.dim() == 1 and tensor.is_contiguous():
        return tensor
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # Not view(-1) or reshape(-1): a row (or single element) with gaps may keep its stride, which has no view as bytes.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


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


@lru_cache(maxsize=1024)
def _tables(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The multipliers of the first words of a chunk: A and B. Views of one table each."""
    return _odd(_LOW, CHUNK, device)[:width], _odd(_HIGH, CHUNK, device)[:width]


@lru_cache(maxsize=256)
def _integers(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device)


@lru_cache(maxsize=256)
def _length_marks(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return _mixed(torch.tensor(sizes, dtype=torch.int64) + _LENGTHS).to(device)
