"""The training program in each parallel mode, on real ranks: a refused batch leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path

import harness
import pytest
import torch

from dist_stability.experiments import training
from dist_stability.experiments.digests import differences
from dist_stability.experiments.options import parse_options
from dist_stability.experiments.tasks import make_task
from dist_stability.experiments.wrapping import Processes
from dist_stability.report.events import read_json

SMALL = ("--steps", "6", "--batch-size", "8", "--probe-size", "8", "--warmup", "2", "--device", "cpu", "--state-digest")
FAULT = ("--inject", "nan:step=3,rank=1")
TWIN = ("--rule", "off", "--skip-batches", "3")


def train(rank: int, world: int, arguments: tuple[str, ...]) -> int:
    """The program from its options on, in a process group that is there already."""
    options = parse_options(arguments, world)
    return training.run(options, make_task(options.task), Processes(rank, world, torch.device("cpu")))


def unequal(first: Path, second: Path, world: int) -> list[str]:
    said = []
    for rank in range(world):
        images = [json.loads((folder / f"state-rank{rank}.json").read_text()) for folder in (first, second)]
        said += [f"rank {rank}: {name}" for name in differences(*images)]
    return said


@pytest.mark.parametrize(
    ("world", "arguments"),
    [
        (2, ("--parallel", "ddp", "--probe-on", "mean")),
        (2, ("--parallel", "fsdp1", "--dropout", "0.1")),
        (2, ("--parallel", "fsdp2", "--dtype", "bfloat16", "--accumulate", "2")),
        (4, ("--parallel", "hsdp", "--clip-grad-norm", "1")),
        (2, ("--parallel", "ddp", "--task", "digits")),
        (2, ("--parallel", "fsdp2", "--task", "digits", "--dtype", "bfloat16")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_guarded_run_equals_its_twin(tmp_path: Path, world: int, arguments: tuple[str, ...]) -> None:
    pool = harness.pool(world)
    for name, trial in (("guarded", FAULT), ("twin", TWIN)):
        said = (*SMALL, *arguments, *trial, "--out", str(tmp_path / name))
        assert pool.run(train, said) == [0] * world
    guarded, twin = (read_json(tmp_path / name / "summary.json") for name in ("guarded", "twin"))
    assert guarded["refused"] == [3] and guarded["layout"] == arguments[1]
    assert (guarded["final_probe"], guarded["evaluation"]) == (twin["final_probe"], twin["evaluation"])
    assert unequal(tmp_path / "guarded", tmp_path / "twin", world) == []


def test_the_probe_does_not_depend_on_the_number_of_processes(tmp_path: Path, two: harness.Pool) -> None:
    said = (*SMALL, "--rule", "off")
    assert two.run(train, (*said, "--parallel", "fsdp2", "--out", str(tmp_path / "two"))) == [0, 0]
    assert two.run(train, (*said, "--parallel", "ddp", "--probe-on", "mean", "--out", str(tmp_path / "mean"))) == [0, 0]
    assert harness.pool(1).run(train, (*said, "--out", str(tmp_path / "one")), group=False) == [0]
    one, sharded, mean = (read_json(tmp_path / name / "summary.json")["probe"] for name in ("one", "two", "mean"))
    assert sharded["value"] == pytest.approx(one["value"], abs=1e-4)
    assert mean["value"] == pytest.approx(one["value"], abs=1e-4)
