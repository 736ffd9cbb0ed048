"""``dist-stability experiment`` from the outside: real runs of a few steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_stability import cli
from dist_stability.report.events import read_json

QUICK = ("experiment", "text", "--quick", "--tasks", "phrase", "--faults", "nan", "--workers", "1", "--device", "cpu")
FEW = ("--arms", "clean", "guarded-clean", "baseline", "guarded", "twin")
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def experiment(out: Path, *more: str) -> int:
    return cli.main([*QUICK, *more, "--out", str(out)])


def made(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob("runs/**/summary.json")}


def test_a_quick_experiment_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert experiment(tmp_path, *FEW) == 0
    summary = read_json(tmp_path / "summary.json")
    assert summary["main"] == {"task": "phrase", "parallel": "single", "fault": "nan"}
    assert set(summary["arms"]) == {"clean", "guarded-clean", "baseline", "guarded", "twin"}
    guarded = summary["arms"]["guarded"]
    assert guarded["refused_inside"]["values"] == [1] and guarded["false_refusals"]["values"] == [0]
    assert guarded["regret"]["values"] == [0.0] and guarded["overhead_ratio"]["mean"] > 1
    assert (summary["twin"]["equal"], summary["twin"]["compared"], summary["twin"]["undefined"]) == (1, 1, 0)
    assert [row["equal"] for row in summary["transparency"]] == [1]
    assert summary["started_now"] == 5 and summary["failed"] == {} and summary["quick"]
    for name in ("figure_5_text_probe", "figure_3_innovation", "figure_4_parameter_norm"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "tables.md").read_text()
    assert page.count("<img") == 3 and "data:image/png;base64" in page and summary["sentence"] in page
    assert "| guarded |" in text and "dist-stability experiment text --seeds 1" in text
    twin = read_json(tmp_path / "runs/phrase/single/nan/twin/seed0/summary.json")
    assert twin["settings"]["skip_batches"] == [6]
    # As if it had been typed alone: its own log, and its own command in the summary.
    assert twin["command"][:4] == ["-m", "dist_stability.experiments.training", "--task", "phrase"]
    assert "14/14" in (tmp_path / "runs/phrase/single/nan/twin/seed0/log.txt").read_text()

    before = made(tmp_path)
    assert experiment(tmp_path, *FEW) == 0
    assert made(tmp_path) == before and "0 runs were started" in capsys.readouterr().out

    (tmp_path / "runs/phrase/single/nan/twin/seed0/state-rank0.json").unlink()
    assert experiment(tmp_path, *FEW) == 0
    assert {path.parent.parent.name for path, when in made(tmp_path).items() if before[path] != when} == {"twin"}


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "runs/phrase/single/nan/guarded"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the run wants its folder")
    assert experiment(tmp_path, "--arms", "clean", "baseline", "guarded", "twin") == 1
    summary = read_json(tmp_path / "summary.json")
    assert set(summary["failed"]) == {"phrase/single/nan/guarded/seed0", "phrase/single/nan/twin/seed0"}
    assert "not run: it needs" in summary["failed"]["phrase/single/nan/twin/seed0"]
    assert {path.parent.parent.name for path in made(tmp_path)} == {"clean", "baseline"}
    assert "failed: phrase/single/nan/guarded/seed0: " in capsys.readouterr().out


def test_an_interrupted_experiment_goes_on_where_it_was(tmp_path: Path) -> None:
    arms = ("--arms", "clean", "baseline")
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_stability", *QUICK, *arms, "--seeds", "500", "--out", str(tmp_path)],
        env=alone,
        start_new_session=True,  # the signal below goes to its workers, too, as Ctrl-C on a terminal does
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 120
        while not made(tmp_path) and time.monotonic() < end:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    before = made(tmp_path)
    assert 0 < len(before) < 1000 and not (tmp_path / "summary.json").exists()
    # The same experiment with fewer seeds, so that the test ends: what it has in common with the first is kept.
    assert experiment(tmp_path, *arms, "--seeds", "4") == 0
    after = made(tmp_path)
    assert all(after[path] == when for path, when in before.items())
    assert read_json(tmp_path / "summary.json")["started_now"] == len(after) - len(before) > 0


def test_a_folder_belongs_to_one_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "protocol.json").write_text('{"steps": 250}')
    assert experiment(tmp_path, *FEW) == 1
    assert "holds runs of another protocol" in capsys.readouterr().err and made(tmp_path) == {}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--arms", "hope"), "--arms: unknown hope; choose from clean"),
        (("--faults", "flood"), "--faults: unknown flood"),
        (("--parallel", "tp"), "--parallel: unknown tp; choose from single, ddp, fsdp2"),
        (("--tasks", "digits"), "--tasks: unknown digits; choose from phrase, text"),
        (("--seeds", "0"), "--seeds 0: must be 1 to 1000"),
        (("--workers", "0"), "--workers 0"),
    ],
)
def test_wrong_names_start_nothing(
    tmp_path: Path, wrong: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment(tmp_path, *wrong) == 1
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_torchrun_wants_a_distributed_mode_on_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert experiment(tmp_path) == 1
    assert "choose ddp or fsdp2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert experiment(tmp_path, "--parallel", "ddp") == 1
    assert "torchrun has started 3 processes" in capsys.readouterr().err


@pytest.mark.slow
def test_inside_torchrun_and_around_it_the_modes_agree(tmp_path: Path) -> None:
    arms = ("--arms", "clean", "baseline", "guarded", "twin")
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("--local-addr=127.0.0.1", "-m", "dist_stability", *QUICK, *arms),
            *("--parallel", "fsdp2", "--out", str(tmp_path)),
        ],
        env={**alone, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    summary = read_json(tmp_path / "summary.json")
    assert summary["started_now"] == 4 and (summary["twin"]["equal"], summary["twin"]["compared"]) == (1, 1)
    assert (tmp_path / "runs/phrase/fsdp2/nan/guarded/seed0/state-rank1.json").is_file()

    # The same folder from one process: FSDP2 is there already, DDP goes through torchrun, run by run.
    assert experiment(tmp_path, *arms, "--parallel", "fsdp2", "ddp") == 0
    summary = read_json(tmp_path / "summary.json")
    assert summary["started_now"] == 4
    row = next(row for row in summary["distributed"] if row["arm"] == "guarded")
    assert row["modes"] == ["ddp", "fsdp2"] and (row["equal_verdicts"], row["compared"]) == (1, 1)
    assert row["largest_difference"] < 1e-4
