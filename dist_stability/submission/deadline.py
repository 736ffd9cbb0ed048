"""A deadline that begins with a signal, also while the main thread is stuck where no Python handler runs.

A Python handler runs in the main thread, between two of its instructions: while that waits inside a collective whose
peers have gone, the signal is not even noticed. The interpreter's own handler writes the signal's number to a file
descriptor at once (``signal.set_wakeup_fd``), and a thread reads it there.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable

_POLLED = select.POLLIN | select.POLLHUP


class Deadline:
    """Calls a function some time after the first arrival of a signal, unless it is cancelled before.

    Later arrivals change nothing. Whoever listened to the interpreter's descriptor before (asyncio does) still hears of
    every signal. In a forked child there is no deadline.

    Args:
        number: The signal; it must have a handler in Python.
        seconds: From its first arrival to the call.
        act: Called in a thread of this object.
    """

    def __init__(self, number: int, seconds: float, act: Callable[[], object]) -> None:
        """Begin to listen; in the main thread only."""
        self._number, self._seconds, self._act = number, seconds, act
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._earlier = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        _open.add(self)
        self._cancelled = False
        self._thread = threading.Thread(target=self._listen, name="dist_stability.deadline", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """No call from here on; one that is under way goes on. In the main thread only. May be called twice."""
        if self._cancelled:
            return
        self._cancelled = True
        _open.discard(self)
        now = signal.set_wakeup_fd(self._earlier)
        if now != self._writer:  # somebody came later, and is left alone
            signal.set_wakeup_fd(now)
        os.close(self._writer)
        self._thread.join(timeout=1.0)

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._reader, _POLLED)
        due: float | None = None
        while True:
            left = None if due is None else max(0.0, due - time.monotonic())
            if not poll.poll(None if left is None else 1e3 * left):
                if not self._cancelled:
                    self._act()
                return
            numbers = os.read(self._reader, 512)
            if not numbers:
                os.close(self._reader)
                return
            if self._earlier >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._earlier, numbers)
            if due is None and self._number in numbers:
                due = time.monotonic() + self._seconds


_open: set[Deadline] = set()


def _in_child() -> None:
    """The pipe is the parent's: a signal to a child must not be taken for one to the parent."""
    if _open:
        _open.clear()
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_in_child)
