"""How a worker's process, its threads and its children begin and end, with real processes and a daemon in memory.

Each shows that nothing hangs, and that the daemon has what each process said.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from sidestep import spill
from sidestep.collect import collect
from sidestep.endpoint import Endpoint
from sidestep.testing import FakeDaemon, environment
from sidestep.wire import Bye, Record
from tests.support.ledgers import balanced_daemon
from tests.support.waiting import eventually

DEADLINE_S = 100.0
STARTING_S = 20.0
"""What importing torch may take on a machine with other things to do."""

HEAD = """
import os, signal, sys, threading, time
import sidestep

def said(what):
    print(what, flush=True)
"""


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with balanced_daemon() as made:
        yield made


def start(daemon: FakeDaemon, body: str, tmp_path: Path, **environ: str) -> subprocess.Popen[str]:
    program = tmp_path / "program.py"
    program.write_text(HEAD + textwrap.dedent(body))
    return subprocess.Popen(
        [sys.executable, str(program)],
        env={**environment(daemon), **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(daemon: FakeDaemon, body: str, tmp_path: Path, **environ: str) -> tuple[int, str, str]:
    """The exit code of a program, and what it said on both outputs."""
    process = start(daemon, body, tmp_path, **environ)
    said, told = process.communicate(timeout=DEADLINE_S)
    return process.returncode, said, told


def by_process(daemon: FakeDaemon) -> list[list[int]]:
    """What each session said, in the order of the numbers."""
    return sorted(
        [record.data["n"] for record in seen.records if isinstance(record, Record) and "n" in record.data]
        for seen in daemon.sessions.values()
    )


def spilled() -> list[Path]:
    return spill.waiting(spill.private_folder())


def exit_codes(daemon: FakeDaemon) -> list[int | None]:
    return [seen.bye.exit_code for seen in daemon.sessions.values() if seen.bye]


class TestExitCodes:
    @pytest.mark.parametrize(
        ("ending", "process", "session"),
        [
            pytest.param("sys.exit(3)", 3, 3, id="sys.exit"),
            pytest.param("sys.exit()", 0, 0, id="sys.exit with nothing"),
            pytest.param("sys.exit('no')", 1, 1, id="sys.exit with words"),
            pytest.param("raise RuntimeError('oh')", 1, 1, id="an exception"),
            pytest.param("raise KeyboardInterrupt", -signal.SIGINT, 130, id="KeyboardInterrupt"),
            pytest.param("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", -signal.SIGINT, 130, id="SIGINT"),
            pytest.param("sidestep.finish(exit_code=5)", 0, 5, id="finish with a code"),
            pytest.param("pass", 0, None, id="nothing special"),
        ],
    )
    def test_the_session_ends_as_its_process_does(
        self, daemon: FakeDaemon, tmp_path: Path, ending: str, process: int, session: int | None
    ):
        code, _, _ = run(daemon, f"sidestep.init().log({{'n': 1}})\n{ending}", tmp_path)

        assert process == code
        assert [session] == exit_codes(daemon)
        assert [[1]] == by_process(daemon)

    def test_an_exception_in_a_thread_is_a_failure_of_the_session(self, daemon: FakeDaemon, tmp_path: Path):
        code, _, told = run(
            daemon,
            """
            sidestep.init().log({"n": 1})
            def fail():
                raise RuntimeError("in a thread")
            thread = threading.Thread(target=fail)
            thread.start(); thread.join()
            """,
            tmp_path,
        )

        assert 0 == code
        assert "in a thread" in told
        assert [1] == exit_codes(daemon)

    def test_the_hooks_are_given_back(self, daemon: FakeDaemon, tmp_path: Path):
        _, said, _ = run(
            daemon,
            """
            before = sys.excepthook, threading.excepthook, sys.exit
            sidestep.init().finish()
            said(before == (sys.excepthook, threading.excepthook, sys.exit))
            """,
            tmp_path,
        )

        assert "True\n" == said


class TestSuddenEnds:
    @pytest.mark.parametrize("ending", ["os._exit(7)", "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"])
    def test_what_was_acknowledged_is_there(self, daemon: FakeDaemon, tmp_path: Path, ending: str):
        code, said, _ = run(
            daemon,
            f"""
            run = sidestep.init()
            for n in range(100): run.log({{"n": n}})
            said(run.flush(60))
            run.log({{"n": 100}})
            {ending}
            """,
            tmp_path,
        )

        assert (code, "True\n") in {(7, said), (-signal.SIGTERM, said)}
        assert list(range(100)) == by_process(daemon)[0][:100]
        assert [] == exit_codes(daemon)

    @pytest.mark.parametrize("state", ["frozen", "absent"])
    def test_an_exit_without_a_daemon_takes_five_seconds_at_most(
        self, daemon: FakeDaemon, tmp_path: Path, state: str
    ):
        """And leaves everything where it is found."""
        process = start(
            daemon,
            """
            run = sidestep.init()
            run.log({"n": 0})
            said(run.flush(60))
            sys.stdin.readline()
            run.log({"n": 1})
            said("over")
            """,
            tmp_path,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert "True\n" == process.stdout.readline()
        daemon.freeze() if state == "frozen" else daemon.stop()
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        started = monotonic()

        _, told = process.communicate(timeout=DEADLINE_S)

        assert monotonic() - started < 5.0 + 2.0
        assert "1 records are not acknowledged" in told
        daemon.restart()
        (done,) = collect(spill.waiting(spill.private_folder()), Endpoint(address=daemon.address), run="fake")
        assert "" == done.why
        assert [[0, 1]] == by_process(daemon)

    def test_killed_while_it_waits_at_its_end_it_has_left_what_it_had(self, daemon: FakeDaemon, tmp_path: Path):
        """Records go to the spill while there is time, not with the last of it."""
        process = start(
            daemon,
            f"""
            run = sidestep.init()
            run.log({{"n": 0}})
            said(run.flush(60))
            sys.stdin.readline()
            run.log({{"n": 1}})
            run.finish(timeout={DEADLINE_S})
            """,
            tmp_path,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert "True\n" == process.stdout.readline()
        daemon.freeze()
        process.stdin.write("\n")
        process.stdin.flush()

        eventually(lambda: any(b"\xa1n\x01" in it.read_bytes() for it in spilled()), DEADLINE_S / 2)
        process.kill()
        process.communicate()

        daemon.restart()
        (done,) = collect(spilled(), Endpoint(address=daemon.address), run="fake")
        assert "" == done.why
        assert [[0, 1]] == by_process(daemon)

    def test_where_nobody_is_known_an_exit_waits_for_nobody(self, tmp_path: Path):
        """The file that is to lead to the daemon is not there: that is said, and records are kept."""
        program = f"""if True:
            import sidestep, time
            run = sidestep.init()
            run.log({{"n": 0}})
            began = time.monotonic()
            run.finish(timeout={DEADLINE_S})
            print(time.monotonic() - began < {DEADLINE_S} / 2)
            """
        context = {"SIDESTEP_CONTEXT": str(tmp_path / "nowhere.json"), "SIDESTEP_AUTOSTART": "0"}

        ended = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | context, capture_output=True, text=True, check=True
        )

        assert "True\n" == ended.stdout
        assert 1 == ended.stderr.count("nowhere.json")
        assert "because no daemon is known" in ended.stderr
        assert 1 == len(spill.waiting(spill.private_folder()))


class TestForks:
    def test_before_init_each_has_its_own(self, daemon: FakeDaemon, tmp_path: Path):
        code, _, told = run(
            daemon,
            """
            pid = os.fork()
            sidestep.init().log({"n": 1 if pid == 0 else 0})
            if pid: os.waitpid(pid, 0)
            """,
            tmp_path,
        )

        assert (0, "") == (code, told)
        assert [[0], [1]] == by_process(daemon)

    def test_while_the_sender_is_connecting(self, daemon: FakeDaemon, tmp_path: Path):
        daemon.stop()
        process = start(
            daemon,
            """
            run = sidestep.init()
            run.log({"n": 0})
            pid = os.fork()
            run.log({"n": 1 if pid else 10})
            said("forked")
            if pid: os.waitpid(pid, 0)
            """,
            tmp_path,
        )
        assert process.stdout is not None
        process.stdout.readline()
        daemon.start()

        _, told = process.communicate(timeout=DEADLINE_S)

        assert (0, "") == (process.returncode, told)
        assert [[0, 1], [10]] == by_process(daemon)

    def test_with_an_outbox_that_is_full_the_child_has_one_of_its_own(self, daemon: FakeDaemon, tmp_path: Path):
        daemon.freeze()
        process = start(
            daemon,
            """
            run = sidestep.init()
            n = 0
            while not run.stats().dropped:
                run.log({"n": n, "text": "x" * 1000})
                n += 1
            pid = os.fork()
            if pid == 0: run.log({"n": -1})
            said("forked")
            if pid: os.waitpid(pid, 0)
            said(run.flush(60))
            """,
            tmp_path,
            SIDESTEP_OUTBOX_BYTES="300000",
            SIDESTEP_WHEN_FULL="drop",
        )
        assert process.stdout is not None
        process.stdout.readline()
        daemon.thaw()

        said, told = process.communicate(timeout=DEADLINE_S)

        assert 0 == process.returncode, told
        assert "True" in said
        child, parent = by_process(daemon)
        assert [-1] == child
        assert list(range(len(parent))) == parent

    @pytest.mark.nightly
    def test_with_a_spill_each_leaves_its_own(self, daemon: FakeDaemon, tmp_path: Path):
        daemon.stop()
        code, _, _ = run(
            daemon,
            """
            run = sidestep.init()
            def log(start, end):
                for n in range(start, end):
                    while not run._session.dormant and run._session.outbox.room < 5000: time.sleep(0.001)
                    run.log({"n": n, "text": "x" * 1000})
            log(0, 2000)
            pid = os.fork()
            log(5000 if pid == 0 else 2000, 6000 if pid == 0 else 2500)
            run.finish(timeout=2)
            if pid: os.waitpid(pid, 0)
            """,
            tmp_path,
            SIDESTEP_OUTBOX_BYTES="600000",
        )
        assert 0 == code
        daemon.start()

        done = collect(spill.waiting(spill.private_folder()), Endpoint(address=daemon.address), run="fake")

        assert ["", ""] == [one.why for one in done]
        assert [list(range(2500)), list(range(5000, 6000))] == by_process(daemon)

    def test_in_a_thread(self, daemon: FakeDaemon, tmp_path: Path):
        code, _, told = run(
            daemon,
            """
            run = sidestep.init()
            run.log({"n": 0})
            def fork():
                pid = os.fork()
                if pid == 0:
                    run.log({"n": 1})
                    run.finish()
                    os._exit(0)
                os.waitpid(pid, 0)
            thread = threading.Thread(target=fork)
            thread.start(); thread.join()
            run.log({"n": 2})
            """,
            tmp_path,
        )

        assert (0, "") == (code, told)
        assert [[0, 2], [1]] == by_process(daemon)

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_that_the_run_is_handed_to_joins_it(self, daemon: FakeDaemon, tmp_path: Path, method: str):
        """As scripts do it that give `run` or `run.log` to a pool."""
        body = f"""
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        def work(run, log, n):
            log({{"n": n}})
            assert run is sidestep.run
            return n

        if __name__ == "__main__":
            run = sidestep.init()
            run.log({{"n": 0}})
            context = multiprocessing.get_context({method!r})
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                said([pool.submit(work, run, run.log, n).result() for n in (1, 2)])
        """

        code, said, told = run(daemon, body, tmp_path)

        assert (0, "[1, 2]\n") == (code, said), told
        assert [[0], [1, 2]] == by_process(daemon)

    def test_after_finish_a_child_says_nothing(self, daemon: FakeDaemon, tmp_path: Path):
        code, said, _ = run(
            daemon,
            """
            run = sidestep.init()
            run.finish()
            pid = os.fork()
            run.log({"n": 1})
            if pid == 0: said(run.stats().dropped)
            if pid: os.waitpid(pid, 0)
            """,
            tmp_path,
        )

        assert (0, "{'after_finish': 1}\n") == (code, said)
        assert 1 == len(daemon.sessions)


class TestMultiprocessing:
    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_children_that_fail_or_exit_are_whole_and_their_codes_are_known(
        self, daemon: FakeDaemon, tmp_path: Path, method: str
    ):
        code, said, _ = run(
            daemon,
            f"""
            import multiprocessing

            def work(n):
                run = sidestep.init()
                run.log({{"n": n}})
                if n == 2: raise RuntimeError("oh")
                if n == 3: sys.exit(4)
                if n == 4:
                    run.flush(60)
                    os._exit(5)

            if __name__ == "__main__":
                context = multiprocessing.get_context({method!r})
                children = [context.Process(target=work, args=(n,)) for n in (1, 2, 3, 4)]
                for child in children: child.start()
                for child in children: child.join()
                said([child.exitcode for child in children])
            """,
            tmp_path,
        )

        assert (0, "[0, 1, 4, 5]\n") == (code, said)
        assert [[1], [2], [3], [4]] == by_process(daemon)
        assert 3 == daemon.heard_of(Bye)
        assert 4 in exit_codes(daemon)

    def test_a_terminated_child_takes_nobody_with_it(self, daemon: FakeDaemon, tmp_path: Path):
        code, _, told = run(
            daemon,
            """
            import multiprocessing
            run = sidestep.init()
            run.log({"n": 0})

            def work(ready):
                run.log({"n": 10})
                ready.send(run.flush(60))
                time.sleep(100)

            context = multiprocessing.get_context("fork")
            here, there = context.Pipe()
            child = context.Process(target=work, args=(there,))
            child.start()
            here.recv()
            child.terminate(); child.join()
            run.log({"n": 1})
            """,
            tmp_path,
        )

        assert (0, "") == (code, told)
        assert [[0, 1], [10]] == by_process(daemon)


class TestDataLoaders:
    """Workers of torch's DataLoader that log, as a dataset or a transform does."""

    @pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.nightly)])
    @pytest.mark.parametrize("persistent", [False, True])
    def test_every_item_is_logged_once(self, daemon: FakeDaemon, tmp_path: Path, method: str, persistent: bool):
        code, _, told = run(
            daemon,
            f"""
            import torch
            from torch.utils.data import DataLoader, Dataset

            class Items(Dataset):
                def __len__(self):
                    return 40
                def __getitem__(self, n):
                    sidestep.log({{"n": n}})
                    return n

            def begin(worker):
                sidestep.init()

            if __name__ == "__main__":
                run = sidestep.init()
                loader = DataLoader(
                    Items(), batch_size=4, num_workers=2, multiprocessing_context={method!r},
                    worker_init_fn=begin, persistent_workers={persistent},
                )
                for epoch in range(2):
                    for batch in loader:
                        run.log({{"batch": 1}})
            """,
            tmp_path,
        )

        assert 0 == code, told
        items = sorted(n for session in by_process(daemon) for n in session)
        assert sorted(list(range(40)) * 2) == items
        assert 20 == sum("batch" in record.data for record in daemon.records)

    def test_forked_ones_need_no_init(self, daemon: FakeDaemon, tmp_path: Path):
        code, _, told = run(
            daemon,
            """
            from torch.utils.data import DataLoader, Dataset

            class Items(Dataset):
                def __len__(self):
                    return 10
                def __getitem__(self, n):
                    sidestep.log({"n": n})
                    return n

            sidestep.init()
            for _ in DataLoader(Items(), num_workers=2, multiprocessing_context="fork"):
                pass
            """,
            tmp_path,
        )

        assert (0, "") == (code, told)
        assert list(range(10)) == sorted(n for session in by_process(daemon) for n in session)
        assert 3 == len(daemon.sessions)

    def test_ones_that_never_log_are_no_sessions(self, daemon: FakeDaemon, tmp_path: Path):
        code, _, told = run(
            daemon,
            """
            from torch.utils.data import DataLoader
            run = sidestep.init()
            for n, _ in enumerate(DataLoader(list(range(8)), num_workers=2, multiprocessing_context="fork")):
                run.log({"n": n})
            """,
            tmp_path,
        )

        assert (0, "") == (code, told)
        assert [list(range(8))] == by_process(daemon)
