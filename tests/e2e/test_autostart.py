"""A training that nobody gave a daemon: its first process starts one, which ends when the training has."""

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

from sidestepd.status import Report, report
from tests.support.daemons import read_jsonl
from tests.support.waiting import eventually

pytestmark = pytest.mark.e2e

WAIT_S = 90.0
LOG_TEN = """
import sidestep
run = sidestep.init(project="digits")
for step in range(10):
    run.log({"loss": step}, step=step)
run.flush(60)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to stand in, where nothing is set, and what was started ends."""
    for name in [name for name in os.environ if name.startswith(("SIDESTEP_", "WANDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SIDESTEP_SINK_KIND", "jsonl")
    monkeypatch.setenv("SIDESTEP_SAMPLERS_ENABLED", "off")  # their records and sessions would be counted
    monkeypatch.setenv("SIDESTEP_PROGRAM", "0")
    monkeypatch.setenv("SIDESTEP_CONSOLE", "0")
    monkeypatch.setenv("SIDESTEP_LAUNCH_ID", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(dir="/tmp") as sockets:  # a socket's path has to be short
        monkeypatch.setenv("XDG_RUNTIME_DIR", sockets)
        yield tmp_path
        for daemon in daemons(sockets):
            daemon.kill()


def python(code: str, **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environ
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it complained of."""
    _, errors = process.communicate(timeout=WAIT_S)
    return process.returncode, errors


def daemons(sockets: str | None = None) -> list[psutil.Process]:
    """The supervisors of the daemons that were started here."""
    marks = ("autostarted", sockets or os.environ["XDG_RUNTIME_DIR"])
    return [one for one in psutil.process_iter() if all(mark in " ".join(_words(one)) for mark in marks)]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def runs(here: Path) -> list[Report]:
    """All runs, the oldest first."""
    files = sorted(here.glob("sidestep-runs/*/config.json"), key=lambda path: path.stat().st_mtime_ns)
    return [report(path.parent) for path in files]


def finished(here: Path, count: int = 1) -> list[Report]:
    """The runs, when so many are finished and no daemon is left."""

    def look() -> list[Report] | None:
        found = runs(here)
        done = len(found) == count and all(one.state == one.run.state == "finished" for one in found)
        return found if done and not daemons() else None

    return eventually(look, WAIT_S, lambda: f"{[(one.run.id, one.state) for one in runs(here)]} {daemons()}")


def steps(run: Report) -> list[int]:
    return [row.values["global_step"] for row in read_jsonl(Path(run.run.dir))]


class TestOneProcess:
    def test_what_it_logged_is_in_a_run_and_nothing_else_is_left(self, here: Path):
        assert (0, "") == ended(python(LOG_TEN))

        (run,) = finished(here)

        assert (list(range(10)), 0, True) == (steps(run), run.run.exit_code, run.ledger.balances)
        assert [] == list(Path(os.environ["XDG_RUNTIME_DIR"]).glob("sidestep-*/*"))
        assert [Path(run.run.dir)] == list((here / "sidestep-runs").iterdir())

    def test_an_exception_is_its_exit_code(self, here: Path):
        code, _ = ended(python(LOG_TEN + "raise ValueError('no')"))

        (run,) = finished(here)

        assert (1, 1) == (code, run.run.exit_code)

    def test_killed_without_a_word_it_has_failed_and_that_is_known_at_once(self, here: Path):
        process = python(LOG_TEN + "import os; os.kill(os.getpid(), 9)", SIDESTEP_ORDER_LEASE_S="3600")

        assert -signal.SIGKILL == ended(process)[0]

        (run,) = finished(here)
        assert (1, 10, "lost") == (run.run.exit_code, run.rows, run.sessions[0].state)

    @pytest.mark.nightly
    def test_each_init_after_a_finish_is_a_run(self, here: Path):
        again = LOG_TEN + "run.finish()\n"

        assert (0, "") == ended(python(again * 3))

        found = finished(here, 3)
        assert [list(range(10))] * 3 == [steps(run) for run in found]
        assert 3 == len({run.run.id for run in found})

    @pytest.mark.nightly
    def test_an_id_names_the_run(self, here: Path):
        ended(python(LOG_TEN, WANDB_RUN_ID="mine"))

        assert "mine" == finished(here)[0].run.id

    def test_a_daemon_that_is_killed_is_started_again_and_nothing_is_missing(self, here: Path):
        wait_and_log_ten_more = (
            LOG_TEN
            + """
print("ready", flush=True)
input()
for step in range(10, 20):
    run.log({"loss": step}, step=step)
run.flush(60)
"""
        )
        process = subprocess.Popen(
            [sys.executable, "-c", wait_and_log_ten_more],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert "ready\n" == process.stdout.readline()
        (daemon,) = daemons()

        for one in [*daemon.children(recursive=True), daemon]:
            one.kill()
        process.communicate("\n", timeout=WAIT_S)

        (run,) = finished(here)
        assert (0, list(range(20)), True) == (process.returncode, steps(run), run.ledger.balances)


class TestRanks:
    def test_all_that_are_started_together_share_one_daemon_and_one_run(self, here: Path):
        own = LOG_TEN.replace("step=step", "step=step * 4 + int(__import__('os').environ['RANK'])")
        together = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}

        started = [python(own, **together, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(4)]

        assert [(0, "")] * 4 == [ended(process) for process in started]
        (run,) = finished(here)
        assert (4, 40, True) == (run.ranks, run.ledger.delivered, run.ledger.balances)
        assert list(range(40)) == sorted(steps(run))

    def test_on_several_nodes_none_is_started_and_that_is_said_once(self, here: Path):
        two_nodes = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "1"}

        code, errors = ended(python(LOG_TEN, **two_nodes, RANK="0", LOCAL_RANK="0"))

        assert (0, 1) == (code, errors.count("the processes are on several nodes"))
        assert [] == daemons() == runs(here)


class TestNone:
    @pytest.mark.parametrize(
        ("code", "environ"),
        [
            (LOG_TEN, {"SIDESTEP_AUTOSTART": "0"}),
            (LOG_TEN.replace("project=", "settings={'autostart': False}, project="), {}),
        ],
    )
    def test_where_it_is_switched_off(self, here: Path, code: str, environ: dict[str, str]):
        ended_with, errors = ended(python(code, **environ))

        assert (0, 1) == (ended_with, errors.count("autostart is off"))
        assert [] == daemons() == runs(here)

    @pytest.mark.nightly
    def test_where_it_is_not_installed(self, here: Path):
        without = "import sidestep.autostart as it; it.NEEDED = ('no_such_module',)\n"

        code, errors = ended(python(without + LOG_TEN.replace("flush(60)", "flush(1)")))

        assert (0, 1) == (code, errors.count("pip install 'sidestep[daemon]'"))

    @pytest.mark.nightly
    def test_one_that_can_not_start_says_why_in_the_training(self, here: Path):
        quick = LOG_TEN.replace("flush(60)", "flush(5)")

        code, errors = ended(python(quick, SIDESTEP_ORDER_PATIENCE_S="-1"))

        why = "the daemon ended with 2: sidestep: order.patience_s = -1 (from SIDESTEP_ORDER_PATIENCE_S)"
        assert (0, 1) == (code, errors.count(why))
