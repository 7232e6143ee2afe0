"""The spool's clock never goes back."""

from __future__ import annotations

import time

from sidestepd.clock import SpoolClock


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

    def test_is_the_same_for_whoever_knows_its_offset(self):
        clock = SpoolClock.starting_after(0.0)

        first, second, third = clock(), SpoolClock(clock.offset)(), clock()

        assert first <= second <= third
