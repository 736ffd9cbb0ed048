"""The flag: who is called, who is not, what is agreed, and how a job ends that nobody brings back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Pool
from programs import environment

from dist_stability.submission import Preemption


@pytest.fixture(autouse=True)
def _handlers_unchanged() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)] == before


def agree(rank: int, world: int) -> list[bool]:
    with Preemption() as preemption:
        before = preemption.agreed()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return [before, preemption.agreed(), preemption.raised, preemption.agreed()]


def test_one_rank_has_the_signal_and_all_agree(two: Pool) -> None:
    assert two.run(agree) == [[False, True, False, True], [False, True, True, True]]


def test_a_handler_that_was_there_is_called_and_put_back() -> None:
    heard: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        ours = signal.getsignal(signal.SIGTERM)
        preemption = Preemption("SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.raised and preemption.agreed()
        assert heard == [signal.SIGTERM]
        preemption.close()
        preemption.close()
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_handler_that_came_later_is_left_alone() -> None:
    preemption = Preemption()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    preemption.close()
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def test_the_environment_names_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    with Preemption() as preemption:
        assert preemption.signal == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.raised


@pytest.mark.parametrize("name", ["KILL", "STOP", "nothing", "SIG_DFL", "USR9"])
def test_a_signal_that_cannot_be_caught_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="USR2"):
        Preemption(name)


def test_made_outside_of_the_main_thread_it_says_where_to_make_it() -> None:
    errors: list[Exception] = []

    def make() -> None:
        try:
            Preemption()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


def test_a_forked_worker_hears_nothing() -> None:
    heard: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(os.getpid()))
    try:
        with Preemption() as preemption:
            worker = os.fork()
            if worker == 0:
                os.kill(os.getpid(), signal.SIGUSR2)
                os._exit(1 if preemption.raised or heard else 0)
            assert os.waitpid(worker, 0)[1] == 0
            assert not preemption.raised
    finally:
        signal.signal(signal.SIGUSR2, previous)


ALONE = """
import os, signal
from dist_stability.submission import Preemption
with Preemption() as preemption:
    os.kill(os.getpid(), signal.SIGUSR2)
    assert preemption.agreed()
    try:
        preemption.hand_over()
    finally:
        print("unwound")
"""


STUCK = """
import os, signal, time
from dist_stability.submission import Preemption
with Preemption(grace=0.5) as preemption:
    os.kill(os.getpid(), signal.SIGUSR2)
    SECOND
    time.sleep(300)
    print("unwound")
"""


def run_alone(program: str = ALONE, /, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in environment().items() if not name.startswith(("SLURM", "SUBMITIT"))}
    return subprocess.run(
        [sys.executable, "-c", program], env={**kept, **variables}, capture_output=True, text=True, timeout=60
    )


def test_outside_of_a_cluster_the_status_says_that_it_was_stopped() -> None:
    ended = run_alone()
    assert ended.returncode == 128 + signal.SIGUSR2
    assert "nobody restarts" in ended.stderr and "unwound" in ended.stdout


@pytest.mark.parametrize("present", [True, False])
def test_a_requeue_that_fails_is_an_error_that_says_why(present: bool, tmp_path: Path) -> None:
    """Slurm itself is in tests/cluster; here a command in its place refuses."""
    command = tmp_path / "scontrol"
    command.write_text('#!/bin/sh\necho "no: $*" >&2\nexit 1\n')
    command.chmod(0o755 if present else 0o644)
    ended = run_alone(SLURM_JOB_ID="17", PATH=str(tmp_path) if not present else f"{tmp_path}:{os.environ['PATH']}")
    assert ended.returncode == 1
    assert (
        "no: requeue 17; was it submitted with sbatch --requeue?" if present else "scontrol is not on"
    ) in ended.stderr


def scontrol(folder: Path) -> dict[str, str]:
    """A command in the place of Slurm's that writes down what it was asked."""
    command = folder / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$*" >> {folder}/asked\n')
    command.chmod(0o755)
    return {"SLURM_JOB_ID": "17", "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("second", ["", "os.kill(os.getpid(), signal.SIGUSR2)"])
def test_who_does_not_hand_over_in_time_is_ended_and_the_job_requeued_once(second: str, tmp_path: Path) -> None:
    ended = run_alone(STUCK.replace("SECOND", second), **scontrol(tmp_path))
    assert ended.returncode == 128 + signal.SIGUSR2
    assert "SIGUSR2 came 0.5 s ago" in ended.stderr
    assert "unwound" not in ended.stdout
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


def test_who_hands_over_in_time_is_not_ended_by_the_deadline(tmp_path: Path) -> None:
    program = ALONE.replace("Preemption()", "Preemption(grace=1.0)").replace(
        "preemption.hand_over()", "preemption.close(); import time; time.sleep(2); preemption.hand_over()"
    )
    ended = run_alone(program)
    assert ended.returncode == 128 + signal.SIGUSR2 and "unwound" in ended.stdout and "came" not in ended.stderr


def test_the_deadline_leaves_the_descriptor_of_others_alone_and_keeps_them_informed() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        with Preemption(grace=60.0) as preemption:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert preemption.raised
            assert os.read(reader, 1)[0] == signal.SIGUSR2
            worker = os.fork()
            if worker == 0:  # what reaches a child is not the parent's
                os._exit(0 if signal.set_wakeup_fd(-1) == -1 else 1)
            assert os.waitpid(worker, 0)[1] == 0
        assert signal.set_wakeup_fd(-1) == writer
        with Preemption(grace=60.0) as preemption:
            signal.set_wakeup_fd(writer)  # asyncio, begun in between
        assert signal.set_wakeup_fd(-1) == writer
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def test_a_grace_that_is_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="expected seconds above 0"):
        Preemption(grace=0.0)
