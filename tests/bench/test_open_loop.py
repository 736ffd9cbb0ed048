"""Replays on made-up recordings, where every number is known beforehand."""

from __future__ import annotations

import math

import pytest

from dist_stability.bench.detection import open_loop
from dist_stability.bench.detection.contestants import (
    DEFAULT,
    Contestant,
    GuardAlone,
    TrendAlone,
    WithGuard,
    WithTrend,
    contestants,
)
from dist_stability.bench.detection.events import NAMES
from dist_stability.bench.detection.recordings import Branch, Recording, Streams
from dist_stability.guards import GradientNormGuard
from dist_stability.verdict import Judgement


class Cap:
    """Refuses what is above a cap, on measurement or norm; keeps a diary."""

    def __init__(self, cap: float) -> None:
        self.cap, self.diary = cap, []

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        accepted = max(measurement, gradient_norm or 0.0) <= self.cap
        return Judgement(accepted, measurement, self.cap, "")

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        self.diary.append(("commit", measurement, gradient_norm))

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        self.diary.append(("reject", measurement, gradient_norm))


def cap(watches: str, **other) -> Contestant:
    return Contestant("cap", watches, lambda cap: Cap(5.0 if cap is None else cap), (50.0, 5.0, 2.5, 1.0), **other)


def branch(kind: str, step: int, *, probe=(), loss=(), norm=(), damage=()) -> Branch:
    length = max(len(probe), len(loss) - 1, len(norm), 3)
    lengths = (length, length + 1, length)  # the last loss is that of the batch after the last attempt
    filled = [list(values) + [2.0] * (n - len(values)) for values, n in zip((probe, loss, norm), lengths, strict=True)]
    return Branch(
        kind, 1.0, step, Streams(filled[0], filled[1], filled[2], [0.1] * len(filled[0])), [*map(list, damage)]
    )


def clean(branches=(), probe=(2.0, 3.0, 2.0, 2.0)) -> Recording:
    streams = Streams(list(probe), [2.0, 2.0, 4.0, 2.0, 2.0], [1.0] * 4, [0.1, 0.2, 0.3, 0.4])
    return Recording("clean", "clean", 0, {}, 2.0, streams, list(branches))


class TestReplay:
    def test_what_each_kind_is_fed(self) -> None:
        seen: dict[str, Cap] = {}
        for watches in ("probe", "loss", "gradient"):
            rule = seen[watches] = Cap(3.5)
            open_loop.replay(clean(), Contestant("x", watches, lambda _, rule=rule: rule), None)
        assert seen["probe"].diary == [("commit", 2.0, None), *(("commit", y, 1.0) for y in (2.0, 3.0, 2.0, 2.0))]
        assert seen["loss"].diary[2] == ("reject", 4.0, None) and len(seen["loss"].diary) == 5
        assert seen["gradient"].diary == [("commit", 0.0, 1.0)] * 4

    def test_a_branch_is_followed_by_a_copy_until_the_first_refusal(self) -> None:
        rule = Cap(5.0)
        branches = [branch("nan", 2, probe=[2.0, 9.0, 9.0]), branch("nan", 2, probe=[9.0] * 3), branch("nan", 1)]
        result = open_loop.replay(clean(branches), Contestant("x", "probe", lambda _: rule), None)
        assert result.branches == [1, 0, None] and result.refused == []
        assert rule.diary == [("commit", 2.0, None), *(("commit", y, 1.0) for y in (2.0, 3.0, 2.0, 2.0))]

    def test_the_rule_hears_the_announced_rate_before_every_judgement(self) -> None:
        class Listening(Cap):
            def expect(
                self, *, steps: int = 1, learning_rate: float | None = None, training_loss: float | None = None
            ) -> None:
                self.diary.append(("expect", steps, learning_rate, training_loss))

        rule = Listening(5.0)
        open_loop.replay(clean(), Contestant("x", "probe", lambda _: rule), None)
        heard = [entry[2:] for entry in rule.diary if entry[0] == "expect"]
        assert heard == list(zip([0.1, 0.2, 0.3, 0.4], clean().streams.loss[:-1], strict=True))
        rule = Listening(5.0)
        open_loop.replay(clean(), Contestant("x", "probe", lambda _: rule, sees_norm=False), None)
        assert {entry[3] for entry in rule.diary if entry[0] == "expect"} == {None}, "the probe alone means alone"
        assert [entry[0] for entry in rule.diary[1:5]] == ["expect", "commit", "expect", "commit"]


