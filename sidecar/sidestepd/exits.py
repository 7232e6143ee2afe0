"""See processes of this node end, at the moment they do, whoever started them.

A pidfd becomes readable when its process ends, also as long as nobody has waited for it, and is never another
process's. Where the kernel has none (before Linux 5.3, on macOS), who asks can still look; then nothing is told by
itself, and the end of a session's lease must do.
"""

from __future__ import annotations

import contextlib
import os
import select
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping

import psutil

from sidestep.ranks import NODE, pid_namespace


def is_here(node: str, environ: Mapping[str, str] = os.environ, *, pids: str = "") -> bool:
    """Whether a worker's name of its node is this node's, and its pid means the same here as there."""
    names = (environ.get(NODE), environ.get("SLURMD_NODENAME"), os.uname().nodename, environ.get("HOSTNAME"))
    return bool(node) and node in names and (not pids or pids == pid_namespace())


class Lifeline:
    """A process that is no child of ours, told apart from another one that gets its number."""

    def __init__(self, pid: int) -> None:
        self.descriptor: int | None = None
        """Becomes readable when the process ends, where the kernel has that. Closed when that was seen."""
        self._process: psutil.Process | None = None
        self._ended = pid <= 0
        try:
            if not self._ended and hasattr(os, "pidfd_open"):
                self.descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended = True
        except OSError:  # no such call, not allowed, or no descriptor to be had
            pass
        if self.descriptor is None and not self._ended:
            with contextlib.suppress(psutil.Error, ValueError):
                self._process = psutil.Process(pid)

    def is_alive(self) -> bool:
        """Whether it has not ended; false for one that was not there to begin with."""
        if self.descriptor is not None:
            poll = select.poll()
            poll.register(self.descriptor, select.POLLIN)
            if not poll.poll(0):
                return True
            self.close()
        if self._ended or self._process is None:
            return False
        try:
            return self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def close(self) -> None:
        """It ended, or is of no more interest."""
        self._ended = True
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class Exits:
    """The processes that are followed; `tell` is called with what each is followed for."""

    def __init__(self, loop: AbstractEventLoop, tell: Callable[[bytes], None]) -> None:
        self._loop = loop
        self._tell = tell
        self._followed: dict[bytes, Lifeline] = {}

    def follow(self, what: bytes, pid: int) -> None:
        """Tell when the process `pid` ends; at once if it has."""
        if what in self._followed or pid <= 0:
            return
        lifeline = Lifeline(pid)
        if lifeline.descriptor is not None:
            self._followed[what] = lifeline
            self._loop.add_reader(lifeline.descriptor, self._ended, what)
        elif not lifeline.is_alive():
            self._loop.call_soon(self._tell, what)

    def look(self) -> None:
        """Tell now of those that have ended; the loop would come to it later."""
        poll = select.poll()
        followed = {it.descriptor: what for what, it in self._followed.items() if it.descriptor is not None}
        for descriptor in followed:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(0):
            self._ended(followed[descriptor])

    def forget(self, what: bytes) -> None:
        """It ended as it should, or is of no more interest."""
        lifeline = self._followed.pop(what, None)
        if lifeline is not None and lifeline.descriptor is not None:
            self._loop.remove_reader(lifeline.descriptor)
            lifeline.close()

    def _ended(self, what: bytes) -> None:
        self.forget(what)
        self._tell(what)
