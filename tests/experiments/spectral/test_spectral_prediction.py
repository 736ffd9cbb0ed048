"""What docs/lr-probe.md says of the search, on two of its held-out configurations."""

from __future__ import annotations

import pytest

from dist_stability.experiments.spectral.command import WITHIN
from dist_stability.experiments.spectral.grids import EDGES
from dist_stability.experiments.spectral.scores import edge


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "pre"])
def test_the_search_finds_the_edge(norm: str) -> None:
    configuration = next(each for each in EDGES["first"] if (each.task, each.norm) == ("english", norm))
    found = edge((configuration, 60))
    assert found["bracket"][0] < found["edge"] < found["bracket"][1]
    assert 1 / WITHIN < found["edge"] / found["found"]["16"]["lr"] < WITHIN
