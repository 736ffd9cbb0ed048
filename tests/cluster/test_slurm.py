"""Jobs on a real Slurm with two nodes: the templates and launch/submit.py, cut short, back again, and equal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from programs import PROGRAM, SUBMIT, alive, finals, lives, paused, uninterrupted, until
from testbed import ROOT, TEMPLATES, Testbed

from dist_stability.experiments.digests import differences
from dist_stability.report.events import read_events

pytestmark = pytest.mark.cluster

TRAIN = ROOT / "launch" / "train.py"
STEPS = 28
SMALL = f"--task digits --parallel fsdp2 --steps {STEPS} --batch-size 8 --probe-size 8 --warmup 2 --device cpu"
NODES = {"0x7f000001", "0x7f000002"}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What the small sharded program ends with if nobody stops it: two local processes, no Slurm."""
    return uninterrupted(tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="module")
def trained(slurm: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training program as two local processes: the folder of its run."""
    out = tmp_path_factory.mktemp("trained")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--local-addr=127.0.0.1")
    slurm.ask(sys.executable, *torchrun, TRAIN, *SMALL.split(), "--state-digest", "--out", out)
    return out


def assert_same_final_state(first: Path, second: Path) -> None:
    for rank in range(2):
        images = [json.loads((folder / f"state-rank{rank}.json").read_text()) for folder in (first, second)]
        assert differences(*images) == []


def high_priority_job(slurm: Testbed, folder: Path, command: str = "srun hostname") -> str:
    """A job that takes both nodes for a moment, from whoever has them."""
    return slurm.submit(
        "--partition=high", "--nodes=2", "--exclusive", "--output=high.log", f"--wrap={command}", folder=folder
    )


def test_two_nodes_are_up_and_a_job_reaches_one_from_the_other_by_name(slurm: Testbed) -> None:
    assert slurm.ask("sinfo", "-h", "-p", "low", "-o", "%D %T").split() == ["2", "idle"]
    program = (
        'import os, socket; print(os.environ["SLURMD_NODENAME"], socket.gethostbyname(os.environ["SLURMD_NODENAME"]))'
    )
    said = slurm.ask("srun", "-N2", "-n2", sys.executable, "-c", program)
    assert sorted(said.splitlines()) == ["0x7f000001 127.0.0.1", "0x7f000002 127.0.0.2"]


def test_start_again_changes_nothing_and_stop_knows_its_own_folders_only(slurm: Testbed, tmp_path: Path) -> None:
    before = (slurm.state / "testbed-processes").read_text()
    slurm.ask(TEMPLATES / "testbed" / "start", slurm.state)
    assert (slurm.state / "testbed-processes").read_text() == before
    (tmp_path / "somebody's").touch()
    for script in ("start", "stop"):
        refused = subprocess.run([TEMPLATES / "testbed" / script, tmp_path], capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1
        assert "testbed" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["somebody's"]


@contextmanager
def submitted(slurm: Testbed, folder: Path, *script: str | Path, options: tuple[str, ...] = ()) -> Iterator[Submission]:
    """A job of launch/submit.py on both nodes, followed by it."""
    command = [sys.executable, str(SUBMIT), "--nnodes=2", "--time=5", "--wait", f"--logs={folder / 'jobs'}", *options]
    process = subprocess.Popen(
        [*command, *map(str, script)],
        env=slurm.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield Submission(process, folder / "jobs")
    finally:
        process.kill()
        process.wait()


class Submission:
    """What launch/submit.py follows."""

    def __init__(self, process: subprocess.Popen[str], logs: Path) -> None:
        self._process, self._logs = process, logs

    @property
    def job(self) -> str:
        [folder] = self._logs.glob("[0-9]*")
        return folder.name

    def end(self) -> str:
        said, _ = self._process.communicate(timeout=150)
        assert self._process.returncode == 0, said
        return said


# ---------------------------------------------------------------------- the training program


class Training:
    """A run of launch/train.py on both nodes, FSDP2 over them; slow for a while in its first life, to be cut there."""

    def __init__(self, slurm: Testbed, folder: Path, seconds: float = 1.2, tiers: str = "shm") -> None:
        self._slurm, self._folder, self._out = slurm, folder, folder / "run"
        slow = f"sleep:step=10,length={STEPS - 10},phase=gradients,seconds={seconds:g}"
        kept = (
            "--state-digest",
            f"--persist={tiers}",
            "--checkpoint-every=1000",
            "--resume=auto",
            f"--inject={slow}",
            f"--out={self._out}",
        )
        self.command = (TRAIN, *SMALL.split(), *kept)

    def sbatch(self, template: str, *options: str) -> tuple[str, Path]:
        """The job's id and its log."""
        script = (TEMPLATES / f"{template}.sbatch", *self.command)
        job = self._slurm.submit("--time=5", *options, *script, folder=self._folder)
        return job, self._folder / f"train-{job}.log"

    def until_under_way(self, job: str, log: Path | None = None) -> None:
        until("ten steps", lambda: len(self.events()) >= 12, 90, lambda: self._slurm.told(job, log))

    def events(self) -> list[dict[str, Any]]:
        path = self._out / "events.jsonl"
        return read_events(path) if path.exists() else []

    def processes(self, job: str) -> list[int]:
        """Its ranks that run now."""
        return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit() and _rank(folder, job)]

    def assert_went_on(self, job: str, trained: Path, said: str, source: str = "shared memory") -> None:
        """It went on where it was cut, and ended like a run that nobody cut; nothing of it is left."""
        resumed = re.findall(rf"resumed at attempt (\d+) from {source}", said)
        assert len(resumed) == 1 and 10 <= int(resumed[0]) < STEPS, said
        assert_same_final_state(self._out, trained)
        assert [event["attempt"] for event in self.events()] == list(range(STEPS))
        until("the processes to end", lambda: not self.processes(job), 20)
        assert [name for name in os.listdir("/dev/shm") if name.startswith("dist_stability.")] == []


