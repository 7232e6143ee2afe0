"""The units of deploy/systemd, in a Debian that systemd booted: installed from the wheel, used, and mistreated.

Workers are processes of another user than the daemon, in an environment without the daemon's extra. Runs go to
real wandb under the unit's sandbox, and are read back from its files.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sidestepd import status
from tests.support.daemons import freeze
from tests.support.machines import Machine
from tests.support.memory import bounded, group_of
from tests.support.waiting import eventually
from tests.support.workshop import (
    DEPLOY,
    ROOT,
    TRAIN,
    Workshop,
    assert_whole,
    do,
    is_finished,
    lines,
    need,
    rows_in,
    run_dir_in,
    runs_in,
    steps_in,
    unpack,
)

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]

WAIT_S = 120.0
UNIT = "sidestep@train"
SOCKET = "ipc:///run/sidestep/train/daemon.sock"
QUICK = (
    "SIDESTEP_SERVE_LINGER_S=1", "SIDESTEP_DELIVERY_CONFIRM_INTERVAL_S=0.2", "SIDESTEP_ORDER_PATIENCE_S=1",
    "SIDESTEP_SAMPLERS_INTERVAL_S=0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def tree(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Debian with sidestep installed as deploy/README.md says, and three people."""
    need("systemd-nspawn", "nsenter", root=True)
    tree = unpack(workshop.debian, tmp_path_factory.mktemp("machine") / "tree")
    install = lines(
        [
            "set -e",
            "python3 -m venv /opt/sidestep",
            "/opt/sidestep/bin/pip -q install --no-index --find-links /wheels 'sidestep[daemon]'",
            "python3 -m venv /opt/train",
            "/opt/train/bin/pip -q install --no-index --find-links /wheels sidestep",
            "cp /deploy/systemd/sidestep@.service /etc/systemd/system/",
            "cp /deploy/systemd/sidestep.sysusers /usr/lib/sysusers.d/sidestep.conf",
            "cp /deploy/systemd/sidestep.tmpfiles /usr/lib/tmpfiles.d/sidestep.conf",
            "systemd-sysusers",
            "systemd-tmpfiles --create sidestep.conf",
            "for name in alice bob; do useradd --create-home --shell /bin/bash $name; done",
            "usermod --append --groups sidestep alice",
            "mkdir -p /etc/systemd/user",
            "cp /deploy/systemd/user/sidestep@.service /etc/systemd/user/",
            "install -D -o alice -g alice /dev/null /home/alice/.local/bin/.keep",
            "ln -s /opt/sidestep/bin/sidestep /home/alice/.local/bin/sidestep",
            "chown -R alice: /home/alice",
        ]
    )
    (tree / "root/install").write_text(install)
    (tree / "root/train.py").write_text(TRAIN)
    do("systemd-nspawn", "-q", f"--directory={tree}", f"--bind-ro={workshop.wheels}:/wheels",
       f"--bind-ro={DEPLOY}:/deploy", "--register=no", "--keep-unit", "--", "sh", "/root/install")  # fmt: skip
    (tree / "opt/train/train.py").write_text(TRAIN)
    (tree / "etc/sidestep/train.env").write_text(lines(QUICK))
    return tree


@pytest.fixture(scope="module")
def disk(tree: Path) -> Iterator[Path]:
    """A small file system of its own, for the state of the instance `frozen`."""
    need("fsfreeze", "mkfs.ext4")
    image, place = tree.parent / "disk", tree / "var/lib/sidestep/frozen"
    place.mkdir()
    do("truncate", "--size=512M", image)
    do("mkfs.ext4", "-q", image)
    do("mount", "-o", "loop", image, place)
    yield place
    do("umount", "--lazy", place)


@pytest.fixture(scope="module")
def machine(tree: Path, disk: Path) -> Iterator[Machine]:
    with Machine(tree, "sidestep-systemd", {ROOT: "/sidestep"}) as machine:
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


