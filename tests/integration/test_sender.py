"""A worker and a daemon over a real socket, with everything that can happen between them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from sidestep import sender
from sidestep._run import Run
from sidestep.endpoint import Endpoint
from sidestep.notices import Notices
from sidestep.outbox import Outbox
from sidestep.ranks import Identity
from sidestep.sender import Sender
from sidestep.sender.link import Link as RealLink
from sidestep.session import Session
from sidestep.settings import WorkerSettings
from sidestep.testing import FakeDaemon
from sidestep.wire import Bye, Frame, Hello, Refuse, RunInfo, Status
from tests.support.ledgers import balanced_daemon
from tests.support.waiting import eventually

ME = Identity(rank=1, world=2, local_rank=1, node="here", pid=os.getpid(), launch="test", attempt=0)
MakeRun = Callable[..., Run]


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with balanced_daemon() as made:
        yield made


@pytest.fixture(autouse=True)
def _spills_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def make_run() -> Iterator[MakeRun]:
    made: list[Run] = []

    def make(daemon: FakeDaemon | str, **options: Any) -> Run:
        address = daemon if isinstance(daemon, str) else daemon.address
        session = Session(
            settings=WorkerSettings(address=address, run_id="fake", **options),
            identity=ME,
            keywords={"project": "p"},
            notices=Notices(),
        )
        made.append(Run(session, {"project": "p"}))
        return made[-1]

    yield make
    for run in made:
        run.finish(timeout=0.0)


@pytest.fixture
def run(make_run: MakeRun, daemon: FakeDaemon) -> Run:
    return make_run(daemon)


def numbers(daemon: FakeDaemon) -> list[int]:
    return [record.data["n"] for record in daemon.records if "n" in record.data]


def log(run: Run, start: int, end: int) -> None:
    for number in range(start, end):
        run.log({"n": number})


def assert_whole(run: Run, daemon: FakeDaemon, count: int) -> None:
    """Everything arrived once and in order, and the ledger says so."""
    assert list(range(count)) == numbers(daemon)
    stats = run.stats()
    assert (count, count, 0, {}) == (stats.offered, stats.acknowledged, stats.pending, stats.dropped)


def assert_balanced(run: Run) -> None:
    stats = run.stats()
    assert stats.offered == stats.acknowledged + stats.pending + sum(stats.dropped.values())


class TestOrdinaryTimes:
    def test_everything_arrives_once_and_in_order(self, run: Run, daemon: FakeDaemon):
        log(run, 0, 5000)

        assert run.flush()
        assert_whole(run, daemon, 5000)

    def test_the_daemon_learns_who_it_is(self, run: Run, daemon: FakeDaemon):
        run.flush()
        daemon.wait_until(lambda: daemon.sessions)

        (seen,) = daemon.sessions.values()
        hello = seen.hello
        assert (1, 2, "here", "test", "fake") == (hello.rank, hello.world, hello.node, hello.launch, hello.run)
        assert {"project": "p"} == hello.settings

    def test_finish_says_bye_with_the_final_count_and_the_exit_code(self, run: Run, daemon: FakeDaemon):
        log(run, 0, 10)
        run.log(None)  # type: ignore[arg-type]

        run.finish(exit_code=3)

        (seen,) = daemon.sessions.values()
        assert seen.bye is not None
        assert (10, 11, {"unsupported": 1}, 3) == (
            seen.bye.first, seen.bye.offered, seen.bye.dropped, seen.bye.exit_code,
        )  # fmt: skip

    def test_an_exception_in_the_with_block_is_an_exit_code(self, run: Run, daemon: FakeDaemon):
        with pytest.raises(RuntimeError), run:
            raise RuntimeError

        (seen,) = daemon.sessions.values()
        assert seen.bye is not None
        assert 1 == seen.bye.exit_code

    def test_finishing_twice_says_bye_once(self, run: Run, daemon: FakeDaemon):
        run.finish()
        run.finish()

        assert 1 == daemon.heard_of(Bye)

    def test_a_heartbeat_comes_although_nothing_is_logged(self, run: Run, daemon: FakeDaemon):
        daemon.wait_until(lambda: daemon.heard_of(Status) >= 2)

        assert run.stats().offered == 0

    def test_a_record_after_a_long_silence_wakes_the_sender(self, run: Run, daemon: FakeDaemon):
        run.flush()
        daemon.wait_until(lambda: run._session.outbox.idle)

        run.log({"n": 0})

        daemon.wait_until(lambda: numbers(daemon) == [0])
        assert not run._session.outbox.idle

    def test_a_record_that_comes_while_the_sender_falls_asleep_is_noticed(self):
        """The flag that asks for a wake-up goes up before the queue is looked at for the last time."""
        slept = []

        class Link(RealLink):
            def __init__(self) -> None:
                pass

            def wait_for_answer(self, seconds: float) -> None:
                slept.append(seconds)

        outbox = Outbox(bytes(16))
        sender = Sender(Endpoint(address="ipc:///tmp/unused.sock"), Hello(session=bytes(16)), outbox, Notices())
        sender._sleep(Link(), 1.0)
        outbox.offer(b"x")

        sender._sleep(Link(), 2.0)

        assert [1.0] == slept

    def test_what_only_the_daemon_knows_is_asked_for(self, run: Run, daemon: FakeDaemon):
        daemon.run = {"id": "fake", "mode": "online", "url": "https://wandb.example/fake"}

        assert "https://wandb.example/fake" == run.url
        assert daemon.heard_of(RunInfo) >= 1

    def test_offline_there_is_no_address_and_no_wait(self, run: Run):
        assert run.url is None
        assert "offline" == run.mode

    def test_threads_lose_nothing(self, run: Run, daemon: FakeDaemon):
        each, threads = 2000, 4
        workers = [
            threading.Thread(target=log, args=(run, mark * each, (mark + 1) * each)) for mark in range(threads)
        ]

        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

        assert run.flush()
        assert list(range(each * threads)) == sorted(numbers(daemon))
        assert list(range(each * threads)) == sorted(record.step or 0 for record in daemon.records)


class TestTheDaemonIsAway:
    def test_what_was_said_before_it_came_arrives(self, daemon: FakeDaemon, make_run: MakeRun):
        daemon.stop()
        run = make_run(daemon)
        log(run, 0, 100)

        daemon.start()

        assert run.flush()
        assert_whole(run, daemon, 100)

    def test_a_restart_with_its_memory_loses_and_doubles_nothing(self, run: Run, daemon: FakeDaemon):
        for round_ in range(4):
            log(run, round_ * 500, round_ * 500 + 500)
            if round_ % 2:
                run.flush()
            daemon.restart()

        assert run.flush()
        assert_whole(run, daemon, 2000)
        assert run._session.sender is not None
        assert run._session.sender.reconnects >= 1

    def test_a_restart_without_its_memory_costs_only_what_was_acknowledged(self, run: Run, daemon: FakeDaemon):
        log(run, 0, 100)
        assert run.flush()

        daemon.restart(forget=True)
        log(run, 100, 200)

        assert run.flush()
        assert list(range(100, 200)) == numbers(daemon)
        (seen,) = daemon.sessions.values()
        assert 100 == seen.hello.first

    def test_a_restart_is_noticed_at_once(self, run: Run, daemon: FakeDaemon):
        """By the lost connection, not by an acknowledgement that does not come (2 s)."""
        log(run, 0, 10)
        run.flush()
        daemon.stop()
        log(run, 10, 20)
        before = daemon.heard_of(Hello)
        started = monotonic()

        daemon.start()
        daemon.wait_until(lambda: daemon.heard_of(Hello) > before)

        assert monotonic() - started < 1.5

    def test_finish_is_bounded_and_says_what_is_not_acknowledged(
        self, daemon: FakeDaemon, make_run: MakeRun, caplog: pytest.LogCaptureFixture
    ):
        run = make_run(daemon)
        run.flush()
        daemon.stop()
        log(run, 0, 7)
        started = monotonic()

        run.finish(timeout=0.3)

        assert monotonic() - started < 1.5
        assert 1 == sum("7 records are not acknowledged" in line for line in caplog.messages)
        assert 7 == run.stats().pending
        assert_balanced(run)

    def test_nobody_at_an_address_is_said_while_the_training_goes_on(
        self,
        make_run: MakeRun,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ):
        monkeypatch.setattr(sender, "SILENT_S", 0.2)
        run = make_run(f"ipc://{tmp_path}/nobody.sock")
        log(run, 0, 3)

        eventually(lambda: any("no daemon answers at" in line for line in caplog.messages))
        assert 3 == run.stats().pending

    def test_an_address_that_is_none_is_said_and_survived(
        self, make_run: MakeRun, caplog: pytest.LogCaptureFixture
    ):
        run = make_run("nonsense://")
        log(run, 0, 3)

        assert run.flush(timeout=0.3) is False
        assert 3 == run.stats().pending
        assert run._session.sender is not None
        assert run._session.sender.failures >= 1
        assert 1 == sum("no way to the daemon" in line for line in caplog.messages)


class TestTheDaemonStandsStill:
    def test_log_goes_on_and_everything_arrives_afterwards(self, run: Run, daemon: FakeDaemon):
        run.flush()
        with daemon.frozen():
            log(run, 0, 3000)
            assert run.flush(timeout=0.1) is False

        assert run.flush()
        assert_whole(run, daemon, 3000)

    def test_finish_is_bounded(self, run: Run, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture):
        run.flush()
        with daemon.frozen():
            log(run, 0, 5)
            started = monotonic()

            run.finish(timeout=0.3)

            assert monotonic() - started < 1.5
        (said,) = (line for line in caplog.messages if "5 records are not acknowledged" in line)
        assert "within 0.3 s" in said

    def test_a_full_outbox_drops_and_counts_exactly(self, daemon: FakeDaemon, make_run: MakeRun):
        daemon.freeze()
        run = make_run(daemon, outbox_bytes=300_000, when_full="drop")
        text = "x" * 1000

        for number in range(1000):
            run.log({"n": number, "text": text})
        daemon.thaw()

        assert run.flush()
        stats = run.stats()
        assert 1000 == stats.offered
        assert stats.dropped == {"outbox_full": 1000 - stats.acknowledged}
        assert list(range(stats.acknowledged)) == numbers(daemon)
        assert 280 <= stats.acknowledged < 300

    def test_there_is_room_again_afterwards(self, daemon: FakeDaemon, make_run: MakeRun):
        run = make_run(daemon, outbox_bytes=300_000, when_full="drop")
        with daemon.frozen():
            for _ in range(500):
                run.log({"text": "x" * 1000})
        assert run.flush()

        run.log({"n": 1})

        assert run.flush()
        assert [1] == numbers(daemon)


class TestMessagesAreLost:
    def test_a_lost_frame_is_a_gap_and_sent_again(self, run: Run, daemon: FakeDaemon):
        run.flush()
        daemon.lose_frames(1)
        log(run, 0, 10)
        daemon.wait_until(lambda: daemon.heard_of(Frame) == 1)

        log(run, 10, 20)

        assert run.flush()
        assert_whole(run, daemon, 20)
        assert daemon.heard_of(Hello) == 1

    def test_a_lost_acknowledgement_is_made_up_for_by_the_next(self, run: Run, daemon: FakeDaemon):
        run.flush()
        daemon.drop_acks(1)
        log(run, 0, 10)
        daemon.wait_until(lambda: daemon.heard_of(Frame) == 1)

        log(run, 10, 20)

        assert run.flush()
        assert_whole(run, daemon, 20)

    @pytest.mark.nightly
    def test_the_last_acknowledgement_lost_is_asked_for_by_hello(self, run: Run, daemon: FakeDaemon):
        run.flush()
        daemon.drop_acks(1)
        log(run, 0, 10)

        assert run.flush()
        assert_whole(run, daemon, 10)
        assert daemon.heard_of(Hello) == 2

    def test_a_narrow_window_still_lets_everything_through(self, daemon: FakeDaemon, make_run: MakeRun):
        daemon.credit = 1
        run = make_run(daemon)
        log(run, 0, 500)

        assert run.flush()
        assert_whole(run, daemon, 500)


class TestTheDaemonRefuses:
    def test_a_final_no_is_said_in_its_words_and_everything_counted(
        self, daemon: FakeDaemon, make_run: MakeRun, caplog: pytest.LogCaptureFixture
    ):
        daemon.refuse = Refuse(code="closed", message="the run is over since noon", final=True)
        run = make_run(daemon)
        log(run, 0, 5)

        assert run.flush(timeout=2.0) is False
        log(run, 5, 8)
        run.finish()

        assert {"refused": 8} == run.stats().dropped
        assert_balanced(run)
        assert 1 == sum("the run is over since noon" in line for line in caplog.messages)
