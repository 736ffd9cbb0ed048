"""Which parts of a model are its blocks, and what goes into and comes out of them.

A block is a whole transition of the residual stream (attention and MLP together): a module whose input and output are
one tensor each, of the same shape. Hooks go to the modules themselves, inside every wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from dist_stability import parallel

Receive = Callable[[str, int, Tensor, Tensor], None]
"""Called with the name of a block, the number of its call within one forward of the model, its input and output."""

_STREAM_NAMES = ("hidden_states", "x", "src", "tgt", "input", "inputs", "hidden", "residual")


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A module that looks like a block, and those inside it that do."""

    name: str
    module: nn.Module
    inside: tuple[Candidate, ...]


class NoBlocks(ValueError):
    """No blocks were found, or not the ones that were asked for."""


def candidates(model: nn.Module) -> tuple[Candidate, ...]:
    """Members of the model's lists of like modules, outermost lists first, in the order of the model.

    A list is a ``ModuleList`` or a ``Sequential``; its members count that have parameters and modules of their own and
    share their class with another member (in a ``ModuleList``, also single ones). So the layers of
    ``nn.TransformerEncoder`` are found, the ``h``, ``layers`` or ``blocks`` of the models of Hugging Face and timm, and
    residual stages; heads of a single layer and MLPs are not.
    """
    return _inside("", parallel.unwrapped(model))


def named_blocks(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of these names, as in the model without wrappers ("layers.0", not "module.layers.0").

    Raises:
        NoBlocks: No names, a name twice, or one that is no module; the message names candidates.
    """
    if isinstance(names, str) or not names:
        raise NoBlocks(f"blocks must be a list of names of modules, or None to find them; got {names!r}. {hint(model)}")
    known = dict(parallel.named_modules(model))
    missing = [name for name in names if not name or name not in known]
    if missing:
        raise NoBlocks(
            f"the model has no module {', '.join(map(repr, missing))} (names are those without wrappers). {hint(model)}"
        )
    if len(set(names)) < len(names):
        raise NoBlocks(f"blocks has a name twice: {sorted({name for name in names if list(names).count(name) > 1})}")
    return {name: known[name] for name in names}


def flatten(found: Iterable[Candidate]) -> dict[str, nn.Module]:
    """All candidates of all levels by name."""
    every: dict[str, nn.Module] = {}
    for each in found:
        every[each.name] = each.module
        every.update(flatten(each.inside))
    return every


def hint(model: nn.Module) -> str:
    """What a user may pass as ``blocks``, as a sentence."""
    names = [each.name for each in candidates(model)]
    if not names:
        return "Pass names of modules whose input and output have one shape, as in dict(model.named_modules())."
    return f"Candidates: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}."


def stream_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The residual stream among a block's arguments: the first floating-point tensor, or the keyword that says so."""
    named = [kwargs[name] for name in _STREAM_NAMES if name in kwargs]
    return next((value for value in (*args, *named) if _is_stream(value)), None)


def stream_out(output: Any) -> Tensor | None:
    """The residual stream in a block's output: itself, or the first element of a tuple, list or mapping."""
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if _is_stream(output) else None


def channel_dimension(block: nn.Module, stream: Tensor) -> int:
    """The dimension of a hidden state that is its width: the last, or 1 where convolutions say so.

    On images a convolution of the block that takes as many channels as dimension 1 has; on sequences the same, unless
    a linear or normalization layer works on the last dimension.
    """
    last = stream.shape[-1]
    convolutions = [
        part
        for part in block.modules()
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and len(part.kernel_size) + 2 == stream.ndim
    ]
    if not any(part.in_channels == stream.shape[1] for part in convolutions):
        return -1
    if stream.ndim == 3:
        for part in block.modules():
            shape = getattr(part, "normalized_shape", None)
            if (isinstance(part, nn.Linear) and part.in_features == last) or (shape and shape[-1] == last):
                return -1
    return 1


def tokens(stream: Tensor, channel: int) -> Tensor:
    """A hidden state as (tokens, width). All-gathers a DTensor."""
    whole: Any = stream
    if parallel.is_dtensor(whole):
        whole = whole.full_tensor()
    rows: Tensor = whole.movedim(channel, -1)
    return rows.reshape(-1, rows.shape[-1])


class Recorder:
    """Hands over input and output of blocks while it is entered as a context; removes its hooks on leaving.

    What blocks do to their input in place is not seen: a copy of it is made first. Calls are counted from 0 in each
    outermost forward of the root.
    """

    def __init__(self, root: nn.Module, blocks: Mapping[str, nn.Module], receive: Receive) -> None:
        """Prepare; nothing is hooked yet."""
        self._root, self._blocks, self._receive = root, blocks, receive
        self._calls: dict[str, int] = {}
        self._inputs: dict[str, list[Tensor | None]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        """Hook."""
        self._handles.append(self._root.register_forward_pre_hook(lambda *_: self._calls.clear(), prepend=True))
        for name, block in self._blocks.items():
            self._inputs[name] = []
            self._handles.append(block.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._handles.append(block.register_forward_hook(self._after(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = stream_in(args, kwargs)
            self._inputs[name].append(None if stream is None else stream.detach().clone())

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            before, after = self._inputs[name].pop(), stream_out(output)
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            if before is not None and after is not None:
                self._receive(name, call, before, after)

        return hook


def _is_stream(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def _inside(name: str, module: nn.Module) -> tuple[Candidate, ...]:
    found: list[Candidate] = []
    children = [
        (f"{name}.{child}" if name else child, parallel.unwrapped(part)) for child, part in module.named_children()
    ]
    chosen = _members(module, [part for _, part in children])
    for path, part in children:
        inside = _inside(path, part)
        found.extend([Candidate(path, part, inside)] if id(part) in chosen else inside)
    return tuple(found)


def _members(container: nn.Module, children: list[nn.Module]) -> set[int]:
    """Which children of a container are blocks, by id."""
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        return set()
    composite = [part for part in children if _is_composite(part)]
    kinds = [parallel.original_class(part) for part in composite]
    least = 1 if isinstance(container, nn.ModuleList) else 2
    return {id(part) for part, kind in zip(composite, kinds, strict=True) if kinds.count(kind) >= least}


def _is_composite(part: nn.Module) -> bool:
    parts = [parallel.unwrapped(child) for child in part.children()]
    if isinstance(part, (nn.Sequential, nn.ModuleList)):  # of single layers: an MLP, not a block
        parts = [inner for child in parts for inner in child.children()]
    return bool(parts) and next(part.parameters(), None) is not None
