"""Guards: what they veto, what they never do, and the figures of GradientNormGuard's docstring."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_stability.guards import GradientNormGuard, Guard, NonFiniteGuard
from dist_stability.parallel import Residence
from dist_stability.signals import Gradients

NAN, INF = math.nan, math.inf


def of(norm: Any = None, **values: Any) -> Gradients:
    entries = []
    for name, value in values.items():
        gradient = value if isinstance(value, Tensor) else torch.tensor(value)
        parameter = nn.Parameter(torch.zeros(gradient.shape).to(gradient))
        parameter.grad = gradient
        entries.append((name, parameter, Residence((0,))))
    return Gradients(entries, norm)


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_the_base_objects_to_nothing() -> None:
    class Mine(Guard):
        pass

    guard = Mine()
    assert guard.reads_norm is False
    assert guard.flag(of(a=[NAN])) is None and guard.veto(NAN) is None and guard.explain(of(a=[NAN])) is None
    guard.commit(1.0)
    guard.reject(None)
    guard.load_state_dict(guard.state_dict())
    assert isinstance(guard, Guard) and all(isinstance(each, Guard) for each in (NonFiniteGuard(), GradientNormGuard()))


# ---------------------------------------------------------------- NonFiniteGuard


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_non_finite_gradient_raises_the_flag(bad: float) -> None:
    guard = NonFiniteGuard()
    assert bool(guard.flag(of(a=[1.0, 2.0], b=[0.0, bad])))
    assert not bool(guard.flag(of(a=[1.0, 3e38], b=[0.0, -3e38])))
    assert not bool(guard.flag(of()))


def test_with_a_callers_norm_only_that_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = NonFiniteGuard()
    monkeypatch.setattr(Gradients, "square_sum", property(lambda self: pytest.fail("not needed")))
    assert not bool(guard.flag(of(norm=2.0, a=[1.0])))
    for bad in (NAN, INF, torch.tensor(NAN), torch.tensor([INF])):
        assert bool(guard.flag(of(norm=bad, a=[1.0])))


@pytest.mark.parametrize("norm", [None, 2.0, torch.tensor(2.0)])
def test_the_flag_is_a_0d_bool_and_nobody_waits_for_it(norm: Any) -> None:
    gradients = of(norm=norm, a=[1.0, NAN])
    with NoSync():
        flag = NonFiniteGuard().flag(gradients)
    assert flag.dtype == torch.bool and flag.shape == () and bool(flag) is (norm is None)


def test_it_names_the_first_offender_and_brackets_it() -> None:
    gradients = of(
        head=[1.0, -2.0], body=[NAN, INF, -INF, 1.0], tail=[INF, 0.0], last=[-7.5, 1.0], empty=torch.zeros(0)
    )
    said = NonFiniteGuard().explain(gradients)
    assert said == (
        "gradient of body: 1 NaN and 2 infinite of 4 elements (2 of 4 parameters with a gradient are affected); "
        "largest finite gradient: last, |g| <= 7.5"
    )
    assert NonFiniteGuard().explain(of(a=[1.0], b=[2.0])) is None
    assert NonFiniteGuard().explain(of()) is None


def test_gradients_that_clipping_has_spoilt_do_not_accuse_the_first_parameter_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert model[1].bias.grad is not None
    model[1].bias.grad[0] = NAN
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    gradients = Gradients([(n, p, Residence((0,))) for n, p in model.named_parameters()], norm)
    said = NonFiniteGuard().explain(gradients)
    assert said is not None and "clipping by a NaN norm does that" in said
    assert bool(NonFiniteGuard().flag(gradients))


def test_small_dtypes_and_sparse_gradients_are_explained() -> None:
    said = NonFiniteGuard().explain(of(a=torch.tensor([1.0, NAN]).to(torch.float8_e5m2), b=torch.ones(2).bfloat16()))
    assert said is not None and said.startswith("gradient of a: 1 NaN and 0 infinite of 2")
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    assert table.weight.grad is not None
    table.weight.grad._values()[0] = INF
    said = NonFiniteGuard().explain(Gradients([("table", table.weight, Residence((0,)))]))
    assert said is not None and "table: 0 NaN and 2 infinite of 2" in said


# ---------------------------------------------------------------- GradientNormGuard


def play(guard: Guard, norms: list[float]) -> list[bool]:
    """Whether each norm is vetoed; as in a run, a vetoed one is then rejected, the others committed."""
    vetoes = []
    for norm in norms:
        vetoes.append(guard.veto(norm) is not None)
        (guard.reject if vetoes[-1] else guard.commit)(norm)
    return vetoes


def longest_run(vetoes: list[bool]) -> int:
    longest = run = 0
    for vetoed in vetoes:
        run = run + 1 if vetoed else 0
        longest = max(longest, run)
    return longest


def stream(seed: int, scatter: float, length: int = 400) -> list[float]:
    """Norms as early training gives them: falling, then level, log-normal."""
    draw = random.Random(seed)
    return [math.exp(draw.gauss(0, scatter) + 1.5 * math.exp(-t / 30)) for t in range(length)]


class LearnsAll(GradientNormGuard):
    def __init__(self) -> None:
        super().__init__(patience=10**9)

    def reject(self, norm: float | None) -> None:
        assert norm is not None
        self._learn(math.log(norm), self.clip())

    def clip(self) -> float:
        return INF


class LearnsClipped(LearnsAll):
    def clip(self) -> float:
        return 3 * self._scale()


def figures(make: Callable[[], Guard], scatter: float = 0.2) -> tuple[list[int], int, int]:
    """Bad steps let through for windows of 10, 30 and 60; longest run after a lasting shift; clean steps vetoed."""
    streams = [stream(seed, scatter) for seed in range(20)]
    through = []
    for length in (10, 30, 60):
        window = range(120, 120 + length)
        passed = 0
        for norms in streams:
            vetoes = play(make(), [norm * (300 if t in window else 1) for t, norm in enumerate(norms)])
            passed += sum(not vetoes[t] for t in window)
        through.append(passed)
    shifted = [[norm * (1000 if t >= 120 else 1) for t, norm in enumerate(norms)] for norms in streams]
    return (
        through,
        max(longest_run(play(make(), norms)) for norms in shifted),
        sum(sum(play(make(), norms)) for norms in streams),
    )


def test_the_figures_of_the_docstring() -> None:
    assert figures(LearnsAll) == ([180, 580, 1180], 2, 0)
    assert figures(LearnsClipped) == ([69, 469, 1069], 9, 0)
    assert figures(lambda: GradientNormGuard(patience=10**9)) == ([0, 0, 0], 280, 0)
    assert figures(GradientNormGuard) == ([0, 0, 0], 94, 0)
    assert figures(GradientNormGuard, scatter=0.3)[0] == [0, 0, 102]
    steady = GradientNormGuard()
    play(steady, [1.0] * 500)
    assert steady.veto(6.4) is None and steady.veto(6.6) is not None


def test_after_a_window_of_bad_steps_nothing_good_is_vetoed_and_the_next_window_is() -> None:
    for seed in range(10):
        bad = [*range(120, 130), *range(150, 180)]
        norms = [norm * (300 if t in bad else 1) for t, norm in enumerate(stream(seed, 0.2))]
        guard = GradientNormGuard()
        assert [t for t, vetoed in enumerate(play(guard, norms)) if vetoed] == bad
        assert guard.state_dict()["vetoes"] == 0


def test_bloom_176b_spike_is_seen_four_steps_before_the_peak() -> None:
    """Gradient norms of its training log, iterations 31214 to 31222, where the loss peaked at the sixth."""
    quiet = [0.242 * math.exp(random.Random(1).gauss(0, 0.1)) for _ in range(50)]
    vetoes = play(GradientNormGuard(), [*quiet, 0.242, 0.947, 2.39, 15.9, 145, 960, 353, 379, 650, 0.25, 0.24])
    assert vetoes == [False] * 52 + [True] * 7 + [False] * 2


@pytest.mark.parametrize("patience", [1, 3, 128])
@pytest.mark.parametrize("factor", [10.0, 1e3, 1e30, 1e300])
def test_a_lasting_shift_is_accepted_within_patience_and_stays_accepted(patience: int, factor: float) -> None:
    guard = GradientNormGuard(patience=patience)
    vetoes = play(guard, [1.0] * 100 + [factor] * (patience + 200))
    assert 1 <= longest_run(vetoes) <= patience
    assert sum(vetoes) == longest_run(vetoes), "one run, then never again"


def test_warm_up_gets_stricter_with_each_commit() -> None:
    guard = GradientNormGuard()
    largest = []
    for _ in range(10):
        largest.append(max(factor for factor in (10.0**n for n in range(30)) if guard.veto(factor) is None))
        guard.commit(1.0)
    assert largest[:3] == [1e29] * 3 and largest[3] > largest[4] >= largest[5] >= largest[9] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(largest))


@pytest.mark.parametrize("bad", [NAN, INF, -INF, -1.0])
def test_what_is_no_norm_is_always_vetoed_and_never_learned(bad: float) -> None:
    guard = GradientNormGuard(patience=2)
    for warm_up in (0, 50):
        play(guard, [1.0] * warm_up)
        before = guard.state_dict()
        assert play(guard, [bad] * 20) == [True] * 20
        guard.commit(bad)  # observe mode
        assert guard.state_dict() == before


def test_zero_and_unknown_norms_pass_and_teach_nothing() -> None:
    guard = GradientNormGuard()
    play(guard, [1.0] * 20)
    before = guard.state_dict()
    assert guard.veto(0.0) is None and guard.veto(-0.0) is None
    for norm in (0.0, -0.0, None):
        guard.commit(norm)
        guard.reject(norm)
    assert guard.state_dict() == before


def test_a_small_norm_is_never_vetoed() -> None:
    guard = GradientNormGuard()
    assert not any(play(guard, [1.0] * 50 + [1e-3, 1e-30, 5e-324] + [1.0] * 50))


def test_one_tiny_norm_does_not_blind_the_guard() -> None:
    guard = GradientNormGuard()
    play(guard, [1.0] * 50 + [1e-12])
    assert guard.veto(30.0) is not None


def test_asking_changes_nothing_and_a_refusal_by_others_teaches_nothing() -> None:
    guard = GradientNormGuard()
    play(guard, stream(0, 0.2, 60))
    before = guard.state_dict()
    for norm in (0.5, 1e6, NAN):
        assert guard.veto(norm) == guard.veto(norm)
    guard.reject(1.1)
    assert guard.state_dict() == before
    guard.reject(1e6)
    assert guard.state_dict() == {**before, "vetoes": 1}


def test_observe_mode_says_what_enforcing_would_have_done() -> None:
    norms = [norm * (300 if 120 <= t < 150 else 1) for t, norm in enumerate(stream(3, 0.2))]
    observed, enforced = GradientNormGuard(), GradientNormGuard()
    said = []
    for norm in norms:
        said.append(observed.veto(norm) is not None)
        observed.commit(norm)
    assert said == play(enforced, norms) and observed.state_dict() == enforced.state_dict()


ANY = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True)
POSITIVE = st.floats(min_value=5e-324, max_value=1.7976931348623157e308, allow_subnormal=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(ANY, max_size=60), st.lists(st.booleans(), max_size=60), st.integers(1, 20))
def test_no_stream_raises_or_spoils_the_state(norms: list[float], refused: list[bool], patience: int) -> None:
    guard = GradientNormGuard(patience=patience)
    for norm, by_others in zip(norms, [*refused, *[False] * len(norms)], strict=False):
        vetoed = guard.veto(norm) is not None
        assert vetoed or 0 <= norm < INF
        (guard.reject if vetoed or by_others else guard.commit)(norm)
        state = guard.state_dict()
        assert all(math.isfinite(value) for value in state.values() if isinstance(value, int | float))
        assert json.loads(json.dumps(state)) == state


@settings(max_examples=300, deadline=None)
@given(st.lists(ANY, max_size=40), POSITIVE, st.integers(1, 40))
def test_no_shift_to_a_constant_locks_out(norms: list[float], constant: float, patience: int) -> None:
    guard = GradientNormGuard(patience=patience)
    play(guard, norms)
    assert longest_run(play(guard, [constant] * (patience + 60))) <= patience
    assert guard.veto(constant) is None


@settings(max_examples=300, deadline=None)
@given(st.lists(POSITIVE | st.sampled_from([NAN, INF]), max_size=150), st.integers(1, 12))
def test_no_stream_of_finite_norms_is_vetoed_more_often_in_a_row(norms: list[float], patience: int) -> None:
    guard = GradientNormGuard(patience=patience)
    vetoes = play(guard, norms)
    finite = [vetoed for norm, vetoed in zip(norms, vetoes, strict=True) if math.isfinite(norm)]
    assert longest_run(finite) <= patience


def test_a_saved_state_gives_the_same_answers() -> None:
    norms = [norm * (300 if 50 <= t < 60 else 1) for t, norm in enumerate(stream(4, 0.3, 120))]
    for cut in (0, 1, 40, 55, 100):
        whole, loaded = GradientNormGuard(), GradientNormGuard()
        play(whole, norms[:cut])
        loaded.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        assert play(loaded, norms[cut:]) == play(whole, norms[cut:])
        assert loaded.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"guard": "Other"}, ValueError),
        ({"mean": NAN}, ValueError),
        ({"mean": None}, ValueError),
        ({"mean": "1"}, ValueError),
        ({"deviation": -1.0}, ValueError),
        ({"deviation": INF}, ValueError),
        ({"commits": -1}, ValueError),
        ({"commits": 2.0}, ValueError),
        ({"vetoes": True}, ValueError),
        ({"new": 1}, ValueError),
        (None, TypeError),
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(change: dict[str, Any] | None, error: type[Exception]) -> None:
    guard = GradientNormGuard()
    play(guard, [1.0] * 10)
    before = guard.state_dict()
    with pytest.raises(error, match=r"GradientNormGuard\.load_state_dict"):
        guard.load_state_dict(None if change is None else {**before, **change})  # type: ignore[arg-type]
    assert guard.state_dict() == before


@pytest.mark.parametrize(
    ("settings_given", "error"),
    [
        ({"false_veto_rate": 0.0}, ValueError),
        ({"false_veto_rate": 0.5}, ValueError),
        ({"false_veto_rate": NAN}, ValueError),
        ({"false_veto_rate": "0.1"}, TypeError),
        ({"patience": 0}, ValueError),
        ({"patience": 1.0}, TypeError),
        ({"patience": True}, TypeError),
    ],
)
def test_bad_settings(settings_given: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(settings_given))):
        GradientNormGuard(**settings_given)


def test_a_smaller_rate_is_more_tolerant() -> None:
    strict, tolerant = GradientNormGuard(1e-2), GradientNormGuard(1e-6)
    for guard in (strict, tolerant):
        play(guard, [1.0] * 50)
    assert strict.veto(6.0) is not None and tolerant.veto(6.0) is None
    assert strict.settings() == {"false_veto_rate": 1e-2, "patience": 128}


def test_reasons_name_things() -> None:
    guard = GradientNormGuard()
    play(guard, [2.0] * 50)
    reason = guard.veto(600.0)
    assert reason is not None and "gradient norm 600 is 28.5 scales above the usual 2 (bar 9.4 scales, veto 1" in reason
    assert guard.veto(NAN) == "gradient norm is nan"
    assert "usual norm=2" in repr(guard) and "usual norm=none" in repr(GradientNormGuard())
