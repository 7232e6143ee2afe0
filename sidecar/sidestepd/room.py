"""How much may still be taken, and how a full disk is emptied again.

- what is acknowledged has yet to be written into the run: the room that counts is the spool's quota, and what is
  free on every disk on the way, wandb's own among them
- when room nears its end credit shrinks, then nothing is taken: workers keep what they have. What was taken stays
- the ballast is a file that holds room for nothing else. A full disk gets it, so that delivery can settle and
  intake delete; it is taken again when there is four times the room
- a full disk heals; any other error of a disk does not, and is nothing that is dealt with here
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sidestepd.errors import SpoolFull
from sidestepd.spool import Spool

logger = logging.getLogger(__name__)

SHRINK_AT, OPEN_AT, CLOSE_AT = 0.7, 0.8, 0.9
"""Credit shrinks from the first part of the room on; from the last on nothing is taken, until below the second."""
LEAST_CREDIT = 64 * 1024
BARE_BYTES = 1024 * 1024
"""With less than this a disk is as good as full."""
RETRY_S = 0.2
CLOSED_MARK = "spool.full"
"""A file whose presence tells `sidestep status` that nothing is taken."""


class Ballast:
    """A file of `size` bytes at `path` that can be given up."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    @property
    def held(self) -> bool:
        """Whether there is something to be given up."""
        return self.path.exists()

    def give_up(self) -> bool:
        """Let the disk have it; whether there was any."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        logger.warning("%s is given up, so that what was taken can be written out", self.path)
        return True

    def take(self) -> None:
        """Hold room, if there is plenty."""
        if not self.size or self.held or free_bytes(self.path.parent) < 4 * self.size:
            return
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self.size)
            finally:
                os.close(descriptor)
        except OSError as error:
            logger.warning("no ballast at %s: %s", self.path, error)
            self.path.unlink(missing_ok=True)

    def tend(self) -> None:
        """Take it where there is plenty, give it up where there is nothing left."""
        if self.held and free_bytes(self.path.parent) < BARE_BYTES:
            self.give_up()
        else:
            self.take()


def free_bytes(directory: Path) -> int:
    """What an ordinary user may still write there."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


class Room:
    """What intake asks before it takes a frame. `look` may run in another thread; it is called once at a time."""

    def __init__(self, spool: Spool, ballast: Ballast, disks: Iterable[Path], *, quota: int, reserve: int) -> None:
        self.taken = 0
        """Bytes of frames that were admitted, and may not have been there when it was measured."""
        self.closed = False
        """Nothing is taken."""
        self._spool, self._ballast, self._disks = spool, ballast, tuple(dict.fromkeys(disks))
        self._quota, self._reserve = quota, reserve
        self._used, self._free, self._ran_out = 0, reserve + quota, False
        self._mark = spool.path.with_name(CLOSED_MARK)

    def look(self) -> None:
        """Measure, and open or close accordingly; where room is short, what the spool lacks is given back."""
        self._ballast.tend()
        self._used, self._ran_out = self._spool.used_bytes(), False
        self._free = min(map(free_bytes, self._disks))
        if self.share >= SHRINK_AT:
            self._spool.shrink()
        if self.share >= CLOSE_AT:
            self._close(f"{self._used / 1e6:.1f} MB wait to be written out, {self._free / 1e6:.1f} MB are free")
        elif self.share <= OPEN_AT:
            self._open()

    @property
    def share(self) -> float:
        """How much of the room was used when it was measured; 1 is all of it."""
        return 1.0 if self._ran_out else self._share_with(0)

    @property
    def short(self) -> bool:
        """Whether workers are told to send less."""
        return self.closed or self.share > SHRINK_AT

    def _share_with(self, more: int) -> float:
        used, free = self._used + more, self._free - more
        return max(used / self._quota, (used + self._reserve) / max(free, 1))

    def fits(self, size: int) -> bool:
        """Whether `size` bytes are sure to be admitted."""
        return not self.closed and self._share_with(self.taken + size) < CLOSE_AT

    def admit(self, size: int) -> bool:
        """Whether a frame of `size` bytes may be taken; counts it if so."""
        if not self.closed and self._share_with(self.taken + size) >= CLOSE_AT:
            self._close(f"{(self._used + self.taken) / 1e6:.1f} MB wait to be written out")
        self.taken += 0 if self.closed else size
        return not self.closed

    def ran_out(self, why: object) -> None:
        """A commit failed for want of room."""
        self._ran_out = True
        self._ballast.give_up()
        self._close(why)

    def credit(self, most: int) -> int:
        """How many bytes a worker may have under way, of `most` when there is room."""
        if self.share <= SHRINK_AT:
            return most
        left = max(0.0, (CLOSE_AT - self.share) / (CLOSE_AT - SHRINK_AT))
        return max(LEAST_CREDIT, int(most * left))

    def facts(self) -> dict[str, Any]:
        """As plain values."""
        return {"share": round(self.share, 3), "closed": self.closed, "ballast": self._ballast.held}

    def _close(self, why: object) -> None:
        if not self.closed:
            self.closed = True
            logger.warning("no room for more, workers keep what they have: %s", why)
            with contextlib.suppress(OSError):  # the disk is full, after all
                self._mark.touch()

    def _open(self) -> None:
        if self.closed:
            self.closed = False
            logger.warning("there is room again")
        self._mark.unlink(missing_ok=True)


class Patience:
    """What delivery does while a disk is full: it gives its ballast, then waits, showing that it is not stuck."""

    def __init__(
        self,
        ballast: Ballast,
        disks: Iterable[Path],
        *,
        beat: Callable[[], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._ballast, self._disks = ballast, tuple(dict.fromkeys(disks))
        self._beat, self._sleep = beat, sleep
        self._waiting = False

    def wait_for_room(self) -> None:
        """Return when each disk can take some rows; where there is plenty, ballast is held again."""
        while min(map(free_bytes, self._disks)) < BARE_BYTES:
            if not self._ballast.give_up():
                self._wait()
        self._ballast.take()
        self._went_on()

    def when_full(self) -> None:
        """A commit failed for want of room: return when it is worth another try."""
        if not self._ballast.give_up():
            self._wait()

    def _wait(self) -> None:
        if not self._waiting:
            self._waiting = True
            logger.warning("a disk is full: rows wait until there is room")
        self._beat()
        self._sleep(RETRY_S)

    def _went_on(self) -> None:
        if self._waiting:
            self._waiting = False
            logger.warning("there is room again")


def open_spool(open_it: Callable[[], Spool], ballast: Ballast) -> Spool:
    """Open the spool; on a disk that is full, by giving up the ballast for it."""
    try:
        return open_it()
    except SpoolFull:
        if not ballast.give_up():
            raise
        return open_it()
