"""Koopman Spectral Shaping: a penalty that keeps the eigenvalues of blocks from growing, added to the training loss.

After Kim et al., arXiv 2602.22988v1, section on KSS; what that leaves open, and how little of its claim was
reproduced, is in docs/rksp.md.

Lifecycle of a step, on every rank: a schedule equal on all ranks says which blocks; hooks note their inputs
while ``loss_fn`` runs the model; each block is run once more on its detached input (or its output taken as it is);
ranks agree on which penalties are usable; their mean is added to the loss. Then the caller makes the one backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dist_stability import parallel
from dist_stability.diagnostics.blocks import (
    NoBlocks,
    candidates,
    channel_dimension,
    hint,
    named_blocks,
    stream_in,
    stream_out,
    tokens,
)
from dist_stability.diagnostics.penalty import REASONS, Cost, Skip, attached, small_map, spectral_cost
from dist_stability.diagnostics.ranks import Ranks
from dist_stability.errors import StabilityError
from dist_stability.snapshot.rng import forked

__all__ = ["BROAD", "LOCAL", "PAPER", "Applied", "Shaping", "SpectralShaping"]

# What transformers' decoder layers keep between calls; a second forward must not write into it.
_CACHES = ("past_key_value", "past_key_values", "layer_past", "cache_params")


@dataclass(frozen=True, slots=True)
class Shaping:
    """The settings.

    Attributes:
        alpha: Weight of the mean penalty in the loss, > 0.
        every: Applied at steps 0, every, 2 every, ...
        layers: Share of the blocks, drawn anew at each application, 0 < layers <= 1; at least one.
        local: Run a block again on its detached input, so that only its own parameters feel its penalty. Otherwise
            the gradient goes on through the blocks before it, which can shrink the output instead.
        rank: Leading directions of a block's input in which its map is fitted; at most one for ``tokens_each`` tokens.
        tokens_each: Tokens of this rank that a direction needs, at least 1.
        max_tokens: Tokens of this rank used for a fit, drawn anew at each application.
        beta: Weight of the near-unit share within a penalty, >= 0.
        gamma: Near-unit share aimed at, in [0, 1].
        seed: Of all draws; with the step it decides them, equally on every rank.
    """

    alpha: float = 0.15
    every: int = 1
    layers: float = 1.0
    local: bool = True
    rank: int = 32
    tokens_each: int = 8
    max_tokens: int = 2048
    beta: float = 1.0
    gamma: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: A setting is out of range; the message names it.
        """
        rules = {
            "alpha": (0 < self.alpha < math.inf, "a positive number"),
            "every": (self.every >= 1, "at least 1"),
            "layers": (0 < self.layers <= 1, "above 0 and at most 1"),
            "rank": (self.rank >= 1, "at least 1"),
            "tokens_each": (self.tokens_each >= 1, "at least 1"),
            "max_tokens": (self.max_tokens >= self.tokens_each, f"at least tokens_each = {self.tokens_each}"),
            "beta": (0 <= self.beta < math.inf, "at least 0"),
            "gamma": (0 <= self.gamma <= 1, "between 0 and 1"),
        }
        for name, (fits, range_) in rules.items():
            if not fits:
                raise ValueError(f"SpectralShaping: {name} must be {range_}, got {getattr(self, name)}")


LOCAL = Shaping()
"""What changed spectra as intended in our runs: every step, all blocks, local."""

BROAD = Shaping(rank=256, tokens_each=4, beta=0.0)
"""As LOCAL in every direction that has four tokens, up to 256, and against large moduli only. Ours: in directions that
are not fitted, spectra grow as without shaping."""

PAPER = Shaping(every=10, layers=0.5, local=False)
"""The schedule and weight of the paper. beta, and what is detached, it does not say."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What happened at one step.

    Attributes:
        step: Number of the call, from 0.
        blocks: Whose penalty was added; empty where the schedule says nothing is.
        skipped: Blocks left out on all ranks because of any, and why.
        penalty: What was added to this rank's loss; its rank's own, as its loss is.
    """

    step: int
    blocks: tuple[str, ...]
    skipped: Mapping[str, str]
    penalty: float


