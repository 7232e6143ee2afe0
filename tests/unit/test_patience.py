"""Trying again: at growing intervals, showing progress all the while."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from sidestepd.errors import Fatal, Reject, Retry
from sidestepd.rows import Row
from sidestepd.sinks import LeftOut, Rejected, patiently, write_all
from sidestepd.sinks.base import BEAT_EVERY_S


@dataclass
class Moody:
    """Something that raises, in this order, and then gives its number."""

    moods: list[Exception]
    calls: int = 0
    beats: int = 0
    slept: list[float] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def act(self) -> int:
        self.calls += 1
        if self.moods:
            raise self.moods.pop(0)
        return self.calls

    def write(self, row: Row) -> Sequence[str]:
        self.act()
        return [name for name in row.values if not name]

    def beat(self) -> None:
        self.beats += 1

    def patiently(self) -> int:
        return patiently(
            self.act, beat=self.beat, kept=lambda it: self.kept.append(it.trouble.what), sleep=self.slept.append
        )


class TestPatiently:
    def test_what_succeeds_is_done_once(self):
        moody = Moody([])

        assert moody.patiently() == 1

        assert ([], []) == (moody.slept, moody.kept)

    def test_intervals_grow_to_the_longest(self):
        moody = Moody([Retry("no", after_s=1.0, most_s=3.0) for _ in range(4)])

        assert moody.patiently() == 5

        assert sum(moody.slept) == pytest.approx(1 + 2 + 3 + 3)
        assert ["no"] * 4 == moody.kept

    def test_waiting_shows_progress_all_the_while(self):
        """Whoever does not is taken for stuck, and killed."""
        moody = Moody([Retry("no", after_s=30.0)])

        moody.patiently()

        assert max(moody.slept) <= BEAT_EVERY_S
        assert moody.beats >= 30 / BEAT_EVERY_S

    def test_however_long_it_takes(self):
        moody = Moody([Retry("no") for _ in range(5000)])

        assert moody.patiently() == 5001

    def test_what_does_not_heal_is_passed_on(self):
        moody = Moody([Retry("no"), Fatal("never")])

        with pytest.raises(Fatal):
            moody.patiently()


class TestWriteAll:
    def test_a_rejected_row_is_told_and_the_next_one_is_written(self):
        moody = Moody([Reject("unloggable"), Retry("no")])
        rows = [Row(step=step, time=0.0, values={}, places={}, positions=()) for step in range(2)]

        refused = list(write_all(moody, rows, beat=moody.beat, sleep=moody.slept.append))

        assert [Rejected(rows[0], "unloggable")] == refused
        assert moody.calls == 3

    def test_values_that_a_row_goes_without_are_told(self):
        moody = Moody([])
        row = Row(step=0, time=0.0, values={"loss": 1, "": 2}, places={}, positions=())

        assert [LeftOut(row, [""])] == list(write_all(moody, [row], beat=moody.beat))
