"""What a relay says above: a real roster as the daemon there, a spool as a list, and every kind of loss."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep.wire import (
    BLOBS,
    RELAY,
    SAMPLER,
    Ack,
    Bye,
    Frame,
    Hello,
    Message,
    Refuse,
    RunInfo,
    Status,
    Welcome,
    checksum,
)
from sidestepd.entries import Entry, EntryKind
from sidestepd.relays import Relays
from sidestepd.roster import Roster, Verdict
from sidestepd.upstream.legs import Legs, Settling, Upper
from sidestepd.upstream.passage import Carried, Passage
from tests.support.builders import session_id

RELAY_ID = b"r" * 16
LEASE_S, RELAY_LEASE_S = 60.0, 300.0


class Above:
    """The daemon above: its roster, and the records it has of each session."""

    def __init__(self) -> None:
        self.lost_disk = 0
        self.begin()

    def begin(self, stored: Roster | None = None) -> None:
        """A life begins: all that was committed is known, no connection is."""
        kept = [s.as_stored() for s in stored.sessions.values()] if stored else []
        self.roster = Roster(kept, lease=LEASE_S, relay_lease=RELAY_LEASE_S, now=0.0)
        self.relays = Relays(self.roster, heartbeat_s=5.0, patience_s=4.0)
        self.greeted: set[bytes] = set()
        if stored is None:
            self.records: dict[bytes, list[int]] = {}
            self.entries: list[Entry] = []

    def hear(self, message: Message, now: float) -> list[Message]:
        session = message.session
        if isinstance(message, Hello):
            self.entries.append(self.roster.hello(message, now))
            self.greeted.add(session)
            wanted = self.roster.sessions[session].stored
            return [Welcome(session=session, first=wanted, boot="b", credit=2000, run={"id": "above"})]
        if session not in self.greeted:
            return [Refuse(session=session, code="hello")]
        match message:
            case Frame():
                return [self._frame(message, now)]
            case Status():
                self.entries += filter(None, [self.roster.heartbeat(message, now)])
                self.entries += self.relays.hear(message, now)
            case RunInfo():
                return [RunInfo(session=session, info={"url": "https://above"})]
            case Bye():
                return self._bye(message, now)
        return []

    def _frame(self, frame: Frame, now: float) -> Ack:
        session = self.roster.sessions[frame.session]
        if self.roster.frame(frame, now) is Verdict.GAP:
            return Ack(session=frame.session, first=session.next, gap=True)
        if session.next == frame.end and session.stored < frame.end:
            self.records.setdefault(frame.session, []).extend(range(frame.first, frame.end))
        session.stored = session.next
        return Ack(session=frame.session, first=session.stored)

    def _bye(self, bye: Bye, now: float) -> list[Message]:
        verdict, entry = self.roster.bye(bye, now)
        if verdict is Verdict.GAP:
            return [Refuse(session=bye.session, code="bye_early")]
        self.entries += [entry] if entry else []
        return [bye]


@dataclass
class Relay:
    """A relay's legs, and the spool that they are read from."""

    above: Above
    spool: list[Entry] = field(default_factory=list)
    lives: int = 0

    def __post_init__(self) -> None:
        self.saved: tuple[int, dict[bytes, dict[str, Any]]] = (0, {})
        self.begin()

    def begin(self) -> None:
        self.lives += 1
        self.legs = Legs(Upper(relay=RELAY_ID, run="ours"), jitter=lambda: 0.0, behind=lambda: False)
        cursor, sessions = self.saved
        self.legs.restore(sessions)
        self.legs.introduce()
        self.settling = Settling(cursor)
        self.read_through = cursor
        self.now = 1000.0 * self.lives

    def settle(self) -> None:
        """Write down how far it is, and delete what is settled."""
        self.settling.look(self.legs)
        self.saved = (self.settling.cursor, self.legs.state())
        self.spool = [entry for entry in self.spool if entry.id > self.settling.cursor]

    def write(self, entry: Entry) -> None:
        last = self.spool[-1].id if self.spool else self.read_through
        fields = ("kind", "session", "first", "count", "more", "crc", "received", "body")
        self.spool.append(Entry(id=last + 1, **{name: getattr(entry, name) for name in fields}))

    def hello(self, session: bytes, *, first: int = 0, **facts: Any) -> None:
        said = {"rank": 0, "world": 1, "launch": "L", "node": "n", "pid": 1, "attempt": 0, **facts}
        self.write(Entry.of_event(EntryKind.HELLO, session, first=first, received=0.0, settings={}, **said))

    def frame(self, session: bytes, first: int, count: int = 10, *, more: bool = False) -> None:
        body = bytes(count)
        frame = Frame(session=session, first=first, count=count, body=body, crc=checksum(body), more=more)
        self.write(Entry.of_frame(frame, received=0.0))

    def event(self, kind: EntryKind, session: bytes, *, first: int = 0, **facts: Any) -> None:
        self.write(Entry.of_event(kind, session, first=first, received=0.0, **facts))

    def read(self) -> None:
        for entry in self.spool:
            if entry.id <= self.read_through:
                continue
            self.read_through = entry.id
            if entry.kind is EntryKind.FRAME:
                self.legs.carry(entry.session, carried(entry), more=entry.more)
            else:
                self.legs.read(entry)
            self.settling.wait(entry)

    def talk(self, rounds: int = 12, *, drop: set[int] = frozenset()) -> list[Message]:  # type: ignore[assignment]
        """Let both speak; the messages in `drop` are lost on their way, counted over both directions."""
        said: list[Message] = []
        number = 0
        self.read()
        for _ in range(rounds):
            self.now += 3.0
            for message in list(self.legs.say(self.now, self.now)):
                number += 1
                said.append(message)
                if number in drop:
                    continue
                for answer in self.above.hear(message, self.now):
                    number += 1
                    if number not in drop:
                        self.legs.hear(answer, self.now)
        return said


