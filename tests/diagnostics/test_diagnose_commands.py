"""``dist-stability diagnose sensitivity | bounds``: what they write, under torchrun too, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from choice import often
from torch import Tensor, nn

from dist_stability.cli import main
from dist_stability.diagnostics.bounds import stability_bounds
from dist_stability.report.events import read_json
from dist_stability.snapshot.rng import forked

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = "test_diagnose_commands"
GPT = ("--model", "launch.small_gpt:model", "--data", "launch.small_gpt:data")
TINY = ("--model", f"{HERE}:tiny", "--data", f"{HERE}:points", "--loss", f"{HERE}:squares")
WIDTH = 6


def tiny() -> nn.Module:
    """A quadratic: the curvature of the loss is known."""
    return nn.Linear(WIDTH, 1, bias=False)


def points() -> Iterator[Tensor]:
    """Always the same rows: the identity, scaled."""
    while True:
        yield 3.0 * torch.eye(WIDTH)


def squares(model: Any, rows: Tensor) -> Tensor:
    return model(rows).square().sum() / 2.0  # Hessian: 9 times the identity


class Drawing(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        Drawing.calls += 1
        return x @ self.weight.T * (1.0 + 1e-3 * Drawing.calls)


def infinite(model: Any, rows: Tensor) -> Tensor:
    return squares(model, rows) * float("inf")


def broken() -> nn.Module:
    raise OSError("no such weights")


def no_module() -> int:
    return 3


def rmsprop(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr=lr)


def two_numbers(model: Any, rows: Tensor) -> Tensor:
    return model(rows)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def run(name: str, out: Path, *words: str) -> dict[str, Any]:
    assert main(["diagnose", name, *words, "--out", str(out)]) == 0
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "report.html").read_text().count("data:image/png") == 1
    return read_json(out / "summary.json")


def test_the_bounds_of_a_quadratic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Gradient descent is at its edge at 2 / 9; 9 / 2 times the learning rate is the margin.
    words = ("--optimizer", "sgd", "--train-steps", "0", "--steps", "4")
    found = run("bounds", tmp_path, *TINY, *words, "--lr", "0.1", "--peak-lr", "0.4")
    assert found["bounds"]["upper_margin"] == pytest.approx(0.45, rel=1e-3)
    assert found["bounds"]["peak_margin"] == pytest.approx(1.8, rel=1e-3)
    # One eigenvalue, of rounding's width.
    assert found["bounds"]["lower_violation"] == pytest.approx(0.0, abs=1e-6)
    assert found["verdict"].startswith("Stable now, past the edge at the schedule's peak")
    assert found["verdict"] in capsys.readouterr().out
    assert found["settings"]["model"] == f"{HERE}:tiny" and found["settings"]["ranks"] == 1
    past = run("bounds", tmp_path, *TINY, *words, "--lr", "0.3")
    assert past["verdict"].startswith("Past the edge of stability") and "1.35" in past["verdict"]


def test_the_bounds_of_adam_are_those_of_the_library(tmp_path: Path) -> None:
    found = run("bounds", tmp_path, *GPT, "--lr", "0.001", "--batches", "2", "--steps", "5")["bounds"]
    from dist_stability.diagnostics.command.factories import cross_entropy
    from launch.small_gpt import data, model

    with forked(0):
        subject = model()
    with forked(0):
        batches = [batch for batch, _ in zip(data(), range(5), strict=False)]
    optimizer = torch.optim.AdamW(subject.parameters(), lr=0.001, weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(subject, batch).backward()
        optimizer.step()
    expected = stability_bounds(subject, optimizer, cross_entropy, batches[:2], steps=5)
    assert found["upper_margin"] == expected.upper_margin and found["loss"] == expected.loss


def test_a_run_that_rounding_does_not_move_and_one_that_it_does(tmp_path: Path) -> None:
    calm = run("sensitivity", tmp_path, *TINY, "--optimizer", "sgd", "--lr", "0.01", "--steps", "30")
    assert calm["sensitivity"]["verdict"] == "benign" and calm["verdict"].startswith("Rounding does not matter")
    assert calm["settings"]["perturbation"] == "kscale:3" and len(calm["sensitivity"]["relative_l2"]) == 30
    # Past 2 / 9 the step amplifies the loss.
    words = ("--optimizer", "sgd", "--lr", "0.5", "--steps", "40", "--perturbation", "ulp-one:weight,2")
    wild = run("sensitivity", tmp_path, *TINY, *words)
    assert wild["sensitivity"]["verdict"] == "unrestrained" and "unstable" in wild["verdict"]


def test_a_run_that_is_not_the_same_twice_says_nothing(tmp_path: Path) -> None:
    words = ("--model", f"{HERE}:Drawing", *TINY[2:], "--optimizer", "sgd", "--lr", "0.01", "--out", str(tmp_path))
    assert main(["diagnose", "sensitivity", *words]) == 0
    found = read_json(tmp_path / "summary.json")
    assert found["sensitivity"]["verdict"] == "invalid" and found["verdict"].startswith("Nothing can be said")
    assert "nondeterministic" in (tmp_path / "report.html").read_text()


WRONG = {
    "--model nowhere.models:small": "cannot import nowhere.models",
    f"--model {HERE}:missing": f"{HERE} has no missing",
    f"--model {HERE}": "expected MODULE:NAME",
    f"--model {HERE}:broken": "raised OSError: no such weights",
    f"--model {HERE}:no_module": "expected an nn.Module, got int",
    f"--model {HERE}:WIDTH": "expected something to call",
    f"--data {HERE}:no_module": "expected an iterable of batches, got int",
    f"--loss {HERE}:infinite": "the loss of the first batch is inf",
    f"--loss {HERE}:two_numbers": "must be a 0-d tensor, got a tensor of shape [6, 1]",
    "--lr 0": "--lr: expected a number > 0",
    "--momentum 0.9 --optimizer adamw": "--momentum: goes with --optimizer sgd",
    "--optimizer lion": "expected sgd, adamw or MODULE:FACTORY",
    "--parallel fsdp2": "start it with torchrun",
    f"--optimizer {HERE}:rmsprop": "no stability limit is known for RMSprop",
    "--optimizer adamw --train-steps 2": "AdamW needs 5 before",
    "--peak-lr -1": "--peak-lr: expected a number > 0",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_meant_is_named(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*TINY, "--optimizer", "sgd", "--lr", "0.1", "--out", str(tmp_path), *words.split()]
    assert main(["diagnose", "bounds", *given]) == 1
    said = capsys.readouterr().err
    assert "dist-stability: error: rank 0: " in said and WRONG[words] in said
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--perturbation kscale:0", "KScale k: expected a whole number >= 1"),
        ("--perturbation kscale:two", "--perturbation kscale:two"),
        ("--perturbation ulp-one:weight,99", "the model has no such weight; it has weight (6)"),
        (f"--optimizer {HERE}:rmsprop", "knows SGD, Adam and AdamW, not RMSprop"),
        ("--perturbation noise", "expected kscale:K, ulp-one"),
        ("--steps 1", "--steps: expected at least 3"),
    ],
)
def test_nor_for_the_twins(words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*TINY, "--optimizer", "sgd", "--lr", "0.1", "--out", str(tmp_path), *words.split()]
    assert main(["diagnose", "sensitivity", *given]) == 1
    assert expected in capsys.readouterr().err


def torchrun(out: Path, *words: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "-m", "dist_stability", "diagnose", *words, "--out", str(out)]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_json(out / "summary.json")


@pytest.mark.parametrize("mode", often(("ddp", "fsdp2"), ["fsdp2"]))
def test_under_torchrun(tmp_path: Path, mode: str) -> None:
    """Two ranks, each with every other batch, have together the loss of one process with all of them."""
    words = (*GPT, "--optimizer", "sgd", "--lr", "0.1", "--train-steps", "0", "--steps", "24")
    found = torchrun(tmp_path / mode, "bounds", *words, "--parallel", mode, "--batches", "1")
    one = run("bounds", tmp_path / "one", *words, "--batches", "2")
    assert found["settings"]["parallel"] == mode and found["settings"]["ranks"] == 2
    for key in ("upper_margin", "loss"):
        assert found["bounds"][key] == pytest.approx(one["bounds"][key], rel=0.02)
    assert found["command"].startswith("torchrun --nproc_per_node=2 -m dist_stability diagnose bounds")


@pytest.mark.slow
def test_twins_under_torchrun(tmp_path: Path) -> None:
    found = torchrun(tmp_path, "sensitivity", *GPT, "--lr", "0.003", "--steps", "6", "--gate-steps", "2")
    assert found["sensitivity"]["verdict"] == "benign" and found["settings"]["parallel"] == "ddp"
