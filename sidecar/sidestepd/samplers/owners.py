"""Which rank a process on a GPU belongs to: the worker itself, or an ancestor that is one.

- NVML names processes by their pids in the machine's own namespace. A worker says its pid as its own namespace
  numbers it; `NSpid` in /proc tells both, where the process can be seen from here
- from inside a container the machine's processes can not be seen: then nothing is mapped, and that is said. One
  that has the number of a process here would be taken for it; so once one can not be seen, none is mapped
- in the machine's own namespace a process that can not be seen has ended, or is another user's where /proc hides
  those
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sidestep.ranks import NODE
from sidestep.wire import WORKER
from sidestepd import placement
from sidestepd.errors import SpoolError
from sidestepd.spool import SpoolReader

logger = logging.getLogger("sidestepd.samplers.gpu")

REMEMBER_S = 10.0
"""How long the workers are taken to be those that they were."""
_DEPTH = 64
PROC = Path("/proc")
MACHINE = "pid:[4026531836]"
"""What the kernel calls the machine's own pid namespace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Bytes of a GPU by rank, NaN where they are not known.

    `foreign` processes are no worker's; None where some could not be looked at.
    """

    by_rank: Mapping[int, float] = field(default_factory=dict)
    foreign: int | None = 0


class Owners:
    """The workers of this machine, as `workers` tells them: pid to rank."""

    def __init__(self, workers: Callable[[], Mapping[int, int]], proc: Path = PROC) -> None:
        self._workers = workers
        self._proc = proc
        self._said = False

    @classmethod
    def of_run(cls, run_dir: Path, node: str | None = None) -> Owners:
        """Those that have said HELLO to this run's intake from here."""
        return cls(
            _Roster(placement.home(run_dir) / placement.SPOOL, node or os.environ.get(NODE) or os.uname().nodename)
        )

    def share(self, processes: Mapping[int, float]) -> Shares:
        """Divide the memory of `processes` (pid to bytes, or NaN) among ranks."""
        unseen = [pid for pid in processes if not (self._proc / str(pid)).exists()]
        if unseen and not self._is_in_machines_namespace():
            self._say(len(unseen))
            return Shares(foreign=None)
        workers, by_rank = self._workers(), dict[int, float]()
        foreign = sum(map(_exists, unseen))
        for pid in processes.keys() - set(unseen):
            if (rank := self._rank_of(pid, workers)) is None:
                foreign += 1
            else:
                by_rank[rank] = by_rank.get(rank, 0) + processes[pid]
        return Shares(by_rank=by_rank, foreign=foreign)

    def _is_in_machines_namespace(self) -> bool:
        try:
            return str((self._proc / "self" / "ns" / "pid").readlink()) == MACHINE
        except OSError:
            return False

    def _say(self, unseen: int) -> None:
        if not self._said:
            self._said = True
            logger.warning(
                "NVML names %d processes that can not be seen from this pid namespace, so none is mapped to a "
                "rank; in a container, share the machine's namespace to have that",
                unseen,
            )

    def _rank_of(self, pid: int, workers: Mapping[int, int]) -> int | None:
        for _ in range(_DEPTH):
            status = self._status(pid)
            own = [int(word) for word in status.get("NSpid", str(pid)).split()]
            if own and own[-1] in workers:
                return workers[own[-1]]
            pid = int(status.get("PPid", "0"))
            if pid <= 1:
                break
        return None

    def _status(self, pid: int) -> dict[str, str]:
        try:
            lines = (self._proc / str(pid) / "status").read_text(errors="replace").splitlines()
        except OSError:
            return {}
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _exists(pid: int) -> bool:
    """Also of a process that /proc does not show."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


class _Roster:
    """pid to rank of a run's workers on one node, read from its spool now and then."""

    def __init__(self, spool: Path, node: str) -> None:
        self._spool, self._node = spool, node
        self._known: dict[int, int] = {}
        self._until = 0.0

    def __call__(self) -> Mapping[int, int]:
        if time.monotonic() >= self._until:
            self._until = time.monotonic() + REMEMBER_S
            self._known = self._read() or self._known
        return self._known

    def _read(self) -> dict[int, int]:
        try:
            reader = SpoolReader(self._spool)
        except sqlite3.Error:
            return {}
        try:
            hellos = [stored.hello for stored in reader.sessions()]
        except (sqlite3.Error, SpoolError):
            return {}
        finally:
            reader.close()
        return {
            hello.get("pid", 0): hello.get("rank", 0)
            for hello in hellos
            if hello.get("role", WORKER) == WORKER and hello.get("node") == self._node
        }
