"""Keep the samplers' process running: start it, start it again when it died, and have it say its last word.

- it dies with intake; a call of NVML's that hangs in the kernel holds nobody but it
- one that hangs is not killed: its threads wait for each other no more than for the training
- nothing here imports what samplers import
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

logger = logging.getLogger("sidestepd.keeper")

FIRST_BACKOFF_S = 0.5
HEALTHY_AFTER_S = 60.0
"""A life this long resets the backoff."""
LAST_WORD_S = 3.0
"""How long it may take to say what it has, when the run is to be closed."""


class SamplersKeeper:
    """One run directory's samplers, seen from intake."""

    def __init__(self, run_dir: Path, *, enabled: bool, backoff_s: float) -> None:
        self.run_dir = run_dir
        self.restarts = 0
        self._enabled = enabled
        self._longest_backoff_s = backoff_s
        self._backoff = FIRST_BACKOFF_S
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._retry_at = 0.0
        self._leave_by: float | None = None
        self._interval_s: float | None = None

    def ask(self, *, enabled: bool, interval_s: float | None) -> None:
        """What the run's first worker wants of them, before they are started."""
        self._enabled, self._interval_s = self._enabled and enabled, interval_s

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process else None

    def tend(self, now: float) -> None:
        """Do what is due at `now` (monotonic seconds)."""
        if not self._enabled or self._leave_by is not None:
            return
        if self._process is None:
            if now >= self._retry_at:
                self._start(now)
        elif (code := self._process.poll()) is not None:
            self._ended(code, now)

    def ended(self, now: float) -> bool:
        """Whether it has left, for good: asked to when this is called first, killed if it has not in time."""
        if self._process is None or self._process.poll() is not None:
            self._leave_by = now
            return True
        if self._leave_by is None:
            self._leave_by = now + LAST_WORD_S
            self._process.terminate()
        if now < self._leave_by:
            return False
        self._process.kill()
        return True

    def stay(self) -> None:
        """The run goes on, though it may have been about to be closed: who was asked to leave is needed again."""
        self._leave_by = None

    def kill(self) -> None:
        """End it now; what it had not said is not said."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _start(self, now: float) -> None:
        log = self.run_dir / "logs" / "samplers.log"
        log.parent.mkdir(exist_ok=True)
        self._started = now
        # -P: a queue.py in the directory of the training shall not be imported.
        command = [
            sys.executable,
            "-P",
            "-m",
            "sidestepd.samplers",
            str(self.run_dir),
            "--parent",
            str(os.getpid()),
        ]
        if self._interval_s is not None:
            command += ["--interval", f"{self._interval_s:g}"]
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        except OSError as error:  # no process or no memory to be had: the training has it
            self._put_off(f"can not be started: {error}", now)

    def _ended(self, code: int, now: float) -> None:
        self._process = None
        self.restarts += 1
        if now - self._started >= HEALTHY_AFTER_S:
            self._backoff = FIRST_BACKOFF_S
        self._put_off(f"ended with {code}", now)

    def _put_off(self, why: str, now: float) -> None:
        logger.warning("the samplers %s; started again in %.1f s", why, self._backoff)
        self._retry_at = now + self._backoff
        self._backoff = min(self._longest_backoff_s, 2 * self._backoff)
