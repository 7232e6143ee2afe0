"""A real intake and its delivery, spoken to over a real socket, rightly and wrongly, and killed at bad moments."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidestep.wire import (
    MAX_ENVELOPE_BYTES,
    Ack,
    Bye,
    Hello,
    Refuse,
    RunInfo,
    Status,
    encode,
)
from sidestepd.errors import ExitCode
from sidestepd.spool import EntryKind, SpoolReader
from tests.support.daemons import (
    DEADLINE_S,
    RawWorker,
    Serve,
    ServedRun,
    assert_run_whole,
    freeze,
    killed,
    logged,
    see_gone,
)
from tests.support.waiting import eventually


def close(served: ServedRun, tool: RawWorker, exit_code: int) -> None:
    """Have the run closed; asked again while somebody who holds it open has the last word."""
    eventually(lambda: tool.ask(RunInfo(close=exit_code), RunInfo).close is not None, DEADLINE_S, served.log)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedRun]:
    """One run for all tests that neither end nor hurt it; each brings workers of its own."""
    with ServedRun(tmp_path_factory.mktemp("shared")) as served:
        yield served.start()


def started(served: ServedRun) -> ServedRun:
    """When it has committed its own start: what is said now goes into a commit of its own."""
    reader = SpoolReader(served.run_dir / "spool.db")
    eventually(lambda: reader.first(EntryKind.BOOT), DEADLINE_S, served.log)
    reader.close()
    return served


class TestLife:
    def test_from_hello_to_the_end_of_the_run(self, serve: Serve):
        served = serve()
        worker = served.worker()
        assert worker.hello(settings={"project": "p"}).first == 0
        assert worker.log(0, 1, 2).first == 3
        assert worker.log(3).first == 4
        assert worker.bye().first == 4

        assert served.finish(exit_code=3) == ExitCode.COMPLETE

        assert_run_whole(served, range(4))
        assert [3] == served.exit_codes()

    def test_what_a_worker_may_know_is_told(self, shared: ServedRun):
        worker = shared.worker()
        welcome = worker.hello()

        info = worker.ask(RunInfo(session=worker.session), RunInfo).info

        assert welcome.run == info
        assert ("tested", str(shared.run_dir)) == (info["id"], info["dir"])
        assert "tags" not in info, "that a run has none is told by nobody: a worker may have given it some"

    def test_a_second_one_on_the_same_directory_ends_and_leaves_the_socket_alone(self, shared: ServedRun):
        worker = shared.worker()
        worker.hello()

        second = subprocess.run(
            [sys.executable, "-m", "sidestepd.intake", str(shared.run_dir)], capture_output=True, check=False
        )

        assert second.returncode == ExitCode.ALREADY_RUNNING
        assert b"another process holds" in second.stderr
        assert worker.log(0).first == 1
        assert shared.worker(1).hello().first == 0

    def test_sigterm_ends_it_resumably(self, serve: Serve):
        served = serve()
        worker = served.worker()
        worker.hello()
        worker.log(0, 1)
        delivery = served.delivery()

        assert served.stop() == ExitCode.INTERRUPTED

        see_gone(delivery)
        served.start()
        assert worker.hello().first == 2
        worker.log(2)
        worker.bye()
        assert served.finish() == ExitCode.COMPLETE
        assert_run_whole(served, range(3))

    def test_a_parent_that_is_gone_before_it_looks_is_missed_all_the_same(self, serve: Serve):
        served = serve(start=False)
        gone = subprocess.Popen(["true"])
        gone.wait()

        orphan = subprocess.run(
            [sys.executable, "-m", "sidestepd.intake", str(served.run_dir), "--parent", str(gone.pid)],
            timeout=DEADLINE_S,
        )

        assert ExitCode.COMPLETE == orphan.returncode
        assert [1] == served.exit_codes()
        assert not Path(served.address.removeprefix("ipc://")).exists()

    def test_ctrl_c_is_not_for_it(self, shared: ServedRun):
        assert shared.process is not None

        shared.process.send_signal(signal.SIGINT)

        assert shared.worker().hello().first == 0

    def test_nothing_runs_on_after_it_was_killed(self, serve: Serve):
        served = serve(sink="wandb")
        served.worker().hello()
        delivery, core = served.delivery(), served.core()
        assert served.process is not None

        killed(psutil.Process(served.process.pid))

        see_gone(delivery)
        served.start()
        see_gone(core)

    def test_a_second_close_changes_nothing(self, serve: Serve):
        served = serve(order__patience_s=5.0)
        worker = served.worker(world=2)
        worker.hello()
        worker.log(0)
        with served.tool() as tool:
            for code in (3, 4):  # until it is done: there may be something to wait for first
                close = RunInfo(close=code)
                eventually(lambda close=close: tool.ask(close, RunInfo).close is not None, DEADLINE_S, served.log)

        assert served.wait() == ExitCode.COMPLETE
        assert [3] == served.exit_codes()


class TestAcknowledged:
    """An ACK promises that the frame is on disk, whatever happens next."""

    def test_a_frame_is_stored_before_it_is_acknowledged(self, serve: Serve):
        """It dies as it would commit: the worker hears nothing, and nothing is there."""
        served = started(serve(crash_at="intake.commit:3"))  # its own start, the HELLO, the frame
        worker = served.worker()
        worker.hello()

        worker.say(worker.frame(0, 1))

        assert served.wait() == -signal.SIGKILL
        assert worker.listen(0.0) is None
        assert served.frames() == 0
        served.start()
        assert worker.hello().first == 0
        worker.log(0, 1)
        worker.bye()
        assert served.finish() == ExitCode.COMPLETE
        assert_run_whole(served, range(2))

    def test_a_frame_that_was_stored_and_not_acknowledged_is_a_duplicate_afterwards(self, serve: Serve):
        served = started(serve(crash_at="intake.committed:3"))
        worker = served.worker()
        worker.hello()

        worker.say(worker.frame(0, 1))

        assert served.wait() == -signal.SIGKILL
        assert worker.listen(0.0) is None
        assert served.frames() == 2
        served.start()
        assert worker.hello(first=0).first == 2
        worker.say(worker.frame(0, 1, first=0))
        assert worker.hear(Ack).first == 2
        assert served.status()["duplicates"] == 1
        worker.log(2)
        worker.bye()
        assert served.finish() == ExitCode.COMPLETE
        assert_run_whole(served, range(3))

    def test_a_gap_is_answered_with_what_is_wanted(self, shared: ServedRun):
        worker = shared.worker()
        worker.hello()

        worker.say(worker.frame(5, first=5))

        ack = worker.hear(Ack)
        assert (0, True) == (ack.first, ack.gap)

    def test_a_bye_before_the_last_frame_is_refused(self, shared: ServedRun):
        worker = shared.worker()
        worker.hello()
        worker.log(0)

        worker.say(Bye(session=worker.session, first=3))

        assert worker.hear(Refuse).code == "bye_early"
        ack = worker.hear(Ack)
        assert (1, True) == (ack.first, ack.gap)

    def test_a_session_that_was_acknowledged_by_a_spool_that_is_lost_goes_on(self, serve: Serve):
        """The hole is counted, and nobody waits for it."""
        served = serve()
        worker = served.worker()
        worker.hello()
        worker.log(0, 1)
        eventually(lambda: served.told().get("delivered") == 2, DEADLINE_S)
        served.kill()
        for part in served.run_dir.glob("spool.db*"):
            part.unlink()
        served.start()

        worker.next = 5  # records 2 to 4 had been acknowledged before the spool was lost
        assert worker.hello().first == 5
        worker.log(5)
        worker.bye()

        assert served.finish() == ExitCode.COMPLETE
        assert [0, 1, 5] == served.steps()
        ledger = served.ledger()
        assert ({"spool_lost": 3}, 3) == (ledger.dropped, ledger.delivered)
        assert ledger.balances


class TestStrangers:
    def test_are_asked_to_say_hello(self, shared: ServedRun):
        worker = shared.worker()
        for message in (worker.frame(0), Bye(session=worker.session, first=0), Status(session=worker.session)):
            worker.say(message)

            refusal = worker.hear(Refuse)
            assert ("hello", False, worker.session) == (refusal.code, refusal.final, refusal.session)

    def test_are_those_too_who_come_on_another_connection(self, shared: ServedRun):
        first = shared.worker()
        first.hello()
        second = RawWorker(shared.address, session=first.session)

        second.say(second.frame(0))

        assert second.hear(Refuse).code == "hello"
        second.leave()

    def test_a_restarted_intake_knows_nobody_by_sight(self, serve: Serve):
        served = serve()
        worker = served.worker()
        worker.hello()
        served.kill()
        served.start()

        worker.say(worker.frame(0))

        assert worker.hear(Refuse).code == "hello"


class TestHostileMessages:
    """They are answered in words, and harm nobody."""

    @pytest.mark.parametrize(
        ("parts", "code", "final"),
        [
            ([b""], "malformed", False),
            ([b"GET / HTTP/1.1\r\n"], "malformed", False),
            ([b"SS\x01\x03" + bytes(36), b"x", b"y", b"z"], "malformed", False),
            ([b"SS\x01\x03" + bytes(36)] * 500, "malformed", False),
            ([b"SS\x01\x03" + bytes(36), b""], "malformed", False),
            ([b"SS\x01\x63" + bytes(36), b""], "malformed", False),
            ([b"SS\x09\x01" + bytes(36), b"\x80"], "version", True),
            ([b"SS\x00\x03" + bytes(36), b"\x80"], "version", True),
        ],
        ids=["empty", "http", "parts", "many parts", "nothing", "unknown type", "newer version", "older version"],
    )
    def test_are_refused(self, shared: ServedRun, parts: list[bytes], code: str, final: bool):
        before = shared.status()["malformed"]
        honest, hostile = shared.worker(), shared.worker()
        honest.hello()

        hostile.send(parts)

        refusal = hostile.hear(Refuse)
        assert (code, final) == (refusal.code, refusal.final)
        assert honest.log(0).first == 1
        assert shared.status()["malformed"] == before + 1

    def test_that_are_too_large_cost_their_sender_the_connection(self, shared: ServedRun):
        honest, hostile = shared.worker(), shared.worker()
        honest.hello()
        hostile.hello()
        header, _ = encode(hostile.frame(0))

        hostile.send([header, bytes(2 * MAX_ENVELOPE_BYTES)])

        assert hostile.listen(0.5) is None
        assert hostile.hello().first == 0
        assert honest.log(0).first == 1

    def test_whose_body_is_not_the_one_that_was_sent_are_counted_as_corrupt(self, serve: Serve):
        served = serve()
        worker = served.worker()
        worker.hello()
        worker.log(0)
        header, body = encode(worker.frame(1, 2))
        worker.send([header, body[:-1] + b"\x55"])
        worker.hear(Ack)
        worker.next = 3
        worker.log(3)
        worker.bye()

        assert served.finish() == ExitCode.COMPLETE

        assert [0, 3] == served.steps()
        assert ({"corrupt": 2}, True) == (served.ledger().dropped, served.ledger().balances)

    def test_whose_records_can_not_be_read_are_counted_one_by_one(self, serve: Serve):
        served = serve()
        worker = served.worker()
        worker.hello()
        worker.log(records=[logged(0, loss=0.0), b"\x93\x01\x02\x03", logged(2, loss=2.0), logged(-5)])
        worker.bye()

        assert served.finish() == ExitCode.COMPLETE

        assert [0, 2] == served.steps()
        assert (2, 2) == (served.ledger().delivered, sum(served.ledger().dropped.values()))
        assert served.ledger().balances

    def test_a_flood_of_them_does_not_keep_others_from_being_served(self, shared: ServedRun):
        honest, hostile = shared.worker(), shared.worker()
        honest.hello()
        for _ in range(2000):
            hostile.send([b"nonsense" * 100])

        assert honest.log(0).first == 1


class TestClosing:
    @contextmanager
    def closing(self, serve: Serve, *, leaves: bool = False) -> Iterator[tuple[ServedRun, RawWorker]]:
        """A run that was closed and can not end, because its delivery stands still."""
        served = serve()
        worker = served.worker()
        worker.hello()
        worker.log(0)
        if leaves:
            worker.bye()
        delivery = served.delivery()
        freeze(delivery)
        with served.tool() as tool:
            close(served, tool, 0)
        yield served, worker
        delivery.send_signal(signal.SIGCONT)
        assert served.wait() == ExitCode.COMPLETE
        assert_run_whole(served, range(1))

    def test_whoever_speaks_after_it_is_refused_for_good(self, serve: Serve):
        with self.closing(serve) as (served, worker):
            worker.say(worker.frame(1))
            late = served.worker(1)
            late.say(Hello(session=late.session))

            for refusal in (worker.hear(Refuse), late.hear(Refuse)):
                assert ("closed", True) == (refusal.code, refusal.final)

    def test_a_last_word_that_was_heard_is_no_refusal_when_it_is_said_again(self, serve: Serve):
        """Its answer was late, and the run was closed meanwhile: nothing is wrong."""
        with self.closing(serve, leaves=True) as (_, worker):
            assert worker.next == worker.bye().first

    def test_is_not_forgotten_when_intake_is_killed(self, serve: Serve):
        served = serve()
        worker = served.worker()
        worker.hello()
        worker.log(0)
        freeze(served.delivery())
        with served.tool() as tool:
            close(served, tool, 7)
        served.kill()

        served.start(ready=False)

        assert served.wait() == ExitCode.COMPLETE
        assert [7] == served.exit_codes()
        assert_run_whole(served, range(1))

    @pytest.mark.parametrize("sink", ["jsonl", "wandb"])
    def test_delivery_that_dies_when_all_is_done_does_not_do_it_again(self, serve: Serve, sink: str):
        """All is settled, and nobody has been told: there is nothing left in the spool to tell it again."""
        served = serve(start=False, sink=sink, delivery__confirm_interval_s=600.0)
        # It settles when it starts, when it has looked around, when it finishes, and for the last time.
        served.start(crash_at="delivery.settled:4")
        worker = served.worker()
        worker.hello()
        worker.log(0)
        worker.bye()

        assert served.finish(exit_code=4) == ExitCode.COMPLETE

        assert [4] == served.exit_codes()
        assert "delivery ended with -9" in served.log()
        assert_run_whole(served, range(1))

    @pytest.mark.parametrize("sink", ["jsonl", "wandb"])
    def test_delivery_that_dies_between_finishing_and_saying_so_finishes_again(self, serve: Serve, sink: str):
        """The record that the run shall finish lies before the cursor by then."""
        served = serve(start=False, sink=sink, delivery__confirm_interval_s=600.0)
        served.start(crash_at="delivery.settled:3")
        worker = served.worker()
        worker.hello()
        worker.log(0)
        worker.bye()
        with served.tool() as tool:
            close(served, tool, 4)
        eventually(lambda: "delivery ended with -9" in served.log(), DEADLINE_S, served.log)
        served.kill()

        served.start(ready=False)

        assert served.wait() == ExitCode.COMPLETE
        assert {4} == set(served.exit_codes())
        assert_run_whole(served, range(1))


ORPHAN = """
import subprocess, sys
intake = subprocess.Popen([sys.executable, "-m", "sidestepd.intake", sys.argv[1]], start_new_session=True)
print(intake.pid, flush=True)
sys.stdin.read()
"""


class TestOrphan:
    @contextmanager
    def orphan(
        self, serve: Serve, **options: Any
    ) -> Iterator[tuple[ServedRun, psutil.Process, Callable[[], None]]]:
        """An intake, and a way to kill the process that started it."""
        served = serve(start=False, **options)
        with (served.run_dir / "logs" / "intake.log").open("ab") as log:
            parent = subprocess.Popen(
                [sys.executable, "-c", ORPHAN, str(served.run_dir)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        with parent:
            assert parent.stdout is not None
            intake = psutil.Process(int(parent.stdout.readline()))
            try:
                yield served, intake, parent.kill
            finally:
                parent.kill()
                if intake.is_running():
                    intake.kill()

    def test_serves_until_its_workers_left_and_closes_the_run(self, serve: Serve):
        with self.orphan(serve) as (served, intake, kill_parent):
            worker = served.worker()
            worker.hello()
            worker.log(0)

            kill_parent()

            worker.log(1)
            worker.log(2)
            worker.bye()
            see_gone(intake)
        assert [1] == served.exit_codes()
        assert_run_whole(served, range(3))

    def test_does_not_wait_for_workers_that_are_gone_too(self, serve: Serve):
        """Their lease ends."""
        with self.orphan(serve, order__lease_s=1.0) as (served, intake, kill_parent):
            worker = served.worker()
            worker.hello()
            worker.log(0)

            kill_parent()

            see_gone(intake)
        assert [1] == served.exit_codes()
        assert_run_whole(served, range(1))
