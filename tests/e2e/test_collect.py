"""What workers kept on disk because nobody listened, brought into a run by the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sidestep import spill
from sidestepd.status import Report, report
from tests.support.waiting import eventually

pytestmark = pytest.mark.e2e

SIDESTEP = [sys.executable, "-m", "sidestep"]
WAIT_S = 100.0
LOG_FIVE = """
import sidestep
run = sidestep.init(project="kept")
for step in range(5):
    run.log({"loss": step, "bad": object()})
run.finish(timeout=2)
"""
LOG_WHEN_TOLD = """
import sys
import sidestep
run = sidestep.init()
run.log({"loss": 0})
print(run.flush(60), flush=True)
sys.stdin.readline()
for step in range(1, 5):
    run.log({"loss": step})
run.finish(timeout=2)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to stand in, without options from outside."""
    for name in [name for name in os.environ if name.startswith(("SIDESTEP_", "WANDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SIDESTEP_SINK_KIND", "jsonl")
    monkeypatch.setenv("SIDESTEP_SAMPLERS_ENABLED", "off")  # their records and sessions would be counted
    monkeypatch.setenv("SIDESTEP_PROGRAM", "0")
    monkeypatch.setenv("SIDESTEP_CONSOLE", "0")
    monkeypatch.setenv("SIDESTEP_AUTOSTART", "0")
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # a socket's path has to be
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        monkeypatch.setenv("TMPDIR", short)
        yield tmp_path


def call(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S, env=os.environ | environ)


def only_run(here: Path) -> Report:
    (run_dir,) = (here / "sidestep-runs").iterdir()
    return report(run_dir)


class TestWithoutADaemon:
    def test_a_new_run_is_made_of_what_was_kept(self, here: Path):
        logged = call(sys.executable, "-c", LOG_FIVE)
        assert "5 of them are kept in" in logged.stderr or "6 of them are kept in" in logged.stderr
        assert "sidestep run -- sidestep collect --any" in logged.stderr

        collected = call(*SIDESTEP, "run", "--", *SIDESTEP, "collect", "--any")

        found = only_run(here)
        assert 0 == collected.returncode, collected.stderr
        assert "records collected" in collected.stderr
        assert (5, "finished") == (found.rows, found.state)
        assert ("bye", 5) == (found.sessions[0].state, found.ledger.values_refused)
        assert found.ledger.offered == found.ledger.delivered
        assert found.ledger.balances
        assert [] == spill.waiting(spill.private_folder())

    def test_there_may_be_nothing_to_collect(self):
        collected = call(*SIDESTEP, "collect")

        assert 0 == collected.returncode
        assert "there is nothing in" in collected.stderr

    def test_nobody_to_hand_it_to_is_said(self):
        call(sys.executable, "-c", LOG_FIVE)

        unknown = call(*SIDESTEP, "collect")
        silent = call(*SIDESTEP, "collect", "--address", "ipc:///tmp/nobody-listens-here.sock")

        assert (69, 69) == (unknown.returncode, silent.returncode)
        assert "no daemon is known" in unknown.stderr
        assert "nobody answers" in silent.stderr
        assert 1 == len(spill.waiting(spill.private_folder()))

    def test_what_belongs_to_another_run_is_passed_over_unless_told(self, here: Path):
        call(sys.executable, "-c", LOG_FIVE)

        collected = call(*SIDESTEP, "run", "--", *SIDESTEP, "collect")

        assert 75 == collected.returncode
        assert "passed over" in collected.stderr
        assert 0 == only_run(here).rows

    def test_a_run_that_its_worker_named_has_what_is_its_own_and_nobody_else(self, here: Path):
        call(sys.executable, "-c", LOG_FIVE.replace("init(", 'init(id="mine", '))

        passed_by = call(*SIDESTEP, "run", "--id", "other", "--", *SIDESTEP, "collect", "--run", "other")
        left = len(spill.waiting(spill.private_folder()))
        call(*SIDESTEP, "run", "--id", "mine", "--", *SIDESTEP, "collect", "--run", "mine")

        (other,), (mine,) = (list((here / "sidestep-runs").glob(f"*-{id_}")) for id_ in ("other", "mine"))
        assert (0, 1) == (passed_by.returncode, left)
        assert (0, 5, True) == (report(other).rows, report(mine).rows, report(mine).ledger.balances)
        assert [] == spill.waiting(spill.private_folder())


class TestValuesLeftOut:
    def test_they_are_told_at_the_end_and_by_status(self, here: Path):
        ran = call(*SIDESTEP, "run", "--", sys.executable, "-c", LOG_FIVE)
        told = call(*SIDESTEP, "status")

        assert "5 values that can not be logged" in ran.stderr
        assert "5 that can not be logged were left out" in told.stdout
        assert "5 values left out" in told.stdout
        assert 5 == only_run(here).ledger.values_refused


class TestADaemonThatIsGone:
    @pytest.mark.nightly
    def test_a_run_that_is_taken_up_collects_what_its_workers_left(self, here: Path):
        """All of the daemon is killed; the worker goes on, and ends."""
        command = [*SIDESTEP, "run", "--", "sh", "-c", 'exec "$0" -c "$1"', sys.executable, LOG_WHEN_TOLD]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as supervisor:
            assert supervisor.stdout is not None
            assert supervisor.stdin is not None
            assert "True\n" == supervisor.stdout.readline()
            family = psutil.Process(supervisor.pid).children(recursive=True)
            daemon = [it for it in family if any("sidestepd" in word for word in it.cmdline()[:6])]
            worker = next(it for it in family if LOG_WHEN_TOLD in it.cmdline())
            os.kill(supervisor.pid, signal.SIGKILL)
            for process in daemon:
                process.kill()
            supervisor.stdin.write("\n")
            supervisor.stdin.flush()
            eventually(lambda: not worker.is_running(), WAIT_S, "the worker does not end")
        (run_dir,) = (here / "sidestep-runs").iterdir()
        assert 1 == len(spill.waiting(spill.folder_of_run(run_dir)))

        with subprocess.Popen([*SIDESTEP, "serve", str(run_dir)], stderr=subprocess.PIPE, text=True) as serving:
            assert serving.stderr is not None
            serving.stderr.readline()
            serving.terminate()
            _, told = serving.communicate(timeout=WAIT_S)

        found = report(run_dir)
        assert 0 == serving.returncode, told
        assert (5, 5, 0, 0) == (
            found.rows, found.ledger.delivered, found.ledger.pending, found.ledger.unknown,
        )  # fmt: skip
        assert found.ledger.balances
        assert ["bye"] == [session.state for session in found.sessions]
        assert [] == spill.waiting(spill.folder_of_run(run_dir))
