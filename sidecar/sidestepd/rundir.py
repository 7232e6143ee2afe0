"""Where a run lives: its directory, what `run.json` says of it, and the address of its daemon.

- directories are the owner's alone (0700); a socket directory that is not is refused
- `run.json` is replaced by rename: a reader sees the old one or the new one
- an address is `ipc://` with a path that the kernel can take, or `tcp://` on the loopback interface
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import string
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from sidestep.errors import SettingsError
from sidestepd.config import Config
from sidestepd.errors import Trouble
from sidestepd.processes import read_json, write_json

MAX_ID_CHARS = 128
MAX_IPC_PATH_BYTES = 107
"""What fits into a sockaddr_un, without its final zero."""
RUNS = "sidestep-runs"
RELAYS = ".relays"
BLOBS = "blobs"
ARTIFACTS = "artifacts"
"""The bytes of media, until the run has them."""
TROUBLE = "trouble.json"
"""What keeps rows from the run while nothing here is broken; gone when that is over."""
UPSTREAM = "upstream.json"
"""Of a relay: where the daemon above is, whether it answers, and what is still to go there."""
DEATHS = "deaths.json"
"""Why there is no delivery that lives, likewise."""

MOST_TRIES = 1000
"""To make a folder in one that others remove when it is empty."""
_ID_LETTERS = string.ascii_lowercase + string.digits
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """What `run.json` says. `dir` is the run directory, `created` seconds since the epoch."""

    id: str
    mode: str = "offline"
    resume: str = "allow"
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None
    sweep_id: str | None = None
    dir: str = ""
    address: str = ""
    created: float = 0.0
    state: str = "running"
    exit_code: int | None = None
    url: str | None = None
    named: bool = False
    """Whether somebody gave it its id."""
    turn: int = 0
    """Of a run without one: its place among those of its launch, from 1 on, where that is known."""

    @classmethod
    def of(cls, config: Config, run_dir: Path, address: str) -> Self:
        """A run that begins now; its id must be known."""
        options = config.run.model_dump(exclude={"dir"})
        named = config.source("run.id") != "default"
        return cls(dir=str(run_dir), address=address, created=time.time(), named=named, **options)

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """What the run directory says of itself. Raises SettingsError if it is none."""
        try:
            values: Mapping[str, Any] = json.loads((run_dir / "run.json").read_bytes())
            known = {spec.name: values[spec.name] for spec in fields(cls) if spec.name in values}
            return cls(**(known | {"tags": tuple(known.get("tags", ()))}))
        except OSError as error:
            raise SettingsError(f"{run_dir} is no run directory: {error.strerror} (run.json)") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise SettingsError(f"{run_dir / 'run.json'} can not be read: {error}") from None

    def write(self, run_dir: Path) -> None:
        """Replace `run.json`."""
        write_json(run_dir / "run.json", asdict(self))

    def exports(self) -> dict[str, str]:
        """What leads a process to this run: the variables of its environment."""
        return {"SIDESTEP_ADDRESS": self.address, "SIDESTEP_RUN_ID": self.id, "SIDESTEP_RUN_DIR": self.dir}

    def at(self, run_dir: Path, address: str) -> Self:
        """The same run, wherever its directory lies now, at another address."""
        return replace(self, dir=str(run_dir), address=address)

    def with_what_wandb_made_of_it(self, about: Mapping[str, Any]) -> Self:
        """The same run, with the names that it was given in the end."""
        made = {key: about[key] for key in ("mode", "project", "entity", "name", "url") if about.get(key)}
        return replace(self, **made)

    def now(self, state: str, exit_code: int | None = None) -> Self:
        """The same run: "running", "finished" with an exit code, or "interrupted"."""
        return replace(self, state=state, exit_code=exit_code)


def new_id() -> str:
    """Eight letters and digits, as wandb makes them."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(8))


def with_run_id(config: Config) -> Config:
    """The same options, with an id made up if none was given."""
    run = config.run.model_copy(update={"id": config.run.id or new_id()})
    return config.model_copy(update={"run": run})


def new_run_dir(config: Config, *, now: float, node: str | None = None) -> Path:
    """Where a run that begins `now` shall live; the name sorts by time. Nothing is made yet.

    A relay's has the name of its node, and a folder apart: what is in it is a part of a run that is elsewhere, and
    the folder may be shared with all other nodes. Raises SettingsError.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    try:
        runs = config.run.dir.expanduser().absolute() / RUNS
    except FileNotFoundError:
        raise SettingsError("the directory that this was started in was deleted: say --dir") from None
    name = f"{stamp}-{config.run.id}"
    if not config.is_relay:
        return runs / name
    usable = "".join(sign if sign.isalnum() or sign in "-_" else "-" for sign in node or os.uname().nodename)
    return runs / RELAYS / f"{name}-{usable[:64]}"


def newest_run_dir(base: Path) -> Path | None:
    """The run directory under `base` that began last; a relay's only where there is no other."""
    runs = max((path.parent for path in (base / RUNS).glob("*/run.json")), default=None)
    return runs or max((path.parent for path in (base / RUNS / RELAYS).glob("*/run.json")), default=None)


