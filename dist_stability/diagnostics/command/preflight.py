"""``dist-stability diagnose preflight``: what can be said about a run before its first step.

Everything that can be wrong with the command line, or with what it names, is found on each rank alone, before there is
a process group. Then all ranks look ahead together, and rank 0 writes.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_stability.diagnostics.blocks import NoBlocks, candidates, hint, named_blocks
from dist_stability.diagnostics.calibration import Calibrator, NotCalibrated
from dist_stability.diagnostics.calibration import load as load_calibrator
from dist_stability.diagnostics.command.factories import Factories, FactoryError, add_options, load
from dist_stability.diagnostics.command.frame import add_out, at_least, command_line
from dist_stability.diagnostics.preflight import SCORE, Preflight, preflight
from dist_stability.errors import LockstepError
from dist_stability.experiments.progress import Progress
from dist_stability.report.events import to_json
from dist_stability.report.extras import MissingExtra, import_extra
from dist_stability.report.versions import versions
from dist_stability.snapshot.rng import forked

_PARTS, _RATES = 3, 15  # told of one by one: two rates and the profile; at most so many rates of a search


def add_preflight(kinds: Any) -> None:
    """Add the command to the kinds of ``dist-stability diagnose``."""
    parser = kinds.add_parser("preflight", help="before the first step: is this learning rate likely to diverge?")
    add_options(parser)
    add_out(parser, "preflight")
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="for each rank; default: %(default)s")
    parser.add_argument("--blocks", nargs="+", metavar="NAME", help="as in layers.0; default: lists of like modules")
    parser.add_argument("--no-search", action="store_true", help="do not look for the largest stable rate: far cheaper")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="a saved calibrator: with it, a probability")
    parser.add_argument("--family", default="", metavar="WORDS", help="with --calibration: what this run is one of")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status. Under torchrun every rank calls it."""
    rank = int(os.environ.get("RANK", 0))
    try:
        import_extra("matplotlib.figure", "the report's figures")  # known before the work, not after
        calibrator = _calibrator(options)
        factories = load(options, at_least("batches", options.batches, 1))
        _check_blocks(factories, options.blocks)
        if rank == 0:
            options.out.mkdir(parents=True, exist_ok=True)
        found, facts = _look(factories, options, calibrator)
    except (MissingExtra, LockstepError, ValueError, OSError) as error:
        print(f"dist-stability: error: rank {rank}: {error}", file=sys.stderr, flush=True)
        return 1
    if rank == 0:
        from dist_stability.report.preflight import write

        write(found, options.out, facts, command_line())
        print(found.text())
        print(options.out / "report.html")
    return 0


def _look(
    factories: Factories, options: argparse.Namespace, calibrator: Calibrator | None
) -> tuple[Preflight, dict[str, Any]]:
    with factories.processes() as here:
        subject = factories.build(here)
        search = not options.no_search
        with Progress(_PARTS + search * _RATES, f"preflight of {options.model}", shown=here.rank == 0) as progress:
            done = 0

            def told(line: str) -> None:
                nonlocal done
                done += 1
                progress.advance(min(done, _PARTS + search * _RATES), line)

            found = preflight(
                subject.model,
                factories.loss_fn,
                factories.batches,
                options.lr,
                optimizer=subject.optimizer,
                blocks=options.blocks,
                search=search,
                calibrator=calibrator,
                family=options.family,
                seed=factories.seed,
                told=told,
            )
    facts: dict[str, Any] = {**factories.settings, "blocks": options.blocks, "family": options.family or None}
    facts |= {"calibration": None if calibrator is None else to_json(asdict(calibrator)), **versions()}
    return found, facts


def _calibrator(options: argparse.Namespace) -> Calibrator | None:
    if options.calibration is None:
        if options.family:
            raise FactoryError("--family: goes with --calibration, whose runs it names")
        return None
    if not options.family:
        raise FactoryError("--calibration: say with --family what this run is one of, in the calibrator's words")
    if not options.calibration.is_file():
        raise FactoryError(f"--calibration {options.calibration}: no such file")
    found = load_calibrator(options.calibration)
    if found.score != SCORE:
        raise NotCalibrated(
            f"--calibration {options.calibration}: it is about the score {found.score!r}, and this is {SCORE!r}"
        )
    if found.family != options.family:
        raise NotCalibrated(
            f"--calibration {options.calibration}: it was fitted on runs of {found.family!r}, and this is one of "
            f"{options.family!r}: no probability follows; leave --calibration out"
        )
    return found


def _check_blocks(factories: Factories, names: list[str] | None) -> None:
    """On a model of its own, which nobody else waits for."""
    with forked(factories.seed):
        model = factories.make_model()
    if names is not None:
        named_blocks(model, names)
    elif not candidates(model):
        raise NoBlocks(
            f"--model: found no list of like modules in {type(model).__name__}; give --blocks. {hint(model)}"
        )
