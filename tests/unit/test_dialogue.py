"""The worker's side of the protocol, without a socket and with a clock that the test moves."""

from __future__ import annotations

from typing import Any

import pytest

from sidestep.dialogue import ACK_TIMEOUT_S, HOLD_S, Dialogue, Phase
from sidestep.outbox import DropReason, Outbox
from sidestep.wire import NO_SESSION, Ack, Bye, Frame, Hello, Message, Refuse, RunInfo, Status, Welcome

SESSION = bytes(range(16))


class Worker:
    """A dialogue and its outbox."""

    def __init__(self, records: int = 0) -> None:
        self.outbox = Outbox(SESSION)
        self.dialogue = Dialogue(self.outbox, Hello(session=SESSION), jitter=lambda: 0.5)
        self.offer(records)

    def offer(self, count: int = 1) -> None:
        for _ in range(count):
            self.outbox.offer(b"x")

    def says(self, now: float) -> list[Message]:
        return list(iter(lambda: self.dialogue.say(now), None))

    def hears(self, kind: Any, now: float, **fields: Any) -> None:
        self.dialogue.hear(kind(**{"session": SESSION, **fields}), now)

    def welcomed(self, now: float = 0.0, first: int = 0, **fields: Any) -> None:
        self.says(now)
        self.hears(Welcome, now, **{"first": first, "boot": "1", "credit": 1 << 20, **fields})


def open_worker(records: int = 0) -> Worker:
    worker = Worker(records)
    worker.welcomed()
    return worker


def kinds(messages: list[Message]) -> list[type]:
    return [type(message) for message in messages]


class TestGreeting:
    def test_hello_comes_first_and_alone(self):
        worker = Worker(records=3)

        said = worker.says(0.0)

        assert [Hello(session=SESSION, more=True, offered=3)] == said

    def test_hello_is_repeated_ever_more_slowly(self):
        worker = Worker()
        times = []
        now = 0.0
        while now < 10:
            if worker.says(now):
                times.append(now)
            now += 0.25

        assert [0.0, 0.25, 0.75, 1.75, 3.75, 5.75, 7.75, 9.75] == times

    def test_frames_follow_the_welcome(self):
        worker = open_worker(records=2)

        (frame,) = worker.says(0.0)

        assert isinstance(frame, Frame)
        assert (0, 2) == (frame.first, frame.count)

    def test_what_the_daemon_has_already_is_not_sent(self):
        worker = open_worker(records=1)
        worker.says(0.0)
        worker.offer()
        worker.says(0.0)
        worker.dialogue.interrupted()

        worker.welcomed(now=1.0, first=1)

        (frame,) = worker.says(1.0)
        assert isinstance(frame, Frame)
        assert 1 == frame.first

    def test_hello_tells_the_first_unacknowledged_sequence(self):
        worker = open_worker(records=2)
        worker.says(0.0)
        worker.hears(Ack, 0.0, first=2)
        worker.dialogue.interrupted()

        (hello,) = worker.says(1.0)

        assert isinstance(hello, Hello)
        assert 2 == hello.first

    def test_the_welcome_to_a_repeated_hello_does_not_send_all_again(self):
        """A daemon that stood still answers every HELLO that had piled up."""
        worker = open_worker(records=1)
        worker.says(0.0)

        worker.hears(Welcome, 0.1, first=0, boot="1", credit=100)

        assert [] == worker.says(0.1)

    def test_a_new_boot_does(self):
        worker = open_worker(records=1)
        worker.says(0.0)

        worker.hears(Welcome, 0.1, first=0, boot="2", credit=100)

        assert [Frame] == kinds(worker.says(0.1))

    def test_who_said_that_there_was_more_says_at_once_when_there_was_not(self):
        """The daemon had it all; its rows wait for this session until it is heard."""
        worker = open_worker(records=2)
        worker.says(0.0)
        worker.dialogue.interrupted()

        worker.welcomed(1.0, first=2, boot="2")

        assert [Status(session=SESSION, offered=2)] == worker.says(1.0)

    def test_the_daemons_wishes_are_taken_up(self):
        worker = Worker()

        worker.welcomed(flush_interval_s=0.5, run={"id": "abc"})

        assert 0.5 == worker.dialogue.flush_interval_s
        assert {"id": "abc"} == worker.dialogue.run

    def test_words_for_somebody_else_are_not_heard(self):
        worker = Worker()
        worker.says(0.0)

        worker.hears(Welcome, 0.0, session=bytes(15) + b"x", first=0)

        assert worker.dialogue.phase is Phase.GREETING


