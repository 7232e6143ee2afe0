"""Which rows leave when: launches that begin again, calls that wait to be matched, and rows of one session."""

from __future__ import annotations

import msgpack

from sidestepd.match import Waits
from sidestepd.resolve import Heard, Joined
from sidestepd.rows import MAIN_AXIS
from tests.support.buffers import PATIENCE, Buffer, two_ranks_at
from tests.support.builders import part, session_id


class TestAttempts:
    def restarted(self) -> Buffer:
        """Rank 0 said 5 in the first attempt, which ended, and is in the second one."""
        buffer = Buffer()
        buffer.join(0)
        buffer.say(0, 4, 5, now=0.0)
        buffer.leave(0, now=1.0)
        assert [4, 5] == buffer.steps(now=1.0)
        again = Joined(session=session_id(7), rank=0, world=1, launch="L~1", attempt=1, more=False)
        buffer.order.hear(again, 1.0)
        return buffer

    def say(self, buffer: Buffer, *steps: int, now: float, attempt: int = 1) -> None:
        for step in steps:
            buffer.order.hear(part(step, session=7, attempt=attempt), now)

    def test_steps_said_again_are_not_late(self):
        buffer = self.restarted()

        self.say(buffer, 2, 3, 4, now=1.0)

        assert [(2, 1, "passed"), (3, 1, "passed")] == [
            (it.step, it.attempt, it.cause) for it in buffer.order.ready(now=7.0)[:2]
        ]

    def test_within_the_attempt_they_are(self):
        buffer = self.restarted()
        self.say(buffer, 2, 3, 4, now=1.0)
        buffer.order.ready(now=7.0)

        self.say(buffer, 2, now=8.0)

        assert [(MAIN_AXIS, 2, "late")] == buffer.ready(now=8.0)

    def test_what_the_attempt_before_says_now_is_late_in_its_own_order(self):
        buffer = self.restarted()
        self.say(buffer, 2, 3, now=1.0)

        buffer.say(0, 5, now=2.0)

        [late, *_] = buffer.order.ready(now=7.0)
        assert (5, 0, "late") == (late.step, late.attempt, late.cause)

    def test_a_session_does_not_hold_the_axes_of_another_attempt(self):
        """One that is left over from before waits for nobody of the new one, nor they for it."""
        buffer = self.restarted()
        buffer.say(0, 6, now=2.0)
        self.say(buffer, 2, 3, 4, now=2.0)

        assert [2, 3] == [it.step for it in buffer.order.ready(now=7.0) if it.attempt == 1][:2]

    def test_outlive_a_crash(self):
        buffer, other = self.restarted(), Buffer(released=[(MAIN_AXIS, 0, 5), (MAIN_AXIS, 1, 2)])
        self.say(buffer, 2, 3, now=1.0)

        other.order.restore(msgpack.unpackb(msgpack.packb(buffer.order.state()), strict_map_key=False))
        self.say(other, 2, now=2.0)
        self.say(other, 4, now=2.0)

        assert [(2, 1, "late")] == [(it.step, it.attempt, it.cause) for it in other.order.ready(now=2.0)]
        assert [4] == [it.step for it in other.order.ready(now=20.0)]


class TestWaitingToBeMatched:
    def test_patience_is_twice_as_long_for_a_session_of_which_something_waits(self):
        buffer = two_ranks_at(5)
        buffer.order.hear(Waits(session=session_id(1), waiting=True), 1.0)
        buffer.say(0, 6, now=1.0)

        assert [] == buffer.ready(now=9.9)
        assert [(MAIN_AXIS, 5, "patience")] == buffer.ready(now=10.0)

    def test_what_does_not_move_a_session_along_does_not_let_rows_go(self):
        """A call between two that are matched: the next of them may lie before it."""
        buffer = two_ranks_at(5)
        buffer.say(0, 6, 7, now=1.0)

        buffer.order.hear(part(9, rank=1, moves=False), 1.0)

        assert [] == buffer.ready(now=1.0)
        buffer.say(1, 6, now=1.0)
        assert [5] == buffer.steps(now=1.0)

    def test_but_not_once_it_waits_no_more(self):
        buffer = two_ranks_at(5)
        buffer.order.hear(Waits(session=session_id(1), waiting=True), 1.0)
        buffer.say(0, 6, now=1.0)
        buffer.order.hear(Waits(session=session_id(1), waiting=False), 2.0)

        assert [(MAIN_AXIS, 5, "patience")] == buffer.ready(now=6.0)


