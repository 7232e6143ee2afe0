"""Which records are settled, and how far the spool may be deleted."""

from __future__ import annotations

import pytest

from sidestepd.resolve import Lost
from sidestepd.rows import Checkpoint, Dead, Position
from sidestepd.settlement import MOST_SNAPSHOTS, Settlement
from sidestepd.spool import Entry, EntryKind
from tests.support.builders import row


def frame(id_: int, count: int = 1, first: int = 0) -> Entry:
    return Entry(id=id_, kind=EntryKind.FRAME, first=first, count=count)


def lost(entry: int, seq: int = 0, count: int = 1, *, in_frame: bool = True) -> Lost:
    return Lost(position=Position(entry, seq), count=count, reason="corrupt", in_frame=in_frame)


def cursor(settlement: Settlement) -> int | None:
    checkpoint = settlement.checkpoint()
    return None if checkpoint is None else checkpoint.cursor


class TestFates:
    def test_what_was_read_is_unsettled_until_its_row_is_confirmed(self):
        it = Settlement({})
        it.read(frame(1, count=2))
        it.decide(row(5, positions=[(1, 0), (1, 1)]))
        assert 2 == it.unsettled

        it.confirm([5])

        assert (0, 2, 1, 0) == (it.unsettled, it.delivered, it.rows, it.unconfirmed)
        assert [5] == it.take_confirmed()
        assert [] == it.take_confirmed()

    def test_a_row_of_several_frames_settles_a_part_of_each(self):
        it = Settlement({})
        it.read(frame(1, count=2))
        it.read(frame(2, count=2))
        it.decide(row(5, positions=[(1, 0), (2, 0)]))

        it.confirm([5])

        assert 2 == it.unsettled

    def test_a_rejected_row_is_settled_and_counted_by_reason(self):
        it = Settlement({})
        it.read(frame(1, count=2))
        it.decide(row(5, positions=[(1, 0), (1, 1)]))

        it.reject(5, "too large")

        assert (0, 0, {"too large": 2}) == (it.unsettled, it.delivered, it.rejected)
        assert [(5, "rejected: too large")] == it.take_rejected()
        assert 0 == it.unconfirmed

    def test_what_became_part_of_the_state_is_settled(self):
        it = Settlement({})
        it.read(frame(1, count=2))

        it.settle(1)

        assert 1 == it.unsettled

    def test_what_can_not_be_read_is_settled_and_listed(self):
        it = Settlement({})
        it.read(frame(1, count=3))

        it.lose(lost(1, seq=1, count=2))

        assert 1 == it.unsettled
        assert [Dead(entry=1, seq=seq, reason="corrupt") for seq in (1, 2)] == it.take_dead()
        assert [] == it.take_dead()

    def test_what_was_lost_with_another_spool_is_in_no_frame(self):
        it = Settlement({})
        it.read(frame(7, count=1, first=9))

        it.lose(lost(7, count=9, in_frame=False))

        assert 1 == it.unsettled
        assert 9 == len(it.take_dead())

    def test_the_list_of_a_large_loss_is_short(self):
        it = Settlement({})

        it.lose(lost(1, count=10**9, in_frame=False))

        assert 100 == len(it.take_dead())

    def test_a_row_that_is_confirmed_twice_counts_once(self):
        it = Settlement({})
        it.read(frame(1))
        it.decide(row(5, positions=[(1, 0)]))

        it.confirm([5, 5, 6])

        assert (1, 1) == (it.delivered, it.rows)


class TestTheCursor:
    def test_it_moves_to_the_newest_snapshot_before_which_everything_is_settled(self):
        it = Settlement({})
        for entry in (1, 2, 3):
            it.read(frame(entry))
            it.snapshot(entry, b"%d" % entry)
        it.settle(1)
        it.settle(2)

        assert Checkpoint(cursor=2, fold=b"2") == it.checkpoint()
        assert it.checkpoint() is None

    def test_a_hole_holds_it(self):
        it = Settlement({})
        for entry in (1, 2, 3):
            it.read(frame(entry))
            it.snapshot(entry, b"")

        it.settle(2)
        it.settle(3)
        assert cursor(it) is None
        it.settle(1)

        assert 3 == cursor(it)

    def test_events_are_passed(self):
        it = Settlement({})
        it.read(frame(4))
        it.snapshot(9, b"")

        it.settle(4)

        assert 9 == cursor(it)

    def test_a_snapshot_as_of_a_frame_that_is_not_settled_is_not_taken(self):
        it = Settlement({})
        it.read(frame(4))

        it.snapshot(4, b"")

        assert cursor(it) is None

    @pytest.mark.parametrize("count", [MOST_SNAPSHOTS, MOST_SNAPSHOTS + 1, 5 * MOST_SNAPSHOTS])
    def test_however_many_snapshots_there_were_the_newest_is_kept(self, count):
        """It is the one that everything may be deleted up to in the end."""
        it = Settlement({})
        it.read(frame(1))
        for read_through in range(1, count + 1):
            it.snapshot(read_through, b"")
        assert len(it._snapshots) <= MOST_SNAPSHOTS

        it.settle(1)

        assert count == cursor(it)

    def test_it_says_as_of_when_the_newest_snapshot_is(self):
        it = Settlement({}, cursor=3)
        assert 3 == it.newest_snapshot

        it.snapshot(5, b"")

        assert 5 == it.newest_snapshot


