"""One intake and the runs its workers name: whose session belongs where, when a run ends, and what survives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidestep.wire import Bye, Hello, Refuse, RunInfo, Welcome
from sidestepd import status
from sidestepd.errors import ExitCode
from sidestepd.rowlog import RowLogReader
from tests.support.daemons import DEADLINE_S, RawWorker
from tests.support.services import Service, assert_balanced, steps
from tests.support.waiting import eventually

Make = Callable[..., Service]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Make]:
    made: list[Service] = []

    def make(**options: Any) -> Service:
        made.append(Service(tmp_path, **options))
        return made[-1].start()

    yield make
    for one in made:
        one.__exit__(None, None, None)


def run_of(worker: RawWorker, **said: Any) -> str:
    """The run that a worker is welcomed to."""
    return str(worker.hello(**said).run["id"])


class TestSamplers:
    """Each run has its own, over the machine's own CPU."""

    def serve(self, service: Make, **options: Any) -> Service:
        sampled = {"samplers__enabled": True, "samplers__gpu": False, "samplers__interval_s": 0.5}
        return service(**{**sampled, **options})

    def sampling(self, served: Service, count: int) -> list[int]:
        """The processes of so many runs' samplers, each of which is in its run."""

        def found() -> list[int] | None:
            pids = [run["samplers"]["pid"] for run in served.status()["runs"]]
            sessions = [one.pid for path in served.run_dirs() for one in status.report(path).sessions]
            streams = [path.read_text() for path in served.base.glob("sidestep-runs/*/rows.jsonl")]
            heard = sum('"system"' in stream for stream in streams)
            return pids if len(pids) == heard == count and set(pids) <= set(sessions) else None

        return eventually(found, DEADLINE_S, served.log)

    @pytest.mark.nightly
    def test_are_in_the_run_that_started_them_and_open_none(self, service: Make):
        served = self.serve(service)
        workers = [served.worker(launch="A", pid=10), served.worker(launch="B", pid=20, run="mine")]
        for worker in workers:
            worker.hello()
            worker.log(0)

        pids = self.sampling(served, 2)
        for worker in workers:
            worker.bye()
        reports = [served.finished(run_dir) for run_dir in served.run_dirs()]

        assert 2 == len(reports) == len(set(pids))
        for report in reports:
            assert (0, 1) == (report.run.exit_code, report.rows)
            assert ["sampler", "worker"] == sorted(one.role for one in report.sessions)
            assert {"bye"} == {one.state for one in report.sessions}
            assert (0, 0, True) == (report.ledger.pending, report.ledger.unknown, report.ledger.balances)
        eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), DEADLINE_S, "samplers stay")

    @pytest.mark.nightly
    def test_are_there_again_when_the_daemon_is(self, service: Make):
        """The session of those that were killed is no worker's: it names no launch, and ends nothing."""
        served = self.serve(service, serve__linger_s=1.0)
        worker = served.worker(launch="A", pid=10)
        worker.hello()
        worker.log(0)
        before = self.sampling(served, 1)

        served.kill()
        served.start()
        worker.hello()
        after = self.sampling(served, 1)
        worker.bye()

        (report,) = [served.finished(run_dir) for run_dir in served.run_dirs()]
        assert before != after
        assert (0, 1) == (report.run.exit_code, report.rows)


class TestWhoseRun:
    def test_ranks_of_one_launch_share_a_run_and_other_launches_have_others(self, service: Make):
        served = service()
        ranks = [served.worker(rank, launch="A", pid=10 + rank, world=2) for rank in range(2)]
        other = served.worker(launch="B", pid=20)

        first, second, third = run_of(ranks[0]), run_of(ranks[1]), run_of(other)

        assert first == second != third
        for worker, step in zip((*ranks, other), (0, 1, 2), strict=True):
            worker.log(step)
            worker.bye()
        assert [0, 1] == steps(Path(served.finished(served.run_dir(first)).run.dir))
        assert_balanced(served.finished(served.run_dir(first)), 2)
        assert_balanced(served.finished(served.run_dir(third)), 1)

    def test_whoever_names_an_id_joins_the_run_of_that_id(self, service: Make):
        served = service()

        by_variable = run_of(served.worker(launch="A", run="mine"))
        by_init = run_of(served.worker(1, launch="B"), settings={"id": "mine"})

        assert ("mine", "mine") == (by_variable, by_init)
        assert 1 == len(served.run_dirs())

    def test_the_second_init_of_a_process_is_the_second_run_of_its_launch(self, service: Make):
        """Rank 1 is slow: it still says its first when rank 0 is in its third."""
        served = service(serve__linger_s=30.0)
        found: dict[int, list[str]] = {0: [], 1: []}

        for rank in (0, 0, 0, 1, 1, 1):
            worker = served.worker(rank, launch="L", pid=100 + rank, world=2)
            found[rank].append(run_of(worker))
            worker.log(0)
            worker.bye()

        assert found[0] == found[1]
        assert 3 == len(set(found[0])) == len(served.run_dirs())

    def test_a_fork_belongs_to_the_run_its_rank_is_in(self, service: Make):
        served = service()
        for _ in range(2):
            parent = served.worker(launch="L", pid=100)
            mine = run_of(parent)

        assert mine == run_of(served.worker(launch="L", pid=101))

    def test_an_id_is_never_a_path(self, service: Make, tmp_path: Path):
        served = service()

        made = run_of(served.worker(run="../../evil"))

        assert "/" not in made
        assert made == served.run_dirs()[0].name.split("-", 2)[2]
        assert tmp_path / "sidestep-runs" == served.run_dirs()[0].parent


