"""What a diagnosis looks at, from names on the command line: a model, its batches, its loss and its optimizer.

The contract, each name written ``module:attribute`` and imported with the current folder on the path:

* ``--model``: ``model()`` gives an ``nn.Module``, unwrapped, in the mode in which it trains. Called from ``--seed`` on
  every rank, perhaps more than once: the same seed, the same weights.
* ``--data``: ``data()`` gives an iterable of batches, which may be endless. Called from ``--seed`` on every rank: the
  same batches everywhere, of which rank r of n takes every n-th, beginning with the r-th.
* ``--loss``: ``loss(model, batch)`` gives the training loss, a 0-d tensor with a graph. Without it a batch is a tuple
  of tensors whose last one is the target, and the loss is the cross entropy over the last dimension of
  ``model(*inputs)``.
* ``--optimizer``: sgd, adamw, or ``module:factory``, called as ``factory(model, lr)`` after the model was wrapped.

Order of use, alike on every rank: :func:`add_options`, then :func:`load`, which imports and tries everything on this
rank alone, before there is a process group; then, within :meth:`Factories.processes`, which starts the group,
:meth:`Factories.build` as often as needed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from dist_stability.diagnostics.blocks import candidates
from dist_stability.diagnostics.ranks import Ranks
from dist_stability.experiments.wrapping import Processes, processes, wrap
from dist_stability.snapshot.rng import forked

PARALLEL = ("single", "ddp", "fsdp2")

LossFn = Callable[[Any, Any], Tensor]


class FactoryError(ValueError):
    """Something the command line names cannot be used; the message says what to change."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """One model, wrapped for its ranks, and its optimizer."""

    model: nn.Module
    optimizer: Optimizer


@dataclass(frozen=True, slots=True, eq=False)
class Factories:
    """What was loaded; has been tried on this rank.

    Attributes:
        loss_fn: ``loss_fn(model, batch)``.
        batches: This rank's, on its device: as many as were asked for, or as there are. Equally many on every rank.
        parallel: "single", "ddp" or "fsdp2".
        device: "cpu" or "cuda".
        seed: Of the weights.
        settings: What the command line said, JSON-able, for ``summary.json``.
    """

    loss_fn: LossFn
    batches: tuple[Any, ...]
    parallel: str
    device: str
    seed: int
    settings: dict[str, Any]
    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[nn.Module], Optimizer]

    @contextmanager
    def processes(self) -> Iterator[Processes]:
        """Start the process group that ``parallel`` needs, and end it.

        Collectives: the group's rendezvous, and one all-reduce.

        Raises:
            LockstepError: The ranks were given different settings, or numbers or shapes of batches.
        """
        with processes(self.parallel, self.device, _environment("LOCAL_RANK", 0)) as here:
            shapes = tree_map(lambda leaf: list(leaf.shape) if isinstance(leaf, Tensor) else None, self.batches)
            Ranks(nn.Identity()).agree(f"{self.settings}, batches {shapes}", None, "diagnose")
            yield here

    def build(self, here: Processes, seed: int | None = None) -> Subject:
        """Make the model from a seed, wrap it, and make its optimizer.

        Args:
            here: From :meth:`processes`.
            seed: Of the weights; default ``--seed``.

        Collectives: those of the wrapper. FSDP2 shards the model's blocks one by one, and what is left.
        """
        model = _seeded(self.make_model, self.seed if seed is None else seed).to(here.device)
        blocks = [each.module for each in candidates(model)]
        model = wrap(model, blocks, self.parallel, dtype=torch.float32, here=here)
        return Subject(model, self.make_optimizer(model))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`load` reads."""
    parser.add_argument("--model", required=True, metavar="MODULE:FACTORY", help="called without arguments: a module")
    parser.add_argument(
        "--data", required=True, metavar="MODULE:FACTORY", help="called without arguments: an iterable of batches"
    )
    parser.add_argument(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="loss(model, batch); default: cross entropy of model(*inputs) and the batch's last tensor",
    )
    parser.add_argument(
        "--optimizer",
        default="adamw",
        metavar="NAME",
        help="sgd, adamw or MODULE:FACTORY, called with model and learning rate; default: %(default)s",
    )
    parser.add_argument("--lr", type=float, required=True, metavar="RATE", help="learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="default: %(default)s")
    parser.add_argument("--momentum", type=float, default=0.0, metavar="X", help="of sgd; default: %(default)s")
    parser.add_argument("--parallel", choices=PARALLEL, help="default: ddp under torchrun, else single")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data; default: %(default)s")


def load(options: argparse.Namespace, batches: int) -> Factories:
    """Import what the options name, draw the batches, and try one loss on this rank. No collective.

    Args:
        options: Parsed from :func:`add_options`.
        batches: How many each rank needs; with fewer in the data, ``Factories.batches`` is shorter.

    Raises:
        FactoryError: A setting is out of range, or something named cannot be imported, is not what the contract says,
            or gives a loss that is not a finite 0-d tensor with a graph.
    """
    ranks, rank = _environment("WORLD_SIZE", 1), _environment("RANK", 0)
    mode = options.parallel or ("single" if ranks == 1 else "ddp")
    _check(options, mode, ranks)
    device = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(device, _environment("LOCAL_RANK", 0)) if device == "cuda" else torch.device(device)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())

    make_model = _named(options.model, "--model")
    loss_fn = cross_entropy if options.loss is None else _named(options.loss, "--loss")
    data = _named(options.data, "--data")
    drawn = _seeded(lambda: _batches(data, batches * ranks, options.data), options.seed)
    if len(drawn) < ranks:
        raise FactoryError(f"--data {options.data}: gave {len(drawn)} batches for {ranks} ranks; it must give one each")
    each = len(drawn) // ranks
    mine = tuple(tree_map(lambda leaf: leaf.to(place) if isinstance(leaf, Tensor) else leaf, drawn[rank::ranks][:each]))

    def checked_model() -> nn.Module:
        model = _called(make_model, f"--model {options.model}")
        if not isinstance(model, nn.Module):
            raise FactoryError(f"--model {options.model}: expected an nn.Module, got {type(model).__name__}")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise FactoryError(f"--model {options.model}: the model has no parameter that requires a gradient")
        return model

    settings = {
        key: getattr(options, key) for key in ("model", "data", "loss", "optimizer", "lr", "weight_decay", "momentum")
    }
    settings |= {"parallel": mode, "ranks": ranks, "device": device, "seed": options.seed, "batches": each}
    factories = Factories(loss_fn, mine, mode, device, options.seed, settings, checked_model, _optimizer_maker(options))
    _try(factories, place, options)
    return factories


