"""Plain lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import pytest

from dist_stability.experiments.progress import PLAIN_LINES, Progress


def test_plain_lines_are_few_and_the_last_step_is_among_them(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100, "a run", terminal=False) as progress:
        for done in range(1, 101):
            progress.advance(done, f"loss {done}")
        progress.note("batch 7: refused")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a run" and lines[-1] == "batch 7: refused"
    assert PLAIN_LINES <= len(lines) - 2 <= PLAIN_LINES + 2
    assert lines[-2].split()[:3] == ["100/100", "loss", "100"]


def test_quiet_ranks_print_nothing_and_want_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, "a run", shown=False) as progress:
        assert not progress.wants_numbers(3)
        progress.advance(3, "loss")
        progress.note("refused")
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, "a run [fsdp2]", terminal=True) as progress:
        assert progress.wants_numbers(1)
        progress.advance(3, "loss 1.5")
        progress.note("batch [7]: refused")
    out = capsys.readouterr().out
    assert "3/3" in out and "loss 1.5" in out and "batch [7]: refused" in out and "[fsdp2]" in out
