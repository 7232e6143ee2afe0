"""The scripts of deploy/slurm under a real SLURM: two nodes, one of them the controller, each a booted Debian.

A job that is queued again waits until its first life's credential has expired: two minutes, here ten seconds.
One that is told to start sooner is at times refused by the node, as a job that was ended there, and has failed.
The training saves a checkpoint when it is sent SIGTERM, as trainings do, and goes on from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestepd import status
from tests.support.daemons import freeze
from tests.support.machines import Machine
from tests.support.waiting import eventually
from tests.support.workshop import DEPLOY, Workshop, do, lines, need, rows_of, steps_in, unpack

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]

WAIT_S = 180.0
CONF = """
ClusterName=tested
SlurmctldHost=node1(192.0.2.1)
SlurmUser=slurm
AuthType=auth/munge
AuthInfo=cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
StateSaveLocation=/var/lib/slurm/slurmctld
SlurmdSpoolDir=/var/lib/slurm/slurmd
SchedulerParameters=batch_sched_delay=0,requeue_setup_env_fail
JobRequeue=1
SlurmdParameters=config_overrides
KillWait=60
MinJobAge=3600
Epilog=/etc/slurm/sidestep-epilog.sh
TaskProlog=/etc/slurm/sidestep-task-prolog.sh
NodeName=node1 NodeAddr=192.0.2.1 CPUs=4 State=UNKNOWN
NodeName=node2 NodeAddr=192.0.2.2 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
TRAIN = """
import os, signal, sys, time
from pathlib import Path
import sidestep
folder, stops, rank = Path(sys.argv[1]), [], os.environ.get("SLURM_PROCID", "0")
signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
saved = folder / f"checkpoint-{rank}"
step = int(saved.read_text()) if saved.exists() else 0
run = sidestep.init(project="queued")
print("from", step, flush=True)
while step < 30 or not (folder / "until").exists():
    if stops:
        saved.write_text(str(step))
        run.finish(timeout=60)
        sys.exit(85)
    run.log({"loss": 1 / (step + 1), f"at/{rank}": step}, step=step)
    step += 1
    time.sleep(0.01)
run.finish(timeout=60)
(folder / f"steps-{rank}").write_text(str(step))
"""


