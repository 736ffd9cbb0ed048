"""A cluster's request to stop, answered at a step boundary by all ranks together.

A cluster announces the end of a job with a signal: at every process, at a moment of its own, in the middle of a step.
submitit's handler of that signal saves and requeues from inside of it, on rank 0 alone, so a state that is sharded over
ranks cannot be saved there. :class:`Preemption` puts a flag in its place::

    with Preemption() as preemption:
        for step, batch in enumerate(batches, start):
            train(batch)
            if preemption.agreed():      # every rank has the same answer for the same step
                save(step + 1)           # collectives are allowed here
                preemption.hand_over()   # does not return

``hand_over`` then lets whoever started the job bring it back: submitit's own handler, or Slurm.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist

DEFAULT_SIGNAL = "USR2"
"""What submitit asks Slurm for by default; NCCL may catch USR1."""

PATIENCE = 300.0
"""Seconds a rank waits for the end that the requeue brings, before it ends by itself."""

Handler = Callable[[int, FrameType | None], Any] | int | None


class Preemption:
    """Whether this job was told to stop, and how it ends so that it comes back.

    The handler only sets a flag. One that was there before is kept: submitit's is called by :meth:`hand_over`, any
    other one right after the flag was set. Slurm signals every process of a job, DataLoader workers too; in those that
    inherit the handler it does nothing.

    Args:
        signal_name: Without "SIG"; default: the environment's ``SUBMITIT_PREEMPT_SIGNAL``, else "USR2".
        group: Over which the ranks agree; default: the default group. A gloo group saves a GPU job the host's wait for
            the device in every :meth:`agreed`.

    Raises:
        ValueError: There is no such signal, or it cannot be caught.
        RuntimeError: Made outside of the main thread, where Python installs no handler.
    """

    def __init__(self, signal_name: str | None = None, *, group: dist.ProcessGroup | None = None) -> None:
        """Install the handler, until :meth:`close`."""
        name = signal_name or os.environ.get("SUBMITIT_PREEMPT_SIGNAL") or DEFAULT_SIGNAL
        number = getattr(signal, f"SIG{name.removeprefix('SIG')}", None)
        if not isinstance(number, signal.Signals) or number in (signal.SIGKILL, signal.SIGSTOP):
            raise ValueError(f"signal {name!r}: not one that can be caught; name one such as USR2 or TERM")
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("Preemption: signal handlers can be installed in the main thread only; make it there")
        self.signal = number
        self._group = group
        self._raised = False
        self._process = os.getpid()
        self._previous: Handler = signal.getsignal(number)
        self._by_submitit = _is_submitits(self._previous)
        signal.signal(number, self._handle)

    @property
    def raised(self) -> bool:
        """Whether the signal has reached this rank. Others may not have it yet: act on :meth:`agreed` only."""
        return self._raised

    def agreed(self) -> bool:
        """Whether the signal has reached any rank; the same answer on every rank. Ask at every step boundary.

        Collectives: one all-reduce of one integer, if the process group was started.
        """
        return self._maximum(int(self._raised)) > 0

    def hand_over(self) -> NoReturn:
        """End this process after every rank has saved, such that the job comes back.

        Under submitit, rank 0 calls submitit's handler, which writes the submission that continues this one and asks
        for the requeue. In another Slurm job, rank 0 calls ``scontrol requeue``. The other ranks wait for Slurm to end
        them; under submitit's local executor they end by themselves. Elsewhere nobody brings the job back, and the exit
        status is that of a process which the signal has ended.

        Collectives: one all-reduce, so that no rank requeues the job while another one still saves.

        Raises:
            RuntimeError: Rank 0: ``scontrol requeue`` failed. What was saved stays.
            submitit.core.utils.UncompletedJobError: Rank 0: submitit does not requeue, for the reason it gives.
            SystemExit: Nobody brings the job back.
        """
        self._maximum(0)
        first = _rank() == 0
        if self._by_submitit:
            if first and callable(self._previous):
                try:
                    self._previous(self.signal, None)
                except SystemExit as ended:
                    _leave(ended.code if isinstance(ended.code, int) else 1)
            if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
                _leave(0)
        elif "SLURM_JOB_ID" in os.environ:
            if first:
                _requeue(os.environ["SLURM_JOB_ID"])
        else:
            print(f"rank {_rank()}: stopped by {self.signal.name}; nobody restarts this job", file=sys.stderr)
            raise SystemExit(128 + self.signal)
        _wait_for_the_end()

    def close(self) -> None:
        """Put the handler that was there before back. May be called twice."""
        if signal.getsignal(self.signal) == self._handle:
            signal.signal(self.signal, self._previous if self._previous is not None else signal.SIG_DFL)

    def __enter__(self) -> Self:
        """Return itself: the handler is there since it was made."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the earlier handler back."""
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        self._raised = True
        if callable(self._previous) and not self._by_submitit:
            self._previous(number, frame)

    def _maximum(self, value: int) -> int:
        """The largest value of any rank. Collectives: one all-reduce, if the process group was started."""
        if not (dist.is_available() and dist.is_initialized()):
            return value
        on_host = dist.get_backend(self._group) == "gloo" or not torch.cuda.is_available()
        device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
        held = torch.tensor([value], dtype=torch.int32, device=device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self._group)
        return int(held.item())


def _is_submitits(handler: Handler) -> bool:
    """Whether a handler is the one that submitit installs before it calls what was submitted."""
    return type(getattr(handler, "__self__", None)).__module__.partition(".")[0] == "submitit"


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", "0"))


def _requeue(job: str) -> None:
    if shutil.which("scontrol") is None:
        raise RuntimeError(f"job {job}: scontrol is not on this node's PATH, so the job cannot be requeued")
    ended = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=120)
    if ended.returncode != 0:
        raise RuntimeError(
            f"job {job}: scontrol requeue failed: {ended.stderr.strip()}; was it submitted with sbatch --requeue?"
        )


def _wait_for_the_end() -> NoReturn:
    """Slurm ends the processes of a job that it requeues: a rank that left before could look like a failure."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it, and KillWait is a long time
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(PATIENCE)
    print(f"rank {_rank()}: the job was to be requeued, but still runs after {PATIENCE:g} s", file=sys.stderr)
    _leave(1)


def _leave(status: int) -> NoReturn:
    """Without unwinding: what is on the stack could wait in a collective for ranks that have gone."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)
