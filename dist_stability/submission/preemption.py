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

``hand_over`` then lets whoever started the job bring it back: submitit's own handler, or Slurm. A controller agrees in
its votes, without a collective for it: ``StabilityController(..., asked_to_stop=lambda: preemption.raised)``, and
``controller.stopping`` takes the place of ``preemption.agreed()``.
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
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist

from .deadline import Deadline

DEFAULT_SIGNAL = "USR2"
"""What submitit asks Slurm for by default; NCCL may catch USR1."""

PATIENCE = 300.0
"""Seconds a rank waits for the end that the requeue brings, before it ends by itself."""

BEHIND_RANK_0 = 5.0
"""Seconds that other ranks stay longer at a forced end: the first to leave ends all, and rank 0 has to requeue."""

Handler = Callable[[int, FrameType | None], Any] | int | None


class Preemption:
    """Whether this job was told to stop, and how it ends so that it comes back.

    The handler only sets a flag. One that was there before is kept: submitit's is called by :meth:`hand_over`, any
    other one right after the flag was set. Slurm signals every process of a job, DataLoader workers too; in those that
    inherit the handler it does nothing. A second signal changes nothing: Slurm announces a preemption and a time limit
    that is near with the same one.

    Args:
        signal_name: Without "SIG"; default: the environment's ``SUBMITIT_PREEMPT_SIGNAL``, else "USR2".
        group: Over which the ranks agree; default: the default group. A gloo group saves a GPU job the host's wait for
            the device in every :meth:`agreed`.
        grace: Seconds from the first signal to the forced end (:meth:`force`) of a process that has not handed over by
            then, whatever its main thread waits for; None for none.

    Raises:
        ValueError: There is no such signal, it cannot be caught, or the grace is not positive.
        RuntimeError: Made outside of the main thread, where Python installs no handler.
    """

    def __init__(
        self, signal_name: str | None = None, *, group: dist.ProcessGroup | None = None, grace: float | None = None
    ) -> None:
        """Install the handler, until :meth:`close`."""
        number = named(signal_name or os.environ.get("SUBMITIT_PREEMPT_SIGNAL") or DEFAULT_SIGNAL)
        if grace is not None and not grace > 0:
            raise ValueError(f"grace {grace}: expected seconds above 0, or None for no forced end")
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("Preemption: signal handlers can be installed in the main thread only; make it there")
        self.signal = number
        self._group = group
        self._raised = False
        self._process = os.getpid()
        self._previous: Handler = signal.getsignal(number)
        self._by_submitit = _is_submitits(self._previous)
        self._grace = grace
        signal.signal(number, self._handle)
        self._deadline = None if grace is None else Deadline(number, grace, self._too_late)

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
        if not first:
            self._no_deadline()  # rank 0 has its own, and what is left to do is its
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
                self._no_deadline()
        else:
            self._no_deadline()
            print(f"rank {_rank()}: stopped by {self.signal.name}; nobody restarts this job", file=sys.stderr)
            raise SystemExit(128 + self.signal)
        _wait_for_the_end()

    def force(self) -> NoReturn:
        """End this process now, without asking the others: there is no step boundary to be reached any more.

        Rank 0 has the job brought back as in :meth:`hand_over`, if it can; the exit status is that of a process which
        the signal has ended. Nothing is unwound, so what was kept for a restart stays. Enters no collective.
        """
        if _rank() == 0:
            try:
                if self._by_submitit and callable(self._previous):
                    self._previous(self.signal, None)
                elif not self._by_submitit and "SLURM_JOB_ID" in os.environ:
                    _requeue(os.environ["SLURM_JOB_ID"])
            except SystemExit:
                pass  # submitit has requeued
            except Exception as error:
                print(f"rank 0: the job could not be requeued: {error}", file=sys.stderr)
        elif self._by_submitit or "SLURM_JOB_ID" in os.environ:
            time.sleep(BEHIND_RANK_0)
        _leave(128 + self.signal)

    def close(self) -> None:
        """Put the handler that was there before back, and give the deadline up. May be called twice."""
        self._no_deadline()
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

    def _no_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def _too_late(self) -> None:
        """In the deadline's thread; the main thread is stuck, or its step takes too long."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        where = "".join(traceback.format_stack(frame)[-3:]) if frame is not None else ""
        print(
            f"rank {_rank()}: {self.signal.name} came {self._grace:g} s ago, and this process still runs; it ends "
            f"now, and what was kept for a restart stays. It was in\n{where}",
            file=sys.stderr,
            flush=True,
        )
        self.force()

    def _maximum(self, value: int) -> int:
        """The largest value of any rank. Collectives: one all-reduce, if the process group was started."""
        if not (dist.is_available() and dist.is_initialized()):
            return value
        on_host = dist.get_backend(self._group) == "gloo" or not torch.cuda.is_available()
        device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
        held = torch.tensor([value], dtype=torch.int32, device=device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self._group)
        return int(held.item())


def named(name: str) -> signal.Signals:
    """The signal of a name, with or without "SIG".

    Raises:
        ValueError: There is none, or it cannot be caught.
    """
    number = getattr(signal, f"SIG{name.removeprefix('SIG')}", None)
    if not isinstance(number, signal.Signals) or number in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(f"signal {name!r}: not one that can be caught; name one such as USR2 or TERM")
    return number


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
