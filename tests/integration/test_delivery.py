"""Delivery is kept running, and a run that was interrupted anywhere is whole in the end."""

from __future__ import annotations

import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sidestep.wire import (
    Ack,
)
from sidestepd.errors import ExitCode
from sidestepd.spool import damage_mark
from tests.support.daemons import (
    DEADLINE_S,
    Serve,
    ServedRun,
    assert_run_whole,
    freeze,
    killed,
    see_gone,
)
from tests.support.waiting import eventually


class TestDelivery:
    """It is kept running, and a run that was interrupted anywhere is whole in the end."""

    @contextmanager
    def under_load(self, served: ServedRun, pause_s: float = 0.01) -> Iterator[list[int]]:
        """A worker that logs until the block ends; what it logged is in the list then."""
        worker, steps, over = served.worker(), list[int](), threading.Event()
        worker.hello()

        def work() -> None:
            while not over.wait(pause_s):
                worker.log(len(steps), len(steps) + 1)
                steps.extend((len(steps), len(steps) + 1))

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield steps
        finally:
            over.set()
            thread.join()
        worker.bye()

    @pytest.mark.parametrize("sink", ["jsonl", "wandb"])
    def test_killed_is_started_again(self, serve: Serve, sink: str):
        served = serve(sink=sink)
        with self.under_load(served) as steps:
            for _ in range(3):
                delivery = served.delivery()
                eventually(lambda: served.told().get("rows", 0) > len(steps) // 2, DEADLINE_S, served.log)
                killed(delivery)
                served.delivery(other_than=delivery.pid)
            assert served.status()["delivery"]["restarts"] == 3

        assert served.finish() == ExitCode.COMPLETE

        assert_run_whole(served, steps)

    def test_killed_before_it_read_again_what_is_in_the_run_counts_nothing_twice(self, serve: Serve):
        """The last step waits for its successor, so nothing of its frame is behind the cursor."""
        served = serve(order__patience_s=3600.0)
        worker = served.worker()
        worker.hello()
        worker.log(*range(10))
        eventually(lambda: served.told().get("rows", 0) == 9, DEADLINE_S, served.log)
        served.kill()

        served.start(crash_at="delivery.settled", ready=False)
        eventually(lambda: "delivery ended with -9" in served.log(), DEADLINE_S, served.log)
        served.kill()

        ledger = served.ledger()
        assert (10, 9, 1, True) == (ledger.offered, ledger.delivered, ledger.pending, ledger.balances)
        assert 9 == served.told()["settled_beyond"]

    def test_standing_still_is_killed(self, serve: Serve):
        served = serve(delivery__stall_s=6.0)
        with self.under_load(served) as steps:
            delivery = served.delivery()
            freeze(delivery)

            served.delivery(other_than=delivery.pid)

            see_gone(delivery)
            assert "made no progress" in served.log()

        assert served.finish() == ExitCode.COMPLETE
        assert_run_whole(served, steps)

    @pytest.mark.nightly
    def test_whose_wandb_core_stands_still_is_started_again_with_another(self, serve: Serve):
        """wandb takes rows until a buffer is full, which may be never: it is the file that does not grow."""
        served = serve(sink="wandb", delivery__stall_s=5.0)
        with self.under_load(served, pause_s=0.5) as steps:
            delivery, core = served.delivery(), served.core()
            freeze(core)

            served.delivery(other_than=delivery.pid)

            see_gone(core)
            served.core(other_than=core.pid)

        assert served.finish() == ExitCode.COMPLETE
        assert_run_whole(served, steps)

    @pytest.mark.nightly
    def test_whose_wandb_core_is_killed_is_started_again_with_another(self, serve: Serve):
        served = serve(sink="wandb")
        with self.under_load(served) as steps:
            delivery, core = served.delivery(), served.core()
            killed(core)

            served.delivery(other_than=delivery.pid)

            served.core(other_than=core.pid)

        assert served.finish() == ExitCode.COMPLETE
        assert_run_whole(served, steps)

    def test_drains_the_spool_while_the_run_lives(self, serve: Serve):
        """The spool of a run of weeks stays small."""
        served = serve(sink="wandb")
        with self.under_load(served) as steps:
            eventually(lambda: len(steps) > 200, DEADLINE_S, served.log)
            most = served.frames()
            eventually(lambda: served.frames() < len(steps) - 200, DEADLINE_S, "nothing is deleted")
            assert most > 0

        assert served.finish() == ExitCode.COMPLETE
        assert_run_whole(served, steps)

    def test_a_frozen_daemon_does_not_take_its_own_silence_for_its_workers(self, serve: Serve):
        served = serve(order__lease_s=1.0)
        worker = served.worker()
        worker.hello()
        assert served.process is not None
        intake = psutil.Process(served.process.pid)
        freeze(intake)
        frozen = threading.Event()
        assert not frozen.wait(2.5)  # this is what is tested: the time itself

        intake.send_signal(signal.SIGCONT)

        worker.log(0)
        assert served.status()["live"] == 1
        assert "was not heard of" not in served.log()


class TestDamagedSpool:
    def test_is_salvaged_under_a_running_delivery_and_what_is_lost_is_counted(self, serve: Serve):
        served = serve(order__patience_s=60.0)
        worker = served.worker(world=2)  # the other rank never comes, so all this waits in the spool
        worker.hello()
        for first in range(0, 2000, 4):
            worker.say(worker.frame(*range(first, first + 4), first=first))
        eventually(lambda: worker.hear(Ack).first == 2000)
        worker.next = 2000
        delivery = served.delivery()
        spoil(served.run_dir / "spool.db", b"\x00 damage \x00", pages=3)

        with served.kept_alive() as codes:
            killed(delivery)  # what it has read it would not read again
            eventually(lambda: ExitCode.DISK in codes, DEADLINE_S, served.log)
            worker.hello()
            worker.log(2000)
            worker.bye()
            assert served.finish() == ExitCode.COMPLETE

        steps, ledger = served.steps(), served.ledger()
        assert sorted(set(steps)) == steps
        assert 2000 in steps
        assert 2001 > len(steps) > 1500
        assert {"spool_lost": 2001 - len(steps)} == ledger.dropped
        assert (len(steps), 0) == (ledger.delivered, ledger.pending)
        assert ledger.balances
        assert not damage_mark(served.run_dir / "spool.db").exists()

    def test_does_not_make_delivered_what_was_lost(self, serve: Serve):
        """Rows that are in the run, whose frames were not deleted yet when the spool was lost, are not lost."""
        served = serve(delivery__confirm_interval_s=600.0)
        worker = served.worker()
        worker.hello()
        for first in range(0, 40, 4):
            worker.log(*range(first, first + 4))
        eventually(lambda: decided(served) >= 30, DEADLINE_S, served.log)
        served.kill()
        done = decided(served)
        for part in served.run_dir.glob("spool.db*"):
            part.unlink()
        served.start()
        worker.hello()
        worker.log(40)
        worker.bye()

        assert served.finish() == ExitCode.COMPLETE

        ledger = served.ledger()
        assert [*range(done), 40] == served.steps()
        assert done + 1 == ledger.delivered
        assert 40 - done == ledger.dropped.get("spool_lost", 0)
        assert ledger.balances


def decided(served: ServedRun) -> int:
    """How many rows delivery wrote down."""
    path = served.run_dir / "delivery.db"
    if not path.exists():
        return 0
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        try:
            return int(db.execute("SELECT count(*) FROM row").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def spoil(path: Path, data: bytes, *, pages: int) -> None:
    """Overwrite the beginning of some pages that hold frames, behind everybody's back."""
    with sqlite3.connect(path) as db:
        eventually(lambda: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0)
        ids = [row[0] for row in db.execute("SELECT id FROM entry WHERE kind = 1 ORDER BY id")]
        bodies = [
            db.execute("SELECT body FROM entry WHERE id = ?", (ids[len(ids) * n // (pages + 1)],)).fetchone()[0]
            for n in range(1, pages + 1)
        ]
    db.close()
    content = path.read_bytes()
    with path.open("r+b") as file:
        for body in bodies:
            file.seek(content.index(body) // 4096 * 4096)
            file.write(data)
