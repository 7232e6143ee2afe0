"""Read the spool's entries: which axis and which step each record belongs to, and what was declared.

Everything learnt here follows from the entries alone, in their order: reading them again from a checkpoint
on, with the state as of that checkpoint, teaches the same. No clock, no I/O.

- a call belongs to one axis: its stage's, else the main one
- a counted step is the session's count, on from the base of its launch on that axis; the call says so, as long as
  it may be matched with that of another rank
- counted steps of a session for which no rank stands (a child, a process that nobody numbered beside another) are
  its own, on from what was said before it came; only steps that are named make rows together with others
- the value of a declared axis metric is in every row that needs it: if the call lacks it, the session's last,
  also where that metric is an axis of ours
- what can not be read is `Dead`, once per record, never an exception; so is a call of which nothing is left when
  the run has as many names as it may
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sidestep.wire import END_OF_STEPS, LANES, WORKER, Kind, Record, Undecodable, decode_records
from sidestepd.artifacts import logged_from
from sidestepd.attempts import Launches
from sidestepd.beside import described_from, printed_from
from sidestepd.entries import Entry, EntryKind
from sidestepd.quota import Names
from sidestepd.rows import MAIN_AXIS, Blob, Call, Described, Logged, Part, Position, Printed, Raised, Sampled
from sidestepd.rules import Rules, rule_from
from sidestepd.samples import alert_from, sampled_from


@dataclass(slots=True, kw_only=True)
class SessionFacts:
    """What a session said of itself, and how far it was read."""

    rank: int = 0
    world: int = 1
    node: str = ""
    launch: str = ""
    attempt: int = 0
    child: bool = False
    """Another session stands for its rank: this one was forked from it, or spawned by it."""
    apart: str = ""
    """The process, where steps that it counts are its own and nobody else's."""
    bases: dict[str, int] = field(default_factory=dict)
    """Where they begin, by axis."""
    local_rank: int = 0
    role: str = WORKER
    next: int = 0
    ended: str | None = None
    """"bye" or "lease", until it speaks again."""
    offered: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    final: int | None = None
    """The sequence after its last record, once it said BYE."""
    lost: int = 0
    """Records that were acknowledged and are in no entry: a spool was damaged or lost."""
    axis_values: dict[str, Any] = field(default_factory=dict)
    beside: str = ""
    """The session whose bytes it sends, in hexadecimal."""

    @property
    def is_worker(self) -> bool:
        """Whether it is a rank. A sampler is none: order never hears of it."""
        return self.role == WORKER


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A session is live: it began, or it came back."""

    session: bytes
    rank: int
    world: int
    launch: str
    more: bool
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Left:
    """A session ended, or was not heard of for a lease."""

    session: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A frame of a session was read to its end; `more`: it had not caught up."""

    session: bytes
    more: bool


@dataclass(frozen=True, slots=True)
class Booted:
    """Intake started: nobody has been heard of since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The run shall be finished."""

    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """`count` records, from `position` on, can not be read; unless `in_frame` they are in no entry at all."""

    position: Position
    count: int
    reason: str
    in_frame: bool = True


@dataclass(frozen=True, slots=True)
class Folded:
    """A record became part of what was declared: configuration, summary, definitions."""

    position: Position


@dataclass(frozen=True, slots=True)
class LaneEnded:
    """A session that sends blobs said its last word."""

    session: bytes


Said = (
    Joined | Left | Heard | Booted | Closed | Lost | Folded | Part | Sampled | Raised | Blob | LaneEnded
    | Printed | Described | Logged
)  # fmt: skip
Used = Callable[[Position], Mapping[str, int] | None]


