"""How a process ends, as far as it can be seen from inside: an exit handler is not told the exit code.

- an exception that nobody caught, in any thread, is 1; Ctrl-C is 130; `sys.exit(code)` is what a shell sees of it
- `SystemExit` that is raised without `sys.exit`, and `os._exit`, go unseen
- hooks call those that were there before, and are given back
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

FAILED = 1
INTERRUPTED = 128 + signal.SIGINT


def watch(ends_with: Callable[[int], None]) -> Callable[[], None]:
    """Have the exit code told as soon as it is known; returns what stops the watching."""
    hook, thread_hook, leave = sys.excepthook, threading.excepthook, sys.exit

    def on_exception(kind: type[BaseException], *exception: Any) -> None:
        ends_with(INTERRUPTED if issubclass(kind, KeyboardInterrupt) else FAILED)
        hook(kind, *exception)

    def on_exception_of_thread(told: threading.ExceptHookArgs) -> None:
        if not issubclass(told.exc_type, SystemExit):
            ends_with(FAILED)
        thread_hook(told)

    def on_exit(status: Any = None) -> NoReturn:
        if threading.current_thread() is threading.main_thread():
            ends_with(as_seen_by_a_shell(status))
        leave(status)

    def stop() -> None:
        if sys.excepthook is on_exception:
            sys.excepthook = hook
        if threading.excepthook is on_exception_of_thread:
            threading.excepthook = thread_hook
        if sys.exit is on_exit:
            sys.exit = leave

    sys.excepthook, threading.excepthook, sys.exit = on_exception, on_exception_of_thread, on_exit
    return stop


def as_seen_by_a_shell(status: Any) -> int:
    """What `SystemExit(status)` comes to: nothing is 0, a number is itself within a byte, all else is 1."""
    if status is None:
        return 0
    return int(status) & 0xFF if isinstance(status, int) else FAILED
