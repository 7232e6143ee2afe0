"""Workers die without a word, or stop and go on. What was acknowledged is in the run, and nothing is guessed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sidestep.wire import Ack, Status
from sidestepd.errors import ExitCode
from sidestepd.status import SessionReport
from tests.support.chaos import Training, assert_whole, steps_of_ranks, steps_taken, training
from tests.support.daemons import DEADLINE_S, ServedRun
from tests.support.waiting import eventually

pytestmark = pytest.mark.chaos


def session(run: Training, rank: int) -> SessionReport:
    return next(it for it in run.report().sessions if it.rank == rank)


class TestKilled:
    def test_everything_that_was_acknowledged_is_in_the_run(self, tmp_path: Path):
        enough = tmp_path / "enough"
        with Training(tmp_path, training(ranks=2, steps=300, pids=tmp_path, until=enough)) as run:
            eventually(lambda: run.told().get("rows", 0) > 50, DEADLINE_S, run.log)
            os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
            enough.touch()
            exit_code = run.wait()

        report, steps = run.report(), steps_of_ranks(run.rows())
        assert (exit_code, report.run.exit_code, report.state) == (9, 9, "finished")
        assert ("bye", "lost") == (session(run, 0).state, session(run, 1).state)
        taken = steps_taken(enough)[0]
        beside = session(run, 0).acknowledged - taken  # what each rank says that is no step
        assert {0: list(range(taken)), 1: list(range(session(run, 1).acknowledged - beside))} == steps
        assert min(taken, len(steps[1])) > 50
        assert sum(it.acknowledged for it in report.sessions) == report.ledger.delivered
        assert report.ledger.pending == 0
        assert report.ledger.balances

    def test_what_was_offered_and_never_came_is_unknown(self, tmp_path: Path):
        """Its last heartbeat told of 50 records, and ten arrived: the other forty are not called anything else."""
        with ServedRun(tmp_path, order__lease_s=1.0) as served:
            worker = served.start().worker()
            worker.hello()
            worker.log(*range(10))
            worker.say(Status(session=worker.session, offered=50, dropped={"outbox_full": 3}))
            eventually(lambda: served.ledger().offered == 50, DEADLINE_S)
            worker.leave()
            eventually(lambda: served.status()["live"] == 0, DEADLINE_S, "the lease does not end")

            assert served.finish(exit_code=1) == ExitCode.COMPLETE

            ledger = served.ledger()
            assert list(range(10)) == served.steps()
            assert (50, 10, 37, 0) == (ledger.offered, ledger.delivered, ledger.unknown, ledger.pending)
            assert {"outbox_full": 3} == ledger.dropped
            assert ledger.balances

    def test_nobody_waits_for_it_longer_than_patience(self, tmp_path: Path):
        """The rows of the others go on leaving while its lease still runs."""
        with ServedRun(tmp_path, order__lease_s=600.0, order__patience_s=0.5) as served:
            served.start()
            one, other = served.worker(0, world=2), served.worker(1, world=2)
            one.hello()
            other.hello()
            one.log(0)
            other.log(0)
            other.leave()

            one.log(1, 2, 3)

            eventually(lambda: {0, 1, 2} <= set(served.steps()), DEADLINE_S, served.log)
            assert served.status()["live"] == 2
            one.bye()
            assert served.finish() == ExitCode.COMPLETE
            assert [0, 1, 2, 3] == served.steps()
            assert served.ledger().balances


class TestStopped:
    def test_one_that_goes_on_after_its_lease_ended_is_whole_in_the_end(self, tmp_path: Path):
        """What it says then comes late, and once."""
        options, until = {"order.lease_s": 1.0, "order.patience_s": 0.5}, tmp_path / "until"
        command = training(ranks=2, steps=1, pids=tmp_path, until=until)
        with Training(tmp_path, command, options=options) as run:
            run.wait_for_progress()
            pid = int((tmp_path / "1").read_text())
            os.kill(pid, signal.SIGSTOP)
            eventually(lambda: session(run, 1).state == "lost", DEADLINE_S, run.log)
            rows = run.told()["rows"]
            eventually(lambda: run.told()["rows"] > rows + 50, DEADLINE_S, run.log)

            os.kill(pid, signal.SIGCONT)
            eventually(lambda: session(run, 1).state == "live", DEADLINE_S, run.log)
            until.touch()

            assert run.wait() == 0

        report = assert_whole(run, ranks=2, steps=steps_taken(until))
        assert report.late_rows > 0
        assert {"bye"} == {it.state for it in report.sessions}

    def test_one_that_was_acknowledged_while_it_was_stopped_sends_nothing_again(self, tmp_path: Path):
        with ServedRun(tmp_path, order__lease_s=1.0) as served:
            worker = served.start().worker()
            worker.hello()
            worker.say(worker.frame(0, 1))
            eventually(lambda: served.status()["live"] == 0, DEADLINE_S, "the lease does not end")

            assert worker.hear(Ack).first == 2
            worker.next = 2
            worker.log(2)

            assert served.status()["live"] == 1
            worker.bye()
            assert served.finish() == ExitCode.COMPLETE
            assert [0, 1, 2] == served.steps()
            assert served.ledger().balances
