"""`sidestep sync` and `sidestep replay`: a run's rows go elsewhere, each once, whatever happened to it before."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sidestepd.errors import ExitCode
from sidestepd.rundir import RunFile, newest_run_dir
from sidestepd.sinks import wandb_log
from sidestepd.status import report
from tests.support.chaos import HeldRow, Training, assert_whole, steps_of_ranks, training
from tests.support.waiting import eventually
from tests.support.wandb_server import StandIn
from tests.support.wandb_server.processes import sidestep, start_sidestep

pytestmark = pytest.mark.e2e

LOG = """
import sidestep
run = sidestep.init(project="p", config={"lr": 0.1}, name="shown", tags=["a"])
run.define_metric("loss", summary="min")
for step in range(20):
    run.log({"loss": 20 - step, "nested": {"a": {"b": step}}})
run.summary["best"] = 7
run.finish()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandIn]:
    with StandIn(tmp_path / "server") as running:
        yield running


def run_offline(base: Path, *options: str, exit_code: int = 0) -> Path:
    """A finished offline run called `made`."""
    code = f"{LOG}\nraise SystemExit({exit_code})"
    done = sidestep("run", "--id", "made", *options, "--", sys.executable, "-c", code, server=None, cwd=base)
    assert done.returncode == exit_code, done.stderr
    return run_dir(base)


def run_dir(base: Path) -> Path:
    [found] = (base / "sidestep-runs").glob("*/run.json")
    return found.parent


def killed_run(base: Path) -> Training:
    """An offline run whose daemon died three times, and then all of it, with much in the spool."""
    with Training(base, training(ranks=2, steps=100_000, rate=300.0), options={"run.id": "made"}) as run:
        for victim in ("delivery", "core", "intake"):
            run.wait_for_progress()
            assert run.kill(victim)
        run.wait_for_progress()
        everyone = [run.supervisor, *run.supervisor.children(recursive=True)]
        for process in everyone:
            process.send_signal(signal.SIGSTOP)  # at one moment
        for process in everyone:
            process.kill()
    eventually(lambda: report(run.run_dir).state == "interrupted", 60.0, "somebody is left")
    return run


