"""The parsers of ``dist-stability diagnose NAME``."""

from __future__ import annotations

from typing import Any

from dist_stability.diagnostics.command.bounds import add_bounds
from dist_stability.diagnostics.command.preflight import add_preflight
from dist_stability.diagnostics.command.sensitivity import add_sensitivity


def add(commands: Any) -> None:
    """Add ``diagnose`` and its kinds to the commands of ``dist-stability``."""
    diagnose = commands.add_parser("diagnose", help="what can be said about a run before it, or beside it")
    kinds = diagnose.add_subparsers(required=True, metavar="NAME")
    add_preflight(kinds)
    add_bounds(kinds)
    add_sensitivity(kinds)