class TestMeasure:
    def test_false_refusals_and_streaks(self) -> None:
        row = open_loop.measure([clean(probe=(2, 9, 9, 2)), clean(probe=(9, 2, 9, 2))], cap("probe"), None)
        assert (row["false_refusals"], row["clean_steps"], row["longest_streak"]) == (4, 8, 2)
        assert row["false_per_10k"] == 5000 and row["episodes_per_10k"] == 3750

    def test_a_warning_that_lasts_counts_once(self) -> None:
        row = open_loop.measure([clean(probe=(9, 9, 2, 9))], cap("probe", warns=True), None)
        assert row["false_refusals"] == 2

    @pytest.mark.parametrize(("watches", "missed_late"), [("probe", (2, 1)), ("loss", (1, 0)), ("gradient", (1, 0))])
    def test_missed_depends_on_what_can_know(self, watches: str, missed_late: tuple[int, int]) -> None:
        """Caught at once, one measurement later, never: the probe must know at once, the others may need one more."""
        values = ([9.0, 2.0, 2.0], [2.0, 9.0, 2.0], [2.0, 2.0, 2.0])
        branches = [branch("lr spike", 1, probe=v, loss=v, norm=v, damage=[(1, 0.3), (7, 0)]) for v in values]
        row = open_loop.measure([clean(branches)], cap(watches), None)
        assert row["events"]["moderate"] == 3
        assert (row["missed"]["moderate"], row["late"]["moderate"]) == missed_late
        assert row["median_event_delay"] == 0.5

    def test_sizes_go_to_their_columns(self) -> None:
        rises = ((0.01, 0), (0.01, 0.3), (0.05, 0), (0.3, 0), (3.0, 0), (math.nan, math.nan))
        branches = [branch("bit flip", 1, probe=[9.0], damage=[(1, now), (7, later)]) for now, later in rises]
        row = open_loop.measure([clean(branches)], cap("probe"), None)
        assert row["events"] == dict.fromkeys(NAMES, 1)
        assert set(row["missed"].values()) == {0} and row["flagged_benign"] == 1
        assert open_loop.harmful_share(row) == 1.0
        assert open_loop.harmful_share(open_loop.measure([clean(branches)], cap("probe"), 50.0)) == 0.0

    def test_ramps(self) -> None:
        probe = [2.0, 2.0, 2.0, 2.0, 9.0, 9.0]
        caught = branch("ramp", 1, probe=probe, damage=[(3, 0.3), (6, 0.9)])
        unseen = branch("ramp", 2, probe=[2.0] * 6, damage=[(3, 0.3), (6, 0.8)])
        row = open_loop.measure([clean([caught, unseen, caught])], cap("probe"), None)
        assert (row["ramps"], row["ramps_caught"], row["median_delay"]) == (3, 2, 4)
        assert row["median_damage"] == pytest.approx(0.5)  # four attempts stand: a third of the way from 0.3 to 0.9
        warned = open_loop.measure([clean([caught])], cap("probe", warns=True), None)
        assert warned["median_damage"] == pytest.approx(0.7)  # a warning comes after the commit
        assert not any(row["events"].values())

    def test_a_ramp_refused_at_once_did_no_damage(self) -> None:
        ramp = branch("ramp", 1, probe=[9.0] * 3, damage=[(3, 0.3)])
        assert open_loop.measure([clean([ramp])], cap("probe"), None)["median_damage"] == 0.0

    def test_natural_instabilities(self) -> None:
        def natural(alarm: int, height: float = 1.0) -> Recording:
            probe = [2.0] * 100
            probe[alarm] = 9.0
            streams = Streams(probe, [2.0] * 101, [1.0] * 100, [0.1] * 100)
            damage = [[t + 1, height if t >= 60 else 0.0] for t in range(100)]
            return Recording("n", "no warm-up", 0, {}, 2.0, streams, damage=damage)

        rows = [open_loop.measure([natural(alarm)], cap("probe"), None) for alarm in (29, 30, 80, 81)]
        assert [row["natural_seen"] for row in rows] == [0, 1, 1, 0]
        assert [row["natural_before"] for row in rows] == [1, 0, 0, 0]
        calm = open_loop.measure([natural(60, height=0.01)], cap("probe"), None)
        assert (calm["natural"], calm["false_refusals"]) == (0, 0)


class TestTuning:
    def test_the_most_sensitive_threshold_within_budget(self) -> None:
        recordings = [clean(probe=(0.5, 3.0, 0.5, 2.0))]
        assert open_loop.tune(recordings, cap("probe"), 0) == 5.0  # 2.5 refuses the 3
        assert open_loop.tune(recordings, cap("probe"), 1) == 2.5
        assert open_loop.tune(recordings, cap("probe"), 2) == 1.0
        assert open_loop.tune([clean(probe=(90.0,) * 4)], cap("probe"), 0) is None

    def test_a_streak_counts_once_but_a_lock_out_never_fits(self) -> None:
        calm, start = [2.0] * 5, [2.0] * 4

        def track(length: int) -> Recording:
            probe = [*start, *[3.0] * length, *calm]
            streams = Streams(probe, [2.0] * (len(probe) + 1), [1.0] * len(probe), [0.1] * len(probe))
            return Recording("clean", "clean", 0, {}, 2.0, streams)

        assert open_loop.tune([track(30)], cap("probe"), 1) == 2.5
        assert open_loop.tune([track(31)], cap("probe"), 1) == 5.0
        assert open_loop.tune([track(30)] * 2, cap("probe"), 1) == 5.0

    def test_a_sensitive_island_is_not_taken(self) -> None:
        """All more tolerant thresholds must stay within the budget, too: luck with one value is no setting."""
        island = Contestant("island", "probe", lambda cap: Cap({50.0: 5.0, 5.0: 1.0, 2.5: 5.0}[cap]), (50.0, 5.0, 2.5))
        assert open_loop.tune([clean()], island, 0) == 50.0


