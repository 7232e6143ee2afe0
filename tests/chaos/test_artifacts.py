"""Checkpoints flow while processes are killed: each version is in the run once, in order, with its own bytes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.checkpoint import measure
from tests.support.chaos import DEADLINE_S, Training
from tests.support.checkpoints import command, expected, notes, steps_taken, versions
from tests.support.waiting import eventually
from tests.support.wandb_server import StandIn

pytestmark = pytest.mark.chaos


def wait_for_versions(run: Training, more: int = 1) -> None:
    """Until so many more are in the run for good, or it is over."""

    def delivered() -> int:
        return int(run.told().get("artifacts", {}).get("delivered", 0))

    before = delivered()
    eventually(lambda: run.over or delivered() >= before + more, DEADLINE_S, run.log)


def assert_each_once(run: Training, steps: int, megabytes: float) -> None:
    assert expected(steps, megabytes) == versions(run.run_dir), run.log()
    assert {(f"note-{step}.txt", f"note {step}") for step in range(steps)} == notes(run.run_dir)
    report = run.report()
    assert {"delivered": 2 * steps, "unchanged": 0, "waiting": 0, "left_out": {}} == report.artifacts
    assert report.ledger.balances
    given_up = sum(report.ledger.dropped.values())  # what the program is, found out when the training was over
    assert (report.ledger.offered, 0) == (report.ledger.delivered + given_up, report.ledger.pending)
    assert [] == list((run.run_dir / "blobs").iterdir())


class TestKillNine:
    @pytest.mark.parametrize(
        ("sink", "kills", "megabytes"),
        [("jsonl", 2, 5), pytest.param("wandb", 8, 8, marks=pytest.mark.nightly)],
    )
    def test_of_intake_and_delivery(self, tmp_path: Path, sink: str, kills: int, megabytes: int):
        enough, folder = tmp_path / "enough", tmp_path / "made"
        folder.mkdir()
        training = command(steps=2, folder=folder, megabytes=megabytes, until=enough)
        with Training(tmp_path, training, sink=sink) as run:
            for victim in itertools.islice(itertools.cycle(("delivery", "intake")), kills):
                wait_for_versions(run)
                assert run.kill(victim)
            wait_for_versions(run)
            enough.touch()
            assert 0 == run.wait()

        assert {"delivery", "intake"} == {kill.what for kill in run.kills}
        assert_each_once(run, steps_taken(enough), megabytes)

    @pytest.mark.nightly
    @pytest.mark.parametrize(
        "place",
        ["intake.blobs", "intake.blobs_stored", "intake.commit", "intake.committed", "delivery.artifact",
         "delivery.artifact_sent", "delivery.settle", "delivery.settled"],
    )  # fmt: skip
    def test_at_each_place_between_two_commits(self, tmp_path: Path, place: str):
        """Into lines: a wandb-core that dies with each second of these never comes to write its file."""
        folder = tmp_path / "made"
        folder.mkdir()
        times = {"delivery.settled": 3}.get(place, 2) if place.startswith("delivery") else 9  # one as it resumes
        training = command(steps=8, folder=folder, megabytes=5)
        crash = {"SIDESTEP_CRASH_AT": f"{place}:{times}"}
        with Training(tmp_path, training, sink="jsonl", environment=crash) as run:
            assert 0 == run.wait()

        assert run.boots() + run.deaths() > 1
        assert_each_once(run, 8, 5)


@pytest.mark.nightly
class TestOnAServer:
    def test_each_version_is_committed_once_in_its_order_whatever_is_killed(self, tmp_path: Path):
        enough, folder = tmp_path / "enough", tmp_path / "made"
        folder.mkdir()
        training = command(steps=2, folder=folder, megabytes=5, until=enough)
        with StandIn(tmp_path / "server") as server:
            with Training(tmp_path, training, server=server) as run:
                for victim in itertools.islice(itertools.cycle(("delivery", "intake", "core")), 6):
                    wait_for_versions(run)
                    assert run.kill(victim)
                wait_for_versions(run)
                enough.touch()
                assert 0 == run.wait()

            there = [it for it in server.artifacts() if it["place"][-1] == "model"]
            assert list(range(steps_taken(enough))) == [json.loads(it["metadata"])["step"] for it in there]
            assert {"COMMITTED"} == {it["state"] for it in there}
            assert [f"step-{step}" for step in range(len(there))] == [
                next(alias for alias in it["aliases"] if alias != "latest") for it in there
            ]
            assert {"model.bin", "notes.txt"} == set(there[0]["files"])
        report = run.report()
        assert report.ledger.balances
        assert [] == list((run.run_dir / "blobs").iterdir())


@pytest.mark.nightly
def test_a_sync_brings_artifacts_and_files_up_once_however_often_it_is_stopped(tmp_path: Path):
    folder = tmp_path / "made"
    folder.mkdir()
    with Training(tmp_path, command(steps=4, folder=folder, megabytes=5)) as run:
        assert 0 == run.wait()

    with StandIn(tmp_path / "server") as server:
        server.fault("graphql/CommitArtifact", "hang", times=1)
        words = [sys.executable, "-m", "sidestep", "sync", str(run.run_dir)]
        first = subprocess.Popen(words, env=os.environ | server.environment)
        eventually(lambda: server.tallies().get("fault hang"), DEADLINE_S, run.log)
        first.kill()
        first.wait()
        server.lift()

        subprocess.run(words, env=os.environ | server.environment, check=True, timeout=120)

        there = [it for it in server.artifacts() if it["place"][-1] == "model" and it["state"] == "COMMITTED"]
        assert [0, 1, 2, 3] == [json.loads(it["metadata"])["step"] for it in there]
        assert 8 <= server.tallies()["storage"]


@pytest.mark.nightly
def test_a_gigabyte_takes_no_memory_of_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its time is judged by the benchmark; here it only has to arrive, with its SHA-256."""
    monkeypatch.chdir(tmp_path)

    figures = measure(1024)

    assert (1, True, 0) == (figures.delivered, figures.is_whole, figures.missing)
    assert figures.memory_mb < 64
    assert figures.courier_memory_mb < 128