def fingerprint(directory: Path) -> dict[str, str]:
    """What every file holds; what SQLite makes for a reader, and takes away, is no part of it."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def without_runtime(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    return [{name: value for name, value in row.items() if name != "_runtime"} for row in rows]


class TestTheSameIdAgain:
    """Whoever gives the id of a run that is over goes on with it, in a directory of its own."""

    def again(self, base: Path, *options: str) -> subprocess.CompletedProcess[str]:
        eventually(
            lambda: time.strftime("%Y%m%d-%H%M%S") > newest(base).name[:15], message="the clock stands still"
        )
        words = ["run", "--id", "made", *options, "--", sys.executable, "-c", LOG]
        return sidestep(*words, server=None, cwd=base)

    @pytest.mark.nightly
    def test_goes_on_behind_the_first_offline_too(self, tmp_path: Path):
        first = run_offline(tmp_path)

        done = self.again(tmp_path)

        assert done.returncode == 0, done.stderr
        assert list(range(20)) == held_steps(first)
        assert list(range(20, 40)) == held_steps(newest(tmp_path))

    @pytest.mark.nightly
    def test_is_refused_where_it_must_not_be_there(self, tmp_path: Path):
        first = run_offline(tmp_path)

        done = self.again(tmp_path, "--resume", "never")

        assert done.returncode == ExitCode.INTERRUPTED
        assert "run made is there already" in done.stderr
        assert first != newest(tmp_path)
        assert [] == held_steps(newest(tmp_path))

    @pytest.mark.nightly
    def test_both_go_up_as_one_run_the_first_one_first(self, server: StandIn, tmp_path: Path):
        first = run_offline(tmp_path)
        self.again(tmp_path)
        second = newest(tmp_path)

        early = sidestep("sync", str(second), server=server, cwd=tmp_path)
        sent = [sidestep("sync", str(one), server=server, cwd=tmp_path) for one in (first, second)]

        assert early.returncode != 0
        assert "sync that first" in early.stderr
        assert [0, 0] == [one.returncode for one in sent], sent[1].stderr
        assert list(range(40)) == server.steps("made")


def newest(base: Path) -> Path:
    found = newest_run_dir(base)
    assert found is not None
    return found


def held_steps(made: Path) -> list[int]:
    return [row.step for path in wandb_log.segments(made / "wandb") for row in wandb_log.history(path)]


class TestSync:
    def test_sends_a_finished_run_as_it_is(self, server: StandIn, tmp_path: Path):
        made = run_offline(tmp_path, exit_code=3)
        held = [row for path in wandb_log.segments(made / "wandb") for row in wandb_log.nested_history(path)]

        sent = sidestep("sync", str(made), server=server, cwd=tmp_path)

        assert sent.returncode == 0, sent.stderr
        assert f"20 rows at {server.url}/tester/p/runs/made" in sent.stderr
        rows, run, summary = server.rows("made"), server.run("made"), server.summary("made")
        assert [dict(row.values) for row in held] == rows  # with the time since the run began, too
        assert (0.1, "shown", ["a"], 3) == (run["config"]["lr"], run["displayName"], run["tags"], run["exitcode"])
        assert ({"min": 1}, 7) == (summary["loss"], summary["best"])

    @pytest.mark.nightly
    def test_again_sends_nothing(self, server: StandIn, tmp_path: Path):
        made = run_offline(tmp_path)
        sidestep("sync", str(made), server=server, cwd=tmp_path)
        before = server.tallies()["file_stream"]

        again = sidestep("sync", str(made), server=server, cwd=tmp_path)

        assert (0, before) == (again.returncode, server.tallies()["file_stream"])
        assert "already there: 20 rows" in again.stderr

    @pytest.mark.nightly
    def test_may_call_it_otherwise(self, server: StandIn, tmp_path: Path):
        made = run_offline(tmp_path)
        words = ["--project", "other", "--entity", "crew", "--id", "new"]

        sent = sidestep("sync", str(made), *words, server=server, cwd=tmp_path)

        assert sent.returncode == 0, sent.stderr
        assert list(range(20)) == server.steps("new", project="other", entity="crew")

    @pytest.mark.nightly
    def test_leaves_a_run_alone_that_is_there_already(self, server: StandIn, tmp_path: Path):
        """Its rows would be taken for ours, and ours would be missing."""
        made = run_offline(tmp_path)
        other = tmp_path / "other"
        other.mkdir()
        code = 'import sidestep\nrun = sidestep.init(project="p")\nrun.log({"x": 1})\nrun.finish()'
        words = ["run", "--mode", "online", "--id", "made", "--", sys.executable, "-c", code]
        assert sidestep(*words, server=server, cwd=other).returncode == 0

        sent = sidestep("sync", str(made), server=server, cwd=tmp_path)

        assert sent.returncode == ExitCode.INTERRUPTED
        assert "run made is there already" in sent.stderr
        assert [0] == server.steps("made")

    @pytest.mark.nightly
    def test_killed_again_and_again_sends_each_row_once(self, server: StandIn, tmp_path: Path):
        with Training(tmp_path, training(ranks=1, steps=3000, rate=3000.0), options={"run.id": "made"}) as run:
            assert run.wait() == 0, run.log()
        server.fault("file_stream", "late", seconds=0.3)
        deaths = 0
        for least in (1, 400, 900, 1500):
            process = start_sidestep("sync", str(run.run_dir), server=server, cwd=tmp_path)
            eventually(lambda: len(server.steps("made", "chaos")) >= least or process.poll() is not None, 60.0)  # noqa: B023
            deaths += process.poll() is None
            process.kill()
            process.wait()

        sent = sidestep("sync", str(run.run_dir), server=server, cwd=tmp_path)

        assert sent.returncode == 0, sent.stderr
        assert deaths > 0
        rows = [HeldRow(row["_step"], row) for row in server.rows("made", "chaos")]
        assert {0: list(range(3000))} == steps_of_ranks(rows)
        assert server.tallies()["lines said otherwise"] == 0

    @pytest.mark.nightly
    def test_finishes_and_sends_what_was_interrupted(self, server: StandIn, tmp_path: Path):
        """In several segments, with rows in the row log and records in the spool."""
        run = killed_run(tmp_path)
        before = report(run.run_dir)
        assert before.ledger.pending > 0
        assert len(wandb_log.segments(run.run_dir / "wandb")) > 1

        sent = sidestep("sync", str(run.run_dir), server=server, cwd=tmp_path)

        assert sent.returncode == 0, sent.stderr
        after = report(run.run_dir)
        assert ("finished", 0, True) == (after.state, after.ledger.pending, after.ledger.balances)
        assert after.ledger.delivered == sum(session.acknowledged for session in before.sessions)
        rows = [HeldRow(row["_step"], row) for row in server.rows("made", "chaos")]
        assert [row.step for row in run.rows()] == [row.step for row in rows]
        for steps in steps_of_ranks(rows).values():
            assert list(range(len(steps))) == steps
        assert 1 == server.run("made")["exitcode"]

    @pytest.mark.nightly
    def test_a_server_that_is_away_is_waited_for(self, server: StandIn, tmp_path: Path):
        made = run_offline(tmp_path)
        server.stop()
        process = start_sidestep("sync", str(made), server=server, cwd=tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3.0)

        server.start()

        assert process.wait(60.0) == 0
        assert list(range(20)) == server.steps("made")

    @pytest.mark.nightly
    def test_a_wrong_key_is_told_at_once(self, server: StandIn, tmp_path: Path):
        made = run_offline(tmp_path)

        sent = sidestep("sync", str(made), server=server, key="wrong" + "0" * 35, cwd=tmp_path)

        assert sent.returncode == ExitCode.INTERRUPTED
        assert "refuses the API key" in sent.stderr


class TestReplay:
    def test_writes_rows_config_summary_and_definitions_and_changes_nothing(self, tmp_path: Path):
        made = run_offline(tmp_path, exit_code=3)
        before = fingerprint(made)

        done = sidestep("replay", str(made), "--sink", "jsonl:copy/rows.jsonl", server=None, cwd=tmp_path)

        assert done.returncode == 0, done.stderr
        assert before == fingerprint(made)
        lines = read(tmp_path / "copy" / "rows.jsonl")
        rows = [line for line in lines if "_step" in line]
        assert [(step, 20 - step, {"a": {"b": step}}) for step in range(20)] == [
            (row["_step"], row["loss"], row["nested"]) for row in rows
        ]
        assert {"config": {"lr": 0.1}} in lines
        assert {"define_metric": {"name": "loss", "step_metric": "global_step"}} in lines
        summaries = [line["summary"] for line in lines if "summary" in line]
        assert {"best": 7, "loss": {"min": 1}}.items() <= summaries[-1].items()
        assert {"exit_code": 3} == lines[-1]

    @pytest.mark.nightly
    def test_of_an_interrupted_run_has_what_waits_in_its_spool(self, tmp_path: Path):
        """The same rows that the run has when its own daemon has finished it."""
        run = killed_run(tmp_path)
        pending, before = report(run.run_dir).ledger.pending, fingerprint(run.run_dir)
        assert pending > 0

        done = sidestep("replay", str(run.run_dir), "--sink", "jsonl:rows.jsonl", server=None, cwd=tmp_path)

        assert done.returncode == 0, done.stderr
        assert before == fingerprint(run.run_dir)
        rows = [HeldRow(line["_step"], line) for line in read(tmp_path / "rows.jsonl") if "_step" in line]
        assert sorted({row.step for row in rows}) == [row.step for row in rows]
        found = steps_of_ranks(rows)
        acknowledged = sum(session.acknowledged for session in report(run.run_dir).sessions)
        assert all(list(range(len(steps))) == steps for steps in found.values())
        assert sum(map(len, found.values())) == acknowledged - 2 * 2  # each rank said a config and a definition

    @pytest.mark.nightly
    def test_of_a_living_run_is_what_it_is_now(self, tmp_path: Path):
        with Training(tmp_path, training(ranks=1, steps=100_000), sink="jsonl") as run:
            run.wait_for_progress()

            done = sidestep("replay", str(run.run_dir), "--sink", "jsonl:rows.jsonl", server=None, cwd=tmp_path)

            assert done.returncode == 0, done.stderr
            assert run.find("delivery") is not None
        steps = [line["_step"] for line in read(tmp_path / "rows.jsonl") if "_step" in line]
        assert list(range(len(steps))) == steps
        assert steps

    @pytest.mark.nightly
    def test_into_one_offline_run_out_of_several_segments(self, tmp_path: Path):
        run = killed_run(tmp_path)

        done = sidestep("replay", str(run.run_dir), "--sink", "wandb:one", server=None, cwd=tmp_path)

        assert done.returncode == 0, done.stderr
        [segment] = wandb_log.segments(tmp_path / "one" / "wandb")
        steps = [row.step for row in wandb_log.history(segment)]
        assert sorted(set(steps)) == steps
        assert len(steps) >= report(run.run_dir).rows

    @pytest.mark.nightly
    def test_of_an_online_run_says_what_only_the_server_has(self, server: StandIn, tmp_path: Path):
        with Training(tmp_path, training(ranks=1, steps=500), server=server) as run:
            assert run.wait() == 0, run.log()
        assert_whole(run, ranks=1, steps=500)
        [segment] = wandb_log.segments(run.run_dir / "wandb")
        kept = [row.step for row in wandb_log.history(segment)][:-100]
        cut_after(segment, kept[-1])

        done = sidestep("replay", str(run.run_dir), "--sink", "jsonl:rows.jsonl", server=None, cwd=tmp_path)

        assert done.returncode == 0, done.stderr
        assert f"{len(server.rows(RunFile.read(run.run_dir).id, 'chaos')) - len(kept)} rows more" in done.stderr

    @pytest.mark.parametrize("sink", ["jsonl:there", "influx:x", "jsonl:", "jsonl"])
    def test_says_what_it_can_not_write_into(self, tmp_path: Path, sink: str):
        made = run_offline(tmp_path)
        (tmp_path / "there").touch()

        done = sidestep("replay", str(made), "--sink", sink, server=None, cwd=tmp_path)

        assert done.returncode == 2
        assert f"--sink {sink}" in done.stderr


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cut_after(segment: Path, step: int) -> None:
    """Cut a file behind the row of this step."""
    reader = wandb_log.LogReader(segment)
    for found in wandb_log.steps_of(reader):
        if found == step:
            break
    with segment.open("r+b") as file:
        file.truncate(reader.offset)
