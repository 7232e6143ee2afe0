"""How runs are joined later, stopped, resumed and given up, from the command line and with real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sidestepd.control import Control
from sidestepd.rowlog import RowLogReader
from sidestepd.sinks import wandb_log
from sidestepd.status import Report, report
from tests.support.daemons import read_jsonl
from tests.support.waiting import eventually
from tests.support.wandb_server import KEY, StandIn

pytestmark = pytest.mark.e2e

SIDESTEP = [sys.executable, "-m", "sidestep"]
WAIT_S = 90.0
STAGE = """
import sys, sidestep
name, first = sys.argv[1], int(sys.argv[2])
run = sidestep.init(project="pipeline", job_type=name)
stage = run.stage(f"training/{name}")
for step in range(10):
    stage.log({"loss": first + step}, step=step)
run.finish(timeout=60)
"""
REINIT_LOOP = """
import sidestep
for n in range(3):
    run = sidestep.init(reinit=True)
    run.log({"n": n})
    run.finish(timeout=60)
"""
CHILDREN = """
import multiprocessing, sidestep

def score(n):
    sidestep.log({"score": n, "sum": n})

def spawned():
    run = sidestep.init()
    run.log({"score": 100})
    run.log({"score": 101})
    run.finish(timeout=60)

if __name__ == "__main__":
    run = sidestep.init()
    run.log({"loss": 0.0}, step=1000)
    run.flush(60)
    fork, spawn = map(multiprocessing.get_context, ("fork", "spawn"))
    one = spawn.Process(target=spawned)
    one.start()
    with fork.Pool(4) as pool:
        pool.map(score, range(20), chunksize=1)
        pool.close()
        pool.join()
    one.join()
    for step in range(3):
        run.log({"loss": float(step), "score": -1}, step=1001 + step)
    run.finish(timeout=60)
"""
WAIT_FOR_A_WORD = """
import sys, sidestep
run = sidestep.init()
for step in range(10):
    run.log({"loss": step}, step=step)
