"""Locks, parents and neighbours: how the processes of a run are kept from being doubled.

- a run directory has one intake and one delivery, each behind a lock that the kernel drops with its holder
- delivery dies with intake; its wandb-core is found by the pid and start time that were written down
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from sidestepd.errors import AlreadyRunning

_PR_SET_PDEATHSIG = 1
_KILLED_FIRST = 500  # as if it used half of all memory more than it does


class Lock:
    """An exclusive lock on a file, held until it is released or the process ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self) -> None:
        """Take the lock, or raise AlreadyRunning."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"another process holds {self.path}") from None

    def release(self) -> None:
        """Let go of it before the process ends. Others may hold it from then on."""
        os.close(self._descriptor)

    @staticmethod
    def is_free(path: Path) -> bool:
        """Whether nobody holds the lock at `path`."""
        if not path.exists():
            return True
        lock = Lock(path)
        try:
            lock.acquire()
        except AlreadyRunning:
            return False
        else:
            return True
        finally:
            lock.release()


class Beat:
    """Shows another process that this one is not stuck: a file whose time of change moves."""

    EVERY_S = 0.2

    def __init__(self, path: Path) -> None:
        self.path = path
        self._next = 0.0
        path.touch()

    def __call__(self) -> None:
        """Called wherever there is progress."""
        if (now := time.monotonic()) >= self._next:
            self._next = now + self.EVERY_S
            self.path.touch()


class Pulse:
    """The other side of a `Beat`: for how long it has not moved."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._moved_at = -math.inf
        self._seen = self._time_of_change()

    def silence(self, now: float) -> float:
        """Seconds at `now` (monotonic) since it was last seen to move; infinity until it does."""
        seen = self._time_of_change()
        if seen != self._seen:
            self._seen, self._moved_at = seen, now
        return now - self._moved_at

    def _time_of_change(self) -> int:
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return 0


def die_with_parent(parent: int) -> None:
    """Be killed when the process `parent` ends; if it is gone already, end now."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):  # Linux; elsewhere the parent's own shutdown must do
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def step_back(niceness: int) -> None:
    """Let the training have the processor first, and the memory: a sandbox may forbid it.

    Where memory runs out the kernel kills this process, which is started again and goes on, before the intake, the
    supervisor or a training.
    """
    with contextlib.suppress(OSError):
        os.nice(niceness)
    with contextlib.suppress(OSError, ValueError):
        adjustment = Path("/proc/self/oom_score_adj")
        adjustment.write_text(str(max(int(adjustment.read_text()), _KILLED_FIRST)))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a small file as a whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a small file; {} if it is not there, or not whole."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def kill_recorded(record: Mapping[str, Any] | None) -> bool:
    """Kill the process that `{"pid", "started"}` names, if it still is that one; returns whether it is gone."""
    if not record:
        return True
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(record["pid"])
        if abs(process.create_time() - record["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            process.kill()
            return False
    return True