class Trained:
    """A training of a real worker, that goes on until it is told."""

    def __init__(
        self, machine: Machine, id_: str, *, user: str = "alice", address: str = SOCKET, instance: str = "train"
    ) -> None:
        self.machine, self.id, self._instance = machine, id_, instance
        self._until = machine.tree / f"srv/until-{id_}"
        words = ["env", f"SIDESTEP_ADDRESS={address}", "/opt/train/bin/python", "/opt/train/train.py"]
        self.process = machine.start(*words, f"/srv/until-{id_}", id_, "30", user=user)

    def state(self) -> Path:
        return self.machine.tree / "var/lib/sidestep" / self._instance

    def reaches(self, rows: int) -> None:
        """Wait until so many rows are in the run for good."""

        def held() -> bool:
            assert self.process.poll() is None, self.process.communicate()
            return rows_in(self.state(), self.id) >= rows

        eventually(held, WAIT_S, lambda: self.machine.journal(UNIT)[-3000:])

    def ends(self) -> int:
        """Tell it to; how many steps it logged."""
        self._until.touch()
        told, said = self.process.communicate(timeout=WAIT_S)
        assert self.process.returncode == 0, said
        return int(told)

    def is_whole(self, steps: int) -> status.Report:
        """Once its run is finished."""
        eventually(
            lambda: is_finished(self.state(), self.id),
            WAIT_S,
            lambda: f"{self.id} is not finished:\n{self.machine.journal(UNIT)[-3000:]}",
        )
        return assert_whole(self.state(), self.id, steps)


@contextmanager
def with_drop_in(machine: Machine, *settings: str, unit: str = UNIT) -> Iterator[None]:
    """The unit with further settings, restarted with them."""
    folder = machine.tree / f"etc/systemd/system/{unit}.service.d"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.conf").write_text(lines(["[Service]", *settings]))
    machine.do("systemctl", "daemon-reload")
    machine.do("systemctl", "restart", unit)
    try:
        yield
    finally:
        (folder / "test.conf").unlink()
        machine.ask("systemctl", "daemon-reload")


class TestTheUnit:
    def test_is_verified_without_a_word_and_exposes_little(self, machine):
        path = "/etc/systemd/system/sidestep@.service"
        assert "" == machine.do("sh", "-c", f"systemd-analyze verify {path} 2>&1")
        assert "" == machine.do(
            "sh", "-c", "systemd-analyze --man=no verify /etc/systemd/system/sidestep@a.service 2>&1 || true"
        )

        judged = machine.do("systemd-analyze", "security", "--offline=true", "--threshold=20", path)

        print(judged.splitlines()[-1])
        assert "Overall exposure level" in judged.splitlines()[-1]

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
        training.reaches(150)
        steps = training.ends()

        training.is_whole(steps)
        rows = list(training.state().glob("sidestep-runs/*-sampled/logs/samplers.log"))
        assert all("Traceback" not in log.read_text() for log in rows)
        assert steps_in(run_dir_in(training.state(), "sampled"))[-1] == steps - 1


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
            (machine.tree / "etc/sidestep/train.key").unlink()

    def test_a_run_goes_online_with_the_key_that_systemd_hands_over(self, machine):
        """The key is in no environment but those of delivery and wandb-core, and in no file of the run."""
        key = "k" * 40
        words = ["env", "PYTHONPATH=/sidestep", "/opt/sidestep/bin/python", "-m", "tests.support.wandb_server"]
        machine.do("mkdir", "-p", "/srv/wandb")
        machine.start(*words, "/srv/wandb", "--key", key, "--entities", "me")
        port = eventually(lambda: _text(machine.tree / "srv/wandb/port"), WAIT_S, "no server")
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
            found = subprocess.run(
                ["grep", "-rl", key, str(run_dir_in(training.state(), "online"))], capture_output=True
            )
            assert b"" == found.stdout
        finally:
            machine.ask("systemctl", "stop", UNIT)
            (machine.tree / "etc/sidestep/train.key").unlink()
            (machine.tree / "etc/sidestep/train.env").write_text(lines(QUICK))


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


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
            training = Trained(machine, "iced", address=address, instance="frozen")
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


class TestAUserOfTheirOwn:
    def test_has_a_daemon_without_root(self, machine):
        machine.do("loginctl", "enable-linger", "alice")
        uid = machine.do("id", "-u", "alice").strip()
        runtime = f"/run/user/{uid}"
        ctl = ["env", f"XDG_RUNTIME_DIR={runtime}", "systemctl", "--user"]
        eventually(
            lambda: machine.tree.exists() and machine.run("test", "-S", f"{runtime}/bus").returncode == 0, WAIT_S
        )
        (machine.tree / "home/alice/.config/sidestep").mkdir(parents=True)
        (machine.tree / "home/alice/.config/sidestep/mine.env").write_text(lines(QUICK))
        machine.do("chown", "-R", "alice:", "/home/alice/.config")

        machine.do(*ctl, "start", "sidestep@mine", user="alice")

        training = Trained(machine, "own", address=f"ipc://{runtime}/sidestep-mine/daemon.sock")
        steps = training.ends()
        state = machine.tree / "home/alice/.local/state/sidestep/mine"
        eventually(lambda: is_finished(state, "own"), WAIT_S)
        machine.do(*ctl, "stop", "sidestep@mine", user="alice")
        assert_whole(state, "own", steps)
