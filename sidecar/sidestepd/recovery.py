"""What the run holds although the row log does not know of it: how delivery goes on when its memory is lost.

A row log that was damaged, emptied, or lost its last commits does not say which records are in the run. The run
does: each row tells its axes as data, and how many ranks spoke. The records are still in the spool, in the order
in which they were heard.

- a record is in the run when a row that the row log lacks holds its axis at its step and all its names, and not
  yet as many sessions were found for the row as spoke in it: those heard first are the ones
- a row says its attempt only where an earlier attempt came as far; one that does not is of a later attempt if it
  is from after that attempt's first word
- a row that is a process's own holds its call of the same time, and further ones of that call's step
- what is no longer in the spool was settled before it was deleted, so it counts as delivered, but for what is
  known to have been given up; only if the spool was lost too, what is missing is lost with it
- it is all found again from the run and the spool at each start, until nothing that was in the spool is unsettled
- no I/O and no clock here
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from sidestepd.rows import MAIN_AXIS, OWN_PREFIX, PROCESS, Part, Row

_RANKS, _ATTEMPT = "sidestep/ranks_reported", "sidestep/attempt"


@dataclass(slots=True)
class _Place:
    """What the run holds at one step of one axis and attempt.

    `ranks`: how many spoke, None if the row does not say; `time`: when the first of them did.
    """

    names: set[str] = field(default_factory=set)
    ranks: int | None = 0
    time: float = -math.inf
    sessions: set[bytes] = field(default_factory=set)


class Recovery:
    """The rows of the run that the row log lacks: `(_step, values)` of each."""

    def __init__(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        self.rows = 0
        self.last = -1
        """The highest `_step`."""
        self.released: dict[tuple[str, int], int] = {}
        """The highest step of each axis and attempt; one that is not said counts as the first."""
        self._places: dict[tuple[str, int, int], _Place] = {}
        self._own: dict[tuple[str, Any, float], Set[str]] = {}
        """The names of rows that are a process's own, by axis, process, and when they were said."""
        self._found: dict[tuple[bytes, str], tuple[int, Set[str]]] = {}
        """Of those, the step and the names of the last that was found, by session and axis."""
        self._began: dict[int, float] = {}
        """When the first word of each attempt was said."""
        for step, values in rows:
            self._add(step, values)

    def _add(self, step: int, values: Mapping[str, Any]) -> None:
        self.rows += 1
        self.last = max(self.last, step)
        said = values.get(_ATTEMPT, 0)
        attempt = said if type(said) is int else 0
        if (process := values.get(PROCESS)) is not None:
            for axis, _ in _axes(values):
                self._own[axis, process, float(values.get("_timestamp", 0.0))] = values.keys()
            return
        for axis, at in _axes(values):
            self.released[axis, attempt] = max(at, self.released.get((axis, attempt), at))
            place = self._places.setdefault((axis, attempt, at), _Place())
            place.names |= values.keys()
            place.time = max(place.time, float(values.get("_timestamp", place.time)))
            ranks = values.get(_RANKS) if axis == MAIN_AXIS else None
            place.ranks = None if ranks is None or place.ranks is None else place.ranks + ranks

    def holds(self, part: Part) -> bool:
        """Whether the run holds what `part` says. To be asked once of each, in the order of the spool."""
        if part.apart:
            return self._holds_own(part)
        place = self._place_of(part)
        if place is None or not all(_is_in(name, place.names) for name in part.values):
            return False
        if part.session not in place.sessions:
            if place.ranks is not None and len(place.sessions) >= place.ranks:
                return False
            place.sessions.add(part.session)
        return True

    def _holds_own(self, part: Part) -> bool:
        where = (part.session, part.axis)
        names = self._own.get((part.axis, part.apart, part.time))
        if names is not None:
            self._found[where] = (part.step, names)
        step, names = self._found.get(where, (-1, frozenset()))
        return step == part.step and all(_is_in(name, names) for name in part.values)

    def _place_of(self, part: Part) -> _Place | None:
        began = self._began[part.attempt] = min(part.time, self._began.get(part.attempt, part.time))
        place = self._places.get((part.axis, part.attempt, part.step))
        if place is None and part.attempt:
            place = self._places.get((part.axis, 0, part.step))
            return place if place is not None and place.time >= began else None
        return place

    @property
    def reached(self) -> dict[str, int]:
        """The highest step of each axis, in whatever attempt."""
        highest: dict[str, int] = {}
        for (axis, _), step in self.released.items():
            highest[axis] = max(step, highest.get(axis, step))
        return highest

    def over(self, marks: Mapping[str, Any], *, last: int = -1) -> dict[str, Any]:
        """The marks of the row log, moved up to what the run holds; its newest row may be at `last`."""
        released = {(axis, attempt): step for axis, attempt, step in marks["released"]}
        for place, step in self.released.items():
            released[place] = max(step, released.get(place, step))
        return {
            **marks,
            "last": max(marks["last"], self.last, last),
            "released": [[axis, attempt, step] for (axis, attempt), step in released.items()],
        }


def _axes(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The axes of a row, each with its step, which is elsewhere if a metric has its name."""
    for axis, shown in values.items():
        behind = axis.removeprefix(OWN_PREFIX)
        if not _is_axis(axis) or (behind != axis and behind in values and _is_axis(behind)):
            continue
        at = values.get(OWN_PREFIX + axis, shown)
        if type(at) is int:
            yield axis, at


def _is_axis(name: str) -> bool:
    return name == MAIN_AXIS or name.endswith("/step")


def _is_in(name: str, names: Set[str]) -> bool:
    """Whether a value said under `name` is among what was made of it."""
    return name in names or any(made.startswith((f"{name}.", f"{name}/rank")) for made in names)


def settled_before(
    first_kept: Mapping[bytes, int], rows: Iterable[tuple[Row, bool]], *, cursor: int, front: int, given_up: int
) -> tuple[int, int]:
    """How many records were delivered, and how many of rows of the row log lie in frames that are gone.

    `first_kept` is the first sequence of each session in the spool, `rows` those of the row log and whether each
    is settled, `front` the oldest entry of the spool, `given_up` the records known to be rejected, dropped, or
    folded into what is declared.
    """
    delivered, gone = sum(first_kept.values()) - given_up, 0
    for row, settled in rows:
        for position in row.positions:
            if settled and position.entry >= front:
                delivered += 1
            elif position.entry < front:
                gone += position.entry > cursor
                delivered -= not settled  # counted when it is confirmed
    return max(0, delivered), gone
