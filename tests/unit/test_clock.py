"""The spool's clock never goes back."""

from __future__ import annotations

import time
from pathlib import Path

from sidestepd.clock import Horizon, SpoolClock


class TestSpoolClock:
    def test_starts_at_the_wall_clock(self):
        before, now, after = time.time(), SpoolClock.starting_after(0.0)(), time.time()

        assert before - 0.01 <= now <= after + 0.01

    def test_starts_no_earlier_than_the_spool_was(self):
        """The machine's clock was set back between two lives."""
        future = time.time() + 3600

        clock = SpoolClock.starting_after(future)

        assert future <= clock() < future + 60

    def test_does_not_go_back(self):
        clock = SpoolClock.starting_after(0.0)

        told = [clock() for _ in range(1000)]

        assert sorted(told) == told


class TestHorizon:
    def test_is_at_the_beginning_of_time_before_anybody_moved_it(self, tmp_path: Path):
        assert 0.0 == Horizon(tmp_path / "horizon")()

    def test_tells_another_process_what_it_was_moved_to(self, tmp_path: Path):
        Horizon(tmp_path / "horizon").move(1_700_000_000.125)

        assert 1_700_000_000.125 == Horizon(tmp_path / "horizon")()

    def test_is_where_intake_said_however_long_ago_that_is(self, tmp_path: Path):
        """Written late, by a process that stood still between looking at its clock and writing."""
        clock = SpoolClock.starting_after(0.0)
        horizon = Horizon(tmp_path / "horizon")

        horizon.move(clock() - 4.0)

        assert horizon() < clock() - 3.9
