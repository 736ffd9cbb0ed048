"""What the wrappers of a model mean for the one who calls it: what to call, with whom it talks, which data it sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from . import _fsdp1, _fsdp2
from ._classes import DDP, FSDP1, FSDP2, compiled_inner
from .layout import around
from .tensors import is_dtensor


def forward_module(model: nn.Module) -> nn.Module:
    """The module a probe calls: the same function as the model, without DDP's collectives.

    DDP broadcasts buffers in a forward, in eval mode too, and after a forward without gradients it
    leaves that broadcast out of the next one, a training forward; so its inner module is called.
    ``torch.compile`` inside DDP stays compiled; compiled around DDP it is left out with it. FSDP and tensor-parallel
    models are returned as they are: their collectives are part of the function.
    """
    inner = compiled_inner(model)
    unwrapped = model if inner is None else inner
    return unwrapped.module if isinstance(unwrapped, DDP) else model


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DDP, FSDP1, ``torch.compile`` and activation checkpoint wrappers, however they are stacked.

    For looking at structure and for hooks; a forward belongs to the wrapper.
    """
    while True:
        inner = compiled_inner(module)
        if inner is None and isinstance(module, (DDP, FSDP1)):
            inner = module.module
        if inner is None:
            inner = getattr(module, "_checkpoint_wrapped_module", None)
        if inner is None:
            return module
        module = inner


def is_compiled(model: nn.Module) -> bool:
    """Whether any module of the tree runs compiled, wrapped by ``torch.compile`` or by its own ``compile()``."""
    return any(
        compiled_inner(part) is not None or getattr(part, "_compiled_call_impl", None) is not None
        for part in model.modules()
    )


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module was written as; ``fully_shard`` gives it a subclass of its own."""
    kind = type(module)
    first, *others = kind.__bases__
    return others[0] if len(others) == 1 and issubclass(first, FSDP2) else kind


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module but the wrappers of :func:`unwrapped`, each once, by its name in the model without wrappers."""
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child, part in module.named_children():
            yield from walk(f"{name}.{child}" if name else child, part)

    yield from walk("", model)


def standalone(model: nn.Module, part: nn.Module) -> bool:
    """Whether a forward of this part of the model, right after the model's own, finds whole parameters to work with.

    Always without sharding. Under FSDP2 if ``fully_shard`` was applied to the part itself (or to parts of it that have
    all its parameters between them). Never under FSDP1 or tensor parallelism. Ask while the model is sharded.
    """
    if _fsdp1.units(model):
        return False
    own = {id(parameter) for parameter in _fsdp2.parameters(part)}
    return all(id(parameter) in own or not is_dtensor(parameter) for parameter in part.parameters())


def has_collectives(model: nn.Module) -> bool:
    """Whether a forward of ``forward_module(model)`` enters collectives, so that every rank must run it."""
    module = forward_module(model)
    return any(isinstance(part, DDP) for part in module.modules()) or _shards(module) or _has_dtensors(module)


def reshard(model: nn.Module) -> None:
    """Put every FSDP module back to its sharded state, as before its first forward.

    Call it at a step boundary (never between forward and backward) before parameters are read or written by way of
    the optimizer's handles. Enters no collective; does nothing for other models, and costs an all-gather in the next
    forward where FSDP had kept parameters gathered.
    """
    if not _distributed():
        return
    _fsdp1.reshard(model)
    _fsdp2.reshard(model)


def data_replica(model: nn.Module) -> tuple[int, int]:
    """Which slice of the data this rank sees.

    Returns:
        Index of this rank's data replica and the number of replicas. Tensor-parallel ranks of one replica share an
        index. (0, 1) in a single process.
    """
    if not _distributed():
        return 0, 1
    for unit in _fsdp1.units(model):
        between = _fsdp1.replicas_group(unit)
        inside, size = unit.process_group.rank(), unit.process_group.size()
        return (inside, size) if between is None else (between.rank() * size + inside, between.size() * size)
    for group in _fsdp2.groups(model):
        mesh = group.mesh_info.mesh
        return _row_major(list(zip(mesh.get_coordinate(), mesh.mesh.shape, strict=True)))
    for part in model.modules():
        if isinstance(part, DDP):
            return part.process_group.rank(), part.process_group.size()
    for tensor in _dtensors(model):  # tensor parallel: what its mesh leaves out of the job's is data parallel
        whole, outside = around(tensor.device_mesh)
        place = (whole == dist.get_rank()).nonzero()[0].tolist()
        return _row_major([(place[axis], whole.shape[axis]) for axis in outside])
    return dist.get_rank(), dist.get_world_size()


def forward_groups(model: nn.Module) -> list[Any]:
    """The process groups in which a forward of ``forward_module(model)`` may communicate, each once.

    A group in which only the backward of an HSDP model communicates may be among them.
    """
    if not _distributed():
        return []
    found: dict[int, Any] = {}
    module = forward_module(model)
    for part in module.modules():
        if isinstance(part, DDP):
            found[id(part.process_group)] = part.process_group
    for unit in _fsdp1.units(module):
        found[id(unit.process_group)] = unit.process_group
    meshes = [group.mesh_info.mesh for group in _fsdp2.groups(module)]
    meshes += [tensor.device_mesh for tensor in _dtensors(module)]
    for mesh in meshes:
        for group in mesh.get_all_groups():
            found[id(group)] = group
    return list(found.values())


def describe(model: nn.Module) -> str:
    """The kind of parallelism, for messages and summaries: ddp, fsdp1, fsdp2, hsdp, tp, fsdp2+tp, ... or single."""
    parts: list[str] = []
    if any(isinstance(part, DDP) for part in model.modules()):
        parts.append("ddp")
    fsdp1, fsdp2 = _fsdp1.units(model), list(_fsdp2.groups(model))
    if fsdp1:
        parts.append("fsdp1" if _fsdp1.replicas_group(fsdp1[0]) is None else "hsdp")
    if fsdp2:
        parts.append("hsdp" if fsdp2[0].mesh_info.mesh.ndim > 1 else "fsdp2")
    # Under FSDP2 every parameter is a DTensor; tensor parallelism shows as mesh dimensions that FSDP2 does not have.
    data_dimensions = fsdp2[0].mesh_info.mesh.ndim if fsdp2 else 0
    if any(tensor.device_mesh.ndim > data_dimensions for tensor in _dtensors(model)):
        parts.append("tp")
    return "+".join(parts) or "single"


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _shards(model: nn.Module) -> bool:
    return bool(_fsdp1.units(model) or _fsdp2.units(model))


def _dtensors(model: nn.Module) -> list[Any]:
    # FSDP2's own handles come first: a gathered module shows plain parameters in their place.
    return [*_fsdp2.parameters(model), *(parameter for parameter in model.parameters() if is_dtensor(parameter))]


def _has_dtensors(model: nn.Module) -> bool:
    return bool(_dtensors(model))


def _row_major(places: list[tuple[int, int]]) -> tuple[int, int]:
    """Index and number of the cells of a grid, from place and size along each dimension; (0, 1) without dimensions."""
    index, count = 0, 1
    for place, size in places:
        index, count = index * size + place, count * size
    return index, count
