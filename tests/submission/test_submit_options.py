"""launch/submit.py's command line: torchrun's names, and refusals before anything is submitted."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from programs import PROGRAM

from dist_stability.submission.command import make_executor
from dist_stability.submission.options import minutes, parse_options, whole_minutes

SCRIPT = str(PROGRAM)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("30:00", 30),
        ("0:30", 0.5),
        ("8:00:00", 480),
        ("2-12", 3600),
        ("2-12:30", 3630),
        ("1-00:00:30", 1440.5),
    ],
)
def test_a_time_limit_as_slurm_reads_it(text: str, expected: float) -> None:
    assert minutes(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "0", "0:00", "soon", "1:2:3:4", "-5", "1-", "nan"])
def test_no_time_limit(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        minutes(text)


def test_slurm_keeps_whole_minutes() -> None:
    assert [whole_minutes(limit) for limit in (0.5, 1, 1.01)] == [1, 1, 2]


def test_options_of_the_script_are_the_scripts() -> None:
    options = parse_options(["--executor=local", "--nproc-per-node=2", SCRIPT, "--wait", "--time", "5"])
    assert options.arguments == ("--wait", "--time", "5")
    assert (options.nproc_per_node, options.wait, options.time) == (2, False, 60.0)
    assert (options.name, options.on_requeue) == ("sharded_program", ("--resume", "auto"))
    assert parse_options(["--executor=local", "--on_requeue=", SCRIPT]).on_requeue == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--executor=local", "nowhere.py"], "nowhere.py: no such script"),
        (["--executor=slurm", SCRIPT], "--executor slurm: sbatch or srun is not on the PATH"),
        (["--executor=local", "--nnodes=2", SCRIPT], "--nnodes 2: --executor local is this machine alone"),
        (["--executor=debug", "--nproc_per_node=2", SCRIPT], "--nproc_per_node 2: --executor debug"),
        (["--executor=local", "--partition=low", SCRIPT], "--partition: belongs to --executor slurm"),
        (["--executor=local", "--sbatch=qos=high", SCRIPT], "--sbatch: belongs to --executor slurm"),
        (["--executor=local", "--preempt_signal=TERM", SCRIPT], "--preempt_signal TERM"),
        (["--executor=local", "--time=1", SCRIPT], "--signal_delay 90: the signal would come before the job starts"),
        (["--executor=local", "--sbatch=qos", SCRIPT], "not of the form NAME=VALUE"),
        (["--executor=local", "--nproc_per_node=0", SCRIPT], "must be at least 1"),
        (["--executor=pbs", SCRIPT], "invalid choice"),
    ],
)
def test_refused_with_the_option_named(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without Slurm
    with pytest.raises(SystemExit) as ended:
        parse_options(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_what_sbatch_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    for name in ("sbatch", "srun"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR2")
    options = parse_options(
        "--nnodes=4 --nproc_per_node=8 --gpus_per_node=8 --partition=gpu --time=2-0 --requeues=7 --signal_delay=120 "
        f"--sbatch=qos=long --logs={tmp_path} {SCRIPT}".split()
    )
    executor = make_executor(options)
    assert executor.max_num_timeout == 7
    lines = executor._make_submission_file_text("COMMAND", "id").splitlines()
    for setting in ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu", "time=2880", "qos=long"):
        assert f"#SBATCH --{setting}" in lines
    for setting in ("signal=USR2@120", "open-mode=append", "requeue", "job-name=sharded_program"):
        assert f"#SBATCH --{setting}" in lines
    assert any(line.startswith("srun ") and "--kill-on-bad-exit=1" in line for line in lines)
