"""The digest sees what it promises to see, and is the same wherever it is computed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_stability.snapshot import RandomState, digest
from dist_stability.snapshot.digest import CHUNK, LONG_BUCKET, SMALL_BUCKET, combine, entry_digests, lengths

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.complex128,
]


def value(*tensors: torch.Tensor) -> int:
    return int(digest(tensors))


def filled(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=draw).bool()
    return torch.randint(0, 256, (count * dtype.itemsize,), generator=draw, dtype=torch.uint8).view(dtype)


def slow(tensors: list[torch.Tensor]) -> int:
    """The definition, word by word, in Python's integers."""
    from dist_stability.snapshot.digest import _CHUNKS, _ENTRIES, _HIGH, _LENGTHS, _LOW, _mixed

    def odd(number: int) -> int:
        return int(_mixed(torch.tensor([number])))

    total = 0
    for index, tensor in enumerate(tensors):
        data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        data += bytes(-len(data) % 8)
        words = [int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)]
        own = sum(
            (w * odd(_LOW + p % CHUNK) + (w >> 32) * odd(_HIGH + p % CHUNK)) * odd(_CHUNKS + p // CHUNK)
            for p, w in enumerate(words)
            if w
        )
        nbytes = tensor.numel() * tensor.element_size()
        total += (own + odd(_LENGTHS + nbytes)) * odd(_ENTRIES + index)
    return (total + 2**63) % 2**64 - 2**63


def test_is_what_it_says_it_is() -> None:
    long = torch.zeros(6 * CHUNK + 5, dtype=torch.int32)
    long[[0, 2 * CHUNK - 1, 2 * CHUNK, 4 * CHUNK + 7, 6 * CHUNK + 4]] = torch.tensor(
        [1, -(2**31), 2**31 - 1, -5, 12345], dtype=torch.int32
    )
    tensors = [filled(7, torch.bfloat16), long, torch.tensor(1.5), torch.empty(0), filled(3, torch.uint8)]
    assert value(*tensors) == slow(tensors)


def test_multipliers_are_odd_different_and_use_all_bits() -> None:
    from dist_stability.snapshot.digest import _CHUNKS, _odd

    table = _odd(0, CHUNK, torch.device("cpu"))
    assert (table & 1).all() and len(table.unique()) == CHUNK
    assert len(_odd(_CHUNKS, 64, torch.device("cpu")).unique()) == 64
    ones = torch.stack([((table >> bit) & 1).float().mean() for bit in range(1, 64)])
    assert ((ones - 0.5).abs() < 0.02).all()


def test_touches_no_random_stream() -> None:
    state = RandomState.capture()
    expected = torch.rand(1)
    state.restore()
    value(torch.ones(12345))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 1000, CHUNK * 4 + 3])
def test_same_for_every_place_in_memory(dtype: torch.dtype, count: int) -> None:
    """Live tensors, slot views, odd offsets: only the elements in logical order count."""
    tensor = filled(count, dtype)
    arena = torch.zeros(count * dtype.itemsize + 192, dtype=torch.uint8)
    expected = value(tensor)
    for offset in (0, 64, dtype.itemsize):
        view = arena[offset : offset + count * dtype.itemsize].view(dtype)
        view.copy_(tensor)
        assert value(view) == expected
    assert value(tensor.reshape(count, 1)) == expected
    spread = torch.empty(2 * count, dtype=dtype)[::2]
    spread.copy_(tensor)
    assert count == 1 or not spread.is_contiguous()
    assert value(spread) == expected


