"""kill -9: intake, delivery and wandb-core in turn, under four ranks that log all the time. Nothing is missing.

The control runs do the same with one guard switched off, and must show what the guard is for.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.chaos import DEADLINE_S, Training, assert_whole, duplicates, steps_taken, training
from tests.support.waiting import eventually
from tests.support.wandb_server import StandIn

pytestmark = pytest.mark.chaos

VICTIMS = ("intake", "delivery", "core")
LONG_KILLS = int(os.environ.get("SIDESTEP_TEST_KILLS", "40"))
LONG_STEPS = int(os.environ.get("SIDESTEP_TEST_STEPS", "30000"))
"""A training takes at least so many steps, and goes on until the last kill."""


def kill_in_turn(run: Training, times: int) -> None:
    """Kill one after the other, each when the last one's successor has confirmed rows."""
    for victim in itertools.islice(itertools.cycle(VICTIMS), times):
        run.wait_for_progress()
        assert run.kill(victim), f"the run ended before {times} kills:\n{run.log()}"


class TestKillNine:
    @pytest.mark.timeout(900)
    def test_every_step_of_every_rank_is_in_the_run_exactly_once(self, tmp_path: Path):
        self.kill_and_look(tmp_path, steps=3000, kills=9)

    @pytest.mark.nightly
    @pytest.mark.timeout(3600)
    def test_every_step_is_there_after_a_long_night(self, tmp_path: Path):
        self.kill_and_look(tmp_path, steps=LONG_STEPS, kills=LONG_KILLS)

    @pytest.mark.nightly
    @pytest.mark.timeout(900)
    def test_every_step_is_on_the_server_exactly_once(self, tmp_path: Path):
        with StandIn(tmp_path / "server") as server:
            self.kill_and_look(tmp_path, steps=500, kills=3, server=server)

            assert server.tallies()["lines said otherwise"] == 0

    @pytest.mark.nightly
    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize("online", [False, True])
    def test_twenty_kills_at_two_hundred_records_a_second(self, tmp_path: Path, online: bool):
        """From each of four ranks, until the last was killed."""
        with StandIn(tmp_path / "server") if online else nullcontext() as server:
            self.kill_and_look(tmp_path, steps=24_000, rate=200.0, kills=20, server=server)

    def kill_and_look(
        self,
        base: Path,
        *,
        steps: int,
        kills: int,
        rate: float = 100.0,
        server: StandIn | None = None,
    ) -> None:
        until = base / "until"
        with Training(base, training(ranks=4, steps=steps, rate=rate, until=until), server=server) as run:
            kill_in_turn(run, kills)
            until.touch()
            exit_code = run.wait(timeout=120 + steps / 50)

        self.see_that_it_happened(run, kills)
        report = assert_whole(run, ranks=4, steps=steps_taken(until))
        assert (exit_code, report.run.exit_code, report.state) == (0, 0, "finished")
        assert report.late_rows == 0

    def see_that_it_happened(self, run: Training, kills: int) -> None:
        """As many were killed as should be, of each kind, and each had a successor of its own."""
        assert len(run.kills) == kills
        assert set(VICTIMS) == {kill.what for kill in run.kills}
        assert all(count == 1 for count in Counter(kill.pid for kill in run.kills).values())
        assert all(kill.pid != kill.successor for kill in run.kills)
        assert run.boots() >= 1 + sum(kill.what == "intake" for kill in run.kills)
        resent = (run.run_dir / "logs" / "delivery.log").read_text().count("rows again")
        assert resent > 0, "no row had to be sent again: nothing was lost with any wandb-core"


class TestControl:
    """Without a guard deaths at one place leave duplicates; with it they leave none (test_crash_points)."""

    def test_without_the_duplicate_gate_a_frame_that_is_sent_again_is_stored_again(self, tmp_path: Path):
        """Intake dies after it committed and before it acknowledged, in each life."""
        until = tmp_path / "until"
        with Training(
            tmp_path,
            training(ranks=1, steps=1, rate=300.0, until=until),
            sink="jsonl",
            options={"unsafe.duplicate_gate": "false"},
            environment={"SIDESTEP_CRASH_AT": "intake.committed:8"},
        ) as run:
            eventually(lambda: self.said_twice(run) > 0, DEADLINE_S, run.log)
            until.touch()
            run.wait()

        report = run.report()
        assert run.boots() > 1
        assert self.said_twice(run) > 0
        assert report.ledger.delivered > report.ledger.offered

    def test_without_the_row_log_rows_are_made_again_that_the_run_holds(self, tmp_path: Path):
        """Delivery dies after the run holds rows and before that is settled, in each life."""
        until = tmp_path / "until"
        with Training(
            tmp_path,
            training(ranks=1, steps=1, rate=300.0, until=until),
            sink="jsonl",
            options={"unsafe.row_log": "false"},
            environment={"SIDESTEP_CRASH_AT": "delivery.settle:3"},
        ) as run:
            eventually(lambda: duplicates(run.rows()) > 0, DEADLINE_S, run.log)
            assert run.deaths() > 0
            until.touch()

    def said_twice(self, run: Training) -> int:
        """In a row of its own, or in one with the first."""
        return duplicates(run.rows()) + run.report().conflicts
