"""What keeps the runs of a daemon from where they shall go, told where its operators look: in its log.

- only what lasts until somebody does something, such as a key that is missing; what heals by itself, and when it
  began, is in `sidestep status`
- once when it begins and once when it is over, for each run
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sidestepd.processes import read_json
from sidestepd.rundir import TROUBLE

LOOK_EVERY_S = 2.0


class Hindrances:
    """Looks at the runs that are open, again and again; `now` is a monotonic time."""

    def __init__(self, open_runs: Callable[[], Sequence[Path]], say: Callable[[str], object]) -> None:
        self._open_runs, self._say = open_runs, say
        self._told: Mapping[Path, str] = {}
        self._next = 0.0

    def __call__(self, now: float) -> None:
        """To be called often."""
        if now < self._next:
            return
        self._next = now + LOOK_EVERY_S
        open_runs = self._open_runs()
        found = {run_dir: what for run_dir in open_runs if (what := _lasting(run_dir))}
        for run_dir, what in found.items():
            if self._told.get(run_dir) != what:
                self._say(f"{run_dir.name} waits: {what}")
        for run_dir in open_runs:
            if run_dir in self._told and run_dir not in found:
                self._say(f"{run_dir.name} goes on")
        self._told = found

    @property
    def words(self) -> str:
        """What was found last; "" if it was nothing."""
        return "; ".join(f"{run_dir.name} waits: {what}" for run_dir, what in self._told.items())


def _lasting(run_dir: Path) -> str:
    trouble = read_json(run_dir / TROUBLE)
    return str(trouble.get("what", "")) if trouble.get("lasting") else ""
