"""``dist-stability diagnose sensitivity``: does rounding decide where a run ends? A twin pair, judged."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from dist_stability.diagnostics.command.factories import Factories, FactoryError, add_options, load
from dist_stability.diagnostics.command.frame import add_out, at_least, command_line, told
from dist_stability.diagnostics.perturbation import KScale, OneUlp, Perturbation, RandomUlps
from dist_stability.diagnostics.sensitivity import Sensitivity, sensitivity
from dist_stability.diagnostics.twins import TwinRun
from dist_stability.experiments.wrapping import Processes


def add_sensitivity(kinds: Any) -> None:
    """Add the command to the kinds of ``dist-stability diagnose``."""
    parser = kinds.add_parser("sensitivity", help="does rounding decide where the run ends? Twin runs")
    add_options(parser)
    add_out(parser, "sensitivity")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of the twins; default: %(default)s")
    parser.add_argument(
        "--perturbation",
        default="kscale:3",
        metavar="HOW",
        help="kscale:K, ulp-one:PARAMETER,INDEX or ulp-all:FRACTION; default: %(default)s",
    )
    parser.add_argument(
        "--gate-steps", type=int, default=20, metavar="N", help="in which equal twins must stay equal; default: 20"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-2, metavar="X", help="distance up to which runs may be compared"
    )
    parser.set_defaults(run=partial(told, _diagnose))


def _diagnose(options: argparse.Namespace) -> str | None:
    steps = at_least("steps", options.steps, 3)
    at_least("gate-steps", options.gate_steps, 0)
    if not options.tolerance > 0.0:
        raise FactoryError(f"--tolerance: expected a number > 0, got {options.tolerance}")
    factories = load(options, max(steps, options.gate_steps))
    perturbation = _perturbation(options.perturbation, factories)
    with factories.processes() as here:
        found = _measure(factories, here, perturbation, steps, options.gate_steps)
        if here.rank != 0:
            return None
    from dist_stability.report.diagnoses import in_words, write_sensitivity

    settings = {**factories.settings, "perturbation": perturbation.name, "steps": steps}
    write_sensitivity(found, options.tolerance, options.out, settings, command_line())
    return in_words(found, options.tolerance)


def _measure(
    factories: Factories, here: Processes, perturbation: Perturbation, steps: int, gate_steps: int
) -> Sensitivity:
    def build(seed: int) -> TwinRun:
        subject = factories.build(here, seed)
        batches = factories.batches
        return TwinRun(
            subject.model,
            subject.optimizer,
            loss=lambda step: factories.loss_fn(subject.model, batches[step % len(batches)]),
        )

    return sensitivity(build, perturbation, steps, seed=factories.seed, gate_steps=gate_steps)


def _perturbation(text: str, factories: Factories) -> Perturbation:
    """What the option names; that the model and the optimizer have what it needs is seen here, on this rank alone.

    Raises:
        FactoryError: It names none, or one that cannot be done.
    """
    kind, _, how = text.partition(":")
    model = factories.make_model()
    try:
        if kind == "kscale":
            if not KScale.knows(optimizer := factories.make_optimizer(model)):
                raise FactoryError(
                    f"--perturbation {text}: knows SGD, Adam and AdamW, not {type(optimizer).__name__}; use ulp-one or "
                    "ulp-all"
                )
            return KScale(int(how))
        if kind == "ulp-one":
            name, _, index = how.rpartition(",")
            parameters = dict(model.named_parameters())
            if name not in parameters or not 0 <= int(index) < parameters[name].numel():
                known = ", ".join(f"{each} ({one.numel()})" for each, one in list(parameters.items())[:4])
                raise FactoryError(f"--perturbation {text}: the model has no such weight; it has {known}, ...")
            return OneUlp(name, int(index))
        if kind == "ulp-all":
            return RandomUlps(float(how))
    except ValueError as error:
        if isinstance(error, FactoryError):
            raise
        raise FactoryError(f"--perturbation {text}: {error}") from error
    raise FactoryError(f"--perturbation: expected kscale:K, ulp-one:PARAMETER,INDEX or ulp-all:FRACTION, got {text!r}")
