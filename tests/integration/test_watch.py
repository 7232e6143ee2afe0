"""A real daemon that hears real messages: who is silent and who is gone is told, once, whatever happens to it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest
from click.testing import CliRunner

from sidestep.wire import Kind, Record, encode_record
from sidestepd import saying, status
from sidestepd.cli import main
from sidestepd.errors import ExitCode
from tests.support.daemons import DEADLINE_S, RawWorker, Serve, ServedRun, freeze, killed, logged
from tests.support.waiting import eventually

pytestmark = pytest.mark.chaos

QUICK = {"intake__heartbeat_s": 0.2, "watch__silent_s": 2.0, "order__patience_s": 0.5}
SILENT = "All 2 live processes said nothing for"
SAMPLED = encode_record(
    Record(kind=Kind.SAMPLES, time=0.0, step=None, data={"values": {"memory_allocated": 1.0}, "ordinal": 0})
)


def titles(served: ServedRun) -> list[str]:
    return [alert.title for alert in status.report(served.run_dir).alerts]


def see(served: ServedRun, *expected: str) -> None:
    """Until just this was told."""
    eventually(lambda: list(expected) == titles(served), DEADLINE_S, lambda: f"{titles(served)}\n{served.log()}")


@contextlib.contextmanager
def training(served: ServedRun, *workers: RawWorker) -> Iterator[set[RawWorker]]:
    """These ranks log a step in turn, but for those in the set, which say nothing."""
    mute, over = set[RawWorker](), threading.Event()
    for worker in workers:
        worker.hello()

    def work() -> None:
        step = 0
        while not over.wait(0.05):
            for worker in workers:
                if worker not in mute:
                    worker.log(step)
            step += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        eventually(lambda: served.told().get("rows", 0) > 20, DEADLINE_S, served.log)
        yield mute
    finally:
        over.set()
        thread.join()


def finish(served: ServedRun, *workers: RawWorker) -> None:
    for worker in workers:
        worker.bye()
    assert served.finish() == ExitCode.COMPLETE
    ledger = served.ledger()
    assert ledger.balances
    assert ledger.pending == 0


class TestSilence:
    def test_of_one_rank_is_told_in_the_run_and_so_is_its_end(self, serve: Serve):
        served = serve(sink="jsonl", **QUICK)
        one, other = served.worker(0, world=2), served.worker(1, world=2)
        with training(served, one, other) as mute:
            mute.add(other)
            see(served, "rank 1 is silent")
            mute.remove(other)
            see(served, "rank 1 is silent", "rank 1 is heard again")

        finish(served, one, other)
        text = (served.run_dir / "rows.jsonl").read_text()
        assert text.count('"alert"') == 2

    @pytest.mark.nightly
    def test_is_told_once_by_a_delivery_that_is_killed_again_and_again(self, serve: Serve):
        """It reads the entries again that led to what it told, since nothing of them is settled."""
        served = serve(delivery__confirm_interval_s=600.0, **QUICK)
        one, other = served.worker(0, world=2), served.worker(1, world=2)
        one.hello()
        other.hello()
        with training_until_silent(served, one, other):
            for _ in range(2):
                delivery = killed(served.delivery())
                served.delivery(other_than=delivery.pid)
            other.log(10_000)
            see(served, "rank 1 is silent", "rank 1 is heard again")
            killed(served.delivery())

        finish(served, one, other)
        assert ["rank 1 is silent", "rank 1 is heard again"] == titles(served)
        told = (served.run_dir / "logs" / "delivery.log").read_text()
        assert (told.count("rank 1 is silent:"), told.count("rank 1 is heard again:")) == (1, 1)

    def test_of_all_ranks_is_told_in_the_run_in_its_status_and_in_the_last_words(
        self, serve: Serve, capfd: pytest.CaptureFixture[str]
    ):
        """They live: their allocators are sampled all the while."""
        served = serve(sink="jsonl", watch__stalled_s=1.5, **QUICK)
        workers = [served.worker(rank, world=2) for rank in range(2)]
        for worker in workers:
            worker.hello()
        for step in range(30):
            for worker in workers:
                worker.log(step)

        def told() -> list[str]:
            for worker in workers:
                worker.log(records=[SAMPLED])
            return titles(served)

        eventually(told, DEADLINE_S, served.log)
        assert SILENT in CliRunner().invoke(main, ["status", str(served.run_dir)]).output

        finish(served, *workers)
        assert ["no word from any rank"] == titles(served)
        assert (served.run_dir / "rows.jsonl").read_text().count('"alert"') == 1
        saying.sum_up(served.run_dir, 0, complete=True)
        assert SILENT in capfd.readouterr().err

    def test_of_the_daemon_itself_is_nobodys(self, serve: Serve):
        """Intake stands still for longer than a rank may be silent; what it had missed says nothing of ranks."""
        served = serve(**QUICK)
        one, other = served.worker(0, world=2), served.worker(1, world=2)
        one.hello()
        other.hello()
        for step in range(40):
            one.log(step)
            other.log(step)
        assert served.process is not None
        intake = psutil.Process(served.process.pid)
        freeze(intake)
        assert not threading.Event().wait(2 * QUICK["watch__silent_s"])  # this is what is tested: the time itself
        intake.send_signal(signal.SIGCONT)

        for step in range(40, 60):
            one.log(step)
            other.log(step)

        eventually(lambda: "stood still for" in served.log(), DEADLINE_S, served.log)
        finish(served, one, other)
        assert [] == titles(served)


@contextlib.contextmanager
def training_until_silent(served: ServedRun, one: RawWorker, other: RawWorker) -> Iterator[None]:
    """Both log, then only the first does, until that is told and until the block ends."""
    over = threading.Event()
    for step in range(30):
        one.log(step)
        other.log(step)

    def work() -> None:
        step = 30
        while not over.wait(0.05):
            one.log(step)
            step += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        see(served, "rank 1 is silent")
        yield
    finally:
        over.set()
        thread.join()


class TestDeath:
    @pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the kernel has no pidfds")
    def test_of_a_process_of_this_node_is_told_before_its_lease_ends(self, serve: Serve):
        served = serve(order__lease_s=600.0, **QUICK)
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        here = {"node": os.uname().nodename, "world": 2}
        one, other = served.worker(0, pid=os.getpid(), **here), served.worker(1, pid=process.pid, **here)
        with training(served, one, other) as mute:
            mute.add(other)
            process.kill()  # and nobody waits for it yet
            see(served, "rank 1 ended without a word")
            assert served.status()["live"] == 2

        process.wait()
        one.bye()
        assert served.finish(exit_code=1) == ExitCode.COMPLETE
        [alert] = status.report(served.run_dir).alerts
        assert f"process {process.pid} on {os.uname().nodename}" in alert.text
        assert alert.text in CliRunner().invoke(main, ["status", str(served.run_dir)]).output
        assert served.ledger().balances

    @pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the kernel has no pidfds")
    def test_at_the_very_end_of_the_command_is_told_too(self, serve: Serve):
        """A launcher that ends with its workers: the run is closed before anybody is missed."""
        served = serve(**{**QUICK, "intake__heartbeat_s": 60.0})
        processes = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2)]
        workers = [
            served.worker(rank, world=2, node=os.uname().nodename, pid=process.pid)
            for rank, process in enumerate(processes)
        ]
        for worker in workers:
            worker.hello()
            worker.log(0)
        for process in reversed(processes):
            process.kill()
            process.wait()

        assert served.finish(exit_code=9) == ExitCode.COMPLETE

        assert ["rank 1 ended without a word"] == titles(served)
        assert "rank 0 ended within a second of it" in status.report(served.run_dir).alerts[0].text
        assert served.ledger().balances


class TestRows:
    def test_say_how_long_steps_took_and_add_none_of_their_own(self, serve: Serve):
        served = serve(**QUICK)
        workers = [served.worker(rank, world=2) for rank in range(2)]
        for worker in workers:
            worker.hello()
        for step in range(5):
            for worker in workers:
                worker.log(step)

        finish(served, *workers)

        rows = served.rows()
        assert [0, 1, 2, 3, 4] == [row.step for row in rows]
        assert all(row.values["sidestep/step_time_s"] > 0 for row in rows[1:])
        assert all(row.values["sidestep/slowest_rank"] in (0, 1) for row in rows[1:])
        assert {2} == {row.values["sidestep/ranks_reported"] for row in rows}

    @pytest.mark.parametrize("switched", ["metrics", "metrics and ranks_reported"])
    def test_say_none_of_it_when_it_is_switched_off(self, serve: Serve, switched: str):
        served = serve(**{f"watch__{name}": False for name in switched.split(" and ")}, **QUICK)
        workers = [served.worker(rank, world=2) for rank in range(2)]
        for worker in workers:
            worker.hello()
            worker.log(0, 1, 2)

        finish(served, *workers)

        assert ({"sidestep/ranks_reported"} if switched == "metrics" else set()) == {
            name for row in served.rows() for name in row.values if name.startswith("sidestep/")
        }

    def test_that_hold_no_number_are_told_of(self, serve: Serve):
        served = serve(**QUICK)
        worker = served.worker()
        worker.hello()
        worker.log(records=[logged(3, loss=float("nan")), logged(4, loss=float("nan"))])

        finish(served, worker)

        assert ["loss is nan"] == titles(served)

    def test_alerts_are_not_in_the_run_where_that_is_switched_off(self, serve: Serve):
        served = serve(watch__alerts=False, **QUICK)
        worker = served.worker()
        worker.hello()
        worker.log(records=[logged(3, loss=float("inf"))])

        finish(served, worker)

        assert ["loss is inf"] == titles(served)
        assert '"alert"' not in (served.run_dir / "rows.jsonl").read_text()
