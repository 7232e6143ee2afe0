"""A daemon for a launch that has none: the first of its processes to look starts one, the others find it.

- the address follows from the launch alone, so every process knows it at once, and none has to be told
- who holds the lock beside the socket starts the daemon and hands the lock on to it: there is never a second one,
  and when it dies the lock is free for the next who looks
- only where all processes of the launch are on this node; nothing here waits, and nothing is raised: it runs in
  the sender's thread
- the daemon is a session of its own: what ends the training does not end it. It ends when the training has
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from sidestep.notices import Notices

if TYPE_CHECKING:
    import subprocess

MAX_PATH_BYTES = 107
"""What fits into a sockaddr_un, without its final zero."""
LOOK_AGAIN_S = 1.0
MOST_STARTS = 3
"""A daemon that ends at once so often is given up."""
NEEDED = ("click", "psutil", "pydantic", "wandb")
"""What an installation with the daemon has, and one without has not."""


class Starter:
    """Sees to it that somebody serves `address`."""

    def __init__(self, address: str, notices: Notices, *, folder: str | None = None) -> None:
        self.address = address
        self._path = address.removeprefix("ipc://")
        self._notices = notices
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._look_at = 0.0
        self._starts = 0

    def look(self) -> None:
        """Nobody answers: start the daemon, unless somebody has. To be called as often as one likes."""
        if (now := monotonic()) < self._look_at:
            return
        self._look_at = now + LOOK_AGAIN_S
        try:
            if self._starts < MOST_STARTS and not self._failed() and self._is_installed():
                self._start()
        except OSError as error:
            self._notices.once("autostart", f"can not start a daemon: {error}")

    def _failed(self) -> bool:
        """Whether the one that was started here ended with a complaint; it would complain again."""
        if self._process is None or not (code := self._process.poll()) or code in _ANOTHER_IS_THERE:
            return False
        if code > 0:
            self._starts = MOST_STARTS
            self._notices.once("autostart", f"the daemon ended with {code}: {_last_line(log_of(self.address))}")
        return code > 0

    def _is_installed(self) -> bool:
        """Whether there is one to start; nothing is imported for that."""
        missing = next((name for name in NEEDED if importlib.util.find_spec(name) is None), None)
        if missing is not None:
            self._starts = MOST_STARTS
            self._notices.once(
                "autostart",
                f"no daemon is known, and none is installed here ({missing} is missing): what is logged waits in "
                "vain. pip install 'sidestep[daemon]'",
            )
        return missing is None

    def _start(self) -> None:
        with _held(f"{self._path}.lock") as lock:
            if lock is None:
                return
            import subprocess  # here, in the sender's thread: init() has no time for it

            self._starts += 1
            folder = ["--dir", self._folder] if self._folder else []
            with log_of(self.address).open("ab") as log:
                self._process = subprocess.Popen(
                    # -P: a click.py or a queue.py in the directory of the training shall not be imported.
                    [sys.executable, "-P", "-m", "sidestep", "autostarted", self.address, str(lock), *folder],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},
                    start_new_session=True,
                    pass_fds=[lock],
                )
        _started.append(self._process)


_ANOTHER_IS_THERE = (73,)
"""Exit codes of a daemon that was not needed."""
_started: list[subprocess.Popen[bytes]] = []
"""Kept, so that none is waited for, or complained of, when it is forgotten."""


def starter_for(
    launch: str,
    *,
    on_one_node: bool,
    notices: Notices,
    folder: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Starter | str:
    """How to come by the daemon of a launch, or why there can be none, in words."""
    if not on_one_node:
        return "the processes are on several nodes, or it can not be told"
    if not sys.executable:
        return "there is no Python to start one with"
    address = address_of(launch, environ)
    if address is None:
        return "there is no private place for its socket: set XDG_RUNTIME_DIR to a short path"
    return Starter(address, notices, folder=folder)


def address_of(launch: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The address of a launch's daemon: the same in all its processes. None if there is no place for a socket."""
    name = f"auto-{hashlib.sha256(launch.encode(errors='replace')).hexdigest()[:16]}.sock"
    for base in filter(None, (environ.get("XDG_RUNTIME_DIR"), environ.get("TMPDIR"), "/tmp")):
        path = Path(base) / f"sidestep-{os.geteuid()}" / name
        if len(os.fsencode(path)) <= MAX_PATH_BYTES and os.access(base, os.W_OK) and _is_ours_alone(path.parent):
            return f"ipc://{path}"
    return None


def _is_ours_alone(directory: Path) -> bool:
    """Make it, if it is not there; whether nobody else can put a socket, or a lock, in it."""
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077


@contextlib.contextmanager
def _held(path: str) -> Iterator[int | None]:
    """The lock's descriptor while it is ours, None if somebody else has it. Whoever inherits it holds on."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor if _lock(descriptor, path) else None
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), Path(path).stat())  # else its holder removed it just now
    except (BlockingIOError, FileNotFoundError):
        return False


def log_of(address: str) -> Path:
    """What the daemon that was started for an address complains of."""
    return Path(f"{address.removeprefix('ipc://')}.log")


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "its log is gone"
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it did not say why")
