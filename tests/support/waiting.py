"""Wait for a condition, with a deadline, and say what was waited for when it does not come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(predicate: Callable[[], T], timeout: float = 30.0, message: str | Callable[[], str] = "") -> T:
    """The first true thing that `predicate` gives; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        found = predicate()
        if found:
            return found
        if time.monotonic() > deadline:
            why = message() if callable(message) else message
            raise AssertionError(f"not within {timeout:.0f} s: {why or predicate}")
        time.sleep(0.02)