class TestEnd:
    def test_a_run_is_finished_when_its_last_worker_has_left_with_what_they_ended_with(self, service: Make):
        served = service()
        good, bad = (served.worker(rank, run="mine", world=2) for rank in range(2))
        for worker, code in ((good, 0), (bad, 3)):
            worker.hello()
            worker.log(0)
            worker.bye(code)

        found = served.finished(served.run_dir("mine"))

        assert (3, 3) == (
            found.run.exit_code,
            RowLogReader(served.run_dir("mine") / "delivery.db").meta("exit_code"),
        )
        assert_balanced(found, 2)

    def test_whoever_is_lost_makes_it_a_failure(self, service: Make):
        served = service(order__lease_s=0.5)
        worker = served.worker(run="mine")
        worker.hello()
        worker.log(0)

        found = served.finished(served.run_dir("mine"))

        assert (1, "lost") == (found.run.exit_code, found.sessions[0].state)

    def test_one_that_comes_back_in_time_keeps_it_open(self, service: Make):
        served = service(serve__linger_s=30.0)
        first = served.worker(run="mine")
        first.hello()
        first.log(0)
        first.bye()

        later = served.worker(run="mine", launch="evaluation")
        later.hello()
        later.log(1)
        later.bye()
        served.ask(RunInfo(close=0))

        assert ExitCode.COMPLETE == served.wait()
        assert [0, 1] == steps(served.run_dir("mine"))
        assert_balanced(served.finished(served.run_dir("mine")), 2)

    def test_the_same_id_after_its_end_is_a_run_of_its_own(self, service: Make):
        served = service(serve__linger_s=0.0)
        for step in range(2):
            worker = served.worker(run="mine")
            worker.ask(Hello(session=worker.session, pid=step, run="mine"), Welcome)
            worker.log(step)
            worker.bye()
            eventually(lambda: not served.status()["runs"], message=served.log)

        assert [[0], [1]] == [steps(run_dir) for run_dir in served.run_dirs()]

    def test_who_speaks_after_the_end_is_told(self, service: Make):
        """But who only repeats its last word hears that it was taken."""
        served = service()
        worker = served.worker(run="mine")
        worker.hello()
        worker.log(0)
        worker.bye()
        served.finished(served.run_dir("mine"))
        eventually(lambda: not served.status()["runs"])

        worker.say(Bye(session=worker.session, first=1))
        assert "hello" == worker.hear(Refuse).code
        worker.say(Hello(session=worker.session, run="mine", first=1))
        assert 1 == worker.hear(Bye).first
        worker.say(Hello(session=worker.session, run="mine", first=1, more=True))

        refusal = worker.hear(Refuse)
        assert ("closed", True) == (refusal.code, refusal.final)

    def test_told_to_close_it_waits_for_who_is_there_and_takes_nobody_new(self, service: Make):
        served = service(serve__linger_s=30.0)
        worker = served.worker(run="mine")
        worker.hello()
        assert 0 == served.ask(RunInfo(close=0)).close

        newcomer = served.worker(run="other")
        newcomer.say(Hello(session=newcomer.session, run="other"))
        refusal = newcomer.hear(Refuse)
        worker.log(0)
        worker.bye()

        assert ("run", False) == (refusal.code, refusal.final)
        assert ExitCode.COMPLETE == served.wait()
        assert_balanced(status.report(served.run_dir("mine")), 1)


