"""Checkpoints in one process: what is written is what was committed, damage is found and named, the good ones stay."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dist_stability import Checkpoints, LossProbe, Resumed, SharedMemory, StabilityController
from dist_stability.snapshot.catalogue import ranges
from dist_stability.snapshot.tiers import record
from dist_stability.snapshot.tiers.manifest import attempts, read_manifest, surplus, write_manifest
from dist_stability.snapshot.tiers.processes import Owner
from dist_stability.snapshot.tiers.record import Unusable


class Run:
    """A small guarded run in this process; ``end`` leaves it as a death would, after what is being written is there."""

    def __init__(self, *persist: Any, width: int = 5, optimizer: str = "adamw", **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))
        kind: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        self.optimizer = kind[optimizer](self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.97**step)
        self.width = width
        probe = LossProbe(lambda model, batch: model(batch).square().mean(), [torch.ones(8, width)])
        self.controller = StabilityController(
            self.model,
            self.optimizer,
            probe,
            persist=list(persist),
            extra_state={"scheduler": self.scheduler},
            anchors=0,
            **options,
        )

    def steps(self, first: int, last: int, bad: int = -1) -> Run:
        for number in range(first, last):
            self.optimizer.zero_grad()
            batch = torch.randn(6, self.width, generator=torch.Generator().manual_seed(number))
            (self.model(batch).square().mean() * (float("nan") if number == bad else 1.0)).backward()
            if self.controller.step().accepted:
                self.scheduler.step()
        return self

    def end(self) -> None:
        self.settle()
        self.controller._close(failed=True)

    def settle(self) -> None:
        courier = self.controller._persistence._courier  # type: ignore[union-attr]
        assert courier is not None
        for job in courier._under_way.values():
            assert job.done.wait(60)

    def state(self) -> list[torch.Tensor]:
        tensors = [*self.model.state_dict().values()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        tensors.append(torch.tensor([group["lr"] for group in self.optimizer.param_groups]))
        return [tensor.clone() for tensor in tensors] + [torch.get_rng_state()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left(folder: Path, steps: int = 7, every: int = 2, **options: Any) -> None:
    """A run that died after so many steps."""
    Run(Checkpoints(folder, every=every, **options)).steps(0, steps).end()


def again(folder: Path, **options: Any) -> tuple[Run, Resumed]:
    setting = {key: options.pop(key) for key in ("every", "keep", "job") if key in options}
    run = Run(Checkpoints(folder, **{"every": 2, **setting}), **options)
    return run, run.controller.resume()


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """Twelve steps without an interruption."""
    run = Run(SharedMemory("whole", tmp_path_factory.mktemp("whole"))).steps(0, 12)
    run.controller.close()
    return run.state()


# ---------------------------------------------------------------------- going on


def test_goes_on_bit_for_bit_and_says_from_where(tmp_path: Path, whole: list[torch.Tensor]) -> None:
    left(tmp_path)
    assert names(tmp_path) == ["attempt-00000002", "attempt-00000004", "attempt-00000006"]
    run, start = again(tmp_path)
    assert (start.attempt, start.batches, start.exact) == (6, 6, True)
    assert start.source == f"checkpoints in {tmp_path}"
    assert start.line.startswith(f"resumed at attempt 6 from checkpoints in {tmp_path} (committed at attempt 5, ")
    run.steps(6, 12)
    assert equal(run.state(), whole)
    run.controller.close()
    assert names(tmp_path) == ["attempt-00000006", "attempt-00000008", "attempt-00000010"]


def test_writing_changes_nothing(tmp_path: Path, whole: list[torch.Tensor]) -> None:
    run = Run(Checkpoints(tmp_path, every=1)).steps(0, 12)
    assert equal(run.state(), whole)
    run.controller.close()


def test_after_a_refusal_too(tmp_path: Path) -> None:
    through = Run(SharedMemory("whole", tmp_path)).steps(0, 12, bad=5)
    through.controller.close()
    folder = tmp_path / "checkpoints"
    Run(Checkpoints(folder, every=2)).steps(0, 7, bad=5).end()
    run, start = again(folder)
    assert start.attempt == 6
    run.steps(6, 12)
    assert equal(run.state(), through.state())
    run.controller.close()


def test_shared_memory_is_newer(tmp_path: Path, whole: list[torch.Tensor]) -> None:
    shared, folder = tmp_path / "shared", tmp_path / "disk"
    shared.mkdir()
    both = SharedMemory("job", shared), Checkpoints(folder, every=2)
    Run(*both).steps(0, 8).end()
    run = Run(*both)
    start = run.controller.resume()
    assert start.attempt == 7 and start.source == "shared memory"
    run.steps(7, 8).end()
    for path in shared.iterdir():  # the machine is another one now
        path.unlink()
    run = Run(*both)
    start = run.controller.resume()
    assert start.attempt == 6 and start.source == f"checkpoints in {folder}"
    run.steps(6, 12)
    assert equal(run.state(), whole)
    run.controller.close()
    assert list(shared.iterdir()) == []


def test_the_files_are_those_of_get_state_dict(tmp_path: Path) -> None:
    left(tmp_path)
    expected = Run(SharedMemory("other", tmp_path)).steps(0, 6)
    other = Run(SharedMemory("another", tmp_path), width=5)
    model, optimizer = get_state_dict(other.model, other.optimizer)
    state = {"model": model, "optimizer": optimizer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=tmp_path / "attempt-00000006", no_dist=True)
    set_state_dict(other.model, other.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert equal(other.state()[:-1], expected.state()[:-1])
    for run in (expected, other):
        run.controller.close()


# ---------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE = {
    "tensors flipped": ("__0_0.distcp", flip, "is damaged: __0_0.distcp has other bytes than were written"),
    "tensors cut": ("__0_0.distcp", cut, r"is damaged: __0_0.distcp has \d+ bytes instead of \d+"),
    "tensors gone": ("__0_0.distcp", Path.unlink, "is damaged: __0_0.distcp cannot be read"),
    "metadata flipped": (".metadata", flip, "is damaged: .metadata has other bytes"),
    "metadata gone": (".metadata", Path.unlink, "is damaged: .metadata cannot be read"),
    "rest flipped": ("rank-00000.state", flip, "is cut short or damaged"),
    "manifest flipped": ("manifest.json", flip, "attempt-00000006"),
    "manifest gone": ("manifest.json", Path.unlink, "has no manifest that can be read"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    name: str, tmp_path: Path, whole: list[torch.Tensor]
) -> None:
    file, hurt, said = DAMAGE[name]
    left(tmp_path)
    hurt(tmp_path / "attempt-00000006" / file)
    with pytest.warns(RuntimeWarning, match="this run begins at attempt 4, so attempt-00000006 of an earlier one"):
        run, start = again(tmp_path)
    assert start.attempt == 4
    assert re.search(said, start.line) and "6" in start.line, start.line
    run.steps(4, 12)
    assert equal(run.state(), whole)
    run.controller.close()


def test_other_jobs_and_other_models_are_not_gone_on_with(tmp_path: Path) -> None:
    left(tmp_path, job="mine")
    run, start = again(tmp_path, job="yours")
    assert not start and "attempt-00000006 is of job 'mine', and this one is 'yours'" in start.line
    run.controller.close()
    for options in ({"width": 6}, {"optimizer": "sgd"}):
        run, start = again(tmp_path, job="mine", **options)
        assert not start and "is of " in start.line, start.line
        run.controller.close()
    assert names(tmp_path) == ["attempt-00000002", "attempt-00000004", "attempt-00000006"]


def test_a_new_run_in_the_folder_sets_the_old_ones_aside(tmp_path: Path) -> None:
    left(tmp_path)
    with pytest.warns(RuntimeWarning, match="begins at attempt 0, so attempt-00000006, attempt-00000004.* set aside"):
        Run(Checkpoints(tmp_path, every=2)).steps(0, 4).end()
    assert names(tmp_path) == ["attempt-00000002"] + [f"set-aside-attempt-0000000{n}" for n in (2, 4, 6)]
    run, start = again(tmp_path)
    assert start.attempt == 2
    run.controller.close()


# ---------------------------------------------------------------------- what stays


def test_as_many_as_asked_for_stay(tmp_path: Path) -> None:
    left(tmp_path, steps=12, keep=2)
    assert names(tmp_path) == ["attempt-00000008", "attempt-00000010"]


def test_surplus_counts_only_sound_ones() -> None:
    everything = ["e", "d", "c", "b", "a"]
    asked = []

    def sound(name: str) -> bool:
        asked.append(name)
        return name not in "dc"

    assert surplus(everything, 2, sound) == ["a"]
    assert asked == ["e", "d", "c", "b"]
    assert surplus(everything, 9, sound) == []
    assert surplus(["d", "c"], 1, sound) == []


def test_a_damaged_one_takes_no_place(tmp_path: Path) -> None:
    left(tmp_path, steps=7, keep=2)
    assert names(tmp_path) == ["attempt-00000004", "attempt-00000006"]
    run, _ = again(tmp_path, keep=2)
    flip(tmp_path / "attempt-00000006" / "__0_0.distcp")
    run.steps(6, 9).end()
    # 6 is damaged now, so 4 is the second good one.
    assert names(tmp_path) == ["attempt-00000004", "attempt-00000006", "attempt-00000008"]


def test_what_dead_processes_left_goes_and_what_living_ones_write_stays(tmp_path: Path) -> None:
    mine = Owner.this()
    dead = Owner((2**22 + 1, 5), mine.agent, mine.boot, mine.namespace)
    foreign = Owner((1, 1), (1, 1), "feedbeef", "1")
    for owner in (mine, dead, foreign):
        (tmp_path / f".attempt-00000004.{owner}.partial").mkdir(parents=True)
    Run(Checkpoints(tmp_path)).controller.close()
    assert names(tmp_path) == sorted(f".attempt-00000004.{owner}.partial" for owner in (mine, foreign))


# ---------------------------------------------------------------------- a disk that fails


def test_disk_full_is_a_warning_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: list[torch.Tensor]
) -> None:
    run = Run(Checkpoints(tmp_path, every=2)).steps(0, 4)
    run.settle()

    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    from dist_stability.snapshot.tiers import dcp as files

    with monkeypatch.context() as patch:
        patch.setattr(files._Summed, "write", refuse)
        run.steps(4, 5)
        run.settle()
        with pytest.warns(
            RuntimeWarning, match=r"attempt 4 failed \(writing: rank 0: OSError: .*No space left.*one bef"
        ):
            run.steps(5, 6)
    assert names(tmp_path) == ["attempt-00000002"]
    run.steps(6, 12)
    assert equal(run.state(), whole)
    run.controller.close()
    assert names(tmp_path) == ["attempt-00000002", "attempt-00000006", "attempt-00000008", "attempt-00000010"][-3:]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system in which two checkpoints fit."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_file_system(tiny: Path) -> None:
    run = Run(Checkpoints(tiny, every=2)).steps(0, 3)
    run.settle()
    (tiny / "other").write_bytes(bytes(32768))
    with pytest.warns(RuntimeWarning, match="failed .*No space left on device"):
        for number in range(3, 9):
            run.steps(number, number + 1)
            run.settle()
    run.steps(9, 10).end()
    assert not [name for name in names(tiny) if name.startswith(".")]
    assert attempts(tiny) and not read_manifest(attempts(tiny)[0]).damaged()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"rank 0: persist=Checkpoints\('.*file/x'\): it cannot be written to"):
        Run(Checkpoints(tmp_path / "file" / "x"))


@pytest.mark.parametrize("setting", [{"every": 0}, {"keep": 0}, {"every": 2.5}])
def test_bad_settings(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a whole number of 1 or more"):
        Checkpoints(tmp_path, **setting)


def test_the_same_kind_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give each of them once"):
        Run(Checkpoints(tmp_path), Checkpoints(tmp_path / "2"))


def test_memory_that_went_bad_is_not_written(tmp_path: Path) -> None:
    run = Run(Checkpoints(tmp_path, every=2)).steps(0, 2)
    run.controller._recovery.ring.safe.wait()
    run.controller._recovery.ring.safe.memory.data[5] ^= 1
    run.steps(2, 3)
    run.settle()
    with pytest.warns(RuntimeWarning, match="its copy in memory is damaged"):
        run.steps(3, 4)
    run.controller.close()
    assert names(tmp_path) == []


# ---------------------------------------------------------------------- manifests and boxes


def test_a_manifest_cut_anywhere_or_flipped_is_found(tmp_path: Path) -> None:
    head = record.Head("job", 0, 1, 2**63 + 5, 7, 6, 11, 3, 4096, 1.5)
    write_manifest(tmp_path, head, {"a": (3, "00")})
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    assert read_manifest(tmp_path).head == head
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place])
        with pytest.raises(Unusable):
            read_manifest(tmp_path)
    for word in (b'"attempt": 6', b'"job": "job"', b"00"):
        path.write_bytes(whole.replace(word, word[:-1] + b"1" if word[-1:] != b'"' else word[:-2] + b'x"', 1))
        with pytest.raises(Unusable):
            read_manifest(tmp_path)
    path.write_text(json.dumps({"version": 2}))
    with pytest.raises(Unusable, match="another version"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("seed", range(20))
def test_a_range_of_memory_as_boxes(seed: int) -> None:
    """In any order of the dimensions: every element once, and each box where it says in memory."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    for _ in range(20):
        shape = [number(1, 4) for _ in range(number(0, 4))]
        order = torch.randperm(len(shape), generator=draw).tolist()
        count = torch.Size(shape).numel()
        tensor = torch.arange(count).view([shape[dim] for dim in order])
        tensor = tensor.permute([order.index(dim) for dim in range(len(shape))])
        begin = number(0, count)
        end = number(begin, count)
        seen: list[int] = []
        for low, sizes, first in ranges(tensor.shape, tensor.stride(), begin, end):
            box = tensor
            for dim, (offset, size) in enumerate(zip(low, sizes, strict=True)):
                box = box.narrow(dim, offset, size)
            memory = torch.arange(first, first + box.numel())
            assert torch.equal(memory.as_strided(sizes, tensor.stride()), box)
            seen += memory.tolist()
        assert sorted(seen) == list(range(begin, end))


# ---------------------------------------------------------------------- the end of the process

LOOP = """
import sys, torch
from torch import nn
from dist_stability import Checkpoints, LossProbe, StabilityController
model = nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
probe = LossProbe(lambda module, batch: module(batch).square().mean(), [torch.ones(4, 4)])
controller = StabilityController(model, optimizer, probe, persist=Checkpoints(sys.argv[1], every=1))
for _ in range(5):
    optimizer.zero_grad()
    model(torch.ones(4, 4)).square().mean().backward()
    controller.step()
print("over")
"""


def test_a_process_that_ends_without_close_ends(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOOP, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0 and ended.stdout == "over\n", ended.stderr
    shutil.rmtree(tmp_path)
