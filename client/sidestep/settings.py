"""A worker's options, and the keywords that wandb takes.

- options come from the environment, where `sidestep run` puts them, or from the file it wrote for who joins later
- a bad value names itself, its source and what it should be; the default is used, since a training must not
  die of it, unless `strict`
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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
        for name, value in _context(environ, values, warn).items():
            values.setdefault(name, value)
        if "mode" not in values and environ.get("WANDB_MODE", "").strip() == "disabled":
            values["mode"] = "disabled"
        return cls(**values)


def _context(environ: Mapping[str, str], values: Mapping[str, Any], warn: Callable[[str], None]) -> dict[str, str]:
    """What the file that SIDESTEP_CONTEXT names says of the run to join, where no address is given."""
    path = environ.get("SIDESTEP_CONTEXT", "").strip()
    if not path or values.get("address"):
        return {}
    try:
        said = json.loads(Path(path).read_bytes())
        return {name: str(said[name]) for name in ("address", "run_id", "run_dir") if said.get(name)}
    except (OSError, ValueError, AttributeError) as error:
        message = f"context = {path} (from SIDESTEP_CONTEXT): can not be read: {error}"
        if values.get("strict"):
            raise SettingsError(message) from None
        warn(message)
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
}
