"""Records that outlast memory: spilled, sent when the daemon is back, or collected after their process ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidestep import spill
from sidestep._run import Run
from sidestep.collect import collect
from sidestep.endpoint import Endpoint
from sidestep.notices import Notices
from sidestep.ranks import Identity
from sidestep.session import Session
from sidestep.settings import WorkerSettings
from sidestep.testing import FakeDaemon, environment
from tests.support.ledgers import balanced_daemon
from tests.support.waiting import eventually

ME = Identity(rank=1, world=2, local_rank=1, node="here", pid=os.getpid(), launch="test", attempt=0)
OUTBOX = 600_000
TEXT = "x" * 1000
DEADLINE_S = 60.0

MakeRun = Callable[..., Run]


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the workers of a run spill."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "spill"


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with balanced_daemon() as made:
        yield made


@pytest.fixture
def make_run(folder: Path) -> Iterator[MakeRun]:
    made: list[Run] = []

    def make(daemon: FakeDaemon | None, **options: Any) -> Run:
        given = {"run_id": "fake", "run_dir": str(folder.parent), "outbox_bytes": OUTBOX, **options}
        settings = WorkerSettings(address=daemon.address if daemon else None, **given)
        made.append(Run(Session(settings=settings, identity=ME, keywords={}, notices=Notices()), {}))
        return made[-1]

    yield make
    for run in made:
        run.finish(timeout=0.0)


def log(run: Run, start: int, end: int) -> None:
    """About a kilobyte each, as fast as the outbox has room."""
    for number in range(start, end):
        eventually(lambda: run._session.outbox.room > 5000, DEADLINE_S, "the outbox stays full")
        run.log({"n": number, "text": TEXT})


def numbers(daemon: FakeDaemon) -> list[int]:
    return [record.data["n"] for record in daemon.records if "n" in record.data]


def assert_balanced(run: Run) -> None:
    stats = run.stats()
    assert stats.offered == stats.acknowledged + stats.pending + sum(stats.dropped.values())


def assert_whole(run: Run, daemon: FakeDaemon, count: int) -> None:
    stats = run.stats()
    assert list(range(count)) == numbers(daemon)
    assert (count, count, 0, {}) == (stats.offered, stats.acknowledged, stats.pending, stats.dropped)


class TestTheDaemonIsAwayForLong:
    def test_what_does_not_fit_into_memory_arrives_once_and_in_order(
        self, daemon: FakeDaemon, make_run: MakeRun, folder: Path
    ):
        run = make_run(daemon)
        log(run, 0, 50)
        run.flush()
        daemon.stop()
        log(run, 50, 3000)
        (path,) = spill.waiting(folder)
        assert path.stat().st_size > 4 * OUTBOX

        daemon.start()
        log(run, 3000, 3500)

        assert run.flush(DEADLINE_S)
        assert_whole(run, daemon, 3500)
        assert [] == list(folder.iterdir())

    def test_a_daemon_that_stands_still_is_as_good_as_away(
        self, daemon: FakeDaemon, make_run: MakeRun, folder: Path
    ):
        run = make_run(daemon)
        run.flush()
        with daemon.frozen():
            log(run, 0, 2000)
            assert 1 == len(spill.waiting(folder))

        assert run.flush(DEADLINE_S)
        assert_whole(run, daemon, 2000)

    def test_one_that_comes_and_goes_gets_everything_once(self, daemon: FakeDaemon, make_run: MakeRun):
        run = make_run(daemon)
        daemon.stop()
        for round_ in range(4):
            log(run, round_ * 800, round_ * 800 + 800)
            daemon.start()
            daemon.wait_until(lambda least=round_ * 400 + 10: len(daemon.records) > least, DEADLINE_S)
            daemon.stop()
        daemon.start()

        assert run.flush(DEADLINE_S)
        assert_whole(run, daemon, 3200)

    def test_finish_delivers_what_was_spilled(self, daemon: FakeDaemon, make_run: MakeRun, folder: Path):
        run = make_run(daemon)
        daemon.stop()
        log(run, 0, 2000)
        daemon.start()

        run.finish(timeout=DEADLINE_S)

        assert_whole(run, daemon, 2000)
        assert [True] == [seen.bye is not None for seen in daemon.sessions.values()]
        assert [] == list(folder.iterdir())

    def test_a_final_no_gives_up_what_was_spilled_too(self, daemon: FakeDaemon, make_run: MakeRun, folder: Path):
        from sidestep.wire import Refuse

        daemon.stop()
        run = make_run(daemon)
        log(run, 0, 1000)
        daemon.refuse = Refuse(code="closed", message="over", final=True)
        daemon.start()

        assert run.flush(5.0) is False

        run.finish()
        assert {"refused": 1000} == run.stats().dropped
        assert [] == list(folder.iterdir())


class TestBounds:
    def test_a_full_spill_drops_and_counts_exactly(self, daemon: FakeDaemon, make_run: MakeRun, folder: Path):
        daemon.stop()
        run = make_run(daemon, spill_bytes=1_000_000)
        offered = 0
        while not run.stats().dropped.get("spill_full"):
            run.log({"n": offered, "text": TEXT})
            offered += 1
        for number in range(offered, offered + 500):
            run.log({"n": number, "text": TEXT})
        assert all(path.stat().st_size <= 1_000_000 for path in spill.waiting(folder))
        daemon.start()

        assert run.flush(DEADLINE_S)

        stats = run.stats()
        assert offered + 500 == stats.offered
        assert sum(stats.dropped.values()) == stats.offered - stats.acknowledged
        assert sorted(numbers(daemon)) == numbers(daemon)
        assert len(numbers(daemon)) == stats.acknowledged > 1_000_000 / len(TEXT) / 1.1

    def test_afterwards_there_is_room_again(self, daemon: FakeDaemon, make_run: MakeRun):
        daemon.stop()
        run = make_run(daemon, spill_bytes=OUTBOX)
        while not run.stats().dropped.get("spill_full"):
            run.log({"text": TEXT})
        daemon.start()
        assert run.flush(DEADLINE_S)
        before = run.stats().dropped
        daemon.stop()

        log(run, 0, 500)
        daemon.start()

        assert run.flush(DEADLINE_S)
        assert list(range(500)) == numbers(daemon)
        assert before == run.stats().dropped

    def test_drop_spills_nothing(self, daemon: FakeDaemon, make_run: MakeRun, folder: Path):
        daemon.stop()
        run = make_run(daemon, when_full="drop")
        for number in range(1000):
            run.log({"n": number, "text": TEXT})

        stats = run.stats()
        assert {"outbox_full": 1000 - stats.pending} == stats.dropped
        assert not folder.exists()

    def test_nowhere_to_write_is_said_once_and_counted_as_such(
        self,
        daemon: FakeDaemon,
        make_run: MakeRun,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.setenv("TMPDIR", "/proc")
        daemon.stop()
        run = make_run(daemon, run_dir="/proc/self")

        while not run.stats().dropped.get("spill_failed"):
            run.log({"text": TEXT})

        assert_balanced(run)
        assert 1 == sum("there is nowhere to spill" in line for line in caplog.messages)

    def test_a_disk_that_takes_no_more_is_said_and_counted_and_what_it_took_arrives(
        self, daemon: FakeDaemon, folder: Path
    ):
        """The limit of a file's size stands in for the disk's: the write fails midway all the same."""
        daemon.stop()
        ended = subprocess.Popen(
            [
                sys.executable,
                "-c",
                textwrap.dedent(
                    f"""
                    import resource, sidestep, sys
                    run = sidestep.init()
                    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
                    n = 0
                    while not run.stats().dropped.get("spill_failed"):
                        run.log({{"n": n, "text": "x" * 1000}})
                        n += 1
                    print(n, flush=True)
                    sys.stdin.read()
                    run.flush({DEADLINE_S})
                    stats = run.stats()
                    taken = stats.offered - sum(stats.dropped.values())
                    print(taken, stats.acknowledged, stats.pending, flush=True)
                    """
                ),
            ],
            env={
                **environment(daemon),
                "SIDESTEP_RUN_DIR": str(folder.parent),
                "SIDESTEP_OUTBOX_BYTES": str(OUTBOX),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert ended.stdout is not None
        assert int(ended.stdout.readline()) > 1000
        daemon.start()

        said, _ = ended.communicate(timeout=DEADLINE_S)

        left, acknowledged, pending = map(int, said.split())
        assert (left, 0) == (acknowledged, pending)
        assert acknowledged == len(numbers(daemon))
        assert sorted(set(numbers(daemon))) == numbers(daemon)


WORKER = """
import os, signal, sys
import sidestep

