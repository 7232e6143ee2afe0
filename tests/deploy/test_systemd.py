"""The units of deploy/systemd, in a Debian that systemd booted: installed from the wheel, used, and mistreated.

Workers are processes of another user than the daemon, in an environment without the daemon's extra. Runs go to
real wandb under the unit's sandbox, and are read back from its files.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestepd import status
from tests.support.cgroups import bounded, group_of
from tests.support.daemons import freeze
from tests.support.gpus import LIBRARY, StubGpus, library
from tests.support.machines import Machine
from tests.support.units import (
    KEY,
    QUICK,
    SOCKET,
    UNIT,
    WAIT_S,
    Trained,
    rows_on_server,
    serve_wandb,
    with_drop_in,
)
from tests.support.waiting import eventually
from tests.support.workshop import (
    DEPLOY,
    ROOT,
    TRAIN,
    Workshop,
    assert_whole,
    blocks,
    do,
    is_finished,
    lines,
    need,
    rows_of,
    run_dir_in,
    runs_in,
    steps_in,
    unpack,
)

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def tree(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Debian with two people, and the client for their trainings; of ours nothing yet."""
    need("systemd-nspawn", "nsenter", root=True)
    tree = unpack(workshop.debian, tmp_path_factory.mktemp("machine") / "tree")
    prepare = [
        "set -e",
        "python3 -m venv /opt/train",
        "/opt/train/bin/pip -q install --no-index --find-links /wheels sidestep",
        "for name in alice bob; do useradd --create-home --shell /bin/bash $name; done",
    ]
    (tree / "root/prepare").write_text(lines(prepare))
    do("systemd-nspawn", "-q", f"--directory={tree}", f"--bind-ro={workshop.wheels}:/wheels",
       "--register=no", "--keep-unit", "--", "sh", "/root/prepare")  # fmt: skip
    (tree / "opt/train/train.py").write_text(TRAIN)
    (tree / "srv/ours").mkdir()
    (tree / "srv/ours/KEY").write_text(KEY)
    (tree / "root/typed").write_text(typed(0))
    (tree / "home/alice/typed").write_text(typed(1))
    return tree


def typed(at: int) -> str:
    """What deploy/README.md says to type, word by word."""
    return blocks(DEPLOY / "README.md", ("## systemd", "### A daemon of your own")[at])[0]


WHERE = ("env", "--chdir=/srv/ours", "PIP_NO_INDEX=1", "PIP_FIND_LINKS=/wheels", "PIP_QUIET=1")
"""Where it is typed; packages come from here."""
INSTALL_S = 600.0


@pytest.fixture(scope="module")
def disk(tree: Path) -> Iterator[Path]:
    """A small file system of its own, for the state of the instance `frozen`."""
    need("fsfreeze", "mkfs.ext4")
    image, place = tree.parent / "disk", tree / "var/lib/sidestep/frozen"
    place.mkdir(parents=True)
    do("truncate", "--size=512M", image)
    do("mkfs.ext4", "-q", image)
    do("mount", "-o", "loop", image, place)
    yield place
    do("umount", "--lazy", place)


@pytest.fixture(scope="module")
def machine(tree: Path, disk: Path, workshop: Workshop) -> Iterator[Machine]:
    """It, booted, and the unit installed by what is to be typed for that; the unit is stopped."""
    shared = {ROOT: "/sidestep", DEPLOY: "/srv/ours/deploy", workshop.wheels: "/wheels"}
    with Machine(tree, "sidestep-systemd", shared) as machine:
        machine.do(*WHERE, "sh", "-e", "/root/typed", limit_s=INSTALL_S)
        assert ("active", "enabled") == (machine.show(UNIT, "ActiveState"), machine.show(UNIT, "UnitFileState"))
        machine.do("systemctl", "stop", UNIT)
        (tree / "etc/sidestep/train.env").write_text(lines(QUICK))
        yield machine


@pytest.fixture
def unit(machine: Machine, tree: Path) -> Iterator[Machine]:
    """The machine, with the unit started, and stopped and as it was afterwards."""
    machine.do("systemctl", "start", UNIT)
    yield machine
    machine.ask("pkill", "-KILL", "-f", "/opt/train/train.py")  # of a test that failed
    machine.ask("systemctl", "stop", UNIT)
    machine.ask("systemctl", "revert", UNIT)
    machine.ask("systemctl", "reset-failed", UNIT)
    (tree / "etc/sidestep/train.env").write_text(lines(QUICK))
    for made in (tree / "srv").glob("until-*"):
        made.unlink()


