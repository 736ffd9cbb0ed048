"""Every measure on runs made by hand."""

from __future__ import annotations

import math

import pytest
from paper_records import trace

from dist_stability.experiments.paper import measures
from dist_stability.experiments.paper.measures import measure, statistic, twin_equality
from dist_stability.experiments.paper.protocol import Injection
from dist_stability.experiments.paper.traces import Trace, trace_of
from dist_stability.report.runs import RunRecord

FAULT = Injection("made-up", "a fault", ((3, 2),), ())
CLEAN, BASELINE = trace([2.0, 1.8, 1.6, 1.4, 1.2, 1.0]), trace([2.0, 1.8, 1.6, 3.0, 2.5, 2.0])


def refusing(*attempts: int, final: float = 1.1, action: str = "rollback") -> Trace:
    actions = [action if attempt in attempts else "commit" for attempt in range(6)]
    return trace([2.0, 1.8, 1.6, 1.6, 1.6, final], actions=actions, guarded=True)


def test_recovery_gap() -> None:
    found = measure(refusing(3, 4), FAULT, faulty=True, clean=CLEAN, baseline=BASELINE)
    assert found["recovery_gap"] == pytest.approx(0.1)
    assert measures.gap(CLEAN, CLEAN, BASELINE) == 0 and measures.gap(BASELINE, CLEAN, BASELINE) == 1
    assert found["final_probe"] == 1.1 and found["evaluation"] == 2.0


def test_the_gap_is_not_defined_without_harm_or_without_a_peer() -> None:
    run = refusing(3)
    assert measures.gap(run, CLEAN, trace([1.0199])) is None
    assert measures.gap(run, CLEAN, trace([1.0201])) is not None
    assert measures.gap(run, None, BASELINE) is None and measures.gap(run, CLEAN, None) is None
    lost = trace([1.0], final_probe=math.inf)
    assert measures.gap(run, CLEAN, lost) is None and measures.gap(lost, CLEAN, lost) is None
    assert measures.gap(lost, CLEAN, BASELINE) == math.inf


def test_regret_and_gap_against_the_twin() -> None:
    twin = trace([1.05])
    found = measure(refusing(3, 4), FAULT, faulty=True, clean=CLEAN, baseline=BASELINE, twin=twin)
    assert found["regret"] == pytest.approx(0.05) and found["twin_gap"] == pytest.approx(0.05 / 0.95)
    assert measure(refusing(), FAULT, faulty=True)["regret"] is None


def test_refusals_inside_and_outside() -> None:
    run = refusing(1, 3, 5)
    found = measure(run, FAULT, faulty=True)
    assert (found["refused_inside"], found["false_refusals"], found["detection_delay"]) == (1, 2, 0)
    clean = measure(run, FAULT, faulty=False)
    assert (clean["refused_inside"], clean["false_refusals"], clean["detection_delay"]) == (0, 3, None)


@pytest.mark.parametrize(("refused", "delay"), [((3,), 0), ((4,), 1), ((1,), None), ((1, 5), 2), ((), None)])
def test_detection_delay(refused: tuple[int, ...], delay: int | None) -> None:
    assert measures.detection_delay(refusing(*refused), 3) == delay


def test_every_kind_of_refusal_counts_and_attenuation_is_counted_apart() -> None:
    for action in ("veto", "rollback", "deep_rollback", "reload"):
        assert refusing(3, action=action).refused == [3]
    found = measure(refusing(3, action="attenuate"), FAULT, faulty=True)
    assert (found["refused_inside"], found["attenuated"]) == (0, 1)
    assert measure(trace([1.0] * 6, undone=4), FAULT, faulty=True)["undone"] == 4


def test_peak_degradation() -> None:
    assert measures.peak_degradation(BASELINE, 3) == pytest.approx(1.4)
    assert measures.peak_degradation(CLEAN, 3) == pytest.approx(-0.2)
    assert measures.peak_degradation(trace([1.0, math.inf], final_probe=math.inf), 1) == math.inf
    assert measures.peak_degradation(BASELINE, 0) is None and measures.peak_degradation(BASELINE, 99) is None


