"""A daemon, as the process that supervises it sees it: start, tend, close, stop.

- intake is a session of its own: Ctrl-C in a terminal does not reach it, and it outlives its supervisor
- an intake that dies is started again, sooner at first; one that ends well has finished its runs
- where the directory it serves from was deleted, or emptied while it was written to, there is nothing to start
  again: that is said, and the end
- the address is locked before anything is bound to it, and stays locked as long as supervisor or intake live
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sidestep.errors import SettingsError
from sidestepd import rundir
from sidestepd.control import Control
from sidestepd.errors import AlreadyRunning, Deleted, ExitCode, Incomplete, StartFailed
from sidestepd.home import Home

logger = logging.getLogger(__name__)

READY_WITHIN_S = 60.0
STOP_WITHIN_S = 20.0
STUCK_AFTER_S = 300.0
"""A drain in which nothing changed for so long is left for later."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0
"""Between the death of intake and its next start: well below the time in which a worker that ends gives up."""
_HEALTHY_AFTER_S = 10.0
_TICK_S = 0.2
NEEDED = ("config.json",)
"""What every directory that is served from has; whoever deletes the rest deletes it too."""

Progress = Callable[[int], object]
"""Called with the number of records that are still to be written, while a run drains."""


class Daemon:
    """Intake, serving from one directory at one address.

    `pause(seconds)` is how it waits; what that raises ends the waiting. `lock` holds the address already.
    """

    def __init__(
        self, home: Home, *, pause: Callable[[float], object] = time.sleep, lock: BinaryIO | None = None
    ) -> None:
        self.home = home
        self.restarts = 0
        self.pause = pause
        self.deleted = False
        """Somebody deleted the directory: there is nothing left to serve."""
        self._control = Control(home.address)
        self._intake: subprocess.Popen[bytes] | None = None
        self._lock = lock
        self._ours = False
        self._exit_code: int | None = None
        self._started_at = 0.0
        self._pause_s = _FIRST_PAUSE_S

    def start(self) -> None:
        """Return when workers can be served, or raise StartFailed, AlreadyRunning or SettingsError."""
        self._lock = self._lock or _lock(self.home.address)
        self.home.begin()
        self._ours = True
        self._spawn()
        self._wait_until_ready()

    def tend(self) -> bool:
        """Start intake again if it died; False once all is complete. Raises Deleted."""
        code = self._intake.poll() if self._intake else None
        if code is None:
            return True
        if code == ExitCode.COMPLETE:
            return False
        if gone := self._what_is_gone():
            self.deleted = True
            raise Deleted(f"{gone} was deleted, and with it what was not yet in the run")
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

    def ask(self, timeout_s: float = 1.0) -> Mapping[str, Any] | None:
        """How intake says that it is; None if it does not say."""
        return self._control.ask_status(timeout_s)

    def live_sessions(self) -> int | None:
        """How many workers are there, or None if intake does not say."""
        answer = self.ask()
        return None if answer is None else int(answer.get("live", 0))

    def report(self) -> Mapping[str, Any] | None:
        """What intake tells of itself and its runs; None if it does not."""
        return self._control.ask_status()

    def close(self, exit_code: int) -> None:
        """Have all finished, a single run with `exit_code`; returns when that is settled. Raises Incomplete."""
        self._exit_code = exit_code
        deadline, seen = time.monotonic() + STUCK_AFTER_S, None
        while self.tend() and not self._control.close_run(exit_code):
            if self._control.files != seen:
                seen, deadline = self._control.files, time.monotonic() + STUCK_AFTER_S
            if time.monotonic() > deadline:
                raise Incomplete(f"the daemon does not answer; the logs in {self._log.parent} say why")
            self.pause(_TICK_S)

    def wait_closed(self, progress: Progress) -> None:
        """Wait until everything is in the sink. Raises Incomplete if that comes to a standstill."""
        seen, deadline = None, time.monotonic() + STUCK_AFTER_S
        why = f"the logs in {self._log.parent} say why"
        while self.tend():
            standing = self.home.standing()
            if standing is not None:
                if standing.seen != seen:
                    seen, deadline = standing.seen, time.monotonic() + STUCK_AFTER_S
                progress(standing.pending)
                if standing.lasting:
                    raise Incomplete(standing.trouble)
                why = standing.trouble or why
            if time.monotonic() > deadline:
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
        """Let go of the address, and write down whether all is finished or can be taken up again."""
        self.stop()
        self._control.shut()
        complete = self._intake is not None and self._intake.returncode == ExitCode.COMPLETE
        try:
            if self._ours and not self.deleted:
                self.home.ended(complete=complete, exit_code=self._exit_code)
            if self._lock:
                rundir.clear_address(self.home.address)
                self._lock.close()
        except (OSError, SettingsError) as error:  # It is what it is; how the command ended still has to be told.
            logger.warning("can not tidy up: %s", error)

    def _what_is_gone(self) -> Path | None:
        """What somebody deleted of that without which no intake can start."""
        directory = self.home.directory
        return next((it for it in (directory, *map(directory.joinpath, NEEDED)) if not it.exists()), None)

    @property
    def _log(self) -> Path:
        return self.home.directory / "logs" / "intake.log"

    def _spawn(self) -> None:
        environ = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        self._started_at = time.monotonic()
        with self._log.open("ab") as log:
            self._intake = subprocess.Popen(
                # -P: a click.py or a queue.py in the directory of the training shall not be imported.
                [
                    *(sys.executable, "-P", "-m", "sidestepd.intake"),
                    *(str(self.home.directory), "--parent", str(os.getpid())),
                    *(() if self.home.listens else ("--local",)),
                ],
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
                raise AlreadyRunning(f"another daemon serves {self.home.directory}")
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


def _tail(log: Path, lines: int = 12) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])
