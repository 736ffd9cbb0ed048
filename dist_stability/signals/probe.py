"""The probe: one number measured on data the optimizer never sees.

Lifecycle. The controller makes one measurement before training, y(theta_0), and one for each proposal, on every rank
that takes part in the model's forward. It passes what ``parallel.forward_module`` returned.

A measurement leaves no trace, whether it succeeds or fails: train/eval flags, random streams, buffers and gradients are
as before, FSDP modules are left sharded, autocast's cache of casts empty. It is a fixed function of weights and
buffers, even where ``loss_fn`` draws random numbers.

Failure. An exception is a result, not an event: ``measure`` returns it. What it means depends on where it was raised.
Before or after a forward, the rank runs the forwards that its peers are waiting in and is then free to vote "no".
Inside a forward that contains collectives nothing can be done: the peers sit in an all-gather that will not come, and
the job has to stop.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from dist_stability.parallel import has_collectives, reshard
from dist_stability.signals.forwards import Call, ForwardCountError, RootForwards
from dist_stability.signals.scalar import as_scalar
from dist_stability.snapshot.buffers import BufferCopies
from dist_stability.snapshot.rng import forked

LossFn = Callable[[Any, Any], Any]

_INDIVISIBLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What one measurement gave on this rank.

    Attributes:
        value: 0-d float64 tensor on the device of the loss, or None after an error. May be NaN or infinite.
        error: What was raised. Its traceback has no local variables left: they would keep activations alive.
        inside_forward: The error left a forward unfinished. Peers may be inside its collectives.
        owed: Peers may be waiting in forwards that this rank has not run and cannot run: the error came inside a
            forward, or before any measurement was complete. Never for a model without collectives.
    """

    value: Tensor | None
    error: Exception | None = None
    inside_forward: bool = False
    owed: bool = False


@dataclass(slots=True)
class _Known:
    """What the probe keeps about the model it measures."""

    model: nn.Module
    buffers: BufferCopies
    collectives: bool
    record: tuple[Call, ...] | None = None