class TestGuardBesideRule:
    def test_counts(self) -> None:
        def event(probe: float, norm: float, now: float, later: float) -> Branch:
            return branch("gradient scale", 2, probe=[probe], norm=[norm], damage=[(1, now), (7, later)])

        branches = [
            event(9, 9, 0.5, 0),
            event(2, 9, 0.0, 0.3),
            event(9, 2, 0.5, 0),
            event(2, 2, 0.1, 0),
            event(2, 9, 0, 0),
            event(2, 2, 0, 0),
            event(9, 9, math.nan, 0),
        ]
        guard, rule = cap("gradient"), cap("probe", sees_norm=False)
        assert open_loop.guard_beside_rule([clean(branches)], guard, rule) == {
            "harmful": 4,
            "both": 1,
            "guard only": 1,
            "rule only": 1,
            "neither": 1,
            "harmless": 2,
            "harmless vetoed": 1,
        }


class TestContestants:
    def test_everybody_can_be_built_at_every_threshold(self) -> None:
        everybody = contestants()
        assert DEFAULT in everybody and len(everybody) >= 20
        for contestant in everybody.values():
            for threshold in (None, *contestant.grid):
                assert contestant.build(threshold).judge(2.0, 1.0).accepted
            tolerant = list(contestant.grid)
            assert tolerant == sorted(tolerant) or tolerant == sorted(tolerant, reverse=True)

    def test_guard_alone_is_the_guard(self) -> None:
        guard, alone = GradientNormGuard(), GuardAlone(GradientNormGuard())
        for norm in [1.0, 1.1, 0.9, 1.0, 1.2, 1e6, 1.0, math.nan, 1.0, 1e6, 1e6]:
            vetoed = guard.veto(norm) is not None
            assert alone.judge(0.0, norm).accepted is not vetoed
            (guard.reject if vetoed else guard.commit)(norm)
            (alone.reject if vetoed else alone.commit)(0.0, norm)
        assert alone._guard.state_dict() == guard.state_dict()
        assert alone.judge(0.0).accepted

    def test_with_guard_each_hears_what_concerns_it(self) -> None:
        rule, guard = Cap(5.0), GuardAlone(GradientNormGuard())
        both = WithGuard(rule, guard)
        for _ in range(20):
            both.commit(2.0, 1.0)
        vetoes = guard._guard.state_dict()["vetoes"]
        assert not both.judge(2.0, 1e9).accepted and not both.judge(9.0, 1.0).accepted
        both.reject(9.0, 1e9)  # the rule would refuse it, too, but a vetoed step is not measured
        assert ("reject", 9.0, 1e9) not in rule.diary and guard._guard.state_dict()["vetoes"] == vetoes + 1
        both.reject(9.0, 1.0)
        assert rule.diary[-1] == ("reject", 9.0, 1.0) and guard._guard.state_dict()["vetoes"] == vetoes + 1

    def test_the_rule_inside_hears_what_a_rule_is_told(self) -> None:
        class Listening(Cap):
            def expect(
                self, *, steps: int = 1, learning_rate: float | None = None, training_loss: float | None = None
            ) -> None:
                self.diary.append(("expect", steps, learning_rate, training_loss))

            def rebase(self, measurement: float) -> None:
                self.diary.append(("rebase", measurement))

        class Trend:
            restarts = 0

            def restart(self) -> None:
                Trend.restarts += 1

        for wrap in (
            lambda rule: WithGuard(rule, GuardAlone(GradientNormGuard())),
            lambda rule: WithTrend(rule, TrendAlone(Trend())),  # type: ignore[arg-type]
        ):
            rule = Listening(5.0)
            both = wrap(rule)
            both.expect(steps=1, learning_rate=0.5, training_loss=7.0)
            both.rebase(3.0)
            assert rule.diary == [("expect", 1, 0.5, 7.0), ("rebase", 3.0)]
        assert Trend.restarts == 1  # its history was measured with another yardstick

    def test_a_warning_stops_nothing(self) -> None:
        class Alarm:
            def __init__(self) -> None:
                self.heard: list[float] = []

            def commit(self, measurement: float, steps: int = 1) -> str | None:
                self.heard.append(measurement)
                return "rising" if measurement > 3 else None

        alarm, rule = Alarm(), Cap(5.0)
        both = WithTrend(rule, TrendAlone(alarm))  # type: ignore[arg-type]
        assert not both.judge(4.0).accepted and alarm.heard == []  # asking is not telling
        both.reject(4.0)
        assert rule.diary == [("commit", 4.0, None)] and alarm.heard == [4.0]
        both.reject(9.0)  # the rule's refusal: never committed, so the trend does not hear of it
        assert rule.diary[-1] == ("reject", 9.0, None) and alarm.heard == [4.0]