class TestResending:
    def test_a_lost_connection_leads_to_hello_at_once_and_then_to_the_same_frame(self):
        worker = open_worker(records=2)
        before = worker.says(0.0)

        worker.dialogue.interrupted()

        assert [Hello] == kinds(worker.says(0.001))
        worker.welcomed(now=0.002)
        assert before == worker.says(0.002)

    def test_no_acknowledgement_in_time_leads_to_hello(self):
        worker = open_worker(records=1)
        worker.says(0.0)

        assert [] == worker.says(ACK_TIMEOUT_S[0])
        assert [Hello] == kinds(worker.says(ACK_TIMEOUT_S[0] * 1.2))

    def test_the_next_time_it_waits_longer(self):
        worker = open_worker(records=1)
        worker.says(0.0)
        worker.says(10.0)
        worker.welcomed(now=10.0)
        worker.says(10.0)

        assert [] == kinds([said for said in worker.says(13.0) if not isinstance(said, Status)])
        assert [Hello] == kinds([said for said in worker.says(14.0) if not isinstance(said, Status)])

    def test_progress_is_patience(self):
        worker = open_worker(records=1)
        worker.says(0.0)
        worker.offer()
        worker.says(1.0)
        worker.hears(Ack, 1.5, first=1)

        assert [] == worker.says(3.0)

    def test_a_gap_is_sent_again_from_where_it_began(self):
        worker = open_worker(records=1)
        worker.says(0.0)
        worker.offer()
        worker.says(0.0)

        worker.hears(Ack, 0.1, first=0, gap=True)

        assert [0, 1] == [frame.first for frame in worker.says(0.1) if isinstance(frame, Frame)]

    def test_one_gap_reported_by_many_frames_is_sent_again_once(self):
        worker = open_worker(records=1)
        worker.says(0.0)
        worker.hears(Ack, 0.1, first=0, gap=True)
        worker.says(0.1)

        worker.hears(Ack, 0.2, first=0, gap=True)

        assert [] == worker.says(0.2)

    def test_a_daemon_that_forgot_what_it_acknowledged_is_told_where_we_stand(self):
        worker = open_worker(records=1)
        worker.says(0.0)
        worker.hears(Ack, 0.0, first=1)

        worker.hears(Ack, 0.1, first=0, gap=True)

        (hello,) = worker.says(0.1)
        assert isinstance(hello, Hello)
        assert 1 == hello.first

    def test_an_unknown_session_introduces_itself(self):
        worker = open_worker(records=1)
        worker.says(0.0)

        worker.hears(Refuse, 0.1, code="hello")

        assert [Hello] == kinds(worker.says(0.1))

    def test_a_daemon_without_room_is_sent_no_frames_until_it_has_some(self):
        worker = open_worker(records=1)
        (frame,) = worker.says(0.0)
        worker.hears(Refuse, 0.0, code="full", message="no room")
        worker.offer()
        meanwhile = kinds(worker.says(9.0))

        worker.hears(Ack, 9.5, first=0, gap=True, credit=1 << 20)

        assert [Status] == meanwhile
        again, new = worker.says(9.5)
        assert isinstance(frame, Frame)
        assert isinstance(again, Frame)
        assert isinstance(new, Frame)
        assert [frame.body, b"x"] == [again.body, new.body]

    def test_a_daemon_that_forgets_to_say_that_it_has_room_is_asked(self):
        worker = open_worker(records=1)
        worker.says(0.0)

        worker.hears(Refuse, 0.0, code="full")

        assert Frame not in kinds(worker.says(HOLD_S - 0.1))
        assert worker.dialogue.due(HOLD_S - 0.1) <= 0.1 + 1e-9
        assert Frame in kinds(worker.says(HOLD_S))

    def test_what_is_acknowledged_while_there_is_no_room_does_not_lead_to_a_new_hello(self):
        worker = open_worker(records=1)
        worker.says(0.0)
        worker.offer()
        worker.says(0.0)
        worker.hears(Refuse, 0.1, code="full")

        worker.hears(Ack, 0.2, first=1)

        assert Hello not in kinds(worker.says(HOLD_S - 0.5))

    def test_credit_changes_with_an_acknowledgement(self):
        worker = open_worker()

        worker.hears(Ack, 0.0, first=0, credit=7)
        worker.hears(Ack, 0.0, first=0)

        assert 7 == worker.outbox.credit


