"""Jobs on a real Slurm with two nodes: the templates and launch/submit.py, cut short, back again, and equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from programs import PROGRAM, SUBMIT, alive, finals, lives, paused, uninterrupted, until
from testbed import ROOT, TEMPLATES, Testbed

from dist_stability.experiments.digests import differences

pytestmark = pytest.mark.cluster

TRAIN = ROOT / "launch" / "train.py"
SMALL = "--task digits --parallel fsdp2 --steps 6 --batch-size 8 --probe-size 8 --warmup 2 --device cpu --state-digest"
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
    slurm.ask(sys.executable, *torchrun, TRAIN, *SMALL.split(), "--out", out)
    return out


def assert_same_final_state(first: Path, second: Path) -> None:
    for rank in range(2):
        images = [json.loads((folder / f"state-rank{rank}.json").read_text()) for folder in (first, second)]
        assert differences(*images) == []


def assert_cut_at_5_and_finished_alike(out: Path, expected: tuple[str, str]) -> None:
    assert finals(out) == expected
    for rank in range(2):
        assert [step for step, _, _ in lives(out, rank)] == [0, 5]
    assert {node for rank in range(2) for _, _, node in lives(out, rank)} == NODES
    until("the processes to end", lambda: not alive(out), 20, lambda: f"still there: {alive(out)}")


def high_priority_job(slurm: Testbed, folder: Path) -> str:
    """A job that takes both nodes for a moment, from whoever has them."""
    return slurm.submit(
        "--partition=high", "--nodes=2", "--exclusive", "--output=high.log", "--wrap=srun hostname", folder=folder
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


@pytest.mark.parametrize("template", ["torchrun-n-nodes", "srun", "torchrun-1-node"])
def test_a_template_trains_fsdp2_like_two_local_processes(
    slurm: Testbed, trained: Path, tmp_path: Path, template: str
) -> None:
    processes = "2" if template == "torchrun-1-node" else "1"
    job = slurm.submit(
        "--time=5",
        TEMPLATES / f"{template}.sbatch",
        TRAIN,
        *SMALL.split(),
        f"--out={tmp_path / 'run'}",
        folder=tmp_path,
        NPROC_PER_NODE=processes,
    )
    slurm.until_state(job, "COMPLETED", 120, tmp_path / f"train-{job}.log")
    assert slurm.job(job)["NumNodes"] == ("1" if template == "torchrun-1-node" else "2")
    assert_same_final_state(tmp_path / "run", trained)


@pytest.mark.parametrize("template", ["torchrun-n-nodes", "srun"])
def test_preempted_by_a_job_of_higher_priority_and_back(
    slurm: Testbed, expected: tuple[str, str], tmp_path: Path, template: str
) -> None:
    out = tmp_path / "run"
    arguments = (f"--out={out}", "--pause-at=5", "--resume=auto")
    job = slurm.submit("--time=5", TEMPLATES / f"{template}.sbatch", PROGRAM, *arguments, folder=tmp_path)
    log = tmp_path / f"train-{job}.log"
    until("both ranks to pause", lambda: paused(out), 90, lambda: slurm.told(job, log))
    urgent = high_priority_job(slurm, tmp_path)
    slurm.until_state(urgent, "COMPLETED", 90, log)
    slurm.until_state(job, "COMPLETED", 120, log)
    assert_cut_at_5_and_finished_alike(out, expected)
    assert slurm.job(job)["Restarts"] == "1"
    assert "saved before step 5" in log.read_text()  # appended to, not overwritten


def test_the_time_limit_is_announced_and_the_job_comes_back(
    slurm: Testbed, expected: tuple[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = (f"--out={out}", "--pause-at=5", "--resume=auto")
    # Slurm may send it up to a minute early: the program must have its handler by then, on a busy machine, too.
    job = slurm.submit("--time=2", "--signal=USR2@20", TEMPLATES / "srun.sbatch", PROGRAM, *arguments, folder=tmp_path)
    slurm.until_state(job, "COMPLETED", 240, tmp_path / f"train-{job}.log")
    assert_cut_at_5_and_finished_alike(out, expected)
    assert slurm.job(job)["Restarts"] == "1"


def test_submitted_by_submitit_preempted_and_back(slurm: Testbed, expected: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, str(SUBMIT), "--nnodes=2", "--partition=low", "--time=5", "--wait"]
    with subprocess.Popen(
        [*command, f"--logs={tmp_path / 'jobs'}", str(PROGRAM), f"--out={out}", "--pause-at=5"],
        env=slurm.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as submission:
        try:
            until("both ranks to pause", lambda: paused(out), 90)
            [folder] = (tmp_path / "jobs").glob("[0-9]*")
            slurm.until_state(high_priority_job(slurm, tmp_path), "COMPLETED", 90)
            said, _ = submission.communicate(timeout=150)
        finally:
            submission.kill()
    assert submission.returncode == 0, said
    assert_cut_at_5_and_finished_alike(out, expected)
    assert slurm.job(folder.name)["Restarts"] == "1"
    assert f"job {folder.name}: 2 x 1 processes on slurm" in said
    assert "rank 0: saved before step 5" in said


def test_submit_py_trains_fsdp2_like_two_local_processes(slurm: Testbed, trained: Path, tmp_path: Path) -> None:
    options = ("--nnodes=2", "--time=5", "--wait", f"--logs={tmp_path / 'jobs'}")
    said = slurm.ask(sys.executable, SUBMIT, *options, TRAIN, *SMALL.split(), f"--out={tmp_path / 'run'}")
    assert "6/6" in said  # the progress that rank 0 logs
    assert_same_final_state(tmp_path / "run", trained)


def test_a_rank_that_dies_ends_the_job_and_the_submission_says_so(slurm: Testbed, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, time\nif os.environ['RANK'] == '1': os._exit(7)\ntime.sleep(300)\n")
    command = [sys.executable, SUBMIT, "--nnodes=2", "--time=5", "--wait", f"--logs={tmp_path / 'jobs'}", script]
    ended = subprocess.run(command, env=slurm.environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "rank 1: ended without a result" in ended.stderr
