"""Which run of its launch a session means, where nobody named one: the first `init()` of each process the first
run, the second the second.

- a process that comes again with a new session said `init()` again: it means the run after the one it was in
- a process nobody has seen means the run its rank was in last (a fork, a restart), or for a new rank the first
- no I/O and no clock here; what is remembered is bounded by the ranks and by the runs that are open
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class _Launch:
    open: set[int] = field(default_factory=set)
    """The turns that have a run now."""
    ranks: dict[int, int] = field(default_factory=dict)
    """The turn each rank took last."""
    processes: dict[tuple[Any, ...], int] = field(default_factory=dict)
    """The turn each process took last, of those that are open."""


class Launches:
    """The turns of every launch that has an open run."""

    def __init__(self) -> None:
        self._launches: dict[str, _Launch] = {}

    def turn_of(self, hello: Mapping[str, Any]) -> int:
        """Which run of its launch a new session means, counted from 0; the caller opens it if it is not open."""
        launch = self._launches.get(hello["launch"]) or _Launch()
        if (last := launch.processes.get(_process(hello))) is not None:
            return last + 1
        if (last := launch.ranks.get(hello["rank"])) is None:
            return min(launch.open, default=0)
        return last if last in launch.open else min((it for it in launch.open if it > last), default=last + 1)

    def take(self, hello: Mapping[str, Any], turn: int) -> None:
        """A session is in this run of its launch."""
        launch = self._launches.setdefault(hello["launch"], _Launch())
        launch.open.add(turn)
        launch.ranks[hello["rank"]] = max(turn, launch.ranks.get(hello["rank"], 0))
        launch.processes[_process(hello)] = max(turn, launch.processes.get(_process(hello), 0))

    def closed(self, name: str, turn: int) -> None:
        """A run is over; a launch without one is forgotten."""
        launch = self._launches.get(name)
        if launch is None:
            return
        launch.open.discard(turn)
        launch.processes = {process: taken for process, taken in launch.processes.items() if taken != turn}
        if not launch.open:
            del self._launches[name]

    def __len__(self) -> int:
        return len(self._launches)


def _process(hello: Mapping[str, Any]) -> tuple[Any, ...]:
    return hello["node"], hello["pid"], hello["attempt"], hello["rank"]