class SpectralShaping:
    """Adds the spectral penalty of blocks to a loss.

    ``loss = shaping(loss_fn, batch); loss.backward()`` in place of ``loss = loss_fn(model, batch)``. Keep clipping
    gradients: that did more for stability than this, and both go together.

    For plain models, DDP, FSDP2 and HSDP. Each rank fits the tokens it has; gradients are averaged over ranks as
    those of the loss are. Each call on which it is applied enters one small all-reduce, in which ranks agree on
    skips, after the model's forward; under FSDP2 also an all-gather for each block that is run again.

    Attributes:
        blocks: Names of all blocks.
        last: The last call, or None.
        skips: How often blocks were skipped, by reason, equal on every rank.
    """

    moved_by_forward = True
    """For a controller's ``extra_state``: a refused step's call is taken back, too."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[str] | None = None, *, preset: Shaping = LOCAL, **changes: Any
    ) -> None:
        """Find the blocks and check that they can be shaped. One small all-reduce, in which ranks agree on settings.

        Args:
            model: As the training loop calls it, wrappers included, not compiled.
            blocks: Names without wrappers ("layers.0"); None for the outermost lists of like modules.
            preset: :data:`LOCAL`, :data:`BROAD` or :data:`PAPER`, or settings of one's own.
            **changes: Settings that differ from the preset: ``SpectralShaping(model, alpha=0.1, every=10)``.

        Raises:
            NoBlocks: No blocks were found, or names are wrong.
            ValueError: A setting is out of range.
            StabilityError: The model is compiled, or local shaping is not possible for the way it is sharded.
            LockstepError: The ranks disagree.
        """
        self.model = model
        self.settings = preset
        self.last: Applied | None = None
        self.skips: dict[str, int] = dict.fromkeys(REASONS, 0)
        self._step = 0
        self._wanted: Callable[[], bool] = lambda: True
        self._ranks = Ranks(model)
        self._blocks: dict[str, nn.Module] = {}
        error: Exception | None = None
        try:
            self.settings = replace(preset, **changes)
            self._blocks = _shapeable(model, blocks, self.settings.local)
        except (ValueError, TypeError, StabilityError) as wrong:
            error = wrong
        self._ranks.agree(f"{self.settings} for {list(self._blocks)}", error, "SpectralShaping")
        self.blocks = tuple(self._blocks)
        # Under FSDP2 an input that needs a gradient lets the block be resharded right after its second backward;
        # otherwise all blocks would stay gathered until the main backward comes to them.
        self._sharded = parallel.has_collectives(model)

    def __call__(self, loss_fn: Callable[[Any, Any], Tensor], batch: Any) -> Tensor:
        """The loss with the penalty, a 0-d tensor for one ``backward()``. Every rank calls it. Counts as one step.

        While it is switched off (:meth:`follow`) it is ``loss_fn(model, batch)`` and nothing else, and counts as none.

        Args:
            loss_fn: ``loss_fn(model, batch)`` gives the training loss; of several forwards the first is shaped.
            batch: Passed on.

        Raises:
            NoBlocks: A block was not called, changed the shape of its input, or wrote into it.
        """
        if not self._wanted():
            return loss_fn(self.model, batch)
        step, names = self._step, self.chosen(self._step)
        with _Watch({name: self._blocks[name] for name in names}) as watch:
            loss = loss_fn(self.model, batch)
        # Not before the forward: as that begins, a controller notes what a refusal goes back to.
        self._step += 1
        if not names:
            self.last = Applied(step, (), {}, 0.0)
            return loss
        missing = [name for name in names if name not in watch.seen]
        if missing:
            raise NoBlocks(
                f"SpectralShaping: the model did not call {', '.join(missing)} with a tensor, or got none of the same "
                f"shape back; pass the names of blocks that keep the shape. {hint(self.model)}"
            )
        priced: dict[str, tuple[Tensor, Cost]] = {}
        reasons: dict[str, str] = {}
        for name in names:
            try:
                priced[name] = self._priced(name, watch.seen[name], step)
            except Skip as reason:
                reasons[name] = str(reason)
        skipped = self._agreed(names, reasons)
        kept = {name: priced[name] for name in names if name not in skipped}
        if not kept:
            self.last = Applied(step, (), skipped, 0.0)
            return loss
        weight = self.settings.alpha / len(kept)
        value = weight * math.fsum(cost.value for _, cost in kept.values())
        self.last = Applied(step, tuple(kept), skipped, value)
        penalty = weight * torch.stack([attached(matrix, cost) for matrix, cost in kept.values()]).sum()
        return loss + penalty.to(loss.device).to(loss.dtype)

    def follow(self, wanted: Callable[[], bool]) -> None:
        """From now on shape only where ``wanted()`` says so: the same at each call on every rank."""
        self._wanted = wanted

    def chosen(self, step: int) -> tuple[str, ...]:
        """The blocks of a step, equal on all ranks; none where the schedule says so."""
        if step % self.settings.every:
            return ()
        count = max(1, round(self.settings.layers * len(self.blocks)))
        draw = torch.Generator().manual_seed(_mixed(self.settings.seed, step, 0))
        places = torch.randperm(len(self.blocks), generator=draw)[:count].sort().values
        return tuple(self.blocks[place] for place in places.tolist())

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, and what was counted. For ``extra_state`` of a controller, and for checkpoints."""
        return {"step": self._step, "skips": dict(self.skips)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._step = int(state["step"])
        self.skips = {reason: int(state["skips"].get(reason, 0)) for reason in REASONS}

    def _priced(self, name: str, seen: _Seen, step: int) -> tuple[Tensor, Cost]:
        """The map of a block, and what it costs.

        Raises:
            Skip: There is none.
        """
        x, y = seen.x, seen.y
        if self.settings.local:
            # Before anything is found wrong: other ranks may be inside this block's all-gather.
            x, y = self._again(self._blocks[name], seen, step)
        elif not y.requires_grad:
            raise NoBlocks(
                f"SpectralShaping: the output of {name!r} has no gradient (no_grad, frozen weights, or reentrant "
                "activation checkpointing); train it, or use local=True"
            )
        channel = channel_dimension(self._blocks[name], x)
        draw = torch.Generator().manual_seed(_mixed(self.settings.seed, step, 2 + self.blocks.index(name)))
        with torch.autocast(x.device.type, enabled=False):
            flat_x, flat_y = tokens(x.detach(), channel), tokens(y, channel)
            if len(flat_x) > self.settings.max_tokens:
                places = torch.randperm(len(flat_x), generator=draw)[: self.settings.max_tokens].to(x.device)
                flat_x, flat_y = flat_x[places], flat_y[places]
            matrix = small_map(flat_x, flat_y, self.settings.rank, draw, self.settings.tokens_each)
            return matrix, spectral_cost(matrix, self.settings.beta, self.settings.gamma)

    def _again(self, block: nn.Module, seen: _Seen, step: int) -> tuple[Tensor, Tensor]:
        """Run a block on its detached input, as in evaluation: no dropout, no moved statistics, no draws that stay."""
        x = seen.x.detach()
        if self._sharded:
            x.requires_grad_()

        def detached(value: Any) -> Any:
            return x if value is seen.x else value.detach() if isinstance(value, Tensor) else value

        args, kwargs = pytree.tree_map(detached, (seen.args, seen.kwargs))
        kwargs = {name: None if name in _CACHES else value for name, value in kwargs.items()}
        flags = [(part, part.training) for part in block.modules()]
        try:
            for part, _ in flags:
                part.training = False
            with forked(_mixed(self.settings.seed, step, 1)), seen.autocast():
                y = stream_out(block(*args, **kwargs))
        finally:
            for part, training in flags:
                part.training = training
        assert y is not None  # the first time it returned one
        return x, y

    def _agreed(self, names: Sequence[str], reasons: Mapping[str, str]) -> dict[str, str]:
        """Blocks that any rank has to skip, with the first reason in order, and count them. One all-reduce."""
        table = torch.zeros(len(names), len(REASONS), dtype=torch.float64)
        for name, reason in reasons.items():
            table[names.index(name), REASONS.index(reason)] = 1.0
        table = self._ranks.sum(table)
        skipped = {name: REASONS[int(row.argmax())] for name, row in zip(names, table, strict=True) if row.any()}
        for reason in skipped.values():
            self.skips[reason] += 1
        return skipped


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """One call of a block: the stream before and after, with its graph, and how it was called."""

    x: Tensor
    y: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast_dtype: torch.dtype | None

    def autocast(self) -> torch.autocast:
        """Autocast as it was then."""
        return torch.autocast(self.x.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)


class _Watch:
    """Notes the first call of each block while it is entered as a context.

    Attributes:
        seen: By name; blocks that were not called, or did not keep the shape of a tensor, are absent.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self.seen: dict[str, _Seen] = {}
        self._blocks = blocks
        self._versions: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for name, block in self._blocks.items():
            self._handles.append(block.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._handles.append(block.register_forward_hook(self._after(name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = stream_in(args, kwargs)
            if x is not None:
                self._versions.setdefault(name, x._version)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x, y = stream_in(args, kwargs), stream_out(output)
            if name in self.seen or x is None or y is None or x.shape != y.shape:
                return
            if x._version != self._versions[name]:
                raise NoBlocks(
                    f"SpectralShaping: {name!r} writes into its input, so what went in is not known; make its first "
                    "in-place operation an ordinary one"
                )
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            self.seen[name] = _Seen(x, y, args, kwargs, dtype)

        return hook


def _shapeable(model: nn.Module, blocks: Sequence[str] | None, local: bool) -> dict[str, nn.Module]:
    found = {each.name: each.module for each in candidates(model)} if blocks is None else named_blocks(model, blocks)
    if not found:
        raise NoBlocks(f"SpectralShaping: found no list of like modules in {type(model).__name__}. {hint(model)}")
    if parallel.is_compiled(model):
        raise StabilityError(
            f"SpectralShaping: rank {parallel.this_rank()}: the model is compiled, and hooks that come and go would "
            "compile it again at every step; shape the model before it is compiled"
        )
    parallel.reshard(model)
    for name, block in found.items():
        if local and not parallel.standalone(model, block):
            raise StabilityError(
                f"SpectralShaping: rank {parallel.this_rank()}: local shaping runs {name!r} by itself, and its "
                f"parameters are gathered elsewhere ({parallel.describe(model)}); call fully_shard on each block, or "
                "use local=False (FSDP1 and tensor parallelism: only that)"
            )
    return found


def _mixed(seed: int, step: int, use: int) -> int:
    """A seed for one use at one step."""
    return ((seed * 1_000_003 + step) * 4096 + use) % 2**62
