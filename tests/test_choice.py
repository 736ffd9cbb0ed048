"""No case of a matrix gets lost between the tests that share it."""

from __future__ import annotations

import zoo
from choice import THIRDS, in_thirds, often, third_of


def test_three_thirds_are_the_whole() -> None:
    shares = [in_thirds(which).args[1] for which in range(THIRDS)]
    for place, mode in enumerate(zoo.MODES):
        mine = [share[place].values for share in shares]
        assert [name for name, _ in mine] == [mode] * THIRDS
        seen = [str(case) for _, third in mine for case in third_of(zoo.matrix_of(mode), third)]
        assert sorted(seen) == sorted(str(case) for case in zoo.matrix_of(mode))
        assert len(seen) == len(set(seen))


def test_what_every_run_leaves_out_is_slow() -> None:
    for share in map(in_thirds, range(THIRDS)):
        whole = [one for one in share.args[1] if one.values[1] is None]
        assert [one.values[0] for one in whole] == list(zoo.MODES)
        assert all([mark.name for mark in one.marks] == ["slow"] for one in whole)
        assert not any(one.marks for one in share.args[1] if one.values[1] is not None)
    first, second = often([("ddp", 1), ("fsdp2", 2)], [("ddp", 1)])
    assert first == ("ddp", 1) and second.values == ("fsdp2", 2) and [mark.name for mark in second.marks] == ["slow"]
