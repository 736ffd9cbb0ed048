"""The files: every damage is found and named, nothing of a dead job stays, and nothing of a living one goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from choice import often
from torch import nn

from dist_stability import (
    LossProbe,
    NonFiniteGuard,
    Resumed,
    SharedMemory,
    SnapshotError,
    StabilityController,
)
from dist_stability.snapshot.arena import HEAD, FoundArena
from dist_stability.snapshot.tiers import processes, record
from dist_stability.snapshot.tiers.processes import Owner
from dist_stability.snapshot.tiers.record import Head, Unusable
from dist_stability.snapshot.tiers.shared_memory import Shelf, files, remove_stale

HEAD_OF_RECORD = Head("job", 0, 1, 2**63 + 5, 7, 6, 11, 3, 4096, 1.5)


class Run:
    """A small guarded run in this process; ``end`` leaves it as a death would."""

    def __init__(
        self,
        folder: Path,
        width: int = 5,
        optimizer: str = "adamw",
        job: str = "job",
        guarded: bool = True,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))
        self.model.to(device)
        self.device = device
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[optimizer]
        self.optimizer = kind(self.model.parameters(), lr=0.05)
        self.width = width
        probe = LossProbe(lambda model, batch: model(batch).square().mean(), [torch.ones(8, width, device=device)])
        self.controller = StabilityController(
            self.model,
            self.optimizer,
            probe,
            persist=SharedMemory(job, folder),
            guards=(NonFiniteGuard(),) if guarded else (),
            **options,
        )

    def steps(self, first: int, last: int, bad: int = -1) -> Run:
        for number in range(first, last):
            self.optimizer.zero_grad()
            batch = torch.randn(6, self.width, generator=torch.Generator().manual_seed(number)).to(self.device)
            (self.model(batch).square().mean() * (float("nan") if number == bad else 1.0)).backward()
            self.controller.step()
        return self

    def end(self) -> None:
        self.controller._close(failed=True)

    def state(self) -> list[torch.Tensor]:
        tensors = [*self.model.state_dict().values()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        return [tensor.clone() for tensor in tensors] + [torch.get_rng_state()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def ours(folder: Path) -> list[Path]:
    return sorted(folder.glob("dist_stability*"))


def seals(folder: Path) -> list[Path]:
    """Seal files of records that can be used, newest first."""
    found = []
    for file in files(folder):
        if file.seal:
            head, _ = record.read(file.path)
            if FoundArena(file.slot, head.nbytes).fill == head.fill:
                found.append((head.made, file.path))
    return [path for _, path in sorted(found, reverse=True)]


# ---------------------------------------------------------------------- seals


def test_a_seal_comes_back(tmp_path: Path) -> None:
    body = {
        "tensors": [torch.arange(6.0).view(2, 3).t(), torch.tensor(True), torch.empty(0, 3), torch.ones(3).bfloat16()],
        "plain": (1, None, "x", {"y": [2.5]}),
    }
    path = tmp_path / "seal"
    record.write(path, HEAD_OF_RECORD, record.dumps(body), lambda: None)
    head, data = record.read(path)
    assert head == HEAD_OF_RECORD and path.stat().st_mode & 0o777 == 0o600
    found = record.loads(data)
    assert found["plain"] == body["plain"]
    for tensor, expected in zip(found["tensors"], body["tensors"], strict=True):
        assert torch.equal(tensor, expected) and tensor.dtype == expected.dtype
    assert not list(tmp_path.glob("*.partial"))


def test_cut_short_anywhere_or_a_flipped_byte_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "seal"
    record.write(path, HEAD_OF_RECORD, record.dumps([1, 2, 3]), lambda: None)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(Unusable, match="is cut short or damaged"):
            record.read(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(Unusable, match=r"is cut short or damaged|is of another version"):
            record.read(path)
    path.write_bytes(whole)
    record.read(path)


def test_a_head_of_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "seal"
    said = json.dumps({"job": "x", "colour": "blue"}).encode()
    data = record.MAGIC + len(said).to_bytes(4, "little") + said
    path.write_bytes(data + record._digest(data))
    with pytest.raises(Unusable, match="is of another version of this package"):
        record.read(path)
    path.write_bytes(record.MAGIC[:-1] + b"9" + data[8:])
    with pytest.raises(Unusable, match="is of another version of this package"):
        record.read(path)


# ---------------------------------------------------------------------- one rank, from start to start


def resumed(folder: Path, **options: Any) -> tuple[Run, Resumed]:
    run = Run(folder, **options)
    torch.manual_seed(99)
    return run, run.controller.resume()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adagrad"])
def test_a_run_goes_on_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    whole = Run(tmp_path, job="other", optimizer=optimizer).steps(0, 12, bad=5)
    expected = whole.state()
    whole.controller.close()
    Run(tmp_path, optimizer=optimizer).steps(0, 9, bad=5).end()
    run, found = resumed(tmp_path, optimizer=optimizer)
    assert found and found.attempt == found.batches == 8
    assert found.line.startswith("resumed at attempt 8 from shared memory (job job, committed at attempt 7, ")
    torch.rand(3)  # a loader that draws on its way to where it was
    assert equal(run.steps(8, 12).state(), expected)
    run.controller.close()
    assert ours(tmp_path) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_the_file_is_page_locked_and_the_run_goes_on(tmp_path: Path) -> None:
    whole = Run(tmp_path, job="other", device="cuda").steps(0, 12)
    assert whole.controller._recovery.ring.safe.pinned
    expected, random = whole.state(), torch.cuda.get_rng_state()
    whole.controller.close()
    Run(tmp_path, device="cuda").steps(0, 9).end()
    run, found = resumed(tmp_path, device="cuda")
    assert found.attempt == 8
    assert equal(run.steps(8, 12).state(), expected) and torch.equal(torch.cuda.get_rng_state(), random)
    run.controller.close()
    assert ours(tmp_path) == []


def test_a_slot_that_is_filled_again_is_not_offered(tmp_path: Path) -> None:
    run = Run(tmp_path, anchors=0).steps(0, 9)

    def interrupt(attempt: int, phase: str) -> None:
        if (attempt, phase) == (9, "copy") and run.controller._recovery.ring._slots[0].state == "filling":
            raise KeyboardInterrupt

    signature = run.controller._recovery.plan.signature
    run.controller.add_phase_listener(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.steps(9, 11)
    run.end()
    found, said = Shelf(SharedMemory("job", tmp_path), 0, 1).records(1, signature)
    assert [one.head.made for one in found] == [9] and not said


def test_state_that_has_become_smaller(tmp_path: Path) -> None:
    """A slot keeps memory that is larger than it needs by then."""
    run = Run(tmp_path, anchors=0).steps(0, 6)
    run.optimizer.state.pop(run.model[0].weight)
    run.optimizer.param_groups[0]["amsgrad"] = False
    run.model[0].weight.requires_grad_(False)
    run.steps(6, 12).end()
    again = Run(tmp_path, anchors=0)
    again.model[0].weight.requires_grad_(False)
    found = again.controller.resume()
    assert found.attempt == 11, found.line
    assert equal([*again.model.state_dict().values()][:1], [*run.model.state_dict().values()][:1])
    again.controller.close()


def test_the_very_first_state(tmp_path: Path) -> None:
    Run(tmp_path).steps(0, 1).end()
    run, found = resumed(tmp_path)
    assert found and found.attempt == 0 and not run.optimizer.state
    run.steps(0, 5)
    whole = Run(tmp_path, job="other").steps(0, 5)
    assert equal(run.state(), whole.state())
    run.controller.close()
    whole.controller.close()


def test_a_second_death_before_the_first_seal_loses_nothing(tmp_path: Path) -> None:
    Run(tmp_path).steps(0, 9).end()
    for _ in range(3):
        run, found = resumed(tmp_path)
        assert found.attempt == 8
        run.end()
    assert resumed(tmp_path)[1].attempt == 8


def test_the_slot_is_taken_over_and_not_copied(tmp_path: Path) -> None:
    Run(tmp_path, anchors=0).steps(0, 9).end()
    before, newest = set(ours(tmp_path)), seals(tmp_path)[0].with_suffix("")
    inode, fill = newest.stat().st_ino, FoundArena(newest, 0).fill
    run, found = resumed(tmp_path, anchors=0)
    taken = run.controller._recovery.ring.safe
    path = taken.memory.path
    assert found.attempt == 8 and path is not None and path.stat().st_ino == inode
    assert taken.memory.fill == fill and not taken.verify()
    assert not before & set(ours(tmp_path)), "all that an earlier process left has gone, or has a name of this one"
    run.steps(8, 9)
    assert taken.memory.fill == fill and run.controller._recovery.ring.safe is not taken
    run.steps(9, 10)
    assert taken.memory.fill == fill + 1 and run.controller._recovery.ring.safe is taken
    run.end()
    assert resumed(tmp_path, anchors=0)[1].attempt == 9


def test_what_is_taken_over_is_restored_from_after_a_refusal(tmp_path: Path) -> None:
    whole = Run(tmp_path, job="other").steps(0, 12, bad=8)
    expected = whole.state()
    whole.controller.close()
    Run(tmp_path).steps(0, 9, bad=8).end()
    run, found = resumed(tmp_path)
    assert found.attempt == 8
    taken = run.controller._recovery.ring.safe
    run.steps(8, 9, bad=8)
    assert run.controller._recovery.ring.safe is taken
    assert equal(run.steps(9, 12).state(), expected)
    run.controller.close()
    assert ours(tmp_path) == []


@pytest.mark.parametrize("when", range(5))
def test_a_death_while_the_slot_is_taken_over(when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has two names then, or one of either process; whatever it has, its seal has, too."""
    listed = Path.iterdir  # in the order that the file system likes: here the seals before their slot
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(sorted(listed(folder), reverse=True)))
    Run(tmp_path).steps(0, 9).end()
    run, calls = Run(tmp_path), [0]

    def interrupt(attempt: int, phase: str) -> None:
        calls[0] += (attempt, phase) == (8, "copy")
        if calls[0] > when:
            raise KeyboardInterrupt

    run.controller.add_phase_listener(interrupt)
    if when < 4:  # on entering, and after each link: of the slot, of two seals
        with pytest.raises(KeyboardInterrupt):
            run.controller.resume()
    else:
        assert run.controller.resume() and calls == [4]
    assert all(seal.with_suffix("").exists() for seal in seals(tmp_path)), "a seal without a slot"
    run.end()
    again, found = resumed(tmp_path)
    assert found.attempt == 8, found.line
    again.steps(8, 10)
    assert len({path.stat().st_ino for path in ours(tmp_path)}) == len(ours(tmp_path)), "nothing has two names"
    again.controller.close()
    assert ours(tmp_path) == []


