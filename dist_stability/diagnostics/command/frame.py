"""What the kinds of ``dist-stability diagnose`` have in common: how they end, and what they say of themselves."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from dist_stability.diagnostics.command.factories import FactoryError
from dist_stability.errors import StabilityError
from dist_stability.report.extras import MissingExtra, import_extra

ERRORS = (FactoryError, StabilityError, MissingExtra, ValueError)
"""What is told in one line; anything else is a defect, and keeps its traceback."""


def told(diagnose: Callable[[argparse.Namespace], str | None], options: argparse.Namespace) -> int:
    """Run a diagnosis; returns the exit status. Under torchrun every rank calls it.

    Args:
        diagnose: Does everything; on rank 0 it writes, and returns what to print.
        options: Of the command line.
    """
    try:
        import_extra("matplotlib.figure", "the report's figures")  # known before the work, not after
        text = diagnose(options)
    except ERRORS as error:
        rank = int(os.environ.get("RANK", 0))
        print(f"dist-stability: error: rank {rank}: {error}", file=sys.stderr, flush=True)
        return 1
    if text is not None:
        print(text)
        print(options.out / "report.html")
    return 0


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    """Where the diagnosis writes."""
    parser.add_argument("--out", type=Path, default=Path("out") / name, metavar="DIR", help="default: %(default)s")


def at_least(name: str, value: int, least: int) -> int:
    """A whole number of the command line, checked.

    Raises:
        FactoryError: It is smaller.
    """
    if value < least:
        raise FactoryError(f"--{name}: expected at least {least}, got {value}")
    return value


def command_line() -> str:
    """The command that makes the report again."""
    start = ["dist-stability"]
    if "WORLD_SIZE" in os.environ:
        start = ["torchrun", f"--nproc_per_node={os.environ['WORLD_SIZE']}", "-m", "dist_stability"]
    return shlex.join([*start, *sys.argv[1:]])
