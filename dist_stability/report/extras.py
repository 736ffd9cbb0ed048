"""Optional dependencies, imported where they are used, with an error that names the extra to install."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

INSTALL_HINT = "pip install 'dist-stability[train]'"


class MissingExtra(ImportError):
    """An optional dependency is not installed."""


def import_extra(module: str, needed_for: str) -> ModuleType:
    """Import an optional module by name.

    Args:
        module: Dotted name, for example ``matplotlib.figure``.
        needed_for: What the module is wanted for, for the message.

    Raises:
        MissingExtra: The package is not installed; the message names the extra that brings it.
    """
    package = module.partition(".")[0]
    # Asked first, so that an ImportError from inside an installed package keeps its own message.
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise MissingExtra(f"{needed_for} needs {package!r}, which is not installed: {INSTALL_HINT}")
    return importlib.import_module(module)
