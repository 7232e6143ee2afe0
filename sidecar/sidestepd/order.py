"""Put steps back in order.

A row leaves when every session that holds its axis has moved past its step, or has let `patience` run out.

- rows leave in increasing step order per axis; what comes after its row left is *late*, and leaves at once
- a live session holds the axes it has spoken on; an axis it has not spoken on it holds for one patience,
  after the later of its HELLO and the axis's first row; so does a rank of a launch that has not come yet
- patience runs for a row from when it was first passed, or said by all that hold its axis; it does not run
  against a session that has not caught up, and runs afresh when intake starts; against one of which something
  waits to be matched it runs twice as long
- each attempt is ordered by itself: a session holds the axes of its own
- so are the rows that are a session's own: it alone holds them, and as long as it has said nothing else, nothing
  else waits for it
- who lets patience run out stops holding, until it speaks beyond what was released
- the buffer is bounded: when it is full the oldest row of the fullest axis leaves at once
- no I/O and no clock here: callers pass `now`, which never goes back
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from sidestepd.match import Event, Waits
from sidestepd.resolve import Booted, Heard, Joined, Left
from sidestepd.rows import Bundle, Cause, Part

NEVER = -1
"""The step of who has not spoken: below every step there is."""


@dataclass(slots=True, kw_only=True)
class _Member:
    """A live session. `more`: it has not caught up, so patience does not run against it.

    `waits`: something that it said is still to be matched. `counts`: it has rows of its own.
    """

    joined: float
    launch: str = ""
    attempt: int = 0
    more: bool = False
    waits: bool = False
    counts: bool = False


@dataclass(slots=True, kw_only=True)
class _Launch:
    """Processes started together: ranks that are still to come hold every axis for one patience."""

    world: int
    attempt: int = 0
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
    """The rows of one axis in one attempt, and how far each session has come on it.

    `owner` is the session whose own rows they are; b"" if they are everybody's.
    """

    name: str
    attempt: int
    owner: bytes = b""
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

    def __init__(self, *, patience: float, capacity: int, released: Iterable[tuple[str, int, int]] = ()) -> None:
        """`released` are axes, attempts, and the highest steps that left in an earlier life."""
        self.patience = patience
        self.capacity = capacity
        self._members: dict[bytes, _Member] = {}
        self._launches: dict[str, _Launch] = {}
        self._axes: dict[tuple[str, int, bytes], _Axis] = {}
        self._late: dict[tuple[str, int, int, bytes], list[Part]] = {}
        for name, attempt, step in released:
            self._axis(name, attempt).released = step

    # What is heard

    def hear(self, said: Event, now: float) -> None:
        """Take in what a session said, at spool time `now`."""
        match said:
            case Part():
                self._add(said, now)
            case Heard():
                self._member(said.session, now).more = said.more
            case Waits():
                self._member(said.session, now).waits = said.waiting
            case Joined():
                self._join(said, now)
            case Left():
                self._leave(said.session)
            case Booted():
                self._boot(now)

    def _join(self, said: Joined, now: float) -> None:
        launch = self._launches.setdefault(said.launch, _Launch(world=said.world, attempt=said.attempt))
        launch.ranks.add(said.rank)
        member = self._member(said.session, now)
        member.launch, member.attempt, member.more = said.launch, said.attempt, said.more

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

    def _axis(self, name: str, attempt: int, owner: bytes = b"") -> _Axis:
        axis = self._axes.get((name, attempt, owner))
        if axis is None:
            axis = self._axes[name, attempt, owner] = _Axis(name=name, attempt=attempt, owner=owner)
        return axis

    def _add(self, part: Part, now: float) -> None:
        member, axis = self._member(part.session, now), self._axis(part.axis, part.attempt, part.owner)
        member.counts = member.counts or part.apart != ""
        launch = self._launches.get(member.launch)
        if launch is not None and launch.spoke is None:
            launch.spoke = now
        axis.first_row = min(axis.first_row, now)
        if part.moves or part.session not in axis.reached:
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
            self._late.setdefault((part.axis, part.attempt, part.step, part.owner), []).append(part)
            return
        row = axis.row(part.step)
        row.parts.append(part)
        if part.step < axis.highest and row.since is None:
            row.since = now

    # What leaves

    def ready(self, now: float) -> list[Bundle]:
        """The rows that may leave by `now`: late ones first, then those of all axes as they were said."""
        by_axis = [list(self._leave_axis(axis, now)) for axis in self._axes.values() if axis.rows]
        leaving = [*self._leave_late(), *_by_time(by_axis), *self._leave_forced()]
        for key in [key for key, it in self._axes.items() if it.owner and not it.rows and not it.reached]:
            del self._axes[key]  # its session left
        return leaving

    def flush(self) -> list[Bundle]:
        """Everything leaves: nobody will speak again."""
        by_axis = [[self._release(axis, "closing") for _ in axis.rows.copy()] for axis in self._axes.values()]
        return [*self._leave_late(), *_by_time(by_axis)]

    def _leave_late(self) -> Iterator[Bundle]:
        for (name, attempt, step, _), parts in sorted(self._late.items()):
            yield Bundle(axis=name, attempt=attempt, step=step, parts=tuple(parts), cause="late")
        self._late.clear()

    def _leave_axis(self, axis: _Axis, now: float) -> Iterator[Bundle]:
        watermark = self._watermark(axis, now)
        while axis.steps:
            row = axis.rows[axis.steps[0]]
            if row.step < watermark:
                yield self._release(axis, "passed")
                continue
            if row.since is None and row.step == watermark == axis.highest:
                row.since = now
            if not self._out_of_patience(axis, row, now):
                return
            self._let_go(axis, row.step)
            yield self._release(axis, "patience")
            watermark = self._watermark(axis, now)

    def _watermark(self, axis: _Axis, now: float) -> float:
        """The step below which everyone who holds the axis has moved on; infinity if nobody holds it."""
        launches = self._launches.values()
        if not axis.owner and (
            any(it.attempt == axis.attempt and it.gathering(now, self.patience) for it in launches)
            or any(self._is_newcomer(session, axis, now) for session in self._members)
        ):
            return NEVER
        return min((axis.reached[session] for session in axis.holding), default=math.inf)

    def _is_newcomer(self, session: bytes, axis: _Axis, now: float) -> bool:
        """Whether a live session has not spoken on the axis and still may, in time."""
        if session in axis.reached:  # as mostly
            return False
        member = self._members[session]
        if not _may_come(session, member, axis):
            return False
        return member.more or now < max(member.joined, axis.first_row) + self.patience

    def _out_of_patience(self, axis: _Axis, row: _Pending, now: float) -> bool:
        if row.since is None or now < row.since + self.patience:
            return False
        twice = row.since + 2 * self.patience
        return not any(
            (member.more or (member.waits and now < twice)) and axis.reached.get(session, NEVER) <= row.step
            for session, member in self._members.items()
            if session in axis.holding or _may_come(session, member, axis)
        )

    def _let_go(self, axis: _Axis, step: int) -> None:
        """Stop waiting for the sessions that did not reach `step`."""
        axis.holding = {session for session in axis.holding if axis.reached[session] >= step}

    def _leave_forced(self) -> Iterator[Bundle]:
        waiting = sum(len(axis.rows) for axis in self._axes.values())
        while waiting > self.capacity:
            axis = max(self._axes.values(), key=lambda axis: len(axis.rows))
            waiting -= 1
            yield self._release(axis, "forced")

    def _release(self, axis: _Axis, cause: Cause) -> Bundle:
        row = axis.pop()
        axis.released = row.step
        return Bundle(axis=axis.name, attempt=axis.attempt, step=row.step, parts=tuple(row.parts), cause=cause)

    # What outlives a crash

    @property
    def waiting(self) -> int:
        """Rows in the buffer."""
        return sum(len(axis.rows) for axis in self._axes.values())

    def state(self) -> dict[str, Any]:
        """Who is live and how far each came, as plain values; rows are not in it."""
        return {
            "members": {
                id_: [m.launch, m.attempt, m.joined, m.more, m.counts] for id_, m in self._members.items()
            },
            "launches": {n: [x.world, x.attempt, sorted(x.ranks), x.spoke] for n, x in self._launches.items()},
            "axes": [
                [a.name, a.attempt, a.highest, a.first_row, a.reached, sorted(a.holding), a.owner]
                for a in self._axes.values()
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave; what was released is told to the constructor."""
        for id_, (launch, attempt, joined, more, *counts) in state["members"].items():
            self._members[id_] = _Member(
                launch=launch, attempt=attempt, joined=joined, more=more, counts=any(counts)
            )
        for name, (world, attempt, ranks, spoke) in state["launches"].items():
            self._launches[name] = _Launch(world=world, attempt=attempt, ranks=set(ranks), spoke=spoke)
        for name, attempt, highest, first_row, reached, holding, *owner in state["axes"]:
            axis = self._axis(name, attempt, *owner)
            axis.highest, axis.first_row = highest, first_row
            axis.reached, axis.holding = dict(reached), set(holding)


def _may_come(session: bytes, member: _Member, axis: _Axis) -> bool:
    """Whether a live session that has not spoken on an axis may still do so."""
    mine = not axis.owner and not member.counts
    return mine and session not in axis.reached and member.attempt == axis.attempt


def _by_time(by_axis: Iterable[list[Bundle]]) -> list[Bundle]:
    """Rows of several axes in the order in which they were said, each axis in the order of its steps.

    So a row that waits for the next one of the main axis meets the one that was said next, even if many leave at
    once because somebody was waited for.
    """
    found = [bundles for bundles in by_axis if bundles]
    if len(found) == 1:
        return found[0]
    timed = []
    for bundles in found:
        newest = -math.inf
        for bundle in bundles:
            newest = max(newest, min(part.time for part in bundle.parts))
            timed.append((newest, bundle))
    return [bundle for _, bundle in sorted(timed, key=itemgetter(0))]
