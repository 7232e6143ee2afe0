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


class Shelves:
    """A shelf in memory, that can be full and can lose what it holds."""

    def __init__(self, places: int = 1_000) -> None:
        self.frames: dict[int, Frame] = {}
        self.places = places
        self.cleared = 0
        self.why = DropReason.SPILL_FULL

    def put(self, frame: Frame) -> int | None:
        if len(self.frames) >= self.places:
            return None
        self.frames[frame.first] = frame
        return frame.first

    def get(self, place: int) -> Frame | None:
        return self.frames.get(place)

    def clear(self) -> None:
        self.frames.clear()
        self.cleared += 1


def shelving(*records: bytes, places: int = 1_000) -> tuple[Outbox, Shelves]:
    shelf = Shelves(places)
    box = Outbox(SESSION, 1 << 20, shelf)
    box.credit = 1 << 20
    for record in records:
        box.offer(record)
    return box, shelf


class TestShelf:
    def test_what_is_shelved_takes_no_memory_and_is_still_pending(self):
        box, _ = shelving(b"x" * 1000, b"y" * 1000)

        box.shelve()

        assert (1 << 20, 2) == (box.room, box.pending)

    def test_it_is_sent_before_what_came_later(self):
        box, _ = shelving(b"one")
        box.shelve()
        box.offer(b"two")

        assert [b"one", b"two"] == [frame.body for frame in frames(box)]

    def test_what_was_under_way_is_shelved_first_so_that_the_shelf_has_no_hole(self):
        box, shelf = shelving(b"one")
        frames(box)
        box.offer(b"two")

        while box.shelve():
            pass

        assert [0, 1] == sorted(shelf.frames)
        assert box.shelved == 2

    def test_it_is_cleared_when_all_of_it_is_acknowledged(self):
        box, shelf = shelving(b"one")
        box.shelve()
        frames(box)

        box.ack(1)

        assert 1 == shelf.cleared
        assert (0, 1 << 20) == (box.pending, box.room)

    def test_a_daemon_that_has_it_already_is_not_sent_it(self):
        box, _ = shelving(b"one")
        box.shelve()
        box.offer(b"two")

        box.ack(1)

        assert [b"two"] == [frame.body for frame in frames(box)]

    def test_a_full_one_leaves_things_in_memory_with_its_reason(self):
        box, _ = shelving(b"one", places=0)

        taken = box.shelve()

        assert (False, DropReason.SPILL_FULL, 1) == (taken, box.full, box.pending)
        assert [b"one"] == [frame.body for frame in frames(box)]

    def test_what_can_not_be_read_back_is_passed_over_once_all_before_it_is_acknowledged(self):
        box, shelf = shelving(b"one")
        box.shelve()
        box.offer(b"two")
        box.shelve()
        box.offer(b"three")
        frames_before = len(shelf.frames)
        del shelf.frames[1]

        first = frames(box)
        box.ack(1)
        rest = frames(box) + frames(box)

        assert 2 == frames_before
        assert [b"one"] == [frame.body for frame in first]
        assert [b"three"] == [frame.body for frame in rest]
        assert (1, 2) == (box.lost, box.acknowledged)

    def test_at_the_end_what_is_not_on_it_is_given_up_and_counted(self):
        box, _ = shelving(b"one", places=1)
        box.shelve()
        box.offer(b"two")
        box.shelve()

        box.keep_what_is_shelved(DropReason.SPILL_FULL)

        assert (1, {"spill_full": 1}, 2) == (box.pending, box.dropped, box.offered)
        assert ledger_balances(box)

    def test_giving_up_gives_up_the_shelf_too(self):
        box, shelf = shelving(b"one")
        box.shelve()
        box.offer(b"two")

        box.abandon(DropReason.REFUSED)

        assert ({"refused": 2}, 0, {}) == (box.dropped, box.pending, shelf.frames)

    def test_a_large_window_does_not_take_all_memory(self):
        """Or there would be none left to shelve from."""
        box, _ = shelving()
        box.credit = 1 << 30
        while box.offer(b"x" * 10_000):
            pass

        sent = sum(len(frame.body) for frame in frames(box))

        assert sent <= (1 << 20) // 4


class Line(RuleBasedStateMachine):
    """An outbox, a wire that loses and repeats, and a daemon that stores what it wants next."""

    on_wire = Bundle("on_wire")

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelves(places=6)
        self.box = Outbox(SESSION, 400, self.shelf)
        self.box.credit = 100
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

    @rule()
    def shelve(self) -> None:
        before = self.box.room
        if self.box.shelve():
            assert self.box.room >= before

    @rule()
    def the_shelf_holds_all_that_is_unacknowledged_up_to_its_end(self) -> None:
        """So that it makes sense when the process is killed now."""
        if self.box.shelved:
            have = [frame for frame in self.shelf.frames.values() if frame.end > self.box.acknowledged]
            assert self.box.shelved == sum(frame.end - max(frame.first, self.box.acknowledged) for frame in have)

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
        assert self.box.room >= -100  # what came back from the shelf has a right to be there

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
