"""The roster: duplicates, gaps, and who is live."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.wire import BLOBS, SAMPLER, Bye, Frame, Hello, Status, Wrapped, checksum
from sidestepd.entries import Entry, EntryKind, StoredSession
from sidestepd.roster import Roster, Session, Verdict
from tests.support.spools import frame as spooled
from tests.support.spools import together

ALICE, BOB = b"a" * 16, b"b" * 16
LEASE_S = 60.0
ROUTES = {ALICE: b"relay", BOB: b"relay"}


def frame(first: int, count: int = 10, *, session: bytes = ALICE) -> Frame:
    body = b"\x00" * count
    return Frame(session=session, first=first, count=count, body=body, crc=checksum(body))


def roster_with(*sessions: StoredSession, now: float = 0.0, **options: Any) -> Roster:
    return Roster(sessions, lease=LEASE_S, now=now, **options)


def greeted(first: int = 0, *, now: float = 0.0) -> Roster:
    """A roster to which one session said HELLO."""
    roster = roster_with(now=now)
    roster.hello(Hello(session=ALICE, first=first, rank=2, world=4, launch="L"), now)
    return roster


def commit(roster: Roster) -> None:
    """What intake does once the spool has it."""
    for session in roster.sessions.values():
        session.stored = session.next


def alice(roster: Roster) -> Session:
    return roster.sessions[ALICE]


class TestFramesThatCameTogether:
    def take(self, roster: Roster, *frames: tuple[bytes, int]) -> int:
        said = [Wrapped(session, first, 10, False, 0, 100) for session, first in frames]
        return roster.take(said, 5.0, route=b"relay", routes=ROUTES)

    def both(self, **facts: Any) -> Roster:
        roster = greeted()
        roster.hello(Hello(session=BOB, launch="L", **facts), 0.0)
        return roster

    def test_are_taken_as_long_as_each_is_wanted_next(self):
        roster = self.both()

        assert 3 == self.take(roster, (ALICE, 0), (BOB, 0), (ALICE, 10))
        assert (20, 10, 5.0) == (alice(roster).next, roster.sessions[BOB].next, alice(roster).heard)

    @pytest.mark.parametrize("first", [0, 20])
    def test_are_left_from_one_on_that_came_before_or_is_behind_a_gap(self, first: int):
        roster = self.both()

        assert 2 == self.take(roster, (ALICE, 0), (BOB, 0), (ALICE, first), (BOB, 10))
        assert (10, 10) == (alice(roster).next, roster.sessions[BOB].next)
        assert (0, 0) == (roster.duplicates, roster.gaps), "they are heard by themselves"

    def test_are_left_where_they_are_no_metrics_of_a_live_session_on_this_connection(self):
        ended = self.both()
        ended.expire(1000.0)
        stranger = b"c" * 16

        assert 0 == self.take(self.both(role=BLOBS), (BOB, 0))
        assert 0 == self.take(ended, (BOB, 0))
        assert 0 == self.take(self.both(), (stranger, 0))
        assert 0 == self.both().take([Wrapped(BOB, 0, 10, False, 0, 100)], 0.0, route=b"other", routes=ROUTES)

    def test_are_taken_back_one_and_all(self):
        roster = self.both()
        self.take(roster, (ALICE, 0), (BOB, 0), (ALICE, 10))

        left = roster.take_back([together(spooled(0), spooled(0, session=BOB), spooled(10))])

        assert [] == left
        assert (0, 0) == (alice(roster).next, roster.sessions[BOB].next)


class TestFrames:
    def test_of_who_never_said_hello_are_a_strangers(self):
        assert roster_with().frame(frame(0), 0.0) is Verdict.STRANGER

    def test_that_come_next_are_taken(self):
        roster = greeted()

        verdicts = [roster.frame(frame(0), 0.0), roster.frame(frame(10, 5), 0.0), roster.frame(frame(15), 0.0)]

        assert [Verdict.TAKE] * 3 == verdicts
        assert alice(roster).next == 25

    def test_that_were_taken_are_duplicates(self):
        roster = greeted()
        roster.frame(frame(0), 0.0)

        assert roster.frame(frame(0), 0.0) is Verdict.DUPLICATE
        assert (roster.duplicates, alice(roster).next) == (1, 10)

    def test_that_come_too_early_are_gaps(self):
        roster = greeted()

        assert roster.frame(frame(10), 0.0) is Verdict.GAP
        assert (roster.gaps, alice(roster).next) == (1, 0)

    def test_are_only_acknowledged_once_they_are_committed(self):
        roster = greeted()

        roster.frame(frame(0), 0.0)

        assert alice(roster).stored == 0

    def test_of_two_sessions_are_counted_apart(self):
        roster = greeted()
        roster.hello(Hello(session=BOB), 0.0)
        roster.frame(frame(0), 0.0)

        assert roster.frame(frame(0, session=BOB), 0.0) is Verdict.TAKE

    def test_without_the_gate_are_taken_twice(self):
        """The control experiment: what the gate is for."""
        roster = roster_with(duplicate_gate=False)
        roster.hello(Hello(session=ALICE), 0.0)
        roster.frame(frame(0), 0.0)

        assert roster.frame(frame(0), 0.0) is Verdict.TAKE

    @given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=60))
    def test_however_they_come_each_record_is_taken_once_and_in_order(self, said: list[tuple[int, bool]]):
        """Resent, overtaken, interrupted by a new HELLO: what is taken is 0, 1, 2, ... without a hole."""
        roster, taken = greeted(), []
        for first, hello in said:
            if hello:
                roster.hello(Hello(session=ALICE, first=min(first, alice(roster).next)), 0.0)
            elif roster.frame(frame(first, 1), 0.0) is Verdict.TAKE:
                taken.append(first)

        assert list(range(len(taken))) == taken


class TestHello:
    def test_is_told_what_is_wanted(self):
        roster = roster_with(StoredSession(id=ALICE, next=40))

        roster.hello(Hello(session=ALICE, first=30), 0.0)

        assert roster.wanted(alice(roster)) == 40

    def test_of_who_is_further_than_the_spool_moves_up(self):
        """A spool that was lost does not hold up who was acknowledged by it."""
        roster = greeted(first=30)

        assert roster.wanted(alice(roster)) == 30
        assert roster.frame(frame(30), 0.0) is Verdict.TAKE

    def test_becomes_an_entry_with_all_it_said(self):
        entry = greeted_entry(first=30)

        assert (EntryKind.HELLO, 30, 5.0) == (entry.kind, entry.first, entry.received)
        assert {
            "rank": 2, "world": 4, "launch": "L", "more": True, "settings": {"project": "p"}, "offered": 50,
            "dropped": {"outbox_full": 7},
        }.items() <= entry.facts.items()  # fmt: skip

    def test_is_known_to_the_next_life(self):
        roster = greeted()
        roster.frame(frame(0), 3.0)

        again = roster_with(alice(roster).as_stored(), now=100.0)

        assert (10, 10, "live", 2) == (
            alice(again).next, alice(again).stored, alice(again).state, alice(again).hello["rank"],
        )  # fmt: skip


def greeted_entry(first: int) -> Entry:
    hello = Hello(
        session=ALICE, first=first, rank=2, world=4, launch="L", more=True, settings={"project": "p"},
        offered=50, dropped={"outbox_full": 7},
    )  # fmt: skip
    return roster_with().hello(hello, 5.0)


class TestBye:
    def test_before_everything_is_committed_is_early(self):
        roster = greeted()
        roster.frame(frame(0), 0.0)

        assert roster.bye(Bye(session=ALICE, first=10), 0.0) == (Verdict.GAP, None)
        assert alice(roster).state == "live"

    def test_ends_a_session(self):
        roster = greeted()
        roster.frame(frame(0), 0.0)
        commit(roster)

        verdict, entry = roster.bye(Bye(session=ALICE, first=10, offered=12, exit_code=1), 4.0)

        assert verdict is Verdict.TAKE
        assert entry is not None
        assert (EntryKind.BYE, 10, 12, 1) == (
            entry.kind, entry.first, entry.facts["offered"], entry.facts["exit_code"],
        )  # fmt: skip
        assert roster.live == []

    def test_said_again_is_answered_and_not_stored_again(self):
        roster = greeted()
        roster.bye(Bye(session=ALICE, first=0), 0.0)

        assert roster.bye(Bye(session=ALICE, first=0), 0.0) == (Verdict.DUPLICATE, None)

    def test_of_a_stranger_is_a_strangers(self):
        assert roster_with().bye(Bye(session=ALICE, first=0), 0.0) == (Verdict.STRANGER, None)

    def test_is_not_undone_by_a_heartbeat(self):
        roster = greeted()
        roster.bye(Bye(session=ALICE, first=0), 0.0)

        roster.heartbeat(Status(session=ALICE, offered=3), 1.0)

        assert alice(roster).state == "bye"
        assert roster.expire(1000.0) == []

    def test_is_undone_by_a_new_hello(self):
        roster = greeted()
        roster.bye(Bye(session=ALICE, first=0), 0.0)

        roster.hello(Hello(session=ALICE), 1.0)

        assert [alice(roster)] == roster.live


class TestLease:
    def test_ends_after_a_silence(self):
        roster = greeted(now=0.0)

        assert roster.expire(LEASE_S - 1) == []
        assert [EntryKind.LEASE] == [entry.kind for entry in roster.expire(LEASE_S)]
        assert roster.live == []

    def test_ends_once(self):
        roster = greeted()
        roster.expire(LEASE_S)

        assert roster.expire(2 * LEASE_S) == []

    def test_says_how_far_the_session_came(self):
        """So that what was lost behind its last frame can be counted."""
        roster = greeted()
        roster.frame(frame(0), 0.0)

        assert [10] == [entry.first for entry in roster.expire(LEASE_S)]

    def test_is_prolonged_by_anything_said(self):
        for said in (
            lambda roster: roster.frame(frame(0), 50.0),
            lambda roster: roster.frame(frame(99), 50.0),
            lambda roster: roster.heartbeat(Status(session=ALICE), 50.0),
            lambda roster: roster.hello(Hello(session=ALICE), 50.0),
        ):
            roster = greeted(now=0.0)
            said(roster)

            assert roster.expire(100.0) == []

    def test_begins_afresh_when_intake_starts(self):
        roster = roster_with(StoredSession(id=ALICE, next=0, heard=0.0), now=1000.0)

        assert roster.expire(1000.0 + LEASE_S - 1) == []
        assert len(roster.expire(1000.0 + LEASE_S)) == 1

    def test_is_not_counted_while_nobody_listened(self):
        """An intake that was frozen has their messages in its socket still to read."""
        roster = greeted(now=0.0)

        roster.excuse(500.0)

        assert roster.expire(500.0 + LEASE_S - 1) == []
        assert len(roster.expire(500.0 + LEASE_S)) == 1

    def test_who_speaks_again_is_live_again(self):
        for said in (
            lambda roster: roster.frame(frame(0), 70.0),
            lambda roster: roster.heartbeat(Status(session=ALICE), 70.0),
            lambda roster: roster.hello(Hello(session=ALICE), 70.0),
        ):
            roster = greeted(now=0.0)
            roster.expire(LEASE_S)

            said(roster)

            assert [alice(roster)] == roster.live

    def test_of_all_ends_with_the_command(self):
        roster = greeted()
        roster.hello(Hello(session=BOB), 0.0)
        roster.bye(Bye(session=BOB, first=0), 0.0)

        assert [ALICE] == [entry.session for entry in roster.end_all(0.0)]


class TestCounters:
    def test_never_go_back(self):
        """Messages of two connections may overtake each other."""
        roster = greeted()
        roster.heartbeat(Status(session=ALICE, offered=50, dropped={"a": 5, "b": 1}, values_refused=7), 0.0)

        roster.heartbeat(Status(session=ALICE, offered=40, dropped={"a": 4, "c": 2}), 0.0)

        assert {"offered": 50, "dropped": {"a": 5, "b": 1, "c": 2}, "values_refused": 7} == alice(roster).counters

    def test_new_drops_become_an_entry(self):
        roster = greeted()

        entry = roster.heartbeat(Status(session=ALICE, offered=50, dropped={"a": 5}), 0.0)

        assert entry is not None
        assert entry.kind is EntryKind.COUNTERS
        assert {"offered": 50, "dropped": {"a": 5}, "values_refused": 0, "more": False} == entry.facts

    def test_having_caught_up_without_a_frame_becomes_an_entry(self):
        """HELLO said that there was more, and all of it was here already: nobody need wait for it."""
        roster = roster_with()
        roster.hello(Hello(session=ALICE, more=True), 0.0)

        entry = roster.heartbeat(Status(session=ALICE, more=False), 0.0)

        assert entry is not None
        assert (EntryKind.COUNTERS, False) == (entry.kind, entry.facts["more"])

    def test_after_a_pause_of_the_daemon_the_next_heartbeat_tells_who_has_caught_up(self):
        roster = greeted()
        roster.excuse(10.0)

        entry = roster.heartbeat(Status(session=ALICE), 10.0)

        assert entry is not None
        assert entry.facts["more"] is False
        assert roster.heartbeat(Status(session=ALICE), 11.0) is None

    def test_a_heartbeat_without_new_drops_becomes_none(self):
        roster = greeted()
        roster.heartbeat(Status(session=ALICE, dropped={"a": 5}), 0.0)

        assert roster.heartbeat(Status(session=ALICE, offered=60, dropped={"a": 5}), 0.0) is None
        assert roster.heartbeat(Status(session=BOB), 0.0) is None

    def test_are_known_to_the_next_life(self):
        roster = greeted()
        roster.heartbeat(Status(session=ALICE, offered=50, dropped={"a": 5}, values_refused=2), 0.0)

        again = roster_with(alice(roster).as_stored())

        assert {"offered": 50, "dropped": {"a": 5}, "values_refused": 2} == alice(again).counters

    def test_fit_into_an_entry_however_large(self):
        roster = greeted()

        entry = roster.heartbeat(Status(session=ALICE, offered=2**63 - 1, dropped={"a": 2**63 - 1}), 0.0)

        assert entry is not None
        assert msgpack.unpackb(entry.body)["dropped"] == {"a": 2**63 - 1}


class TestSamplers:
    def test_keep_no_run_open(self):
        roster = roster_with()
        roster.hello(Hello(session=ALICE, role=SAMPLER), 0.0)

        assert [] == roster.live == roster.workers
        assert [ALICE] == [entry.session for entry in roster.end_all(1.0)]

    def test_lose_their_lease_as_all_do(self):
        roster = roster_with()
        roster.hello(Hello(session=ALICE, role=SAMPLER), 0.0)
        assert [ALICE] == [entry.session for entry in roster.expire(LEASE_S)]

    def test_are_known_again_from_the_spool(self):
        roster = roster_with()
        roster.hello(Hello(session=ALICE, role=SAMPLER), 0.0)
        assert [] == roster_with(alice(roster).as_stored()).workers

    def test_are_no_ranks_of_a_world_and_end_with_nothing(self):
        """One that was killed says nothing of the training, and no restart of a launch ends one."""
        roster = roster_with()
        roster.hello(Hello(session=ALICE, launch=SAMPLER, role=SAMPLER, world=2), 0.0)
        roster.hello(Hello(session=BOB, launch="L"), 0.0)
        roster.bye(Bye(session=BOB, first=0, exit_code=0), 0.0)

        assert [] == roster.supersede(Hello(session=BOB, launch=SAMPLER, attempt=1), 1.0)
        assert [ALICE] == [entry.session for entry in roster.end_all(1.0)]
        assert (0, True) == (roster.exit_code, roster.is_full_world)


class TestTakeBack:
    """A commit had no room."""

    def test_frames_are_wanted_again_from_the_first(self):
        roster = greeted()
        entries = [Entry.of_frame(frame(first), received=0.0) for first in (0, 10)]
        for entry in entries:
            roster.frame(frame(entry.first), 0.0)

        left = roster.take_back(entries)

        assert [] == left
        assert roster.frame(frame(10), 0.0) is Verdict.GAP
        assert roster.frame(frame(0), 0.0) is Verdict.TAKE

    def test_what_happened_to_sessions_stays(self):
        roster = roster_with()
        hello = roster.hello(Hello(session=ALICE, first=3), 0.0)
        roster.frame(frame(3), 0.0)

        left = roster.take_back([hello, Entry.of_frame(frame(3), received=0.0)])

        assert [hello] == left
        assert 3 == alice(roster).next

    def test_the_end_of_a_lease_tells_of_no_more_than_is_there(self):
        roster = greeted()
        roster.frame(frame(0), 0.0)
        (end,) = roster.end_all(0.0)

        (left,) = roster.take_back([Entry.of_frame(frame(0), received=0.0), end])

        assert (EntryKind.LEASE, 0) == (left.kind, left.first)

    def test_a_session_that_is_told_to_wait_is_not_waited_for_without_end(self):
        """Its rows must leave for room to come of them."""
        roster = roster_with()
        roster.hello(Hello(session=ALICE, more=True), 0.0)

        first, second = roster.hold(ALICE, 5.0), roster.hold(ALICE, 6.0)

        assert first is not None
        assert not first.facts["more"]
        assert (None, 6.0) == (second, alice(roster).heard)


class TestExitCode:
    """What the run comes to, by what its workers ended with."""

    def roster(self) -> Roster:
        return Roster(lease=60.0, now=0.0)

    def ended(self, roster: Roster, session: bytes, code: int | None, *, at: float = 0.0, **facts: Any) -> None:
        roster.hello(Hello(session=session, **facts), at)
        if code is not None:
            roster.bye(Bye(session=session, first=0, exit_code=code), at)
        else:
            roster.lose(session, at)

    def test_all_is_well_when_everybody_said_so(self):
        roster = self.roster()
        for rank in range(2):
            self.ended(roster, bytes([rank] * 16), 0, rank=rank)

        assert 0 == roster.exit_code

    def test_it_is_that_of_the_first_that_failed(self):
        roster = self.roster()
        for rank, code in enumerate((0, 3, 4)):
            self.ended(roster, bytes([rank] * 16), code, rank=rank)

        assert 3 == roster.exit_code

    def test_one_that_ended_without_a_word_is_a_failure(self):
        roster = self.roster()
        self.ended(roster, bytes(16), None)

        assert 1 == roster.exit_code

    def test_a_later_attempt_makes_up_for_it(self):
        roster = self.roster()
        self.ended(roster, bytes(16), None, launch="L")
        self.ended(roster, bytes([1] * 16), 0, launch="L", attempt=1)

        assert 0 == roster.exit_code

    def test_a_fork_that_was_left_behind_says_nothing_of_the_training(self):
        roster = self.roster()
        self.ended(roster, bytes([9] * 16), 0, launch="L", at=1.0)
        self.ended(roster, bytes(16), None, launch="L", at=2.0)

        assert 0 == roster.exit_code

    def test_it_is_the_same_after_a_restart(self):
        roster = self.roster()
        self.ended(roster, bytes([9] * 16), 0, launch="L", at=1.0)
        self.ended(roster, bytes(16), None, launch="L", at=2.0)
        self.ended(roster, bytes([1] * 16), 5, rank=1, launch="L", at=3.0)

        again = Roster([one.as_stored() for one in roster.sessions.values()], lease=60.0, now=9.0)

        assert roster.exit_code == again.exit_code == 5


class TestAttempts:
    def test_a_higher_restart_count_ends_the_older_sessions_of_its_launch(self):
        roster = greeted()

        ended = roster.supersede(Hello(session=BOB, first=0, rank=2, world=4, launch="L", attempt=1), 5.0)

        assert [(EntryKind.LEASE, ALICE)] == [(entry.kind, entry.session) for entry in ended]
        assert [] == roster.live

    def test_it_ends_no_other_launch_and_none_of_its_own_attempt(self):
        roster = greeted()

        assert [] == roster.supersede(Hello(session=BOB, first=0, launch="other", attempt=1), 5.0)
        assert [] == roster.supersede(Hello(session=BOB, first=0, launch="L"), 5.0)


class TestFullWorld:
    def test_it_is_when_every_rank_of_every_launch_was_there(self):
        roster = roster_with()
        roster.hello(Hello(session=ALICE, rank=0, world=2, launch="L"), 0.0)
        assert not roster.is_full_world

        roster.hello(Hello(session=BOB, rank=1, world=2, launch="L"), 0.0)

        assert roster.is_full_world