@pytest.fixture
def gpus(unit: Machine) -> Iterator[StubGpus]:
    """GPUs that a file scripts, by a library in the place of NVIDIA's, where the machine has its libraries."""
    need("cc")
    placed = unit.tree / "usr/lib" / LIBRARY
    placed.write_bytes(library().read_bytes())
    gpus = StubGpus(unit.tree / "srv")
    (unit.tree / "etc/sidestep/train.env").write_text(lines([*QUICK, f"NVML_STUB=/srv/{gpus.path.name}"]))
    unit.do("systemctl", "restart", UNIT)
    yield gpus
    placed.unlink()


class TestTheUnit:
    def test_is_verified_without_a_word_and_exposes_little(self, machine):
        path = "/etc/systemd/system/sidestep@.service"
        assert "" == machine.do("sh", "-c", f"systemd-analyze verify {path} 2>&1")
        assert "" == machine.do(
            "sh", "-c", "systemd-analyze --man=no verify /etc/systemd/system/sidestep@a.service 2>&1 || true"
        )

        judged = machine.do("systemd-analyze", "security", "--offline=true", "--threshold=20", path)

        print(judged.splitlines()[-1])
        score = re.findall(r"Overall exposure level for \S+: (\S+)", judged)[0]
        assert f"exposure {score} of 10" in (DEPLOY / "README.md").read_text()

    def test_tells_when_it_is_ready_and_how_it_stands(self, unit):
        assert "active" == unit.show(UNIT, "ActiveState")
        training = Trained(unit, "told")
        training.reaches(10)

        eventually(
            lambda: unit.show(UNIT, "StatusText") == "1 runs, 1 workers", WAIT_S, unit.show(UNIT, "StatusText")
        )
        steps = training.ends()

        training.is_whole(steps)

    def test_has_the_machine_sampled_under_its_sandbox(self, unit):
        training = Trained(unit, "sampled")
        training.see_sampled("system/cpu/percent", "system/memory/percent", "system/disk/percent")
        steps = training.ends()

        training.is_whole(steps)
        (log,) = training.state().glob("sidestep-runs/*-sampled/logs/samplers.log")
        assert "Traceback" not in log.read_text()

    def test_lets_its_samplers_load_and_ask_nvml(self, unit, gpus):
        """NVIDIA's library is found, loaded and asked under all that hardens the unit.

        The stand-in opens no device: that DeviceAllow= lets NVIDIA's through can not be seen without a GPU.
        """
        gpus.set(count=2).gpu(0, util=71, power_mw=250_000).gpu(1, util=3)
        wanted = {"system/gpu0/utilization": {71}, "system/gpu0/power_w": {250}, "system/gpu1/utilization": {3}}
        training = Trained(unit, "gpus")
        training.see_sampled(*wanted)
        steps = training.ends()

        training.is_whole(steps)
        rows = rows_of(run_dir_in(training.state(), "gpus"))
        assert wanted == {name: {row[name] for row in rows if name in row} for name in wanted}


class TestWhoMayLog:
    def test_is_who_is_in_the_group_and_others_go_on_unharmed(self, unit):
        stranger = Trained(unit, "stranger", user="bob")
        training = Trained(unit, "member")
        training.reaches(10)
        steps = training.ends()
        stranger.ends()

        training.is_whole(steps)
        assert "stranger" not in runs_in(training.state())
        kept = unit.ask("find", "/tmp", "-name", "*.spill").split()
        assert 1 == len(kept)  # what it said waits for somebody who may
        unit.do("rm", *kept)


