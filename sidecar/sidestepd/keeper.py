"""Keep delivery running, or what a relay has instead: start it, watch it, and when it died, start it again.

- none is started before the lock of the last one is free and its wandb-core is gone
- one that makes no progress is killed together with its wandb-core: the SDK can hang for ever
- spawned from intake's main thread: delivery is killed by the kernel when that thread ends
- one that does not get going is told in `deaths.json`, with the last word of its log, until one lives
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from sidestepd.errors import ExitCode
from sidestepd.processes import Lock, Pulse, kill_recorded, read_json, write_json
from sidestepd.rundir import DEATHS

logger = logging.getLogger("sidestepd.keeper")

FIRST_BACKOFF_S = 0.1
KILL_WITHIN_S = 5.0
"""A process that hangs in the kernel is left to its lock."""
HEALTHY_AFTER_S = 10.0
"""A life this long resets the backoff."""
DEATHS_TO_TELL = 2
"""One death is what a restart is for; so many in a row are told."""
_LAST_WORDS_BYTES = 8192
_LONGEST_WORDS = 300


class DeliveryKeeper:
    """One run directory's delivery process, seen from intake."""

    def __init__(
        self, run_dir: Path, module: str = "sidestepd.delivery", *, stall_s: float, backoff_s: float
    ) -> None:
        self.run_dir, self._module = run_dir, module
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
        self._deaths = 0
        """Lives in a row that were short, or ended for standing still."""
        self._stood_still = False
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
            self._stood_still = True
            self._process.kill()
        elif self._deaths and now - self._started >= HEALTHY_AFTER_S and not self._is_silent(now):
            self._recovered()

    def kill(self) -> None:
        """Kill delivery and its wandb-core; what they did not write down is sent again."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_WITHIN_S)
        kill_recorded(self._recorded_core())

    def _start(self, now: float) -> None:
        # -P: a queue.py in the directory of the training shall not be imported.
        module = [sys.executable, "-P", "-m", self._module]
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
            self._recovered()
            self.done = True
            return
        self.restarts += 1
        self._tell(code, now)
        if now - self._started >= HEALTHY_AFTER_S:
            self._backoff = FIRST_BACKOFF_S
        logger.warning("delivery ended with %d; started again in %.1f s", code, self._backoff)
        self._retry_at = now + self._backoff
        self._backoff = min(self._longest_backoff_s, 2 * self._backoff)

    def _tell(self, code: int, now: float) -> None:
        """Say why there is no delivery, if that is more than an accident."""
        short = now - self._started < HEALTHY_AFTER_S
        self._deaths = self._deaths + 1 if short or self._stood_still else 1
        if self._deaths < DEATHS_TO_TELL and not self._stood_still:
            return
        why = f"stood still for {self._stall_s:.0f} s" if self._stood_still else f"ended with {_said(code)}"
        times = f", {self._deaths} times in a row" if self._deaths > 1 else ""
        last = last_words(self.run_dir / "logs" / "delivery.log")
        write_json(self.run_dir / DEATHS, {"what": f"delivery {why}{times}" + (last and f": {last}")})
        self._stood_still = False

    def _recovered(self) -> None:
        self._deaths = 0
        (self.run_dir / DEATHS).unlink(missing_ok=True)

    def excuse(self, now: float) -> None:
        """This process itself stood still until `now`, and could not see whether delivery did."""
        self._watched_from = now

    def _is_silent(self, now: float) -> bool:
        return self._pulse.silence(now) > HEALTHY_AFTER_S

    def _stands_still(self, now: float) -> bool:
        return min(self._pulse.silence(now), now - self._watched_from) > self._stall_s

    def _neighbours_gone(self) -> bool:
        return Lock.is_free(self.run_dir / "delivery.lock") and kill_recorded(self._recorded_core())

    def _recorded_core(self) -> dict[str, float] | None:
        core: dict[str, float] | None = read_json(self.run_dir / "about.json").get("core")
        return core


def last_words(log: Path) -> str:
    """What a log ends with, on one line: its last exception if that is what it ends with; "" if it is empty."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LAST_WORDS_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    traceback = max((at for at, line in enumerate(lines) if line.startswith("Traceback ")), default=None)
    if traceback is None:
        return next((line.strip()[:_LONGEST_WORDS] for line in reversed(lines) if line.strip()), "")
    error = next((at for at in range(traceback + 1, len(lines)) if not lines[at].startswith(" ")), len(lines))
    return " ".join(" ".join(lines[error:]).split())[:_LONGEST_WORDS]


def _said(code: int) -> str:
    if code >= 0:
        return str(code)
    try:
        return signal.Signals(-code).name
    except ValueError:
        return str(code)
