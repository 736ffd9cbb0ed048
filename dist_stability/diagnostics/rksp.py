"""Residual Koopman Spectral Profiling: how each block moves the residual stream, before training starts.

After Kim et al., arXiv 2602.22988v1. For each block a linear map is fitted from its input to its output over the tokens
of a batch, and its eigenvalues are read: many near the unit circle mean that the block hardly moves the
stream. The score, the mean share near the circle, knows nothing of the learning rate; docs/rksp.md says how far it can
be trusted, and why the baselines stand beside it.

Lifecycle of a profile. Names of blocks are checked, one forward finds out shapes, further forwards (one, unless memory
is short) add up moments in hooks; moments are summed over ranks; the eigenvalue problems are dealt out over the
ranks and the results summed, so every rank returns the same numbers. Forwards run in evaluation mode without
gradients; weights, gradients, buffers, flags, random streams, hooks and sharding are as before.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_stability import parallel
from dist_stability.diagnostics.baselines import gradient_norm, has_normalization
from dist_stability.diagnostics.blocks import (
    Candidate,
    NoBlocks,
    Recorder,
    candidates,
    channel_dimension,
    flatten,
    hint,
    named_blocks,
    tokens,
)
from dist_stability.diagnostics.moments import Moments, Sketch
from dist_stability.diagnostics.profiles import (
    DEGENERATE_BELOW,
    Baselines,
    BlockProfile,
    Profile,
    RkspWarning,
    Summary,
    assemble,
)
from dist_stability.diagnostics.quiet import quiet
from dist_stability.diagnostics.ranks import Ranks
from dist_stability.diagnostics.spectrum import (
    CONSTANT,
    NOT_FINITE,
    NOT_SOLVED,
    NUMBERS,
    Fit,
    Masses,
    NoSpectrum,
    Spectrum,
    eigenvalues,
    spectrum,
)

__all__ = ["Baselines", "BlockProfile", "Fit", "Masses", "NoBlocks", "Profile", "RkspWarning", "Summary", "profile"]

WIDEST_FULL_FIT = 2048
_WIDE_RANK = 256
_OVERSAMPLING = 8
_PROBLEMS = ("", "no finite token", CONSTANT, NOT_FINITE, NOT_SOLVED)


@dataclass(frozen=True, slots=True)
class _Site:
    """One transition: a call of a block in a forward."""

    name: str
    call: int
    width: int
    channel: int
    count: int

    @property
    def label(self) -> str:
        return f"{self.name}#{self.call}" if self.call else self.name


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """What the caller wants profiled, and how a forward of it is run."""

    model: nn.Module
    module: nn.Module
    batch: Any
    loss_fn: Callable[[Any, Any], Any] | None
    mask: Tensor | None
    max_tokens: int | None
    seed: int
    ranks: Ranks

    def forward(self, blocks: Mapping[str, nn.Module], receive: Callable[[str, int, Tensor, Tensor], None]) -> None:
        """One forward, with the ends of the blocks handed to ``receive``."""
        with quiet(self.module, self.seed), Recorder(self.module, blocks, receive):
            if self.loss_fn is not None:
                self.loss_fn(self.module, self.batch)
            elif isinstance(self.batch, Mapping):
                self.module(**self.batch)
            elif isinstance(self.batch, (tuple, list)):
                self.module(*self.batch)
            else:
                self.module(self.batch)

    def select(self, rows: Tensor) -> Tensor:
        """The tokens that count, of (tokens, width): those of the mask, and of these at most this rank's share."""
        if self.mask is not None:
            rows = rows[self.mask.reshape(-1).to(rows.device)]
        if self.max_tokens is None:
            return rows
        share = -(-self.max_tokens // self.ranks.size)
        if len(rows) <= share:
            return rows
        draw = torch.Generator().manual_seed(self.seed * 1000003 + self.ranks.rank)
        return rows[torch.randperm(len(rows), generator=draw)[:share].sort().values.to(rows.device)]


def profile(
    model: nn.Module,
    blocks: Sequence[str] | None,
    batch: Any,
    *,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    fit: Fit | None = None,
    tau: float = 0.1,
    mask: Tensor | None = None,
    max_tokens: int | None = None,
    memory: int = 2 << 30,
    with_eigenvalues: bool = False,
    seed: int = 0,
) -> Profile:
    """Profile a model as it is now. Every rank calls it, with its own part of the data.

    Use a batch with many different tokens, at least 8 for each dimension of the hidden state (real text, or random
    tokens; never one repeated phrase), and call it at a step boundary.

    Collectives: two or three small all-reduces, those of the model's forwards (under FSDP and tensor parallelism), and
    for each block an all-reduce of 3 d^2 + 2 d + 5 float64 numbers in two pieces. With eigenvalues one more.

    Args:
        model: As the training loop holds it: plain, DDP, FSDP1, ``fully_shard``, HSDP, tensor parallel, compiled.
        blocks: Names of modules without wrappers ("layers.0"), or None to find them: see ``blocks.candidates``. Input
            and output of a block must have one shape; of hidden states other than (..., width) the width is dimension 1
            where the block's convolutions say so.
        batch: This rank's data. A mapping is passed as keywords, a tuple or list as arguments, anything else as the
            one argument; with a ``loss_fn`` as it is.
        loss_fn: ``loss_fn(model, batch)`` gives the loss, a 0-d tensor, and calls the model once. Needed for the
            gradient norm, and for models that are not called with the batch alone.
        fit: How blocks are fitted. None: "numerical-rank", and for blocks wider than 2,048 "pca" with at most 256
            dimensions (then labelled truncated).
        tau: Largest residual of a mode that the filter keeps.
        mask: Which tokens count (padding does not), bool, of the shape of the hidden states without their width.
        max_tokens: Use at most so many tokens of all ranks together, drawn from ``seed``. Default all.
        memory: Bytes of sums on the device of the model at a time (at least one block's). Fewer need more forwards.
        with_eigenvalues: Keep the eigenvalues themselves, for a picture of them, in ``Profile.eigenvalues``; they are
            computed once more.
        seed: Of every random stream meanwhile.

    Raises:
        NoBlocks: No blocks were found, names are wrong, or none keeps the shape of its input.
        ValueError: A setting is out of range, or under FSDP gradients exist although a gradient norm is wanted.
        LockstepError: The ranks disagree, or another one raised.

    Warns:
        RkspWarning: On rank 0, once for each of ``Profile.warnings``.
    """
    ranks = Ranks(model)
    call = _Call(model, parallel.forward_module(model), batch, loss_fn, mask, max_tokens, seed, ranks)
    error: Exception | None = None
    found: tuple[Candidate, ...] = ()
    try:
        _check(call, tau, memory)
        found = _targets(model, blocks)
    except (ValueError, TypeError) as wrong:
        error = wrong
    settings = (
        *(blocks and list(blocks), fit, tau, max_tokens, memory, with_eigenvalues, seed),
        *(loss_fn is None, mask is None),
    )
    ranks.agree(repr(settings), error, "rksp.profile")

    sites: list[_Site] = []
    skipped: dict[str, str] = {}
    try:
        sites, skipped = _sites(call, found, by_name=blocks is not None)
    except Exception as wrong:
        if parallel.has_collectives(model) and not isinstance(wrong, NoBlocks):
            raise  # the other ranks may be inside the forward: an all-reduce here would meet an all-gather there
        error = wrong
    ranks.agree(repr([(site.label, site.width) for site in sites]), error, "rksp.profile")

    counts = ranks.sum(torch.tensor([float(site.count) for site in sites], dtype=torch.float64)) / ranks.copies
    fits = [fit or _default_fit(site.width, int(count)) for site, count in zip(sites, counts.tolist(), strict=True)]
    modules = flatten(found)
    done: list[BlockProfile] = []
    kept: dict[str, tuple[tuple[float, float], ...]] | None = {} if with_eigenvalues else None
    for group in _groups(sites, fits, fit is None, memory):
        done += _measure(call, modules, [(sites[place], fits[place]) for place in group], fit is None, tau, kept)
    norm = None if loss_fn is None else gradient_norm(model, loss_fn, batch, ranks, seed)
    has_norm = has_normalization(modules[site.name] for site in sites)
    result = replace(assemble(done, skipped, norm, has_norm, fit, tau, ranks.size), eigenvalues=kept or {})
    if ranks.rank == 0:
        for each in result.warnings:
            warnings.warn(f"rksp.profile: {each}", RkspWarning, stacklevel=2)
    return result


def _check(call: _Call, tau: float, memory: int) -> None:
    if not 0 < tau < math.inf:
        raise ValueError(f"rksp.profile: tau must be a positive number, got {tau}")
    if memory < 1:
        raise ValueError(f"rksp.profile: memory must be a positive number of bytes, got {memory}")
    if call.max_tokens is not None and call.max_tokens < 2:
        raise ValueError(f"rksp.profile: max_tokens must be at least 2, got {call.max_tokens}")
    if call.mask is not None and call.mask.dtype != torch.bool:
        raise ValueError(f"rksp.profile: mask must be bool (True where a token counts), got {call.mask.dtype}")
    if call.loss_fn is None or not parallel.has_collectives(call.model):
        return
    # Such a model cannot be differentiated without writing `.grad`.
    parallel.reshard(call.model)
    if any(parameter.grad is not None for parameter in call.model.parameters()):
        raise ValueError(
            f"rksp.profile: rank {call.ranks.rank} holds gradients, and measuring the gradient norm of a sharded "
            "model would mix with them: call optimizer.zero_grad() first, or leave out loss_fn"
        )


def _targets(model: nn.Module, blocks: Sequence[str] | None) -> tuple[Candidate, ...]:
    if blocks is not None:
        return tuple(Candidate(name, module, ()) for name, module in named_blocks(model, blocks).items())
    found = candidates(model)
    if not found:
        raise NoBlocks(f"rksp.profile: found no list of like modules in {type(model).__name__}; {hint(model)}")
    return found


def _sites(call: _Call, found: tuple[Candidate, ...], by_name: bool) -> tuple[list[_Site], dict[str, str]]:
    """Run once to see which candidates keep the shape of their input, and how often each is called."""
    modules = flatten(found)
    seen: dict[str, list[_Site]] = {}
    reasons: dict[str, str] = {}

    def look(name: str, number: int, before: Tensor, after: Tensor) -> None:
        if before.shape != after.shape:
            reasons[name] = f"its input is {list(before.shape)}, its output {list(after.shape)}"
            return
        channel = channel_dimension(modules[name], before)
        positions = list(before.movedim(channel, -1).shape[:-1])
        if call.mask is not None and list(call.mask.shape) != positions:
            raise ValueError(
                f"rksp.profile: mask has the shape {list(call.mask.shape)}, the hidden states of {name!r} have "
                f"{positions} positions; pass a mask of that shape"
            )
        count = len(call.select(tokens(before, channel)))
        calls = seen.setdefault(name, [])
        if number < len(calls):  # a later forward of the same loss_fn adds tokens to the same transition
            old = calls[number]
            calls[number] = _Site(name, number, old.width, channel, old.count + count)
        else:
            calls.append(_Site(name, number, before.shape[channel], channel, count))

    call.forward(modules, look)
    for name in modules:
        if name not in seen:
            reasons.setdefault(name, "it was not called, or has no tensor as first input and output")
    chosen = [each.name for each in found if each.name in seen] if by_name else _choose(found, seen)
    missing = {name: reasons[name] for name in reasons if name in {each.name for each in found}}
    if not chosen or (by_name and missing):
        said = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise NoBlocks(f"rksp.profile: a block's input and output must have one shape. {said}")
    inside = set(chosen)
    skipped = {
        name: reason for name, reason in reasons.items() if not any(name.startswith(f"{each}.") for each in inside)
    }
    return [site for name in chosen for site in seen[name]], skipped


def _choose(found: Sequence[Candidate], seen: Mapping[str, object]) -> list[str]:
    """Whole lists of blocks if every member keeps its shape; else what is inside them; else the members that do."""
    chosen: list[str] = []
    groups: dict[str, list[Candidate]] = {}
    for each in found:
        groups.setdefault(each.name.rpartition(".")[0], []).append(each)
    for members in groups.values():
        good = [each.name for each in members if each.name in seen]
        if len(good) < len(members):
            good = _choose([inner for each in members for inner in each.inside], seen) or good
        chosen += good
    return chosen


def _default_fit(width: int, count: int) -> Fit:
    if width <= WIDEST_FULL_FIT:
        return Fit()
    return Fit("pca", rank=max(1, min(_WIDE_RANK, count // 8)))


def _sketched(site: _Site, default: bool) -> bool:
    return default and site.width > WIDEST_FULL_FIT


def _basis_size(site: _Site, fit: Fit) -> int:
    return min(site.width, fit.rank + _OVERSAMPLING)


def _groups(sites: list[_Site], fits: list[Fit], default: bool, memory: int) -> list[list[int]]:
    """Which sites are summed in one forward, in order, so that their sums fit the memory."""
    groups: list[list[int]] = [[]]
    used = 0
    for place, (site, fit) in enumerate(zip(sites, fits, strict=True)):
        if _sketched(site, default):
            size = _basis_size(site, fit)
            need = Sketch.nbytes(site.width, size) + Moments.nbytes(size)
        else:
            need = Moments.nbytes(site.width)
        if groups[-1] and used + need > memory:
            groups.append([])
            used = 0
        groups[-1].append(place)
        used += need
    return groups


def _measure(
    call: _Call,
    modules: Mapping[str, nn.Module],
    group: list[tuple[_Site, Fit]],
    default: bool,
    tau: float,
    kept: dict[str, tuple[tuple[float, float], ...]] | None,
) -> list[BlockProfile]:
    """Sum, reduce and solve some sites; ``kept`` receives their eigenvalues, if there is one."""
    ranks = call.ranks
    hooked = {site.name: modules[site.name] for site, _ in group}
    places = {(site.name, site.call): place for place, (site, _) in enumerate(group)}
    sketches = {
        place: Sketch(site.width, _basis_size(site, fit), ranks.device, call.seed)
        for place, (site, fit) in enumerate(group)
        if _sketched(site, default)
    }

    def rows(name: str, number: int, stream: Tensor) -> Tensor:
        return call.select(tokens(stream, group[places[name, number]][0].channel))

    if sketches:

        def sketch(name: str, number: int, before: Tensor, after: Tensor) -> None:
            if places.get((name, number)) in sketches:
                sketches[places[name, number]].add(rows(name, number, before))

        call.forward(hooked, sketch)
    bases = {place: sketch.basis(ranks) for place, sketch in sketches.items()}
    sums = [Moments(site.width, ranks.device, bases.get(place)) for place, (site, _) in enumerate(group)]

    def add(name: str, number: int, before: Tensor, after: Tensor) -> None:
        if (name, number) in places:
            sums[places[name, number]].add(rows(name, number, before), rows(name, number, after))

    call.forward(hooked, add)
    table = torch.zeros(len(group), 1 + 2 * NUMBERS, dtype=torch.float64)
    for place, (moments, (_, fit)) in enumerate(zip(sums, group, strict=True)):
        moments.reduce(ranks)
        if place % ranks.size == ranks.rank:
            table[place] = torch.tensor(_solve(moments, fit, tau), dtype=torch.float64)
    solved = ranks.sum(table).tolist()
    if kept is not None:
        found = torch.zeros(len(group), 2, max(site.width for site, _ in group), dtype=torch.float64)
        for place, (moments, (_, fit)) in enumerate(zip(sums, group, strict=True)):
            if place % ranks.size == ranks.rank and not solved[place][0]:
                values = eigenvalues(moments.covariances(), fit)
                found[place, :, : len(values)] = torch.stack([values.real, values.imag])
        for (site, _), row, (real, imaginary) in zip(group, solved, ranks.sum(found).tolist(), strict=True):
            modes = _solved(row)[0].rank
            kept[site.label] = tuple(zip(real[:modes], imaginary[:modes], strict=True))
    return [_block(site, fit, moments, row) for (site, fit), moments, row in zip(group, sums, solved, strict=True)]


def _solve(moments: Moments, fit: Fit, tau: float) -> list[float]:
    """A row for the table: number of the problem, then values and, since no NaN travels, what they stand for."""
    empty = [0.0] * (2 * NUMBERS)
    if moments.count < 2:
        return [1.0, *empty]
    try:
        numbers = spectrum(moments.covariances(), fit, tau).numbers()
    except NoSpectrum as problem:
        return [float(_PROBLEMS.index(str(problem))), *empty]
    finite = [value if math.isfinite(value) else 0.0 for value in numbers]
    return [0.0, *finite, *(1.0 if math.isnan(value) else 2.0 * math.isinf(value) for value in numbers)]


def _solved(row: list[float]) -> tuple[Spectrum, str]:
    """Undo :func:`_solve`; no number is ever negative, so there is one infinity."""
    problem = _PROBLEMS[int(row[0])]
    kinds = [math.nan] * NUMBERS if problem else [(0.0, math.nan, math.inf)[int(kind)] for kind in row[1 + NUMBERS :]]
    return Spectrum.of([value + kind for value, kind in zip(row[1 : 1 + NUMBERS], kinds, strict=True)]), problem


def _block(site: _Site, fit: Fit, moments: Moments, row: list[float]) -> BlockProfile:
    found, problem = _solved(row)
    x, y, update = moments.squares.tolist()
    return BlockProfile(
        name=site.label,
        width=site.width,
        tokens=round(moments.count),
        dropped=round(moments.dropped),
        rank=found.rank,
        truncated=fit.truncates,
        masses=found.masses,
        filtered=found.filtered,
        kept=found.kept,
        radius=found.radius,
        condition=found.condition,
        fit_ratio=found.fit_ratio,
        kreiss=found.kreiss,
        transient=found.transient,
        whitened_update=found.whitened_update,
        relative_update=math.sqrt(update / x) if x > 0 else math.nan,
        gain=math.sqrt(y / x) if x > 0 else math.nan,
        degenerate=found.whitened_update < DEGENERATE_BELOW,
        problem=problem,
    )
