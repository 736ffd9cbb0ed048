"""The digest sees what it promises to see, and is the same wherever it is computed."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_stability.bench.engine.counting import allocations
from dist_stability.snapshot import RandomState, digest
from dist_stability.snapshot.digest import (
    CHUNK,
    LONG_BUCKET,
    SMALL_BUCKET,
    FixedSums,
    Sums,
    combine,
    entry_digests,
    lengths,
    select,
)

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


# ---------------------------------------------------------------------- again and again


def laid_out(sizes: list[int], gaps: list[int]) -> list[torch.Tensor]:
    """Random bytes: tensors of these sizes in one piece of memory, each after a gap."""
    data = filled(sum(sizes) + sum(gaps), torch.uint8)
    found, start = [], 0
    for size, gap in zip(sizes, gaps, strict=True):
        start += gap
        found.append(data[start : start + size])
        start += size
    return found


SIZE = st.sampled_from([0, 4, 8, 8, 8, 12, 256, 256, 256, 8 * CHUNK, 8 * CHUNK + 12])
GAP = st.sampled_from([0] * 9 + [4, 8])


@given(st.lists(st.tuples(SIZE, GAP), min_size=1, max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_neighbours_are_read_in_place_and_count_the_same(places: list[tuple[int, int]], draw: random.Random) -> None:
    """Whether rows begin at words or not, in any order, also when the bytes are others by then."""
    tensors = laid_out([size for size, _ in places], [gap for _, gap in places])
    draw.shuffle(tensors)
    sums = FixedSums(tensors)
    for _ in range(2):
        assert sums.now().tolist() == [int(entry_digests([tensor.clone()])) for tensor in tensors]
        for tensor in tensors:
            tensor ^= 77


def test_neighbours_of_one_size_are_not_gathered() -> None:
    tensors = laid_out([256] * 100, [0] * 100)
    assert [part.rows is not None for _, part in FixedSums(tensors)._parts] == [True]
    assert [part.rows is not None for _, part in Sums(tensors)._parts] == [False]
    # More than fit in a bucket: several parts, none of them gathered.
    many = laid_out([8 * CHUNK] * 11, [0] * 11)
    parts = [part for _, part in FixedSums(many)._parts]
    assert len(parts) == -(-11 * CHUNK // SMALL_BUCKET) and all(part.rows is not None for part in parts)


def test_tensors_that_end_where_another_memory_begins() -> None:
    """Next to each other by address is not enough: a view cannot reach from one piece of memory into the next."""
    whole = filled(64, torch.uint8)
    first, second = whole[:32], torch.frombuffer(memoryview(whole.numpy())[32:], dtype=torch.uint8)
    assert first.data_ptr() + 32 == second.data_ptr()
    sums = FixedSums([first, second])
    assert [part.rows for _, part in sums._parts] == [None]
    assert sums.now().tolist() == entry_digests([first.clone(), second.clone()]).tolist()


def test_lazily_conjugated_and_negated_tensors_beside_others() -> None:
    numbers = torch.randn(3, 4, dtype=torch.complex64)
    lazy = [numbers[0], numbers[1].conj(), numbers[2].conj().imag, numbers[0].real]
    assert lazy[1].is_conj() and lazy[2].is_neg()
    expected = entry_digests([tensor.resolve_conj().resolve_neg().clone() for tensor in lazy])
    assert entry_digests(lazy).tolist() == FixedSums(lazy).now().tolist() == expected.tolist()


def assorted() -> list[torch.Tensor]:
    """Small and long, of every dtype and alignment, single and many, not contiguous, empty."""
    tensors = [filled(count, dtype) for dtype in DTYPES for count in (1, 1, 6, 64, 64)]
    tensors += [filled(CHUNK * 4 + 3, torch.float32), filled(CHUNK * 17 + 8, torch.uint8)[3:], torch.empty(0)]
    tensors += [torch.randn(4, 5).t(), torch.randn(4, 5).t(), torch.tensor(1.0), torch.tensor(2.0)]
    return tensors + laid_out([4] * 5 + [16] * 5, [0] * 10)


@pytest.mark.parametrize("kind", [Sums, FixedSums])
def test_nothing_is_allocated_the_second_time(kind: type[Sums]) -> None:
    tensors = assorted()
    sums, sizes = kind(tensors), lengths(tensors)
    out, whole = torch.empty(len(tensors), dtype=torch.int64), torch.empty((), dtype=torch.int64)
    members = tuple(range(1, len(tensors), 2))

    def again() -> None:
        sums.of(tensors, out)
        combine(out, sizes, whole)
        combine(select(out, members), [sizes[index] for index in members], whole)

    again()
    assert allocations(torch.device("cpu"), again) == (0, 0)
    assert out.tolist() == [int(entry_digests([tensor])) for tensor in tensors]


def test_other_threads_do_not_disturb() -> None:
    """Each has temporaries of its own; torch lets go of the interpreter's lock while it computes."""
    sets = [
        [filled(CHUNK * 4 + 3, torch.int64, seed), *(filled(900, torch.int32, seed + 9 * i) for i in range(40))]
        for seed in range(4)
    ]
    expected = [entry_digests(tensors).tolist() for tensors in sets]
    start = threading.Barrier(4)

    def many(tensors: list[torch.Tensor]) -> list[list[int]]:
        start.wait()
        return [entry_digests(tensors).tolist() for _ in range(30)]

    with ThreadPoolExecutor(4) as threads:
        for found, one in zip(threads.map(many, sets), expected, strict=True):
            assert found == [one] * 30


def test_first_under_inference_mode() -> None:
    """What is made there cannot be written to elsewhere."""
    tensors = assorted()

    def both() -> tuple[list[int], list[int]]:
        with torch.inference_mode():
            inside = entry_digests(tensors).tolist()
        return inside, entry_digests(tensors).tolist()

    with ThreadPoolExecutor(1) as thread:  # a thread has no temporaries yet
        inside, outside = thread.submit(both).result()
    assert inside == outside


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_do_not_disturb_each_other_on_a_gpu() -> None:
    """Digests of two streams at once, each while the other's temporaries are in use."""
    sets = [
        [filled(LONG_BUCKET * 2, torch.int64, seed).cuda(), *(filled(99, torch.int8, 3 * i).cuda() for i in range(50))]
        for seed in (1, 2)
    ]
    expected = [entry_digests(tensors).tolist() for tensors in sets]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in sets]
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for stream, tensors, kept in zip(streams, sets, found, strict=True):
            with torch.cuda.stream(stream):
                kept.append(entry_digests(tensors))
    torch.cuda.synchronize()
    assert [[each.tolist() for each in kept] for kept in found] == [[one] * 20 for one in expected]
