"""``dist-stability diagnose preflight``: what it writes, under torchrun too, and what it refuses before it begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from choice import often
from torch import nn

from dist_stability.cli import main
from dist_stability.diagnostics.calibration import Calibrator
from dist_stability.diagnostics.preflight import SCORE
from dist_stability.report.events import read_json

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = ("--model", "launch.small_gpt:without_norm", "--data", "launch.small_gpt:data")
HERE = "test_preflight_command"
FAMILY = "the example"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(str(REPOSITORY))


def run(out: Path, *more: str) -> dict[str, Any]:
    assert main(["diagnose", "preflight", *EXAMPLE, *more, "--out", str(out)]) == 0
    return read_json(out / "summary.json")


def test_it_writes_a_page_figures_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(tmp_path, "--lr", "0.3")
    found = summary["preflight"]
    assert found["level"] == "high" and 0.001 < found["recommended"] < 0.1
    assert summary["settings"]["model"] == "launch.small_gpt:without_norm" and summary["settings"]["ranks"] == 1
    page, said = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    for words in (found["verdict"], "blocks.3", "normalization layers in the blocks: no", "Recommended: at most"):
        assert words in page and words in said
    assert page.count("data:image/png") == 3
    for name in ("eigenvalues", "depth", "learning_rate"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_sgd_gets_a_profile_and_no_verdict(tmp_path: Path) -> None:
    summary = run(tmp_path, "--lr", "0.3", "--optimizer", "sgd")
    assert summary["preflight"]["level"] == "unknown" and summary["preflight"]["risk"] is None
    assert len(summary["preflight"]["profile"]["blocks"]) == 4 and not (tmp_path / "learning_rate.png").exists()


def test_a_probability_needs_a_calibrator_of_this_score_and_family(tmp_path: Path) -> None:
    own = Calibrator(SCORE, FAMILY, 2.0, 0.0, -3.0, 3.0, 81, 40, 27, 0.05, 0.25, ("a", "b"))
    own.save(tmp_path / "own.json")
    given = ("--calibration", str(tmp_path / "own.json"), "--family", FAMILY)
    summary = run(tmp_path / "out", "--lr", "0.3", "--no-search", *given)
    assert "diverges with probability" in summary["preflight"]["chance"]
    assert summary["settings"]["calibration"]["sources"] == ["a", "b"]
    assert "not a probability" in run(tmp_path / "bare", "--lr", "0.3", "--no-search")["preflight"]["chance"]


def nothing() -> nn.Module:
    return nn.Linear(2, 2)


def bare(tmp_path: Path) -> list[str]:
    Calibrator("another score", FAMILY, 2.0, 0.0, -3.0, 3.0, 81, 40, 27, 0.05, 0.25, ()).save(tmp_path / "score.json")
    Calibrator(SCORE, "others", 2.0, 0.0, -3.0, 3.0, 81, 40, 27, 0.05, 0.25, ()).save(tmp_path / "family.json")
    (tmp_path / "broken.json").write_text("{}")
    return ["diagnose", "preflight", "--lr", "0.1", "--out", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lr", "0"), "--lr: expected a number > 0"),
        (("--lr", "nan"), "--lr: expected a number > 0"),
        (("--model", "launch.small_gpt:nobody"), "has no nobody"),
        (("--model", "no_such_module:model"), "cannot import no_such_module"),
        (("--model", "launch.small_gpt:data"), "expected an nn.Module"),
        (("--data", "launch.small_gpt:model"), "expected an iterable"),
        (("--blocks", "blocks.9"), "no module 'blocks.9'"),
        (("--batches", "0"), "--batches: expected at least 1"),
        (("--family", "x"), "--family: goes with --calibration"),
        (("--calibration", "score.json"), "say with --family"),
        (("--calibration", "nowhere.json", "--family", FAMILY), "no such file"),
        (("--calibration", "broken.json", "--family", FAMILY), "not a calibrator"),
        (("--calibration", "score.json", "--family", FAMILY), "it is about the score 'another score'"),
        (("--calibration", "family.json", "--family", FAMILY), "fitted on runs of 'others'"),
        (("--model", f"{HERE}:nothing", "--data", f"{HERE}:pairs"), "found no list of like modules in Linear"),
        (("--model", f"{HERE}:nothing", "--data", f"{HERE}:exploding"), "must be finite"),
        (("--parallel", "ddp"), "start it with torchrun"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    given = [str(tmp_path / word) if word.endswith(".json") else word for word in arguments]
    assert main([*bare(tmp_path), *EXAMPLE, *given]) == 1
    said = capsys.readouterr().err
    assert words in said and "rank 0" in said and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_found_out_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    assert main(["diagnose", "preflight", *EXAMPLE, "--lr", "0.1", "--out", out]) == 1
    said = capsys.readouterr()
    assert "NotADirectory" in said.err or "Not a directory" in said.err
    assert "score" not in said.out


def pairs() -> list[Any]:
    import torch

    return [(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))]


def exploding() -> list[Any]:
    return [(inputs * float("inf"), targets) for inputs, targets in pairs()]


@pytest.mark.parametrize("parallel", often(("ddp", "fsdp2"), ["ddp"]))
def test_two_ranks_under_torchrun_look_at_the_data_of_both(tmp_path: Path, parallel: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--local-addr=127.0.0.1"]
    command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "dist_stability"]
    command += ["diagnose", "preflight", *EXAMPLE, "--lr", "0.03", "--no-search", "--batches", "2"]
    done = subprocess.run(
        [*command, "--parallel", parallel, "--out", str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report.html") == 1  # rank 0 alone speaks and writes
    summary = read_json(tmp_path / "two" / "summary.json")
    assert summary["settings"]["parallel"] == parallel and summary["settings"]["ranks"] == 2
    assert summary["preflight"]["profile"]["ranks"] == 2
    tokens = {block["tokens"] for block in summary["preflight"]["profile"]["blocks"]}
    assert tokens == {2 * 16 * 32}  # both ranks' first batches
    assert summary["preflight"]["risk"]["losses"][0] == pytest.approx(4.854, abs=0.02)
