"""Tell a service manager how we are: systemd's sd_notify, which is one datagram.

- a watchdog is told that we live only when intake has just answered and its disk does too; whatever else would
  keep the service manager content is no sign of life
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from sidestepd.control import unwell

TELL_EVERY_S = 15.0
"""Without a watchdog, how often the status is told."""
MARGIN_S = 30.0
"""Beside the grace period, for stopping what did not stop by itself."""

Ask = Callable[[float], Mapping[str, Any] | None]
"""Has intake say how it is, within so many seconds."""


def notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send `READY=1` and the like; False where no service manager listens. Never raises."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(1.0)
            sender.sendto(state.encode(), address)
    except OSError:
        return False
    return True


def stopping(grace_s: float) -> str:
    """The word that we end, and how long that may take: whoever gave the grace period means it."""
    return f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int((grace_s + MARGIN_S) * 1e6)}"


class Watchdog:
    """Asks intake how it is, four times in the period that the service manager set, and passes on what is true.

    `beside` has more to tell, of what is no reason to start anything again.
    """

    def __init__(
        self,
        ask: Ask,
        environ: Mapping[str, str] = os.environ,
        pid: int | None = None,
        *,
        beside: Callable[[], str] = str,
    ) -> None:
        self._ask, self._environ, self._beside = ask, environ, beside
        self._listened_to = bool(environ.get("NOTIFY_SOCKET"))
        self._period_s = _period_s(environ, os.getpid() if pid is None else pid)
        self._next = 0.0

    def __call__(self) -> None:
        """To be called often; asks, and waits for the answer, only when it is due."""
        now = time.monotonic()
        if not self._listened_to or now < self._next:
            return
        every_s = self._period_s / 4 if self._period_s else TELL_EVERY_S
        self._next = now + every_s
        info = self._ask(min(1.0, every_s))
        why = unwell(info, self._period_s / 2) if self._period_s else unwell(info)
        if info is None or why:
            notify(f"STATUS={why}", self._environ)
        else:
            ping = "WATCHDOG=1\n" if self._period_s else ""
            words = "; ".join(filter(None, (_standing(info), self._beside())))
            notify(f"{ping}STATUS={words}", self._environ)


def _standing(info: Mapping[str, Any]) -> str:
    live = f"{info.get('live', 0)} workers"
    return f"{len(info['runs'])} runs, {live}" if "runs" in info else live


def _period_s(environ: Mapping[str, str], pid: int) -> float:
    """Within which the watchdog wants to hear from this process; 0 if there is none."""
    usec, whose = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    return int(usec) / 1e6 if usec.isdecimal() and whose in ("", str(pid)) else 0.0