def carried(entry: Entry) -> Carried:
    frame = Frame(
        session=entry.session,
        first=entry.first,
        count=entry.count,
        body=entry.body,
        crc=entry.crc,
        more=entry.more,
    )
    return Carried(first=entry.first, count=entry.count, size=len(entry.body), load=lambda: frame)


def relay_with(*ranks: int) -> Relay:
    relay = Relay(Above())
    for rank in ranks:
        relay.hello(session_id(rank), rank=rank, world=len(ranks))
    return relay


class TestAFrame:
    def test_goes_up_uncut_under_its_own_sequences_and_settles_its_entry(self):
        relay = relay_with(0)
        relay.frame(session_id(0), 0, 10)
        relay.frame(session_id(0), 10, 5)

        relay.talk()
        relay.settle()

        assert [*range(15)] == relay.above.records[session_id(0)]
        assert ([], 15) == (relay.spool, relay.settling.delivered)

    def test_stays_as_long_as_nobody_says_that_it_is_above(self):
        relay = relay_with(0)
        relay.frame(session_id(0), 0)
        relay.read()
        list(relay.legs.say(1.0, 1.0))

        relay.settle()

        assert [EntryKind.FRAME] == [entry.kind for entry in relay.spool]

    def test_that_is_above_already_is_not_sent_again_by_a_forwarder_that_was_killed(self):
        relay = relay_with(0)
        relay.frame(session_id(0), 0)
        relay.talk()
        relay.begin()

        said = relay.talk()

        assert not [message for message in said if isinstance(message, Frame)]
        relay.settle()
        assert [] == relay.spool

    def test_says_that_more_is_behind_it(self):
        relay = relay_with(0)
        relay.frame(session_id(0), 0)
        relay.frame(session_id(0), 10)

        frames = [message for message in relay.talk() if isinstance(message, Frame)]

        assert [True, False] == [frame.more for frame in frames]

    def test_that_a_relay_has_lost_is_counted_above(self):
        relay = relay_with(0)
        relay.frame(session_id(0), 0)
        relay.frame(session_id(0), 25)

        relay.talk()

        assert [*range(10), *range(25, 35)] == relay.above.records[session_id(0)]
        firsts = [entry.first for entry in relay.above.entries if entry.kind is EntryKind.HELLO]
        assert 25 in firsts, "HELLO says where it goes on, and delivery counts what lies between"
        assert 15 == relay.legs.lost

    def test_of_the_end_that_a_relay_has_lost_is_counted_above_too(self):
        relay = relay_with(0)
        relay.frame(session_id(0), 0)
        relay.event(EntryKind.BYE, session_id(0), first=30, exit_code=0, offered=30)

        relay.talk()

        assert "bye" == relay.above.roster.sessions[session_id(0)].state
        assert 30 == relay.above.roster.sessions[session_id(0)].next


