"""What a person sees while a run goes: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from dist_stability.report.extras import MissingExtra, import_extra

PLAIN_LINES = 12
"""Progress lines of a whole run, where there is no terminal."""


class Progress:
    """Counts towards a total and shows a few numbers beside it; notes stay on the screen.

    Args:
        total: Number of steps.
        title: What is going on.
        shown: False on ranks that keep quiet.
        terminal: Draw a bar with rich; default: standard output is a terminal and rich is installed.
    """

    def __init__(self, total: int, title: str, *, shown: bool = True, terminal: bool | None = None) -> None:
        """Show nothing yet."""
        self._total, self._title, self._shown = total, title, shown
        self._every = max(1, total // PLAIN_LINES)
        self._done, self._lined = 0, 0
        self._begin = time.monotonic()
        self._bar: Any = None
        if shown and (sys.stdout.isatty() if terminal is None else terminal):
            self._bar = _bar()

    def __enter__(self) -> Progress:
        """Draw the bar, or print the title."""
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, numbers="")
        elif self._shown:
            print(self._title, flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def wants_numbers(self, done: int) -> bool:
        """Whether numbers given with this step would be shown now; reading a loss may wait for a device."""
        return self._shown and (self._bar is not None or done // self._every > self._lined or done == self._total)

    def advance(self, done: int, numbers: str = "") -> None:
        """Say that ``done`` steps are complete."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, numbers=numbers)
        elif self.wants_numbers(done):
            self._lined = done // self._every
            elapsed = time.monotonic() - self._begin
            print(f"  {done:>{len(str(self._total))}}/{self._total}  {numbers}  {elapsed:.0f} s", flush=True)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._shown:
            print(text, flush=True)


def _bar() -> Any:
    """A rich progress bar, or None where rich is not installed: plain lines say the same."""
    try:
        rich = import_extra("rich.progress", "a progress bar")
    except MissingExtra:
        return None
    return rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(bar_width=16),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[numbers]}", markup=False),
    )