run.flush(60)
print("ready", flush=True)
sys.stdin.readline()
run.log({"loss": 10}, step=10)
run.finish(timeout=60)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to stand in, without options from outside."""
    for name in [name for name in os.environ if name.startswith(("SIDESTEP_", "WANDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SIDESTEP_SINK_KIND", "jsonl")
    monkeypatch.setenv("SIDESTEP_SAMPLERS_ENABLED", "off")  # their records and sessions would be counted
    monkeypatch.setenv("SIDESTEP_PROGRAM", "0")
    monkeypatch.setenv("SIDESTEP_CONSOLE", "0")
    monkeypatch.setenv("SIDESTEP_AUTOSTART", "0")
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(dir="/tmp") as sockets:  # a socket's path has to be short
        monkeypatch.setenv("XDG_RUNTIME_DIR", sockets)
        yield tmp_path


def sidestep(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SIDESTEP, *words], capture_output=True, text=True, timeout=WAIT_S, env=os.environ | environ
    )


def stage(name: str, first: int, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STAGE, name, str(first)],
        capture_output=True, text=True, timeout=WAIT_S, env=os.environ | environ,
    )  # fmt: skip


@contextmanager
def started(*words: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environ, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for one in family:
                one.kill()
        process.communicate()


@contextmanager
def serving(*words: str, **environ: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A `sidestep serve` that is ready, and its address."""
    with started(*SIDESTEP, "serve", *words, **environ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert " at ipc://" in line, line
        yield process, line.split(" at ")[1].split(" in ")[0]


def reports(here: Path) -> dict[str, Report]:
    """All runs, by their id."""
    found = [report(path.parent) for path in here.glob("sidestep-runs/*/run.json")]
    return {one.run.id: one for one in found}


def values(run: Report, name: str) -> list[float]:
    return [row.values[name] for row in read_jsonl(Path(run.run.dir)) if name in row.values]


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert "ready\n" == process.stdout.readline()


class TestContextFile:
    def test_stages_of_a_pipeline_that_are_processes_of_their_own_share_its_run(self, here: Path):
        """The orchestrator hands on a file and nothing else; two stages begin at step 0 and keep every row."""
        hold = [sys.executable, "-c", WAIT_FOR_A_WORD]
        with started(*SIDESTEP, "run", "--id", "whole", "--context-file", "context.json", "--", *hold) as process:
            ready(process)
            assert {"address", "run_id", "run_dir"} == json.loads((here / "context.json").read_text()).keys()
            stages = [
                stage(name, first, SIDESTEP_CONTEXT=str(here / "context.json"))
                for name, first in (("operator", 0), ("distill", 100))
            ]
            process.communicate("go on\n", timeout=WAIT_S)

        assert [(0, "")] * 2 == [(one.returncode, one.stderr) for one in stages]
        run = reports(here)["whole"]
        assert list(range(10)) == values(run, "training/operator/loss")
        assert list(range(100, 110)) == values(run, "training/distill/loss")
        assert list(range(10)) == values(run, "training/distill/step")
        assert (31, True) == (run.ledger.delivered, run.ledger.balances)

    def test_one_that_can_not_be_read_is_said_and_harms_nobody(self, here: Path):
        ended = subprocess.run(
            [sys.executable, "-c", STAGE.replace("timeout=60", "timeout=1"), "operator", "0"],
            capture_output=True, text=True, timeout=WAIT_S, env=os.environ | {"SIDESTEP_CONTEXT": "nowhere.json"},
        )  # fmt: skip

        assert 0 == ended.returncode
        assert "context = nowhere.json (from SIDESTEP_CONTEXT): can not be read" in ended.stderr


class TestProcessesOfOneRank:
    def test_each_value_that_they_log_without_a_step_is_in_the_run(self, here: Path):
        """Forked and spawned ones, beside a training that names its steps: as many rows as wandb makes."""
        (here / "program.py").write_text(CHILDREN)

        ended = sidestep("run", "--", sys.executable, "program.py")

        assert (0, "") == (ended.returncode, ended.stderr)
        [run] = reports(here).values()
        rows = [row.values for row in read_jsonl(Path(run.run.dir))]
        own = [row for row in rows if "sidestep/process" in row]
        assert sorted([*range(20), 100, 101]) == sorted(row["score"] for row in own)
        assert all(row["score"] == row.get("sum", row["score"]) for row in own)
        assert [1000, 1001, 1002, 1003] == [row["global_step"] for row in rows if "loss" in row]
        assert all(row["global_step"] > 1000 for row in own)
        assert 0 == run.late_rows
        assert run.ledger.balances
        assert run.ledger.offered == run.ledger.delivered


class TestService:
    def test_jobs_in_sequence_and_together_each_have_their_run(self, here: Path):
        with serving("--set", "serve.linger_s=0.5") as (process, address):
            for name in ("first", "second"):
                assert 0 == stage("operator", 0, SIDESTEP_ADDRESS=address, WANDB_RUN_ID=name).returncode
            with (
                started(sys.executable, "-c", WAIT_FOR_A_WORD, SIDESTEP_ADDRESS=address, WANDB_RUN_ID="a") as one,
                started(sys.executable, "-c", WAIT_FOR_A_WORD, SIDESTEP_ADDRESS=address, WANDB_RUN_ID="b") as two,
            ):
                for job in (one, two):
                    ready(job)
                for job in (one, two):
                    job.communicate("go on\n", timeout=WAIT_S)
            process.terminate()
            process.communicate(timeout=WAIT_S)

        found = reports(here)
        assert (0, {"first", "second", "a", "b"}) == (process.returncode, found.keys())
        assert [("finished", 0, True)] * 4 == [
            (run.state, run.run.exit_code, run.ledger.balances) for run in found.values()
        ]
        assert [11, 11] == [found[name].ledger.delivered for name in "ab"]

    @pytest.mark.nightly
    def test_each_job_says_whether_its_run_is_online(self, here: Path):
        """One service, two jobs: the one is on the server, and of the other the server never heard."""
        with StandIn(here / "server") as server:
            service = {**server.environment, "WANDB_API_KEY": KEY, "SIDESTEP_SINK_KIND": "wandb"}
            with serving("--set", "serve.linger_s=0.5", **service) as (process, address):
                for mode in ("online", "offline"):
                    said = {"SIDESTEP_ADDRESS": address, "WANDB_RUN_ID": mode, "WANDB_MODE": mode}
                    assert 0 == stage("operator", 0, **said).returncode
                process.terminate()
                process.communicate(timeout=WAIT_S)
            rows, known = server.rows("online", "pipeline"), server.runs()

        found = reports(here)
        assert (0, {"online", "offline"}) == (process.returncode, found.keys())
        assert [("finished", 10, True)] * 2 == [
            (run.state, run.ledger.delivered, run.ledger.balances) for run in found.values()
        ]
        assert list(range(10)) == [row["training/operator/loss"] for row in rows]
        assert ["online"] == known
        (file,) = Path(found["offline"].run.dir).glob("wandb/offline-run-*/*.wandb")
        assert 10 == sum(1 for _ in wandb_log.history(file))

    def test_each_init_after_a_finish_is_a_run_of_its_own(self, here: Path):
        with serving("--set", "serve.linger_s=0.5") as (process, address):
            subprocess.run(
                [sys.executable, "-c", REINIT_LOOP], env=os.environ | {"SIDESTEP_ADDRESS": address}, check=True
            )
            process.terminate()
            process.communicate(timeout=WAIT_S)

        assert [[0], [1], [2]] == sorted(values(run, "n") for run in reports(here).values())

    @pytest.mark.nightly
    def test_stopped_while_workers_are_there_the_same_command_goes_on(self, here: Path):
        address = f"ipc://{here}/daemon.sock"
        options = ("--address", address)
        with started(sys.executable, "-c", WAIT_FOR_A_WORD, SIDESTEP_ADDRESS=address, WANDB_RUN_ID="mine") as job:
            with serving(*options, "--grace", "0.5") as (first, _):
                ready(job)
                first.terminate()
                _, said = first.communicate(timeout=WAIT_S)
            interrupted = reports(here)["mine"]
            with serving(*options) as (second, _):
                job.communicate("go on\n", timeout=WAIT_S)
                second.terminate()
                second.communicate(timeout=WAIT_S)

        assert (75, "interrupted") == (first.returncode, interrupted.state)
        assert "workers are still there" in said
        run = reports(here)["mine"]
        assert (0, 0, "finished") == (job.returncode, second.returncode, run.state)
        assert (list(range(11)), True) == (values(run, "loss"), run.ledger.balances)

    def test_what_a_worker_says_is_weaker_than_the_command_line_and_stronger_than_the_rest(self, here: Path):
        with serving("--entity", "ours", "--set", "serve.linger_s=0", WANDB_NAME="theirs") as (process, address):
            stage("operator", 0, SIDESTEP_ADDRESS=address, WANDB_NAME="own", WANDB_ENTITY="own", WANDB_PROJECT="x")
            process.terminate()
            process.communicate(timeout=WAIT_S)

        (run,) = reports(here).values()
        said = RowLogReader(Path(run.run.dir) / "delivery.db").meta("run")
        assert ("ours", "own", "pipeline") == (said["entity"], said["name"], said["project"])

    def test_a_service_whose_supervisor_is_killed_serves_until_its_workers_left_and_tidies_up(self, here: Path):
        with (
            serving() as (process, address),
            started(sys.executable, "-c", WAIT_FOR_A_WORD, SIDESTEP_ADDRESS=address, WANDB_RUN_ID="mine") as job,
        ):
            ready(job)
            with Control(address) as control:
                intake = psutil.Process((control.ask_status(5.0) or {})["pid"])

            process.kill()
            job.communicate("go on\n", timeout=WAIT_S)
            intake.wait(WAIT_S)

        run = reports(here)["mine"]
        assert ("finished", 0, 11) == (run.state, run.run.exit_code, run.ledger.delivered)
        assert [] == list(Path(address.removeprefix("ipc://")).parent.iterdir())

    def test_the_key_to_wandb_is_written_nowhere(self, here: Path):
        key = "0123456789abcdef0123456789abcdef01234567"
        with serving("--set", "serve.linger_s=0", WANDB_API_KEY=key) as (process, address):
            stage("operator", 0, SIDESTEP_ADDRESS=address, WANDB_API_KEY=key)
            process.terminate()
            process.communicate(timeout=WAIT_S)

        files = [path for path in here.rglob("*") if path.is_file()]
        assert len(files) > 5
        assert [] == [path for path in files if key.encode() in path.read_bytes()]


class TestStopAndDrain:
    @pytest.mark.nightly
    def test_stop_ends_a_service_and_waits_for_it(self, here: Path):
        with serving() as (process, address):
            ended = sidestep("stop", "--address", address)

            assert (0, 0) == (ended.returncode, process.wait(WAIT_S))
            assert 69 == sidestep("ping", "--address", address).returncode

    def test_stop_of_a_run_is_for_its_command_to_obey(self, here: Path):
        with started(*SIDESTEP, "run", "--id", "mine", "--", sys.executable, "-c", WAIT_FOR_A_WORD) as process:
            ready(process)
            (run,) = reports(here).values()

            ended = sidestep("stop", run.run.dir)

            assert (0, 143) == (ended.returncode, process.wait(WAIT_S))
        assert ("finished", 143, 10) == (
            (found := reports(here)["mine"]).state, found.run.exit_code, found.ledger.delivered
        )  # fmt: skip

    @pytest.mark.nightly
    def test_where_nobody_is_there_is_nothing_to_stop(self, here: Path):
        sidestep("run", "--", "true")

        ended = sidestep("stop")

        assert 69 == ended.returncode
        assert "nobody answers at ipc://" in ended.stderr

    def test_ping_tells_who_is_there(self, here: Path):
        with serving() as (_, address):
            ended = sidestep("ping", SIDESTEP_ADDRESS=address)

        assert 0 == ended.returncode
        assert ended.stdout.endswith(", 0 workers\n")

    def test_drain_finishes_what_was_interrupted(self, here: Path):
        with (
            serving("--grace", "0") as (process, address),
            started(sys.executable, "-c", WAIT_FOR_A_WORD, SIDESTEP_ADDRESS=address, WANDB_RUN_ID="mine") as job,
        ):
            ready(job)
            process.terminate()
            _, said = process.communicate(timeout=WAIT_S)
        assert "sidestep drain sidestep-runs/" in said

        (here / "not-a-run").mkdir()
        ended = sidestep("drain", here / "not-a-run", reports(here)["mine"].run.dir)

        run = reports(here)["mine"]
        assert "not-a-run" in ended.stderr
        assert ended.returncode != 0  # of the first, which holds up nobody
        assert ("finished", 1) == (run.state, run.run.exit_code)
        assert (10, True) == (run.ledger.delivered, run.ledger.balances)
        assert 0 == sidestep("drain", run.run.dir).returncode


class TestTrouble:
    @pytest.mark.parametrize("emptied", [True, pytest.param(False, marks=pytest.mark.nightly)])
    def test_a_run_that_was_deleted_is_said_and_that_is_the_end(self, here: Path, emptied: bool):
        """Also where its directory is there, as it was written to while it was deleted."""
        impatient = WAIT_FOR_A_WORD.replace("finish(timeout=60)", "finish(timeout=1)")
        with started(*SIDESTEP, "run", "--", sys.executable, "-c", impatient) as process:
            ready(process)
            (run,) = reports(here).values()

            while Path(run.run.dir, "config.json" if emptied else "").exists():  # its files are being written
                shutil.rmtree(run.run.dir, ignore_errors=True)
            Path(run.run.dir).mkdir(exist_ok=True) if emptied else None
            assert process.stderr is not None
            assert "was deleted" in process.stderr.readline()
            process.communicate("go on\n", timeout=WAIT_S)

        assert 74 == process.returncode

    @pytest.mark.nightly
    def test_a_delivery_that_does_not_get_going_is_told_with_its_reason_until_it_does(self, here: Path):
        in_the_way = 'touch "$SIDESTEP_RUN_DIR/wandb"; exec "$0" -c "$1"'
        words = ("run", "--sink", "wandb", "--", "sh", "-c", in_the_way, sys.executable, WAIT_FOR_A_WORD)
        with started(*SIDESTEP, *words) as process:
            ready(process)

            trouble = eventually(lambda: next(iter(reports(here).values())).trouble, WAIT_S)
            shown = sidestep("status").stdout
            (run,) = reports(here).values()
            (Path(run.run.dir) / "wandb").unlink()
            process.communicate("go on\n", timeout=WAIT_S)

        assert re.match(r"delivery ended with 70, \d+ times in a row: FileExistsError: .*wandb", trouble)
        assert re.search(r"^trouble   delivery ended with 70", shown, re.MULTILINE)
        found = reports(here)[run.run.id]
        assert (0, "finished", "", 11) == (
            process.returncode, found.state, found.trouble, found.ledger.delivered
        )  # fmt: skip

    @pytest.mark.nightly
    def test_an_intake_that_outlived_everybody_leaves_no_socket_behind(self, here: Path):
        words = (*SIDESTEP, "run", "--set", "order.lease_s=2", "--", sys.executable, "-c", WAIT_FOR_A_WORD)
        with started(*words) as process:
            ready(process)
            (run,) = reports(here).values()
            socket = Path(run.run.address.removeprefix("ipc://"))
            with Control(run.run.address) as control:
                intake = psutil.Process((control.ask_status(5.0) or {})["pid"])

            supervisor = psutil.Process(process.pid)  # first: it would close the run as the command ended
            for one in [supervisor, *supervisor.children()]:
                if one != intake:
                    one.kill()
            intake.wait(WAIT_S)

        found = reports(here)[run.run.id]
        assert ("finished", 1, True) == (found.state, found.run.exit_code, found.ledger.balances)
        assert [] == list(socket.parent.iterdir())
