"""Give calls without a step the step of the same call of the lowest rank.

Ranks need not make the same calls. The k-th call of a rank with certain names takes the step that the lowest rank
gave to its own k-th call with these names; what no other rank says goes on from the step before it.

- the lowest rank that uses certain names counts for itself, and never waits
- another one waits until that step is known, at most `patience` and only while a lower rank that has used these
  names is there; then it takes its own next step. Patience does not run against one that has not caught up
- for one patience after a launch's first such call on an axis, lower ranks are waited for whatever they used
- what a rank says alone between calls that are matched does not move it along: the next may lie before it
- what a session says leaves in the order in which it was said: behind a call that waits, its other calls wait
- calls that make one row (`commit=False`) have the session's count in common, and take one step
- what is remembered of calls is bounded: a call that is too old to be known is not matched
- no I/O and no clock here: callers pass `now`, which never goes back
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sidestepd.resolve import Booted, Heard, Joined, Left
from sidestepd.rows import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """Whether something that a session said waits here: it comes up to a patience after it was heard."""

    session: bytes
    waiting: bool


Event = Joined | Left | Heard | Booted | Waits | Part

MOST_NAMES = 1024
"""Sets of names remembered of a launch; the one that was not used for longest goes first."""
MOST_CALLS = 1000
"""Calls with the same names whose steps are remembered."""


class _At(NamedTuple):
    """Where a session is on an axis: the step that was given to its count."""

    own: int
    step: int


@dataclass(slots=True, kw_only=True)
class _Member:
    """A session that takes part. `more`: it has not caught up."""

    launch: str
    rank: int
    more: bool = False
    live: bool = True
    heard: dict[str, int] = field(default_factory=dict)
    """By axis, the session's count of the call heard last."""
    at: dict[str, _At] = field(default_factory=dict)
    following: set[str] = field(default_factory=set)
    """Axes on which a call of it took another rank's step."""


@dataclass(slots=True)
class _Calls:
    """The calls of a launch with certain names on one axis."""

    made: dict[int, int] = field(default_factory=dict)
    """How many each rank made."""
    steps: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By number, the step that was given and the rank that gave it."""
    forgotten: int = 0
    """Calls below this number are not known any more."""
    waiting: dict[int, dict[bytes, None]] = field(default_factory=dict)
    """By number, the sessions that wait for it."""

    def count(self, rank: int) -> int:
        """The number of a rank's next call."""
        number = self.made.get(rank, 0)
        self.made[rank] = number + 1
        return number

    def decide(self, number: int, rank: int, step: int) -> None:
        """Note the step of a call, unless a lower rank said its own."""
        known = self.steps.get(number)
        if number >= self.forgotten and (known is None or rank < known[1]):
            self.steps[number] = (step, rank)
            if len(self.steps) > MOST_CALLS:
                oldest = min(self.steps)
                del self.steps[oldest]
                self.forgotten = oldest + 1


@dataclass(slots=True)
class _Item:
    """A part that was heard at `since`; `calls` where it is a call without a step, and the first of its row."""

    part: Part
    since: float
    calls: _Calls | None = None
    number: int = 0


@dataclass(slots=True)
class _Queue:
    """What a session said and has not left. `left`: nothing comes after it."""

    items: deque[_Item]
    left: bool = False


