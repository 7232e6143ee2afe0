"""On which node the daemon of a job with several nodes is, as far as its launcher says.

By agreement that is the node of rank 0: `MASTER_ADDR` names it, or the first host of SLURM's list, or the first
pod of an indexed job behind a headless service.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_FIRST = re.compile(r"((?:[^,\[]|\[\d[^\]]*\])+)(?:,|$)")
_NUMBERS = re.compile(r"\[(\d+)[^\]]*\]")
_LOCAL = ("localhost", "127.0.0.1", "::1")
HOSTS = Path("/etc/hosts")


def head_of(environ: Mapping[str, str], node: str, *, hosts: Path = HOSTS) -> str | None:
    """The host of node 0, or None if nobody says. `node` is what this machine, or pod, calls itself."""
    if (master := environ.get("MASTER_ADDR", "").strip()) and master not in _LOCAL:
        return master
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if first := first_host(environ.get(name, "")):
            return first
    index = environ.get("JOB_COMPLETION_INDEX", "").strip()
    if index.isdecimal() and node.partition(".")[0].endswith(f"-{index}"):
        host, dot, domain = full_name(node, hosts).partition(".")
        return f"{host.removesuffix(index)}0{dot}{domain}"
    return None


def full_name(node: str, hosts: Path = HOSTS) -> str:
    """A name with its domain, by this machine's own list of hosts; no name server is asked.

    A pod calls itself by the first part. Its service has the whole name, which Kubernetes writes into that list.
    """
    if "." in node:
        return node
    try:
        names = hosts.read_text(errors="replace").split()
    except OSError:
        return node
    return next((name for name in names if name.startswith(f"{node}.")), node)


def first_host(hosts: str) -> str | None:
    """The first of SLURM's list: `gpu[07-09,12],login` begins with gpu07, and `r[1-2]n[0-3]` with r1n0."""
    found = _FIRST.match(hosts.strip())
    return _NUMBERS.sub(r"\1", found[1]) if found else None


def tcp_address(host: str, port: int) -> str:
    """An address of ZeroMQ's; IPv6 goes into brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"tcp://{host}:{port}"