class TestTheSandbox:
    def test_keeps_what_is_not_the_daemons(self, machine):
        tries = {
            "/etc": "touch /etc/x",
            "/usr": "touch /usr/x",
            "home": "ls /home/alice",
            "key": "cat /etc/sidestep/train.key",
            "state": "touch /var/lib/sidestep/x",
            "disk": "mknod /tmp/sda b 8 0",
            "mount": "mount -t tmpfs x /mnt",
        }
        (machine.tree / "etc/sidestep/train.key").write_text("secret")
        (machine.tree / "etc/sidestep/train.key").chmod(0o600)
        script = "; ".join(f"{words} 2>/dev/null && echo {what} >> out" for what, words in tries.items())
        settings = [
            f"ExecStartPre=/bin/sh -c '{script}; touch out; cat $CREDENTIALS_DIRECTORY/wandb_api_key >> key'",
        ]
        try:
            with with_drop_in(machine, *settings):
                state = machine.tree / "var/lib/sidestep/train"
                assert "" == (state / "out").read_text()
                assert "secret" == (state / "key").read_text()
        finally:
            machine.ask("systemctl", "stop", UNIT)
            (machine.tree / "etc/sidestep/train.key").write_text(KEY)

    def test_a_run_goes_online_with_the_key_that_systemd_hands_over(self, machine):
        """The key is in no environment but those of delivery and wandb-core, and in no file of the run."""
        key = KEY
        port = serve_wandb(machine)
        (machine.tree / "etc/sidestep/train.key").write_text(f"{key}\n")
        settings = [
            "SIDESTEP_RUN_MODE=online",
            f"SIDESTEP_SINK_SERVER=http://127.0.0.1:{port}",
            "SIDESTEP_RUN_ENTITY=me",
        ]
        (machine.tree / "etc/sidestep/train.env").write_text(
            lines([*QUICK, "SIDESTEP_SINK_ASK_EVERY_S=0.5", *settings])
        )
        machine.do("systemctl", "start", UNIT)
        try:
            training = Trained(machine, "online")
            training.reaches(20)
            assert (
                key.encode()
                not in Path(f"/proc/{machine.process(machine.main_pid(UNIT)).pid}/environ").read_bytes()
            )
            steps = training.ends()

            report = training.is_whole(steps)
            assert "online" == report.run.mode
            assert list(range(steps)) == [row["global_step"] for row in rows_on_server(machine, "online")]
            found = subprocess.run(
                ["grep", "-rl", key, str(run_dir_in(training.state(), "online"))], capture_output=True
            )
            assert b"" == found.stdout
        finally:
            machine.ask("systemctl", "stop", UNIT)
            (machine.tree / "etc/sidestep/train.key").write_text(KEY)
            (machine.tree / "etc/sidestep/train.env").write_text(lines(QUICK))


class TestDeath:
    @pytest.mark.parametrize("what", ["the service", "sidestepd.intake", "sidestepd.delivery"])
    def test_of_any_process_leaves_the_run_whole(self, unit, what):
        id_ = f"killed-{what.rpartition('.')[2].replace(' ', '-')}"
        training = Trained(unit, id_)
        training.reaches(30)
        service = unit.process(unit.main_pid(UNIT))
        victim = service if what == "the service" else unit.find(what)

        victim.kill()

        eventually(lambda: not victim.is_running() or victim.status() == "zombie", WAIT_S, "it lives")
        unit.wait_until(UNIT, "active")
        training.reaches(100)
        steps = training.ends()
        training.is_whole(steps)
        assert ("1" if what == "the service" else "0") == unit.show(UNIT, "NRestarts")


class TestTheWatchdog:
    @pytest.mark.parametrize("what", ["the service", "sidestepd.intake"])
    def test_has_a_frozen_daemon_started_again(self, unit, what):
        """Frozen by SIGSTOP: it lives, and answers nothing."""
        id_ = f"frozen-{what.rpartition('.')[2].replace(' ', '-')}"
        with with_drop_in(unit, "WatchdogSec=4"):
            training = Trained(unit, id_)
            training.reaches(30)
            victim = unit.process(unit.main_pid(UNIT)) if what == "the service" else unit.find(what)

            freeze(victim)

            eventually(lambda: unit.show(UNIT, "NRestarts") == "1", WAIT_S, lambda: unit.journal(UNIT)[-2000:])
            assert "Watchdog timeout" in unit.journal(UNIT)
            assert not victim.is_running() or victim.status() == "zombie"
            training.reaches(100)
            steps = training.ends()
            training.is_whole(steps)

    def test_has_a_daemon_started_again_whose_disk_stands_still(self, machine, disk):
        """Intake answers all the while. Nothing of the disk may be looked at before it is thawed."""
        name, address = "sidestep@frozen", SOCKET.replace("train", "frozen")
        (machine.tree / "etc/sidestep/frozen.env").write_text(lines(QUICK))
        with with_drop_in(machine, "WatchdogSec=6", unit=name):
            training = Trained(machine, "iced", address=address, state=disk)
            training.reaches(30)

            do("fsfreeze", "--freeze", disk)
            try:
                eventually(
                    lambda: "Watchdog timeout" in machine.journal(name), WAIT_S, lambda: machine.journal(name)
                )
                assert training.process.poll() is None
            finally:
                do("fsfreeze", "--unfreeze", disk)

            eventually(lambda: machine.show(name, "NRestarts") == "1", WAIT_S, lambda: machine.journal(name))
            training.reaches(100)
            steps = training.ends()
            training.is_whole(steps)
            machine.do("systemctl", "stop", name)

    def test_leaves_alone_a_daemon_that_is_well(self, unit):
        with with_drop_in(unit, "WatchdogSec=2"):
            training = Trained(unit, "well")
            training.reaches(30)
            since = time.monotonic()
            eventually(lambda: time.monotonic() - since > 6.0, WAIT_S)  # three times what the watchdog allows
            steps = training.ends()

            training.is_whole(steps)
            assert "0" == unit.show(UNIT, "NRestarts")


class TestStopping:
    def test_with_a_backlog_keeps_it_and_the_next_start_finishes(self, unit):
        (unit.tree / "etc/sidestep/train.env").write_text(lines([*QUICK, "GRACE_S=3"]))
        unit.do("systemctl", "restart", UNIT)
        training = Trained(unit, "backlog")
        training.reaches(30)
        freeze(unit.find("sidestepd.delivery"))
        before = status.report(run_dir_in(training.state(), "backlog")).rows
        eventually(
            lambda: status.report(run_dir_in(training.state(), "backlog")).ledger.offered > before + 100, WAIT_S
        )
        steps = training.ends()

        unit.do("systemctl", "stop", UNIT)

        left = status.report(run_dir_in(training.state(), "backlog"))
        assert ("interrupted", True) == (left.state, left.ledger.balances)
        assert left.ledger.pending > 0
        assert "inactive" == unit.show(UNIT, "ActiveState")  # and not failed: 75 is no failure
        assert "goes on" in unit.journal(UNIT) or "not complete" in unit.journal(UNIT)
        (unit.tree / "etc/sidestep/train.env").write_text(lines(QUICK))
        unit.do("systemctl", "start", UNIT)
        training.is_whole(steps)

    def test_may_take_as_long_as_its_grace_whatever_the_unit_says(self, unit):
        """systemd would kill it after a second; it says that it needs longer, and why."""
        with with_drop_in(unit, "TimeoutStopSec=1", "Environment=GRACE_S=60"):
            training = Trained(unit, "graceful")
            training.reaches(30)
            stopping = unit.start("systemctl", "stop", UNIT)
            eventually(lambda: unit.show(UNIT, "ActiveState") == "deactivating", WAIT_S)
            since = time.monotonic()
            eventually(lambda: time.monotonic() - since > 3.0, WAIT_S)  # three times TimeoutStopSec
            assert "deactivating" == unit.show(UNIT, "ActiveState")

            steps = training.ends()

            stopping.communicate(timeout=WAIT_S)
            assert "success" == unit.show(UNIT, "Result")
            training.is_whole(steps)


class TestLimits:
    def test_are_those_of_the_unit(self, unit):
        limits = Path(f"/proc/{unit.process(unit.main_pid(UNIT)).pid}/limits").read_text()
        files = next(int(line.split()[4]) for line in limits.splitlines() if line.startswith("Max open files"))
        cores = next(line.split()[4] for line in limits.splitlines() if line.startswith("Max core file size"))

        assert 1024 < files <= 65536  # or what this machine itself may have
        assert "0" == cores
        assert str(4 * 1024**3) == unit.show(UNIT, "MemoryMax")
        assert "1024" == unit.show(UNIT, "TasksMax")

    def test_bound_its_memory(self, unit):
        group = group_of(unit.process(unit.main_pid(UNIT)).pid)
        if group is None:
            pytest.skip("memory is no controller of cgroups v2 here: a booted system's MemoryMax is not applied")

        assert str(4 * 1024**3) == group.limit.read_text().strip()

    def test_of_memory_cost_a_run_no_row(self, unit):
        """What delivers a run outgrows what is left: the kernel kills it, and it alone, until there is more."""
        intake = unit.find("sidestepd.intake")
        with bounded(unit.process(unit.main_pid(UNIT)), 64) as group:
            training = Trained(unit, "outgrown")
            eventually(lambda: group.kills() >= 2, WAIT_S, lambda: unit.journal(UNIT)[-2000:])
            assert training.process.poll() is None
        training.reaches(100)
        steps = training.ends()

        training.is_whole(steps)
        assert ("0", intake) == (unit.show(UNIT, "NRestarts"), unit.find("sidestepd.intake"))


