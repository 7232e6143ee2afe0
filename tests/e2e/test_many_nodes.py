"""`sidestep run` on several nodes: one run, whoever starts the commands, with no line of configuration."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidestepd import status
from sidestepd.addresses import CONTEXT
from sidestepd.errors import ExitCode
from sidestepd.processes import Lock
from sidestepd.rundir import newest_run_dir
from tests.support.daemons import DEADLINE_S, HeldRow, killed, read_jsonl
from tests.support.waiting import eventually
from tests.support.wandb_server import StandIn

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
TRAIN = f"""
import os, sys, time, sidestep
run = sidestep.init()
rank = int(next(filter(None, map(os.environ.get, ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")))))
for step in range({STEPS}):
    run.log({{"mine": rank, "step": step}}, step=step)
    time.sleep(0.02)
run.finish()
sys.exit(int(os.environ.get("END_WITH", "0")))
"""


class Job:
    """Commands that one launcher started; where each is, what it said, and how it ended."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._commands: list[subprocess.Popen[bytes]] = []

    def start(
        self, environ: Mapping[str, str], words: Sequence[str] = (), *, folder: str = "shared", **options: object
    ) -> None:
        """`sidestep run` of the training, or of other words."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("SIDESTEP_", "WANDB_", "SLURM_"))}
        chosen = {"sink.kind": "jsonl", "samplers.enabled": "off", "order.patience_s": "30", **options}
        settings = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
        command = words or (sys.executable, "-c", TRAIN)
        (self.base / folder).mkdir(exist_ok=True)
        self._commands.append(
            subprocess.Popen(
                [sys.executable, "-m", "sidestep", "run", *settings, "--", *command],
                cwd=self.base / folder,
                env=plain | {"SIDESTEP_PROGRAM": "0", "PYTHONPATH": str(ROOT)} | dict(environ),
                stdin=subprocess.DEVNULL,
                stderr=(self.base / f"command{len(self._commands)}.log").open("ab"),
                start_new_session=True,
            )
        )

    def wait(self) -> list[int]:
        """The exit codes."""
        return [command.wait(DEADLINE_S) for command in self._commands]

    def interrupt(self, number: int) -> None:
        """Ctrl-C at the command that was started so many before it."""
        self._commands[number].send_signal(signal.SIGINT)

    def stop(self) -> None:
        """End all that is left, daemons too: they outlive their command."""
        for command in self._commands:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(command.pid)
                for one in (process, *process.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
            command.wait()

    def sidestep(
        self, *words: str, environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Another command, in the same place."""
        command = [sys.executable, "-m", "sidestep", *words]
        own = os.environ | dict(environ or {})
        return subprocess.run(command, cwd=self.base / "shared", env=own, timeout=DEADLINE_S, check=False)

    def run_dir(self, folder: str = "shared") -> Path:
        found = newest_run_dir(self.base / folder)
        assert found is not None, self.log()
        return found

    def rows(self, folder: str = "shared") -> list[HeldRow]:
        return read_jsonl(self.run_dir(folder))

    def log(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.base.glob("command*.log")))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    made.stop()


def srun(task: int, *, per_node: int = 1, nodes: int = 2) -> dict[str, str]:
    """What SLURM says to a task."""
    return {
        "SLURM_JOB_ID": "42", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(task),
        "SLURM_STEP_NUM_TASKS": str(per_node * nodes), "SLURM_LOCALID": str(task % per_node),
        "SLURM_NODEID": str(task // per_node), "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})", "SLURMD_NODENAME": f"n{task // per_node}",
    }  # fmt: skip


def assert_one_run(job: Job, *, ranks: int, exit_code: int, folder: str = "shared") -> status.Report:
    """All ranks are in one run, every row once and whole; nothing is left of the meeting, and of relays."""
    rows, report = job.rows(folder), status.report(job.run_dir(folder))
    assert list(range(STEPS)) == [row.values["step"] for row in rows], job.log()
    assert {ranks} == {row.values["sidestep/ranks_reported"] for row in rows}
    assert (exit_code, "finished", 0) == (report.run.exit_code, report.state, report.late_rows)
    assert report.ledger.balances
    assert (report.ledger.offered, 0) == (report.ledger.delivered, report.ledger.pending)
    for name in (".jobs", ".relays"):
        assert not (job.base / folder / "sidestep-runs" / name).exists()
    return report


class TestSrun:
    def test_with_a_task_on_each_node_is_one_run_that_ends_with_the_worst(self, job: Job):
        look = "import os, shutil, sys\nshutil.copy(os.environ['SIDESTEP_RUN_DIR'] + '/config.json', sys.argv[1])"
        relay = job.base / "relay.json"
        job.start(srun(1) | {"END_WITH": "3"}, (sys.executable, "-c", f"{look}\n{TRAIN}", str(relay)))
        job.start(srun(0))

        assert [3, 3] == job.wait(), job.log()
        report = assert_one_run(job, ranks=2, exit_code=3)
        assert ["bye"] == [it.state for it in report.sessions if it.role == "relay"]
        assert {str(job.run_dir() / CONTEXT)} == {json.loads(relay.read_text())["upstream"]["context"]}

    @pytest.mark.nightly
    def test_with_a_task_for_each_rank_is_one_run_too(self, job: Job):
        for task in (3, 1, 2, 0):
            job.start(srun(task, per_node=2) | {"END_WITH": "5" if task == 3 else "0"})

        assert [5, 0, 5, 5] == job.wait(), job.log()
        assert_one_run(job, ranks=4, exit_code=5)

    @pytest.mark.nightly
    def test_on_one_node_has_one_daemon(self, job: Job):
        for task in range(3):
            job.start(srun(task, per_node=3, nodes=1))

        assert [0, 0, 0] == job.wait(), job.log()
        report = assert_one_run(job, ranks=3, exit_code=0)
        assert [] == [it for it in report.sessions if it.role == "relay"]


@pytest.mark.nightly
class TestAFirstNodeThatEndsFirst:
    def test_waits_for_the_others_and_says_for_whom(self, job: Job):
        enough = job.base / "enough"
        words = TRAIN.replace(f"for step in range({STEPS})", "step = -1\nwhile not os.path.exists(sys.argv[1])")
        words = words.replace("    run.log", "    step += 1\n    run.log")
        job.start(srun(1), (sys.executable, "-c", words, str(enough)))
        job.start(srun(0), (sys.executable, "-c", "raise SystemExit(2)"))

        waits = f"waiting for those of other nodes: {os.uname().nodename}"
        eventually(lambda: waits in job.log(), DEADLINE_S, job.log)
        enough.touch()

        assert [0, 2] == job.wait(), job.log()
        steps = [row.values["step"] for row in job.rows()]
        assert list(range(len(steps))) == steps
        assert len(steps) > STEPS
        report = status.report(job.run_dir())
        assert (2, 0, True) == (report.run.exit_code, report.ledger.pending, report.ledger.balances)

    def test_is_told_to_wait_no_longer_by_a_second_ctrl_c(self, job: Job):
        """What the others say after that is kept by their relays, and said."""
        enough = job.base / "enough"
        words = TRAIN.replace(f"for step in range({STEPS})", "step = -1\nwhile not os.path.exists(sys.argv[1])")
        words = words.replace("    run.log", "    step += 1\n    run.log")
        job.start(srun(1), (sys.executable, "-c", words, str(enough)))
        job.start(srun(0), (sys.executable, "-c", "raise SystemExit(2)"))
        eventually(lambda: "waiting for those of other nodes" in job.log(), DEADLINE_S, job.log)

        job.interrupt(1)
        eventually(lambda: "once more, and the run ends without" in job.log(), DEADLINE_S, job.log)
        job.interrupt(1)
        eventually(lambda: "takes no more of this run" in job.log(), DEADLINE_S, job.log)
        enough.touch()

        assert [ExitCode.INTERRUPTED, 2] == job.wait(), job.log()
        assert "not complete" in job.log()
        (relay,) = (path.parent for path in job.run_dir().parent.glob(".relays/*/run.json"))
        head, kept = status.report(job.run_dir()).ledger, status.report(relay).ledger
        assert (True, True, 0) == (head.balances, kept.balances, head.pending)
        assert kept.pending > 0
        steps = [row.values["step"] for row in job.rows()]
        assert list(range(len(steps))) == steps


class TestMpirun:
    @pytest.mark.nightly
    def test_with_fewer_tasks_on_the_first_node_waits_for_those_nodes_that_there_are(self, job: Job):
        """Each task is told how many there are on its own node and in all, and of nodes nothing."""
        for rank, local in ((1, 0), (2, 1), (3, 2), (0, 0)):
            said = {"RANK": rank, "SIZE": 4, "LOCAL_RANK": local, "LOCAL_SIZE": 3 if rank else 1}
            ours = {"SIDESTEP_NODE": f"n{min(rank, 1)}", "PMIX_NAMESPACE": "prte-1"}
            job.start({f"OMPI_COMM_WORLD_{name}": str(value) for name, value in said.items()} | ours)

        assert [0, 0, 0, 0] == job.wait(), job.log()
        assert "never came" not in job.log()
        assert_one_run(job, ranks=4, exit_code=0)


@pytest.mark.nightly
class TestAJobThatIsKilled:
    """With all its processes, as a scheduler ends one whose time is over."""

    def test_is_finished_with_what_its_relays_kept(self, job: Job):
        head, said = self.kill_one_whose_relay_keeps_much(job)

        assert job.sidestep("drain", str(head)).returncode == 0

        assert_all_that_was_said(job, [row.values for row in job.rows()], head, said)

    def test_is_finished_by_one_at_a_time(self, job: Job):
        """The epilogs of two nodes begin at once: one of them leaves all as it is."""
        head, said = self.kill_one_whose_relay_keeps_much(job)
        (options,) = head.parent.glob(".relays/*/config.json")
        before, other = options.read_bytes(), Lock(head / "stranded.lock")
        other.acquire()

        refused = job.sidestep("drain", str(head))

        assert (ExitCode.ALREADY_RUNNING, "interrupted") == (refused.returncode, status.report(head).state)
        assert before == options.read_bytes()
        other.release()
        assert job.sidestep("drain", str(head)).returncode == 0
        assert_all_that_was_said(job, [row.values for row in job.rows()], head, said)

    @pytest.mark.parametrize(("mode", "given"), [("offline", ()), ("online", ("--id", "other"))])
    def test_is_sent_with_what_its_relays_kept(self, job: Job, tmp_path: Path, mode: str, given: Sequence[str]):
        """One that was online, and of which nothing is on the server yet, may be called otherwise."""
        with StandIn(tmp_path / "server") as server:
            server.stop()
            options = {"sink.kind": "wandb", "run.mode": mode, "run.project": "p", "run.id": "begun"}
            head, said = self.kill_one_whose_relay_keeps_much(job, server.environment, **options)
            server.start()

            sent = job.sidestep("sync", *given, str(head), environ=server.environment)

            assert sent.returncode == 0, job.log()
            rows = server.rows(given[1] if given else "begun")
        assert_all_that_was_said(job, rows, head, said)

    @staticmethod
    def kill_one_whose_relay_keeps_much(
        job: Job, environ: Mapping[str, str] | None = None, **options: object
    ) -> tuple[Path, int]:
        """The run's directory, and how many records the relay had acknowledged to its worker."""
        words = (sys.executable, "-c", TRAIN.replace(f"in range({STEPS})", "in range(10**9)"))
        for task in (1, 0):
            job.start(srun(task) | dict(environ or {}), words, **options)
        runs = job.base / "shared" / "sidestep-runs"
        eventually(lambda: any(runs.glob(".relays/*/upstream.json")), DEADLINE_S, job.log)
        (relay,), head = (path.parent for path in runs.glob(".relays/*/run.json")), job.run_dir()
        eventually(lambda: len(workers_of(head)) == 2, DEADLINE_S, job.log)
        intakes = {one: find_intake(one) for one in (head, relay)}
        eventually(lambda: min(it.acknowledged for it in workers_of(head)) > 2 * STEPS, DEADLINE_S, job.log)

        intakes[head].suspend()
        eventually(lambda: status.report(relay).ledger.pending > 2 * STEPS, DEADLINE_S, job.log)
        job.stop()
        for one in intakes.values():
            killed(one)
        (said,) = (it.acknowledged for it in workers_of(relay))
        return head, said


def workers_of(run_dir: Path) -> list[status.SessionReport]:
    return [it for it in status.report(run_dir).sessions if it.role == "worker"]


def assert_all_that_was_said(job: Job, rows: Sequence[Mapping[str, Any]], head: Path, said: int) -> None:
    """Of the rank behind the relay every step once, and of both ranks what both said; nothing is left behind."""
    report = status.report(head)
    assert list(range(said)) == [row["step"] for row in rows if row["step"] < said]
    of_both = {row["step"] for row in rows if row["sidestep/ranks_reported"] == 2}
    assert len(of_both) > STEPS
    assert [said] == [it.acknowledged for it in report.sessions if it.node == "n1" and it.role == "worker"]
    assert report.ledger.balances
    assert (0, 0) == (report.ledger.pending, report.late_rows)
    assert [] == [name for name in (".jobs", ".relays") if (job.base / "shared" / "sidestep-runs" / name).exists()]


def find_intake(run_dir: Path) -> psutil.Process:
    (found,) = (
        it
        for it in psutil.process_iter(["cmdline"])
        if {"sidestepd.intake", str(run_dir)} <= set(it.info["cmdline"] or ())
    )
    return found


@pytest.mark.nightly
class TestWithoutASharedFolder:
    def test_a_secret_in_the_environment_does(self, job: Job):
        secret = {"SIDESTEP_JOB_SECRET": "s" * 40, "SIDESTEP_PORT": "7719"}
        rank = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        for node in (1, 0):
            own = {"RANK": str(node), "MASTER_PORT": "1", "SLURMD_NODENAME": f"n{node}"}
            job.start(secret | rank | own, folder=f"alone{node}")

        assert [0, 0] == job.wait(), job.log()
        assert_one_run(job, ranks=2, exit_code=0, folder="alone0")

    def test_a_node_that_finds_nobody_keeps_what_it_has(self, job: Job):
        job.start(srun(1), **{"job.wait_s": "1"})
        log = job.base / "command0.log"

        eventually(lambda: "was not found in 1 s" in log.read_text(), DEADLINE_S, job.log)
        relays = job.base / "shared" / "sidestep-runs" / ".relays"
        eventually(lambda: any(relays.glob("*/run.json")), DEADLINE_S, job.log)
        (run_dir,) = (path.parent for path in relays.glob("*/run.json"))
        eventually(lambda: status.report(run_dir).ledger.pending >= STEPS, DEADLINE_S, job.log)

    def test_a_first_node_that_waits_in_vain_says_so(self, job: Job):
        job.start(srun(0), **{"job.wait_s": "1", "order.patience_s": "1"})

        assert [1] == job.wait(), job.log()
        assert "1 of 1 other nodes never came" in job.log()
