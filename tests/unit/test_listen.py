"""Listening: who is quiet, who is heard again, and whose process has ended; each change once."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from sidestep.wire import Bye, Hello, Status
from sidestepd.entries import Entry, EntryKind
from sidestepd.listen import Listener
from sidestepd.roster import Roster
from tests.support.builders import session_id

HEARTBEAT_S = 5.0


@dataclass
class Intake:
    """A roster with two sessions, and who listens to it."""

    roster: Roster = field(default_factory=lambda: Roster(lease=600.0, now=0.0))
    listener: Listener = field(default_factory=lambda: Listener(heartbeat_s=HEARTBEAT_S))

    def __post_init__(self) -> None:
        for rank in range(2):
            self.roster.hello(Hello(session=session_id(rank), rank=rank), 0.0)

    def beat(self, *ranks: int, now: float) -> None:
        for rank in ranks:
            self.roster.heartbeat(Status(session=session_id(rank)), now)

    def look(self, now: float) -> list[tuple[int, str, float]]:
        return [told(entry) for entry in self.listener.look(self.roster.live, now)]

    def close(self, now: float) -> list[tuple[int, str, float]]:
        return [told(entry) for entry in self.listener.close(self.roster.live, now)]


def told(entry: Entry) -> tuple[int, str, float]:
    assert entry.kind is EntryKind.VITAL
    return int.from_bytes(entry.session, "big"), entry.facts["state"], entry.facts["since"]


@pytest.fixture
def intake() -> Intake:
    return Intake()


class TestQuiet:
    def test_is_who_misses_three_heartbeats_and_is_told_once(self, intake):
        intake.beat(0, 1, now=3.0)
        intake.beat(0, now=15.0)

        assert [] == intake.look(17.9)
        assert [(1, "quiet", 3.0)] == intake.look(18.1)
        assert [] == intake.look(19.0)

    def test_ends_when_something_is_heard(self, intake):
        intake.beat(0, now=15.0)
        intake.look(16.0)
        intake.beat(0, 1, now=20.0)

        assert [(1, "heard", 20.0)] == intake.look(20.1)
        assert [] == intake.look(21.0)

    def test_is_told_anew_by_a_daemon_that_did_not_listen_for_a_while(self, intake):
        intake.beat(0, now=15.0)
        intake.look(16.0)
        intake.listener.restart(100.0)
        intake.roster.excuse(100.0)

        assert [] == intake.look(101.0)
        assert [(1, "quiet", 100.0)] == intake.look(115.5)

    def test_is_nobody_who_said_bye(self, intake):
        intake.roster.bye(Bye(session=session_id(1), first=0), 1.0)
        intake.beat(0, now=15.0)

        assert [] == intake.look(20.0)


class TestGone:
    def test_is_told_once_nothing_more_came_for_a_while(self, intake):
        intake.beat(0, now=8.0)
        intake.listener.exited(session_id(1), 4.0)

        assert [] == intake.look(11.0)
        assert [(1, "gone", 4.0)] == intake.look(11.6)
        assert [] == intake.look(12.0)

    def test_waits_for_what_was_on_its_way(self, intake):
        intake.listener.exited(session_id(1), 4.0)
        intake.beat(0, 1, now=9.0)

        assert [] == intake.look(16.0)
        assert [(1, "gone", 4.0)] == intake.look(16.6)

    def test_is_not_who_goes_on_speaking(self, intake):
        """What ended was a process of the same number elsewhere."""
        intake.listener.exited(session_id(1), 4.0)
        intake.beat(0, 1, now=12.0)

        assert [] == intake.look(13.0)
        intake.beat(0, now=25.0)
        assert [] == intake.look(26.0)

    def test_are_told_in_the_order_of_their_ends_when_the_command_is_over(self, intake):
        intake.listener.exited(session_id(1), 4.0)
        intake.listener.exited(session_id(0), 4.1)

        assert [(1, "gone", 4.0), (0, "gone", 4.1)] == intake.close(4.5)
        assert [] == intake.close(5.0)

    def test_are_not_those_that_live_on_when_the_command_is_over(self, intake):
        assert [] == intake.close(5.0)

    def test_in_the_order_of_their_ends_while_the_run_lives(self, intake):
        intake.listener.exited(session_id(0), 4.1)
        intake.listener.exited(session_id(1), 4.0)

        assert [(1, "gone", 4.0), (0, "gone", 4.1)] == intake.look(12.0)

    def test_a_pause_of_the_daemon_is_no_time_in_which_nothing_came(self, intake):
        intake.listener.exited(session_id(1), 4.0)
        intake.listener.restart(60.0)
        intake.roster.excuse(60.0)

        assert [] == intake.look(66.0)
        assert [(1, "gone", 64.0)] == intake.look(72.0)