class TestWhatWasTyped:
    def test_left_nothing_open_to_others(self, machine):
        """The key is root's alone; options are read by who is in the group, and written by nobody else."""
        told = machine.do("stat", "--format=%a %U %G %n", "/etc/sidestep", "/etc/sidestep/train.key",
                          "/etc/sidestep/train.env", "/var/lib/sidestep")  # fmt: skip
        assert [
            "750 root sidestep /etc/sidestep", "600 root root /etc/sidestep/train.key",
            "644 root root /etc/sidestep/train.env", "755 root root /var/lib/sidestep",
        ] == told.splitlines()  # fmt: skip

    def test_comes_up_with_the_machine_and_an_interrupted_run_with_it(self, machine):
        """Whoever trains is killed by the machine's end; what they said is there."""
        (machine.tree / "etc/sidestep/train.env").write_text(lines([*QUICK, "GRACE_S=3"]))
        machine.do("systemctl", "start", UNIT)
        training = Trained(machine, "rebooted")  # in no session: only the end of all ends it
        training.reaches(30)

        machine.reboot()

        assert training.process.poll() is not None
        machine.wait_until(UNIT, "active")
        eventually(
            lambda: is_finished(training.state(), "rebooted"), WAIT_S, lambda: machine.journal(UNIT)[-3000:]
        )
        run_dir = run_dir_in(training.state(), "rebooted")
        report, said = status.report(run_dir), steps_in(run_dir)
        assert list(range(len(said))) == said
        assert len(said) >= 30
        assert (True, 0, 1) == (report.ledger.balances, report.ledger.pending, report.lost_sessions)
        after = Trained(machine, "after")
        after.reaches(10)
        after.is_whole(after.ends())
        machine.do("systemctl", "stop", UNIT)
        (machine.tree / "etc/sidestep/train.env").write_text(lines(QUICK))

    def test_bad_option_fails_the_unit_at_once_and_is_named(self, machine):
        (machine.tree / "etc/sidestep/train.env").write_text(lines([*QUICK, "SIDESTEP_ORDER_PATIENCE_S=-1"]))
        try:
            assert 0 != machine.run("systemctl", "start", UNIT).returncode
            machine.wait_until(UNIT, "failed")
            assert "0" == machine.show(UNIT, "NRestarts")
            assert "SIDESTEP_ORDER_PATIENCE_S" in machine.journal(UNIT)
        finally:
            (machine.tree / "etc/sidestep/train.env").write_text(lines(QUICK))
            machine.ask("systemctl", "reset-failed", UNIT)

    def test_is_replaced_by_another_version_under_a_training(self, unit):
        """As in an upgrade: the restart waits for its worker until its grace is over, and goes on with it."""
        (unit.tree / "etc/sidestep/train.env").write_text(lines([*QUICK, "GRACE_S=2"]))
        unit.do("systemctl", "restart", UNIT)
        training = Trained(unit, "upgraded")
        training.reaches(30)
        before = unit.main_pid(UNIT)

        unit.do(*WHERE, "/opt/sidestep/bin/pip", "install", "--force-reinstall", "--no-deps", "sidestep[daemon]")
        unit.do("systemctl", "restart", UNIT)

        assert before != unit.main_pid(UNIT)
        training.reaches(100)
        training.is_whole(training.ends())

    def test_offline_run_is_sent_later_by_the_daemons_user(self, unit):
        training = Trained(unit, "later")
        training.reaches(10)
        steps = training.ends()
        training.is_whole(steps)
        port = serve_wandb(unit)
        run_dir = f"/var/lib/sidestep/train/sidestep-runs/{run_dir_in(training.state(), 'later').name}"

        unit.do(
            "runuser", "-u", "sidestep", "--", "env", "HOME=/var/lib/sidestep/train", f"WANDB_API_KEY={KEY}",
            "/opt/sidestep/bin/sidestep", "sync", "--server", f"http://127.0.0.1:{port}", "--entity", "me",
            run_dir,
        )  # fmt: skip

        assert list(range(steps)) == [row["global_step"] for row in rows_on_server(unit, "later")]
        assert "" == unit.do("find", run_dir, "-not", "-user", "sidestep")


