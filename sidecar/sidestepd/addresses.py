"""Where a daemon listens beside its socket on this node, and what it tells others of that.

- tcp that other nodes reach needs keys and a list of clients: without them nothing there would ask who is speaking
- a port of 0 is any free one; an intake that is started again takes the same, unless somebody has it by then
- the context file leads to the daemon from this node and from others; it is replaced by rename and holds no secret
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestep.endpoint import KeyFile
from sidestep.errors import SettingsError
from sidestep.head import tcp_address
from sidestepd.clients import read_clients
from sidestepd.hosts import host_and_port
from sidestepd.processes import read_json, write_json

if TYPE_CHECKING:
    from sidestepd.config import Config

CONTEXT = "context.json"
"""In the directory that is served from: what a context file says, where other nodes are let in."""
BOUND = "bound.json"
"""Which addresses those of the options became."""
_EVERYWHERE = ("*", "0.0.0.0", "::")


def check(config: Config) -> None:
    """Raise SettingsError unless the keys and the list that the options name can be used."""
    options = config.listen
    try:
        if options.tcp and options.key_file is not None:
            KeyFile.read(options.key_file)
        if options.tcp and options.clients is not None:
            read_clients(options.clients)
    except SettingsError as error:
        name = "key_file" if str(error).startswith(str(options.key_file)) else "clients"
        raise SettingsError(f"listen.{name} (from {config.source(f'listen.{name}')}): {error}") from None


def remembered(directory: Path, address: str) -> str:
    """The address that a port of 0 became when this directory was served before."""
    return str(read_json(directory / BOUND).get(address, address)) if address.endswith(":0") else address


def remember(directory: Path, bound: Mapping[str, str]) -> None:
    """Write that down."""
    write_json(directory / BOUND, bound)


def remote_of(bound: str, advertise: str | None) -> str:
    """The address by which other nodes reach what is bound."""
    host, port = host_and_port(bound)
    return tcp_address(advertise or (os.uname().nodename if host in _EVERYWHERE else host), port)


def context_of(address: str, remote: str | None, server_key: str | None, run: Mapping[str, Any]) -> dict[str, str]:
    """What leads a process to a daemon, and to its one run if it has one."""
    elsewhere = {"node": os.uname().nodename, "remote": remote, "server_key": server_key} if remote else {}
    told = {"address": address, **elsewhere, "run_id": run.get("id"), "run_dir": run.get("dir")}
    return {name: str(value) for name, value in told.items() if value}


def write_context(path: Path, context: Mapping[str, str]) -> None:
    """Replace a context file. Raises SettingsError."""
    try:
        write_json(path, context)
    except OSError as error:
        raise SettingsError(f"{path}: can not be written: {error.strerror}") from None