class TestSessions:
    def test_are_introduced_as_they_are_behind_their_relay(self):
        relay = relay_with(0, 1)

        relay.talk()

        sessions = relay.above.roster.sessions
        assert (1, 2, "n", RELAY_ID.hex()) == tuple(
            sessions[session_id(1)].hello[name] for name in ("rank", "world", "node", "relay")
        )
        assert RELAY == sessions[RELAY_ID].hello["role"]

    def test_end_above_as_they_ended_here(self):
        relay = relay_with(0, 1)
        relay.frame(session_id(0), 0)
        relay.event(EntryKind.BYE, session_id(0), first=10, exit_code=3, offered=12, dropped={"outbox_full": 2})
        relay.event(EntryKind.LEASE, session_id(1), first=0, offered=7)

        relay.talk()

        one, other = (relay.above.roster.sessions[session_id(rank)] for rank in range(2))
        assert ("bye", 3, 12, {"outbox_full": 2}) == (one.state, one.exit_code, one.offered, one.dropped)
        assert ("lease", 7) == (other.state, other.offered)

    def test_that_speak_after_their_lease_are_live_above_again(self):
        relay = relay_with(0)
        relay.event(EntryKind.LEASE, session_id(0))
        relay.talk()
        relay.settle()
        relay.begin()
        relay.frame(session_id(0), 0)

        relay.talk()

        assert "live" == relay.above.roster.sessions[session_id(0)].state
        assert [*range(10)] == relay.above.records[session_id(0)]

    def test_that_are_no_rank_wait_until_it_is_known_which_run_is_meant(self):
        relay = relay_with()
        relay.legs = Legs(Upper(relay=RELAY_ID), jitter=lambda: 0.0, behind=lambda: False)
        relay.legs.introduce()
        relay.hello(session_id(7), role=SAMPLER)

        assert [] == relay.talk()
        relay.hello(session_id(0))
        relay.talk()

        assert {session_id(7), session_id(0), RELAY_ID} == relay.above.greeted

    @pytest.mark.parametrize("state", ["quiet", "gone"])
    def test_of_which_nothing_is_heard_here_are_told_of(self, state: str):
        relay = relay_with(0)
        relay.talk()
        relay.event(EntryKind.VITAL, session_id(0), state=state, since=relay.now - 7.0)

        relay.talk(rounds=1)

        told = [entry for entry in relay.above.entries if entry.kind is EntryKind.VITAL]
        assert [(state, 10.0)] == [(it.facts["state"], it.received - it.facts["since"]) for it in told]

    def test_that_the_run_above_refuses_for_good_keep_their_frames_on_disk(self):
        relay = relay_with(0)
        relay.frame(session_id(0), 0)
        relay.read()
        list(relay.legs.say(1.0, 1.0))

        relay.legs.hear(Refuse(session=session_id(0), code="closed", final=True), 1.0)
        relay.settle()

        assert relay.legs.refused is not None
        assert [EntryKind.FRAME] == [entry.kind for entry in relay.spool]

    def test_that_nobody_needs_are_given_up_and_counted(self):
        relay = relay_with()
        relay.hello(session_id(7), role=SAMPLER)
        relay.frame(session_id(7), 0)
        relay.read()
        list(relay.legs.say(1.0, 1.0))

        relay.legs.hear(Refuse(session=session_id(7), code="closed", final=True), 1.0)
        relay.settle()

        assert ([], 10, None) == (relay.spool, relay.settling.refused, relay.legs.refused)

    def test_all_over_the_relay_says_its_last_word_with_the_exit_code(self):
        relay = relay_with(0)
        relay.event(EntryKind.BYE, session_id(0), exit_code=0)
        relay.talk()
        assert relay.legs.all_over

        relay.legs.leave(5)
        relay.talk()

        assert relay.legs.left
        assert ("bye", 5) == (
            relay.above.roster.sessions[RELAY_ID].state,
            relay.above.roster.sessions[RELAY_ID].exit_code,
        )


