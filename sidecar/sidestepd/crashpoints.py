"""Named places where a test lets the process die, to show that nothing depends on where a crash comes.

`SIDESTEP_CRASH_AT=delivery.decided:7` kills the process with SIGKILL when it passes that place the seventh
time. Without the variable a place costs one comparison.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_NAME, _, _TIMES = os.environ.get("SIDESTEP_CRASH_AT", "").partition(":")
_passed: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Die here if the environment says so."""
    if name == _NAME:
        _passed[name] += 1
        if _passed[name] >= int(_TIMES or 1):
            os.kill(os.getpid(), signal.SIGKILL)
