"""launch/train.py under torchrun: a worker is killed, the agent starts all again, and the run goes on from memory."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import harness
import pytest
import torch

from dist_stability import startup
from dist_stability.experiments import training
from dist_stability.experiments.digests import differences
from dist_stability.experiments.options import parse_options
from dist_stability.experiments.tasks import make_task
from dist_stability.experiments.wrapping import Processes
from dist_stability.report.events import read_events, read_json

TRAIN = Path(__file__).parents[2] / "launch" / "train.py"
SMALL = ("--steps", "12", "--batch-size", "8", "--probe-size", "8", "--warmup", "2", "--device", "cpu")
KEPT = ("--state-digest", "--dropout", "0.1", "--timeout", "15", "--inject", "gradient-scale:step=4,factor=1000")


def notes(rank: int, world: int) -> list[Any]:
    """What ranks that were started again read of the notes of those that died, in the same store."""
    found: list[Any] = []
    for start in range(2):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(start)
        startup._controllers = itertools.count()
        vote, watch = startup.make_vote(None, torch.device("cpu"), 10.0)
        assert watch is not None
        found.append(watch.failure())
        vote.gather(None, 0)
        watch.fail(0, "it died")
        vote.close()
    return found


def test_notes_of_the_dead_are_not_read() -> None:
    try:
        assert harness.pool(2).run(notes) == [[None, None]] * 2
    finally:
        harness.pool(2).close()  # its environment was changed


def launch(out: Path, job: str, *arguments: str, restarts: int = 3) -> subprocess.CompletedProcess[str]:
    alone = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--max-restarts={restarts}", f"--rdzv-id={job}"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    return subprocess.run(
        [sys.executable, *torchrun, str(TRAIN), *SMALL, *KEPT, *arguments, "--out", str(out)],
        # Without the last one gloo finds addresses of the dead in the store that the agent shares with its workers.
        env={
            **alone,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )


def undisturbed(rank: int, world: int, *arguments: str) -> int:
    """The same program in a process group that is there already: without an agent."""
    options = parse_options((*SMALL, *KEPT, *arguments), world)
    task = make_task(options.task, dropout=options.dropout)
    return training.run(options, task, Processes(rank, world, torch.device("cpu")))


def left(job: str) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if f".{job}." in name]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs /dev/shm")
@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_killed_and_started_again_by_the_agent(parallel: str, tmp_path: Path) -> None:
    job = f"elastic-{uuid.uuid4().hex[:8]}"
    mode = ("--parallel", parallel)
    assert harness.pool(2).run(undisturbed, *mode, "--out", str(tmp_path / "whole")) == [0, 0]
    kept = ("--persist", "shm", "--resume", "auto", "--inject", "kill:step=8,phase=vote,rank=1")
    ended = launch(tmp_path / "killed", job, *mode, *kept)
    assert ended.returncode == 0, ended.stderr
    assert "nothing to resume from in shared memory" in ended.stdout
    found = re.search(r"resumed at attempt (\d+) from shared memory .*the newest that all 2 ranks have", ended.stdout)
    assert found is not None and int(found[1]) == 8, ended.stdout
    for rank in range(2):
        images = [json.loads((tmp_path / run / f"state-rank{rank}.json").read_text()) for run in ("whole", "killed")]
        assert differences(*images) == [], f"rank {rank}"
    first, second = (read_events(tmp_path / run / "events.jsonl") for run in ("whole", "killed"))
    assert [event["attempt"] for event in second] == list(range(12))
    assert [event["action"] for event in second] == [event["action"] for event in first]
    assert [event["measurement"] for event in second] == [event["measurement"] for event in first]
    summaries = [read_json(tmp_path / run / "summary.json") for run in ("whole", "killed")]
    for name in ("refused", "undone", "final_probe", "evaluation", "probe"):
        assert summaries[0][name] == summaries[1][name], name
    assert left(job) == []
    assert ended.stderr.count("exitcode: -9") == 1


@pytest.mark.slow
def test_from_disk_after_the_job_has_ended_and_under_another_kind_of_parallelism(tmp_path: Path) -> None:
    job, out = f"disk-{uuid.uuid4().hex[:8]}", tmp_path / "killed"
    mode, kept = ("--parallel", "fsdp2"), ("--persist", "disk", "--checkpoint-every", "3", "--resume", "auto")
    assert launch(tmp_path / "whole", job, *mode).returncode == 0
    died = launch(out, job, *mode, *kept, "--inject", "kill:step=8,phase=vote,rank=1", restarts=0)
    assert died.returncode != 0
    ended = launch(out, job, *mode, *kept)
    assert ended.returncode == 0, ended.stderr
    assert f"resumed at attempt 6 from checkpoints in {out}/checkpoints (" in ended.stdout
    for rank in range(2):
        images = [json.loads((each / f"state-rank{rank}.json").read_text()) for each in (tmp_path / "whole", out)]
        assert differences(*images) == [], f"rank {rank}"
    other = launch(out, job, "--parallel", "ddp", *kept)
    assert other.returncode == 0, other.stderr
    assert "resumed at attempt 9 from checkpoints" in other.stdout
    assert "written by 2 ranks (fsdp2) and taken over by 2 ranks (ddp): values are equal" in other.stdout
