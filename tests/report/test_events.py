"""The event log keeps every number, is strict JSON, and is readable after a crash."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_stability.report.events import EventLog, from_json, read_events, read_json, to_json, write_json
from dist_stability.verdict import Action

numbers = st.one_of(st.floats(), st.integers(-(2**53), 2**53), st.booleans(), st.none())
values = st.recursive(
    st.one_of(numbers, st.text().filter(lambda t: t not in ("NaN", "Infinity", "-Infinity"))),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=12,
)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return repr(a) == repr(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(values)
def test_what_is_written_is_read_back(value: Any) -> None:
    text = json.dumps(to_json(value), allow_nan=False)
    assert same(from_json(json.loads(text, parse_constant=refuse)), value)


def test_a_log_round_trips_with_what_goes_wrong_in_training(tmp_path: Path) -> None:
    written = [
        {"attempt": 0, "measurement": math.nan, "bound": math.inf, "innovation": -math.inf, "undone": (1, 2)},
        {
            "attempt": 1,
            "action": Action.ROLLBACK,
            "reason": 'line\nbreak \u2028 "quotes" NaN',
            "seconds": {"vote": 0.1},
        },
    ]
    with EventLog(tmp_path / "new" / "events.jsonl") as log:
        for event in written:
            log.append(event)
            # On disk at once, not when the run ends.
            assert len(read_events(tmp_path / "new" / "events.jsonl")) == event["attempt"] + 1
    read = read_events(tmp_path / "new" / "events.jsonl")
    assert math.isnan(read[0].pop("measurement"))
    assert read[0] == {"attempt": 0, "bound": math.inf, "innovation": -math.inf, "undone": [1, 2]}
    assert read[1] == {**written[1], "action": "rollback"}
    for line in (tmp_path / "new" / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_torn_last_line_is_passed_over_and_any_other_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"attempt":0}\n{"attempt":1}\n{"attempt":2,"reason":"caf\xc3')
    assert read_events(path) == [{"attempt": 0}, {"attempt": 1}]
    path.write_text('{"attempt":0}\n{"att\n{"attempt":2}\n')
    with pytest.raises(ValueError, match=r"events\.jsonl, line 2: not an event"):
        read_events(path)
    path.write_text("[]\n")
    with pytest.raises(ValueError, match="line 1: not an event but a list"):
        read_events(path)
    path.write_text("")
    assert read_events(path) == []


def test_a_new_log_replaces_an_old_one(tmp_path: Path) -> None:
    for attempt in range(2):
        with EventLog(tmp_path / "events.jsonl") as log:
            log.append({"attempt": attempt})
    assert read_events(tmp_path / "events.jsonl") == [{"attempt": 1}]


def test_a_summary_is_never_seen_half_written(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"final": math.nan, "out": Path("a/b"), "ranks": {3, 1}})
    assert math.isnan(read_json(path)["final"]) and read_json(path)["ranks"] == [1, 3]
    with pytest.raises(TypeError, match="cannot hold a complex"):
        write_json(path, {"final": 1j})
    assert math.isnan(read_json(path)["final"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_enums_become_their_values() -> None:
    class Color(StrEnum):
        RED = "red"

    assert type(to_json(Color.RED)) is str and to_json(Color.RED) == "red"
