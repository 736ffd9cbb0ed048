"""The training program in each parallel mode, on real ranks: a refused batch leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path

import harness
import pytest
import torch
from choice import slow

from dist_stability.experiments import training
from dist_stability.experiments.digests import differences
from dist_stability.experiments.norms import GlobalNorm
from dist_stability.experiments.options import parse_options
from dist_stability.experiments.tasks import make_task
from dist_stability.experiments.wrapping import Processes, wrap
from dist_stability.report.events import read_events, read_json

SMALL = ("--steps", "6", "--batch-size", "8", "--probe-size", "8", "--warmup", "2", "--device", "cpu", "--state-digest")
PROGRAM = ("--task", "phrase", "--rule", "off", "--parameter-norm")
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
        slow((2, ("--parallel", "ddp", "--task", "digits"))),
        slow((2, ("--parallel", "fsdp2", "--task", "digits", "--dtype", "bfloat16"))),
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


def test_norms_of_parameters_are_the_same_however_they_are_spread(tmp_path: Path) -> None:
    norms: dict[str, list[float]] = {}
    for name, world in (("single", 1), ("ddp", 2), ("fsdp1", 2), ("fsdp2", 2), ("hsdp", 4)):
        said = (*SMALL, *PROGRAM, "--parallel", name, "--out", str(tmp_path / name))
        assert harness.pool(world).run(train, said, group=world > 1) == [0] * world
        norms[name] = [event["parameter_norm"] for event in read_events(tmp_path / name / "events.jsonl")]
    torch.manual_seed(0)
    initial = make_task("phrase").build()
    start = sum(float(p.detach().double().square().sum()) for p in initial.parameters()) ** 0.5
    assert norms["single"][0] == pytest.approx(start, rel=1e-2) and len(set(norms["single"])) == 6
    for name in ("ddp", "fsdp1", "fsdp2", "hsdp"):
        assert norms[name] == pytest.approx(norms["single"], rel=1e-6), name


def norms_around_a_forward(rank: int, world: int, parallel: str) -> tuple[float, float]:
    """The norm before and after a forward that leaves the root's parameters gathered."""
    task = make_task("phrase")
    here = Processes(rank, world, torch.device("cpu"))
    torch.manual_seed(0)
    model = task.build()
    model = wrap(model, task.blocks(model), parallel, dtype=torch.float32, here=here)
    norm = GlobalNorm(model, list(model.parameters()))
    before = norm.of_parameters()
    with torch.no_grad():
        model(task.probe_batches(4)[0][0])
    return before, norm.of_parameters()


@pytest.mark.parametrize("parallel", ["fsdp1", "fsdp2"])
def test_a_forward_before_it_does_not_matter(two: harness.Pool, parallel: str) -> None:
    (before, after), other = two.run(norms_around_a_forward, parallel)
    assert before == after and other == (before, after)


@pytest.mark.parametrize("parallel", ["fsdp1", "fsdp2"])
def test_the_parameter_norm_changes_nothing_under_sharding(tmp_path: Path, two: harness.Pool, parallel: str) -> None:
    for name, extra in (("plain", ()), ("measured", ("--parameter-norm",))):
        said = (*SMALL, "--parallel", parallel, "--dropout", "0.1", *FAULT, *extra, "--out", str(tmp_path / name))
        assert two.run(train, said) == [0, 0]
    assert unequal(tmp_path / "plain", tmp_path / "measured", 2) == []


def test_zclip_on_shards_is_zclip(tmp_path: Path, two: harness.Pool) -> None:
    burst = (*SMALL, "--task", "phrase", "--rule", "off", "--steps", "29", "--optimizer", "sgd", "--lr", "0.1")
    said = (*burst, "--inject", "gradient-scale:step=26,factor=1000", "--zclip")
    assert two.run(train, (*said, "--parallel", "fsdp2", "--out", str(tmp_path / "two"))) == [0, 0]
    assert harness.pool(1).run(train, (*said, "--out", str(tmp_path / "one")), group=False) == [0]
    one, sharded = (read_events(tmp_path / name / "events.jsonl") for name in ("one", "two"))
    assert one[26]["gradient_norm"] > 300 * one[25]["gradient_norm"]
    for key in ("gradient_norm", "probe"):
        assert [e[key] for e in sharded] == pytest.approx([e[key] for e in one], rel=1e-3)
    assert sharded[28]["probe"] < sharded[24]["probe"] + 0.5


def test_a_twin_of_refused_labels_on_shards(tmp_path: Path, two: harness.Pool) -> None:
    steep = (*SMALL, "--parallel", "fsdp2", "--task", "phrase", "--steps", "38", "--batch-size", "16", "--lr", "5e-3")
    steep += ("--schedule", "constant")
    fault = ("--inject", "shuffled-labels:step=32,length=3")
    strict = ("--rule", "fixed", "--epsilon", "0.02", "--alpha", "1", *fault)
    assert two.run(train, (*steep, *strict, "--out", str(tmp_path / "guarded"))) == [0, 0]
    guarded = read_json(tmp_path / "guarded" / "summary.json")
    assert guarded["refused"] == [32, 33, 34]
    twin = ("--rule", "off", "--skip-batches", "32-34")
    assert two.run(train, (*steep, *twin, "--out", str(tmp_path / "twin"))) == [0, 0]
    assert unequal(tmp_path / "guarded", tmp_path / "twin", 2) == []