def test_the_peak_of_a_twin_is_counted_from_the_batch_not_from_the_attempt() -> None:
    twin = trace([2.0, 9.0, 1.6, 1.5], batches=[0, 1, 2, 5])
    assert measures.peak_degradation(twin, 3) == pytest.approx(-0.1)


def test_overhead() -> None:
    phases = {"step": 3.0, "probe": 1.0, "vote": 0.5, "copy": 0.5}
    guarded = trace([1.0], guarded=True, seconds=10.0, phases=phases)
    assert measures.overhead_ratio(guarded) == pytest.approx(10 / 8)
    assert measures.overhead_parts(guarded) == {"probe": 1 / 8, "vote": 0.5 / 8, "copy": 0.5 / 8}
    assert measures.overhead_ratio(trace([1.0], phases=phases)) == 1.0  # a probe only for the record


def test_the_twin_of_a_run_that_let_a_faulty_step_stand_says_nothing() -> None:
    both = refusing(3, 4)
    assert twin_equality(both, FAULT.attempts, []) == "equal"
    assert twin_equality(both, FAULT.attempts, ["rank 0: weight"]) == "different"
    assert twin_equality(refusing(3), FAULT.attempts, []) == "undefined"
    assert twin_equality(refusing(3, 4, action="attenuate"), FAULT.attempts, []) == "undefined"
    undone = trace([1.0] * 6, actions=["commit"] * 4 + ["deep_rollback"] * 2, taken_back=frozenset({3}))
    assert twin_equality(undone, FAULT.attempts, []) == "equal"
    for state in ({"stopped": True}, {"slowed": True}):
        run = trace([1.0] * 6, actions=["commit"] * 3 + ["veto"] * 2 + ["commit"], **state)
        assert twin_equality(run, FAULT.attempts, []) == "undefined"


def test_statistics_over_seeds() -> None:
    assert statistic([1.0, None, 3.0]) == {"mean": 2.0, "std": pytest.approx(math.sqrt(2)), "values": [1.0, None, 3.0]}
    assert statistic([None]) == {"mean": None, "std": None, "values": [None]}
    assert statistic([4.0]) == {"mean": 4.0, "std": 0.0, "values": [4.0]}
    assert statistic([1.0, math.inf])["mean"] == math.inf and statistic([1.0, math.inf])["std"] is None


def event(attempt: int, action: str, probe: float, **more: object) -> dict[str, object]:
    common = {"attempt": attempt, "batch": attempt, "action": action, "probe": probe, "measurement": probe}
    return {**common, "innovation": None, "bound": None, "undone": [], "seconds": {"step": 1.0}, **more}


def test_a_trace_is_what_the_events_say() -> None:
    events = [
        event(0, "commit", 1.0, parameter_norm=5.0),
        event(1, "commit", math.nan, learning_rate_factor=0.5),
        event(2, "deep_rollback", 1.0, undone=[1], seconds={"step": 1.0, "probe": 2.0}),
    ]
    summary = {
        **{"finished": False, "error": "StabilityStop", "undone": [1], "final_probe": math.nan, "evaluation": None},
        **{"settings": {"rule": "fixed"}, "seconds": 9.0, "data": "made-up data", "device": "cpu", "source": "a"},
        "versions": {"torch": "0", "platform": "none"},
    }
    found = trace_of(RunRecord("seed0", events, summary))
    assert found.refused == [2] and found.taken_back == {1} and found.undone == 1
    assert found.stopped and found.slowed and found.guarded and found.evaluation is None
    assert found.probe == [1.0, math.inf, 1.0] and found.final_probe == math.inf
    assert found.norms == [5.0, None, None] and found.phases == {"step": 3.0, "probe": 2.0}
