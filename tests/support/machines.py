"""A real Debian, booted: systemd is its first process, in a container of its own (systemd-nspawn).

    with Machine(tree, "daemon", {wheels: "/wheels"}) as machine:
        machine.do("systemctl", "start", "sidestep@train")

What is run in it is a process in all of its namespaces, and is seen from here by its files under `tree`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.support.cgroups import OwnGroup
from tests.support.waiting import eventually
from tests.support.workshop import do

BOOT_S = 120.0
WAIT_S = 120.0


class Machine:
    """One boot of the system that lies in `tree`; `shared` maps directories here to places there, to read only.

    `home` is a directory here that is its /home.
    """

    def __init__(
        self, tree: Path, name: str, shared: Mapping[Path, str] | None = None, *, home: Path | None = None
    ) -> None:
        self.tree, self.name, self.home = tree, name, home or tree / "home"
        self._shared = dict(shared or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._clients: list[subprocess.Popen[str]] = []
        self._group = OwnGroup(name)

    def __enter__(self) -> Self:
        binds = [f"--bind-ro={here}:{there}" for here, there in self._shared.items()]
        binds += [] if self.home == self.tree / "home" else [f"--bind={self.home}:/home"]
        self._group.make()
        self._process = subprocess.Popen(
            [
                *self._group.inside(),
                *("systemd-nspawn", "--quiet", "--boot", f"--directory={self.tree}", f"--machine={self.name}"),
                *("--private-network", "--register=no", "--keep-unit", "--console=pipe", *binds),
            ],
            stdin=subprocess.DEVNULL,
            stdout=(self.tree.parent / f"{self.name}.console").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._init = eventually(self._find_init, BOOT_S, self._console)
        eventually(self._is_up, BOOT_S, lambda: f"{self.ask('systemctl', '--failed')}\n{self._console()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGRTMIN + 4)  # systemd's own word for powering off
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init, signal.SIGKILL)  # and with it everything in there
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:  # something in there waits for a disk
                self._process.kill()
                self._process.wait(30)
        for client in self._clients:  # whose pipes are closed only now
            client.kill()
            client.communicate()
        self._group.remove()

    def reboot(self) -> None:
        """Power off, and on again: every process there ends, and what is enabled begins."""
        self.__exit__(None, None, None)
        self._clients = []
        self.__enter__()

    def _find_init(self) -> int:
        assert self._process is not None
        assert self._process.poll() is None, self._console()
        inits = [
            child.pid for child in psutil.Process(self._process.pid).children(recursive=True)
            if child.name() == "systemd" and _pid_inside(child.pid) == 1
        ]  # fmt: skip
        return inits[0] if inits else 0

    def _is_up(self) -> bool:
        return self.ask("systemctl", "is-system-running").strip() in ("running", "degraded")

    def _console(self) -> str:
        return (self.tree.parent / f"{self.name}.console").read_text(errors="replace")[-4000:]

    # Commands in it

    def words(self, *words: str, user: str = "root") -> list[str]:
        """A command of this machine that runs `words` in that one."""
        enter = ["nsenter", "--target", str(self._init), "-m", "-u", "-i", "-n", "-p", "-C", "--"]
        home = "/root" if user == "root" else f"/home/{user}"
        environ = [
            "env",
            "-i",
            "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            f"HOME={home}",
            "LANG=C.UTF-8",
        ]
        return [*enter, *environ, *([] if user == "root" else ["setpriv", *_identity(self.tree, user)]), *words]

    def connect(self, other: Machine, ours: str, theirs: str) -> None:
        """A cable between two machines, and an address for each, such as 192.0.2.1/24."""
        both = ((self, ours), (other, theirs))
        ends = [("netns", str(machine._init)) for machine, _ in both]
        do("ip", "link", "add", "cable", *ends[0], "type", "veth", "peer", "name", "cable", *ends[1])
        for machine, address in both:
            inside = ("nsenter", "--target", str(machine._init), "-n", "--", "ip")
            do(*inside, "address", "add", address, "dev", "cable")
            do(*inside, "link", "set", "cable", "up")

    def run(self, *words: str, user: str = "root", limit_s: float = WAIT_S) -> subprocess.CompletedProcess[str]:
        """What it said, and how it ended."""
        return subprocess.run(
            self.words(*words, user=user),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s,
        )  # fmt: skip

    def ask(self, *words: str, user: str = "root") -> str:
        """Its output, however it ended."""
        return self.run(*words, user=user).stdout

    def do(self, *words: str, user: str = "root", limit_s: float = WAIT_S) -> str:
        """Its output; it must succeed."""
        done = self.run(*words, user=user, limit_s=limit_s)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, *words: str, user: str = "root") -> subprocess.Popen[str]:
        """A command that goes on; killed at the end at the latest."""
        process = subprocess.Popen(
            self.words(*words, user=user),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._clients.append(process)
        return process

    # Its services

    def show(self, unit: str, what: str) -> str:
        """A property of a unit."""
        return self.ask("systemctl", "show", "--value", "--property", what, unit).strip()

    def main_pid(self, unit: str) -> int:
        """The pid there of a unit's main process."""
        return int(self.show(unit, "MainPID"))

    def find(self, module: str) -> psutil.Process:
        """The process here that runs a module of ours there."""

        def found() -> psutil.Process | None:
            for child in psutil.Process(self._init).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if module in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                        return child
            return None

        return eventually(found, WAIT_S, f"no {module} in {self.name}")

    def process(self, pid: int) -> psutil.Process:
        """The process here that has this pid there."""
        for child in psutil.Process(self._init).children(recursive=True):
            if _pid_inside(child.pid) == pid:
                return child
        raise AssertionError(f"no process {pid} in {self.name}")

    def journal(self, unit: str) -> str:
        """What is written of a unit, by it and by systemd."""
        return self.ask("journalctl", "--no-pager", "--output=cat", f"--unit={unit}")

    def wait_until(self, unit: str, state: str) -> None:
        """Until it is `active`, `inactive` or `failed`."""
        eventually(
            lambda: self.show(unit, "ActiveState") == state,
            WAIT_S,
            lambda: (
                f"{unit} is not {state}:\n{self.ask('systemctl', 'status', unit)}\n{self.journal(unit)[-3000:]}"
            ),
        )


def _pid_inside(pid: int) -> int:
    """The number that a process has in the innermost namespace it is in."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[-1]) for line in status.splitlines() if line.startswith("NSpid:"))


def _identity(tree: Path, user: str) -> list[str]:
    """As a login would give it: the user's own group, and those that it is a member of."""
    fields = [line.split(":") for line in (tree / "etc/passwd").read_text().splitlines()]
    uid, gid = next((field[2], field[3]) for field in fields if field[0] == user)
    groups = [line.split(":") for line in (tree / "etc/group").read_text().splitlines()]
    more = [group[2] for group in groups if user in group[3].split(",")]
    return [f"--reuid={uid}", f"--regid={gid}", f"--groups={','.join([gid, *more])}"]
