"""Looking at a run, and at the machine it is to run on, as a user types it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from sidestepd.rundir import newest_run_dir
from sidestepd.status import report
from sidestepd.top import watch
from tests.support.waiting import eventually

pytestmark = pytest.mark.e2e

SIDESTEP = [sys.executable, "-m", "sidestep"]
WAIT_S = 90.0
UNTIL = """
import sys, sidestep
run = sidestep.init()
for step in range(10):
    run.log({"loss": step})
run.flush(60)
sys.stdin.readline()
run.finish(timeout=60)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to stand in, without options from outside."""
    for name in [name for name in os.environ if name.startswith(("SIDESTEP_", "WANDB_"))]:
        monkeypatch.delenv(name)
    for name in ("SAMPLERS_ENABLED", "PROGRAM", "CONSOLE"):
        monkeypatch.setenv(f"SIDESTEP_{name}", "off")
    monkeypatch.setenv("SIDESTEP_SINK_KIND", "jsonl")
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(dir="/tmp") as sockets:  # a socket's path has to be short
        monkeypatch.setenv("XDG_RUNTIME_DIR", sockets)
        yield tmp_path


def sidestep(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SIDESTEP, *words], capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.fixture
def training(here: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that has ten rows, and ends when it is sent a line."""
    process = subprocess.Popen(
        [*SIDESTEP, "run", "--", sys.executable, "-c", UNTIL], stdin=subprocess.PIPE, text=True
    )
    yield process
    if process.poll() is None:
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            one.kill()
    process.communicate()


def test_top_shows_a_run_until_it_has_ended(training: subprocess.Popen[str], here: Path):
    def said() -> Path | None:
        run_dir = newest_run_dir(here)
        found = report(run_dir) if run_dir and (run_dir / "spool.db").exists() else None
        return run_dir if found and found.ledger.offered == 10 else None

    run_dir = eventually(said, WAIT_S, "nothing was logged")
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)

    def look_away(_: float) -> None:
        assert training.stdin is not None
        if not training.stdin.closed:
            training.stdin.close()
        eventually(lambda: report(run_dir).state == "finished", WAIT_S, "the run does not end")

    watch(run_dir, 1.0, console=screen, pause=look_away)

    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert shown.index(", running") < shown.index(", finished")
    assert "rows/s in the run" in shown
    assert 0 == training.wait(WAIT_S)
    assert report(run_dir).ledger.balances

    once = sidestep("top")
    assert (0, sidestep("status").stdout) == (once.returncode, once.stdout)
    none = sidestep("leet")
    assert (2, True) == (none.returncode, "there is no run of wandb in" in none.stderr)


def test_doctor_says_for_each_thing_how_it_is_and_leaves_nothing(here: Path):
    well = sidestep("doctor", "--json")
    (here / "file").touch()
    unwell = sidestep("doctor", "--dir", "file/runs")

    assert 0 == well.returncode, well.stdout
    assert {"directory", "disk", "socket", "launcher"} <= {it["what"] for it in json.loads(well.stdout)}
    assert 1 == unwell.returncode
    assert any(line.startswith("fail  directory") for line in unwell.stdout.splitlines())
    assert ["file"] == [path.name for path in here.iterdir()]
