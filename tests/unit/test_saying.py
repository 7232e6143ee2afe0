"""What the command line prints of what others said."""

from __future__ import annotations

import pytest

from sidestepd.rundir import RunFile
from sidestepd.saying import Progress, is_terminal, say, say_in_terminal, seen, table
from sidestepd.status import Ledger, Report, SessionReport
from sidestepd.top import Rates


def report(*, node: str = "here", name: str = "", offered: int = 0, rows: int = 0) -> Report:
    session = SessionReport(rank=0, node=node, pid=1, state="live", offered=0, acknowledged=0, dropped={})
    return Report(
        run=RunFile(id="it", name=name), state="running", rows=rows, last_step=None, late_rows=0, forced=0,
        conflicts=0, unmatched=(), sessions=(session,), ledger=Ledger(offered=offered), spool_bytes=0,
    )  # fmt: skip


class TestTextOfOthers:
    def test_moves_no_cursor_and_changes_no_colour(self):
        shown = table(report(node="\x1b[2J\x1b[31mgone", name="a\rb\x07\udcff"))

        assert all(it.isprintable() or it == "\n" for it in shown)
        assert "\\x1b[2J" in shown

    def test_is_as_it_was_where_it_is_text(self):
        assert "Käse, 東京 → 3" == seen("Käse, 東京 → 3")


class TestAProcessWithoutAStderr:
    def test_says_nothing_and_goes_on(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("sys.stderr", None)
        progress = Progress()

        say("something")
        say_in_terminal("something")
        progress(3)
        progress.clear()

        assert not is_terminal()


class TestHowFastARunMoves:
    def test_is_told_from_the_second_look_on(self):
        rates = Rates()

        first = rates.line(report(offered=100, rows=10), now=1.0)
        second = rates.line(report(offered=300, rows=20), now=3.0)

        assert ("", "now       100 records/s said, 5 rows/s in the run") == (first, second)