def cross_entropy(model: Any, batch: Any) -> Tensor:
    """The loss without ``--loss``: cross entropy over the last dimension of ``model(*inputs)``.

    Args:
        model: Gives logits, (..., classes).
        batch: Tuple or list of tensors: inputs, then targets, whole numbers, (...).

    Raises:
        FactoryError: The batch is something else.
    """
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[-1], Tensor):
        raise FactoryError(
            f"--loss: without it a batch must be a tuple (inputs, ..., target) of tensors, got {type(batch).__name__}; "
            "name a function that takes the model and such a batch"
        )
    logits = model(*batch[:-1])
    return F.cross_entropy(logits.flatten(0, -2), batch[-1].flatten())


def _try(factories: Factories, place: torch.device, options: argparse.Namespace) -> None:
    """One loss of the unwrapped model, and its optimizer: what is wrong shows while no other rank waits."""
    model = _seeded(factories.make_model, factories.seed).to(place)
    where = f"--loss {options.loss}" if options.loss else "--model, --data (and --loss, which is not given)"
    with forked(factories.seed):
        loss = _called(lambda: factories.loss_fn(model, factories.batches[0]), where)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise FactoryError(f"{where}: the loss must be a 0-d tensor, got {_described(loss)}")
    if not loss.requires_grad:
        raise FactoryError(f"{where}: the loss has no graph; it must depend on the model's parameters")
    if not math.isfinite(float(loss.detach())):
        raise FactoryError(f"{where}: the loss of the first batch is {float(loss.detach())}; it must be finite")
    optimizer = factories.make_optimizer(model)
    if not isinstance(optimizer, Optimizer):
        raise FactoryError(f"--optimizer {options.optimizer}: expected an Optimizer, got {type(optimizer).__name__}")


