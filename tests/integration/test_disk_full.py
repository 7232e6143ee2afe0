"""A spool at its quota, and a disk that is full: workers keep what they have, and all goes on by itself."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from sidestep.wire import Ack, Bye, Frame, Refuse, checksum
from sidestepd import status
from sidestepd.errors import ExitCode
from tests.support.daemons import DEADLINE_S, RawWorker, Serve, ServedRun, assert_run_whole, freeze, logged
from tests.support.disks import fill, small_disk
from tests.support.waiting import eventually

MEGABYTE = 1 << 20


class Filler:
    """A worker that says much, one frame at a time, until it is told to keep what it has."""

    def __init__(self, worker: RawWorker) -> None:
        self.worker = worker
        self.worker.hello()
        self.step = 0

    def frame(self, size: int) -> Frame:
        body = logged(self.step, loss=float(self.step), text="x" * size)
        return Frame(session=self.worker.session, first=self.worker.next, count=1, body=body, crc=checksum(body))

    def say(self, size: int = 100_000) -> Ack | Refuse:
        """Offer the next step once; it counts as said when it was acknowledged."""
        frame = self.frame(size)
        self.worker.say(frame)
        while True:
            answer = self.worker.listen()
            assert answer is not None, "no answer"
            if isinstance(answer, Refuse):
                return answer
            if isinstance(answer, Ack) and answer.first == frame.end:
                self.worker.next, self.step = frame.end, self.step + 1
                return answer

    def until_refused(self, most: int = 5000) -> Refuse:
        """Speak until there is no more room."""
        for _ in range(most):
            answer = self.say()
            if isinstance(answer, Refuse):
                assert answer.code == "full"
                assert not answer.final
                return answer
        raise AssertionError("there is no end to it")

    def until_taken(self) -> None:
        """Wait to be told that there is room, and go on."""

        def told() -> bool:
            answer = self.worker.listen(0.1)
            return isinstance(answer, Ack) and answer.gap and answer.first == self.worker.next

        eventually(told, DEADLINE_S, "nobody says that there is room again")
        eventually(lambda: isinstance(self.say(), Ack), DEADLINE_S, "not taken")

    def bye(self) -> None:
        """Leave, whatever else is still being answered."""
        self.worker.ask(Bye(session=self.worker.session, first=self.worker.next, offered=self.worker.next), Bye)


def the_same_intake(served: ServedRun, pid: int) -> bool:
    return served.status()["pid"] == pid


class TestQuota:
    def served(self, serve: Serve) -> ServedRun:
        return serve(spool__max_bytes=4 * MEGABYTE, delivery__stall_s=600.0)

    def test_that_is_reached_leaves_records_with_their_workers_until_there_is_room(self, serve: Serve):
        served = self.served(serve)
        pid, worker = served.status()["pid"], Filler(served.worker())
        delivery = served.delivery()
        freeze(delivery)

        worker.until_refused()

        taken = worker.step
        assert 10 < taken < 45
        assert served.status()["room"]["closed"]
        assert status.report(served.run_dir).full
        assert (served.run_dir / "spool.db").stat().st_size <= 4 * MEGABYTE
        delivery.send_signal(signal.SIGCONT)
        worker.until_taken()
        worker.bye()
        assert the_same_intake(served, pid)
        assert 1 == served.log().count("no room for more")
        assert served.finish() == ExitCode.COMPLETE
        assert_run_whole(served, range(taken + 1))
        assert not status.report(served.run_dir).full

    @pytest.mark.nightly
    def test_is_neared_with_ever_less_credit(self, serve: Serve):
        served = self.served(serve)
        worker = Filler(served.worker())
        freeze(served.delivery())
        given: list[int] = []

        def shrinks() -> bool:
            answer = worker.say(30_000)
            given.append(answer.credit if isinstance(answer, Ack) else 0)
            return given[-1] < given[0]

        eventually(shrinks, DEADLINE_S, lambda: str(given))

        assert 4 * MEGABYTE == given[0]

    def test_that_is_reached_still_takes_a_worker_that_comes_and_one_that_goes(self, serve: Serve):
        served = self.served(serve)
        gone = served.worker(1)
        gone.hello()
        gone.log(0)
        delivery = served.delivery()
        freeze(delivery)
        worker = Filler(served.worker())
        worker.until_refused()

        gone.bye()
        late = served.worker(2)
        late.hello()
        late.say(late.frame(1))
        assert "full" == late.hear(Refuse).code

        taken = worker.step
        delivery.send_signal(signal.SIGCONT)
        eventually(lambda: isinstance(late.listen(), Ack), DEADLINE_S, "nobody tells it that there is room")
        late.log(taken)
        late.bye()
        worker.bye()
        assert served.finish() == ExitCode.COMPLETE
        ledger = served.ledger()
        assert (taken + 2, 0) == (ledger.delivered, ledger.pending)
        assert ledger.balances


@pytest.fixture
def disk(tmp_path: Path):
    with small_disk(tmp_path / "disk", 48) as path:
        yield path


def served_on(disk: Path, **options: object) -> ServedRun:
    return ServedRun(disk, spool__ballast_bytes=2 * MEGABYTE, delivery__stall_s=600.0, **options)


class TestFullDisk:
    """What was acknowledged before is in the run afterwards, and nobody had to start anything again."""

    def test_is_waited_for_and_then_everything_goes_on(self, disk: Path):
        with served_on(disk, spool__reserve_bytes=4 * MEGABYTE) as served:
            pid = served.start().status()["pid"]
            worker = Filler(served.worker())
            worker.say()
            delivery = served.delivery()
            others = fill(disk, leave=2 * MEGABYTE)

            worker.until_refused()

            assert served.status()["room"]["closed"]
            others.unlink()
            worker.until_taken()
            worker.bye()
            assert the_same_intake(served, pid)
            assert delivery.is_running()
            assert served.finish() == ExitCode.COMPLETE
            assert_run_whole(served, range(worker.step))

    def test_that_has_nothing_left_at_all_fails_a_commit_and_nothing_else(self, disk: Path):
        """Without a reserve it is SQLite that finds out."""
        with served_on(disk, spool__reserve_bytes=0, spool__max_bytes=64 * MEGABYTE) as served:
            pid = served.start().status()["pid"]
            worker = Filler(served.worker())
            worker.say()
            freeze(served.delivery())
            ballast = served.run_dir / "spool.ballast"
            eventually(ballast.exists, DEADLINE_S, "no ballast")

            others = fill(disk)
            worker.until_refused()

            assert not ballast.exists()
            assert "is given up" in served.log()
            psutil.Process(served.status()["delivery"]["pid"]).send_signal(signal.SIGCONT)
            others.unlink()
            worker.until_taken()
            worker.bye()
            assert the_same_intake(served, pid)
            eventually(ballast.exists, DEADLINE_S, "the ballast is not taken again")
            assert served.finish() == ExitCode.COMPLETE
            assert_run_whole(served, range(worker.step))

    def test_is_drained_by_means_of_the_ballast_while_it_stays_full(self, disk: Path):
        """Nobody else makes room: what was taken is written out, and what it took is given back."""
        with served_on(disk, spool__reserve_bytes=0) as served:
            served.start()
            worker = Filler(served.worker())
            delivery = served.delivery()
            freeze(delivery)
            for _ in range(20):
                assert isinstance(worker.say(10_000), Ack)
            eventually((served.run_dir / "spool.ballast").exists, DEADLINE_S, "no ballast")
            fill(disk)
            worker.until_refused()

            delivery.send_signal(signal.SIGCONT)

            eventually(lambda: served.frames() == 0, DEADLINE_S, lambda: f"not drained:\n{served.log()}")
            worker.bye()
            assert served.finish() == ExitCode.COMPLETE
            assert_run_whole(served, range(worker.step))

    def test_at_the_start_gets_the_ballast(self, disk: Path):
        with served_on(disk, spool__reserve_bytes=0) as served:
            served.start()
            worker = Filler(served.worker())
            worker.say()
            ballast = served.run_dir / "spool.ballast"
            eventually(ballast.exists, DEADLINE_S, "no ballast")
            served.stop()
            others = fill(disk)

            served.start()

            assert not ballast.exists()
            others.unlink()
            worker.worker.hello()
            eventually(lambda: isinstance(worker.say(), Ack), DEADLINE_S, "not taken")
            worker.bye()
            assert served.finish() == ExitCode.COMPLETE
            assert_run_whole(served, range(worker.step))

    def test_of_wandb_is_waited_for_too(self, disk: Path):
        """Its files are written by another process, whose failing nobody would see."""
        with served_on(disk, sink="wandb", spool__reserve_bytes=4 * MEGABYTE) as served:
            served.start()
            worker = Filler(served.worker())
            worker.say(1000)
            delivery = served.delivery()
            others = fill(disk, leave=MEGABYTE // 2)

            worker.until_refused()

            others.unlink()
            worker.until_taken()
            worker.bye()
            assert delivery.is_running()
            assert served.finish() == ExitCode.COMPLETE
            assert_run_whole(served, range(worker.step))