class LossProbe:
    """Mean of a loss over a small fixed set of held-out batches.

    The set is read once, here, and kept; batches are passed to ``loss_fn`` as they are, so put them on the device
    the model computes on. Keep it small: a probe costs about ``|probe| / (3 |batch|)`` of a training step.

    ``loss_fn`` must call ``model(...)`` itself, the same number of times in each measurement. It may leave autograd,
    eval mode and seeds alone: they are set for it. If it enters collectives of its own outside the model's forward
    (a loss parallelized over vocabulary), a rank that fails before them leaves its peers waiting until the timeout.

    For a model whose forward contains collectives the inputs of the first measurement's forwards are kept, too
    (references, not copies: if ``loss_fn`` makes new tensors from the batch, one set of those stays alive).

    State that modules keep outside parameters and buffers (a Python counter, a cache) is not put back.
    """

    def __init__(
        self, loss_fn: LossFn, batches: Iterable[Any], *, seed: int = 0, batch_statistics: bool = False
    ) -> None:
        """Check and keep the arguments; measures nothing yet.

        Args:
            loss_fn: ``loss_fn(model, batch)`` returns a 0-d tensor or a float; lower is better.
            batches: Non-empty, finite iterable of batches, for example ``[(x, y)]``. Consumed once.
            seed: Seed of all random streams during a measurement, 0 <= seed < 2**32.
            batch_statistics: BatchNorm normalizes with the probe batch's own mean and variance where it does so in
                training (not where it is frozen in eval mode). Its running ones lag some ten steps behind the weights,
                so that a healthy step can look like harm, in the first steps of a run above all; but what is wrong
                with them alone is then not seen. For batches of 64 examples or more. Not for ``SyncBatchNorm``, which
                would enter collectives.

        Raises:
            TypeError: An argument has the wrong type; the message says which and what to pass.
            ValueError: No batches, or a seed out of range.
        """
        if not callable(loss_fn):
            hint = "loss_fn and batches look swapped: LossProbe(loss_fn, batches)" if callable(batches) else ""
            raise TypeError(
                f"LossProbe: loss_fn must be a function loss_fn(model, batch) -> 0-d tensor, got {_kind(loss_fn)}. "
                f"{hint or 'Pass the function first, then the batches.'}"
            )
        if isinstance(batches, (str, bytes, Tensor, Mapping)) or not isinstance(batches, Iterable):
            raise TypeError(
                f"LossProbe: batches must be an iterable of batches, got {_kind(batches)}. "
                "For a single batch pass a list that holds it: LossProbe(loss_fn, [batch])."
            )
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"LossProbe: seed must be an int, got {_kind(seed)}.")
        if not 0 <= seed < 2**32:
            raise ValueError(f"LossProbe: seed must be 0 <= seed < 2**32, got {seed}.")
        if not isinstance(batch_statistics, bool):
            raise TypeError(f"LossProbe: batch_statistics must be True or False, got {batch_statistics!r}.")
        kept = tuple(batches)
        if not kept:
            raise ValueError(
                "LossProbe: batches is empty: a probe needs at least one held-out batch. (An iterator that was used up "
                "before looks like this, too; a loader with drop_last may have nothing left.)"
            )
        self.loss_fn = loss_fn
        self.batches = kept
        self.seed = seed
        self.batch_statistics = batch_statistics
        self._known: _Known | None = None

    def share(self, index: int, count: int) -> LossProbe:
        """The part of the probe set that data replica ``index`` of ``count`` measures (``probe_on="mean"``).

        Whole batches are dealt out if their number is a multiple of ``count``, else every batch is cut along
        dimension 0 of its tensors (views; other leaves such as numbers and strings are passed whole). Shares are equal
        in number and shape for every index. The mean over shares equals the value of the whole set for losses that
        are means over examples.

        Raises:
            ValueError: The set cannot be shared equally; the message has the sizes.
        """
        if not 0 <= index < count:
            raise ValueError(f"LossProbe.share: index must be 0 <= index < count, got index {index} of {count}.")
        if count == 1:
            return self
        dealt = None
        if len(self.batches) % count == 0:
            shapes = [_shapes(self.batches[each::count]) for each in range(count)]
            if all(shape == shapes[0] for shape in shapes):
                dealt = self.batches[index::count]
        if dealt is None:
            try:
                dealt = tuple(_cut(batch, number, index, count) for number, batch in enumerate(self.batches))
            except ValueError as reason:
                even = "are a multiple, but differ in shape" if len(self.batches) % count == 0 else "are no multiple"
                raise ValueError(
                    f"LossProbe: probe_on='mean' shares the probe set over {count} data replicas, but the "
                    f"{len(self.batches)} batches {even}, and they cannot be cut: {reason}. Give {count} batches of "
                    f"one shape (or a multiple of {count}), or batches with a multiple of {count} examples, or use "
                    "probe_on='rank0'."
                ) from None
        return LossProbe(self.loss_fn, dealt, seed=self.seed, batch_statistics=self.batch_statistics)

    def check(self, model: nn.Module) -> None:
        """Whether this model can be measured at all; enters no collective.

        Raises:
            TypeError: It contains ``SyncBatchNorm``, and is to be measured with batch statistics.
        """
        if self.batch_statistics and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            raise TypeError(
                "LossProbe: batch_statistics=True, but the model contains SyncBatchNorm, which takes them over all "
                "ranks, while one may measure alone. Leave it False: then the running statistics are used."
            )

    def describe(self) -> dict[str, Any]:
        """What must be equal on ranks that measure together: settings, and dtypes and shapes of batches. JSON-able."""
        return {"seed": self.seed, "batch_statistics": self.batch_statistics, "batches": _shapes(self.batches)}

    def measure(self, model: nn.Module) -> Reading:
        """Measure the model as it is now. No host sync, except for those ``loss_fn`` makes.

        Enters the collectives of the model's forward, once per forward that ``loss_fn`` makes, and those of reducing
        the loss if it is a DTensor that is not replicated. Every rank of the model must call this together.

        Args:
            model: What ``parallel.forward_module`` returned.

        Returns:
            The value, or the exception that ``loss_fn`` raised.

        Raises:
            TypeError: ``model`` is not a module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"LossProbe.measure: model must be a torch.nn.Module, got {_kind(model)}.")
        known = self._know(model)
        with ExitStack() as undo:  # undone in reverse order, every step of it, whatever happens
            undo.enter_context(torch.no_grad())
            # Inside an autocast region the casts of the weights made before the step are stale now, as those made here
            # would be after a rollback. (In older versions of torch those made here would lack autograd, too.)
            undo.callback(torch.clear_autocast_cache)
            torch.clear_autocast_cache()
            # FSDP may hold gathered copies of the weights from before the step, and would keep ours.
            undo.callback(reshard, model)
            reshard(model)
            known.buffers.capture()
            undo.callback(known.buffers.restore)
            modules = list(model.modules())
            undo.callback(_set_training, modules, [module.training for module in modules])
            modes = [self.batch_statistics and isinstance(each, _BatchNorm) and each.training for each in modules]
            undo.enter_context(forked(self.seed))
            at_most = None if known.record is None else len(known.record)
            forwards = RootForwards(model, keep=known.collectives, at_most=at_most if known.collectives else None)
            undo.enter_context(forwards)
            try:
                value = self._mean(model, modules, modes, forwards, known)
            except Exception as error:
                return _failed(error, model, modules, modes, forwards, known)
        if known.record is None:
            known.record = tuple(forwards.calls)
        return Reading(value)

    def _know(self, model: nn.Module) -> _Known:
        if self._known is None or self._known.model is not model:
            self._known = _Known(model, BufferCopies(model), has_collectives(model))
        return self._known

    def _mean(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        modes: Sequence[bool],
        forwards: RootForwards,
        known: _Known,
    ) -> Tensor:
        total: Tensor | None = None
        for number, batch in enumerate(self.batches):
            _set_training(modules, modes)
            try:
                value = as_scalar(self.loss_fn(model, batch), "the result of the probe's loss_fn")
            except Exception as error:
                error.add_note(f"raised by the probe, in batch {number} of {len(self.batches)} (counted from 0)")
                raise
            total = value if total is None else total + value
        assert total is not None  # there is at least one batch
        if known.collectives and forwards.unfinished:
            raise RuntimeError(
                "the probe's loss_fn caught an exception that the model raised inside its forward; the model contains "
                "collectives, so the other ranks are left inside them. Let it be raised."
            )
        if known.record is not None and len(forwards.calls) < len(known.record) and known.collectives:
            raise ForwardCountError(
                f"loss_fn called the model {len(forwards.calls)} times, {len(known.record)} times in its first "
                "measurement. The number of forwards must not depend on the weights or on chance: other ranks wait in "
                "the missing ones."
            )
        return total / len(self.batches)


def _failed(
    error: Exception,
    model: nn.Module,
    modules: Sequence[nn.Module],
    modes: Sequence[bool],
    forwards: RootForwards,
    known: _Known,
) -> Reading:
    """Run the forwards that peers wait in, if that is possible, and say what happened."""
    # The frames of loss_fn hold its activations: without them an out-of-memory error would repeat itself below.
    traceback.clear_frames(error.__traceback__)
    if not known.collectives:
        return Reading(None, error, inside_forward=forwards.unfinished)
    if forwards.unfinished:
        return Reading(None, error, inside_forward=True, owed=True)
    # An empty record: loss_fn calls parts of the model, and what peers wait in was never seen.
    if not known.record:
        return Reading(None, error, owed=True)
    try:
        _set_training(modules, modes)
        for args, kwargs in known.record[len(forwards.calls) :]:
            model(*args, **kwargs)
    except Exception as second:
        second.add_note("raised while running the forwards that other ranks wait in, after the error above")
        return Reading(None, second, inside_forward=True, owed=True)
    return Reading(None, error)


def _set_training(modules: Iterable[nn.Module], flags: Iterable[bool]) -> None:
    """Write the flags one by one.

    Not by ``model.train(mode)``: modules override it to do more (keep a frozen BatchNorm in eval, merge adapter
    weights), and one call for the whole tree cannot bring back a mixture.
    """
    for module, training in zip(modules, flags, strict=False):
        if module.training is training:
            continue
        if type(module).__setattr__ is nn.Module.__setattr__ and "training" in vars(module):
            vars(module)["training"] = training  # what that would do in the end
        else:
            module.training = training


def _shapes(batches: Iterable[Any]) -> list[list[str]]:
    return [[_shape(leaf) for leaf in pytree.tree_leaves(batch)] for batch in batches]


def _shape(leaf: object) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    shape = getattr(leaf, "shape", None)
    return f"{type(leaf).__name__}{list(shape) if isinstance(shape, tuple) else ''}"


def _cut(batch: Any, number: int, index: int, count: int) -> Any:
    """The index-th of ``count`` pieces of a batch. Raises ValueError with the reason, without a full stop."""
    leaves, structure = pytree.tree_flatten(batch)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_INDIVISIBLE)):
            raise ValueError(f"batch {number} has a {type(leaf).__name__}, and only tensors can be cut")
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in tensors}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(str(list(leaf.shape)) for leaf in tensors) or "no tensors"
        raise ValueError(f"batch {number} has no common first dimension ({shapes})")
    size = tensors[0].shape[0]
    if size == 0 or size % count:
        raise ValueError(f"batch {number} has {size} examples, not a multiple of {count}")
    length = size // count
    pieces = [leaf.narrow(0, index * length, length) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(pieces, structure)


def _kind(value: object) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
