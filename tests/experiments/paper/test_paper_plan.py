"""Which runs there are, in which order, and that the training program understands every one of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from paper_records import grid, write_run

from dist_stability.experiments.options import Options, parse_options
from dist_stability.experiments.paper import search
from dist_stability.experiments.paper.plan import Grid, NotReady, Run, command, needs, runs_of, words
from dist_stability.experiments.paper.protocol import (
    ARMS,
    EXPERIMENTS,
    FAULTS,
    NO_FAULT,
    PARALLEL,
    ROLLBACK,
    TUNED,
    protocol,
)


def parsed(asked: Grid, run: Run) -> Options:
    return parse_options(words(asked, run), run.world_size)


def place(arm: str, fault: str = "g300x10", seed: int = 0) -> Run:
    return Run("phrase", "single", fault, arm, seed)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("parallel", PARALLEL)
def test_every_command_line_parses(experiment: str, parallel: str, tmp_path: Path) -> None:
    chosen = protocol(experiment)
    asked = grid(tmp_path, protocol=chosen, tasks=chosen.tasks[:1], parallels=(parallel,), faults=FAULTS)
    seen = set()
    for run in runs_of(asked):
        options = parsed(asked, run)
        write_run(asked, run, refused=(3, 4) if run.arm == "guarded" else ())
        assert (options.steps, options.warmup, options.schedule, options.seed) == (250, 0, "constant", run.seed)
        assert (options.lr, options.batch_size) == ((5e-4, 64) if experiment == "text" else (1e-3, 128))
        assert options.probe_size == asked.protocol.probe_size
        assert options.parameter_norm and options.parallel == parallel
        assert bool(options.inject) == (run.fault != NO_FAULT and run.arm != "twin")
        seen.add((run.arm, run.fault))
    assert {arm for arm, _ in seen} >= set(ARMS)
    assert {fault for arm, fault in seen if arm == "baseline"} == set(FAULTS)
    assert {fault for arm, fault in seen if arm in ("clean", "guarded-clean")} == {NO_FAULT}


def test_another_probe_is_another_protocol(tmp_path: Path) -> None:
    chosen = protocol("vision", probe_size=48)
    assert chosen.gamma == 48 / (3 * 128)
    asked = grid(tmp_path, protocol=chosen, tasks=chosen.tasks[:1])
    assert {parsed(asked, run).probe_size for run in runs_of(asked) if run.arm in ("clean", "guarded")} == {48}
    with pytest.raises(ValueError, match=r"--probe-size 0: must be at least 1"):
        protocol("vision", probe_size=0)


def test_another_model_is_another_protocol(tmp_path: Path) -> None:
    chosen = protocol("text", width=128, layers=4)
    asked = grid(tmp_path, protocol=chosen)
    assert {(o.width, o.layers) for o in (parsed(asked, run) for run in runs_of(asked) if run.arm == "clean")} == {
        (128, 4)
    }
    assert chosen != protocol("text")
    with pytest.raises(ValueError, match="--width, --layers: are of the Transformer"):
        protocol("vision", width=128)


def test_the_probe_of_vision_uses_batch_statistics(tmp_path: Path) -> None:
    chosen = protocol("vision")
    asked = grid(tmp_path, protocol=chosen, tasks=chosen.tasks)
    runs = [run for run in runs_of(asked) if run.arm in ("clean", "baseline", "guarded")]
    assert {run.task for run in runs} == {"distorted-digits", "digits"}
    assert all(parsed(asked, run).probe_batch_statistics for run in runs)
    assert not parsed(grid(tmp_path), place("clean", NO_FAULT)).probe_batch_statistics


def test_the_arms_are_what_they_are_called(tmp_path: Path) -> None:
    asked = grid(tmp_path)
    rules = {arm: parsed(asked, place(arm)).rule for arm in ARMS if arm not in (TUNED, ROLLBACK, "twin")}
    assert {arm for arm, rule in rules.items() if rule == "off"} == {"clean", "baseline", "clip", "zclip"}
    assert {arm for arm, rule in rules.items() if rule == "predictive"} == {"guarded", "guarded-clean"}
    paper = parsed(asked, place("paper"))
    assert (paper.rule, paper.epsilon, paper.alpha) == ("fixed", 0.5, 0.1)
    assert parsed(asked, place("clip")).clip_grad_norm == 1.0 and parsed(asked, place("zclip")).zclip


def test_the_arms_of_a_seed_differ_only_in_what_makes_them_arms(tmp_path: Path) -> None:
    asked = grid(tmp_path)
    own = {"rule", "epsilon", "alpha", "inject", "clip_grad_norm", "zclip", "state_digest"}
    own |= {field.name for field in dataclasses.fields(Options) if field.name.startswith("loss_")}
    plain = [
        {name: value for name, value in parsed(asked, place(arm)).settings().items() if name not in own}
        for arm in ARMS
        if arm not in (TUNED, ROLLBACK, "twin")
    ]
    assert all(settings == plain[0] for settings in plain)


def test_the_faults_are_where_the_protocol_says(tmp_path: Path) -> None:
    chosen = protocol("text")
    attempts = {name: sorted(chosen.injection(name).attempts) for name in FAULTS}
    assert attempts["g300x10"] == attempts["shuffle10"] == list(range(120, 130))
    assert attempts["g1000x1"] == attempts["nan"] == attempts["bitflip"] == [120]
    assert attempts["lr30x3"] == [120, 121, 122]
    assert attempts["warmup"] == list(range(12, 22))
    assert attempts["two-windows"] == [*range(120, 130), *range(180, 190)]
    assert chosen.injection("g300x10").specs == ("gradient-scale:step=120,factor=300,length=10",)
    assert len(chosen.injection("two-windows").specs) == 2
    assert "rank=1" in chosen.injection("nan", 2).specs[0] and "rank=0" in chosen.injection("nan").specs[0]
    with pytest.raises(ValueError, match="unknown fault 'flood'; known: g300x10"):
        chosen.injection("flood")


def test_a_run_comes_after_those_it_needs(tmp_path: Path) -> None:
    asked = grid(tmp_path, seeds=2, tasks=("phrase", "text"), parallels=("single", "ddp"), faults=("g300x10", "nan"))
    runs = runs_of(asked)
    assert len(set(runs)) == len(runs)
    for number, run in enumerate(runs):
        assert set(needs(asked, run)) <= set(runs[:number])
    first = [run for run in runs if (run.task, run.parallel, run.fault) == ("phrase", "single", "g300x10")]
    arms = list(dict.fromkeys(run.arm for run in first if not search.origin(run.arm)[1]))
    assert arms[:3] == ["baseline", "guarded", "twin"] and arms[-1] == TUNED
    assert runs[0] == place("clean", NO_FAULT)


def test_reporting_and_tuning_seeds_are_apart(tmp_path: Path) -> None:
    asked = grid(tmp_path, seeds=3)
    for run in runs_of(asked):
        tuning = run.seed in asked.protocol.tuning_seeds
        assert tuning == bool(search.origin(run.arm)[1]) and tuning != (run.seed in range(3))


def test_the_twin_brings_its_guarded_run_and_nothing_else(tmp_path: Path) -> None:
    runs = runs_of(grid(tmp_path, arms=("twin",)))
    assert [run.arm for run in runs] == ["guarded", "twin"]


def test_the_twin_drops_what_was_refused_or_undone(tmp_path: Path) -> None:
    asked = grid(tmp_path)
    with pytest.raises(NotReady, match=r"phrase/single/g300x10/guarded/seed0 has no result"):
        words(asked, place("twin"))
    write_run(asked, place("guarded"), refused=(6, 7), undone=(5,))
    assert parsed(asked, place("twin")).skip_batches == (5, 6, 7)
    write_run(asked, place("guarded"))
    twin = parsed(asked, place("twin"))
    assert twin.skip_batches == () and twin.inject == () and twin.rule == "off"
    write_run(asked, place("guarded"), refused=(6,), error="StabilityStop")
    with pytest.raises(NotReady, match="stopped before its end"):
        words(asked, place("twin"))


def tried(asked: Grid, finals: dict[float, float]) -> None:
    """The runs of the first stage, with these final losses under the fault by epsilon."""
    for run in needs(asked, place("search-alpha0.3", seed=1000)):
        write_run(asked, run, final=finals[search.tried(run.arm)["epsilon"]] if run.fault != NO_FAULT else 0.0)


def test_the_tuned_arm_takes_what_the_search_found(tmp_path: Path) -> None:
    asked = grid(tmp_path)
    tried(asked, {1.0: 0.9, 0.1: 0.4})
    second = place("search-alpha0.3", seed=1000)
    options = parsed(asked, second)
    assert (options.epsilon, options.alpha, options.rule) == (0.1, 0.3, "fixed")
    for fault, final in (("g300x10", 0.3), (NO_FAULT, 0.0)):
        write_run(asked, dataclasses.replace(second, fault=fault), final=final)
    tuned = parsed(asked, place(TUNED, "nan"))
    assert (tuned.epsilon, tuned.alpha) == (0.1, 0.3)
    # The second stage refused steps of a run without a fault: it is out.
    write_run(asked, dataclasses.replace(second, fault=NO_FAULT), refused=(2,))
    tuned = parsed(asked, place(TUNED))
    assert (tuned.epsilon, tuned.alpha) == (0.1, 0.1)


def test_the_rollback_takes_the_window_the_search_found(tmp_path: Path) -> None:
    asked = grid(tmp_path)
    with pytest.raises(NotReady, match="search-window128/seed1000 has no result"):
        words(asked, place(ROLLBACK))
    finals = {"search-window128": 0.9, "search-window8": 0.2}
    for run in needs(asked, place(ROLLBACK)):
        write_run(asked, run, final=finals[run.arm] if run.fault != NO_FAULT else 0.0)
    assert parsed(asked, place(ROLLBACK, "nan")).loss_window == 8
    for seed in asked.protocol.tuning_seeds:
        write_run(asked, place("search-window8", NO_FAULT, seed=seed), refused=(3,))
    assert parsed(asked, place(ROLLBACK, "nan")).loss_window == 128


def test_commands_can_be_typed(tmp_path: Path) -> None:
    asked = grid(tmp_path, parallels=("single", "fsdp2"))
    assert command(asked, place("clean", NO_FAULT)).startswith("OMP_NUM_THREADS=1 python -m dist_stability.exper")
    both = command(asked, Run("phrase", "fsdp2", NO_FAULT, "clean", 0))
    assert "torchrun --standalone --nproc_per_node=2" in both and both.endswith("phrase/fsdp2/none/clean/seed0")


def test_vision_is_cifar10_only_where_it_is(tmp_path: Path) -> None:
    assert protocol("vision", data=tmp_path).tasks == protocol("vision").tasks == ("distorted-digits", "digits")
    (tmp_path / "cifar-10-batches-py").mkdir()
    chosen = protocol("vision", data=tmp_path)
    assert chosen.tasks == ("cifar10",) and chosen.tuning_seeds == (1000,)
    asked = grid(tmp_path, protocol=chosen, tasks=("cifar10",), data=tmp_path)
    assert parsed(asked, Run("cifar10", "single", NO_FAULT, "clean", 0)).data == tmp_path
