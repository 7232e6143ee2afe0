"""See processes of this node end, at the moment they do, whoever started them.

A pidfd becomes readable when its process ends, also as long as nobody has waited for it. Where the kernel has none
(before Linux 5.3, on macOS), nothing is seen, and the end of a session's lease must do.
"""

from __future__ import annotations

import os
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping


def is_here(node: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a worker's name of its node is this node's."""
    return bool(node) and node in (environ.get("SLURMD_NODENAME"), os.uname().nodename, environ.get("HOSTNAME"))


class Exits:
    """The processes that are followed; `tell` is called with what each is followed for."""

    def __init__(self, loop: AbstractEventLoop, tell: Callable[[bytes], None]) -> None:
        self._loop = loop
        self._tell = tell
        self._followed: dict[bytes, int] = {}

    def follow(self, what: bytes, pid: int) -> None:
        """Tell when the process `pid` ends; at once if it has."""
        if what in self._followed or pid <= 0 or not hasattr(os, "pidfd_open"):
            return
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._loop.call_soon(self._tell, what)
        except OSError:  # no such call, not allowed, or no descriptor to be had
            return
        else:
            self._followed[what] = descriptor
            self._loop.add_reader(descriptor, self._ended, what)

    def forget(self, what: bytes) -> None:
        """It ended as it should, or is of no more interest."""
        descriptor = self._followed.pop(what, None)
        if descriptor is not None:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)

    def _ended(self, what: bytes) -> None:
        self.forget(what)
        self._tell(what)
