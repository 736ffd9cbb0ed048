"""Which process made a file, in its name, and whether that process is gone for good.

A process id alone is used again; with the time the process began it is not. Both are only worth something on the
machine, since the boot, and in the namespace of process ids they were taken in, so these are part of the name as well.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, and the one that started it and may start it again (torchrun's agent, a shell).

    Attributes:
        process: (id, when it began, in clock ticks since the boot).
        agent: The same of its parent.
        boot: Of this boot of this machine.
        namespace: Of process ids.
    """

    process: tuple[int, int]
    agent: tuple[int, int]
    boot: str
    namespace: str

    @classmethod
    def this(cls) -> Owner:
        """This process."""
        me, parent = os.getpid(), os.getppid()
        return cls((me, _began(me) or 0), (parent, _began(parent) or 0), *_place())

    def __str__(self) -> str:
        """As part of a file name."""
        (pid, began), (parent, parent_began) = self.process, self.agent
        return f"p{pid}-{began}.a{parent}-{parent_began}.b{self.boot}.n{self.namespace}"

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """The owner a name speaks of; None if it is no such name."""
        found = re.fullmatch(r"p(\d+)-(\d+)\.a(\d+)-(\d+)\.b(\w+)\.n(\w+)", text)
        if found is None:
            return None
        pid, began, parent, parent_began = (int(number) for number in found.groups()[:4])
        return cls((pid, began), (parent, parent_began), found[5], found[6])

    def alive(self) -> bool:
        """Whether the process still runs, as far as can be known: another namespace's processes cannot be seen."""
        return self._runs(self.process)

    def may_return(self) -> bool:
        """Whether the process runs, or the one that would start it again does."""
        return self._runs(self.process) or self._runs(self.agent)

    def _runs(self, process: tuple[int, int]) -> bool:
        boot, namespace = _place()
        if self.boot != boot:
            return not (boot and self.boot)  # all of another boot are gone
        return self.namespace != namespace or _began(process[0]) == process[1]


def _began(pid: int) -> int | None:
    """When a process began; None if there is none of that id, or only what is left of one until its parent looks."""
    try:
        # The name of the program, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _place() -> tuple[str, str]:
    """Marks of this boot and of this namespace of process ids."""
    try:
        boot = hashlib.blake2b(Path("/proc/sys/kernel/random/boot_id").read_bytes(), digest_size=4).hexdigest()
        return boot, str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return "", "0"