run = sidestep.init()

def log(start, end):
    for n in range(start, end):
        while not run._session.dormant and run._session.outbox.room < 5000:
            pass
        run.log({"n": n, "text": "x" * 1000})
"""


def worker(daemon: FakeDaemon, body: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    return subprocess.run(
        [sys.executable, "-c", WORKER + textwrap.dedent(body)],
        env={**environment(daemon), "SIDESTEP_OUTBOX_BYTES": str(OUTBOX), **environ},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


class TestCollecting:
    def test_what_an_ended_worker_left_is_handed_on_with_its_last_word(self, daemon: FakeDaemon, folder: Path):
        daemon.stop()
        ended = worker(daemon, "log(0, 1000); run.finish(3, timeout=2)", SIDESTEP_RUN_DIR=str(folder.parent))
        assert "1000 records are not acknowledged" in ended.stderr
        assert f"1000 of them are kept in {folder}" in ended.stderr
        daemon.start()

        (done,) = collect(spill.waiting(folder), Endpoint(address=daemon.address), run="fake")

        (seen,) = daemon.sessions.values()
        assert (1000, "") == (done.records, done.why)
        assert list(range(1000)) == numbers(daemon)
        assert seen.bye is not None
        assert (3, 1000) == (seen.bye.exit_code, seen.bye.offered)
        assert [] == list(folder.iterdir())

    def test_a_killed_worker_leaves_what_it_had_spilled_and_no_last_word(self, daemon: FakeDaemon, folder: Path):
        daemon.stop()
        ended = worker(
            daemon, "log(0, 3000); os.kill(os.getpid(), signal.SIGKILL)", SIDESTEP_RUN_DIR=str(folder.parent)
        )
        assert -signal.SIGKILL == ended.returncode
        daemon.start()

        (done,) = collect(spill.waiting(folder), Endpoint(address=daemon.address), run="fake")

        (seen,) = daemon.sessions.values()
        assert list(range(done.records)) == numbers(daemon)
        assert 3000 > done.records > 2500
        assert seen.bye is None
        assert done.records <= seen.hello.offered <= 3000
        assert [] == list(folder.iterdir())

    @pytest.mark.nightly
    def test_what_had_arrived_already_does_not_arrive_twice(self, daemon: FakeDaemon, folder: Path):
        """Killed while the daemon was taking what had been spilled."""
        daemon.stop()
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER + "log(0, 3000); print('now', flush=True); sys.stdin.read()"],
            env={
                **environment(daemon),
                "SIDESTEP_OUTBOX_BYTES": str(OUTBOX),
                "SIDESTEP_RUN_DIR": str(folder.parent),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        daemon.credit = 1
        daemon.start()
        daemon.wait_until(lambda: len(daemon.records) > 100, DEADLINE_S)
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
        had = len(daemon.records)
        (path,) = spill.waiting(folder)

        (done,) = collect([path], Endpoint(address=daemon.address), run="fake")

        assert done.why == ""
        assert list(range(len(numbers(daemon)))) == numbers(daemon)
        assert len(numbers(daemon)) > had

    def test_the_next_worker_of_the_run_hands_on_what_the_daemon_can_not_reach(
        self, daemon: FakeDaemon, tmp_path: Path
    ):
        daemon.stop()
        worker(daemon, "log(0, 500); run.finish(timeout=2)")
        private = spill.private_folder()
        assert private.is_relative_to(tmp_path)
        assert 1 == len(spill.waiting(private))
        daemon.start()

        worker(
            daemon,
            f"""
            import time
            log(500, 510)
            deadline = time.monotonic() + {DEADLINE_S}
            while os.listdir({str(private)!r}) and time.monotonic() < deadline:
                time.sleep(0.01)
            """,
        )

        assert list(range(510)) == sorted(numbers(daemon))
        assert 2 == len(daemon.sessions)
        assert [] == spill.waiting(private)

    def test_what_is_of_another_run_is_left_alone(self, daemon: FakeDaemon):
        daemon.stop()
        worker(daemon, "log(0, 5); run.finish(timeout=1)", SIDESTEP_RUN_ID="other")
        daemon.start()
        files = spill.waiting(spill.private_folder())

        (passed_over,) = collect(files, Endpoint(address=daemon.address), run="fake")
        (taken,) = collect(files, Endpoint(address=daemon.address), run="fake", any_run=True)

        assert (None, "") == (passed_over.why, taken.why)
        assert list(range(5)) == numbers(daemon)

    def test_without_any_daemon_everything_is_kept_and_said_once(self, daemon: FakeDaemon):
        ended = worker(daemon, "log(0, 5)", SIDESTEP_ADDRESS="")

        assert 0 == ended.returncode
        assert 1 == ended.stderr.count("no daemon is known (")
        assert "5 of them are kept in" in ended.stderr
        (done,) = collect(
            spill.waiting(spill.private_folder()), Endpoint(address=daemon.address), run="fake", any_run=True
        )
        assert "" == done.why
        assert list(range(5)) == numbers(daemon)

    def test_a_living_worker_is_not_robbed(self, daemon: FakeDaemon, make_run: MakeRun, folder: Path):
        daemon.stop()
        run = make_run(daemon)
        log(run, 0, 1000)
        (path,) = spill.waiting(folder)
        daemon.start()

        (done,) = collect([path], Endpoint(address=daemon.address), run="fake")

        assert done.why is None
        assert run.flush(DEADLINE_S)
        assert_whole(run, daemon, 1000)

    def test_a_daemon_that_does_not_answer_leaves_the_file(self, daemon: FakeDaemon, folder: Path):
        daemon.stop()
        worker(daemon, "log(0, 5); run.finish(timeout=1)", SIDESTEP_RUN_DIR=str(folder.parent))

        (done,) = collect(spill.waiting(folder), Endpoint(address=daemon.address), run="fake", stall_s=0.2)

        assert "the daemon does not answer" == done.why
        assert 1 == len(spill.waiting(folder))

    @pytest.mark.nightly
    def test_a_forked_child_neither_keeps_the_file_locked_nor_spills_into_it(
        self, daemon: FakeDaemon, folder: Path, tmp_path: Path
    ):
        """The parent is killed with its spill while the child lives on."""
        daemon.stop()
        ended = worker(
            daemon,
            """
            log(0, 1000)
            if os.fork() == 0:
                os.close(1); os.close(2)
                log(1000, 2000)
                run.finish(timeout=2)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
            """,
            SIDESTEP_RUN_DIR=str(folder.parent),
        )
        assert -signal.SIGKILL == ended.returncode
        first = eventually(
            lambda: next((path for path in spill.waiting(folder) if spill.is_free(path)), None),
            DEADLINE_S,
            "the parent's file stays locked",
        )
        eventually(
            lambda: len(spill.waiting(folder)) == 2 and all(map(spill.is_free, spill.waiting(folder))),
            DEADLINE_S,
            "the child's file is not there",
        )
        daemon.start()

        done = collect(spill.waiting(folder), Endpoint(address=daemon.address), run="fake")

        assert first is not None
        assert ["", ""] == [one.why for one in done]
        assert 2 == len(daemon.sessions)
        assert list(range(1000, 2000)) == [n for n in numbers(daemon) if n >= 1000]
