"""Four ranks of a real torchrun that wait for each other: one is slowed, one stopped, one killed: each is named.

The control run is the same training undisturbed: nobody is named.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from sidestepd.rows import Alert
from sidestepd.sinks import wandb_log
from tests.support.chaos import Training
from tests.support.daemons import HeldRow
from tests.support.waiting import eventually

pytestmark = pytest.mark.chaos

RANKS = 4
OPTIONS = {
    "intake.heartbeat_s": 0.5,
    "watch.silent_s": 5.0,
    "watch.straggler_s": 1.5,
    "watch.stalled_s": 60.0,
}
"""As small as a machine that is short of cores bears."""


@dataclass(slots=True)
class Lockstep:
    """The training, and what may be done to it."""

    run: Training
    folder: Path

    def reach(self, more: int) -> None:
        """Until so many more rows are in the run."""
        rows = self.run.told().get("rows", 0)
        eventually(lambda: self.run.told().get("rows", 0) >= rows + more, 60 + more / 2, self.run.log)

    def pid(self, rank: int) -> int:
        return int((self.folder / str(rank)).read_text())

    def alerts(self) -> Sequence[Alert]:
        """What people were told so far."""
        return self.run.report().alerts

    def see(self, title: str) -> Alert:
        """Until this was told."""
        return eventually(
            lambda: next((it for it in self.alerts() if it.title == title), None),
            60,
            lambda: f"{title!r}, only {[it.title for it in self.alerts()]}\n{self.run.log()}",
        )


def lockstep(base: Path, sink: str, *, torch: bool = True) -> Lockstep:
    folder = base / "folder"
    folder.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [*torchrun, "-m", "tests.support.lockstep"] if torch else ["-m", "tests.support.in_step"]
    return Lockstep(Training(base, [sys.executable, *command, str(folder)], sink=sink, options=OPTIONS), folder)


def named(rows: Sequence[HeldRow]) -> set[int]:
    """The ranks that rows call stragglers."""
    return {row.values["sidestep/straggler_rank"] for row in rows if "sidestep/straggler_rank" in row.values}


class TestNamed:
    def test_each_in_its_turn(self, tmp_path: Path):
        self.disturb(tmp_path, stopped_for_s=0.0)

    @pytest.mark.nightly
    def test_with_a_stop_of_twenty_seconds(self, tmp_path: Path):
        self.disturb(tmp_path, stopped_for_s=20.0)

    def disturb(self, base: Path, *, stopped_for_s: float) -> None:
        training = lockstep(base, "wandb")
        with training.run as run:
            training.reach(60)
            before_any = list(training.alerts())

            slow = training.folder / "slow-2"
            slow.touch()
            training.see("rank 2 is slower than the others")
            slow.unlink()
            training.see("rank 2 keeps up again")

            stopped = psutil.Process(training.pid(1))
            stopped.suspend()
            until = time.monotonic() + stopped_for_s
            training.see("rank 1 is silent")
            eventually(lambda: time.monotonic() >= until, stopped_for_s + 1)
            assert stopped.status() == psutil.STATUS_STOPPED
            stopped.resume()
            training.see("rank 1 is heard again")
            training.reach(10)

            os.kill(training.pid(3), signal.SIGKILL)
            exit_code = run.wait()

        report = run.report()
        assert before_any == []
        assert exit_code != 0
        assert [
            "rank 2 is slower than the others", "rank 2 keeps up again", "rank 1 is silent",
            "rank 1 is heard again", "rank 3 ended without a word",
        ] == [it.title for it in report.alerts]  # fmt: skip
        assert ["rank 3 ended without a word"] == [it.title for it in report.troubles]
        assert [(it.title, it.text, it.level) for it in report.alerts] == in_wandb(run)
        assert named(run.rows()) == {-1, 2}
        assert "Rank 3 (process" in (base / "stderr").read_text()
        assert report.ledger.balances
        assert report.ledger.pending == 0


class TestControl:
    def test_nobody_is_named_in_an_undisturbed_run(self, tmp_path: Path):
        """Four processes without a launcher, as torch's takes long to start."""
        self.leave_alone(tmp_path, rows=40, torch=False)

    @pytest.mark.nightly
    def test_nor_in_one_of_torchrun(self, tmp_path: Path):
        self.leave_alone(tmp_path, rows=80)

    @pytest.mark.nightly
    def test_nor_in_a_longer_one(self, tmp_path: Path):
        self.leave_alone(tmp_path, rows=800)

    def leave_alone(self, base: Path, *, rows: int, torch: bool = True) -> None:
        training = lockstep(base, "jsonl", torch=torch)
        with training.run as run:
            training.reach(rows)
            (training.folder / "stop").touch()
            assert run.wait() == 0, run.log()

        report, held = run.report(), run.rows()
        assert () == report.alerts
        assert {-1} == named(held)
        assert len(held) >= rows
        assert (report.ledger.offered, 0) == (report.ledger.delivered, report.ledger.pending)
        assert {RANKS} == {row.values["sidestep/ranks_reported"] for row in held}
        times = [row.values["sidestep/step_time_s"] for row in held if "sidestep/step_time_s" in row.values]
        assert len(times) == len(held) - 1
        assert min(times) > 0.03, "a step has at least its work in it"


def in_wandb(run: Training) -> list[tuple[str, str, str]]:
    """The alerts that the run's files hold."""
    paths = wandb_log.segments(run.run_dir / "wandb")
    return [alert for path in paths for alert in wandb_log.alerts(path)]
