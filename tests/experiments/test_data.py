"""The order of the data depends on the seed and the batch number, on nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_stability.experiments.data import BatchOrder, Distorted, Images, Subset, Windows, evenly


def order(**changes: int) -> BatchOrder:
    given_ = {"examples": 100, "batch_size": 24, "seed": 3, **changes}
    return BatchOrder(given_.pop("examples"), given_.pop("batch_size"), **given_)


@settings(deadline=None, max_examples=60)
@given(
    number=st.integers(0, 40),
    count=st.sampled_from([1, 2, 3, 4, 6]),
    accumulate=st.sampled_from([1, 2]),
    seed=st.integers(0, 5),
)
def test_the_global_batch_is_the_same_for_any_number_of_processes(
    number: int, count: int, accumulate: int, seed: int
) -> None:
    alone = torch.cat(order(seed=seed).micro_batches(number))
    shares = [order(seed=seed, index=i, count=count, accumulate=accumulate).micro_batches(number) for i in range(count)]
    assert {len(share) for share in shares} == {accumulate}
    assert {len(piece) for share in shares for piece in share} == {24 // count // accumulate}
    assert torch.equal(torch.cat([piece for share in shares for piece in share]), alone)


def test_a_batch_does_not_depend_on_what_was_read_before() -> None:
    straight, jumping = order(), order()
    batches = [straight.global_batch(number) for number in range(12)]
    for number in (11, 0, 5, 5, 4, 9):
        assert torch.equal(jumping.global_batch(number), batches[number])


def test_the_order_leaves_the_global_random_streams_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    order().global_batch(9)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_sees_no_example_twice_and_the_next_one_is_shuffled_anew() -> None:
    batches = order()
    first, second = (torch.cat([batches.global_batch(4 * epoch + i) for i in range(4)]) for epoch in range(2))
    assert len(first.unique()) == len(second.unique()) == 96
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.cat([order(seed=4).global_batch(i) for i in range(4)]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 101}, "does not fit"),
        ({"batch_size": 0}, "does not fit"),
        ({"count": 5}, "not divisible by 5 replicas"),
        ({"accumulate": 7}, "x 7 micro-batches"),
        ({"index": 2, "count": 2}, "replica 2 of 2"),
    ],
)
def test_sizes_that_cannot_work_are_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        order(**changes)


def test_the_target_of_a_window_is_the_next_token() -> None:
    windows = Windows(torch.arange(20), context=5)
    inputs, targets = windows.batch(torch.tensor([0, 14]))
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [14, 15, 16, 17, 18]]
    assert torch.equal(targets, inputs + 1)
    assert len(windows) == 15  # the last one starts at 14


def test_images_are_scaled_and_normalized_per_channel() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    images = Images(pixels, torch.tensor([7]), mean=(0.5, 0.25), std=(0.5, 0.25))
    values, labels = images.batch(torch.tensor([0]))
    assert values.flatten().tolist() == [-1.0, 3.0]
    assert labels.tolist() == [7]


def test_distortions_are_many_fixed_and_small() -> None:
    spot = torch.zeros(2, 1, 32, 32)
    spot[0, 0, 12:20, 12:20] = 1.0
    spot[1, 0, 10:22, 14:18] = 1.0
    images = Images(spot, torch.tensor([3, 5]), mean=(0.0,), std=(1.0,))
    distorted = Distorted(images, 50, seed=4)
    pixels, labels = distorted.batch(torch.arange(100))
    assert len(distorted) == 100 and labels.tolist() == [3] * 50 + [5] * 50
    again, _ = Distorted(images, 50, seed=4).batch(torch.tensor([7, 63]))
    assert torch.equal(again, pixels[[7, 63]])
    assert len({image.numpy().tobytes() for image in pixels}) == 100
    # The middle of the spot moves by an eighth of the picture at most, and its area changes by the two scales.
    columns = torch.arange(32.0)
    middle = (pixels.sum(dim=(1, 2)) * columns).sum(1) / pixels.sum(dim=(1, 2, 3))
    assert 2.5 < (middle - 15.5).abs().max() < 4 * 1.25 + 0.5
    area = pixels[:50].sum(dim=(1, 2, 3)) / spot[0].sum()
    assert 0.6 < area.min() < 0.8 and 1.2 < area.max() < 1.5


def test_a_probe_is_spread_evenly() -> None:
    assert evenly(10, 4).tolist() == [0, 2, 5, 7]
    half = Subset(Windows(torch.arange(20), 5), torch.arange(10, 15))
    assert half.batch(evenly(len(half), 2))[0][:, 0].tolist() == [10, 12]
    with pytest.raises(ValueError, match="cannot take 11"):
        evenly(10, 11)
