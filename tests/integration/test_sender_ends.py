"""Workers that end, and that fork: processes of their own, and a daemon in memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from sidestep.testing import FakeDaemon, environment
from sidestep.wire import Bye, Record
from tests.support.ledgers import balanced_daemon


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with balanced_daemon() as made:
        yield made


@pytest.fixture(autouse=True)
def _spills_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def numbers(daemon: FakeDaemon) -> list[int]:
    return [record.data["n"] for record in daemon.records if "n" in record.data]


SCRIPT_HEAD = """
import os, sys, threading
import sidestep

def said(what):
    print(what, flush=True)
"""


def script(daemon: FakeDaemon, body: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a worker of its own."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT_HEAD + textwrap.dedent(body)],
        env={**environment(daemon), **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def by_process(daemon: FakeDaemon) -> dict[int, list[int]]:
    """What each process said, by pid."""
    found: dict[int, list[int]] = {}
    for seen in daemon.sessions.values():
        found.setdefault(seen.hello.pid, []).extend(
            record.data["n"] for record in seen.records if isinstance(record, Record) and "n" in record.data
        )
    return found


class TestExit:
    def test_a_script_that_just_ends_has_delivered_everything(self, daemon: FakeDaemon):
        ended = script(daemon, "run = sidestep.init()\nfor n in range(1000): run.log({'n': n})")

        assert (0, "") == (ended.returncode, ended.stderr)
        assert list(range(1000)) == numbers(daemon)
        assert [None] == [seen.bye.exit_code for seen in daemon.sessions.values() if seen.bye]

    @pytest.mark.nightly
    def test_a_daemon_that_stands_still_holds_nobody_up(self, daemon: FakeDaemon):
        daemon.freeze()
        started = monotonic()

        ended = script(daemon, "sidestep.init().log({'n': 0})")

        assert 0 == ended.returncode
        assert "1 records are not acknowledged" in ended.stderr
        assert monotonic() - started < 10


class TestFork:
    def test_a_child_that_logs_is_a_session_of_its_own(self, daemon: FakeDaemon):
        ended = script(
            daemon,
            """
            run = sidestep.init()
            run.log({"n": 0}); run.log({"n": 1})
            pid = os.fork()
            run.log({"n": 100 if pid == 0 else 2})
            if pid: said(pid); os.waitpid(pid, 0)
            """,
        )

        child = int(ended.stdout)
        assert (0, "") == (ended.returncode, ended.stderr)
        said = by_process(daemon)
        assert [100] == said.pop(child)
        assert [[0, 1, 2]] == list(said.values())
        steps = [record.step for record in daemon.records if record.data["n"] == 100]
        assert [0] == steps

    def test_the_child_of_a_launch_belongs_to_it(self, daemon: FakeDaemon):
        script(
            daemon,
            """
            run = sidestep.init()
            pid = os.fork()
            run.log({"n": 1})
            if pid: os.waitpid(pid, 0)
            """,
            RANK="3",
            WORLD_SIZE="4",
        )

        assert 2 == len(daemon.sessions)
        assert 1 == len({(seen.hello.launch, seen.hello.rank) for seen in daemon.sessions.values()})

    def test_a_child_that_never_logs_costs_nothing(self, daemon: FakeDaemon):
        ended = script(
            daemon,
            """
            run = sidestep.init()
            run.log({"n": 0})
            pid = os.fork()
            if pid == 0:
                said(threading.active_count())
                sys.exit(0)
            os.waitpid(pid, 0)
            run.log({"n": 1})
            """,
        )

        assert (0, "", "1\n") == (ended.returncode, ended.stderr, ended.stdout)
        assert 1 == len(daemon.sessions)
        assert [0, 1] == numbers(daemon)

    def test_what_the_parent_had_queued_is_sent_by_the_parent_alone(self, daemon: FakeDaemon):
        daemon.freeze()
        threading.Timer(0.5, daemon.thaw).start()

        ended = script(
            daemon,
            """
            run = sidestep.init()
            for n in range(100): run.log({"n": n})
            pid = os.fork()
            run.log({"n": 200 if pid == 0 else 100})
            run.finish()
            if pid: os.waitpid(pid, 0)
            """,
        )

        assert (0, "") == (ended.returncode, ended.stderr)
        assert [[200], list(range(101))] == sorted(by_process(daemon).values(), key=len)

    def test_a_grandchild_is_one_more(self, daemon: FakeDaemon):
        ended = script(
            daemon,
            """
            run = sidestep.init()
            for generation in range(3):
                run.log({"n": generation})
                if (pid := os.fork()):
                    os.waitpid(pid, 0)
                    sys.exit(0)
            """,
        )

        assert (0, "") == (ended.returncode, ended.stderr)
        assert [[0], [1], [2]] == sorted(by_process(daemon).values())

    def test_a_child_that_says_init_is_a_session_too(self, daemon: FakeDaemon):
        ended = script(
            daemon,
            """
            sidestep.init()
            pid = os.fork()
            if pid == 0:
                sidestep.init(config={"n": 5})
            else:
                os.waitpid(pid, 0)
            """,
        )

        assert (0, "") == (ended.returncode, ended.stderr)
        assert 2 == len(daemon.sessions)
        assert [5] == numbers(daemon)

    def test_forking_from_many_threads_while_they_log_harms_nobody(self, daemon: FakeDaemon):
        ended = script(
            daemon,
            """
            run = sidestep.init()
            def work(mark):
                for n in range(500):
                    run.log({"n": mark * 500 + n})
            threads = [threading.Thread(target=work, args=(mark,)) for mark in range(3)]
            for thread in threads: thread.start()
            for child in range(5):
                if (pid := os.fork()) == 0:
                    run.log({"child": child})
                    run.finish()
                    os._exit(0)
                os.waitpid(pid, 0)
            for thread in threads: thread.join()
            """,
        )

        assert (0, "") == (ended.returncode, ended.stderr)
        assert list(range(1500)) == sorted(numbers(daemon))
        assert list(range(5)) == sorted(
            record.data["child"] for record in daemon.records if "child" in record.data
        )

    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_children_of_multiprocessing_deliver_without_being_told_to(
        self, daemon: FakeDaemon, method: str, tmp_path: Any
    ):
        program = tmp_path / "program.py"
        program.write_text(
            textwrap.dedent(
                f"""
                import multiprocessing, sidestep

                def work(n):
                    sidestep.init().log({{"n": n}})

                if __name__ == "__main__":
                    sidestep.init().log({{"n": 0}})
                    context = multiprocessing.get_context({method!r})
                    children = [context.Process(target=work, args=(n,)) for n in (1, 2)]
                    for child in children: child.start()
                    for child in children: child.join()
                """
            )
        )

        ended = subprocess.run(
            [sys.executable, str(program)],
            env=environment(daemon),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

        assert (0, "") == (ended.returncode, ended.stderr)
        assert [[0], [1], [2]] == sorted(by_process(daemon).values())
        assert 3 == daemon.heard_of(Bye)
