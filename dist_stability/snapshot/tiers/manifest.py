"""What a checkpoint on disk says of itself, whether it is whole, and which of several may go."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .record import Head, Unusable

_MANIFEST = "manifest.json"
DIGEST = 32
"""Bytes of the digest of a file."""

NAME = re.compile(r"attempt-(\d{8,})(\.\d+)?")
"""Of the folder of a checkpoint: attempts made, and a number if that was taken."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        path: Its folder.
        head: Of the first rank.
        files: By name, (bytes, digest).
    """

    path: Path
    head: Head
    files: Mapping[str, tuple[int, str]]

    def damaged(self, names: Sequence[str] | None = None) -> list[str]:
        """Read files (by default all) and say which are not as they were written."""
        return [text for name in (self.files if names is None else names) if (text := self._wrong(name))]

    def _wrong(self, name: str) -> str:
        try:
            size, digest = file_digest(self.path / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if size != self.files[name][0]:
            return f"{name} has {size} bytes instead of {self.files[name][0]}"
        return "" if digest == self.files[name][1] else f"{name} has other bytes than were written"

    def missing(self) -> list[str]:
        """The same by looking at sizes only."""
        found = []
        for name, (size, _) in self.files.items():
            try:
                now = (self.path / name).stat().st_size
            except OSError as error:
                found.append(f"{name} cannot be read ({error.strerror})")
                continue
            if now != size:
                found.append(f"{name} has {now} bytes instead of {size}")
        return found


def write_manifest(folder: Path, head: Head, files: Mapping[str, tuple[int, str]]) -> None:
    """Write it, down to the disk; OSError if there is no room."""
    content = {"head": asdict(head), "files": {name: list(files[name]) for name in sorted(files)}}
    with (folder / _MANIFEST).open("w") as file:
        json.dump({"version": 1, "digest": _sum(content), **content}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read it.

    Raises:
        Unusable: It is not there, cut short, damaged, or of another version.
    """
    try:
        said = json.loads((folder / _MANIFEST).read_text())
    except OSError as error:
        raise Unusable(f"has no manifest that can be read ({error.strerror})") from error
    except ValueError as error:
        raise Unusable("has a manifest that is cut short or damaged") from error
    try:
        if said["version"] != 1:
            raise Unusable("is of another version of this package")
        content = {"head": said["head"], "files": said["files"]}
        if said["digest"] != _sum(content):
            raise Unusable("has a manifest that is cut short or damaged")
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in said["files"].items()}
        return Manifest(folder, Head(**said["head"]), files)
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable("has a manifest that is cut short or damaged") from error


def _sum(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def surplus(names: Sequence[str], keep: int, sound: Callable[[str], bool]) -> list[str]:
    """What may go: everything after so many that are sound.

    Args:
        names: Newest first.
        keep: How many sound ones stay.
        sound: Whether one can be gone back to. Asked only as long as it matters.
    """
    good = 0
    for place, name in enumerate(names):
        if good >= keep:
            return list(names[place:])
        good += sound(name)
    return []


def attempts(folder: Path) -> list[Path]:
    """The checkpoints in a folder by their names, newest first; OSError if it cannot be read."""
    found = [(int(match[1]), path.name, path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, _, path in sorted(found, reverse=True)]


def file_digest(path: Path) -> tuple[int, str]:
    """Bytes and digest of a file as the disk has it; OSError if it cannot be read."""
    digest, size = hashlib.blake2b(digest_size=DIGEST), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
