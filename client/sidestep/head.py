"""On which node the daemon of a job with several nodes is, as far as its launcher says.

By agreement that is the node of rank 0: `MASTER_ADDR` names it, or the first host of SLURM's list, or the first
pod of an indexed job behind a headless service.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_GROUP = re.compile(r"([^,\[]*)(?:\[([^\]]*)\])?([^,]*)")
_LOCAL = ("localhost", "127.0.0.1", "::1")


def head_of(environ: Mapping[str, str], node: str) -> str | None:
    """The host of node 0, or None if nobody says. `node` is this one's name, with its domain where it has one."""
    if (master := environ.get("MASTER_ADDR", "").strip()) and master not in _LOCAL:
        return master
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if first := first_host(environ.get(name, "")):
            return first
    index = environ.get("JOB_COMPLETION_INDEX", "").strip()
    host, dot, domain = node.partition(".")
    if index.isdecimal() and host.endswith(f"-{index}"):
        return f"{host.removesuffix(index)}0{dot}{domain}"
    return None


def first_host(hosts: str) -> str | None:
    """The first of SLURM's list: `gpu[07-09,12],login` begins with gpu07. None if there is none."""
    found = _GROUP.match(hosts.strip())
    prefix, numbers, suffix = found.groups() if found else ("", None, "")
    if numbers is None:
        return prefix or None
    first = numbers.split(",")[0].split("-")[0]
    return f"{prefix}{first}{suffix}" if first.isdecimal() else None


def tcp_address(host: str, port: int) -> str:
    """An address of ZeroMQ's; IPv6 goes into brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"tcp://{host}:{port}"