def test_an_interrupted_take_over_leaves_nothing_behind(tmp_path: Path) -> None:
    Run(tmp_path).steps(0, 9).end()
    run = Run(tmp_path)

    def interrupt(attempt: int, phase: str) -> None:
        if phase == "copy" and len({path.stat().st_ino for path in ours(tmp_path)}) < len(ours(tmp_path)):
            raise KeyboardInterrupt

    run.controller.add_phase_listener(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.controller.resume()
    run.controller.close()
    assert ours(tmp_path) == []


def test_a_death_while_the_next_commit_is_copied(tmp_path: Path) -> None:
    """What was taken over is not filled before another slot is safe."""
    Run(tmp_path, anchors=0).steps(0, 9).end()
    run, _ = resumed(tmp_path, anchors=0)

    def interrupt(attempt: int, phase: str) -> None:
        if (attempt, phase) == (8, "copy") and any(s.state == "filling" for s in run.controller._recovery.ring._slots):
            raise KeyboardInterrupt

    run.controller.add_phase_listener(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.steps(8, 9)
    run.end()
    assert resumed(tmp_path, anchors=0)[1].attempt == 8


def test_what_must_stay_as_it_is_is_not_taken_over(tmp_path: Path) -> None:
    """Slots of which another host has a copy, copies that another rank keeps, and what another rank has sent."""
    Run(tmp_path).steps(0, 9).end()
    newest = seals(tmp_path)[0]
    shelf = Shelf(SharedMemory("job", tmp_path), 0, 1)
    head, body = record.read(newest)
    slot = newest.with_suffix("")
    held = shelf.hold(slot, head, body)
    shelf.keeps_held = True
    before = ours(tmp_path)
    assert not shelf.take_over(FoundArena(slot, head.nbytes), lambda: None)
    held.unlink()
    kept = slot.with_name(slot.name.replace(".r0.", ".r0.k1."))
    shutil.copy(slot, kept)
    assert not shelf.take_over(FoundArena(kept, head.nbytes), lambda: None)
    kept.unlink()
    landed = shelf.land(head.nbytes)
    assert landed.path is not None and not shelf.take_over(FoundArena(landed.path, head.nbytes), lambda: None)
    shelf.remove(landed.path)
    assert ours(tmp_path) == [path for path in before if path != held]
    assert shelf.take_over(FoundArena(slot, head.nbytes), lambda: None)
    assert not slot.exists() and seals(tmp_path)[0].name.endswith(newest.suffix)


def test_what_cannot_be_taken_over_is_copied_and_forgotten_at_the_second_seal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    Run(tmp_path).steps(0, 9).end()
    before = set(ours(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        run, found = resumed(tmp_path)
    assert found.attempt == 8
    assert len(before & set(ours(tmp_path))) == 3, "the slot that was resumed from, and its seals"
    run.steps(8, 9)
    assert before & set(ours(tmp_path))
    run.steps(9, 10)
    assert not before & set(ours(tmp_path))
    run.controller.close()
    assert ours(tmp_path) == []


def test_a_run_that_does_not_resume_says_what_it_removes(tmp_path: Path) -> None:
    Run(tmp_path).steps(0, 4).end()
    run = Run(tmp_path).steps(0, 1)
    with pytest.warns(RuntimeWarning, match="had snapshots of an earlier process in .* nobody called resume"):
        run.steps(1, 2)
    run.end()
    assert resumed(tmp_path)[1].attempt == 1


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    run, found = resumed(tmp_path)
    assert not found and found.attempt == 0
    assert found.line == "nothing to resume from in shared memory (job job): no earlier process left anything"
    run.controller.close()


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_each_tensor_sends_to_the_older_one(tmp_path: Path) -> None:
    died = Run(tmp_path / "died").steps(0, 9)
    slot = died.controller._recovery.ring.safe
    places = list(zip(slot._layout.starts, slot._views, strict=True))
    names = [slot._name(index) for index in range(len(places))]
    died.end()
    assert len(places) == 24, "six parameters, each with two moments and a counter"
    for number, (start, view) in enumerate(places):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "died", folder)
        damage(seals(folder)[0].with_suffix(""), HEAD + start + view.numel() * view.element_size() - 1)
        run, found = resumed(folder)
        assert found.attempt == 7 and f"attempt 8 on rank 0: is damaged: {names[number]}" in found.line
        run.controller.close()
        assert ours(folder) == []


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("seal flipped", "is cut short or damaged"),
        ("seal cut", "is cut short or damaged"),
        ("slot cut", "is cut short or damaged at its head"),
        ("slot gone", "cannot be read"),
        ("mark flipped", "is cut short or damaged at its head"),
    ],
)
def test_other_damage_is_named_and_the_older_one_taken(harm: str, said: str, tmp_path: Path) -> None:
    Run(tmp_path).steps(0, 9).end()
    newest = seals(tmp_path)[0]
    slot = newest.with_suffix("")
    if harm == "seal flipped":
        damage(newest, 200)
    elif harm == "seal cut":
        newest.write_bytes(newest.read_bytes()[:100])
    elif harm == "slot cut":
        slot.write_bytes(slot.read_bytes()[: HEAD + 8])
    elif harm == "slot gone":
        slot.unlink()
    else:
        damage(slot, 0)
    run, found = resumed(tmp_path)
    assert found.attempt == 7 and said in found.line, found.line
    run.controller.close()
    assert ours(tmp_path) == []


def test_every_record_damaged(tmp_path: Path) -> None:
    Run(tmp_path).steps(0, 9).end()
    for seal in seals(tmp_path):
        damage(seal.with_suffix(""), HEAD + 8)
    run = Run(tmp_path)
    before = run.state()
    found = run.controller.resume()
    assert not found and found.line.count("is damaged") >= 2, found.line
    assert equal(run.state(), before) and not run.optimizer.state
    run.steps(0, 2)
    run.controller.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 6}, "is of another model or other optimizers"),
        ({"optimizer": "sgd"}, "is of the optimizers ['AdamW'], and they are ['SGD']"),
    ],
)
def test_a_slot_of_another_model(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    Run(tmp_path).steps(0, 4).end()
    run = Run(tmp_path, **change)
    before = run.state()
    found = run.controller.resume()
    assert not found and said in found.line
    assert equal(run.state(), before)
    run.controller.close()


def test_another_number_of_ranks(tmp_path: Path) -> None:
    Run(tmp_path).steps(0, 4).end()
    shelf = Shelf(SharedMemory("job", tmp_path), 0, 2)
    found, said = shelf.records(2, 0)
    assert not found and all("was made by 1 ranks, and there are 2" in line for line in said) and said


def test_a_seal_under_the_name_of_another_rank(tmp_path: Path) -> None:
    Run(tmp_path).steps(0, 4).end()
    for file in list(files(tmp_path)):
        file.path.rename(file.path.with_name(file.path.name.replace(".r0.", ".r1.")))
    shelf = Shelf(SharedMemory("job", tmp_path), 1, 1)
    found, said = shelf.records(1, 0)
    assert not found and "is of rank 0 of job 'job', whatever its name says" in said[0]


def test_without_a_scaler_that_the_record_has(tmp_path: Path) -> None:
    run = Run(tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(4):
        run.optimizer.zero_grad()
        scaler.scale(run.model(torch.ones(4, 5)).square().mean()).backward()
        run.controller.step(scaler=scaler)
    run.end()
    again = Run(tmp_path)
    assert "has a GradScaler: call resume(scaler=...) with that of the loop" in again.controller.resume().line
    fresh = torch.amp.GradScaler("cpu", init_scale=2.0)
    assert again.controller.resume(fresh).attempt == 3
    assert fresh.get_scale() == 8.0
    again.controller.close()


def test_too_late(tmp_path: Path) -> None:
    run = Run(tmp_path).steps(0, 1)
    with pytest.raises(RuntimeError, match="right after construction"):
        run.controller.resume()
    run.controller.close()
    model = nn.Linear(2, 2)
    probe = LossProbe(lambda module, batch: module(batch).sum(), [torch.ones(1, 2)])
    with (
        StabilityController(model, torch.optim.SGD(model.parameters(), lr=0.1), probe) as plain,
        pytest.raises(RuntimeError, match="give the controller persist="),
    ):
        plain.resume()


class Loader:
    """A loader that knows where it is."""

    def __init__(self, count: int) -> None:
        self.count, self.place = count, 0

    def __iter__(self) -> Any:
        while self.place < self.count:
            self.place += 1
            yield torch.randn(6, 5, generator=torch.Generator().manual_seed(self.place))

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def through_a_loader(folder: Path, job: str, stop: int | None, resume: bool) -> tuple[Run, list[float], Any]:
    """Judged at every third attempt; batch 5 is refused late, and the others are shown again."""
    run = Run(folder, job=job, guarded=False, every=3)
    found = run.controller.resume() if resume else None
    shown = []
    for batch in run.controller.batches(Loader(14)):
        shown.append(float(batch[0, 0]))
        run.optimizer.zero_grad()
        loss = run.model(batch).square().mean()
        if abs(shown[-1] - float(torch.randn(6, 5, generator=torch.Generator().manual_seed(5))[0, 0])) < 1e-9:
            loss = loss * float("nan")
        loss.backward()
        run.controller.step()
        if stop is not None and len(shown) == stop:
            break
    return run, shown, found


@pytest.mark.parametrize("stop", [4, 7, 8, 9, 12])
def test_a_loader_goes_on_where_it_was_and_a_replay_as_well(stop: int, tmp_path: Path) -> None:
    whole, expected, _ = through_a_loader(tmp_path, "whole", None, False)
    state = whole.state()
    whole.controller.close()
    died, before, _ = through_a_loader(tmp_path, "job", stop, False)
    died.end()
    run, after, found = through_a_loader(tmp_path, "job", None, True)
    assert before == expected[:stop]
    assert after == expected[found.attempt :]
    assert len(expected) > 14, "something was shown again"
    assert equal(run.state(), state)
    run.controller.close()


# ---------------------------------------------------------------------- whose files


def name_of(folder: Path, owner: Owner, job: str = "old", rank: int = 0) -> Path:
    path = folder / f"dist_stability.{os.getuid()}.{job}.r{rank}.{owner}.7"
    path.write_bytes(b"x")
    path.with_name(f"{path.name}.a").write_bytes(b"x")
    path.with_name(f"{path.name}.b.partial").write_bytes(b"x")
    return path


def dead() -> tuple[int, int]:
    """A process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    began = processes._began(child.pid)
    assert began is not None
    assert child.stdin is not None
    child.stdin.close()
    child.wait()
    return child.pid, began


def test_who_is_gone_for_good(tmp_path: Path) -> None:
    me, gone = Owner.this(), dead()
    assert me.alive() and Owner.parse(str(me)) == me

    def owner(process: tuple[int, int], agent: tuple[int, int], **other: str) -> Owner:
        return Owner(process, agent, other.get("boot", me.boot), other.get("namespace", me.namespace))

    stay = {
        "its process runs": name_of(tmp_path, owner(me.process, gone), "a"),
        "its agent runs": name_of(tmp_path, owner(gone, me.process), "b"),
        "another namespace": name_of(tmp_path, owner(gone, gone, namespace="1"), "c"),
        "this job": name_of(tmp_path, owner(gone, gone), "mine"),
    }
    go = {
        "both are gone": name_of(tmp_path, owner(gone, gone), "e"),
        "the id is used again": name_of(tmp_path, owner((os.getpid(), 1), gone), "f"),
        "another boot": name_of(tmp_path, owner(me.process, me.process, boot="0badb007"), "g"),
    }
    (tmp_path / "dist_stability.somebody.else").write_bytes(b"x")
    removed = remove_stale(tmp_path, "mine")
    assert len(removed) == 3 * len(go)
    for why, path in stay.items():
        assert path.exists() and len(list(tmp_path.glob(f"{path.name}*"))) == 3, why
    for why, path in go.items():
        assert not list(tmp_path.glob(f"{path.name}*")), why
    assert (tmp_path / "dist_stability.somebody.else").exists()


def test_a_controller_cleans_up_and_leaves_nothing(tmp_path: Path) -> None:
    me, gone = Owner.this(), dead()
    name_of(tmp_path, Owner(gone, gone, me.boot, me.namespace))
    lost = name_of(tmp_path, Owner(gone, me.process, me.boot, me.namespace), "job", rank=3)
    run = Run(tmp_path)
    assert not [path for path in ours(tmp_path) if ".old." in path.name]
    assert lost.exists()
    run.steps(0, 3)
    assert len(ours(tmp_path)) > 3
    run.controller.close()
    assert ours(tmp_path) == [], "a rank that the job no longer has left something"


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    run = Run(tmp_path).steps(0, 2)
    assert {path.stat().st_mode & 0o777 for path in ours(tmp_path)} == {0o600}
    run.controller.close()


def test_a_job_that_runs_is_not_shared(tmp_path: Path) -> None:
    run = Run(tmp_path).steps(0, 2)
    with pytest.raises(ValueError, match="belong to another controller of this process, which runs"):
        Run(tmp_path)
    run.steps(2, 4)
    run.controller.close()
    parent = Owner.this().agent
    name_of(tmp_path, Owner(parent, parent, Owner.this().boot, Owner.this().namespace), "job")
    with pytest.raises(ValueError, match=f"belong to process {parent[0]}, which runs"):
        Run(tmp_path)


# ---------------------------------------------------------------------- ends

LOOP = """
import os, sys, torch
from dist_stability import LossProbe, SharedMemory, StabilityController
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
probe = LossProbe(lambda module, batch: module(batch).square().mean(), [torch.ones(4, 4)])
controller = StabilityController(model, optimizer, probe, persist=SharedMemory("job", sys.argv[1]))
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(4, 4)).square().mean().backward()
    controller.step()
"""
ENDS = {
    "pass": False,
    "controller.close()": False,
    "sys.exit(0)": False,
    "with controller: pass": False,
    "raise KeyError('x')": True,
    "os._exit(0)": True,
    "os.kill(os.getpid(), 15)": True,
    "os.kill(os.getpid(), 2); import time; time.sleep(5)": True,
    "with controller: raise KeyError('x')": True,
    "with controller: sys.exit(3)": True,
}


@pytest.mark.parametrize(
    "ending", often(ENDS, ("pass", "sys.exit(0)", "os.kill(os.getpid(), 15)", "with controller: raise KeyError('x')"))
)
def test_what_is_left(ending: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", LOOP + ending, str(tmp_path)], capture_output=True, timeout=120)
    assert bool(ours(tmp_path)) is ENDS[ending]


# ---------------------------------------------------------------------- bad input


def test_job_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"neither torchrun's run id .* SharedMemory\(job='my-run'\)"):
        SharedMemory()
    with pytest.raises(ValueError, match="expected 1 to 64 letters"):
        SharedMemory("a/b")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert SharedMemory().job == "slurm-17"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run.1")
    assert SharedMemory().job == "run_1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert SharedMemory().job == "slurm-17"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert SharedMemory().job.startswith(f"torchrun-{os.getppid()}-")


def test_a_folder_that_is_not_there_or_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        Shelf(SharedMemory("job", tmp_path / "nowhere"), 0, 1)

    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match="it cannot be written to"):
        Run(tmp_path)


def test_too_little_room_is_found_out_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 0, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(SnapshotError, match=r"snapshots need 0 MiB there .* and 0 MiB are free. Make it"):
        Run(tmp_path)
    assert ours(tmp_path) == []


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder in memory with room for 32 KiB, or what the test asks for."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    size = f"size={getattr(request, 'param', 32)}k"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.filterwarnings("ignore:.*could not be sealed")
def test_room_for_the_parameters_but_not_for_what_the_optimizer_adds(tiny: Path) -> None:
    run = Run(tiny, width=200)
    with pytest.raises(SnapshotError, match=r"rank 0: persist=SharedMemory\(folder='.*tiny'\): snapshots need .* MiB"):
        run.steps(0, 1)
    run.controller.close()
    assert ours(tiny) == []


def room(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@pytest.mark.parametrize("tiny", [1300], indirect=True)
def test_what_a_death_leaves_does_not_take_the_room_of_the_restart(tiny: Path) -> None:
    """All slots and one copy of the parameters fit in, not the slots of two processes."""
    run = Run(tiny, width=5000).steps(0, 9)
    ring, parameters = run.controller._recovery.ring, 4 * sum(p.numel() for p in run.model.parameters())
    state, whole = run.state(), sum(slot.nbytes for slot in ring._slots)
    run.end()
    assert parameters < room(tiny) < ring.size * parameters < whole
    run, found = resumed(tiny, width=5000)
    assert found.attempt == 8 and equal(run.steps(8, 9).state(), state)
    run.steps(9, 14).end()
    run = Run(tiny, width=5000)
    with pytest.raises(SnapshotError, match=r"beside 1 MiB of an earlier process\. Make it larger"):
        run.steps(0, 1)  # without resume(): both are kept
    run.controller.close()
    assert ours(tiny) == []


def test_a_file_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SnapshotError, match=f"no host memory for a snapshot of 0 MiB in {tmp_path} .*No space left"):
        Run(tmp_path)
    assert ours(tmp_path) == []
    monkeypatch.undo()
    Run(tmp_path).controller.close()


def test_no_room_for_a_seal_is_a_warning_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    run = Run(tmp_path).steps(0, 3)
    with monkeypatch.context() as patch:
        patch.setattr(record, "write", refuse)
        with pytest.warns(RuntimeWarning, match="attempt 3: the state could not be sealed"):
            run.steps(3, 4)
        run.steps(4, 5)
    run.steps(5, 7).end()
    assert resumed(tmp_path)[1].attempt == 6


def test_state_that_cannot_be_written_down(tmp_path: Path) -> None:
    class Stubborn:
        def state_dict(self) -> dict[str, Any]:
            return {"f": lambda: 0}

        def load_state_dict(self, state: Any) -> None: ...

    with pytest.raises(TypeError, match=r"extra_state\['it'\]: its state cannot be written down for another process"):
        Run(tmp_path, extra_state={"it": Stubborn()})
    assert ours(tmp_path) == []


def test_bad_settings(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    probe = LossProbe(lambda module, batch: module(batch).sum(), [torch.ones(1, 2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        TypeError,
        match=r"persist: expected SharedMemory\(...\), PeerCopies\(...\), Checkpoints\(...\), a list .*got str",
    ):
        StabilityController(model, optimizer, probe, persist="/dev/shm")
    with pytest.raises(ValueError, match="persist: mode='observe' takes no snapshots"):
        StabilityController(model, optimizer, probe, persist=SharedMemory("job", tmp_path), mode="observe")
