"""Profiles of hypothesis: `default` tries the same examples each time, `nightly` tries many, and new ones.

HYPOTHESIS_PROFILE=nightly python -m pytest tests/unit

No test starts a daemon by accident, or has what it prints logged: those that want it say so.
"""

from __future__ import annotations

import os
import signal
import sys

from hypothesis import HealthCheck, settings

# A shell that starts a job in the background has it ignore Ctrl-C, and what it starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", settings.get_profile("default"), derandomize=False, max_examples=5_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
os.environ.setdefault("SIDESTEP_AUTOSTART", "0")
os.environ.setdefault("SIDESTEP_CONSOLE", "0")
os.environ.setdefault("SIDESTEP_PROGRAM", "0")

# Where Python may not keep what it compiled, each of the many processes that tests start compiles all of it anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
