"""What a test has the server do instead of answering, for requests whose name fits a pattern.

A request's name is `graphql/OPERATION`, `file_stream` or `storage`. The kinds of faults:

    status   answered with that status, and not done
    late     answered after so many seconds
    hang     not answered until the faults are lifted
    cut      the connection is closed, nothing is done
    unsaid   it is done, and the connection closed before the answer
"""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Mapping
from typing import Any


class Faults:
    """The faults in force. For several threads."""

    def __init__(self) -> None:
        self._given: list[dict[str, Any]] = []
        self._changed = threading.Condition()

    def give(self, fault: Mapping[str, Any]) -> None:
        """Put one in force: `match`, `kind`, and `times` (how often, None for ever), `status`, `seconds`."""
        with self._changed:
            self._given.append(dict(fault))

    def lift(self) -> None:
        """No fault is in force; whoever hangs is answered."""
        with self._changed:
            self._given.clear()
            self._changed.notify_all()

    def take(self, name: str) -> Mapping[str, Any] | None:
        """The fault that befalls a request of this name."""
        with self._changed:
            for fault in self._given:
                if fnmatch.fnmatch(name, fault["match"]) and fault.get("times") != 0:
                    if fault.get("times"):
                        fault["times"] -= 1
                    return dict(fault)
        return None

    def wait_lifted(self) -> None:
        """Until there is none."""
        with self._changed:
            self._changed.wait_for(lambda: not self._given)
