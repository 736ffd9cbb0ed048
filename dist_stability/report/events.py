"""The event log: one JSON object per line, written as the run goes, readable after a crash.

Every line is strict JSON. JSON has no NaN or infinities, and a run that goes wrong is full of them, so they are written
as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``; :func:`read_events` turns them back into floats. Fields
of an event are those the controller gives to ``on_event``; a writer may add its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

_SPELLINGS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any) -> Any:
    """The same value made of what strict JSON has: non-finite floats as strings, tuples as lists, keys as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items: Iterable[Any] = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [to_json(item) for item in items]
    if isinstance(value, str):
        return str(value)  # a StrEnum becomes its value
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"an event cannot hold a {type(value).__name__}: {value!r}")


def from_json(value: Any) -> Any:
    """Undo the spelling of non-finite floats."""
    if isinstance(value, str):
        return _SPELLINGS.get(value, value)
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return value


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(to_json(event), allow_nan=False, separators=(",", ":")) + "\n"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a summary as strict JSON; a reader never sees half of it, even if several processes write."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(to_json(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read what :func:`write_json` wrote."""
    value: dict[str, Any] = from_json(json.loads(path.read_text(encoding="utf-8")))
    return value


class EventLog:
    """Appends events to a file; each is on its way to the disk when :meth:`append` returns.

    Args:
        path: The file. A log that is there already is replaced: one log is one run.
        again: Events that it begins with.
    """

    def __init__(self, path: Path, again: Iterable[Mapping[str, Any]] = ()) -> None:
        """Create the folder and the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file: IO[str] | None = None
        self.rewrite(again)

    def rewrite(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Replace what is in the file by these events; a process that dies meanwhile leaves the one or the other."""
        self.close()
        partial = self._path.with_name(f"{self._path.name}.partial")
        partial.write_text("".join(map(_line, events)), encoding="utf-8")
        partial.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one event as one line and flush it."""
        if self._file is None:
            raise ValueError(f"{self._path}: the log is closed")
        self._file.write(_line(event))
        self._file.flush()

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> EventLog:
        """Use as a context manager."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a log.

    A last line without its end, left by a process that died while writing, is passed over.

    Raises:
        ValueError: A line before the last is damaged; the message names file and line.
    """
    events = []
    # What follows the last line end is empty, or the torn line.
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not an event ({error})") from error
        if not isinstance(event, dict):
            raise ValueError(f"{path}, line {number}: not an event but a {type(event).__name__}")
        events.append(from_json(event))
    return events