class TestAUserOfTheirOwn:
    def test_has_a_daemon_without_root(self, machine):
        """What deploy/README.md says to type; killed meanwhile."""
        machine.do("loginctl", "enable-linger", "alice")
        uid = machine.do("id", "-u", "alice").strip()
        runtime = f"/run/user/{uid}"
        session = [*WHERE, f"XDG_RUNTIME_DIR={runtime}"]
        ctl = [*session, "systemctl", "--user"]
        eventually(lambda: machine.run("test", "-S", f"{runtime}/bus").returncode == 0, WAIT_S)
        (machine.tree / "home/alice/.config/sidestep").mkdir(parents=True)
        (machine.tree / "home/alice/.config/sidestep/train.env").write_text(lines(QUICK))
        machine.do("chown", "-R", "alice:", "/home/alice")

        machine.do(*session, "sh", "-e", "/home/alice/typed", user="alice", limit_s=INSTALL_S)

        state = machine.tree / "home/alice/.local/state/sidestep/train"
        training = Trained(machine, "own", address=f"ipc://{runtime}/sidestep-train/daemon.sock", state=state)
        training.reaches(30)
        pid = int(machine.do(*ctl, "show", "--value", "--property=MainPID", "sidestep@train", user="alice"))
        machine.process(pid).kill()
        training.reaches(100)
        training.is_whole(training.ends())
        restarts = machine.do(*ctl, "show", "--value", "--property=NRestarts", "sidestep@train", user="alice")
        assert "1" == restarts.strip()
        assert "700" == machine.do("stat", "--format=%a", f"{runtime}/sidestep-train").strip()
        machine.do(*ctl, "stop", "sidestep@train", user="alice")


class TestANodeOfSlurm:
    """deploy/slurm beside the service of the node: what a job's tasks are told, and what its end takes care of."""

    def hook(self, machine: Machine, script: str, *environ: str, user: str) -> str:
        return machine.do("env", *environ, f"/srv/ours/deploy/slurm/{script}", user=user)

    def test_leads_the_tasks_of_a_job_to_it(self, unit):
        said = self.hook(unit, "task_prolog.sh", "SLURM_JOB_ID=76", "SLURM_JOB_NUM_NODES=1", user="alice")
        told = dict(line.removeprefix("export ").split("=", 1) for line in said.splitlines())

        assert {"SIDESTEP_ADDRESS": SOCKET, "SIDESTEP_RUN_ID": "slurm-76"} == told
        training = Trained(unit, "slurm-76", address=told["SIDESTEP_ADDRESS"])
        training.is_whole(training.ends())
        array = ("SLURM_JOB_ID=79", "SLURM_ARRAY_JOB_ID=78", "SLURM_ARRAY_TASK_ID=1")
        assert "SIDESTEP_RUN_ID=slurm-78_1\n" in self.hook(unit, "task_prolog.sh", *array, user="alice")
        assert "" == self.hook(unit, "task_prolog.sh", "SLURM_JOB_ID=77", "SIDESTEP_ADDRESS=x", user="alice")
        assert "" == self.hook(unit, "task_prolog.sh", "SLURM_JOB_ID=77", "SLURM_JOB_NUM_NODES=2", user="alice")
        assert "" == self.hook(unit, "task_prolog.sh", "SLURM_JOB_ID=77", user="bob")  # who may not log there

    def test_has_what_its_jobs_kept_collected_at_their_end(self, unit):
        """The service was away while the job ran."""
        unit.do("systemctl", "stop", UNIT)
        logs = (
            "run = sidestep.init(id='slurm-77', project='deployed')\nfor i in range(50): run.log({'a': 1}, step=i)"
        )
        words = ["env", f"SIDESTEP_ADDRESS={SOCKET}", "/opt/train/bin/python", "-c"]
        for job in (logs, logs.replace("77", "99")):  # which somebody else's epilog is for
            unit.do(*words, f"import sidestep\n{job}\nrun.finish(timeout=1)", user="alice")
        kept = unit.ask("find", "/tmp", "-name", "*.spill").split()
        assert 2 == len(kept)
        unit.do("systemctl", "start", UNIT)

        self.hook(unit, "epilog.sh", "SLURM_JOB_ID=77", "SLURM_JOB_USER=alice", user="root")

        state = unit.tree / "var/lib/sidestep/train"
        eventually(lambda: is_finished(state, "slurm-77"), WAIT_S, lambda: unit.journal(UNIT)[-3000:])
        assert_whole(state, "slurm-77", 50)
        left = unit.ask("find", "/tmp", "-name", "*.spill").split()
        assert 1 == len(left)
        assert "slurm-99" not in runs_in(state)
        unit.do("rm", *left)
