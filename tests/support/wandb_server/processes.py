"""The command `sidestep`, led to the stand-in server and to nothing else outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.wandb_server.client import KEY, StandIn

SIDESTEP = [sys.executable, "-m", "sidestep"]


def sidestep(*words: str, server: StandIn | None, key: str = KEY, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    environment = _environment(server, key)
    return subprocess.run(
        [*SIDESTEP, *words], env=environment, cwd=cwd, capture_output=True, text=True, timeout=200
    )


def start_sidestep(*words: str, server: StandIn | None, cwd: Path) -> subprocess.Popen[bytes]:
    """Start it."""
    return subprocess.Popen([*SIDESTEP, *words], env=_environment(server, KEY), cwd=cwd, stderr=subprocess.DEVNULL)


def _environment(server: StandIn | None, key: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SIDESTEP_", "WANDB_"))}
    return own | ({**server.environment, "WANDB_API_KEY": key} if server else {})
