"""Time as the spool tells it: never back, not even when the machine's clock is set or the daemon starts again.

A spool time is seconds, near the wall clock's when the daemon started. Within one life of intake it is the
monotonic clock plus a fixed offset. Delivery has no clock: time is what intake vouches for.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Clock(Protocol):
    """Tells the time when called."""

    def __call__(self) -> float:
        """Seconds; never less than before."""
        ...


@dataclass(frozen=True, slots=True)
class SpoolClock:
    """The monotonic clock, moved by `offset` seconds."""

    offset: float

    @classmethod
    def starting_after(cls, latest: float) -> SpoolClock:
        """A clock that starts at the wall clock's time, or at `latest` if that is later."""
        return cls(max(time.time(), latest) - time.monotonic())

    def __call__(self) -> float:
        """Seconds, on from where the spool's newest entry left them."""
        return time.monotonic() + self.offset


class Horizon:
    """The time up to which the spool holds all that workers said: a file whose time of change it is.

    Intake moves it after each commit, delivery reads it before it reads the spool. So time stands still for rows
    while intake is down, frozen or slow, in whatever order the two of them stop and go on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def move(self, to: float) -> None:
        """Everything that came before `to` is in the spool."""
        self.path.touch()
        nanoseconds = int(to * 1e9)
        os.utime(self.path, ns=(nanoseconds, nanoseconds))

    def __call__(self) -> float:
        """Where it is; 0 before intake has said."""
        try:
            return self.path.stat().st_mtime_ns / 1e9
        except FileNotFoundError:
            return 0.0
