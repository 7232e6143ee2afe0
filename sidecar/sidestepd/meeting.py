"""How the commands of a job find each other: keys and addresses for this job alone, made by the first of them.

    FOLDER/.jobs/JOB/    0700, where the run directory is: server.key, clients, client.key, then context.json;
                         NODE.came.json of each other node
    /tmp/sidestep-UID/   0700, on each node: where its daemon is, and who joined it

- between nodes either the folder is shared, or all have the same secret in `SIDESTEP_JOB_SECRET`, of which keys
  are derived; nothing secret goes through a socket, and no file with a secret can be read by others
- whoever reads believes a file when the daemon that it names answers: what an earlier start left behind does not
- each file is there as a whole or not at all
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.endpoint import DEFAULT_PORT, Endpoint, KeyFile, endpoints
from sidestep.errors import SettingsError
from sidestep.head import head_of, tcp_address
from sidestep.settings import port_of, told_by
from sidestepd import keygen, rundir
from sidestepd.addresses import CONTEXT
from sidestepd.config import Config
from sidestepd.control import Control
from sidestepd.exits import Lifeline
from sidestepd.job import Place
from sidestepd.processes import read_json, write_json

SECRET = "SIDESTEP_JOB_SECRET"
LEAST_SECRET_CHARS = 32
JOBS = ".jobs"
_CAME = ".came.json"
LOOK_EVERY_S = 0.2
ANSWER_S = 2.0

Pause = Callable[[float], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The daemon that makes the run: its file for later, and what that said."""

    context: Path | None
    address: str
    run_id: str | None = None


class Meeting:
    """The place of one job in a folder."""

    def __init__(self, place: Place, config: Config, environ: Mapping[str, str]) -> None:
        self._place = place
        self._secret = environ.get(SECRET, "").strip()
        if self._secret and len(self._secret) < LEAST_SECRET_CHARS:
            raise SettingsError(f"{SECRET} has {len(self._secret)} characters: {LEAST_SECRET_CHARS} at least")
        self._head = place.master or head_of(environ, os.uname().nodename)
        by_list = self._head != place.master and self._head != environ.get("MASTER_ADDR", "").strip()
        self._own = environ.get("SLURMD_NODENAME") if by_list else None
        self._port = _port(environ.get("SIDESTEP_PORT", ""))
        self._jobs = config.run.dir.expanduser().absolute() / rundir.RUNS / JOBS
        name = place.job if not self._secret else f"{place.job}.{place.node}"
        self.folder = self._jobs / name

    @property
    def key_file(self) -> Path:
        """What a relay proves with who it is, and knows the first daemon by."""
        return self.folder / "client.key"

    def open(self, config: Config) -> Config:
        """Make the keys; the options with which the first daemon lets in the others. Raises SettingsError.

        Who says himself where workers of other nodes are let in has said with which keys, too.
        """
        self._make_folder()
        if config.listen.tcp:
            return config
        if self._secret:
            keygen.derive_keys(self.folder, self._secret)
        else:
            self._start_afresh()
            keygen.make_keys(self.folder)
        listen = config.listen.model_copy(
            update={
                "key_file": self.folder / "server.key",
                "clients": self.folder / "clients",
                "tcp": (f"tcp://*:{self._port if self._secret else 0}",),
                "advertise": config.listen.advertise or self._own or self._head,
            }
        )
        return config.model_copy(update={"listen": listen})

    def tell(self, directory: Path) -> None:
        """Say where the first daemon is, as it says it in the directory that it serves from."""
        if not self._secret and (context := read_json(directory / CONTEXT)):
            write_json(self.folder / CONTEXT, context)

    def find(self, seconds: float, pause: Pause = time.sleep) -> Found | None:
        """Where the first daemon is, once it answers; None if it did not in time. Raises SettingsError."""
        self._jobs.parent.mkdir(parents=True, exist_ok=True)
        if self._secret:
            self._make_folder()
            keygen.derive_keys(self.folder, self._secret)
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, ValueError):
                if (found := self._look()) is not None:
                    return found
            if time.monotonic() > deadline:
                return None
            pause(LOOK_EVERY_S)

    def come(self) -> None:
        """Say that this node is one of the job's, with so many tasks."""
        if not self._secret:
            name = re.sub(r"[^\w-]", "-", self._place.node)
            with contextlib.suppress(OSError):
                write_json(self.folder / f"{name}{_CAME}", {"tasks": self._place.tasks})

    def others(self) -> int:
        """How many other nodes are to be waited for, by what is known now."""
        tasks = [read_json(path).get("tasks") for path in self.folder.glob(f"*{_CAME}")]
        place = self._place
        if place.guessed_of is None or self._secret:
            return max((place.nodes or 1) - 1, len(tasks))
        known = (place.tasks or 1) + sum(it for it in tasks if isinstance(it, int))
        return len(tasks) + (known < place.guessed_of)

    def later(self) -> Found:
        """Where to look on: it was not there in time."""
        if self._secret and self._head:
            return Found(context=None, address=tcp_address(self._head, self._port))
        return Found(context=self.folder / CONTEXT, address="")

    def clear(self, *, complete: bool) -> None:
        """The job is over, on this node; of another one's folder only that one knows when.

        A relay that is not complete needs its key to become that.
        """
        if not (self._place.first or (self._secret and complete)):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._jobs.rmdir()

    def _make_folder(self) -> None:
        try:
            rundir.make_below(self.folder, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"{self.folder}: can not be made: {error.strerror}") from None
        rundir.make_private(self.folder)

    def _start_afresh(self) -> None:
        """What an earlier start left is not ours to use: its context goes first, so that nobody believes it."""
        came = (path.name for path in self.folder.glob(f"*{_CAME}"))
        for name in (CONTEXT, "client.key", "server.key", "clients", *came):
            (self.folder / name).unlink(missing_ok=True)

    def _look(self) -> Found | None:
        keys = KeyFile.read(self.key_file) if self.key_file.exists() else None
        if self._secret:
            address, run_id = self.later().address, None
            told: Mapping[str, str] = {}
        else:
            told = told_by(self.folder / CONTEXT)
            address, run_id = told.get("address", ""), told.get("run_id")
        if not address:
            return None
        for endpoint in endpoints(address, keys, told=told.get("server_key", "")):
            if (answer := _ask(endpoint)) is not None:
                run_id = run_id or answer.get("run", {}).get("id")
                return Found(context=self._lasting(told), address=address, run_id=run_id)
        return None

    def _lasting(self, told: Mapping[str, str]) -> Path | None:
        """Which file tells of the first daemon from now on: its own follows it to other ports, if it is seen."""
        own = Path(told.get("run_dir", "")) / CONTEXT
        return own if "run_dir" in told and own.is_file() else self.later().context


