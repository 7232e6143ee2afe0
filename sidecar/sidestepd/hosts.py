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


def check_upper(address: str) -> None:
    """Raise ValueError for what no daemon can be found at: `tcp://host:port` and `ipc:///path` are."""
    kind, _, rest = address.partition("://")
    if kind == "ipc" and rest.startswith("/"):
        return
    try:
        host, port = host_and_port(address)
    except ValueError:
        raise ValueError("say tcp://HOST:PORT or ipc:///PATH") from None
    if not port or not host.isascii() or any(sign in host for sign in "* /"):
        raise ValueError("say tcp://HOST:PORT, by a host's name in ASCII or its address, and a port")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
