"""Which rows leave when: each rule of the reorder buffer."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from sidestepd.rows import MAIN_AXIS
from tests.support.buffers import PATIENCE, Buffer, two_ranks_at
from tests.support.builders import Tape, log, part
from tests.support.line import Line, Options


class TestAllMovedPast:
    def test_a_row_leaves_when_everyone_moved_past_it(self):
        buffer = two_ranks_at(5)

        buffer.say(0, 6, now=1.0)
        assert [] == buffer.ready(now=1.0)
        buffer.say(1, 6, now=1.1)

        assert [(MAIN_AXIS, 5, "passed")] == buffer.ready(now=1.1)

    def test_a_step_that_one_rank_leaves_out_is_moved_past_too(self):
        buffer = two_ranks_at(5)

        buffer.say(0, 6, 7, now=1.0)
        buffer.say(1, 9, now=1.0)

        assert [5, 6] == buffer.steps(now=1.0)

    def test_rows_leave_in_order_of_their_steps_however_they_came(self):
        buffer = two_ranks_at(5)

        buffer.say(0, 9, 7, 8, 6, now=1.0)
        buffer.say(1, 10, now=1.0)

        assert [5, 6, 7, 8] == buffer.steps(now=1.0)

    def test_all_parts_of_a_step_are_in_its_row(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 6, 6, 7, now=1.0)
        buffer.say(1, 6, 7, now=1.0)

        bundles = buffer.order.ready(1.0)

        assert [(5, 2), (6, 3)] == [(bundle.step, len(bundle.parts)) for bundle in bundles]

    def test_axes_do_not_wait_for_each_other(self):
        buffer = two_ranks_at(5)
        for session in (0, 1):
            buffer.say(session, 0, 1, now=1.0, axis="eval/step")

        assert [("eval/step", 0, "passed")] == buffer.ready(now=1.0)

    def test_rows_that_leave_together_leave_as_they_were_said(self):
        buffer = Buffer()
        buffer.join(0, 1)
        for step in range(4):
            for axis, later in ((MAIN_AXIS, 0.1), ("eval/step", 0.0)):
                for rank in (0, 1):
                    buffer.order.hear(part(step, rank=rank, axis=axis, time=10.0 * step + later), 0.0)
        buffer.leave(0, 1.0)
        buffer.leave(1, 1.0)

        expected = [(axis, step, "passed") for step in range(4) for axis in ("eval/step", MAIN_AXIS)]
        assert expected == buffer.ready(2.0)

    def test_who_left_is_not_waited_for(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 6, now=1.0)

        buffer.leave(1, now=1.0)

        assert [5] == buffer.steps(now=1.0)

    def test_when_all_left_everything_leaves(self):
        buffer = two_ranks_at(5)

        buffer.leave(0, now=1.0)
        buffer.leave(1, now=1.0)

        assert [(MAIN_AXIS, 5, "passed")] == buffer.ready(now=1.0)

    def test_who_speaks_again_after_its_lease_is_waited_for_again(self):
        buffer = two_ranks_at(5)
        buffer.leave(1, now=1.0)
        buffer.say(0, 6, 7, now=1.0)
        assert [5, 6] == buffer.steps(now=1.0)

        buffer.say(1, 7, now=2.0)
        buffer.say(0, 8, now=2.0)

        assert [] == buffer.steps(now=2.0)


class TestPatience:
    def test_a_row_waits_one_patience_from_when_it_was_first_passed(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 6, now=1.0)
        assert [5] == buffer.steps(now=5.0)

        buffer.say(0, 7, now=6.0)

        assert [] == buffer.ready(now=10.9)
        assert [(MAIN_AXIS, 6, "patience")] == buffer.ready(now=11.0)

    def test_a_row_that_all_said_waits_one_patience_for_the_next(self):
        buffer = two_ranks_at(5)

        assert [] == buffer.ready(now=4.9)
        assert [(MAIN_AXIS, 5, "patience")] == buffer.ready(now=5.0)

    def test_a_newest_row_waits_for_who_has_not_said_it(self):
        """A slow rank is waited for as long as nobody went on without it."""
        buffer = two_ranks_at(5)
        buffer.ready(now=5.0)
        buffer.say(0, 6, now=6.0)

        assert [] == buffer.ready(now=50.0)

    def test_a_step_between_others_has_been_passed_when_it_is_first_said(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 9, now=1.0)
        buffer.say(0, 7, now=3.0)

        assert [5] == buffer.steps(now=7.9)
        assert [7] == buffer.steps(now=8.0)

    def test_who_lets_patience_run_out_stops_holding(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 6, 7, now=0.0)
        assert [5, 6] == buffer.steps(now=5.0)

        buffer.say(0, 8, now=5.1)

        assert [7] == buffer.steps(now=5.1)

    def test_who_reached_the_row_goes_on_holding(self):
        """Only they stop who had not come to it."""
        buffer = two_ranks_at(5)
        buffer.say(0, 6, now=0.0)
        assert [5] == buffer.steps(now=5.0)

        buffer.say(0, 7, now=5.1)

        assert [] == buffer.steps(now=5.1)

    def test_it_holds_again_once_it_speaks_beyond_what_was_released(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 6, 7, 8, now=0.0)
        assert [5, 6, 7] == buffer.steps(now=5.0)
        buffer.say(1, 8, now=6.0)

        buffer.say(0, 9, now=6.0)

        assert [] == buffer.steps(now=6.0)

    def test_it_does_not_hold_again_by_speaking_of_what_was_released(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 6, 7, 8, now=0.0)
        assert [5, 6, 7] == buffer.steps(now=5.0)
        buffer.say(1, 7, now=6.0)

        buffer.say(0, 9, now=6.0)

        assert [(MAIN_AXIS, 7, "late"), (MAIN_AXIS, 8, "passed")] == buffer.ready(now=6.0)

    def test_it_does_not_run_against_a_session_that_has_more_to_say(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 6, 7, now=1.0)
        buffer.say(1, 6, now=1.0, more=True)
        assert [5] == buffer.steps(now=1.0)

        assert [] == buffer.steps(now=60.0)
        buffer.say(1, 7, now=61.0, more=False)

        assert [6] == buffer.steps(now=61.0)
        assert [7] == buffer.steps(now=66.0)

    def test_it_runs_although_one_who_is_beyond_the_row_has_more_to_say(self):
        buffer = two_ranks_at(5)

        buffer.say(0, 6, 7, now=1.0, more=True)

        assert [5, 6] == buffer.steps(now=6.0)


class TestNewcomers:
    def test_a_session_that_has_not_spoken_holds_for_one_patience_after_the_first_row(self):
        buffer = Buffer()
        buffer.join(0, 1, now=0.0)

        buffer.say(0, 0, 1, now=10.0)

        assert [] == buffer.steps(now=14.9)
        assert [0] == buffer.steps(now=15.0)

    def test_and_for_one_patience_after_its_hello(self):
        buffer = Buffer()
        buffer.join(0, now=0.0)
        buffer.say(0, 0, now=0.0)
        buffer.join(1, now=4.0, launch="other", world=1)

        buffer.say(0, 1, now=7.0)

        assert [] == buffer.steps(now=8.9)
        assert [0] == buffer.steps(now=9.0)

    def test_so_it_does_on_a_stage(self):
        """Ranks begin a stage a moment apart, and none of them shall be late."""
        buffer = two_ranks_at(5)
        buffer.say(0, 0, 1, now=20.0, axis="eval/step")
        assert [(MAIN_AXIS, 5, "patience")] == buffer.ready(now=24.0)

        buffer.say(1, 0, 1, now=24.0, axis="eval/step")

        assert [("eval/step", 0, "passed")] == buffer.ready(now=24.0)

    def test_one_that_has_more_to_say_is_awaited_longer(self):
        buffer = Buffer()
        buffer.join(0)
        buffer.join(1, world=2, more=True)
        buffer.say(0, 0, 1, 2, now=0.0)

        assert [] == buffer.steps(now=100.0)

    def test_a_rank_that_is_still_to_come_holds_for_one_patience_after_its_launch_spoke(self):
        buffer = Buffer()
        buffer.join(0, world=2)

        buffer.say(0, 0, 1, now=10.0)

        assert [] == buffer.steps(now=14.9)
        assert [0] == buffer.steps(now=15.0)

    def test_so_it_does_when_the_first_spoke_before_its_hello_was_read(self):
        """A session that spoke again after its lease, or whose first HELLO was lost, belongs to its launch too."""
        buffer = Buffer()
        buffer.leave(0, now=0.0)
        buffer.say(0, 0, now=1.0)
        buffer.join(0, world=2, now=20.0)

        buffer.say(0, 1, now=20.0)

        assert [] == buffer.steps(now=24.9)
        assert [0] == buffer.steps(now=25.0)

    def test_a_launch_that_is_complete_waits_for_nobody(self):
        buffer = Buffer()
        buffer.join(0, world=1)

        buffer.say(0, 0, 1, now=0.0)

        assert [0] == buffer.steps(now=0.0)

    def test_a_start_skew_below_patience_makes_nothing_late(self):
        buffer = Buffer()
        buffer.join(0, world=2, now=0.0)
        buffer.say(0, *range(48), now=0.1)
        assert [] == buffer.steps(now=4.7)
        buffer.join(1, world=2, now=4.8)

        buffer.say(1, *range(48), now=4.9)

        assert [(step, 2) for step in range(47)] == [(it.step, len(it.parts)) for it in buffer.order.ready(4.9)]

    def test_when_rank_0_alone_logs_rows_lag_by_one_row_and_not_by_patience(self):
        buffer = Buffer()
        buffer.join(0, 1, 2, now=0.0)
        buffer.say(0, 0, now=0.0)
        buffer.ready(now=PATIENCE)

        for step in range(1, 50):
            buffer.say(0, step, now=PATIENCE + step)

            assert [step - 1] == buffer.steps(now=PATIENCE + step)


class TestOutages:
    def test_after_a_boot_patience_does_not_run_until_a_session_was_heard_again(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 6, now=1.0)
        buffer.boot(now=60.0)
        buffer.join(0, now=60.1, world=2)

        assert [] == buffer.steps(now=100.0)
        buffer.join(1, now=100.0, world=2)

        assert [5] == buffer.steps(now=100.0)

    def test_patience_runs_afresh_from_the_boot(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 6, now=1.0)
        buffer.boot(now=60.0)

        buffer.join(0, 1, now=60.1)

        assert [] == buffer.steps(now=64.9)
        assert [5] == buffer.steps(now=65.0)

    def test_who_comes_back_with_much_to_say_is_not_late(self):
        buffer = two_ranks_at(5)
        buffer.boot(now=60.0)
        buffer.join(0, 1, now=60.0, more=True)
        buffer.say(0, *range(6, 50), now=60.0, more=False)
        for step in range(6, 49):
            buffer.say(1, step, now=60.0 + step, more=True)

            assert [(step - 1, 2)] == [(it.step, len(it.parts)) for it in buffer.order.ready(60.0 + step)]

    def test_a_rank_that_is_still_to_come_has_a_patience_from_the_boot(self):
        """Intake may die in the very moment in which the ranks start."""
        buffer = Buffer()
        buffer.join(0, world=2)
        buffer.say(0, 0, 1, now=0.0)
        buffer.boot(now=60.0)
        buffer.join(0, world=2, now=60.0)
        assert [] == buffer.steps(now=64.0)

        buffer.join(1, world=2, now=64.0)
        buffer.say(1, 0, 1, now=64.0)

        assert [(0, 2)] == [(it.step, len(it.parts)) for it in buffer.order.ready(64.0)]

    def test_who_does_not_come_back_is_waited_for_until_its_lease_ends(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 6, now=1.0)
        buffer.boot(now=2.0)
        buffer.join(0, now=2.0, world=2)

        buffer.leave(1, now=62.0)

        assert [5] == buffer.steps(now=62.0)


class TestLateness:
    def test_what_comes_after_its_row_left_leaves_at_once_as_late(self):
        buffer = two_ranks_at(5)

        buffer.say(0, 4, 2, now=1.0)

        assert [(MAIN_AXIS, 2, "late"), (MAIN_AXIS, 4, "late")] == buffer.ready(now=1.0)
        assert [] == buffer.ready(now=1.0)

    def test_late_parts_of_one_step_leave_together(self):
        buffer = two_ranks_at(5)
        for session in (0, 1):
            buffer.say(session, 4, now=1.0)

        assert [2] == [len(bundle.parts) for bundle in buffer.order.ready(1.0)]

    def test_going_back_to_a_step_that_has_not_left_is_not_late(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 6, 7, 5, now=1.0)
        buffer.say(1, 6, 7, now=1.0)

        assert [(5, 3), (6, 2)] == [(bundle.step, len(bundle.parts)) for bundle in buffer.order.ready(1.0)]

    def test_what_an_earlier_life_released_stays_released(self):
        buffer = Buffer(released=[(MAIN_AXIS, 0, 7)])
        buffer.join(0)

        buffer.say(0, 7, 8, 9, now=0.0)

        assert [(MAIN_AXIS, 7, "late"), (MAIN_AXIS, 8, "passed")] == buffer.ready(now=0.0)


class TestBounds:
    def test_when_it_is_full_the_oldest_row_of_the_fullest_axis_leaves(self):
        buffer = two_ranks_at(5, capacity=3)
        buffer.say(0, 0, now=1.0, axis="eval/step")

        buffer.say(0, 6, 7, now=1.0)

        assert [(MAIN_AXIS, 5, "forced")] == buffer.ready(now=1.0)
        assert 3 == buffer.order.waiting

    def test_at_the_end_everything_leaves(self):
        buffer = two_ranks_at(5)
        buffer.say(0, 6, 4, now=1.0)
        buffer.say(0, 0, now=1.0, axis="eval/step")

        assert [
            (MAIN_AXIS, 4, "late"), (MAIN_AXIS, 5, "closing"), (MAIN_AXIS, 6, "closing"),
            ("eval/step", 0, "closing"),
        ] == [(bundle.axis, bundle.step, bundle.cause) for bundle in buffer.order.flush()]  # fmt: skip
        assert 0 == buffer.order.waiting


class TestState:
    def restored(self, buffer: Buffer, **options: Any) -> Buffer:
        other = Buffer(**options)
        other.order.restore(msgpack.unpackb(msgpack.packb(buffer.order.state()), strict_map_key=False))
        return other

    def test_who_is_live_and_who_holds_what_is_restored(self):
        buffer = two_ranks_at(5)
        buffer.ready(now=5.0)

        other = self.restored(buffer, released=[(MAIN_AXIS, 0, 5)])

        assert buffer.order.state() == other.order.state()
        other.say(0, 6, 7, now=5.1)
        assert [] == other.steps(now=5.1)

    def test_newcomers_and_those_still_to_come_are_restored(self):
        buffer = Buffer()
        buffer.join(0, 1, world=3)
        buffer.say(0, 0, now=1.0)

        other = self.restored(buffer)

        other.say(0, 0, 1, now=1.0)
        assert [] == other.steps(now=5.9)
        assert [0] == other.steps(now=6.0)

    def test_a_part_that_is_in_a_row_already_moves_its_session_along(self):
        buffer = Buffer(released=[(MAIN_AXIS, 0, 5)])
        buffer.join(0, 1)
        buffer.say(0, 5, 6, now=0.0)

        buffer.say(1, 6, 7, now=0.0, used=True)
        buffer.say(0, 8, now=0.0)

        assert [1] == [len(bundle.parts) for bundle in buffer.order.ready(0.0) if bundle.step == 6]

    def test_who_said_the_row_that_left_last_holds_in_the_next_life_too(self):
        """It had reached that row, so it had not stopped holding when patience ran out."""
        buffer = Buffer(released=[(MAIN_AXIS, 0, 5)])
        buffer.join(0, 1)
        for session in (0, 1):
            buffer.say(session, 4, 5, now=0.0, used=True)

        buffer.say(0, 6, 7, now=9.0)

        assert [] == buffer.steps(now=9.0)

    def test_a_life_that_reads_again_waits_for_the_same_sessions(self):
        """The same through the whole line: row 1 left by patience, rank 1 said it, and then delivery is killed."""
        spool = Tape()
        line = Line(options=Options(patience=PATIENCE))
        for rank in (0, 1):
            spool.hello(rank, world=2)
        for rank in (0, 1):
            spool.say(rank, log(0), log(1))
        line.read(spool.entries, clock=5.0)
        line.read(spool.entries, clock=10.0)
        assert [0, 1] == [row.step for row in line.decided]

        line = line.crash()
        spool.now = 11.0
        spool.say(0, log(2), log(3))
        line.read(spool.entries, clock=11.0)
        spool.say(1, log(2), log(3))
        line.read(spool.entries, clock=11.0)

        assert [(2, False)] == [(row.step, row.late) for row in line.decided]


@pytest.mark.parametrize("patience", [0.5, 5.0])
def test_a_session_that_is_unknown_is_live_once_it_speaks(patience):
    """Its HELLO may be in a spool that was lost."""
    buffer = Buffer(patience=patience)
    buffer.say(7, 0, 1, now=0.0)

    assert [0] == buffer.steps(now=0.0)
