"""Pictures flow while processes are killed: each is in the run once, at its step, with its own pixels."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest

from tests.support.chaos import DEADLINE_S, Training
from tests.support.pictures import command, seen, steps_taken
from tests.support.waiting import eventually

pytestmark = pytest.mark.chaos


def wait_for_pictures(run: Training, more: int = 3) -> None:
    """Until so many more are confirmed to be in the run, or it is over."""
    before = run.told().get("media", {}).get("delivered", 0)
    eventually(
        lambda: run.over or run.told().get("media", {}).get("delivered", 0) >= before + more, DEADLINE_S, run.log
    )


def assert_each_once(run: Training, steps: int) -> None:
    assert {(step, step): 1 for step in range(steps)} == seen(run.run_dir), run.log()
    report = run.report()
    assert (steps, 0, {}) == (report.media["delivered"], report.media["waiting"], report.media["left_out"])
    assert report.ledger.balances
    assert {} == {reason: count for reason, count in report.ledger.dropped.items() if count}
    assert (report.ledger.offered, 0) == (report.ledger.delivered, report.ledger.pending)
    assert [] == list((run.run_dir / "blobs").iterdir())


class TestKillNine:
    @pytest.mark.parametrize(
        ("sink", "kills"),
        [("jsonl", 4), pytest.param("wandb", 6, marks=pytest.mark.nightly)],
    )
    def test_of_intake_and_delivery(self, tmp_path: Path, sink: str, kills: int):
        enough = tmp_path / "enough"
        with Training(tmp_path, command(steps=10, until=enough), sink=sink) as run:
            for victim in itertools.islice(itertools.cycle(("delivery", "intake")), kills):
                wait_for_pictures(run)
                assert run.kill(victim)
            wait_for_pictures(run)
            enough.touch()
            assert 0 == run.wait()

        assert {"delivery", "intake"} == {kill.what for kill in run.kills}
        assert_each_once(run, steps_taken(enough))

    @pytest.mark.nightly
    @pytest.mark.parametrize(
        "place",
        ["intake.blobs", "intake.blobs_stored", "intake.commit", "intake.committed", "delivery.decide",
         "delivery.decided", "delivery.written", "delivery.settle", "delivery.settled"],
    )  # fmt: skip
    def test_at_each_place_between_two_commits(self, tmp_path: Path, place: str):
        often = {"delivery.settle": 2, "delivery.settled": 3}  # once a second and in the end; one as it resumes
        times = often.get(place, 9)
        with Training(
            tmp_path, command(steps=40), sink="jsonl", environment={"SIDESTEP_CRASH_AT": f"{place}:{times}"}
        ) as run:
            assert 0 == run.wait()

        assert run.boots() + run.deaths() > 1
        assert_each_once(run, 40)

    @pytest.mark.nightly
    def test_of_a_worker(self, tmp_path: Path):
        """What it had handed over is there; a picture that was under way is counted, and its row is there."""
        never, pid = tmp_path / "never", tmp_path / "pid"
        with Training(tmp_path, command(steps=10, until=never, pid=pid), sink="jsonl") as run:
            wait_for_pictures(run)
            os.kill(int(pid.read_text()), signal.SIGKILL)
            assert 0 != run.wait()

        rows, pictures, report = run.rows(), seen(run.run_dir), run.report()
        assert all(row == shown and count == 1 for (row, shown), count in pictures.items())
        assert len(rows) == len(pictures) + sum(report.media["left_out"].values())
        assert report.ledger.balances
        assert {"lost", "bye"} >= {it.state for it in report.sessions}


@pytest.mark.nightly
def test_a_run_of_wandb_holds_the_pictures_with_their_rows(tmp_path: Path):
    with Training(tmp_path, command(steps=20)) as run:
        assert 0 == run.wait()

    assert_each_once(run, 20)
    assert 0 == run.report().late_rows