class TestRowsOfASessionsOwn:
    def said(self, buffer: Buffer, session: int, *steps: int, now: float) -> None:
        for step in steps:
            said = part(step, rank=0, session=session, apart=f"n0:{session}")
            buffer.order.hear(said, now)
        buffer.order.hear(Heard(session=session_id(session), more=False), now)

    def who(self, buffer: Buffer, now: float) -> list[tuple[int, str, int]]:
        return [(it.step, it.apart, len(it.parts)) for it in buffer.order.ready(now)]

    def test_each_has_its_own_at_the_same_step(self):
        buffer = two_ranks_at(5)
        for session in (7, 8):
            self.said(buffer, session, 5, 6, now=1.0)

        assert [(5, "n0:7", 1), (5, "n0:8", 1)] == self.who(buffer, now=1.0)

    def test_they_leave_however_far_behind_or_ahead_the_others_are(self):
        buffer = two_ranks_at(5)
        self.said(buffer, 7, 0, 1, 1000, 1001, now=1.0)

        assert [0, 1, 1000] == buffer.steps(now=1.0)

    def test_the_others_wait_neither_for_them_nor_for_who_said_them(self):
        buffer = two_ranks_at(5)
        buffer.order.hear(Joined(session=session_id(7), rank=0, world=2, launch="L", more=False), 1.0)
        self.said(buffer, 7, 0, now=1.0)
        for rank in (0, 1):
            buffer.say(rank, 6, 7, now=1.1)

        assert [(5, "", 2), (6, "", 2)] == self.who(buffer, now=1.1)

    def test_what_it_says_at_a_step_that_it_names_is_everybody_s(self):
        buffer = two_ranks_at(5)
        self.said(buffer, 7, 0, now=1.0)
        buffer.say(7, 6, now=1.0)
        for rank in (0, 1):
            buffer.say(rank, 6, 7, now=1.1)

        assert [(5, "", 2)] == self.who(buffer, now=1.1)
        buffer.say(7, 7, now=1.2)

        assert [(6, "", 3)] == self.who(buffer, now=1.2)

    def test_the_newest_leaves_after_patience_or_with_its_session(self):
        buffer = two_ranks_at(5)
        for session in (7, 8):
            self.said(buffer, session, 0, now=1.0)
        assert [] == self.who(buffer, now=1.0)

        buffer.leave(8, now=2.0)
        assert [(0, "n0:8", 1)] == self.who(buffer, now=2.0)
        assert (0, "n0:7", 1) in self.who(buffer, now=1.0 + PATIENCE + 1.0)

    def test_nothing_is_kept_of_sessions_that_left(self):
        buffer = two_ranks_at(5)
        for session in range(7, 20):
            self.said(buffer, session, 0, now=1.0)
            buffer.leave(session, now=1.0)
            buffer.ready(1.0)

        assert 1 == len(buffer.order.state()["axes"])

    def test_outlive_a_crash(self):
        buffer, other = two_ranks_at(5), Buffer()
        self.said(buffer, 7, 0, now=1.0)

        other.order.restore(msgpack.unpackb(msgpack.packb(buffer.order.state()), strict_map_key=False))

        self.said(other, 7, 1, 2, now=1.0)
        assert [(1, "n0:7", 1)] == self.who(other, now=1.0)
