"""Noise series and the replays on them, with rules whose answers are known; the public trace."""

from __future__ import annotations

import math

import pytest
import torch

from dist_stability.bench.detection import noise
from dist_stability.bench.detection.contestants import Contestant, contestants
from dist_stability.bench.detection.fixtures import LEAD_STEPS, LOSS, NORM, PEAK, bloom, lead_in
from dist_stability.bench.detection.noise import FAMILIES, Job, locked_out, merge, run, survives_nan
from dist_stability.verdict import Judgement


class Cap:
    """Refuses above a cap over what stands; ``opens`` refusals in a row open it for good (0: never)."""

    def __init__(self, cap: float, opens: int = 0) -> None:
        self.cap, self.opens, self.standing, self.refused, self.rebased = cap, opens, math.nan, 0, []

    def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
        value = measurement if gradient_norm is None else gradient_norm
        accepted = abs(value) < math.inf and not value - self.standing > self.cap
        return Judgement(accepted or (0 < self.opens <= self.refused), 0.0, 0.0, "")

    def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
        self.standing, self.refused = measurement if gradient_norm is None else gradient_norm, 0

    def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
        self.refused += 1


class Following(Cap):
    def rebase(self, measurement: float) -> None:
        self.standing = measurement
        self.rebased.append(measurement)


def contestant(build) -> Contestant:
    return Contestant("toy", "probe", build, sees_norm=False)


