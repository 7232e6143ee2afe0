"""The daemon stands still for longer than patience, and goes on: nothing is missing, and nothing is late."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.chaos import QUICK, Training, assert_whole, steps_taken, training
from tests.support.daemons import DEADLINE_S
from tests.support.waiting import eventually

pytestmark = pytest.mark.chaos

PAUSE_S = 2 * QUICK["order.patience_s"]


@pytest.mark.parametrize(
    "frozen",
    [
        pytest.param(("intake",), marks=pytest.mark.nightly, id="intake"),
        pytest.param(("intake", "delivery", "core"), id="all of it"),
    ],
)
def test_makes_nothing_late(tmp_path: Path, frozen: tuple[str, ...]):
    """Ranks that send what piled up do not send it at once; until each was heard, rows wait for it."""
    until = tmp_path / "until"
    with Training(tmp_path, training(ranks=4, steps=1, until=until)) as run:
        run.wait_for_progress()
        pids = [run.wait_for(what).pid for what in frozen]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        ends = time.monotonic() + PAUSE_S
        eventually(lambda: time.monotonic() > ends, DEADLINE_S, "time stands still")
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: "stood still for" in run.intake_log(), DEADLINE_S, run.log)
        run.wait_for_progress()
        until.touch()
        exit_code = run.wait()

    report = assert_whole(run, ranks=4, steps=steps_taken(until))
    assert (0, 0) == (exit_code, report.late_rows)