def _rank(process: Path, job: str) -> bool:
    """Whether a process, by its folder in /proc, is one that trains; neither srun nor torchrun nor a shell."""
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        environment = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    started = any(name.startswith(b"RANK=") for name in environment) or "submitit.core._submit" in words
    return started and f"SLURM_JOB_ID={job}".encode() in environment and "python" in Path(words[0]).name


def test_the_template_for_one_node_goes_on_after_a_process_was_killed(
    slurm: Testbed, trained: Path, tmp_path: Path
) -> None:
    run = Training(slurm, tmp_path)
    script = (TEMPLATES / "torchrun-1-node.sbatch", *run.command)
    job = slurm.submit("--time=5", *script, folder=tmp_path, NPROC_PER_NODE="2")
    log = tmp_path / f"train-{job}.log"
    run.until_under_way(job, log)
    os.kill(max(run.processes(job)), signal.SIGKILL)
    slurm.until_state(job, "COMPLETED", 90, log)
    assert slurm.job(job)["NumNodes"] == "1" and slurm.job(job)["Restarts"] == "0"
    run.assert_went_on(job, trained, log.read_text())


def test_preempted_by_a_job_of_higher_priority_and_back(slurm: Testbed, trained: Path, tmp_path: Path) -> None:
    run = Training(slurm, tmp_path)
    job, log = run.sbatch("torchrun-n-nodes")
    run.until_under_way(job, log)
    slurm.until_state(high_priority_job(slurm, tmp_path), "COMPLETED", 90, log)
    slurm.until_state(job, "COMPLETED", 120, log)
    assert slurm.job(job)["Restarts"] == "1"
    assert "told to stop by SIGUSR2: this state is kept" in log.read_text()
    run.assert_went_on(job, trained, log.read_text())


def test_the_time_limit_is_announced_and_the_job_comes_back(slurm: Testbed, trained: Path, tmp_path: Path) -> None:
    run = Training(slurm, tmp_path, seconds=4.0)
    # Slurm looks at limits every 30 s, and may send it that much earlier: the program has its handler by then.
    job, log = run.sbatch("srun", "--time=1", "--signal=USR2@5")
    slurm.until_state(job, "COMPLETED", 200, log)
    assert slurm.job(job)["Restarts"] == "1"
    assert "told to stop by SIGUSR2: this state is kept" in log.read_text()
    run.assert_went_on(job, trained, log.read_text())


