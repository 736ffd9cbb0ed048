"""Versions of everything that may change a result."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path


def versions() -> dict[str, str]:
    """Python, the machine, and the packages of this project and its extras that are installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("dist-stability", "torch", "torchvision", "numpy", "scikit-learn", "matplotlib", "rich"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_digest() -> str:
    """SHA-256 over this package's source files: the version number alone misses a change in a working copy."""
    package = Path(__file__).parent.parent
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(f"{path.relative_to(package).as_posix()} ".encode() + path.read_bytes())
    return total.hexdigest()