def _check(options: argparse.Namespace, mode: str, ranks: int) -> None:
    if not (math.isfinite(options.lr) and options.lr > 0.0):
        raise FactoryError(f"--lr: expected a number > 0, got {options.lr}")
    for name, value, below in (("weight-decay", options.weight_decay, math.inf), ("momentum", options.momentum, 1.0)):
        if not 0.0 <= value < below:
            raise FactoryError(f"--{name}: expected 0 <= {name} < {below}, got {value}")
    if options.momentum and options.optimizer != "sgd":
        raise FactoryError(f"--momentum: goes with --optimizer sgd, not with {options.optimizer}")
    if options.weight_decay and ":" in options.optimizer:
        raise FactoryError(f"--weight-decay: set it in {options.optimizer}, which is called with model and lr alone")
    if options.seed < 0:
        raise FactoryError(f"--seed: expected a whole number >= 0, got {options.seed}")
    if mode == "single" and ranks > 1:
        raise FactoryError(f"--parallel single: {ranks} processes were started; use ddp or fsdp2, or start one")
    if mode != "single" and "WORLD_SIZE" not in os.environ:
        raise FactoryError(
            f"--parallel {mode}: start it with torchrun --nproc_per_node=N --no-python dist-stability ..."
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise FactoryError("--device cuda: no CUDA device is available here")


def _optimizer_maker(options: argparse.Namespace) -> Callable[[nn.Module], Optimizer]:
    lr, decay, name = options.lr, options.weight_decay, options.optimizer
    if name == "sgd":
        return lambda model: torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay, momentum=options.momentum)
    if name == "adamw":
        return lambda model: torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    if ":" not in name:
        raise FactoryError(f"--optimizer: expected sgd, adamw or MODULE:FACTORY, got {name!r}")
    factory = _named(name, "--optimizer")
    made: Callable[[nn.Module], Optimizer] = lambda model: _called(lambda: factory(model, lr), f"--optimizer {name}")  # noqa: E731
    return made


def _named(name: str, option: str) -> Callable[..., Any]:
    module, separator, attribute = name.partition(":")
    if not (separator and module and attribute):
        raise FactoryError(f"{option}: expected MODULE:NAME, as in my_package.models:small, got {name!r}")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise FactoryError(
            f"{option} {name}: cannot import {module} ({type(error).__name__}: {error}); install it, or start in "
            f"its folder (this is {os.getcwd()})"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise FactoryError(f"{option} {name}: {module} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise FactoryError(f"{option} {name}: expected something to call, got {_described(found)}")
    made: Callable[..., Any] = found
    return made


def _batches(data: Callable[[], Any], most: int, name: str) -> list[Any]:
    given = _called(data, f"--data {name}")
    if not isinstance(given, Iterable):
        raise FactoryError(f"--data {name}: expected an iterable of batches, got {type(given).__name__}")
    return _called(lambda: list(itertools.islice(given, most)), f"--data {name}")


def _called(call: Callable[[], Any], what: str) -> Any:
    """The user's code, whose errors are told as the option's."""
    try:
        return call()
    except FactoryError:
        raise
    except Exception as error:
        raise FactoryError(f"{what}: raised {type(error).__name__}: {error}") from error


def _seeded(make: Callable[[], Any], seed: int) -> Any:
    with forked(seed):
        return make()


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {value.dtype}"
    return f"{type(value).__name__} {value!r}"[:80]


def _environment(name: str, otherwise: int) -> int:
    """Torchrun's description of this process."""
    return int(os.environ.get(name, otherwise))
