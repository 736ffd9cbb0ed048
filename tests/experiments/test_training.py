"""The training program in a single process: what it writes, skips, measures and how it ends."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_stability import Escalation, LossProbe, StabilityController
from dist_stability.experiments import training
from dist_stability.experiments.digests import differences, digests
from dist_stability.experiments.options import parse_options
from dist_stability.experiments.unguarded import Unguarded
from dist_stability.report.build import report
from dist_stability.report.events import read_events, read_json
from dist_stability.report.runs import load_run
from dist_stability.testing import StateImage

SMALL = ("--steps", "8", "--batch-size", "4", "--probe-size", "4", "--warmup", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def run(out: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    assert training.main([*SMALL, *arguments, "--out", str(out)]) == status
    return read_json(out / "summary.json")


def state(out: Path, rank: int = 0) -> dict[str, str]:
    found: dict[str, str] = json.loads((out / f"state-rank{rank}.json").read_text())
    return found


def test_a_run_writes_its_events_and_its_summary(tmp_path: Path) -> None:
    summary = run(tmp_path)
    events = read_events(tmp_path / "events.jsonl")
    assert [event["attempt"] for event in events] == list(range(8))
    assert {event["action"] for event in events} == {"commit"}
    assert events[-1]["measurement"] == summary["final_probe"] == summary["probe"]["value"][-1]
    assert {"step", "rank", "signal", "innovation", "bound", "prediction", "seconds"} <= events[0].keys()
    assert summary["finished"] and summary["refused"] == [] and summary["world_size"] == 1
    assert summary["data"] == "English text of pydoc_data.topics"
    assert summary["settings"]["batch_size"] == 4 and "torch" in summary["versions"]
    assert 1.0 < summary["evaluation"] < 6.0


def test_guarded_and_unguarded_runs_measure_the_same_and_end_in_the_same_state(tmp_path: Path) -> None:
    arms = {rule: run(tmp_path / rule, "--rule", rule, "--state-digest") for rule in ("off", "predictive", "fixed")}
    assert arms["off"]["probe"] == arms["predictive"]["probe"] == arms["fixed"]["probe"]
    assert differences(state(tmp_path / "off"), state(tmp_path / "predictive")) == []
    assert differences(state(tmp_path / "off"), state(tmp_path / "fixed")) == []
    unguarded = read_events(tmp_path / "off" / "events.jsonl")
    assert {(event["action"], event["signal"], event["innovation"]) for event in unguarded} == {("commit", "", None)}
    assert set(unguarded[0]) == set(read_events(tmp_path / "fixed" / "events.jsonl")[0])


def test_a_refused_batch_leaves_the_state_of_a_run_that_dropped_it(tmp_path: Path) -> None:
    fault = ("--inject", "nan:step=3,rank=0,length=2")
    extra = ("--dropout", "0.1", "--clip-grad-norm", "1.0", "--accumulate", "2", "--state-digest")
    guarded = run(tmp_path / "guarded", *fault, *extra)
    twin = run(tmp_path / "twin", "--rule", "off", "--skip-batches", "3-4", *extra)
    assert guarded["refused"] == [3, 4]
    assert differences(state(tmp_path / "guarded"), state(tmp_path / "twin")) == []
    assert guarded["evaluation"] == twin["evaluation"]
    # The guarded run keeps the committed value at the two batches that its twin has no event for.
    kept = dict(zip(guarded["probe"]["batch"], guarded["probe"]["value"], strict=True))
    assert kept.pop(3) == kept.pop(4) == kept[2]
    assert kept == dict(zip(twin["probe"]["batch"], twin["probe"]["value"], strict=True))


@pytest.mark.parametrize("batch", [3, 7])
def test_a_deferred_verdict_costs_the_guilty_batch_alone(tmp_path: Path, batch: int) -> None:
    """The next one, which was trained on with refused weights, is shown again; there is none after the last."""
    extra = ("--dropout", "0.1", "--clip-grad-norm", "1.0", "--accumulate", "2", "--state-digest")
    fault = ("--inject", f"bit-flip:step={batch},rank=0,where=parameter")
    guarded = run(tmp_path / "guarded", "--decision", "deferred", *fault, *extra)
    twin = run(tmp_path / "twin", "--rule", "off", "--skip-batches", f"{batch}", *extra)
    assert guarded["refused"] == [batch] and guarded["undone"] == []
    assert differences(state(tmp_path / "guarded"), state(tmp_path / "twin")) == []
    assert guarded["final_probe"] == twin["final_probe"] and guarded["evaluation"] == twin["evaluation"]
    events = read_events(tmp_path / "guarded" / "events.jsonl")
    assert [event["attempt"] for event in events] == list(range(len(events)))
    assert [event["batch"] for event in events][:batch] == list(range(batch))


def test_a_fault_hits_the_unguarded_run_too(tmp_path: Path) -> None:
    clean = run(tmp_path / "clean", "--rule", "off")
    scaled = run(tmp_path / "scaled", "--rule", "off", "--inject", "gradient-scale:step=3,factor=-50,length=2")
    flipped = run(tmp_path / "flipped", "--rule", "off", "--inject", "bit-flip:step=5,rank=0,where=parameter")
    for faulty, first in ((scaled, 3), (flipped, 5)):
        assert faulty["probe"]["value"][:first] == clean["probe"]["value"][:first]
        assert faulty["probe"]["value"][first] != clean["probe"]["value"][first]


@pytest.mark.parametrize("fault", ["shuffled-labels:step=3,length=2", "learning-rate:step=3,factor=30,length=2"])
def test_a_fault_that_is_let_through_is_the_same_guarded_and_not(tmp_path: Path, fault: str) -> None:
    tolerant = ("--rule", "fixed", "--epsilon", "1000")
    extra = ("--inject", fault, "--state-digest", "--accumulate", "2", "--clip-grad-norm", "1")
    arms = {name: run(tmp_path / name, *rule, *extra) for name, rule in (("on", tolerant), ("off", ("--rule", "off")))}
    clean = run(tmp_path / "clean", "--rule", "off", *extra[2:])
    assert arms["on"]["probe"] == arms["off"]["probe"]
    assert differences(state(tmp_path / "on"), state(tmp_path / "off")) == []
    assert arms["off"]["probe"]["value"][:3] == clean["probe"]["value"][:3]
    assert arms["off"]["probe"]["value"][3] != clean["probe"]["value"][3]
    # The learning rate after the fault is the clean run's, to the bit: it is in the digests.
    rates = [{k: v for k, v in state(tmp_path / n).items() if "lr" in k or "scheduler" in k} for n in ("on", "clean")]
    assert rates[0] and rates[0] == rates[1]


def test_the_twin_of_a_run_that_refused_shuffled_labels_is_equal(tmp_path: Path) -> None:
    steep = ("--task", "phrase", "--steps", "38", "--batch-size", "16", "--lr", "5e-3", "--schedule", "constant")
    steep += ("--state-digest",)
    fault = ("--inject", "shuffled-labels:step=32,length=3")
    guarded = run(tmp_path / "guarded", "--rule", "fixed", "--epsilon", "0.02", "--alpha", "1", *steep, *fault)
    assert guarded["refused"] == [32, 33, 34] and guarded["undone"] == guarded["attenuated"] == []
    run(tmp_path / "twin", "--rule", "off", "--skip-batches", "32-34", *steep)
    assert differences(state(tmp_path / "guarded"), state(tmp_path / "twin")) == []


def test_rules_of_others_are_not_helped_by_the_trend_or_the_ladder(tmp_path: Path) -> None:
    # Nine refusals in a row: the default ladder would try shorter steps from the fourth on.
    arms = {}
    for rule in (("fixed", "--epsilon", "0", "--alpha", "0.001"), ("loss-rollback", "--loss-sigmas", "1e-9")):
        arms[rule[0]] = run(tmp_path / rule[0], "--rule", *rule, "--steps", "24", "--lr", "1.0", "--batch-size", "8")
        assert len(arms[rule[0]]["refused"]) >= 9
        assert set(arms[rule[0]]["rungs"]) <= {"skip", "deep_rollback"} and arms[rule[0]]["warnings"] == 0


def test_loss_rollback_undoes_the_steps_before_a_spike(tmp_path: Path) -> None:
    fault = ("--inject", "learning-rate:step=28,factor=100")
    long = ("--steps", "34", "--task", "phrase", "--batch-size", "16", "--lr", "5e-3", "--state-digest")
    rule = ("--rule", "loss-rollback", "--loss-sigmas", "3", "--loss-window", "8")
    summary = run(tmp_path / "guarded", *rule, *fault, *long)
    refusal = next(e for e in read_events(tmp_path / "guarded" / "events.jsonl") if e["action"] != "commit")
    assert refusal["attempt"] == 29, "one step late: the loss of the next batch shows what the faulty step did"
    assert refusal["action"] == "deep_rollback" and refusal["undone"] == list(range(16, 29))
    assert summary["refused"] == [29] and summary["undone"] == list(range(16, 29))
    run(tmp_path / "twin", "--rule", "off", "--skip-batches", "16-29", *long)
    assert differences(state(tmp_path / "guarded"), state(tmp_path / "twin")) == []


def test_zclip_takes_the_edge_off_a_burst_of_gradients(tmp_path: Path) -> None:
    burst = ("--rule", "off", "--steps", "30", "--optimizer", "sgd", "--lr", "0.1", "--inject")
    fault = "gradient-scale:step=27,factor=1000"
    plain, clipped = (run(tmp_path / str(len(o)), *burst, fault, *o) for o in ((), ("--zclip",)))
    norms = [event["gradient_norm"] for event in read_events(tmp_path / "1" / "events.jsonl")]
    assert norms[27] > 300 * max(norms[20:27]), "logged as it was before clipping"
    assert clipped["probe"]["value"][:25] == plain["probe"]["value"][:25], "the first 25 are not clipped"
    assert clipped["probe"]["value"][27] < clipped["probe"]["value"][24] + 0.1 < plain["probe"]["value"][27] - 0.5


def test_the_parameter_norm_changes_nothing_and_is_that_of_the_standing_state(tmp_path: Path) -> None:
    fault = ("--inject", "nan:step=3,rank=0", "--state-digest")
    measured = run(tmp_path / "measured", *fault, "--parameter-norm")
    plain = run(tmp_path / "plain", *fault)
    assert measured["probe"] == plain["probe"]
    assert differences(state(tmp_path / "measured"), state(tmp_path / "plain")) == []
    norms = [event["parameter_norm"] for event in read_events(tmp_path / "measured" / "events.jsonl")]
    assert norms[3] == norms[2] and len(set(norms)) == 7, "a refused attempt leaves the norm before it"
    assert "parameter_norm" not in read_events(tmp_path / "plain" / "events.jsonl")[0]


def test_observe_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    observed = run(tmp_path, "--observe", "--rule", "fixed", "--epsilon", "0")
    assert observed["refused"] == []
    off = run(tmp_path / "off", "--rule", "off")
    assert observed["probe"] == off["probe"]


def test_an_adaptive_cadence_and_signals_from_the_command_line(tmp_path: Path) -> None:
    run(tmp_path, "--every", "adaptive", "--update-signals")
    events = read_events(tmp_path / "events.jsonl")
    assert all({"learning_rate", "training_loss", "update_rms"} <= set(event["signals"]) for event in events[1:])


def test_the_edge_of_stability_is_watched_and_drawn(tmp_path: Path) -> None:
    more = ("--steps", "12", "--state-digest")
    run(tmp_path / "watched", "--edge", "--update-signals", *more)
    run(tmp_path / "plain", *more)
    assert differences(state(tmp_path / "watched"), state(tmp_path / "plain")) == []
    events = read_events(tmp_path / "watched" / "events.jsonl")
    assert [event["attempt"] for event in events if event["edge"]["margin"] is not None][:1] == [5]
    assert {event["edge"]["state"] for event in events} <= {"stable", "edge", "overdriven"}
    report(tmp_path / "watched", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Edge of stability: watched" not in page.replace("How far from the edge of stability", "")  # in the figure
    assert "States, in judged attempts: stable at" in page and "Nothing was done about it." in page


@pytest.mark.parametrize("wrong", ["--rule off", "--decision deferred", "--parallel fsdp1"])
def test_what_the_edge_does_not_go_with(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options([*SMALL, "--edge", *wrong.split(), "--out", "unused"], 2)
    assert "--edge: " in capsys.readouterr().err


def test_cuts_need_the_monitor(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_options([*SMALL, "--edge", "--edge-cuts", "--out", "unused"], 2).edge_cuts
    with pytest.raises(SystemExit):
        parse_options([*SMALL, "--edge-cuts", "--out", "unused"], 2)
    assert "--edge-cuts: needs --edge" in capsys.readouterr().err


def test_every_second_step_is_judged(tmp_path: Path) -> None:
    for rule in ("predictive", "off"):
        run(tmp_path / rule, "--every", "2", "--rule", rule)
        events = read_events(tmp_path / rule / "events.jsonl")
        assert [event["action"] for event in events] == ["unjudged", "commit"] * 4
        assert [event["measurement"] is None for event in events] == [True, False] * 4


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("implementation", ["fused", "for-loop"])
def test_optimizers_and_their_kernels(tmp_path: Path, optimizer: str, implementation: str) -> None:
    fault = ("--inject", "nan:step=4,rank=0")
    options = ("--optimizer", optimizer, "--implementation", implementation, "--schedule", "constant", "--steps", "6")
    assert run(tmp_path, *options, *fault)["refused"] == [4]


def test_bfloat16_computes_in_bfloat16_and_keeps_weights_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    real = training.cross_entropy

    def spy(model: Any, batch: Any) -> torch.Tensor:
        seen.append((model(batch[0]).dtype, next(model.parameters()).dtype))
        return real(model, batch)

    monkeypatch.setattr(training, "cross_entropy", spy)
    run(tmp_path, "--dtype", "bfloat16", "--steps", "2")
    assert set(seen) == {(torch.bfloat16, torch.float32)}


def test_a_run_that_only_refuses_stops_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    impatient = functools.partial(StabilityController, escalation=Escalation(max_refusals_in_row=3))
    monkeypatch.setattr(training, "StabilityController", impatient)
    summary = run(tmp_path, "--inject", "nan:step=2,rank=0,length=9", status=1)
    assert not summary["finished"]
    assert summary["error"] == "StabilityStop" and "3 refusals in a row" in summary["reason"]
    assert summary["report"]["refusals_in_a_row"] == 3
    assert "StabilityStop" in capsys.readouterr().err


def test_any_other_error_is_in_the_summary_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="injected"):
        training.main([*SMALL, "--rule", "off", "--inject", "raise:step=2,phase=gradients", "--out", str(tmp_path)])
    summary = read_json(tmp_path / "summary.json")
    assert not summary["finished"] and "injected" in summary["reason"]
    assert len(read_events(tmp_path / "events.jsonl")) == 2


def test_bad_options_end_before_a_process_group_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("a group was started"))
    for wrong in (("--batch-size", "7"), ("--inject", "nan:step=1,rank=5"), ("--parallel", "single")):
        with pytest.raises(SystemExit):
            training.main([*SMALL, *wrong, "--out", str(tmp_path / "run")])
    assert training.main([*SMALL, "--task", "cifar10", "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--task", "cifar10"), "--data DIR"),
        (("--probe-size", "99999"), "cannot take 99999"),
        (("--task", "digits", "--batch-size", "2000"), "does not fit"),
    ],
)
def test_data_that_does_not_fit_ends_before_anything_starts(
    tmp_path: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main([*SMALL, *arguments, "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_warms_up_and_ends_near_zero() -> None:
    factor = training._factor(parse_options(["--steps", "100", "--warmup", "10"], 1))
    assert [factor(0), factor(9), factor(10)] == [0.1, 1.0, 1.0]
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == factor(140) == 0.0
    constant = training._factor(parse_options(["--schedule", "constant", "--warmup", "0", "--steps", "5"], 1))
    assert [constant(0), constant(99)] == [1.0, 1.0]


def test_unguarded_steps_are_plain_steps() -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
        return model, torch.optim.Adam(model.parameters())

    def loss_fn(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    batches = list(torch.randn(6, 4, 3))
    results = []
    for measured in (False, True):
        model, optimizer = build()
        unguarded = Unguarded(model, optimizer, LossProbe(loss_fn, batches[:1]))
        torch.manual_seed(1)
        for batch in batches:
            loss_fn(model, batch).backward()
            if measured:
                verdict = unguarded.step()
                assert verdict.accepted and verdict.measurement is not None
            else:
                optimizer.step()
            optimizer.zero_grad()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_digests_tell_bits_types_and_names_apart() -> None:
    image = {"a": torch.tensor([1.0, -0.0]), "b": 1, "c": 0.0, "d": torch.empty(0), "e": b"x", "f": None}
    base = digests(StateImage(image))
    assert base == digests(StateImage({**image, "a": torch.tensor([1.0, -0.0])}))
    for name, other in (
        ("a", torch.tensor([1.0, 0.0])),
        ("a", torch.tensor([1.0, -0.0], dtype=torch.float64)),
        ("a", torch.tensor([[1.0, -0.0]])),
        ("b", True),
        ("b", 1.0),
        ("c", -0.0),
        ("d", torch.empty(0, 2)),
        ("e", "x"),
    ):
        assert differences(base, digests(StateImage({**image, name: other}))) == [name]
    assert differences(base, {name: value for name, value in base.items() if name != "f"}) == ["f"]


def test_a_preflight_changes_no_bit_and_is_written_down(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", "--state-digest")
    summary = run(tmp_path / "looked", "--preflight", "--shaping", "--state-digest", "--lr", "2e-3")
    assert differences(state(tmp_path / "plain"), state(tmp_path / "looked")) == []
    assert plain["preflight"] is None and summary["preflight"]["level"] == "low"
    assert summary["preflight"]["learning_rate"] == 2e-3  # the peak, not the first one of the warm-up
    first, *others = read_events(tmp_path / "looked" / "events.jsonl")
    assert first == summary["preflight"] and [event["attempt"] for event in others] == list(range(8))
    assert summary["probe"] == plain["probe"]
    assert len(load_run(tmp_path / "looked").events) == 8  # reports are about attempts


def test_shaping_is_switched_on_in_a_run_whose_rate_is_far_too_high(tmp_path: Path) -> None:
    given = (
        "--preflight",
        "--shaping",
        *("--lr", "30", "--warmup", "60", "--steps", "60"),
        *("--width", "32", "--layers", "1"),
    )
    summary = run(tmp_path, *given)
    assert summary["preflight"]["level"] == "high" and summary["rungs"]["shape"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shaping",), "--shaping: needs --preflight"),
        (("--preflight", "--rule", "off"), "--preflight: needs a controller"),
        (("--preflight", "--shaping", "--rule", "fixed"), "--shaping: needs --rule predictive"),
        (("--preflight", "--shaping", "--observe"), "--shaping: needs --rule predictive"),
        (("--preflight", "--shaping", "--compile"), "--shaping: does not go with --compile"),
        (("--preflight", "--shaping", "--task", "digits"), "--shaping: the blocks of --task digits"),
    ],
)
def test_preflight_options_that_do_not_go_together(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options([*SMALL, *arguments], world_size=1)
    assert words in capsys.readouterr().err
