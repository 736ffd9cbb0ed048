"""The golden-twin and transparency matrices again, with each way to keep a snapshot and to read a verdict.

Every mode of the zoo with every optimizer, BatchNorm and bfloat16. What is missing is ``every="auto"``: which attempts
it judges depends on a clock (tests/test_measured_cadence.py compares it with the run at the intervals it chose).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import harness
import pytest
import test_golden_twin
import zoo
from test_golden_twin import BAD, SCALE, Job
from zoo import Case

from dist_stability.snapshot import HostWork, copier
from dist_stability.testing import compare

pytestmark = pytest.mark.slow

OPTIONS: dict[str, tuple[HostWork, dict[str, Any]]] = {
    "copies by a thread": (HostWork.ALL, {}),
    "digests by a thread": (HostWork.DIGEST, {}),
    "replicas whole": (HostWork.NONE, {"split_replicas": False}),
    "shadow": (HostWork.NONE, {"shadow": True}),
    "deferred": (HostWork.NONE, {"decision": "deferred"}),
    "all of them": (HostWork.ALL, {"shadow": True, "decision": "deferred"}),
}
ONCE = f"gradient-scale:step={BAD},factor=300"


def job(case: Case, options: dict[str, Any]) -> Job:
    if "decision" not in options:
        return Job(case, (SCALE,), (BAD, BAD + 1), actions=("rollback",) * 2, options=options)
    # Known one step late: the batch after the refused one is dropped with it, and its loader must draw nothing.
    return Job(replace(case, draws=False), (ONCE,), (BAD + 1,), (BAD,), ("rollback",), options)


def twins(rank: int, world: int, jobs: list[Job], work: HostWork) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copier, "HOST_WORK", work)
        return test_golden_twin.twins(rank, world, jobs)


def transparent(rank: int, world: int, cases: list[Case], options: dict[str, Any], work: HostWork) -> list[str]:
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copier, "HOST_WORK", work)
        for case in cases:
            guarded = zoo.train(case, rank, world, **options)
            wrong = [f"{verdict}" for verdict in guarded.verdicts if not verdict.accepted or verdict.undone]
            wrong += compare(guarded.image, zoo.train(case, rank, world, guarded=False).image)
            said += [f"rank {rank}, {case}: {line}" for line in wrong[:5]]
    return said


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("mode", zoo.MODES)
def test_golden_twins(mode: str, option: str) -> None:
    work, options = OPTIONS[option]
    jobs = [job(case, options) for case in zoo.matrix_of(mode)]
    said = harness.pool(zoo.MODES[mode]).run(twins, jobs, work, timeout=300)
    assert not any(said), "\n\n".join(dict.fromkeys(line for lines in said for line in lines))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("mode", zoo.MODES)
def test_transparent(mode: str, option: str) -> None:
    work, options = OPTIONS[option]
    cases = zoo.matrix_of(mode)
    for said in harness.pool(zoo.MODES[mode]).run(transparent, cases, options, work, timeout=300):
        assert not said, "\n".join(said)
