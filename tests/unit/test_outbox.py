"""The outbox: nothing lost, nothing twice, and a ledger that balances at any moment."""

from __future__ import annotations

import sys
import threading
from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from sidestep.outbox import MAX_WINDOW_FRAMES, DropReason, Outbox
from sidestep.wire import MAX_FRAME_BYTES, Frame, checksum

SESSION = bytes(range(16))


def outbox(*records: bytes, limit: int = 1 << 20, credit: int = 1 << 20) -> Outbox:
    made = Outbox(SESSION, limit)
    made.credit = credit
    for record in records:
        made.offer(record)
    return made


def frames(box: Outbox) -> list[Frame]:
    """All that may be sent now."""
    return list(iter(box.next_frame, None))


def ledger_balances(box: Outbox) -> bool:
    return box.offered == box.acknowledged + box.pending + sum(box.dropped.values())


class TestFrames:
    def test_records_are_joined_in_order_under_sequences_from_zero(self):
        box = outbox(b"one", b"two")

        cut = frames(box)

        expected = Frame(session=SESSION, first=0, count=2, body=b"onetwo", crc=checksum(b"onetwo"))
        assert [expected] == cut

    def test_the_next_frame_goes_on_where_the_last_one_ended(self):
        box = outbox(b"one")
        frames(box)
        box.offer(b"two")

        (second,) = frames(box)

        assert (1, b"two") == (second.first, second.body)

    def test_a_frame_holds_no_more_than_the_wire_allows(self):
        third = b"x" * (MAX_FRAME_BYTES // 3 + 1)
        box = outbox(third, third, third, limit=MAX_FRAME_BYTES * 2, credit=MAX_FRAME_BYTES * 2)

        counts = [frame.count for frame in frames(box)]

        assert [2, 1] == counts

    def test_a_frame_says_that_more_waits_behind_it(self):
        half = b"x" * (MAX_FRAME_BYTES // 2 + 1)
        box = outbox(half, half, limit=MAX_FRAME_BYTES * 2, credit=MAX_FRAME_BYTES * 2)

        more = [frame.more for frame in frames(box)]

        assert [True, False] == more

    def test_nothing_is_cut_of_nothing(self):
        assert outbox().next_frame() is None


class TestWindow:
    def test_no_more_than_the_credit_is_under_way(self):
        box = outbox(b"x" * 600, credit=1000)
        frames(box)
        box.offer(b"y" * 600)

        beyond = box.next_frame()

        assert beyond is None

    def test_one_frame_is_under_way_even_without_credit(self):
        box = outbox(b"x", credit=0)

        assert box.next_frame() is not None

    def test_an_acknowledgement_makes_room_for_the_next_frame(self):
        box = outbox(b"x" * 600, credit=1000)
        frames(box)
        box.offer(b"y" * 600)

        box.ack(1)

        assert [b"y" * 600] == [frame.body for frame in frames(box)]

    def test_there_are_never_more_frames_than_a_socket_queues(self):
        box = outbox()
        sent = 0
        for _ in range(MAX_WINDOW_FRAMES + 5):
            box.offer(b"x")
            sent += len(frames(box))

        assert sent == MAX_WINDOW_FRAMES
        assert box.pending == MAX_WINDOW_FRAMES + 5

    def test_an_old_acknowledgement_is_no_news(self):
        box = outbox(b"x")
        frames(box)
        box.ack(1)

        news = box.ack(0)

        assert news is False
        assert box.acknowledged == 1

    def test_rewinding_sends_the_same_frames_again(self):
        box = outbox(b"one")
        first = frames(box)
        box.offer(b"two")
        first += frames(box)

        box.rewind()

        assert [(frame.first, frame.body) for frame in first] == [
            (frame.first, frame.body) for frame in frames(box)
        ]

    def test_what_was_acknowledged_is_not_sent_again(self):
        box = outbox(b"one")
        frames(box)
        box.offer(b"two")
        frames(box)
        box.ack(1)

        box.rewind()

        assert [b"two"] == [frame.body for frame in frames(box)]


class TestBounds:
    def test_what_does_not_fit_is_not_taken(self):
        box = outbox(b"x" * 60, limit=100)

        taken = box.offer(b"x" * 60)

        assert taken is False
        assert box.pending == 1

    def test_unacknowledged_frames_take_room_too(self):
        box = outbox(b"x" * 60, limit=100)
        frames(box)

        assert box.offer(b"x" * 60) is False

    def test_what_is_acknowledged_gives_its_room_back(self):
        box = outbox(b"x" * 60, limit=100)
        frames(box)
        box.ack(1)

        assert box.offer(b"x" * 60) is True
        assert box.room == 40

    def test_a_closed_outbox_takes_nothing_and_still_delivers(self):
        box = outbox(b"one")

        box.close(DropReason.AFTER_FINISH)

        assert box.offer(b"two") is False
        assert [b"one"] == [frame.body for frame in frames(box)]

    def test_the_first_reason_for_closing_stays(self):
        box = outbox()
        box.close(DropReason.REFUSED)

        box.close(DropReason.AFTER_FINISH)

        assert box.shut is DropReason.REFUSED

    def test_giving_up_counts_sent_and_unsent_alike(self):
        box = outbox(b"one")
        frames(box)
        box.offer(b"two")

        box.abandon(DropReason.REFUSED)

        assert box.dropped == {"refused": 2}
        assert box.pending == 0
        assert ledger_balances(box)


class TestThreads:
    def test_the_ledger_is_exact_however_threads_and_sender_interleave(self):
        """The counters have no lock; a switch at every bytecode that allows one must not break them."""
        each, threads = 3000, 4
        limit = 50_000
        box = outbox(limit=limit, credit=2000)
        record = b"x" * 20

        def offer() -> None:
            for _ in range(each):
                if not box.offer(record):
                    box.drop(DropReason.OUTBOX_FULL)

        def watch() -> None:
            before = 0
            while True:
                now = box.offered
                if now < before:
                    dips.append(before - now)
                if (before := now) == each * threads:
                    return

        dips: list[int] = []
        seen: deque[int] = deque()
        workers = [threading.Thread(target=target) for target in [watch, *[offer] * threads]]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers) or box.pending:
                while (frame := box.next_frame()) is not None:
                    seen.append(frame.count)
                    box.ack(frame.end)
        finally:
            sys.setswitchinterval(interval)

        assert box.offered == each * threads
        assert box.acknowledged == sum(seen)
        assert box.room == limit
        assert [] == dips
        assert ledger_balances(box)


class Line(RuleBasedStateMachine):
    """An outbox, a wire that loses and repeats, and a daemon that stores what it wants next."""

    on_wire = Bundle("on_wire")

    def __init__(self) -> None:
        super().__init__()
        self.box = outbox(limit=400, credit=100)
        self.accepted: list[bytes] = []
        self.refused = 0
        self.stored = b""
        self.wanted = 0
        self.bodies: dict[int, bytes] = {}

    @rule(size=st.integers(1, 60))
    def offer(self, size: int) -> None:
        record = bytes([len(self.accepted) % 256]) * size
        if self.box.offer(record):
            self.accepted.append(record)
        else:
            self.box.drop(DropReason.OUTBOX_FULL)
            self.refused += 1

    @rule(target=on_wire)
    def send(self) -> Frame | None:
        frame = self.box.next_frame()
        if frame is not None:
            assert self.bodies.setdefault(frame.first, frame.body) == frame.body
        return frame

    @rule(frame=consumes(on_wire))
    def lose(self, frame: Frame | None) -> None:
        pass

    @rule(frame=on_wire)
    def arrive(self, frame: Frame | None) -> None:
        if frame is not None and frame.first == self.wanted:
            self.stored += frame.body
            self.wanted = frame.end

    @rule()
    def acknowledge(self) -> None:
        self.box.ack(self.wanted)

    @rule()
    def rewind(self) -> None:
        self.box.rewind()

    @invariant()
    def the_ledger_balances(self) -> None:
        assert ledger_balances(self.box)
        assert self.box.offered == len(self.accepted) + self.refused
        assert self.box.room >= 0

    def teardown(self) -> None:
        """After the faults, everything that was accepted arrives, once and in order."""
        while self.box.pending:
            self.box.ack(self.wanted)
            self.box.rewind()
            for frame in frames(self.box):
                self.arrive_late(frame)
        assert b"".join(self.accepted) == self.stored
        assert self.box.room == 400

    def arrive_late(self, frame: Frame) -> None:
        if frame.first == self.wanted:
            self.stored += frame.body
            self.wanted = frame.end


Line.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestGoBackN = Line.TestCase
