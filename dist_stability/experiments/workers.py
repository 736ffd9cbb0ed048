"""What every worker process of a pool does first."""

from __future__ import annotations

import multiprocessing
import os
import threading

import torch


def begin() -> None:
    """Compute with one thread, and do not outlive the process that started this one.

    A worker whose parent was killed would wait for work for ever: it holds both ends of the queue.
    """
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