class TestTheNextLife:
    def test_counts_go_on(self):
        it = Settlement({})
        it.decide(row(5, positions=[(1, 0)]))
        it.confirm([5])
        it.decide(row(6, positions=[(1, 1)]))
        it.reject(6, "why")

        other = Settlement(it.counts())

        assert (1, 1, {"why": 1}) == (other.delivered, other.rows, other.rejected)

    def test_records_of_a_row_that_is_settled_are_settled_when_they_are_read_again(self):
        it = Settlement({}, cursor=1)
        it.recall(row(5, positions=[(2, 0), (3, 0)]), settled=True)

        it.read(frame(2, count=2))

        assert it.places_of(Position(2, 0)) is not None
        assert it.places_of(Position(2, 1)) is None
        assert 1 == it.unsettled
        assert 0 == it.unconfirmed

    def test_they_are_known_to_be_settled_until_they_are_read_again(self):
        it = Settlement({}, cursor=1)
        it.recall(row(5, positions=[(2, 0), (2, 1), (4, 0)]), settled=True)
        it.recall(row(6, positions=[(4, 1)]), settled=False)
        assert 3 == it.settled_beyond(1)

        it.confirm([6])

        assert [4, 2, 0] == [it.settled_beyond(entry) for entry in (1, 2, 4)]

    def test_those_of_a_row_that_is_not_wait_for_it(self):
        it = Settlement({}, cursor=1)
        it.recall(row(5, positions=[(2, 0), (3, 0)]), settled=False)
        it.read(frame(2))
        assert (1, 1) == (it.unsettled, it.unconfirmed)

        it.confirm([5])
        it.read(frame(3))

        assert (0, 2) == (it.unsettled, it.delivered)

    def test_what_is_before_the_cursor_is_not_read_again(self):
        it = Settlement({}, cursor=2)

        it.recall(row(5, positions=[(2, 0), (3, 0)]), settled=True)

        assert it.places_of(Position(2, 0)) is None
        assert it.places_of(Position(3, 0)) is not None

    def test_a_row_that_was_settled_does_not_count_again(self):
        it = Settlement({"delivered": 1, "rows": 1})
        it.recall(row(5, positions=[(2, 0)]), settled=True)

        it.confirm([5])

        assert (1, 1) == (it.delivered, it.rows)

    def test_records_of_rows_whose_frames_are_gone_are_told(self):
        """Their spool was damaged, but the run has them: they are not lost."""
        it = Settlement({}, cursor=1)
        it.recall(row(5, positions=[(2, 0), (2, 1), (4, 0)]), settled=True)

        assert 2 == it.passed(frame(3))
        assert 0 == it.passed(frame(4))
        assert 0 == it.passed(frame(9))

    def test_so_are_those_whose_frame_s_place_another_entry_has(self):
        """Salvage says a HELLO again where there is room, which may be where a frame is missing."""
        it = Settlement({}, cursor=1)
        it.recall(row(5, positions=[(2, 0), (2, 1), (4, 0)]), settled=True)

        assert 2 == it.passed(Entry(id=2, kind=EntryKind.HELLO))
        assert 0 == it.passed(frame(4))


class TestValuesThatTheSinkRefuses:
    def test_are_counted(self):
        it = Settlement({})

        it.leave_out(4, 2)
        it.leave_out(5, 1)

        assert 3 == it.values_refused

    def test_of_a_row_that_is_sent_again_count_once(self):
        it = Settlement({})
        it.leave_out(4, 2)
        again = Settlement(it.counts())

        again.leave_out(4, 2)
        again.leave_out(5, 1)

        assert 3 == again.values_refused