class TestRefusal:
    @pytest.mark.parametrize("session", [SESSION, NO_SESSION])
    def test_a_final_one_gives_up_everything_with_its_reason(self, session: bytes):
        worker = open_worker(records=2)
        worker.says(0.0)
        worker.offer()

        worker.hears(Refuse, 0.0, session=session, code="closed", message="the run is over", final=True)

        assert worker.dialogue.phase is Phase.OVER
        assert {"refused": 3} == worker.outbox.dropped
        assert [] == worker.says(100.0)

    def test_one_that_heals_is_remembered_in_its_words(self):
        worker = open_worker()

        worker.hears(Refuse, 0.0, code="malformed", message="a FRAME of 0 bytes")

        assert worker.dialogue.trouble is not None
        assert "a FRAME of 0 bytes" == worker.dialogue.trouble.message
        assert worker.dialogue.phase is Phase.OPEN


class TestLeaving:
    def test_bye_waits_until_everything_is_acknowledged(self):
        worker = open_worker(records=2)
        worker.dialogue.leave(exit_code=3)

        assert [Frame] == kinds(worker.says(0.0))
        worker.hears(Ack, 0.1, first=2)
        assert [Bye(session=SESSION, first=2, offered=2, exit_code=3)] == worker.says(0.1)

    def test_bye_is_repeated_until_it_is_answered(self):
        worker = open_worker()
        worker.dialogue.leave(None)
        worker.says(0.0)

        assert [Bye] == kinds(worker.says(0.6))
        worker.hears(Bye, 0.7, first=0)
        assert worker.dialogue.phase is Phase.OVER

    def test_a_daemon_that_forgot_the_run_may_answer_the_hello_that_it_asks_for_with_bye(self):
        worker = open_worker()
        worker.dialogue.leave(None)
        worker.says(0.0)

        worker.hears(Refuse, 0.1, code="hello")
        assert [Hello] == kinds(worker.says(0.1))
        worker.hears(Bye, 0.2, first=0)

        assert (Phase.OVER, None) == (worker.dialogue.phase, worker.dialogue.trouble)

    def test_a_bye_too_early_leads_to_hello_and_all_that_is_missing(self):
        worker = open_worker(records=1)
        worker.dialogue.leave(None)
        worker.says(0.0)
        worker.hears(Ack, 0.0, first=1)
        worker.says(0.0)

        worker.hears(Refuse, 0.1, code="bye_early")
        worker.welcomed(now=0.1, first=1)

        assert [Bye] == kinds(worker.says(0.1))

    def test_it_is_due_when_there_is_nothing_left_to_wait_for(self):
        worker = open_worker(records=1)
        worker.says(0.0)
        worker.dialogue.leave(None)

        waiting = worker.dialogue.due(0.0)
        worker.hears(Ack, 0.0, first=1)

        assert waiting > 1.0
        assert 0.0 == worker.dialogue.due(0.0)


class TestSmallTalk:
    def test_a_heartbeat_carries_the_counters(self):
        worker = open_worker()
        worker.outbox.drop(DropReason.UNSUPPORTED)

        (status,) = worker.says(5.0)

        assert Status(session=SESSION, offered=1, dropped={"unsupported": 1}) == status

    def test_a_question_is_asked_until_it_is_answered(self):
        worker = open_worker()
        worker.dialogue.ask()

        assert [RunInfo(session=SESSION)] == worker.says(0.0)
        assert [RunInfo] == kinds(worker.says(0.6))
        worker.hears(RunInfo, 0.7, info={"url": "https://x"})
        assert [] == worker.says(1.5)
        assert {"url": "https://x"} == worker.dialogue.run