class TestBounds:
    @pytest.mark.nightly
    def test_more_runs_than_are_allowed_wait_for_their_turn(self, service: Make):
        served = service(serve__max_runs=1)
        first, second = served.worker(run="first"), served.worker(run="second")
        first.hello()

        second.say(Hello(session=second.session, run="second"))

        assert "more are not taken" in second.hear(Refuse).message
        first.bye()
        assert "second" == second.ask(Hello(session=second.session, run="second"), Welcome).run["id"]

    def test_one_that_can_not_be_opened_leaves_nothing_behind_and_is_opened_when_it_can(
        self, service: Make, tmp_path: Path
    ):
        disk = tmp_path / "disk"
        disk.mkdir()
        served = service(spool__dir=str(disk))
        shutil.rmtree(disk)
        disk.touch()
        worker = served.worker(run="mine")
        worker.say(Hello(session=worker.session, run="mine"))

        assert "can not open a run" in worker.hear(Refuse).message

        assert [] == list(tmp_path.glob("sidestep-runs/*-mine"))
        disk.unlink()
        assert "mine" == worker.ask(Hello(session=worker.session, run="mine"), Welcome).run["id"]
        worker.log(0)
        worker.bye()
        assert_balanced(served.finished(served.run_dir("mine")), 1)

    @pytest.mark.nightly
    def test_of_runs_that_are_over_nothing_is_left_open(self, service: Make):
        served = service(serve__linger_s=0.0)
        assert served.process is not None
        process = psutil.Process(served.process.pid)

        for count in range(8):
            worker = served.worker(launch=f"launch {count}")
            worker.hello()
            worker.log(0)
            worker.bye()
            worker.leave()
            if count == 1:
                before = self.settled(served, process)

        after = self.settled(served, process)
        assert before == after
        assert 8 == len(served.run_dirs())

    @staticmethod
    def settled(served: Service, process: psutil.Process) -> tuple[list[str], int, int]:
        """The files, threads and children of a process once no run is open."""
        eventually(lambda: not served.status()["runs"], message=served.log)
        files = sorted(Path(file.path).name for file in process.open_files())
        return files, process.num_threads(), len(process.children())


class TestWhatSurvives:
    def test_killed_it_takes_up_every_open_run(self, service: Make):
        served = service(serve__linger_s=30.0)
        workers = [served.worker(launch=launch, pid=pid) for pid, launch in enumerate(("A", "B"))]
        before = []
        for worker in workers:
            before.append(run_of(worker))
            worker.log(0, 1)

        served.kill()
        served.start()

        assert [2, 2] == [worker.hello().first for worker in workers]
        assert before == [run_of(worker) for worker in workers]
        for worker in workers:
            worker.log(2)
            worker.bye()
        served.ask(RunInfo(close=0))
        assert ExitCode.COMPLETE == served.wait()
        for run in before:
            assert [0, 1, 2] == steps(served.run_dir(run))
            assert_balanced(status.report(served.run_dir(run)), 3)

    @pytest.mark.nightly
    def test_the_next_init_of_a_process_is_a_new_run_after_a_kill_too(self, service: Make):
        served = service(serve__linger_s=30.0)
        first = run_of(served.worker(launch="A", pid=7))
        served.kill()
        served.start()

        assert first != run_of(served.worker(launch="A", pid=7))
        assert first == run_of(served.worker(1, launch="A", pid=8))

    def test_sigterm_leaves_runs_that_can_be_taken_up(self, service: Make):
        served = service(serve__linger_s=30.0)
        worker = served.worker(run="mine")
        worker.hello()
        worker.log(0)

        assert ExitCode.INTERRUPTED == served.stop()

        served.start()
        assert 1 == worker.hello().first
        worker.bye()
        served.ask(RunInfo(close=0))
        assert ExitCode.COMPLETE == served.wait()
        assert_balanced(status.report(served.run_dir("mine")), 1)

    @pytest.mark.nightly
    def test_a_run_that_somebody_deleted_does_not_harm_the_others(self, service: Make):
        served = service(serve__linger_s=30.0)
        mine, other = served.worker(run="mine"), served.worker(run="other")
        for worker in (mine, other):
            worker.hello()
            worker.log(0)

        shutil.rmtree(served.run_dir("mine"))
        assert ExitCode.DISK == served.wait()
        served.start()

        assert 1 == other.hello().first
        other.bye()
        served.ask(RunInfo(close=0))
        assert ExitCode.COMPLETE == served.wait()
        assert_balanced(status.report(served.run_dir("other")), 1)


class TestStartedByAWorker:
    def test_it_ends_with_the_processes_of_its_workers(self, service: Make):
        """One is killed without a word: that is known at once, and not after its lease."""
        served = service(until_idle=True, order__lease_s=600.0, serve__linger_s=600.0)
        process = psutil.Popen(["sleep", "600"])
        worker = served.worker(run="mine", pid=process.pid, node=os.uname().nodename)
        worker.hello()
        worker.log(0)

        process.kill()
        process.wait()

        assert ExitCode.COMPLETE == served.wait()
        found = status.report(served.run_dir("mine"))
        assert (1, "finished") == (found.run.exit_code, found.state)
        assert_balanced(found, 1)
