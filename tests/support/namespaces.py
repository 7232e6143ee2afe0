"""Several nodes on one machine: network namespaces on a bridge, each with its own host name, and links to cut.

Needs root, `ip` and `unshare`, and `iptables` for cuts. Everything is named by our pid, and goes with it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.support.workshop import not_here

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("ip", "unshare")
_SHELL_BEGINS = (
    "#!/bin/sh",
    'while [ "${1#-}" != "$1" ]; do shift; done',  # its options
    "host=$1; shift; case $host in",
)
CUTS = ("link", "drop", "route")
"""A cable that is pulled, a firewall that drops, a route that leads nowhere."""


def missing(*, cuts: bool = True) -> str:
    """Why this can not be done here, and which packages it takes; "" if it can. Without `cuts` no link is cut."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [name for name in (*NEEDED, *(["iptables"] if cuts else [])) if shutil.which(name) is None]
    return not_here(lacking) if lacking else ""


class Network:
    """`nodes` hosts, `node0` and so on, at 10.77.0.1 and so on; `host` and `domain` are what they are called."""

    def __init__(self, base: Path, nodes: int, *, host: str = "node{}", domain: str = "") -> None:
        self._base, self._count, self._host, self._domain = base, nodes, host, domain
        self._prefix = f"ss{os.getpid()}"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._unmake()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        self._unmake()

    def _make(self) -> None:
        hub = f"{self._prefix}hub"
        _ip("netns", "add", hub)
        _in(hub, "ip", "link", "add", "br0", "type", "bridge")
        _in(hub, "ip", "link", "set", "br0", "up")
        hosts = ["127.0.0.1 localhost"]
        for number in range(self._count):
            name = self._name(number)
            _ip("netns", "add", name)
            _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"n{number}", "netns", hub)
            _in(hub, "ip", "link", "set", f"n{number}", "master", "br0", "up")
            _in(name, "ip", "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _in(name, "ip", "link", "set", device, "up")
            full = f"{self.host(number)}.{self._domain} " if self._domain else ""
            hosts.append(f"{self.address(number)} {full}{self.host(number)}")
        (self._base / "hosts").write_text("\n".join(hosts) + "\n")

    def _unmake(self) -> None:
        for name in (*map(self._name, range(self._count)), f"{self._prefix}hub"):
            for pid in _run("ip", "netns", "pids", name, check=False).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)  # what outlived its parent, in a namespace of ours
            _run("ip", "netns", "del", name, check=False)

    def _name(self, number: int) -> str:
        return f"{self._prefix}n{number}"

    def host(self, number: int) -> str:
        """What a node calls itself."""
        return self._host.format(number)

    def address(self, number: int) -> str:
        """Of a node."""
        return f"10.77.0.{number + 1}"

    def start(
        self, number: int, words: Sequence[str], environ: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """A command on a node; what it says is in `nodeN.log`."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("SIDESTEP_", "WANDB_", "XDG_"))}
        own = {"TMPDIR": str(self._tmp(number)), "SIDESTEP_PROGRAM": "0", "SIDESTEP_CONSOLE": "0"}
        own |= {"PYTHONUNBUFFERED": "1"}
        with (self._base / f"node{number}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self._inside(number), *words],
                env=plain | own | dict(environ or {}),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _inside(self, number: int) -> list[str]:
        """What comes before a command so that it runs on a node."""
        enter = ["ip", "netns", "exec", self._name(number), "unshare", "--uts", "--mount", "sh", "-c"]
        return [
            *enter,
            f'hostname {self.host(number)} && mount --bind {self._base}/hosts /etc/hosts && exec "$@"',
            "sh",
        ]

    def remote_shell(self) -> Path:
        """A program that is called as `ssh` is, and runs a command on another node: launchers take it for that."""
        cases = [
            f'node{one}) export TMPDIR={self._tmp(one)}; exec {shlex.join(self._inside(one))} sh -c "$*";;'
            for one in range(self._count)
        ]
        path = self._base / "remote-shell"
        path.write_text("\n".join([*_SHELL_BEGINS, *cases, "esac", "exit 255", ""]))
        path.chmod(0o755)
        return path

    def _tmp(self, number: int) -> Path:
        """A directory that is a node's own."""
        folder = self._base / f"tmp{number}"
        folder.mkdir(exist_ok=True)
        return folder

    def cut(self, number: int, how: str) -> None:
        """Nothing passes between a node and all others."""
        match how:
            case "link":
                _in(f"{self._prefix}hub", "ip", "link", "set", f"n{number}", "down")
            case "drop":
                for chain in ("INPUT", "OUTPUT"):
                    way = "-i" if chain == "INPUT" else "-o"
                    _in(self._name(number), "iptables", "-w", "-A", chain, way, "eth0", "-j", "DROP")
            case "route":
                for other in range(self._count):
                    if other != number:
                        _in(self._name(number), "ip", "route", "add", "blackhole", self.address(other))

    def cut_port(self, number: int, other: int, port: int) -> None:
        """Nothing passes between a node and one port of another; all else does. It is healed as `drop`."""
        tcp = ("-p", "tcp", "-j", "DROP")
        to = ("OUTPUT", "-d", self.address(other), *tcp, "--dport", str(port))
        answers = ("INPUT", "-s", self.address(other), *tcp, "--sport", str(port))
        for rule in (to, answers):
            _in(self._name(number), "iptables", "-w", "-A", *rule)

    def heal(self, number: int, how: str) -> None:
        """All passes again."""
        match how:
            case "link":
                _in(f"{self._prefix}hub", "ip", "link", "set", f"n{number}", "up")
            case "drop":
                _in(self._name(number), "iptables", "-w", "-F")
            case "route":
                for other in range(self._count):
                    if other != number:
                        _in(self._name(number), "ip", "route", "del", "blackhole", self.address(other))

    def uplink(self, number: int) -> str:
        """Join a node to this machine's own network, as to the internet; the address of that, from there."""
        _ip(
            "link", "add", f"{self._prefix}up", "type", "veth", "peer", "name", "eth1", "netns", self._name(number)
        )
        _ip("addr", "add", "10.78.0.1/24", "dev", f"{self._prefix}up")
        _ip("link", "set", f"{self._prefix}up", "up")
        _in(self._name(number), "ip", "addr", "add", "10.78.0.2/24", "dev", "eth1")
        _in(self._name(number), "ip", "link", "set", "eth1", "up")
        return "10.78.0.1"

    def find(self, number: int, what: str) -> psutil.Process | None:
        """A process on a node, by a word of its command."""
        for pid in _run("ip", "netns", "pids", self._name(number), check=False).split():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(int(pid))
                if what in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    return process
        return None

    def reaches(self, number: int, host: str, port: int) -> bool:
        """Whether a connection from a node comes about within two seconds."""
        code = f"import socket; socket.create_connection(({host!r}, {port}), 2)"
        return self.start(number, [sys.executable, "-c", code]).wait(30) == 0

    def log(self) -> str:
        """The end of what all nodes said."""
        logs = sorted(self._base.glob("node*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)


def _in(namespace: str, *words: str) -> None:
    _run("ip", "netns", "exec", namespace, *words)


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout
