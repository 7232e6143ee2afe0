"""What sidestep itself holds and uses: its spool, its lag, its losses, its processes.

- read from the run's files and the processes' counters; nobody is asked, so nobody is kept from work
- its processes are intake, which is this one's parent, and everything below it: of a daemon that serves several
  runs those of all of them, in each run's figures
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from sidestepd import placement
from sidestepd.errors import SpoolError
from sidestepd.rowlog import RowLogReader
from sidestepd.samplers.base import Rates, Reading
from sidestepd.spool import SpoolReader


class OwnSampler:
    """One run's daemon. `pid` is its intake's."""

    def __init__(self, run_dir: Path, *, pid: int | None = None, clock: Callable[[], float] = time.time) -> None:
        self._pid = os.getppid() if pid is None else pid
        self._clock = clock
        self._home = placement.home(run_dir)
        self._rowlog = RowLogReader(self._home / placement.ROW_LOG)
        self._rates = Rates()
        self._seconds: dict[int, float] = {}
        """CPU time by process, of those that ended too."""

    def read(self, now: float) -> Reading:
        """What there is now."""
        values: dict[str, float] = {"spool_bytes": self._spool_bytes()}
        for source in (self._of_delivery, lambda: self._of_processes(now)):
            try:
                values |= source()
            except (OSError, sqlite3.Error, SpoolError, psutil.Error):
                continue
        return Reading(values={f"sidestep/{name}": value for name, value in values.items()})

    def rest(self, seconds: float) -> Reading:
        """It tells nothing by itself."""
        time.sleep(seconds)
        return Reading()

    def close(self) -> None:
        """Nothing is held."""

    def _spool_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._home.glob("spool.db*") if path.exists())

    def _of_delivery(self) -> Mapping[str, float]:
        ledger = self._rowlog.meta("ledger", {})
        if not ledger:
            return {}
        return {
            "lag_s": self._lag_s(ledger["read_through"]),
            "waiting_rows": ledger["waiting"],
            "late_rows": ledger["late_rows"],
            "dropped": sum(ledger["dropped"].values()),
        }

    def _lag_s(self, read_through: int) -> float:
        """How long the oldest entry that delivery has not told of reading has lain in the spool."""
        reader = SpoolReader(self._home / placement.SPOOL)
        try:
            oldest = reader.received_after(read_through)
        finally:
            reader.close()
        return 0.0 if oldest is None else max(self._clock() - oldest, 0.0)

    def _of_processes(self, now: float) -> Mapping[str, float]:
        memory = 0
        intake = psutil.Process(self._pid)
        for process in (intake, *intake.children(recursive=True)):
            try:
                with process.oneshot():
                    memory += process.memory_info().rss
                    times = process.cpu_times()
                self._seconds[process.pid] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
        rate = self._rates.per_s("cpu", sum(self._seconds.values()), now)
        return {"memory_bytes": memory} | ({} if rate is None else {"cpu_percent": 100 * rate})
