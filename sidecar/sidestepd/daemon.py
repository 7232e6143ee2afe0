"""A run's daemon, as the process that supervises it sees it: start, tend, close, stop.

- intake is a session of its own: Ctrl-C in a terminal does not reach it, and it outlives its supervisor
- an intake that dies is started again, sooner at first; one that ends well has finished the run
- the address is locked before anything is bound to it, and stays locked as long as supervisor or intake live
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from sidestep.errors import SettingsError
from sidestepd import rundir, status
from sidestepd.config import Config
from sidestepd.control import Control
from sidestepd.errors import AlreadyRunning, ExitCode, Incomplete, StartFailed
from sidestepd.processes import Lock
from sidestepd.rundir import RunFile

logger = logging.getLogger(__name__)

READY_WITHIN_S = 60.0
STOP_WITHIN_S = 20.0
STUCK_AFTER_S = 300.0
"""A drain in which nothing changed for so long is left for later."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0
"""Between the death of intake and its next start: well below the time in which a worker that ends gives up."""
_HEALTHY_AFTER_S = 10.0
_TICK_S = 0.2

Progress = Callable[[int], object]
"""Called with the number of records that are still to be written, while a run drains."""


class Daemon:
    """One run served at one address. `pause(seconds)` is how it waits; what that raises ends the waiting."""

    def __init__(
        self, run_dir: Path, config: Config, run: RunFile, *, pause: Callable[[float], object] = time.sleep
    ) -> None:
        self.run_dir = run_dir
        self.run = run
        self.restarts = 0
        self.pause = pause
        self._config = config
        self._control = Control(run.address)
        self._intake: subprocess.Popen[bytes] | None = None
        self._lock: BinaryIO | None = None
        self._ours = False
        self._exit_code: int | None = None
        self._started_at = 0.0
        self._pause_s = _FIRST_PAUSE_S

    def start(self) -> None:
        """Return when workers can be served, or raise StartFailed, AlreadyRunning or SettingsError."""
        self._lock = _lock(self.run.address)
        if not Lock.is_free(self.run_dir / "intake.lock"):
            raise AlreadyRunning(f"another daemon serves {self.run_dir}")
        self._ours = True
        if self.run_dir.exists():
            self.run.now("running").write(self.run_dir)
        else:
            rundir.lay_out(self.run_dir, self._config, self.run)
        (self.run_dir / rundir.TROUBLE).unlink(missing_ok=True)  # that was then
        self._spawn()
        self._wait_until_ready()

    def tend(self) -> bool:
        """Start intake again if it died; False once the run is complete."""
        code = self._intake.poll() if self._intake else None
        if code is None:
            return True
        if code == ExitCode.COMPLETE:
            return False
        lived_s = time.monotonic() - self._started_at
        if lived_s > _HEALTHY_AFTER_S:
            self._pause_s = _FIRST_PAUSE_S
        if lived_s >= self._pause_s:
            self.restarts += 1
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            try:
                self._spawn()
            except OSError as error:  # No process or no memory to be had now: the next time, perhaps.
                logger.warning("can not start intake: %s", error)
        return True

    def live_sessions(self) -> int | None:
        """How many workers are there, or None if intake does not say."""
        answer = self._control.ask_status()
        return None if answer is None else int(answer.get("live", 0))

    def close(self, exit_code: int) -> None:
        """Have the run finished with `exit_code`; returns when that is on disk. Raises Incomplete."""
        self._exit_code = exit_code
        deadline = time.monotonic() + STUCK_AFTER_S
        while self.tend() and not self._control.close_run(exit_code):
            if time.monotonic() > deadline:
                raise Incomplete(f"the daemon does not answer; the logs in {self._log.parent} say why")
            self.pause(_TICK_S)

    def wait_closed(self, progress: Progress) -> None:
        """Wait until all of the run is in the sink. Raises Incomplete if that comes to a standstill."""
        seen, deadline = None, time.monotonic() + STUCK_AFTER_S
        while self.tend():
            report = self._report()
            if report and report.ledger != seen:
                seen, deadline = report.ledger, time.monotonic() + STUCK_AFTER_S
            if report:
                progress(report.ledger.pending)
            if report and report.lasting:
                raise Incomplete(report.trouble or "")
            if time.monotonic() > deadline:
                why = (report and report.trouble) or f"the logs in {self._log.parent} say why"
                raise Incomplete(f"nothing moved for {STUCK_AFTER_S:.0f} s; {why}")
            self.pause(_TICK_S)

    def stop(self) -> None:
        """Stop now, so that the run can be taken up again; everything acknowledged is on disk."""
        if self._intake and self._intake.poll() is None:
            self._intake.terminate()
            try:
                self._intake.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._intake.kill()
                self._intake.wait()

    def release(self) -> None:
        """Let go of the address, and write down whether the run is finished or can be taken up again."""
        self.stop()
        self._control.shut()
        try:
            if self._ours and self.run_dir.exists():
                self._ended().write(self.run_dir)
            if self._lock:
                _unlock(self._lock, self.run.address)
        except OSError as error:  # The run is what it is; how the command ended still has to be told.
            logger.warning("can not tidy up after the run: %s", error)

    def _ended(self) -> RunFile:
        complete = self._intake is not None and self._intake.returncode == ExitCode.COMPLETE
        return self.run.now("finished", self._exit_code) if complete else self.run.now("interrupted")

    def _report(self) -> status.Report | None:
        try:
            return status.report(self.run_dir)
        except (OSError, sqlite3.Error):
            return None

    @property
    def _log(self) -> Path:
        return self.run_dir / "logs" / "intake.log"

    def _spawn(self) -> None:
        environ = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        self._started_at = time.monotonic()
        with self._log.open("ab") as log:
            self._intake = subprocess.Popen(
                # -P: a click.py or a queue.py in the directory of the training shall not be imported.
                [sys.executable, "-P", "-m", "sidestepd.intake", str(self.run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,
                pass_fds=[self._lock.fileno()] if self._lock else [],
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while self._control.ask_status(_TICK_S) is None:
            code = self._intake.poll() if self._intake else None
            if code == ExitCode.COMPLETE:
                return
            if code == ExitCode.ALREADY_RUNNING:
                raise AlreadyRunning(f"another daemon serves {self.run_dir}")
            if code is not None or time.monotonic() > deadline:
                why = f"ended with {code}" if code is not None else f"did not answer in {READY_WITHIN_S:.0f} s"
                raise StartFailed(f"the daemon {why}; the end of {self._log}:\n{_tail(self._log)}")


def _lock(address: str) -> BinaryIO | None:
    """Hold the address against a second daemon: binding would take an ipc path away from the first."""
    kind, _, path = address.partition("://")
    if kind != "ipc":
        return None
    while True:
        lock = _open(Path(f"{path}.lock"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), Path(lock.name).stat()):
                return lock
        except BlockingIOError:
            lock.close()
            raise AlreadyRunning(f"another daemon serves {address}") from None
        except FileNotFoundError:
            pass
        lock.close()  # Its holder removed it just now.


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("ab")
    except OSError as error:
        raise SettingsError(f"can not lock {path}: {error.strerror}") from None


def _unlock(lock: BinaryIO, address: str) -> None:
    Path(address.removeprefix("ipc://")).unlink(missing_ok=True)
    Path(lock.name).unlink(missing_ok=True)
    lock.close()


def _tail(log: Path, lines: int = 12) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])
