"""launch/train.py under torchrun: two real processes, from the outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from dist_stability.experiments.arms import Arm, is_done, run_arm
from dist_stability.experiments.digests import differences
from dist_stability.report.events import read_events, read_json

TRAIN = Path(__file__).parent.parent / "launch" / "train.py"
SMALL = ("--steps", "8", "--batch-size", "8", "--probe-size", "8", "--warmup", "2", "--device", "cpu", "--state-digest")


def launch(out: Path, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run the script under torchrun, or, with one rank, alone."""
    alone = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--local-addr=127.0.0.1"]
    return subprocess.run(
        [sys.executable, *(torchrun if ranks > 1 else []), str(TRAIN), *SMALL, *arguments, "--out", str(out)],
        env={**alone, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def unequal(first: Path, second: Path) -> list[str]:
    said = []
    for rank in range(2):
        images = [json.loads((folder / f"state-rank{rank}.json").read_text()) for folder in (first, second)]
        said += [f"rank {rank}: {name}" for name in differences(*images)]
    return said


def guarded(out: Path, parallel: str) -> None:
    choice = () if parallel == "ddp" else ("--parallel", parallel)
    ended = launch(out, *choice, "--inject", "nan:step=4,rank=1")
    assert ended.returncode == 0, ended.stderr
    assert "batch 4: veto" in ended.stdout
    summary = read_json(out / "summary.json")
    assert (summary["refused"], summary["world_size"], summary["parallel"]) == ([4], 2, parallel)
    assert len(read_events(out / "events.jsonl")) == 8  # rank 0 alone writes


def test_fsdp2_and_its_twin_which_goes_the_way_the_demo_goes(tmp_path: Path) -> None:
    guarded(tmp_path / "guarded", "fsdp2")
    arm = Arm("twin", "twin", (*SMALL, "--parallel", "fsdp2", "--rule", "off", "--skip-batches", "4"), 2)
    assert run_arm(arm, tmp_path / "twin")
    assert is_done(arm, tmp_path / "twin")  # a second time there is nothing to do
    assert unequal(tmp_path / "guarded", tmp_path / "twin") == []


def test_ddp_is_the_default_of_several_processes(tmp_path: Path) -> None:
    guarded(tmp_path, "ddp")


def test_a_lockstep_error_ends_every_rank_with_a_reason(tmp_path: Path) -> None:
    ended = launch(
        tmp_path, "--parallel", "fsdp2", "--timeout", "10", "--inject", "raise:step=3,phase=loss-in-forward,rank=1"
    )
    assert ended.returncode != 0
    summary = read_json(tmp_path / "summary.json")
    assert not summary["finished"]
    assert summary["error"] == "LockstepError" and summary["ranks"] == [1] and summary["attempt"] == 3
    assert "injected" in summary["reason"]
    assert "rank 1: LockstepError" in ended.stderr


def test_the_script_runs_alone(tmp_path: Path) -> None:
    ended = launch(tmp_path, "--steps", "3", ranks=1)
    assert ended.returncode == 0, ended.stderr
    assert read_json(tmp_path / "summary.json")["parallel"] == "single"
    assert "3/3" in ended.stdout