def test_logical_order_of_non_contiguous_tensors() -> None:
    square = torch.randn(6, 5)
    assert value(square.t()) == value(square.t().contiguous()) != value(square)
    image = torch.randn(2, 3, 4, 4)
    assert value(image.to(memory_format=torch.channels_last)) == value(image)
    assert value(torch.ones(1).expand(3, 3)) == value(torch.ones(3, 3))
    numbers = torch.randn(4, dtype=torch.complex64)
    assert value(numbers.conj()) == value(numbers.conj().resolve_conj()) != value(numbers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_flipped_bit(dtype: torch.dtype) -> None:
    tensor = filled(9, dtype)
    data = tensor.view(torch.uint8)
    expected = value(tensor)
    for place, bit in itertools.product(range(data.numel()), range(8)):
        if dtype != torch.bool:
            data[place] ^= 1 << bit
            assert value(tensor) != expected
            data[place] ^= 1 << bit
    assert value(tensor) == expected


@pytest.mark.parametrize("place", [0, 1, CHUNK - 1, CHUNK, CHUNK * 31, LONG_BUCKET, LONG_BUCKET + 7])
def test_a_flipped_bit_in_a_large_tensor(place: int) -> None:
    tensor = torch.zeros(LONG_BUCKET + 8, dtype=torch.int32)
    expected = value(tensor)
    for bit in (0, 15, 31):
        tensor[place] = torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        assert value(tensor) != expected
    tensor[place] = 0
    assert value(tensor) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_paired_flips_of_the_same_bit(dtype: torch.dtype) -> None:
    """What a sum, an xor or a 64-bit word with odd multipliers would miss: the same bit flipped twice."""
    tensor = filled(8, dtype)
    data = tensor.view(torch.uint8)
    expected = value(tensor)
    for bit in (0, 3, 7):
        for one, other in itertools.combinations(range(data.numel()), 2):
            data[one] ^= 1 << bit
            data[other] ^= 1 << bit
            assert value(tensor) != expected, (bit, one, other)
            data[one] ^= 1 << bit
            data[other] ^= 1 << bit
    assert value(tensor) == expected


def test_negating_any_two_numbers() -> None:
    tensor = torch.randn(64)
    expected = value(tensor)
    for one, other in itertools.combinations(range(64), 2):
        changed = tensor.clone()
        changed[[one, other]] *= -1
        assert value(changed) != expected


def test_permutations() -> None:
    tensor = torch.arange(1.0, 6.0)
    assert len({value(tensor[list(order)]) for order in itertools.permutations(range(5))}) == 120
    # Rows a whole chunk apart meet the same multipliers of the table.
    rows = torch.randn(3, CHUNK)
    assert len({value(rows[list(order)]) for order in itertools.permutations(range(3))}) == 6
    one, two = torch.randn(5), torch.randn(5)
    assert value(one, two) != value(two, one)


def test_boundaries_between_tensors() -> None:
    data = torch.randn(12)
    cuts = [value(data[:cut], data[cut:]) for cut in range(13)]
    assert len({*cuts, value(data)}) == 14
    zeros = torch.zeros(12)
    assert len({value(zeros[:cut], zeros[cut:]) for cut in range(13)} | {value(zeros)}) == 14
    # Zero-padding to words does not hide the length.
    assert len({value(torch.zeros(count, dtype=torch.uint8)) for count in range(6)}) == 6


def test_nothing_and_empty_tensors() -> None:
    assert value() == 0
    assert digest([]).dtype == torch.int64 and digest([]).shape == ()
    assert value(torch.empty(0)) == value(torch.empty(0, 7)) != value(torch.empty(0), torch.empty(0))


SIZES = st.sampled_from([0, 1, 3, 4, 5, 64, 4 * CHUNK, 4 * CHUNK + 1]) | st.integers(0, 6 * CHUNK)


@given(st.lists(SIZES, min_size=1, max_size=6), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_how_tensors_are_gathered_does_not_matter(sizes: list[int], seed: int) -> None:
    tensors = [filled(size, torch.int16, seed + index) for index, size in enumerate(sizes)]
    entries = entry_digests(tensors)
    assert entries.tolist() == [int(entry_digests([tensor])) for tensor in tensors]
    assert int(combine(entries, lengths(tensors))) == value(*tensors)


def test_more_small_tensors_than_fit_in_a_bucket() -> None:
    tensors = [filled(CHUNK, torch.int64, seed) for seed in range(SMALL_BUCKET // CHUNK + 3)]
    assert entry_digests(tensors).tolist() == [int(entry_digests([tensor])) for tensor in tensors]


def test_cost_grows_with_bytes_and_not_with_tensors() -> None:
    """1,200 small tensors: a few kernels for all that have one size, none for each."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        kernels = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            views = ("view", "slice", "alias", "detach", "as_strided", "select")
            self.kernels += not func.overloadpacket._qualified_op_name.removeprefix("aten::").startswith(views)
            return func(*args, **(kwargs or {}))

    tensors = [torch.randn(64) for _ in range(1200)]
    digest(tensors)
    with Count() as count:
        digest(tensors)
    assert count.kernels < 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_on_a_gpu_and_without_a_host_sync() -> None:
    tensors = [filled(count, dtype) for dtype in DTYPES for count in (1, 77, CHUNK * 2 + 3)]
    moved = [tensor.cuda() if index % 3 else tensor for index, tensor in enumerate(tensors)]
    digest(moved)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = digest(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.is_cuda and int(found) == value(*tensors)
