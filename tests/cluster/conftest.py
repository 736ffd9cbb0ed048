"""A real Slurm with two nodes, started once for the session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "submission"))  # the program that saves and resumes, shared with those tests

import testbed  # noqa: E402


@pytest.fixture(scope="session")
def slurm() -> Iterator[testbed.Testbed]:
    """The testbed in a folder of its own; installed if it is missing, stopped at the end."""
    if os.getuid() != 0:
        pytest.skip("the testbed needs root: its slurmd starts jobs as their users")
    if shutil.which("apt-get") is None and shutil.which("slurmctld") is None:
        pytest.skip("Slurm is not installed and there is no apt-get to install it with")
    scripts = ROOT / "slurm" / "testbed"
    installed = subprocess.run([scripts / "install"], capture_output=True, text=True, timeout=600)
    if installed.returncode != 0:
        pytest.skip(f"slurm/testbed/install: {installed.stderr.strip()}")
    state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a short name: munged's socket is in it
    try:
        started = subprocess.run([scripts / "start", state], capture_output=True, text=True, timeout=300)
        assert started.returncode == 0, started.stderr
        yield testbed.Testbed(state)
    finally:
        stopped = subprocess.run([scripts / "stop", state], capture_output=True, text=True, timeout=120)
        assert stopped.returncode == 0, stopped.stderr
    shutil.rmtree(state)
