"""Bad options are named before any process group is started."""

from __future__ import annotations

import argparse

import pytest

from dist_stability.experiments.options import batch_ranges, parse_options, show_ranges


def parse(line: str, world: int | None = 2):  # type: ignore[no-untyped-def]
    return parse_options(line.split(), world)


def test_defaults_depend_on_the_number_of_processes() -> None:
    assert parse("", 1).parallel == "single"
    assert parse("", 2).parallel == "ddp"
    options = parse("--rule fixed")
    assert (options.epsilon, options.alpha, options.false_reject_rate) == (0.5, 0.1, 5e-4)
    assert (options.loss_sigmas, options.loss_window) == (6.0, 128)
    assert (options.zclip, options.parameter_norm) == (False, False)


@pytest.mark.parametrize(
    ("line", "world", "named"),
    [
        ("--task imagenet", 2, "--task"),
        ("--batch-size 63", 2, "--batch-size 63"),
        ("--batch-size 6 --accumulate 2", 2, "--batch-size 6"),
        ("--batch-size 0", 1, "--batch-size"),
        ("--parallel hsdp", 3, "--parallel hsdp"),
        ("--parallel single", 2, "--parallel single"),
        ("--steps 0", 2, "--steps"),
        ("--steps ten", 2, "--steps"),
        ("--warmup 9 --steps 8", 2, "--warmup 9"),
        ("--every 9 --steps 8 --warmup 1", 2, "--every 9"),
        ("--every adaptive --rule off", 2, "--every adaptive"),
        ("--every often", 2, "--every"),
        ("--lr 0", 2, "--lr"),
        ("--lr nan", 2, "--lr"),
        ("--lr inf", 2, "--lr"),
        ("--epsilon 0.1", 2, "--epsilon"),
        ("--false-reject-rate 0.1 --rule fixed", 2, "--false-reject-rate"),
        ("--false-reject-rate 0.7", 2, "--false-reject-rate 0.7"),
        ("--alpha 2 --rule fixed", 2, "--alpha 2"),
        ("--loss-sigmas 6", 2, "--loss-sigmas: belongs to --rule loss-rollback"),
        ("--loss-window 32 --rule fixed", 2, "--loss-window: belongs to --rule loss-rollback"),
        ("--loss-sigmas 0 --rule loss-rollback", 2, "--loss-sigmas"),
        ("--loss-window 7 --rule loss-rollback", 2, "--loss-window"),
        ("--zclip --rule off --clip-grad-norm 1", 2, "--zclip: excludes --clip-grad-norm"),
        ("--zclip", 2, "--zclip: clips instead of refusing, so it needs --rule off"),
        ("--observe --rule off", 2, "--observe"),
        ("--dropout 0.1 --task digits", 2, "--dropout"),
        ("--dropout 1.0", 2, "--dropout 1.0"),
        ("--width 128 --task digits", 2, "--width, --layers: the model of --task digits"),
        ("--width 66", 2, "--width 66: must be a multiple of 4"),
        ("--data here", 2, "--data"),
        ("--probe-on mean --probe-size 7", 2, "--probe-size 7"),
        ("--inject earthquake:step=3", 2, "--inject"),
        ("--inject nan:step=3,rank=2", 2, "--inject"),
        ("--inject nan:step=300,rank=0", 2, "--inject"),
        ("--inject learning-rate:step=300", 2, "--inject"),
        ("--inject shuffled-labels:step=3,rank=2", 2, "--inject"),
        ("--skip-batches 5-3", 2, "--skip-batches"),
        ("--skip-batches 300", 2, "--skip-batches"),
        ("--skip-batches 0-7 --steps 8 --warmup 1", 2, "--skip-batches"),
        ("--timeout 0", 2, "--timeout"),
        ("--preempt-signal USR1", 2, "--preempt-signal USR1: needs --persist"),
        ("--persist shm --preempt-signal KILL", 2, "--preempt-signal: signal 'KILL': not one that can be caught"),
        ("--persist shm --preempt-grace 0", 2, "--preempt-grace"),
        ("--seed -1", 2, "--seed"),
    ],
)
def test_what_is_wrong_is_named(line: str, world: int, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(line, world)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert named in last, last


def test_a_distributed_mode_without_torchrun_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        parse("--parallel fsdp2", None)
    assert "needs torchrun" in capsys.readouterr().err


def test_only_rank_zero_complains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse("--batch-size 63")
    assert capsys.readouterr().err == ""


def test_ranges_of_batches() -> None:
    assert batch_ranges("120-129") == tuple(range(120, 130))
    assert batch_ranges("9,3-5,4") == (3, 4, 5, 9)
    assert batch_ranges("") == ()
    assert show_ranges((3, 4, 5, 9)) == "3-5,9"
    assert batch_ranges(show_ranges((0, 2, 3, 7))) == (0, 2, 3, 7)
    for bad in ("a", "1-", "5-3", "-4", "1-2-3"):
        with pytest.raises(argparse.ArgumentTypeError, match="neither a number nor a range"):
            batch_ranges(bad)


def test_settings_leave_out_where_the_run_is_written() -> None:
    first, second = (parse(f"--out {name}").settings() for name in ("a", "b"))
    assert first == second and "out" not in first
