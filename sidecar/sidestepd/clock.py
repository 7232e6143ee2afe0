"""Time as the spool tells it: never back, not even when the machine's clock is set or the daemon starts again.

A spool time is seconds, near the wall clock's when the daemon started. Within one life of intake it is the
monotonic clock plus a fixed offset; intake writes that offset into the spool, so that delivery reads the
same clock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
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
        """Seconds, on from where the spool's last reader left them."""
        return time.monotonic() + self.offset
