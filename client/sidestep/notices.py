"""Say each thing once.

- one warning per cause, through the logger "sidestep"; the counters, not the log, say how often
- a cause that a user's data can multiply (a name, a type) can not flood the log: after `MOST` there is silence
- saying something never raises
"""

from __future__ import annotations

import logging
from collections.abc import Hashable

MOST = 200
"""Causes told apart, in one process."""

logger = logging.getLogger("sidestep")


class Notices:
    """What a process has said already."""

    __slots__ = ("_said",)

    def __init__(self) -> None:
        self._said: set[Hashable] = set()

    def once(self, cause: Hashable, text: str) -> None:
        """Warn with `text`, unless something was said about `cause` before."""
        if cause in self._said or len(self._said) > MOST:
            return
        self._said.add(cause)
        if len(self._said) > MOST:
            text = "there were too many different warnings: further ones are counted and not shown"
        say(text)


def say(text: str) -> None:
    """Warn, whatever handlers the program has given its loggers."""
    try:
        logger.warning("sidestep: %s", text)
    except Exception:  # noqa: BLE001 - a foreign handler's failure must not reach the training loop
        pass