def forget(run_dir: Path, config: Config) -> None:
    """The run of a job that was killed is finished: nobody needs the keys that were made for it."""
    folder = config.listen.key_file.parent if config.listen.key_file else None
    if folder is not None and folder.parent == run_dir.parent / JOBS:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def _port(said: str) -> int:
    if not said.strip():
        return DEFAULT_PORT
    try:
        return port_of(said)
    except ValueError as error:
        raise SettingsError(f"SIDESTEP_PORT = {said!r:.80}: {error}") from None


def _ask(endpoint: Endpoint) -> Mapping[str, Any] | None:
    with Control(endpoint) as control:
        return control.ask_status(ANSWER_S)


class Neighbours:
    """The commands of a job on one node: one has the daemon, the others join it, and say how they ended."""

    def __init__(self, place: Place) -> None:
        self._place = place
        base = Path(tempfile.gettempdir()) / rundir.private_name()
        rundir.make_private(base)
        name = hashlib.sha256(f"{place.job} {place.node}".encode(errors="surrogateescape")).hexdigest()[:16]
        self._file, self._joined = base / f"job-{name}.json", base / f"job-{name}"

    def tell(self, exports: Mapping[str, str]) -> None:
        """There is a daemon."""
        if self._place.tasks != 1:
            shutil.rmtree(self._joined, ignore_errors=True)
            self._joined.mkdir(mode=0o700)
            write_json(self._file, exports)

    def join(self, pid: int, seconds: float, pause: Pause = time.sleep) -> dict[str, str] | None:
        """What leads to this node's daemon, once it answers; our process is waited for then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            exports = read_json(self._file)
            if exports and _ask(Endpoint(address=str(exports.get("SIDESTEP_ADDRESS", "")))) is not None:
                self.note(pid)
                return {str(name): str(value) for name, value in exports.items()}
            pause(LOOK_EVERY_S)
        return None

    def note(self, pid: int, exit_code: int | None = None) -> None:
        """A command joined; when it has ended, how it did."""
        with contextlib.suppress(OSError):
            write_json(self._joined / f"{pid}.json", {"exit_code": exit_code})

    def wait(self, pause: Pause, seconds: float) -> list[int | None]:
        """Return when all others of this node have ended, with their exit codes, None for one that said none.

        Those that never came are waited for so many seconds.
        """
        deadline = time.monotonic() + seconds
        lifelines: dict[int, Lifeline] = {}
        while self._place.tasks != 1:
            for path in self._joined.glob("[0-9]*.json"):
                lifelines.setdefault(int(path.stem), Lifeline(int(path.stem)))
            missing = (self._place.tasks or 1) - 1 - len(lifelines)
            alive = [line for line in lifelines.values() if line.is_alive()]
            if not alive and (missing <= 0 or time.monotonic() > deadline):
                break
            pause(LOOK_EVERY_S)
        return [read_json(self._joined / f"{pid}.json").get("exit_code") for pid in lifelines]

    def clear(self) -> None:
        """This node's daemon is gone."""
        if self._place.tasks != 1:
            self._file.unlink(missing_ok=True)
            shutil.rmtree(self._joined, ignore_errors=True)
