"""Put steps back in order.

A row leaves when every session that holds its axis has moved past its step, or has let `patience` run out.

- rows leave in increasing step order per axis; what comes after its row left is *late*, and leaves at once
- a live session holds the axes it has spoken on; an axis it has not spoken on it holds for one patience,
  after the later of its HELLO and the axis's first row; so does a rank of a launch that has not come yet
- patience runs for a row from when it was first passed, or said by all that hold its axis; it does not run
  against a session that has not caught up, and runs afresh when intake starts
- who lets patience run out stops holding, until it speaks beyond what was released
- the buffer is bounded: when it is full the oldest row of the fullest axis leaves at once
- no I/O and no clock here: callers pass `now`, which never goes back
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sidestepd.resolve import Booted, Heard, Joined, Left
from sidestepd.rows import Bundle, Cause, Part

NEVER = -1
"""The step of who has not spoken: below every step there is."""


@dataclass(slots=True, kw_only=True)
class _Member:
    """A live session. `more`: it has not caught up, so patience does not run against it."""

    joined: float
    launch: str = ""
    more: bool = False


@dataclass(slots=True, kw_only=True)
class _Launch:
    """Processes started together: ranks that are still to come hold every axis for one patience."""

    world: int
    ranks: set[int] = field(default_factory=set)
    spoke: float | None = None

    def gathering(self, now: float, patience: float) -> bool:
        return len(self.ranks) < self.world and self.spoke is not None and now < self.spoke + patience


@dataclass(slots=True, kw_only=True)
class _Pending:
    """A row that has not left. `since`: when patience began to run for it."""

    step: int
    parts: list[Part] = field(default_factory=list)
    since: float | None = None


@dataclass(slots=True, kw_only=True)
class _Axis:
    """The rows of one axis, and how far each session has come on it."""

    released: int = NEVER
    highest: int = NEVER
    first_row: float = math.inf
    reached: dict[bytes, int] = field(default_factory=dict)
    holding: set[bytes] = field(default_factory=set)
    rows: dict[int, _Pending] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)

    def row(self, step: int) -> _Pending:
        if step not in self.rows:
            self.rows[step] = _Pending(step=step)
            insort(self.steps, step)
        return self.rows[step]

    def pop(self) -> _Pending:
        return self.rows.pop(self.steps.pop(0))


class ReorderBuffer:
    """Rows of all axes, waiting for their sessions."""

    def __init__(self, *, patience: float, capacity: int, released: Mapping[str, int] | None = None) -> None:
        self.patience = patience
        self.capacity = capacity
        self.forced = 0
        self._members: dict[bytes, _Member] = {}
        self._launches: dict[str, _Launch] = {}
        self._axes: dict[str, _Axis] = {}
        self._late: dict[tuple[str, int], list[Part]] = {}
        for name, step in (released or {}).items():
            self._axis(name).released = step

    # What is heard

    def hear(self, said: Joined | Left | Heard | Booted | Part, now: float) -> None:
        """Take in what a session said, at spool time `now`."""
        match said:
            case Part():
                self._add(said, now)
            case Heard():
                self._member(said.session, now).more = said.more
            case Joined():
                self._join(said, now)
            case Left():
                self._leave(said.session)
            case Booted():
                self._boot(now)

    def _join(self, said: Joined, now: float) -> None:
        launch = self._launches.setdefault(said.launch, _Launch(world=said.world))
        launch.ranks.add(said.rank)
        member = self._member(said.session, now)
        member.launch, member.more = said.launch, said.more

    def _boot(self, now: float) -> None:
        """Nobody was heard of for a while: who is live may have a lot to say, and others are still to come."""
        for member in self._members.values():
            member.more = True
        for launch in self._launches.values():
            if launch.spoke is not None:
                launch.spoke = now
        for row in (row for axis in self._axes.values() for row in axis.rows.values()):
            if row.since is not None:
                row.since = now

    def _leave(self, session: bytes) -> None:
        self._members.pop(session, None)
        for axis in self._axes.values():
            axis.holding.discard(session)
            axis.reached.pop(session, None)

    def _member(self, session: bytes, now: float) -> _Member:
        """A session that speaks is live, also after its lease ended."""
        member = self._members.get(session)
        if member is None:
            member = self._members[session] = _Member(joined=now)
        return member

    def _axis(self, name: str) -> _Axis:
        return self._axes.setdefault(name, _Axis())

    def _add(self, part: Part, now: float) -> None:
        member, axis = self._member(part.session, now), self._axis(part.axis)
        launch = self._launches.get(member.launch)
        if launch is not None and launch.spoke is None:
            launch.spoke = now
        axis.first_row = min(axis.first_row, now)
        axis.reached[part.session] = max(part.step, axis.reached.get(part.session, NEVER))
        if part.step > axis.released or part.used:
            axis.holding.add(part.session)
        if part.step > axis.highest:
            self._pass(axis, part.step, now)
        if not part.used:
            self._store(part, axis, now)

    def _pass(self, axis: _Axis, step: int, now: float) -> None:
        """Patience begins to run for the row that was the newest."""
        newest = axis.rows.get(axis.highest)
        if newest is not None and newest.since is None:
            newest.since = now
        axis.highest = step

    def _store(self, part: Part, axis: _Axis, now: float) -> None:
        if part.step <= axis.released:
            self._late.setdefault((part.axis, part.step), []).append(part)
            return
        row = axis.row(part.step)
        row.parts.append(part)
        if part.step < axis.highest and row.since is None:
            row.since = now

    # What leaves

    def ready(self, now: float) -> list[Bundle]:
        """The rows that may leave by `now`: late ones first, then each axis in order of its steps."""
        bundles = list(self._leave_late())
        for name, axis in self._axes.items():
            if axis.rows:
                bundles.extend(self._leave_axis(name, axis, now))
        bundles.extend(self._leave_forced())
        return bundles

    def flush(self) -> list[Bundle]:
        """Everything leaves: nobody will speak again."""
        bundles = list(self._leave_late())
        for name, axis in self._axes.items():
            while axis.steps:
                bundles.append(self._release(name, axis, "closing"))
        return bundles

    def _leave_late(self) -> Iterator[Bundle]:
        for (name, step), parts in sorted(self._late.items()):
            yield Bundle(axis=name, step=step, parts=tuple(parts), cause="late")
        self._late.clear()

    def _leave_axis(self, name: str, axis: _Axis, now: float) -> Iterator[Bundle]:
        watermark = self._watermark(axis, now)
        while axis.steps:
            row = axis.rows[axis.steps[0]]
            if row.step < watermark:
                yield self._release(name, axis, "passed")
                continue
            if row.since is None and row.step == watermark == axis.highest:
                row.since = now
            if not self._out_of_patience(axis, row, now):
                return
            self._let_go(axis, row.step)
            yield self._release(name, axis, "patience")
            watermark = self._watermark(axis, now)

    def _watermark(self, axis: _Axis, now: float) -> float:
        """The step below which everyone who holds the axis has moved on; infinity if nobody holds it."""
        if any(launch.gathering(now, self.patience) for launch in self._launches.values()):
            return NEVER
        if any(self._is_newcomer(session, axis, now) for session in self._members):
            return NEVER
        return min((axis.reached[session] for session in axis.holding), default=math.inf)

    def _is_newcomer(self, session: bytes, axis: _Axis, now: float) -> bool:
        """Whether a live session has not spoken on the axis and still may, in time."""
        if session in axis.reached:
            return False
        member = self._members[session]
        return member.more or now < max(member.joined, axis.first_row) + self.patience

    def _out_of_patience(self, axis: _Axis, row: _Pending, now: float) -> bool:
        if row.since is None or now < row.since + self.patience:
            return False
        return not any(
            member.more and axis.reached.get(session, NEVER) <= row.step
            for session, member in self._members.items()
            if session in axis.holding or session not in axis.reached
        )

    def _let_go(self, axis: _Axis, step: int) -> None:
        """Stop waiting for the sessions that did not reach `step`."""
        axis.holding = {session for session in axis.holding if axis.reached[session] >= step}

    def _leave_forced(self) -> Iterator[Bundle]:
        waiting = sum(len(axis.rows) for axis in self._axes.values())
        while waiting > self.capacity:
            name, axis = max(self._axes.items(), key=lambda item: len(item[1].rows))
            self.forced += 1
            waiting -= 1
            yield self._release(name, axis, "forced")

    def _release(self, name: str, axis: _Axis, cause: Cause) -> Bundle:
        row = axis.pop()
        axis.released = row.step
        return Bundle(axis=name, step=row.step, parts=tuple(row.parts), cause=cause)

    # What outlives a crash

    @property
    def waiting(self) -> int:
        """Rows in the buffer."""
        return sum(len(axis.rows) for axis in self._axes.values())

    def state(self) -> dict[str, Any]:
        """Who is live and how far each came, as plain values; rows are not in it."""
        return {
            "members": {id_: [m.launch, m.joined, m.more] for id_, m in self._members.items()},
            "launches": {n: [x.world, sorted(x.ranks), x.spoke] for n, x in self._launches.items()},
            "axes": {n: [a.highest, a.first_row, a.reached, sorted(a.holding)] for n, a in self._axes.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave; what was released is told to the constructor."""
        for id_, (launch, joined, more) in state["members"].items():
            self._members[id_] = _Member(launch=launch, joined=joined, more=more)
        for name, (world, ranks, spoke) in state["launches"].items():
            self._launches[name] = _Launch(world=world, ranks=set(ranks), spoke=spoke)
        for name, (highest, first_row, reached, holding) in state["axes"].items():
            axis = self._axis(name)
            axis.highest, axis.first_row = highest, first_row
            axis.reached, axis.holding = dict(reached), set(holding)
