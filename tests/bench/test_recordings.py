"""Recordings: what leaves a track does not touch it, what is damaged is really damaged, what is there is not redone."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_stability.bench.detection import recordings
from dist_stability.bench.detection.events import NAMES, RANGES, Event, draw, size
from dist_stability.bench.detection.recordings import AFTERMATH, Plan, load_or_record, plans, read, record
from dist_stability.bench.detection.workloads import Lab, load, standard

pytest.importorskip("sklearn")

SHORT = standard("digits", "small", 40)
BRANCHING = Plan("clean-digits-small-0", "clean", 0, SHORT, slots=(20, 28), events=4, ramps=(15,))


@pytest.fixture(scope="module")
def recording() -> recordings.Recording:
    return record(BRANCHING)


class TestTrack:
    def test_branches_leave_no_trace(self, recording: recordings.Recording) -> None:
        assert len(recording.branches) == 9
        assert record(replace(BRANCHING, slots=(), ramps=())).streams == recording.streams

    def test_streams_are_aligned(self, recording: recordings.Recording) -> None:
        streams = recording.streams
        assert [len(s) for s in (streams.probe, streams.loss, streams.norm, streams.rate)] == [40, 41, 40, 40]
        lab = Lab(SHORT, 0)
        assert lab.probe() == recording.start
        assert lab.loss(lab.batch(0)).item() == streams.loss[0]  # before the first update, of the first batch
        assert streams.rate == [SHORT.scheduled(step) for step in range(40)]

    def test_a_branch_starts_where_the_track_is(self, recording: recordings.Recording) -> None:
        for branch in recording.branches:
            # The batch and the weights are the track's; only shuffled or repeated data changes the loss itself.
            if branch.kind not in ("shuffled labels", "repeated token"):
                assert branch.streams.loss[0] == recording.streams.loss[branch.step]

    def test_a_branch_on_which_nothing_happens_is_the_track(self) -> None:
        lab, streams = Lab(SHORT, 0), recordings.Streams()
        for step in range(10):
            recordings._attempt(lab, step, streams)
        calm = recordings._event(lab, 10, lab.score(), Event("lr spike", 1.0, 0)).streams
        for step in range(10, 11 + AFTERMATH):
            recordings._attempt(lab, step, streams)
        assert calm.probe == streams.probe[10:] and calm.norm == streams.norm[10:]

    def test_damage_is_taken_against_the_track(self) -> None:
        """An event that does nothing has no second damage; its first is the descent of one step."""
        lab = Lab(SHORT, 0)
        for step in range(10):
            recordings._attempt(lab, step, recordings.Streams())
        before = lab.score()
        calm = recordings._event(lab, 10, before, Event("lr spike", 1.0, 0))
        for step in range(10, 11 + AFTERMATH):
            recordings._attempt(lab, step, recordings.Streams())
            if step == 10:
                assert calm.damage[0] == [1, lab.score() - before]
        assert calm.damage[1] == [1 + AFTERMATH, lab.score()]  # from which `record` takes the track's

    def test_harmless_branches_of_a_recording_end_with_no_damage(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recordings, "draw", lambda kind, source: Event("lr spike", 1.0, 0))
        monkeypatch.setattr(recordings, "RAMP_GROWTH", 1.0)
        for branch in record(BRANCHING).branches:
            later = branch.damage if branch.kind == "ramp" else branch.damage[1:]
            assert [rise for _, rise in later] == [0.0] * len(later)

    def test_a_ramp_s_damage_starts_small_and_its_rate_is_not_announced(self, recording: recordings.Recording) -> None:
        ramp = next(branch for branch in recording.branches if branch.kind == "ramp")
        assert len(ramp.streams.probe) == 25 and ramp.damage[0][0] == 3
        assert abs(ramp.damage[0][1]) < 0.05
        assert ramp.streams.rate == [SHORT.scheduled(step) for step in range(15, 40)]


class TestEvents:
    @pytest.mark.parametrize("task", ["english", "digits"])
    @pytest.mark.parametrize("kind", list(RANGES))
    def test_each_kind_does_something_and_nothing_else(self, kind: str, task: str) -> None:
        lab = Lab(standard(task, "small", 40), 0)
        streams = recordings.Streams()
        recordings._attempt(lab, 0, streams)
        calm, spoilt = lab.branch(), lab.branch()
        recordings._attempt(calm, 1, recordings.Streams())
        recordings._attempt(spoilt, 1, recordings.Streams(), event=Event(kind, 30.0, 12345))
        pairs = zip(calm.model.parameters(), spoilt.model.parameters(), strict=True)
        changed = [not torch.equal(a, b) for a, b in pairs]
        assert any(changed)
        if kind == "weight row":
            assert sum(changed) == 1
            matrix = [(a, b) for a, b in zip(calm.model.parameters(), spoilt.model.parameters(), strict=True)]
            a, b = next((a, b) for (a, b), differs in zip(matrix, changed, strict=True) if differs)
            rows = (a != b).flatten(1).any(1)
            assert rows.sum() == 1 and torch.equal(30.0 * a[rows], b[rows])

    def test_the_same_seed_does_the_same(self) -> None:
        labs = [Lab(SHORT, 0) for _ in range(2)]
        for kind in RANGES:
            made = draw(kind, random.Random(5))
            for lab in labs:
                recordings._attempt(lab, 0, recordings.Streams(), event=made)
        assert all(
            torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(*(lab.model.parameters() for lab in labs), strict=True)
        )

    def test_factors_stay_in_range(self) -> None:
        source = random.Random(0)
        for kind, (low, high) in RANGES.items():
            factors = [draw(kind, source).factor for _ in range(200)]
            assert all(0.999 * low <= factor <= 1.001 * high for factor in factors)
            if high > low:  # drawn on the logarithm: half of them below the geometric mean
                assert 70 < sum(factor < math.sqrt(low * high) for factor in factors) < 130

    @pytest.mark.parametrize(
        ("now", "later", "name"),
        [
            (-3.0, -1.0, "benign"),
            (0.0199, 0.0199, "benign"),
            (0.0199, 0.02, "delayed"),
            (0.0, math.nan, "delayed"),
            (0.02, 0.0, "mild"),
            (0.1, 3.0, "moderate"),
            (0.5, 0.0, "severe"),
            (1e30, 0.0, "severe"),
            (math.inf, 0.0, "non-finite"),
            (math.nan, 0.0, "non-finite"),
        ],
    )
    def test_sizes(self, now: float, later: float, name: str) -> None:
        assert size(now, later) == name and name in NAMES


class TestPlans:
    def test_counts_of_the_whole_benchmark(self) -> None:
        two = plans([100, 101])
        clean = [plan for plan in two if plan.kind == "clean"]
        assert sum(plan.workload.steps for plan in clean) >= 15_000
        assert sum(len(plan.ramps) for plan in clean) == 18
        assert {(plan.workload.task, plan.workload.size) for plan in clean} == {
            (task, size) for task in ("english", "digits") for size in ("small", "medium", "large")
        }
        assert len({plan.name for plan in two}) == len(two)
        for plan in clean:
            assert max(plan.slots) + AFTERMATH < plan.workload.steps
            assert all(b - a > AFTERMATH for a, b in zip(plan.slots, plan.slots[1:], strict=False))

    def test_held_out_data_is_not_trained_on_nor_shared(self) -> None:
        digits = load("digits")
        images = [batch[0].flatten(1) for batch in (digits.train.batch(torch.arange(32)), digits.probe, digits.score)]
        assert len(digits.train) + len(images[1]) + len(images[2]) == 1797
        english = load("english")
        windows = {tuple(row) for row in english.probe[0].tolist()}
        assert not windows & {tuple(row) for row in english.score[0].tolist()}


class TestResuming:
    def test_what_is_there_is_read_and_only_the_rest_is_made(self, tmp_path: Path) -> None:
        first = Plan("a", "clean", 0, standard("digits", "small", 12), slots=(4,), events=8)
        second = replace(first, name="b", seed=1)
        made = load_or_record([first], tmp_path, workers=1)
        stamp = (tmp_path / "a.json").stat().st_mtime_ns
        names: list[str] = []
        again = load_or_record([first, second], tmp_path, workers=1, done=names.append)
        assert (tmp_path / "a.json").stat().st_mtime_ns == stamp and sorted(names) == ["a", "b"]
        # Through JSON and back: NaN events included, every number exact.
        # (settings come back with lists for tuples)
        assert repr(replace(again[0], settings={})) == repr(replace(made[0], settings={}))
        assert [r.name for r in again] == ["a", "b"]
        assert any(math.isnan(branch.damage[0][1]) for branch in again[0].branches)

    def test_another_plan_of_the_same_name_is_made_again(self, tmp_path: Path) -> None:
        plan = Plan("a", "clean", 0, standard("digits", "small", 6))
        load_or_record([plan], tmp_path, workers=1)
        assert read(plan, tmp_path) is not None
        assert read(replace(plan, seed=1), tmp_path) is None
        assert read(replace(plan, workload=replace(plan.workload, learning_rate=1.0)), tmp_path) is None
