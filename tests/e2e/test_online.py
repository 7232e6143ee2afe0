"""Online runs as a user types them, into a server that stands in for W&B, also when that one fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestepd.errors import ExitCode
from sidestepd.rundir import newest_run_dir
from sidestepd.spool import SpoolReader
from sidestepd.status import Report, report
from tests.support.chaos import Training, assert_whole, training
from tests.support.waiting import eventually
from tests.support.wandb_server import KEY, StandIn
from tests.support.wandb_server.processes import sidestep

pytestmark = pytest.mark.e2e

WRONG_KEY = "wrong" + "0" * 35
QUICK = ["--set", "sink.ask_every_s=0.5", "--set", "delivery.confirm_interval_s=0.2"]
LOG_TEN = """
import sidestep
run = sidestep.init(project="p", config={"lr": 0.1})
run.define_metric("eval/*", step_metric="epoch")
for step in range(10):
    run.log({"loss": step, "nested": {"a": {"b": step}}, "epoch": step // 5, "eval/x": 1.0})
run.summary["best"] = 7
print("url", run.url)
run.finish()
"""
LOG_STEPS_AGAIN = """
import sidestep
run = sidestep.init(project="p")
for step in range(5):
    run.log({"loss": step}, step=step)
run.finish()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandIn]:
    with StandIn(tmp_path / "server") as running:
        yield running


def run_online(
    server: StandIn, base: Path, code: str, *options: str, key: str = KEY
) -> subprocess.CompletedProcess[str]:
    words = ["run", "--mode", "online", *QUICK, *options, "--", sys.executable, "-c", code]
    return sidestep(*words, server=server, key=key, cwd=base)


def run_dir(base: Path) -> Path:
    found = newest_run_dir(base)
    assert found is not None
    return found


def whole(base: Path) -> Report:
    """The newest run, of which nothing is missing."""
    found = report(run_dir(base))
    ledger = found.ledger
    assert (ledger.offered, 0, 0) == (ledger.delivered, ledger.pending, ledger.unknown)
    assert ledger.balances
    return found


def files_with(secret: str, directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


class TestRun:
    def test_is_on_the_server_whole_with_what_was_declared(self, server: StandIn, tmp_path: Path):
        done = run_online(server, tmp_path, LOG_TEN, "--id", "first", "--tags", "a,b")

        assert done.returncode == 0, done.stderr
        rows, held = server.rows("first"), server.run("first")
        assert list(range(10)) == [row["_step"] for row in rows] == [row["global_step"] for row in rows]
        assert {"a": {"b": 9}} == rows[9]["nested"]
        assert (0.1, ["a", "b"], 0) == (held["config"]["lr"], held["tags"], held["exitcode"])
        assert (7, 9) == (server.summary("first")["best"], server.summary("first")["loss"])
        assert f"url {server.url}/tester/p/runs/first" in done.stdout
        assert whole(tmp_path).run.url == f"{server.url}/tester/p/runs/first"

    @pytest.mark.nightly
    def test_the_key_is_in_no_file(self, server: StandIn, tmp_path: Path):
        run_online(server, tmp_path, LOG_TEN)

        assert [] == files_with(KEY, run_dir(tmp_path))

    def test_with_the_exit_code_of_the_command(self, server: StandIn, tmp_path: Path):
        done = run_online(server, tmp_path, LOG_TEN + "\nraise SystemExit(3)", "--id", "first")

        assert 3 == done.returncode == server.run("first")["exitcode"]

    @pytest.mark.nightly
    def test_a_second_run_of_the_same_id_goes_on_behind_the_first(self, server: StandIn, tmp_path: Path):
        """Steps that are left out count on; steps that are said again keep their axis, and lose `_step` only."""
        run_online(server, tmp_path, LOG_TEN, "--id", "same")
        run_online(server, tmp_path, LOG_TEN, "--id", "same")
        run_online(server, tmp_path, LOG_STEPS_AGAIN, "--id", "same")

        rows = server.rows("same")
        assert list(range(25)) == [row["_step"] for row in rows]
        assert [*range(20), *range(5)] == [row["global_step"] for row in rows]
        whole(tmp_path)

    @pytest.mark.nightly
    @pytest.mark.parametrize(
        ("resume", "why"),
        [("must", "is not there"), ("never", "is there already")],
    )
    def test_resume_is_held_to(self, server: StandIn, tmp_path: Path, resume: str, why: str):
        if resume == "never":
            run_online(server, tmp_path, LOG_TEN, "--id", "same")

        done = run_online(server, tmp_path, LOG_TEN, "--id", "same", "--resume", resume)

        assert done.returncode == ExitCode.INTERRUPTED
        assert why in done.stderr
        assert (10 if resume == "never" else 0) == len(server.rows("same"))

        sent = sidestep("sync", str(run_dir(tmp_path)), "--id", "other", server=server, cwd=tmp_path)

        assert sent.returncode == 0, sent.stderr
        assert list(range(10)) == server.steps("other")


class TestRefused:
    @pytest.mark.nightly
    def test_a_wrong_key_is_told_and_the_rows_are_kept_for_sync(self, server: StandIn, tmp_path: Path):
        done = run_online(server, tmp_path, LOG_TEN, "--id", "kept", key=WRONG_KEY)

        kept = run_dir(tmp_path)
        assert done.returncode == ExitCode.INTERRUPTED
        assert 1 <= done.stderr.count("refuses the API key (401)") <= 2  # in time to do something, and at the end
        assert f"sidestep sync {kept.relative_to(tmp_path)}" in done.stderr
        shown = sidestep("status", str(kept), server=None, cwd=tmp_path)
        assert "trouble   " in shown.stdout
        assert "refuses the API key" in shown.stdout
        assert WRONG_KEY not in done.stderr + shown.stdout
        assert [] == files_with(WRONG_KEY, kept) == server.runs()
        assert report(kept).ledger.pending > 0

        sent = sidestep("sync", str(kept), server=server, cwd=tmp_path)

        assert sent.returncode == 0, sent.stderr
        assert f"10 rows at {server.url}/tester/p/runs/kept" in sent.stderr
        assert list(range(10)) == server.steps("kept")
        whole(tmp_path)

    @pytest.mark.nightly
    def test_no_key_is_told(self, server: StandIn, tmp_path: Path):
        done = run_online(server, tmp_path, LOG_TEN, key="")

        assert done.returncode == ExitCode.INTERRUPTED
        assert "there is no API key for" in done.stderr

    @pytest.mark.nightly
    def test_an_entity_that_is_not_there_is_told_and_sync_takes_another(self, server: StandIn, tmp_path: Path):
        done = run_online(server, tmp_path, LOG_TEN, "--entity", "nobody", "--id", "kept")
        assert done.returncode == ExitCode.INTERRUPTED
        assert "entity nobody not found" in done.stderr

        sent = sidestep("sync", str(run_dir(tmp_path)), "--entity", "crew", server=server, cwd=tmp_path)

        assert sent.returncode == 0, sent.stderr
        assert list(range(10)) == server.steps("kept", entity="crew")


class TestDisturbed:
    """Rows wait for a server; each fault is seen to have happened."""

    STEPS = 300

    def disturbed(self, server: StandIn, base: Path, *, rate: float = 100.0, **options: object) -> Training:
        return Training(base, training(ranks=2, steps=self.STEPS, rate=rate), server=server, options=options)

    def assert_whole(self, run: Training, *faults: str) -> None:
        assert run.wait() == 0, run.log()
        assert_whole(run, ranks=2, steps=self.STEPS)
        assert run.server is not None
        tallies = run.server.tallies()
        assert dict.fromkeys(faults, True) == {fault: tallies.get(fault, 0) > 0 for fault in faults}

    @pytest.mark.parametrize(
        ("match", "kind", "how"),
        [
            ("graphql/*", "status", {"status": 500, "times": 3}),
            ("graphql/RunResumeStatus", "status", {"status": 429, "times": 2}),
            ("file_stream", "status", {"status": 429, "times": 2}),
            ("file_stream", "status", {"status": 503, "times": 2}),
            ("*", "late", {"seconds": 0.5}),
            ("file_stream", "unsaid", {"times": 2}),
            ("*", "cut", {"times": 4}),
        ],
    )
    @pytest.mark.nightly
    def test_from_the_start(self, server: StandIn, tmp_path: Path, match: str, kind: str, how: dict[str, object]):
        server.fault(match, kind, **how)

        with self.disturbed(server, tmp_path) as run:
            self.assert_whole(run, f"fault {kind}")

    @pytest.mark.nightly
    def test_it_is_away_when_the_run_begins(self, tmp_path: Path):
        with StandIn(tmp_path / "server") as server:
            server.stop()
            with self.disturbed(server, tmp_path) as run:
                eventually(lambda: "can not be reached" in run.report().trouble, 60.0, run.log)
                assert run.report().ledger.delivered == 0
                server.start()
                self.assert_whole(run)
                assert run.report().trouble == ""

    @pytest.mark.nightly
    def test_it_is_away_in_the_middle(self, server: StandIn, tmp_path: Path):
        with self.disturbed(server, tmp_path, rate=20.0) as run:
            run.wait_for_progress()
            server.stop()
            eventually(lambda: "can not be reached" in run.report().trouble, 60.0, run.log)
            server.start()
            self.assert_whole(run)

    @pytest.mark.nightly
    def test_it_hangs_in_the_middle(self, server: StandIn, tmp_path: Path):
        with self.disturbed(server, tmp_path, rate=20.0) as run:
            run.wait_for_progress()
            server.fault("*", "hang")
            eventually(lambda: "does not answer" in run.report().trouble, 60.0, run.log)
            server.lift()
            self.assert_whole(run, "fault hang")

    @pytest.mark.nightly
    def test_the_spool_of_a_living_run_is_emptied(self, server: StandIn, tmp_path: Path):
        with Training(tmp_path, training(ranks=1, steps=100_000, rate=500.0), server=server) as run:
            run.wait_for_progress()

            eventually(lambda: deleted(run) > 2000, 100.0, run.log)

            assert not run.over

    @pytest.mark.nightly
    def test_a_stream_that_wandb_gave_up_is_opened_again(self, server: StandIn, tmp_path: Path):
        """One 409, and wandb-core sends no row of this run any more; it says nothing about it."""
        server.fault("file_stream", "status", status=409, times=1)

        with self.disturbed(server, tmp_path, **{"delivery.stall_s": 8.0}) as run:
            self.assert_whole(run, "fault status")

        assert "took no row" in (run.run_dir / "logs" / "delivery.log").read_text()

    @pytest.mark.nightly
    def test_a_summary_that_came_before_its_rows_does_not_cost_them(self, server: StandIn, tmp_path: Path):
        """wandb-core sends both together, but its dying words may be the summary's."""
        run_online(server, tmp_path, LOG_STEPS_AGAIN, "--id", "same")
        server.lose_rows("same", summary={"_step": 4})

        run_online(server, tmp_path, LOG_STEPS_AGAIN, "--id", "same")

        assert list(range(5)) == server.steps("same")
        whole(tmp_path)


def deleted(run: Training) -> int:
    """How many of the records that were acknowledged are in the spool no more."""
    acknowledged = sum(session.acknowledged for session in run.report().sessions)
    reader = SpoolReader(run.run_dir / "spool.db")
    try:
        return acknowledged - reader.records_after(0)
    finally:
        reader.close()
