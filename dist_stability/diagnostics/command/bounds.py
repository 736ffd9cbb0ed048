"""``dist-stability diagnose bounds``: is the learning rate near its limit, weight decay large enough? At one point."""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

from dist_stability import parallel
from dist_stability.diagnostics.bounds import StabilityBounds, stability_bounds
from dist_stability.diagnostics.command.factories import Factories, FactoryError, add_options, load
from dist_stability.diagnostics.command.frame import add_out, at_least, command_line, told
from dist_stability.diagnostics.update_rule import UpdateRule
from dist_stability.experiments.wrapping import Processes

SETTLED = 5
"""Steps after which Adam's second moment means something."""


def add_bounds(kinds: Any) -> None:
    """Add the command to the kinds of ``dist-stability diagnose``."""
    parser = kinds.add_parser("bounds", help="is the learning rate near its limit, is weight decay large enough?")
    add_options(parser)
    add_out(parser, "bounds")
    parser.add_argument("--batches", type=int, default=8, metavar="N", help="measured on, for each rank; default: 8")
    parser.add_argument(
        "--train-steps", type=int, default=SETTLED, metavar="N", help="taken first, one batch each; default: 5"
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of Lanczos; default: %(default)s")
    parser.add_argument("--peak-lr", type=float, metavar="RATE", help="largest of the schedule to come; default: --lr")
    parser.add_argument(
        "--relative-step", type=float, metavar="X", help="of the finite difference; 1e-3 where bfloat16 computes"
    )
    parser.set_defaults(run=partial(told, _diagnose))


def _diagnose(options: argparse.Namespace) -> str | None:
    batches = at_least("batches", options.batches, 1)
    at_least("steps", options.steps, 2)
    at_least("train-steps", options.train_steps, 0)
    if options.peak_lr is not None and not (math.isfinite(options.peak_lr) and options.peak_lr > 0.0):
        raise FactoryError(f"--peak-lr: expected a number > 0, got {options.peak_lr}")
    if options.relative_step is not None and not 0.0 < options.relative_step < 1.0:
        raise FactoryError(f"--relative-step: expected 0 < X < 1, got {options.relative_step}")
    factories = load(options, max(batches, options.train_steps))
    _check_rules(factories, options.train_steps)
    peak = options.lr if options.peak_lr is None else options.peak_lr
    with factories.processes() as here:
        found = _measure(factories, here, options, batches, peak / options.lr)
        if here.rank != 0:
            return None
    from dist_stability.report.diagnoses import bounds_in_words, write_bounds

    settings = {**factories.settings, "train_steps": options.train_steps, "peak_lr": peak}
    write_bounds(found, options.out, settings, command_line())
    return f"{bounds_in_words(found)}\n{found.text()}"


def _measure(
    factories: Factories, here: Processes, options: argparse.Namespace, batches: int, peak_factor: float
) -> StabilityBounds:
    subject = factories.build(here)
    for step in range(options.train_steps):
        subject.optimizer.zero_grad()
        factories.loss_fn(subject.model, factories.batches[step % len(factories.batches)]).backward()  # type: ignore[no-untyped-call]
        subject.optimizer.step()
    subject.optimizer.zero_grad()
    parallel.reshard(subject.model)
    return stability_bounds(
        subject.model,
        subject.optimizer,
        factories.loss_fn,
        factories.batches[:batches],
        steps=options.steps,
        peak_factor=peak_factor,
        relative_step=options.relative_step,
        seed=factories.seed,
    )


def _check_rules(factories: Factories, train_steps: int) -> None:
    """On this rank alone: is anything known of the stability of this optimizer, now?

    Raises:
        FactoryError: Adam without steps before.
        StabilityError: See :meth:`UpdateRule.of`.
    """
    optimizer = factories.make_optimizer(factories.make_model())
    rules = [UpdateRule.of(optimizer, group) for group in optimizer.param_groups]
    if any(rule.adaptive for rule in rules) and train_steps < SETTLED:
        raise FactoryError(
            f"--train-steps: {type(optimizer).__name__} needs {SETTLED} before its second moments mean something, got "
            f"{train_steps}"
        )