def earlier_of(run_dir: Path, id_: str) -> tuple[Path, ...]:
    """The directories beside `run_dir` that hold a run of this id which began before, oldest first."""
    before = (path.parent for path in run_dir.parent.glob("*/run.json") if path.parent.name < run_dir.name)
    return tuple(path for path in sorted(before) if read_json(path / "run.json").get("id") == id_)


def lay_out(run_dir: Path, config: Config, run: RunFile) -> None:
    """Make a run directory. Raises SettingsError if there is one, or it can not be made."""
    try:
        make_below(run_dir, exist_ok=False)
        (run_dir / "logs").mkdir(mode=0o700)
        write_json(run_dir / "config.json", config.model_dump(mode="json"))
        run.write(run_dir)
    except FileExistsError as error:
        raise SettingsError(f"{error.filename} is there already") from None
    except OSError as error:
        source = config.source("run.dir")
        raise SettingsError(f"run.dir = {config.run.dir} (from {source}): {error.strerror}") from None


def make_below(folder: Path, *, exist_ok: bool) -> None:
    """Make a folder that is ours alone, and those above it, of which others may just remove one that is empty."""
    for left in range(MOST_TRIES, -1, -1):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            return folder.mkdir(mode=0o700, exist_ok=exist_ok)
        except FileNotFoundError:
            if not left:
                raise
        except FileExistsError as error:  # one above it was there, and was gone when that was looked at
            if not left or error.filename == str(folder):
                raise
    return None


def stored_config(directory: Path) -> Config:
    """The options with which a daemon began there. Raises SettingsError."""
    try:
        return Config.from_json((directory / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{directory} can not be taken up: {error}") from None


def name_of(address: str) -> str:
    """A name for a directory that is this address's own."""
    stem = "".join(letter if letter.isalnum() else "-" for letter in address)[-24:].strip("-")
    return f"{stem}-{hashlib.sha256(address.encode(errors='surrogateescape')).hexdigest()[:6]}"


def open_to(address: str, mode: str) -> None:
    """Say who may connect to an ipc address: `mode` is octal. Who may enter its directory is not changed."""
    kind, _, path = address.partition("://")
    if kind == "ipc":
        Path(path).chmod(int(mode, 8))


def tell_trouble(directory: Path, trouble: Trouble | None) -> None:
    """Write down what keeps rows from the run, for `sidestep status`; intake forgets it when it starts."""
    if trouble:
        write_json(directory / TROUBLE, asdict(trouble))
    else:
        (directory / TROUBLE).unlink(missing_ok=True)


def clear_address(address: str) -> None:
    """Remove the files of an address that nobody is bound to any more."""
    kind, _, path = address.partition("://")
    if kind == "ipc":
        for name in (path, f"{path}.lock"):
            Path(name).unlink(missing_ok=True)


def private_address(run_dir: Path, environ: Mapping[str, str] = os.environ) -> str:
    """An address that is this run directory's own, in a directory that is ours alone."""
    name = f"{run_dir.name[-24:]}-{hashlib.sha256(bytes(run_dir)).hexdigest()[:6]}.sock"
    bases = dict.fromkeys(filter(None, (environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp")))
    for base in bases:
        path = Path(base) / private_name() / name
        if len(os.fsencode(path)) <= MAX_IPC_PATH_BYTES and os.access(base, os.W_OK):
            make_private(path.parent)
            return f"ipc://{path}"
    raise SettingsError(f"no place for a socket in any of {', '.join(bases)}: set XDG_RUNTIME_DIR to a short path")


def private_name() -> str:
    """What a directory that is ours alone is called, in one that is everybody's."""
    return f"sidestep-{os.geteuid()}"


def check_address(address: str) -> None:
    """Raise SettingsError unless a daemon may be bound there."""
    kind, _, rest = address.partition("://")
    if kind == "ipc" and rest.startswith("/"):
        if len(os.fsencode(rest)) > MAX_IPC_PATH_BYTES:
            raise SettingsError(f"{address}: a socket's path has at most {MAX_IPC_PATH_BYTES} bytes")
        if not Path(rest).parent.is_dir():
            raise SettingsError(f"{address}: there is no directory {Path(rest).parent}")
        return
    host, _, port = rest.rpartition(":")
    if kind != "tcp" or not port.isdecimal() or int(port) == 0:
        raise SettingsError(f"{address}: say ipc:///absolute/path or tcp://127.0.0.1:PORT")
    if host not in _LOOPBACK:
        raise SettingsError(
            f"{address}: nothing there would ask who is speaking; --listen lets in other nodes, with keys"
        )


def make_private(directory: Path) -> None:
    """Make a directory that is ours alone, or raise SettingsError if it is there and is not."""
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise SettingsError(f"{directory} is no directory; it shall hold sockets that are ours alone")
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise SettingsError(f"{directory} is open to others: chmod 700, or set XDG_RUNTIME_DIR")
