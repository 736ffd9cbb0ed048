"""Versions of everything that may change a result."""

from __future__ import annotations

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Python, the machine, and the packages of this project and its extras that are installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("dist-stability", "torch", "torchvision", "numpy", "scikit-learn", "matplotlib", "rich"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