@pytest.fixture(scope="module")
def cluster(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Two nodes with a cable between them, one of them the controller; alice, whose home both share."""
    need("systemd-nspawn", "nsenter", "ip", root=True)
    tree = unpack(workshop.slurm, tmp_path_factory.mktemp("cluster") / "tree")
    (tree / "root/install").write_text(
        lines(
            [
                "set -e",
                "python3 -m venv /opt/sidestep",
                "/opt/sidestep/bin/pip -q install --no-index --find-links /wheels 'sidestep[daemon]'",
                "ln -s /opt/sidestep/bin/sidestep /usr/local/bin/",
                "useradd --create-home --shell /bin/bash alice",
                "cp /deploy/slurm/epilog.sh /etc/slurm/sidestep-epilog.sh",
                "cp /deploy/slurm/task_prolog.sh /etc/slurm/sidestep-task-prolog.sh",
                "cp /deploy/slurm/*.sh /home/alice/",
                "install -d -o slurm -g slurm /var/lib/slurm/slurmctld /var/lib/slurm/slurmd",
                "chown -R alice: /home/alice",
            ]
        )
    )
    (tree / "etc/slurm").mkdir(exist_ok=True)
    (tree / "etc/slurm/slurm.conf").write_text(CONF)
    (tree / "etc/hostname").write_text("node1\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost\n192.0.2.1 node1\n192.0.2.2 node2\n")
    do("systemd-nspawn", "-q", f"--directory={tree}", f"--bind-ro={workshop.wheels}:/wheels",
       f"--bind-ro={DEPLOY}:/deploy", "--register=no", "--keep-unit", "--", "sh", "/root/install")  # fmt: skip
    (tree / "home/alice/train.py").write_text(TRAIN)
    home = tmp_path_factory.mktemp("home")
    home.chmod(0o755)
    do("cp", "-a", tree / "home/alice", home)
    do("cp", "-a", tree, tree.with_name("second"))
    (tree.with_name("second") / "etc/hostname").write_text("node2\n")
    second = tree.with_name("second")
    with Machine(tree, "node1", home=home) as first, Machine(second, "node2", home=home) as other:
        first.connect(other, "192.0.2.1/24", "192.0.2.2/24")
        first.do("systemctl", "restart", "munge", "slurmctld", "slurmd")
        other.do("systemctl", "restart", "munge", "slurmd")
        eventually(
            lambda: first.ask("sinfo", "-h", "-N", "-o", "%t").split() == ["idle", "idle"],
            WAIT_S,
            lambda: first.ask("journalctl", "-u", "slurmd", "-u", "slurmctld", "-n", "40"),
        )
        yield first


class Job:
    """A job of alice's, in a directory of its own."""

    def __init__(self, machine: Machine, name: str, script: str = "single.sh", *options: str) -> None:
        self.machine = machine
        self.folder = machine.home / "alice" / name
        here = f"/home/alice/{name}"
        machine.do("mkdir", here, user="alice")
        told = machine.do(
            "env", f"--chdir={here}", "SIDESTEP_ORDER_PATIENCE_S=1", "SIDESTEP_DELIVERY_CONFIRM_INTERVAL_S=0.2",
            "sbatch", "--parsable", "--output=out", *options, f"/home/alice/{script}",
            "/opt/sidestep/bin/python", "/home/alice/train.py", here, user="alice",
        )  # fmt: skip
        self.id = told.strip()

    def said(self) -> str:
        return (self.folder / "out").read_text() if (self.folder / "out").exists() else ""

    def told(self) -> str:
        """All that helps to understand what it did."""
        log = self.machine.ask("journalctl", "-u", "slurmd", "-u", "slurmctld", "-n", "30", "-o", "cat")
        return f"{self.machine.ask('scontrol', 'show', 'job', self.id)}\n{log}\n{self.said()}"

    def show(self, what: str) -> str:
        words = self.machine.ask("scontrol", "show", "job", self.id).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{what}=")), "")

    def rows(self) -> int:
        return sum(status.report(path.parent).rows for path in self.folder.glob("sidestep-runs/*/delivery.db"))

    def begins(self, tasks: int) -> None:
        """Wait until so many tasks were started, in all of its lives, and know what to do when told to end."""
        eventually(lambda: self.said().count("from") >= tasks, WAIT_S, self.told)

    def reaches(self, rows: int) -> None:
        def held() -> bool:
            assert self.show("JobState") not in ("FAILED", "COMPLETED", "NODE_FAIL"), self.told()
            return self.rows() >= rows

        eventually(held, WAIT_S, self.told)

    def ends(self, state: str = "COMPLETED") -> None:
        eventually(lambda: self.show("JobState") == state, WAIT_S,
                   self.told)  # fmt: skip

    def run_dirs(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("sidestep-runs/*/run.json"))

    def is_whole(self, ranks: int = 1) -> None:
        """What each rank said at each step is in one of the run's directories, once, and all are balanced."""
        rows = [row for path in self.run_dirs() for row in rows_of(path)]
        told = {path.name: int(path.read_text()) for path in self.folder.glob("steps-*")}
        assert {f"steps-{rank}" for rank in range(ranks)} == told.keys(), self.told()
        for rank in range(ranks):
            said = sorted(row[f"at/{rank}"] for row in rows if f"at/{rank}" in row)
            assert list(range(told[f"steps-{rank}"])) == said
        reports = [status.report(path) for path in self.run_dirs()]
        assert {f"slurm-{self.id}"} == {report.run.id for report in reports}
        assert all(one.ledger.balances and not one.ledger.pending and one.state == "finished" for one in reports)


class TestOneNode:
    def test_a_job_is_a_run(self, cluster):
        job = Job(cluster, "plain")
        job.reaches(30)
        (job.folder / "until").touch()
        job.ends()

        job.is_whole()
        assert 1 == len(job.run_dirs())

    def test_a_job_that_is_requeued_goes_on_in_the_same_run(self, cluster):
        job = Job(cluster, "requeued")
        job.reaches(50)
        before = job.rows()

        cluster.do("scontrol", "requeue", job.id, user="alice")

        eventually(lambda: job.show("Restarts") == "1", WAIT_S, job.told)
        job.begins(tasks=2)
        job.reaches(before + 50)
        (job.folder / "until").touch()
        job.ends()
        job.is_whole()
        assert 2 == len(job.run_dirs())

    def test_a_job_whose_training_asks_for_it_is_queued_again(self, cluster):
        """As at the end of its time: SLURM tells the script, the script tells the training."""
        job = Job(cluster, "over")
        job.reaches(50)
        before = job.rows()

        cluster.do("scancel", "--batch", "--signal=USR1", job.id, user="alice")

        eventually(lambda: job.show("Restarts") == "1", WAIT_S, job.told)
        job.begins(tasks=2)
        job.reaches(before + 50)
        (job.folder / "until").touch()
        job.ends()
        job.is_whole()

    def test_a_job_that_is_cancelled_stays_so_and_its_run_is_finished(self, cluster):
        job = Job(cluster, "cancelled")
        job.reaches(50)

        cluster.do("scancel", job.id, user="alice")

        job.ends("CANCELLED")
        eventually(lambda: cluster.ask("squeue", "-h") == "", WAIT_S, lambda: cluster.ask("squeue"))
        (run_dir,) = job.run_dirs()
        report = status.report(run_dir)
        steps = steps_in(run_dir)
        assert list(range(len(steps))) == steps
        assert ("finished", True, 0) == (report.state, report.ledger.balances, report.ledger.pending)
        assert "0" == job.show("Restarts")

    def test_a_job_that_is_killed_is_finished_by_the_epilog(self, cluster):
        """All its processes at once, daemon and script too: nobody of the job is left to do it."""
        job = Job(cluster, "killed")
        job.reaches(50)

        cluster.do("pkill", "-KILL", "-u", "alice")

        eventually(lambda: cluster.ask("squeue", "-h") == "", WAIT_S, job.told)
        (run_dir,) = job.run_dirs()
        eventually(lambda: status.report(run_dir).state == "finished", WAIT_S, job.told)
        report, steps = status.report(run_dir), steps_in(run_dir)
        assert list(range(len(steps))) == steps
        assert (True, 0, 1) == (report.ledger.balances, report.ledger.pending, report.lost_sessions)
        assert 1 == report.run.exit_code  # of workers that ended without a word


class TestManyNodes:
    def test_a_job_is_a_run_and_a_requeued_one_goes_on_in_it(self, cluster):
        job = Job(cluster, "many", "many.sh")
        job.begins(tasks=2)
        job.reaches(50)
        before = job.rows()

        cluster.do("scancel", "--batch", "--signal=USR1", job.id, user="alice")

        eventually(lambda: job.show("Restarts") == "1", WAIT_S, job.told)
        job.begins(tasks=4)
        job.reaches(before + 50)
        (job.folder / "until").touch()
        job.ends()
        job.is_whole(ranks=2)
        workers = [one for path in job.run_dirs() for one in status.report(path).sessions if one.role == "worker"]
        assert {("node1", 0), ("node2", 1)} == {(one.node, one.rank) for one in workers}

    def test_a_job_with_a_task_for_each_rank_is_a_run_too(self, cluster):
        job = Job(cluster, "ranks", "many.sh", "--ntasks-per-node=2")
        job.begins(tasks=4)
        job.reaches(50)
        (job.folder / "until").touch()
        job.ends()

        job.is_whole(ranks=4)
        (run_dir,) = job.run_dirs()
        sessions = status.report(run_dir).sessions
        ranks = {(one.node, one.rank) for one in sessions if one.role == "worker"}
        assert {("node1", 0), ("node1", 1), ("node2", 2), ("node2", 3)} == ranks
        assert ["node2"] == [one.node for one in sessions if one.role == "relay"]
        assert not list(run_dir.parent.glob(".*/*"))  # keys, and relays

    def test_a_job_whose_first_node_is_killed_is_finished_with_what_the_other_one_kept(self, cluster):
        """SLURM ends the other's training, at times without a word, and both nodes' epilogs begin at once."""
        job = Job(cluster, "beheaded", "many.sh")
        job.begins(tasks=2)
        job.reaches(50)
        (relay,) = (path.parent for path in job.folder.glob("sidestep-runs/.relays/*/run.json"))
        freeze(cluster.find("sidestepd.intake"))
        eventually(lambda: status.report(relay).ledger.pending > 50, WAIT_S, job.told)
        (kept,) = (one.acknowledged for one in status.report(relay).sessions if one.role == "worker")

        cluster.do("pkill", "-KILL", "-u", "alice")

        eventually(lambda: cluster.ask("squeue", "-h") == "", WAIT_S, job.told)
        (run_dir,) = job.run_dirs()
        eventually(lambda: status.report(run_dir).state == "finished", WAIT_S, job.told)
        report = status.report(run_dir)
        said = [row["at/1"] for row in rows_of(run_dir) if "at/1" in row]
        assert list(range(len(said))) == said, job.told()
        assert len(said) > kept - 10  # records that are no steps
        assert (True, 0) == (report.ledger.balances, report.ledger.pending)
        assert not relay.exists()