class TestRelaysAbove:
    def test_vouch_for_their_sessions(self):
        relay = relay_with(0)
        relay.talk(rounds=1)
        above, then = relay.above, relay.now + LEASE_S

        above.hear(Status(session=RELAY_ID), then)

        assert then == above.roster.sessions[session_id(0)].heard
        assert [] == above.roster.expire(then + LEASE_S)

    def test_that_are_cut_off_have_rows_wait_for_what_they_have(self):
        relay = relay_with(0)
        relay.talk(rounds=1)
        above = relay.above

        entries = above.relays.look(relay.now + 2.6) + above.relays.look(relay.now + 5.0)

        assert [(session_id(0), True)] == [(entry.session, entry.facts["more"]) for entry in entries]
        assert ["away"] == [it["state"] for it in above.relays.report()]

    def test_have_longer_leases(self):
        relay = relay_with(0)
        relay.talk(rounds=1)
        roster, now = relay.above.roster, relay.now

        assert [] == roster.expire(now + RELAY_LEASE_S - 1.0)
        assert 2 == len(roster.expire(now + RELAY_LEASE_S))


class TestAPassage:
    def test_keeps_within_the_credit(self):
        passage = Passage(session_id(0))
        passage.credit = 25
        for first in range(0, 50, 10):
            frame = Frame(session=session_id(0), first=first, count=10, body=bytes(10), crc=0)
            passage.add(Carried(first=first, count=10, size=10, load=lambda frame=frame: frame))

        sent = [frame.first for frame in iter(passage.next_frame, None)]
        passage.ack(10)

        assert [0, 10] == sent
        assert 20 == passage.next_frame().first
        assert 40 == passage.held

    def test_whose_file_is_gone_goes_on_behind_it(self):
        passage = Passage(session_id(0))
        frame = Frame(session=session_id(0), first=10, count=10, body=bytes(10), crc=0)
        passage.add(Carried(first=0, count=10, size=10, load=lambda: None))
        passage.add(Carried(first=10, count=10, size=10, load=lambda: frame))

        assert 10 == passage.next_frame().first
        assert (10, 10) == (passage.lost, passage.acknowledged)


Step = st.one_of(
    st.tuples(st.just("frame"), st.integers(0, 2), st.integers(1, 9)),
    st.tuples(st.sampled_from(["talk", "settle", "killed", "above killed", "cut", "bye", "lease", "lane"])),
)


class TestWhateverHappens:
    @settings(max_examples=60)
    @given(st.lists(Step, max_size=25), st.sets(st.integers(1, 40), max_size=15))
    def test_each_record_is_above_once_and_in_order(self, steps: list[tuple[Any, ...]], drop: set[int]):
        relay = relay_with(0, 1, 2)
        sent: Counter[int] = Counter()
        for what, *facts in steps:
            match what:
                case "frame":
                    rank, count = facts
                    relay.frame(session_id(rank), sent[rank], count)
                    sent[rank] += count
                case "talk":
                    relay.talk(rounds=2, drop=drop)
                case "settle":
                    relay.settle()
                case "killed":
                    relay.begin()
                case "above killed":
                    relay.above.begin(relay.above.roster)
                case "cut":
                    relay.legs.interrupted()
                case "bye":
                    relay.event(EntryKind.BYE, session_id(2), first=sent[2])
                    relay.hello(session_id(2), rank=2, world=3, first=sent[2])
                case "lease":
                    relay.event(EntryKind.LEASE, session_id(1), first=sent[1])
                case "lane":
                    relay.hello(session_id(9), role=BLOBS, beside=session_id(0).hex())

        relay.talk(rounds=30)
        relay.settle()

        for rank in range(3):
            assert [*range(sent[rank])] == relay.above.records.get(session_id(rank), [])
        assert ([], 0) == (relay.spool, relay.legs.lost)
