"""Which launch and which attempt a session belongs to, and whether it stands for its rank.

- a launch is told by its name and its restart count; a rank that is seen again after its BYE opens another one
- a higher restart count is a new *attempt* of the run, which is ordered anew; attempts are counted over the run,
  in the order in which they were first seen, and a launch that is new joins the one that is going on
- the first session of a rank stands for it; further ones, while that one lives, are its children: forked, or
  spawned with their parent's environment
- a launch's base on an axis is fixed when it first appears: 0, or one past the highest step seen until then
- a process that nobody numbered, and that comes while another launch lives, is beside that, as a child is
- everything follows from the HELLOs and BYEs, in their order
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Launch:
    """Processes started together, in one attempt."""

    name: str
    restarts: int
    number: int
    """The how-manieth of its name and restart count, from 0."""
    attempt: int
    world: int
    bases: dict[str, int]
    """Where counted steps begin, by axis."""
    ranks: dict[int, bytes] = field(default_factory=dict)
    """The session that stands for each rank."""
    done: set[int] = field(default_factory=set)
    """Ranks that said BYE."""

    @property
    def key(self) -> str:
        """What it is called behind the spool."""
        restarts = f"~{self.restarts}" if self.restarts else ""
        return f"{self.name}{restarts}#{self.number}"

    @property
    def over(self) -> bool:
        """Whether every rank came and went."""
        return len(self.done) >= self.world

    @property
    def sessions(self) -> list[bytes]:
        """Those that stand for ranks which are not known to have gone."""
        return [] if self.over else [id_ for rank, id_ in self.ranks.items() if rank not in self.done]

    def takes(self, rank: int) -> bool:
        """Whether a session of this rank may belong to it."""
        return rank not in self.done and not self.over


class Launches:
    """Every launch of the run."""

    def __init__(self) -> None:
        self.attempt = 0
        """The newest attempt of the run."""
        self._launches: dict[str, Launch] = {}
        self._by_start: dict[tuple[str, int], list[Launch]] = {}
        self._restarts: dict[str, int] = {}

    def __getitem__(self, key: str) -> Launch:
        return self._launches[key]

    def join(self, *, name: str, restarts: int, rank: int, world: int, highest: Mapping[str, int]) -> Launch:
        """The launch of a new session; `highest` is the highest step seen of each axis."""
        for launch in self._by_start.get((name, restarts), ()):
            if launch.takes(rank):
                launch.world = max(world, launch.world)
                return launch
        return self._open(name, restarts, world, {axis: step + 1 for axis, step in highest.items()})

    def others(self, launch: Launch) -> Iterator[bytes]:
        """The sessions that stand for ranks of other launches."""
        return (id_ for it in self._launches.values() if it.name != launch.name for id_ in it.sessions)

    def _open(self, name: str, restarts: int, world: int, bases: dict[str, int]) -> Launch:
        number = len(self._by_start.get((name, restarts), ()))
        launch = Launch(
            name=name,
            restarts=restarts,
            number=number,
            attempt=self._attempt_of(name, restarts),
            world=world,
            bases=bases,
        )
        self._add(launch)
        return launch

    def _attempt_of(self, name: str, restarts: int) -> int:
        """A new one if these are the first to be started again so often."""
        known = self._restarts.get(name)
        if known is not None and restarts < known:
            return next((it.attempt for it in self._by_start.get((name, restarts), ())), 0)  # a straggler
        if known is not None and restarts > known:
            self.attempt += 1
        return self.attempt

    def _add(self, launch: Launch) -> None:
        self._launches[launch.key] = launch
        self._by_start.setdefault((launch.name, launch.restarts), []).append(launch)
        self._restarts[launch.name] = max(launch.restarts, self._restarts.get(launch.name, 0))

    def state(self) -> list[dict[str, Any]]:
        """As plain values."""
        return [{**asdict(launch), "done": sorted(launch.done)} for launch in self._launches.values()]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Take up what `state` gave."""
        for facts in state:
            launch = Launch(**{**facts, "done": set(facts["done"])})
            self._add(launch)
            self.attempt = max(self.attempt, launch.attempt)