class Resolver:
    """What every session said, up to the entry read last."""

    def __init__(self, rules: Rules | None = None, names: Names | None = None) -> None:
        self.rules = rules or Rules()
        self.names = names or Names()
        self.sessions: dict[bytes, SessionFacts] = {}
        self.config: dict[str, tuple[int, Any]] = {}
        """Name to (rank that set it, value)."""
        self.named: dict[str, tuple[int, Any]] = {}
        """What workers called the run since it was opened, likewise."""
        self.summary: dict[str, tuple[float, Any]] = {}
        """Name to (when it was set, value)."""
        self.folded = 0
        """Records that became part of this state."""
        self.dead: Counter[str] = Counter()
        self._highest: dict[str, int] = {}
        self._launches = Launches()

    def begin_behind(self, step: int) -> None:
        """The run holds rows up to `step` from before its first session: counted steps go on behind them."""
        self._highest[MAIN_AXIS] = step

    def read(self, entry: Entry, used: Used = lambda _: None) -> Iterator[Said]:
        """What one entry says; `used` tells the places of a row that holds a position already."""
        match entry.kind:
            case EntryKind.FRAME:
                yield from self._frame(entry, used)
            case EntryKind.BLOBS:
                yield from self._blobs(entry)
            case EntryKind.HELLO:
                yield from self._hello(entry)
            case EntryKind.BYE | EntryKind.LEASE:
                self._counters(entry)
                session = self._session(entry.session)
                yield from self._skip_to(entry.first, session, entry)
                session.ended = "bye" if entry.kind is EntryKind.BYE else "lease"
                if entry.kind is EntryKind.BYE:
                    session.final = entry.first
                    self._say_bye(entry.session, session)
                if session.is_worker:
                    yield Left(entry.session)
                elif session.role in LANES and entry.kind is EntryKind.BYE:
                    yield LaneEnded(entry.session)
            case EntryKind.COUNTERS:
                self._counters(entry)
                if "more" in entry.facts and self._session(entry.session).is_worker:
                    yield Heard(session=entry.session, more=bool(entry.facts["more"]))
            case EntryKind.BOOT:
                yield Booted()
            case EntryKind.CLOSE:
                yield Closed(exit_code=int(entry.facts.get("exit_code", 0)))

    def _session(self, session: bytes) -> SessionFacts:
        return self.sessions.setdefault(session, SessionFacts())

    def _hello(self, entry: Entry) -> Iterator[Said]:
        facts, session = entry.facts, self._session(entry.session)
        if not session.launch:  # it is new, or its first HELLO went down with a spool
            self._introduce(entry.session, session, facts)
        self._counters(entry)
        session.ended = None
        yield from self._skip_to(entry.first, session, entry)
        if session.is_worker:
            yield Joined(
                session=entry.session,
                rank=session.rank,
                world=session.world,
                launch=session.launch,
                attempt=session.attempt,
                more=bool(facts.get("more")),
            )

    def _introduce(self, id_: bytes, session: SessionFacts, facts: Mapping[str, Any]) -> None:
        session.rank, session.world, session.node = facts["rank"], facts["world"], facts["node"]
        session.local_rank, session.role = facts.get("local_rank", 0), facts.get("role", WORKER)
        session.beside = facts.get("beside", "")
        if not session.is_worker:
            session.launch = session.role
            return
        highest = dict(self._highest)
        launch = self._launches.join(
            name=facts["launch"],
            restarts=facts.get("attempt", 0),
            rank=session.rank,
            world=session.world,
            highest=highest,
        )
        session.launch, session.attempt = launch.key, launch.attempt
        elder = launch.ranks.get(session.rank)
        if elder is None or self._session(elder).ended:
            launch.ranks[session.rank] = id_
        else:
            session.child = True
        if session.child or (launch.world == 1 and self._lives(self._launches.others(launch))):
            session.apart = f"{session.node}:{facts.get('pid', 0)}"
            session.bases = {axis: step + 1 for axis, step in highest.items()}

    def _lives(self, sessions: Iterable[bytes]) -> bool:
        return any(not self._session(id_).ended for id_ in sessions)

    def _say_bye(self, id_: bytes, session: SessionFacts) -> None:
        if session.launch and session.is_worker and self._launches[session.launch].ranks.get(session.rank) == id_:
            self._launches[session.launch].done.add(session.rank)

    def _counters(self, entry: Entry) -> None:
        session, facts = self._session(entry.session), entry.facts
        session.offered = max(session.offered, facts.get("offered", 0))
        for reason, count in facts.get("dropped", {}).items():
            session.dropped[reason] = max(session.dropped.get(reason, 0), count)

    def _skip_to(self, first: int, session: SessionFacts, entry: Entry) -> Iterator[Said]:
        """Count the records between what was read and `first` as lost with a spool."""
        missing = first - session.next
        if missing > 0:
            yield self._lose(Position(entry.id, session.next), missing, "spool_lost", in_frame=False)
            session.lost += missing
            session.next = first

    def _lose(self, position: Position, count: int, reason: str, *, in_frame: bool = True) -> Lost:
        self.dead[reason] += count
        return Lost(position=position, count=count, reason=reason, in_frame=in_frame)

    def _frame(self, entry: Entry, used: Used) -> Iterator[Said]:
        session = self._session(entry.session)
        session.ended = None
        yield from self._skip_to(entry.first, session, entry)
        session.next = max(session.next, entry.first + entry.count)
        if not entry.whole:
            yield self._lose(Position(entry.id, entry.first), entry.count, "corrupt")
            yield from self._heard(session, entry)
            return
        for seq, record in enumerate(decode_records(entry.body, entry.count), entry.first):
            position = Position(entry.id, seq)
            if isinstance(record, Undecodable):
                yield self._lose(position, 1, record.reason)
            else:
                yield from self._record(entry.session, session, record, position, used)
        yield from self._heard(session, entry)

    def _blobs(self, entry: Entry) -> Iterator[Said]:
        """Pieces that are in files: they have their fate at once, what is made of them is judged behind this."""
        session, facts = self._session(entry.session), entry.facts
        session.ended = None
        yield from self._skip_to(entry.first, session, entry)
        session.next = max(session.next, entry.first + entry.count)
        for seq, reason in facts["lost"]:
            yield self._lose(Position(entry.id, seq), 1, reason)
        for _ in range(entry.count - len(facts["lost"])):
            self.folded += 1
            yield Folded(Position(entry.id, entry.first))
        for _, number, size, crc, failed, *more in facts["ends"]:
            sha256 = more[0] if more else b""
            yield Blob(session=entry.session, number=number, size=size, crc=crc, failed=failed, sha256=sha256)

    def _heard(self, session: SessionFacts, entry: Entry) -> Iterator[Heard]:
        if session.is_worker:
            yield Heard(session=entry.session, more=entry.more)

    def _record(
        self,
        id_: bytes,
        session: SessionFacts,
        record: Record,
        position: Position,
        used: Used,
    ) -> Iterator[Said]:
        match record.kind:
            case Kind.LOG | Kind.COUNTED:
                part = self._part(id_, session, record, position, used(position))
                yield self._lose(position, 1, part) if isinstance(part, str) else part
                return
            case Kind.CONFIG:
                _set(self.config, session.rank, self.names.admit_to("config", record.data))
            case Kind.NAMED:
                _set(self.named, session.rank, record.data)
            case Kind.SUMMARY:
                said = self.names.admit_to("summary", _staged(record.data, record.stage))
                self.summary |= {name: (record.time, value) for name, value in said.items()}
            case Kind.DEFINE:
                if why := self._declare(record):
                    yield self._lose(position, 1, why)
                    return
            case Kind.SAMPLES | Kind.ALERT | Kind.OUTPUT | Kind.PROGRAM | Kind.ARTIFACT:
                yield self._beside(id_, session, record, position)
                return
        self.folded += 1
        yield Folded(position)

    def _declare(self, record: Record) -> str:
        """Take in a declaration; returns why not, "" if it was."""
        try:
            rule = rule_from(record.data, record.stage)
        except ValueError:
            return "definition"
        if not self.names.take(f"define\0{rule.pattern}"):
            return "names"
        self.rules.declare(rule)
        return ""

    def _beside(
        self, id_: bytes, session: SessionFacts, record: Record, position: Position
    ) -> Sampled | Raised | Printed | Described | Logged | Lost:
        """What takes no part in the order of steps. It goes out at once, and counts as delivered then."""
        said: Sampled | Raised | Printed | Described | Logged | None
        match record.kind:
            case Kind.OUTPUT:
                said = printed_from(record, position, f"[rank {session.rank}] " if session.world > 1 else "")
            case Kind.PROGRAM:
                said = described_from(record, position)
            case Kind.ARTIFACT:
                said = logged_from(record, position, id_)
            case Kind.SAMPLES:
                said = sampled_from(record, position, id_, session.node)
            case _:
                said = alert_from(record, position, "" if session.is_worker else session.node)
        if said is None:
            return self._lose(position, 1, record.kind.name.lower())
        self.folded += 1
        return said

    def _part(
        self,
        id_: bytes,
        session: SessionFacts,
        record: Record,
        position: Position,
        places: Mapping[str, int] | None,
    ) -> Part | str:
        """The part that a call is, or why it is none."""
        axis = f"{record.stage}/step" if record.stage else MAIN_AXIS
        step, call = record.step or 0, None
        if record.kind is Kind.COUNTED:
            if session.world > 1 and not session.child:
                call = Call(step, frozenset(record.data))
            step += self._base(session, axis)
        if not 0 <= step < 2 * END_OF_STEPS:
            return "step"
        values = self.names.admit(_staged(record.data, record.stage)) if self.names.take(axis) else {}
        if record.data and not values:
            return "names"
        self._highest[axis] = max(step, self._highest.get(axis, step))
        return Part(
            position=position,
            session=id_,
            rank=session.rank,
            axis=axis,
            step=step if places is None else places.get(axis, step),
            time=record.time,
            values=self._with_axis_metrics(session, axis, step, values),
            attempt=session.attempt,
            used=places is not None,
            call=call,
            apart=session.apart if record.kind is Kind.COUNTED else "",
        )

    def _base(self, session: SessionFacts, axis: str) -> int:
        if session.apart or not session.launch or not session.is_worker:
            return session.bases.get(axis, 0)
        return self._launches[session.launch].bases.get(axis, 0)

    def _with_axis_metrics(
        self, session: SessionFacts, axis: str, step: int, values: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Remember what the session says of declared axis metrics, and add those that its names need."""
        metrics = self.rules.step_metrics
        if not metrics:
            return values
        last = session.axis_values
        if axis in metrics:
            last[axis] = step
        last.update({name: value for name, value in values.items() if name in metrics})
        needed = {self.rules.of(name).step_metric for name in values} - values.keys() - {axis}
        added = {name: last[name] for name in needed if name in last}
        return {**values, **added} if added else values

    def see_released(self, released: Mapping[str, int]) -> None:
        """The run came so far on each axis: launches that are still to appear go on from there."""
        for axis, step in released.items():
            self._highest[axis] = max(step, self._highest.get(axis, step))

    def state(self) -> dict[str, Any]:
        """Everything learnt, as plain values."""
        return {
            "sessions": {id_: asdict(facts) for id_, facts in self.sessions.items()},
            "config": {name: list(pair) for name, pair in self.config.items()},
            "named": {name: list(pair) for name, pair in self.named.items()},
            "summary": {name: list(pair) for name, pair in self.summary.items()},
            "rules": self.rules.state(),
            "folded": self.folded,
            "dead": dict(self.dead),
            "highest": dict(self._highest),
            "launches": self._launches.state(),
            "names": self.names.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self.sessions = {id_: SessionFacts(**facts) for id_, facts in state["sessions"].items()}
        self.config = {name: (rank, value) for name, (rank, value) in state["config"].items()}
        self.named = {name: (rank, value) for name, (rank, value) in state.get("named", {}).items()}
        self.summary = {name: (time, value) for name, (time, value) in state["summary"].items()}
        self.rules.restore(state["rules"])
        self.folded = state["folded"]
        self.dead = Counter(state["dead"])
        self._highest = dict(state["highest"])
        self._launches.restore(state["launches"])
        self.names.restore(state.get("names", {}))


def _set(values: dict[str, tuple[int, Any]], rank: int, data: Mapping[str, Any]) -> None:
    """What a rank set: a lower one is not overruled by a higher one."""
    values |= {name: (rank, value) for name, value in data.items() if rank <= values.get(name, (rank,))[0]}


def _staged(data: Mapping[str, Any], stage: str | None) -> Mapping[str, Any]:
    """Names under their stage."""
    return {f"{stage}/{name}": value for name, value in data.items()} if stage else data
