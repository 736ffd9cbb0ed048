"""The engine benchmarks: what is measured is really done, counts are right, each command writes what it promises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import torch.distributed as dist
from choice import often
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dist_stability.bench.engine import arms, states, timing
from dist_stability.bench.engine.arms import SMALL_WORK, Guarded, Plain, Reference, make_loops
from dist_stability.bench.engine.command import bench
from dist_stability.bench.engine.counting import allocations, counting, made_groups
from dist_stability.bench.engine.edge import LEVELS
from dist_stability.bench.engine.keepers import KEEPERS, make_keepers
from dist_stability.bench.engine.ranks import RanksFailed, run_job
from dist_stability.bench.engine.recovery import _start, with_ratios
from dist_stability.bench.engine.starts import PARTS, WAYS
from dist_stability.bench.engine.step import _count, headline
from dist_stability.cli import main
from dist_stability.experiments.wrapping import Processes
from dist_stability.report.events import read_json
from dist_stability.snapshot import StatePlan
from dist_stability.testing import capture_state, compare

CPU = torch.device("cpu")
SIZES = (states.Size("1,200 tensors of 64", 0, 5), states.Size("small", 16, 1))


# ---------------------------------------------------------------------- ways to keep a copy


@pytest.mark.parametrize("name", [name for name in KEEPERS if name != "memcpy"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_every_keeper_brings_the_state_back(name: str, size: states.Size) -> None:
    """A rival that copied too little would look fast."""
    torch.manual_seed(1)
    model, optimizer, plan = states.build(size, CPU)
    keepers, missing = make_keepers(model, optimizer, plan, CPU)
    if name in missing:
        pytest.skip(missing[name])
    keeper = keepers[name]
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        before = capture_state(model, [optimizer])
        keeper.take()
        keeper.wait()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 3.0)
        optimizer.step()
        assert compare(capture_state(model, [optimizer]), before), "the step changed something"
        keeper.restore()
        keeper.wait() if name == "memcpy" else None
        assert compare(capture_state(model, [optimizer]), before) == []
    assert keeper.held >= plan.nbytes
    for each in keepers.values():
        each.close()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_ours_allocates_nothing(size: states.Size) -> None:
    keepers, _ = make_keepers(*states.build(size, CPU), CPU)

    def once() -> None:
        keepers["ours"].take()
        keepers["ours"].wait()

    for _ in range(2):  # one for each slot
        once()
    assert allocations(CPU, once) == (0, 0)


def test_the_limit_copies_as_many_bytes() -> None:
    keepers, _ = make_keepers(*states.build(SIZES[0], CPU), CPU)
    assert keepers["memcpy"]._live.numel() == keepers["memcpy"]._mine.numel() == keepers["ours"].plan.nbytes


def test_the_small_state_has_1200_tensors() -> None:
    assert len(states.build(states.SMALL, CPU)[2].entries) == 1200


# ---------------------------------------------------------------------- counts


def test_reads_by_the_host_are_counted() -> None:
    x = torch.nn.Parameter(torch.ones(3))
    with counting(CPU) as counts:
        y = x * 2
        y.sum().item()
        y.tolist()
        bool(y[0] > 0), float(y[1].detach()), int(y[2].detach())
        y.detach().cpu()
    assert counts.host_reads == dict.fromkeys(("item", "tolist", "__bool__", "__float__", "__int__", "cpu"), 1)
    assert not counts.collectives and not counts.ours


def test_allocations_are_counted() -> None:
    x, y = torch.ones(1000), torch.zeros(1000)
    assert allocations(CPU, lambda: y.copy_(x)) == (0, 0)
    assert allocations(CPU, lambda: (x.clone(), x[:10].clone(), x.view(10, 100))) == (2, 4040)
    assert allocations(CPU, lambda: y.add_(x)) == (0, 0)


def collectives(rank: int, world: int) -> tuple[Any, ...]:
    theirs = dist.new_group(list(range(world)))
    with made_groups() as made:
        ours = dist.new_group(list(range(world)))
    after = dist.new_group(list(range(world)))
    x = torch.ones(4, dtype=torch.float64)
    with counting(CPU, tuple(made)) as counts:
        for group, times in ((ours, 3), (theirs, 2), (after, 1), (None, 1)):
            for _ in range(times):
                dist.all_reduce(x, group=group)
        dist.all_gather([torch.empty(4, dtype=torch.float64) for _ in range(world)], x, group=ours)
        dist.barrier()
    dist.all_reduce(x, group=ours)  # no longer counted
    return len(made), dict(counts.ours), dict(counts.collectives), counts.own_bytes


def test_collectives_are_counted_by_group(two: harness.Pool) -> None:
    expected = (1, {"all_reduce": 3, "all_gather": 1}, {"allreduce": 7, "allgather": 1, "barrier": 1}, 32)
    assert two.run(collectives) == [expected, expected]


def sharded_product(rank: int, world: int) -> int:
    mesh = init_device_mesh("cpu", (world,))
    left, right = (distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]) for _ in range(2))
    with counting(CPU) as counts:
        left @ right  # needs all of the right factor
    return counts.collectives.total()


def test_collectives_inside_an_operator_on_dtensors_are_counted(two: harness.Pool) -> None:
    assert two.run(sharded_product) == [1, 1]


def counted(rank: int, world: int, mode: str) -> dict[str, dict[str, Any]]:
    found = {}
    for loop in make_loops(SMALL_WORK, Processes(rank, world, CPU), mode):
        for _ in range(8):
            loop.step()
        found[loop.name] = _count(loop)
        loop.close()
    return found


@pytest.mark.parametrize(("mode", "world"), often([("ddp", 2), ("ddp", 4), ("fsdp2", 2)], [("fsdp2", 2)]))
def test_collectives_of_a_judged_step(mode: str, world: int) -> None:
    """One of ours without guards, two with one that needs agreement, whatever the number of ranks."""
    first, *others = harness.pool(world).run(counted, mode)
    key = "own_collectives_per_step"
    assert all(other[name][key] == first[name][key] for other in others for name in first)
    assert {name: loop[key] for name, loop in first.items()} == {
        "plain": 0,
        "guarded": 1,
        "guarded, with a guard": 2,
        "guarded, deferred": 1,
        "guarded, every 8th": 1 / 8,
        "guarded, none judged": 0,
        "observe": 1,
        "clone + deepcopy": 0,
    }
    total = {name: loop["collectives_per_step"] for name, loop in first.items()}
    # The probe's forward gathers shards; besides that and the vote nothing is added.
    probe = {"ddp": 0, "fsdp2": 2}[mode]
    assert total["guarded"] == total["plain"] + probe + 1
    assert total["guarded, deferred"] == total["guarded"]
    assert total["guarded, none judged"] == total["plain"]
    assert total["clone + deepcopy"] == total["plain"] + probe + 1  # it broadcasts its verdict
    reads = {name: loop["host_reads_per_step"] - first["plain"]["host_reads_per_step"] for name, loop in first.items()}
    assert reads["guarded"] == 1, "the vote is read once, and nothing else is"
    assert reads["guarded, deferred"] == 1, "that of the step before"
    assert reads["guarded, none judged"] == 0
    sizes = {first[name]["own_bytes"] for name in ("guarded", "guarded, deferred")}
    assert sizes == {{"ddp": 728, "fsdp2": 664}[mode]}


def looks(rank: int, world: int) -> list[int]:
    """How often the plan is checked in each of four steps."""
    loop = Guarded("guarded", SMALL_WORK, Processes(rank, world, CPU), "ddp")
    look, counts = StatePlan.look, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StatePlan, "look", lambda plan: counts.append(1) or look(plan))
        found = []
        for _ in range(4):
            counts.clear()
            loop.step()
            found.append(len(counts))
    loop.close()
    return found


def test_a_judged_step_looks_at_the_state_twice(two: harness.Pool) -> None:
    """Before the probe, for the vote and the replicas' digests, and at the copy: the probe is somebody else's code."""
    # In the first step the optimizer's state appears: the old plan, the new one, the copy.
    assert two.run(looks) == [[3, 2, 2, 2]] * 2


# ---------------------------------------------------------------------- loops and times


def test_the_loops_train_alike() -> None:
    """They differ in nothing but what is done around the step: the same bits after as many steps."""
    here = Processes(0, 1, CPU)
    loops = make_loops(SMALL_WORK, here, "single")
    assert isinstance(loops[0], Plain) and {type(loop) for loop in loops} == {Plain, Guarded, Reference}
    for loop in loops:
        for _ in range(6):
            loop.step()
        if hasattr(getattr(loop, "controller", None), "finish"):
            loop.controller.finish()  # type: ignore[attr-defined]
    images = [capture_state(loop.model, [loop.optimizer]) for loop in loops]
    assert all(compare(image, images[0]) == [] for image in images[1:])
    for loop in loops:
        loop.close()
    parts = loops[-1].seconds
    assert set(parts) == {"copy", "probe", "vote"} and all(len(seconds) == 6 for seconds in parts.values())


def test_contestants_take_turns() -> None:
    order: list[str] = []

    def contestant(name: str) -> Any:
        return lambda: (order.append(name), {"number": float(len(order))})[1]

    found = timing.interleave({name: contestant(name) for name in "abc"}, rounds=3, warm_up=1)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert found == {
        "a": {"number": [6.0, 8.0, 10.0]},
        "b": {"number": [4.0, 9.0, 11.0]},
        "c": {"number": [5.0, 7.0, 12.0]},
    }


def test_ratios_are_taken_within_a_round() -> None:
    assert timing.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert timing.shown({"median": 1.2345, "low": 1.0, "high": 20.0}) == "1.23 (1 to 20)"


def test_the_headline_is_the_last_modes() -> None:
    ratios = {"reference_over_guarded": None, "reference_copy_over_guarded": 4.0}
    numbers = {"overhead_ratio": 0.5, "own_collectives_per_step": 1.0, "collectives_per_step": 3.0}
    loops = {name: {**numbers, "host_syncs_per_step": 1.0} for name in ("plain", "guarded", "clone + deepcopy")}
    last = {"loops": {**loops, "guarded": {**loops["guarded"], "overhead_ratio": 0.25}}, **ratios}
    said = headline({"single": {"loops": loops, **ratios}, "ddp": last})
    assert (said["overhead_ratio"], said["collectives_per_step"], said["measured_loop"]) == (0.25, 1.0, "guarded")
    assert said["reference_copy_over_guarded"] == 4.0
    assert said["rivals"]["clone + deepcopy"]["overhead_ratio"] == 0.5 and "plain" not in said["loops"]
    deferred = {**loops, "guarded, deferred": {**loops["guarded"], "overhead_ratio": 0.01}}
    assert headline({"single": {"loops": deferred, **ratios}})["overhead_ratio"] == 0.01


# ---------------------------------------------------------------------- commands


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KEYS = {
    "snapshot": {"host_ms_per_snapshot", "bytes_over_payload", "allocations_after_warmup", "rivals", "sizes"},
    "restore": {"restore_over_limit", "rollback_over_limit", "rivals", "sizes", "rollback"},
    "edge": {"monitor_over_plain", "modes"},
    "step": {
        "overhead_ratio",
        "collectives_per_step",
        "host_syncs_per_step",
        "reference_over_guarded",
        "reference_copy_over_guarded",
        "rivals",
        "modes",
    },
}


@pytest.mark.parametrize("mode", often(("single", "ddp"), ["single"]))
def test_the_monitor_split_by_level(mode: str) -> None:
    found = run_job("edge", mode, 2, CPU, True)
    assert set(found["levels"]) == set(LEVELS)
    # Twenty steps of a round: a look at each step, the margin not due within 50.
    assert found["measured"]["level 0: ratio"] == found["measured"]["level 0: moments"] == 2 * 20
    total = sum(level["median"] for level in found["levels"].values())
    assert 0.0 < total == pytest.approx(found["monitor_over_plain"]["median"]) and found["first_margin_steps"] > 1.0


@pytest.mark.parametrize("name", KEYS)
def test_a_quick_run(name: str, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "folder"
    assert main(["bench", name, "--quick", "--device", "cpu", "--out", str(out)]) == 0
    summary = read_json(out / "summary.json")
    json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)  # strict JSON: no bare NaN
    assert set(summary) >= KEYS[name] | {"machine", "quick"} and summary["quick"] is True
    assert summary["machine"]["threads"] == 1 and summary["machine"]["torch"] == torch.__version__
    text = (out / "tables.md").read_text()
    assert "no figure here means anything" in text and "1 threads" in text
    assert ("clone + deepcopy" in text) == (name != "edge")
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<table>" in (out / "report.html").read_text()
    said = capsys.readouterr().out
    assert said.splitlines()[-3:] == [str(out / each) for each in ("report.html", "tables.md", "summary.json")]
    if name == "snapshot":
        assert 1 <= summary["bytes_over_payload"] < 1.1 and "digests" in text
        assert set(summary["rivals"]) <= set(KEEPERS) - {"ours", "memcpy", "one call"} and summary["rivals"]


@pytest.mark.slow
def test_step_and_rollback_in_two_processes() -> None:
    found = run_job("rollback", "ddp", 2, CPU, True)
    assert found["bytes"] > 0 and found["rollback_ms"]["median"] > found["vote_ms"] > 0


@pytest.mark.slow
def test_restarts_of_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new"
    assert main(["bench", "recovery", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    summary = read_json(out / "summary.json")
    assert summary["ranks"] == 2 and 0 < summary["our_share"] < 1 and summary["resume_over_limit"] > 0
    [size] = summary["sizes"].values()
    assert set(size["ways"]) == set(WAYS)
    text = (out / "tables.md").read_text()
    assert all(f"| {way} |" in text for way in WAYS) and "first step (s)" in text
    assert (out / "recovery.png").read_bytes().startswith(b"\x89PNG")


def test_what_follows_from_the_times_of_restarts() -> None:
    def times(state: float) -> timing.Numbers:
        each = {**dict.fromkeys(PARTS, 1.0), "state": state, "memcpy": 0.5, "memcpy into new memory": 2.0}
        return {part: [value, 2 * value] for part, value in each.items()}  # a round twice as slow in everything

    found = with_ratios({way: times(state) for way, state in zip(WAYS, (1.0, 4.0, 6.0), strict=True)})
    assert {key: value["median"] for key, value in found["checkpoint"].items() if "over" in key or "share" in key} == {
        "our share": 5 / 8,
        "over memcpy": 8.0,
        "over memcpy into new memory": 2.0,
        "over shared memory": 4.0,
        "restart over shared memory": 8 / 5,
    }
    assert found["shared memory"]["until state"]["median"] == 7.5


def test_a_restart_that_finds_nothing_says_why(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 0, shared memory: .*expected to resume at attempt 3: nothing to"):
        _start(WAYS[0], states.QUICK[-1], CPU, 1, (tmp_path, tmp_path))


def test_a_job_that_fails_says_why() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)step under ddp on 2 ranks failed with status 1:.*RuntimeError: .*meta"):
        run_job("step", "ddp", 2, torch.device("meta"), True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ranks": 0}, "--ranks must be at least 1, got 0"),
        ({"link": -1.0}, "--link must be GB/s above 0, got -1"),
        ({"link": float("nan")}, "--link must be GB/s above 0, got nan"),
        ({"link": float("inf")}, "--link must be GB/s above 0, got inf"),
    ],
    ids=str,
)
def test_bad_settings(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bench("scale", tmp_path, quick=True, **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("words", [["gpu"], ["step", "--device", "cuda"]], ids=str)
def test_without_a_gpu(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words, "--out", str(tmp_path / "out")]) == 1
    assert "sees no CUDA device" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_on_a_gpu(tmp_path: Path) -> None:
    assert main(["bench", "gpu", "--quick", "--out", str(tmp_path)]) == 0
    assert set(read_json(tmp_path / "summary.json")) == {"snapshot", "step", "restore", "edge", "scale"}


def test_the_command_line_knows_the_parts() -> None:
    from dist_stability import cli
    from dist_stability.bench.engine import command

    assert command.PARTS == cli.ENGINE_PARTS
    assert arms.NEVER > 10**6
