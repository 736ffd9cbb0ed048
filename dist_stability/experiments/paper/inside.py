"""A run of the training program inside a process that goes on living: with its own log, as if typed alone."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from dist_stability.experiments import training
from dist_stability.experiments.arms import PROGRAM


def inside(arguments: Sequence[str], folder: Path, log: str, body: Callable[[list[str]], int]) -> int:
    """Call ``body`` with the complete command line of a run; returns its exit status.

    Args:
        arguments: Options, without ``--out``.
        folder: Of the run; made if it is not there.
        log: Name of the file in it that gets standard output and error, those of C++ code too.
        body: :func:`dist_stability.experiments.training.main`, or what stands for it.

    Collectives: those of ``body``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    complete = [*arguments, "--out", str(folder)]
    try:
        with _output(folder / log), _as_program(complete):
            return body(complete)
    except SystemExit as error:  # options that do not fit together
        return error.code if isinstance(error.code, int) else 1
    finally:
        gc.collect()  # a wrapped model is a knot of references; the next run needs its memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _output(path: Path) -> Iterator[None]:
    """Standard output and error go to a file, at the level of file descriptors."""
    kept = [os.dup(1), os.dup(2)]
    _flush()
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        _flush()
        for number, before in enumerate(kept, 1):
            os.dup2(before, number)
            os.close(before)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


@contextlib.contextmanager
def _as_program(arguments: list[str]) -> Iterator[None]:
    """What a run writes down as its command is read from here: let it be the training program's, not ours."""
    main = sys.modules["__main__"]
    argv, spec = sys.argv, main.__spec__
    sys.argv, main.__spec__ = [PROGRAM, *arguments], training.__spec__
    try:
        yield
    finally:
        sys.argv, main.__spec__ = argv, spec
