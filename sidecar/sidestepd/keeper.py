"""Keep delivery running: start it, watch it, and when it died or stands still, start it again.

- none is started before the lock of the last one is free and its wandb-core is gone
- one that makes no progress is killed together with its wandb-core: the SDK can hang for ever
- spawned from intake's main thread: delivery is killed by the kernel when that thread ends
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path

from sidestepd.errors import ExitCode
from sidestepd.processes import Lock, Pulse, kill_recorded, read_json

logger = logging.getLogger("sidestepd.keeper")

FIRST_BACKOFF_S = 0.1
KILL_WITHIN_S = 5.0
"""A process that hangs in the kernel is left to its lock."""
HEALTHY_AFTER_S = 10.0
"""A life this long resets the backoff."""


class DeliveryKeeper:
    """One run directory's delivery process, seen from intake."""

    def __init__(self, run_dir: Path, *, stall_s: float, backoff_s: float) -> None:
        self.run_dir = run_dir
        self.restarts = 0
        self.done = False
        """Delivery finished the run."""
        self._stall_s = stall_s
        self._longest_backoff_s = backoff_s
        self._backoff = FIRST_BACKOFF_S
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._retry_at = 0.0
        self._watched_from = 0.0
        self._pulse = Pulse(run_dir / "delivery.beat")

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process else None

    def tend(self, now: float) -> None:
        """Do what is due at `now` (monotonic seconds)."""
        if self.done:
            return
        if self._process is None:
            if now >= self._retry_at and self._neighbours_gone():
                self._start(now)
        elif (code := self._process.poll()) is not None:
            self._ended(code, now)
        elif self._stands_still(now):
            logger.error("delivery %d made no progress for %.0f s: killed", self._process.pid, self._stall_s)
            self._process.kill()

    def kill(self) -> None:
        """Kill delivery and its wandb-core; what they did not write down is sent again."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_WITHIN_S)
        kill_recorded(self._recorded_core())

    def _start(self, now: float) -> None:
        # -P: a queue.py in the directory of the training shall not be imported.
        module = [sys.executable, "-P", "-m", "sidestepd.delivery"]
        command = [*module, str(self.run_dir), "--parent", str(os.getpid())]
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        log = self.run_dir / "logs" / "delivery.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )
        self._started = self._watched_from = now

    def _ended(self, code: int, now: float) -> None:
        self._process = None
        if code == ExitCode.COMPLETE:
            self.done = True
            return
        self.restarts += 1
        if now - self._started >= HEALTHY_AFTER_S:
            self._backoff = FIRST_BACKOFF_S
        logger.warning("delivery ended with %d; started again in %.1f s", code, self._backoff)
        self._retry_at = now + self._backoff
        self._backoff = min(self._longest_backoff_s, 2 * self._backoff)

    def excuse(self, now: float) -> None:
        """This process itself stood still until `now`, and could not see whether delivery did."""
        self._watched_from = now

    def _stands_still(self, now: float) -> bool:
        return min(self._pulse.silence(now), now - self._watched_from) > self._stall_s

    def _neighbours_gone(self) -> bool:
        return Lock.is_free(self.run_dir / "delivery.lock") and kill_recorded(self._recorded_core())

    def _recorded_core(self) -> dict[str, float] | None:
        core: dict[str, float] | None = read_json(self.run_dir / "about.json").get("core")
        return core
