"""Fixtures shared by the tests. The pools live as long as the session; see harness.py."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_process_left() -> Iterator[None]:
    """At the end of the session every worker is gone (asserted by pid)."""
    yield
    harness.close_all()


@pytest.fixture(scope="session")
def one() -> harness.Pool:
    """A pool of one process, for single-process training in a clean interpreter."""
    return harness.pool(1)


@pytest.fixture(scope="session")
def two() -> harness.Pool:
    """A pool of two ranks over gloo."""
    return harness.pool(2)


@pytest.fixture(scope="session")
def four() -> harness.Pool:
    """A pool of four ranks over gloo."""
    return harness.pool(4)