@pytest.mark.parametrize("how", ["one process", "all of the step"])
def test_killed_and_started_again_on_the_same_nodes(slurm: Testbed, trained: Path, tmp_path: Path, how: str) -> None:
    run = Training(slurm, tmp_path)
    job, log = run.sbatch("srun" if how == "one process" else "torchrun-n-nodes")
    run.until_under_way(job, log)
    if how == "one process":
        os.kill(max(run.processes(job)), signal.SIGKILL)
    else:
        slurm.ask("scancel", "--signal=KILL", f"{job}.0")
    slurm.until_state(job, "COMPLETED", 90, log)
    assert slurm.job(job)["Restarts"] == "0"
    run.assert_went_on(job, trained, log.read_text())


def test_submitted_by_submit_py_preempted_and_back_with_its_memory_emptied(
    slurm: Testbed, trained: Path, tmp_path: Path
) -> None:
    """As on other nodes, or where the cluster cleans up between two jobs: the state is on disk, too."""
    run = Training(slurm, tmp_path, tiers="shm,disk")
    with submitted(slurm, tmp_path, *run.command) as submission:
        until("ten steps", lambda: len(run.events()) >= 12, 90)
        urgent = high_priority_job(slurm, tmp_path, "srun hostname; rm /dev/shm/dist_stability.*")
        slurm.until_state(urgent, "COMPLETED", 90)
        said = submission.end()
    assert slurm.job(submission.job)["Restarts"] == "1"
    assert f"job {submission.job}: 2 x 1 processes on slurm" in said
    run.assert_went_on(submission.job, trained, said, "checkpoints in")


def test_submitted_by_submit_py_killed_and_started_again(slurm: Testbed, trained: Path, tmp_path: Path) -> None:
    run = Training(slurm, tmp_path)
    with submitted(slurm, tmp_path, *run.command) as submission:
        until("ten steps", lambda: len(run.events()) >= 12, 90)
        os.kill(max(run.processes(submission.job)), signal.SIGKILL)
        said = submission.end()
    assert slurm.job(submission.job)["Restarts"] == "0"
    run.assert_went_on(submission.job, trained, said)


# ---------------------------------------------------------------------- a loop of one's own


def test_a_loop_that_saves_by_itself_is_preempted_and_comes_back(
    slurm: Testbed, expected: tuple[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = (f"--out={out}", "--pause-at=5", "--resume=auto")
    job = slurm.submit("--time=5", TEMPLATES / "srun.sbatch", PROGRAM, *arguments, folder=tmp_path)
    log = tmp_path / f"train-{job}.log"
    until("both ranks to pause", lambda: paused(out), 90, lambda: slurm.told(job, log))
    slurm.until_state(high_priority_job(slurm, tmp_path), "COMPLETED", 90, log)
    slurm.until_state(job, "COMPLETED", 120, log)
    assert finals(out) == expected
    for rank in range(2):
        assert [step for step, _, _ in lives(out, rank)] == [0, 5]
    assert {node for rank in range(2) for _, _, node in lives(out, rank)} == NODES
    until("the processes to end", lambda: not alive(out), 20, lambda: f"still there: {alive(out)}")
    assert slurm.job(job)["Restarts"] == "1"
    assert "saved before step 5" in log.read_text()  # appended to, not overwritten


def test_a_rank_that_dies_ends_the_job_and_the_submission_says_so(slurm: Testbed, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, time\nif os.environ['RANK'] == '1': os._exit(7)\ntime.sleep(300)\n")
    command = [sys.executable, SUBMIT, "--nnodes=2", "--time=5", "--wait", "--restarts=0"]
    command += [f"--logs={tmp_path / 'jobs'}", script]
    ended = subprocess.run(command, env=slurm.environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "rank 1: ended without a result" in ended.stderr