class Matcher:
    """Calls without a step, of all launches."""

    def __init__(self, *, patience: float, capacity: int) -> None:
        self.patience = patience
        self.capacity = capacity
        """How much of what one session said may wait."""
        self._members: dict[bytes, _Member] = {}
        self._standing: dict[tuple[str, int], bytes] = {}
        """The session that stands for a rank of a launch."""
        self._calls: dict[str, OrderedDict[tuple[str, frozenset[str]], _Calls]] = {}
        self._began: dict[str, dict[str, float]] = {}
        """When the first call of each launch came, by axis."""
        self._queues: dict[bytes, _Queue] = {}
        self._decided: list[tuple[_Calls, int]] = []
        """Calls whose step became known while others wait for it."""

    def hear(self, said: Joined | Left | Heard | Booted | Part, now: float) -> Sequence[Event]:
        """What follows: what was said, unless it has to wait, and whatever waited for it."""
        match said:
            case Part():
                if said.call is None and not self._queues:
                    return (said,)
                return self._hear_part(said, now)
            case Booted():
                for member in self._members.values():
                    member.more = True
            case Joined():
                self._join(said)
                self._speaks(said.session, said.more)
            case Heard():
                self._speaks(said.session, said.more)
            case Left() if said.session in self._queues:
                self._queues[said.session].left = True
                return ()
            case Left():
                self._part_with(said.session)
        return (said,)

    def ready(self, now: float) -> list[Event]:
        """What has waited long enough by `now`."""
        leaving: list[Event] = []
        for session in list(self._queues):
            if session in self._queues:
                self._release(session, now, leaving)
                self._follow(now, leaving)
        return leaving

    def flush(self) -> list[Event]:
        """Everything leaves: nobody will speak again."""
        leaving: list[Event] = []
        while self._queues:
            session = min(self._queues, key=lambda it: self._members[it].rank)
            self._release(session, 0.0, leaving, forced=len(self._queues[session].items))
            self._follow(0.0, leaving)
        return leaving

    @property
    def waiting(self) -> int:
        """How much waits."""
        return sum(len(queue.items) for queue in self._queues.values())

    @property
    def parts(self) -> Iterator[Part]:
        """What waits."""
        return (item.part for queue in self._queues.values() for item in queue.items)

    # What is heard

    def _hear_part(self, part: Part, now: float) -> list[Event]:
        item, queue, leaving = self._item(part, now), self._queues.get(part.session), list[Event]()
        if queue is not None:
            queue.left = False
            queue.items.append(item)
            if len(queue.items) > self.capacity:
                self._release(part.session, now, leaving, forced=1)
        elif not self._leave(item, now, leaving):
            self._queues[part.session] = _Queue(deque([item]))
            leaving.append(Waits(session=part.session, waiting=True))
        self._follow(now, leaving)
        return leaving

    def _item(self, part: Part, now: float) -> _Item:
        """A part, with its number if it is a call that others may make too."""
        member = self._members.get(part.session)
        if part.call is None or member is None:
            return _Item(part, now)
        member.live = True
        if member.heard.get(part.axis) == part.call.own:
            return _Item(part, now)
        member.heard[part.axis] = part.call.own
        self._began.setdefault(member.launch, {}).setdefault(part.axis, now)
        calls = self._calls_of(member.launch, part.axis, part.call.names)
        return _Item(part, now, calls, calls.count(member.rank))

    def _speaks(self, session: bytes, more: bool) -> None:
        member, queue = self._members.get(session), self._queues.get(session)
        if member is not None:
            member.live, member.more = True, more
        if queue is not None:
            queue.left = False

    def _join(self, said: Joined) -> None:
        if said.world < 2:
            return  # nobody to be matched with
        self._members.setdefault(said.session, _Member(launch=said.launch, rank=said.rank))
        standing = self._members.get(self._standing.get((said.launch, said.rank), b""))
        if standing is None or not standing.live:
            self._standing[said.launch, said.rank] = said.session

    def _part_with(self, session: bytes) -> None:
        """A session left; when it was the last of its launch, nobody needs to know of its calls."""
        member = self._members.get(session)
        if member is not None:
            member.live = False
            if not any(it.live and it.launch == member.launch for it in self._members.values()):
                self._calls.pop(member.launch, None)
                self._began.pop(member.launch, None)

    def _calls_of(self, launch: str, axis: str, names: frozenset[str]) -> _Calls:
        known = self._calls.setdefault(launch, OrderedDict())
        key = (axis, names)
        calls = known.get(key)
        if calls is not None:
            known.move_to_end(key)
            return calls
        calls = known[key] = _Calls()
        if len(known) > MOST_NAMES:
            known.popitem(last=False)
        return calls

    # What leaves

    def _leave(self, item: _Item, now: float, leaving: list[Event], *, forced: bool = False) -> bool:
        """Let a part leave, with its step; False if it has to wait."""
        member = self._members.get(item.part.session)
        if item.part.call is None or member is None:
            leaving.append(item.part)
            return True
        step, leads = self._step(item, member, now, forced)
        if step is None:
            return False
        leaving.append(self._give(item, member, step, leads))
        return True

    def _give(self, item: _Item, member: _Member, step: int, leads: bool) -> Part:
        """The part at its step, which is noted for its session and for those that wait for it."""
        part, calls = item.part, item.calls
        assert part.call is not None
        member.at[part.axis] = _At(part.call.own, step)
        if not leads:
            member.following.add(part.axis)
        if calls is not None:
            calls.decide(item.number, member.rank, step)
            if item.number in calls.waiting:
                self._decided.append((calls, item.number))
        moves = not leads or part.axis not in member.following
        return part if step == part.step and moves else replace(part, step=step, moves=moves)

    def _step(self, item: _Item, member: _Member, now: float, forced: bool) -> tuple[int | None, bool]:
        """The step of a call, and whether it is its own; None if it has to wait for a lower rank's."""
        part, calls = item.part, item.calls
        if calls is not None:
            known = calls.steps.get(item.number)
            if known is not None and known[1] < member.rank and (not part.used or known[0] == part.step):
                return known[0], False
            waits = not forced and not part.used and item.number >= calls.forgotten
            if waits and self._is_to_come(item, calls, member, now):
                calls.waiting.setdefault(item.number, {})[part.session] = None
                return None, True
        return part.step if part.used else _own_step(part, member.at), True

    def _is_to_come(self, item: _Item, calls: _Calls, member: _Member, now: float) -> bool:
        """Whether a lower rank may still say its own in time."""
        launch, patience = member.launch, self.patience
        if now < self._began[launch].get(item.part.axis, now) + patience and any(
            self._may_speak(launch, rank) for rank in range(member.rank)
        ):
            return True
        lower = [self._members[self._standing[launch, rank]] for rank in calls.made if rank < member.rank]
        return any(it.live and (it.more or now < item.since + patience) for it in lower)

    def _may_speak(self, launch: str, rank: int) -> bool:
        """Whether a rank is live, or has not come yet."""
        session = self._standing.get((launch, rank))
        return session is None or self._members[session].live

    def _release(self, session: bytes, now: float, leaving: list[Event], *, forced: int = 0) -> None:
        """Let leave what a session said and need not wait; the first `forced` must not wait any more."""
        queue = self._queues[session]
        while queue.items and self._leave(queue.items[0], now, leaving, forced=forced > 0):
            queue.items.popleft()
            forced -= 1
        if not queue.items:
            del self._queues[session]
            leaving.append(Waits(session=session, waiting=False))
            if queue.left:
                self._part_with(session)
                leaving.append(Left(session))

    def _follow(self, now: float, leaving: list[Event]) -> None:
        """Let leave what waited for steps that became known."""
        while self._decided:
            calls, number = self._decided.pop()
            for session in calls.waiting.pop(number, ()):
                if session in self._queues:
                    self._release(session, now, leaving)

    # What outlives a crash

    def state(self) -> dict[str, Any]:
        """Who made which calls, as plain values. What waits is taken to be decided: it is not heard again."""
        at = {id_: dict(member.at) for id_, member in self._members.items()}
        given: dict[int, dict[int, tuple[int, int]]] = {}
        for session, queue in self._queues.items():
            for item in queue.items:
                part = item.part
                if part.call is not None and session in at:
                    step = part.step if part.used else _own_step(part, at[session])
                    at[session][part.axis] = _At(part.call.own, step)
                    if item.calls is not None:
                        given.setdefault(id(item.calls), {})[item.number] = (step, self._members[session].rank)
        return {
            "members": {
                id_: [it.launch, it.rank, it.more, it.live, it.heard, at[id_], sorted(it.following)]
                for id_, it in self._members.items()
            },
            "began": self._began,
            "standing": [[launch, rank, id_] for (launch, rank), id_ in self._standing.items()],
            "calls": [
                [launch, axis, list(names), it.made, given.get(id(it), {}) | it.steps, it.forgotten]
                for launch, known in self._calls.items()
                for (axis, names), it in known.items()
            ],
            "left": [session for session, queue in self._queues.items() if queue.left],
        }

    def restore(self, state: Mapping[str, Any]) -> list[Left]:
        """Take up what `state` gave; the sessions are returned that had left, and were not let go yet."""
        self._began = {launch: dict(began) for launch, began in state["began"].items()}
        for id_, (launch, rank, more, live, heard, at, following) in state["members"].items():
            self._members[id_] = _Member(
                launch=launch,
                rank=rank,
                more=more,
                live=live,
                heard=dict(heard),
                at={axis: _At(*it) for axis, it in at.items()},
                following=set(following),
            )
        self._standing = {(launch, rank): id_ for launch, rank, id_ in state["standing"]}
        for launch, axis, names, made, steps, forgotten in state["calls"]:
            known = self._calls.setdefault(launch, OrderedDict())
            known[axis, frozenset(names)] = _Calls(
                dict(made), {number: (step, rank) for number, (step, rank) in steps.items()}, forgotten
            )
        for session in state["left"]:
            self._part_with(session)
        return [Left(session) for session in state["left"]]


def _own_step(part: Part, at: Mapping[str, _At]) -> int:
    """The step of a call if nobody is asked: on from the last one that was given on its axis."""
    assert part.call is not None
    last = at.get(part.axis)
    return part.step if last is None else last.step + part.call.own - last.own
