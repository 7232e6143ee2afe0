"""What a sampler is: something that reads a source when asked, and rests in between.

- a sampler is naive: it may take long, and it may raise. Its thread, `Pace`, is what copes with that
- each has a thread of its own, so that one that hangs holds up no other
- what is read at a moment leaves as one record, by names of `names.py`
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

logger = logging.getLogger("sidestepd.samplers")

LONGEST_REST_S = 0.5
"""How long a sampler rests at once: stopping waits for that."""
LONGEST_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something that people should hear of now; `level` is INFO, WARN or ERROR."""

    title: str
    text: str
    level: str = "WARN"


class StartAnew(Exception):
    """What a sampler reads can only be read by a process that starts now; `notice` tells people of it."""

    def __init__(self, notice: Notice) -> None:
        super().__init__(notice.text)
        self.notice = notice


@dataclass(slots=True, kw_only=True)
class Reading:
    """What was read at one moment. `gpus` maps UUIDs to numbers, where that has changed."""

    values: dict[str, float] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)
    gpus: Mapping[str, int] | None = None

    def __bool__(self) -> bool:
        return bool(self.values or self.notices or self.gpus is not None)


class Sampler(Protocol):
    """One source."""

    def read(self, now: float) -> Reading:
        """What there is at `now` (monotonic seconds). May take long, may raise; StartAnew ends the process."""
        ...

    def rest(self, seconds: float) -> Reading:
        """Wait that long at most, for what the source tells by itself, if it does."""
        ...

    def close(self) -> None:
        """Let go of the source."""
        ...


class Pace:
    """The loop of one sampler's thread: read, tell, rest; after a failure rest longer."""

    def __init__(
        self, sampler: Sampler, tell: Callable[[Reading], None], stop: threading.Event, *, interval_s: float
    ) -> None:
        self.sampler, self.tell, self.stop = sampler, tell, stop
        self.interval_s = interval_s
        self.failures = 0
        self._in_a_row = 0

    def run(self) -> None:
        """Until `stop` is set."""
        due = time.monotonic()
        while not self.stop.is_set():
            due = max(due + self._one(), time.monotonic())
            while (left := due - time.monotonic()) > 0 and not self.stop.is_set():
                self._rest(min(left, LONGEST_REST_S))
        self.sampler.close()

    def _rest(self, seconds: float) -> None:
        self._guard(lambda: self.sampler.rest(seconds))

    def _one(self) -> float:
        """Read once; returns how long to rest after it."""
        if self._guard(lambda: self.sampler.read(time.monotonic())):
            self._in_a_row = 0
            return self.interval_s
        self._in_a_row += 1
        return max(self.interval_s, min(self.interval_s * 2.0 ** min(self._in_a_row, 10), LONGEST_BACKOFF_S))

    def _guard(self, read: Callable[[], Reading]) -> bool:
        try:
            reading = read()
        except StartAnew as wish:
            self.tell(Reading(notices=[wish.notice]))
            self.stop.set()
            return True
        except Exception:
            self.failures += 1
            if self._in_a_row == 0:
                logger.exception("%s failed, and is tried again", type(self.sampler).__name__)
            self.stop.wait(LONGEST_REST_S)
            return False
        if reading:
            self.tell(reading)
        return True


class Rates:
    """Counters into how fast, and how much, they grow. One that went back began anew, and tells no rate once."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, float]] = {}
        self._began: dict[str, tuple[float, float]] = {}
        """What a counter began with, and its newest value."""

    def since_start(self, name: str, counter: float) -> float:
        """Its growth since it was given here first."""
        began, newest = self._began.get(name, (counter, counter))
        self._began[name] = (counter if counter < newest else began, counter)
        return counter - self._began[name][0]

    def per_s(self, name: str, counter: float, now: float) -> float | None:
        """Its growth per second since it was given last, or None if that can not be said."""
        before = self._last.get(name)
        self._last[name] = (now, counter)
        if before is None or now <= before[0] or counter < before[1]:
            return None
        return (counter - before[1]) / (now - before[0])
