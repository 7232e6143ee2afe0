"""What an address on tcp says."""

from __future__ import annotations

import ipaddress


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of `tcp://host:port`, an IPv6 host without its brackets; raises ValueError for anything else."""
    kind, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if kind != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address}: say tcp://HOST:PORT, such as tcp://*:7711")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