class TestFamilies:
    @pytest.mark.parametrize("family", list(FAMILIES))
    def test_drawn_from_the_seed_alone(self, family: str) -> None:
        draws = [FAMILIES[family](torch.Generator().manual_seed(seed), 3, 50) for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
        assert draws[0].shape == (3, 50) and draws[0].dtype == torch.float64
        assert not torch.equal(draws[0][0], draws[0][1])

    @pytest.mark.parametrize(
        ("family", "beyond_2", "beyond_5"),
        [
            ("Gaussian", 0.0455, 5.7e-7),
            ("Laplace", math.exp(-2 * math.sqrt(2)), math.exp(-5 * math.sqrt(2))),
            ("Student t3", 0.1393, 0.01539),
            ("Student t4", 0.1161, 0.00749),
        ],
    )
    def test_tails(self, family: str, beyond_2: float, beyond_5: float) -> None:
        units = FAMILIES[family](torch.Generator().manual_seed(0), 20, 20_000).abs()
        assert float((units > 2).double().mean()) == pytest.approx(beyond_2, rel=0.05)
        assert float((units > 5).double().mean()) == pytest.approx(beyond_5, rel=0.15, abs=5e-6)

    def test_garch_has_unit_variance_and_clusters(self) -> None:
        units = FAMILIES["GARCH"](torch.Generator().manual_seed(0), 100, 4000)
        assert float(units.var()) == pytest.approx(1, rel=0.1)
        square = units**2 - units.square().mean()
        assert float((square[:, 1:] * square[:, :-1]).mean() / square.square().mean()) > 0.1

    def test_changes_come_at_half_time(self) -> None:
        plain, shifted, scaled, scheduled = (
            FAMILIES[name](torch.Generator().manual_seed(3), 2, 1000)
            for name in ("Gaussian", "level shift", "scale shift x10", "variance schedule")
        )
        assert torch.equal(plain[:, :500], shifted[:, :500]) and torch.equal(plain[:, :500], scaled[:, :500])
        assert torch.allclose(shifted[:, 500:] - plain[:, 500:], torch.tensor(25.0, dtype=torch.float64))
        assert torch.equal(scaled[:, 500:], 10 * plain[:, 500:])
        ratio = scheduled / plain
        assert float(ratio[0, 0]) == pytest.approx(1) and float(ratio[0, 500]) == pytest.approx(10, rel=0.01)


class TestReplay:
    def values(self, *numbers: float) -> list[tuple[float, None]]:
        return [(number, None) for number in numbers]

    def test_the_yardstick_is_measured_again_after_eight_refusals(self) -> None:
        rule = Following(1.0)
        refused, rebased = noise._replay(
            contestant(lambda _: rule), None, self.values(*[2.0] * 12, *[5.0] * 12), offset=3.0
        )
        assert refused == [False] * 11 + [True] * 8 + [False] * 4 and rebased == 1
        assert rule.rebased == [5.0]  # what stood at 2 measures 5 now

    def test_no_rebase_where_the_yardstick_has_not_moved(self) -> None:
        refused, rebased = noise._replay(
            contestant(lambda _: Following(1.0)), None, self.values(*[2.0] * 12, *[5.0] * 12), offset=0.0
        )
        assert rebased == 0 and refused.count(True) == 12

    def test_no_rebase_for_what_was_measured_after_the_shift(self) -> None:
        """The eleventh value, the first of the second half, is committed; what is refused later is no yardstick."""
        values = self.values(*[2.0] * 11, *[9.0] * 9)
        assert noise._replay(contestant(lambda _: Following(1.0)), None, values, offset=3.0)[1] == 0
        values = self.values(*[2.0] * 10, *[9.0] * 10)
        assert noise._replay(contestant(lambda _: Following(1.0)), None, values, offset=3.0)[1] == 1

    def test_counts_of_a_job(self, monkeypatch: pytest.MonkeyPatch) -> None:
        always = Contestant("toy", "probe", lambda _: Cap(-math.inf))
        monkeypatch.setattr(noise, "contestants", lambda: {"toy": always})
        outcome = run(Job("toy", None, "Gaussian", 0, 3, 50))
        assert (outcome["steps"], outcome["refused"], outcome["longest"]) == (147, 147, 49)
        assert outcome["came_back"] is None
        monkeypatch.setattr(noise, "contestants", lambda: {"toy": contestant(lambda _: Cap(1e9))})
        fine = run(Job("toy", None, "Gaussian", 0, 3, 50))
        assert (fine["refused"], fine["longest"], fine["came_back"]) == (0, 0, 0)
        both = merge([outcome, fine])
        assert both["per_10k"] == 5000 and both["came_back"] is None and both["longest"] == 49

    def test_when_it_came_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(noise, "contestants", lambda: {"toy": contestant(lambda _: Cap(0.15, opens=5))})
        assert run(Job("toy", None, "level shift", 0, 4, 200))["came_back"] == 5

    def test_a_rule_on_the_norm_gets_norms(self) -> None:
        units = torch.tensor([0.0, 1.0, -1.0, 1e9], dtype=torch.float64)
        values = noise._values(units, Contestant("toy", "gradient", lambda _: Cap(1.0)))
        assert values[0] == (0.0, 1.0)
        assert values[1][1] == pytest.approx(math.exp(0.2)) and values[3][1] < math.inf


class TestLockOutAndNaN:
    def check(self, monkeypatch: pytest.MonkeyPatch, build) -> bool:
        toy = contestant(build)
        monkeypatch.setattr(noise, "contestants", lambda: {"toy": toy})
        return locked_out(toy, None, series=2)

    def test_lock_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not self.check(monkeypatch, lambda _: Cap(1e9))
        assert not self.check(monkeypatch, lambda _: Cap(0.15, opens=20))
        assert self.check(monkeypatch, lambda _: Cap(0.12))  # never back after the level shift
        assert self.check(monkeypatch, lambda _: Cap(-1e9, opens=31))  # back, but after more than 30

    def test_rebase_is_a_way_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for build, back in ((Cap, None), (Following, 8)):
            monkeypatch.setattr(noise, "contestants", lambda build=build: {"toy": contestant(lambda _: build(0.12))})
            assert run(Job("toy", None, "level shift", 0, 4, 2000))["came_back"] == back

    def test_nan(self) -> None:
        class Contaminated(Cap):
            def reject(self, measurement: float, gradient_norm: float | None = None) -> None:
                self.standing = -1e9 if math.isnan(measurement) else self.standing

        class Blind(Cap):
            def judge(self, measurement: float, gradient_norm: float | None = None) -> Judgement:
                return Judgement(True, 0.0, 0.0, "")

        assert survives_nan(contestant(lambda _: Cap(1.0)), None)
        assert not survives_nan(contestant(lambda _: Contaminated(1.0)), None)
        assert not survives_nan(contestant(lambda _: Blind(1.0)), None)

    @pytest.mark.parametrize("name", list(contestants()))
    def test_every_contestant_survives_nan(self, name: str) -> None:
        assert survives_nan(contestants()[name], None)

    def test_who_locks_out(self) -> None:
        """The robust textbook rule on accepted values and the forecast without patience do, and the table says so."""
        everybody = contestants()
        assert locked_out(everybody["gradient-mad"], None, series=2) and locked_out(everybody["holt"], None, series=2)
        assert not locked_out(everybody["olmo-loss"], None, series=2)


class TestBloom:
    def test_the_trace_is_the_published_one(self) -> None:
        assert LOSS[PEAK] == 5.098 and NORM[PEAK] == 960 and PEAK == 5 and len(LOSS) == len(NORM) == 9
        assert NORM[PEAK - 4] / NORM[0] == pytest.approx(4, abs=0.1) and NORM[PEAK - 2] / NORM[0] == pytest.approx(
            66, abs=1
        )

    def test_lead_ins_differ_and_are_ordinary(self) -> None:
        first, second = lead_in(100), lead_in(101)
        assert first != second and len(first.loss) == len(first.norm) == LEAD_STEPS
        assert 2.19 < sum(first.loss) / LEAD_STEPS < 2.21 and 0.15 < min(first.norm) < 0.242 < max(first.norm) < 0.4

    def test_who_sees_it_when(self) -> None:
        """As this project's practice notes have it: the norm four lines early, a ratio at the peak, ten times never."""
        found = {name: bloom(contestants()[name], None) for name in ("olmo-gradient", "metaseq", "megatron")}
        assert (found["olmo-gradient"]["seen"], found["olmo-gradient"]["median"]) == (20, -4)
        assert (found["metaseq"]["seen"], found["metaseq"]["median"]) == (20, 0)
        assert (found["megatron"]["seen"], found["megatron"]["median"]) == (0, None)

    def test_a_rule_that_sees_nothing_but_the_probe_gets_no_norm(self) -> None:
        norms = []

        class Listening(Cap):
            def commit(self, measurement: float, gradient_norm: float | None = None) -> None:
                norms.append(gradient_norm)

        bloom(contestant(lambda _: Listening(1e9)), None)
        assert set(norms) == {None}
        norms.clear()
        bloom(Contestant("toy", "probe", lambda _: Listening(1e9)), None)
        assert 960.0 in norms
