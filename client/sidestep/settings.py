"""A worker's options, and the keywords that wandb takes.

- options come from the environment, where `sidestep run` puts them, or from the file it wrote for who joins later
- a bad value names itself, its source and what it should be; the default is used, since a training must not
  die of it, unless `strict`
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sidestep.endpoint import DEFAULT_PORT
from sidestep.errors import SettingsError
from sidestep.lane import DEFAULT_BYTES as BLOB_BYTES
from sidestep.lane import FILE_BYTES_PER_S
from sidestep.notices import say
from sidestep.outbox import DEFAULT_BYTES
from sidestep.spill import DEFAULT_BYTES as SPILL_BYTES
from sidestep.wire import MAX_RECORD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How a worker finds its daemon, and how much it may keep for it."""

    address: str | None = None
    """Where the daemon listens: `ipc:///...` or `tcp://host:port`."""
    key_file: str | None = None
    """This worker's key pair, for a daemon that listens on tcp; `sidestep keygen` makes it."""
    server_key: str | None = None
    """The daemon's public key, where neither the key file nor the context file names it."""
    context: str | None = None
    """A file that tells where the daemon and its run are. It may be written, or replaced, later."""
    port: int = DEFAULT_PORT
    """Of the daemon on the node that the launcher calls the first, where nothing else says where it is."""
    run_id: str | None = None
    """The run that the surrounding command is."""
    run_dir: str | None = None
    """That run's directory."""
    mode: str | None = None
    """`disabled` makes every call a no-op; the other modes are the daemon's business."""
    strict: bool = False
    """Raise where a training run would warn and count. For tests."""
    outbox_bytes: int = DEFAULT_BYTES
    """Records kept in memory until the daemon has them on its disk."""
    when_full: str = "spill"
    """When the daemon is away for longer than that lasts: `spill` to a file on disk, or `drop` and count."""
    spill_bytes: int = SPILL_BYTES
    """What the file may hold, for each process."""
    blob_bytes: int = BLOB_BYTES
    """Bytes of media kept in memory until they are under way; what finds no room is left out."""
    file_bytes_per_s: int = FILE_BYTES_PER_S
    """So fast are files sent at most, by a process beside this one."""
    flush_interval_s: float | None = None
    """How long records wait for company before they are sent; the daemon's wish where it is not set."""
    autostart: bool = True
    """Where no address is known and all processes are on this node, the first of them starts a daemon."""
    console: bool = True
    """What the program prints is in the run's log too."""
    program: bool = True
    """What the program is (arguments, git commit, packages, machine) is told by rank 0."""
    launch_id: str | None = None
    """What the processes that were started together have in common, where torchrun does not say."""

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str], *, strict: bool | None = None, warn: Callable[[str], None] = say
    ) -> WorkerSettings:
        """Read SIDESTEP_ADDRESS and so on; `strict` raises SettingsError for the first bad value."""
        values: dict[str, Any] = {} if strict is None else {"strict": strict}
        for field in sorted(fields(cls), key=lambda field: field.name != "strict"):
            variable = f"SIDESTEP_{field.name.upper()}"
            raw = environ.get(variable, "").strip()
            if not raw or field.name in values:
                continue
            try:
                values[field.name] = _PARSE.get(field.name, str)(raw)
            except ValueError as error:
                message = f"{field.name} = {raw:.80} (from {variable}): {error}"
                if values.get("strict"):
                    raise SettingsError(message) from None
                warn(f"{message}; using {field.default!r}")
        if values.get("context") and not _leads_to(Path(values["context"]), values.get("address")):
            del values["context"]
        if values.get("context"):
            values.pop("address", None)
            values = {**_context(Path(values["context"]), values.get("strict", False), warn), **values}
        if "mode" not in values and environ.get("WANDB_MODE", "").strip() == "disabled":
            values["mode"] = "disabled"
        return cls(**values)


def told_by(context: Path) -> dict[str, str]:
    """What a context file says of the daemon and the run to join. Raises OSError, or ValueError for a strange one.

    The address is that of the daemon's own node if this is it, else the one for other nodes. Machines, and
    containers, may be called alike: where its socket is not to be seen, the daemon is on another one.
    """
    said = json.loads(context.read_bytes())
    if not isinstance(said, dict):
        raise ValueError("no context of a run")
    here = said.get("node") == os.uname().nodename and _is_seen(str(said.get("address", "")))
    told = {**said, "address": said["remote"]} if said.get("remote") and not here else said
    return {name: str(told[name]) for name in ("address", "server_key", "run_id", "run_dir") if told.get(name)}


def _is_seen(address: str) -> bool:
    kind, _, path = address.partition("://")
    return kind != "ipc" or Path(path).exists()


def _leads_to(context: Path, address: str | None) -> bool:
    """Whether a context file counts: an address that is said counts more, unless the file leads there too.

    Then the file knows the address for other nodes besides.
    """
    try:
        return address is None or json.loads(context.read_bytes()).get("address") == address
    except (OSError, ValueError, AttributeError):
        return False


def _context(path: Path, strict: bool, warn: Callable[[str], None]) -> dict[str, str]:
    """What the file that SIDESTEP_CONTEXT names says now; one that is not there yet is looked for again."""
    try:
        return told_by(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        message = f"context = {path} (from SIDESTEP_CONTEXT): can not be read: {why}"
        if strict:
            raise SettingsError(message) from None
        warn(f"{message}; it is looked for again")
        return {}


class Settings:
    """wandb's settings, as keywords. They are handed to the daemon, which owns wandb."""

    def __init__(self, **keywords: Any) -> None:
        self.__dict__.update(keywords)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Names and values, so that `dict(settings)` works."""
        return iter(self.__dict__.items())

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self)})"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the setting {name!r} was not given")


def _flag(raw: str) -> bool:
    try:
        return {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }[raw.lower()]
    except KeyError:
        raise ValueError("must be true or false") from None


def _when_full(raw: str) -> str:
    if raw not in ("spill", "drop"):
        raise ValueError("must be spill or drop")
    return raw


def _bytes(raw: str) -> int:
    try:
        value = int(raw)
    except ValueError:
        raise ValueError("must be a whole number of bytes") from None
    if value <= 0:
        raise ValueError("must be positive")
    if value < MAX_RECORD_BYTES:
        raise ValueError(f"must hold at least one record of {MAX_RECORD_BYTES} bytes")
    return value


def port_of(raw: str) -> int:
    """The port that a text says; raises ValueError in words."""
    if not raw.isdecimal() or not 0 < int(raw) < 65536:
        raise ValueError("must be a port: 1 to 65535")
    return int(raw)


def _seconds(raw: str) -> float:
    try:
        value = float(raw)
    except ValueError:
        raise ValueError("must be a number of seconds") from None
    if not 0 < value <= 60 or math.isnan(value):
        raise ValueError("must be positive, and a minute at most")
    return value


_PARSE: Mapping[str, Callable[[str], Any]] = {
    "strict": _flag,
    "autostart": _flag,
    "console": _flag,
    "program": _flag,
    "outbox_bytes": _bytes,
    "spill_bytes": _bytes,
    "blob_bytes": _bytes,
    "file_bytes_per_s": _bytes,
    "when_full": _when_full,
    "flush_interval_s": _seconds,
    "port": port_of,
}
