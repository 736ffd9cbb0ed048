"""launch/submit.py --executor local: real submitit, two gloo processes, state sharded over them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from programs import PROGRAM, SUBMIT, environment, finals, lives, paused, uninterrupted, until

pytest.importorskip("submitit")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return uninterrupted(tmp_path_factory.mktemp("uninterrupted"))


def submit(tmp_path: Path, *options: str, script: Path = PROGRAM, arguments: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, str(SUBMIT), "--executor=local", "--wait", f"--logs={tmp_path / 'logs'}", *options]
    return subprocess.Popen(
        [*command, str(script), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def logs(tmp_path: Path) -> str:
    return "\n".join(f"== {path}\n{path.read_text()}" for path in sorted((tmp_path / "logs").glob("*/*_log.*")))


def test_signalled_requeued_and_equal_to_the_last_bit(tmp_path: Path, expected: tuple[str, str]) -> None:
    out = tmp_path / "run"
    job = submit(tmp_path, "--nproc_per_node=2", arguments=("--out", str(out), "--pause-at", "5"))
    until("both ranks to pause", lambda: paused(out), 90, lambda: logs(tmp_path))
    for rank in range(2):  # every task, as Slurm does (LocalJob._interrupt would signal the controller)
        os.kill(lives(out, rank)[0][1], signal.SIGUSR2)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said + logs(tmp_path)
    assert finals(out) == expected
    for rank in range(2):
        assert [step for step, _, _ in lives(out, rank)] == [0, 5]
    assert "rank 0: saved before step 5" in said  # --wait follows the log over the restart
    folder = next(path for path in (tmp_path / "logs").iterdir() if path.name.isdigit())  # submitit makes a %j, too
    assert f"job {folder.name}: 1 x 2 processes on local" in said
    assert f"log of rank 0: {folder}/{folder.name}_0_log.out" in said


@pytest.mark.slow  # the time limit has to come near
def test_the_time_limit_counts_as_a_requeue(tmp_path: Path, expected: tuple[str, str]) -> None:
    out = tmp_path / "run"
    job = submit(
        tmp_path,
        "--nproc_per_node=2",
        "--time=1:00",
        "--signal_delay=30",
        "--requeues=1",
        arguments=("--out", str(out), "--pause-at", "5"),
    )
    said, _ = job.communicate(timeout=170)
    assert job.returncode == 0, said + logs(tmp_path)
    assert finals(out) == expected
    assert [step for step, _, _ in lives(out, 0)] == [0, 5]
    assert "(0 remaining timeouts)" in logs(tmp_path)


def test_no_requeue_left_ends_the_job_with_the_reason_and_the_state_saved(tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = submit(
        tmp_path, "--nproc_per_node=2", "--requeues=0", "--time=2", arguments=("--out", str(out), "--pause-at", "5")
    )
    until("both ranks to pause", lambda: paused(out), 90, lambda: logs(tmp_path))
    os.kill(lives(out, 0)[0][1], signal.SIGUSR2)  # with a limit this short, submitit calls every signal a time-out
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 1
    assert "timed-out too many times" in said
    assert (out / "rank0.pt").exists() and (out / "rank1.pt").exists()


def test_a_script_that_fails_fails_the_job(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit(3)\n")
    job = submit(tmp_path, script=script)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 1
    assert re.search(r"rank 0: .*ScriptFailed.*ended with status 3", said, re.DOTALL)


def test_a_script_gets_what_torchrun_would_set_and_its_own_arguments(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, beside\n"
        "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')\n"
        "print('got', [os.environ[name] for name in names], sys.argv[1:], __name__, beside.value)\n"
        "os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])\n"
    )
    (tmp_path / "beside.py").write_text("value = 7\n")
    job = submit(tmp_path, "--nproc_per_node=2", script=script, arguments=("--wait", "a b"))
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said + logs(tmp_path)
    assert "got ['0', '2', '0', '2'] ['--wait', 'a b'] __main__ 7" in said
    assert "got ['1', '2', '1', '2'] ['--wait', 'a b'] __main__ 7" in logs(tmp_path)


def test_debug_runs_in_this_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os\nprint('parent', os.getppid(), 'rank', os.environ['RANK'])\n")
    command = [sys.executable, str(SUBMIT), "--executor=debug", f"--logs={tmp_path / 'logs'}", str(script)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert f"parent {os.getpid()} rank 0" in ended.stdout
