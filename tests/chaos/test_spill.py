"""Workers that end while intake stands still: what they spilled is collected, and the ledger balances."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidestep import spill
from tests.support.chaos import DEADLINE_S, Training
from tests.support.daemons import freeze
from tests.support.waiting import eventually

pytestmark = pytest.mark.chaos

OUTBOX = 600_000
WORKER = """
import os, signal, sys, time
from pathlib import Path
import sidestep

base, records, end = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
run = sidestep.init()
run.log({"n": 0}, step=0)
assert run.flush(60)
(base / "acknowledged").touch()
while not (base / "go").exists():
    time.sleep(0.01)
for n in range(1, records):
    while run._session.outbox.room < 5000:
        time.sleep(0.001)
    run.log({"n": n, "text": "x" * 1000}, step=n)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
run.finish(timeout=2)
"""


@contextmanager
def ended_while_intake_stood_still(
    base: Path, end: str, records: int = 3000, **options: Any
) -> Iterator[tuple[Training, psutil.Process]]:
    """A worker that has said so much to nobody, and is gone."""
    (base / "worker.py").write_text(WORKER)
    command = ["sh", "-c", f"{sys.executable} {base}/worker.py {base} {records} {end}; exit 0"]
    environment = {"SIDESTEP_OUTBOX_BYTES": str(OUTBOX)}
    with Training(base, command, sink="jsonl", options=options, environment=environment) as run:
        eventually((base / "acknowledged").exists, DEADLINE_S, run.log)
        intake = run.wait_for("intake")
        assert intake is not None
        freeze(intake)
        (base / "go").touch()
        folder = spill.folder_of_run(run.run_dir)
        (path,) = eventually(
            lambda: [path for path in spill.waiting(folder) if spill.is_free(path)], DEADLINE_S, run.log
        )
        assert path.stat().st_size > OUTBOX
        yield run, intake


def acknowledged(run: Training) -> int:
    return sum(session.acknowledged for session in run.report().sessions)


def values(run: Training) -> list[int]:
    return [row.values["n"] for row in run.rows() if "n" in row.values]


class TestCollectedByTheDaemon:
    def test_a_worker_that_finished_is_in_the_run_to_its_last_record(self, tmp_path: Path):
        with ended_while_intake_stood_still(tmp_path, "finish") as (run, intake):
            intake.send_signal(signal.SIGCONT)

            assert run.wait() == 0

        report = run.report()
        assert list(range(3000)) == values(run)
        assert (3000, 3000, 0, 0) == (
            report.ledger.offered, report.ledger.delivered, report.ledger.pending, report.ledger.unknown,
        )  # fmt: skip
        assert ["bye"] == [session.state for session in report.sessions]
        assert report.ledger.balances
        assert [] == spill.waiting(spill.folder_of_run(run.run_dir))

    def test_a_worker_that_was_killed_is_there_as_far_as_it_had_spilled(self, tmp_path: Path):
        """The rest is unknown, as far as it was counted, and nothing is guessed."""
        with ended_while_intake_stood_still(tmp_path, "kill") as (run, intake):
            intake.send_signal(signal.SIGCONT)

            assert run.wait() == 0

        report, found = run.report(), values(run)
        assert list(range(len(found))) == found
        assert 3000 > len(found) > 3000 - 1.1 * OUTBOX / 1000
        assert ["lost"] == [session.state for session in report.sessions]
        assert (len(found), 0) == (report.ledger.delivered, report.ledger.pending)
        assert report.ledger.offered == report.ledger.delivered + report.ledger.unknown <= 3000
        assert report.ledger.balances

    @pytest.mark.nightly
    def test_an_intake_that_is_killed_while_it_collects_collects_again(self, tmp_path: Path):
        slowly = {"intake.credit_bytes": 1024 * 1024, "intake.commit_interval_s": 0.5}
        with ended_while_intake_stood_still(tmp_path, "finish", 10_000, **slowly) as (run, intake):
            intake.send_signal(signal.SIGCONT)
            eventually(lambda: acknowledged(run) > 1, DEADLINE_S, run.log)
            os.kill(intake.pid, signal.SIGKILL)
            assert acknowledged(run) < 10_000, "it was collected too soon"

            assert run.wait() == 0

        assert list(range(10_000)) == values(run)
        assert run.boots() == 2
        assert run.report().ledger.balances
