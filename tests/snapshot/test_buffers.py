"""Buffers come back with content and identity, whatever a forward did to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_stability.snapshot import BufferCopies


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("plain", torch.arange(6.0).reshape(2, 3))
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nothing", None)
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("empty", torch.empty(0))
        self.inner = nn.BatchNorm1d(3)


def image(module: nn.Module) -> dict[str, Any]:
    everything = dict(module.named_buffers(remove_duplicate=False))
    return {name: (id(tensor), tensor.dtype, tensor.stride(), tensor.tolist()) for name, tensor in everything.items()}


def spoil(module: nn.Module) -> None:
    for buffer in module.buffers():
        buffer.copy_(torch.ones_like(buffer) if buffer.dtype == torch.bool else buffer + 7)


def test_content_in_place() -> None:
    module = Holder()
    copies, before = BufferCopies(module), image(module)
    copies.capture()
    spoil(module)
    assert image(module) != before
    copies.restore()
    assert image(module) == before
    spoil(module)
    copies.restore()  # any number of times
    assert image(module) == before


def test_training_forward_of_batch_norm() -> None:
    module = Holder()
    copies, before = BufferCopies(module), image(module)
    copies.capture()
    module.inner(torch.randn(5, 3))
    assert image(module) != before
    copies.restore()
    assert image(module) == before


def test_clones_are_made_once() -> None:
    module = Holder()
    copies = BufferCopies(module)
    copies.capture()
    addresses = [copy.content.data_ptr() for copy in copies._copies.values()]
    size = copies.nbytes
    spoil(module)
    after = image(module)
    copies.capture()
    assert [copy.content.data_ptr() for copy in copies._copies.values()] == addresses
    assert copies.nbytes == size == sum(b.numel() * b.element_size() for b in module.buffers())
    spoil(module)
    copies.restore()
    assert image(module) == after


def test_a_replaced_buffer_is_put_back() -> None:
    module = Holder()
    copies, before = BufferCopies(module), image(module)
    copies.capture()
    module.count = module.count + 1
    module.plain = torch.zeros(2, 3)
    copies.restore()
    assert image(module) == before
    assert "count" in module.state_dict() and "passing" not in module.state_dict()


def test_set_to_none_and_from_none() -> None:
    module = Holder()
    copies, before = BufferCopies(module), image(module)
    copies.capture()
    module.plain = None
    module.nothing = torch.ones(2)
    copies.restore()
    assert image(module) == before and module.nothing is None


def test_registered_or_removed_after_the_capture() -> None:
    module = Holder()
    copies, before = BufferCopies(module), image(module)
    copies.capture()
    module.register_buffer("late", torch.ones(1), persistent=False)
    del module.plain
    module.plain = "something else"
    copies.restore()
    assert image(module) == before
    assert "late" not in module._non_persistent_buffers_set
    copies.capture()
    spoil(module)
    copies.restore()
    assert image(module) == before


def test_shared_buffers_stay_shared() -> None:
    one, two = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    two.running_mean = one.running_mean
    module = nn.ModuleList([one, two])
    copies = BufferCopies(module)
    copies.capture()
    assert len(copies._copies) == 5
    two.running_mean = two.running_mean + 1
    copies.restore()
    assert one.running_mean is two.running_mean and two.running_mean.tolist() == [0, 0, 0]


def test_views_of_one_storage() -> None:
    module, storage = nn.Module(), torch.arange(8.0)
    module.register_buffer("front", storage[:5])
    module.register_buffer("back", storage[3:])
    copies = BufferCopies(module)
    copies.capture()
    storage.zero_()
    copies.restore()
    assert storage.tolist() == list(range(8))


def test_a_resized_buffer() -> None:
    module = Holder()
    copies, before = BufferCopies(module), image(module)
    copies.capture()
    module.plain.resize_(4, 4).fill_(9)
    copies.restore()
    assert image(module) == before


def test_modules_added_after_the_first_capture() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3))
    copies = BufferCopies(module)
    copies.capture()
    module.append(nn.BatchNorm1d(3))
    copies.capture()
    before = image(module)
    module(torch.randn(4, 3))
    copies.restore()
    assert image(module) == before


def test_a_compiled_and_a_shared_module() -> None:
    inner = nn.BatchNorm1d(3)
    module = torch.compile(nn.Sequential(inner, inner))
    copies, before = BufferCopies(module), image(module)
    copies.capture()
    inner(torch.randn(4, 3))
    copies.restore()
    assert image(module) == before


def sharded(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    module = nn.Module()
    shard = torch.full((2 - rank, 3), float(rank))
    module.register_buffer(
        "table", DTensor.from_local(shard, init_device_mesh("cpu", (world,)), [Shard(0)], shape=(3, 3), stride=(3, 1))
    )
    kept = module.table
    copies = BufferCopies(module)
    copies.capture()
    module.table.to_local().fill_(9)
    module.table = module.table + 1
    copies.restore()
    assert module.table is kept and torch.equal(kept.to_local(), torch.full((2 - rank, 3), float(rank)))


def test_a_dtensor_buffer(two: Any) -> None:
    two.run(sharded)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp1", "fsdp2"])
def test_wrapped_models(two: Any, wrapper: str) -> None:
    two.run(_wrapped, wrapper)


def _wrapped(rank: int, world: int, wrapper: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model: nn.Module
    if wrapper == "ddp":
        model = DistributedDataParallel(net)
    elif wrapper == "fsdp1":
        model = FullyShardedDataParallel(net, device_id=torch.device("cpu"))
    else:
        model = fully_shard(net)
    copies = BufferCopies(model)
    model(torch.randn(4, 3))
    copies.capture()
    before = image(model)
    model(torch.randn(4, 3))
    assert image(model) != before
    copies.restore()
    assert image(model) == before
