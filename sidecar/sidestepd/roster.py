"""Who is speaking, and which record is wanted next of each: the gate against duplicates and gaps.

- per session one number is kept, the next sequence: lower is a duplicate, higher is a gap, equal is taken
- `next` moves when a frame is taken, `stored` when the spool has committed it: only that is acknowledged
- a session is live from HELLO until BYE, the end of its lease, or a HELLO of its launch with a higher restart
  count; one that speaks again is live again
- no I/O and no clock here: callers pass `now`, and write what is returned into the spool
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from sidestep.wire import FILES, LANES, RELAY, WORKER, Bye, Frame, Hello, Status, Wrapped
from sidestepd.entries import SAID, Entry, EntryKind, StoredSession

LOST = 1
"""The exit code of a worker that ended without a word, as of one that an exception ended."""


class Verdict(Enum):
    """What becomes of a frame or a BYE."""

    TAKE = "take"
    DUPLICATE = "duplicate"
    GAP = "gap"
    STRANGER = "stranger"
    """Its session never said HELLO here."""


@dataclass(slots=True, kw_only=True)
class Session:
    """One life of one worker process, as intake knows it."""

    id: bytes
    next: int = 0
    stored: int = 0
    state: str = "live"
    heard: float = 0.0
    hello: dict[str, Any] = field(default_factory=dict)
    more: bool = False
    """It had not caught up when it was heard last."""
    offered: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    began: float = 0.0
    """When it said HELLO first."""
    exit_code: int | None = None
    """What its process ended with, as far as its BYE said."""
    values_refused: int = 0

    @property
    def is_worker(self) -> bool:
        """Whether it is a rank, and not a sampler."""
        return bool(self.hello.get("role", WORKER) == WORKER)

    @property
    def is_lane(self) -> bool:
        """Whether it sends the bytes of a worker's media, or its files."""
        return self.hello.get("role") in LANES

    @property
    def is_courier(self) -> bool:
        """Whether it is a process of its own, which sends a worker's files and may outlive it."""
        return bool(self.hello.get("role") == FILES)

    @property
    def is_relay(self) -> bool:
        """Whether it is a daemon that passes on what others say."""
        return bool(self.hello.get("role") == RELAY)

    @property
    def relay(self) -> str:
        """The session, in hexadecimal, of the relay that it speaks through; "" if it speaks here itself."""
        return str(self.hello.get("relay", ""))

    @property
    def counters(self) -> dict[str, Any]:
        """What the worker counted, as of when it was heard last."""
        return {"offered": self.offered, "dropped": self.dropped, "values_refused": self.values_refused}

    def as_stored(self) -> StoredSession:
        """As it goes into the spool, together with all that was taken."""
        return StoredSession(
            id=self.id,
            next=self.next,
            state=self.state,
            heard=self.heard,
            hello=self.hello,
            counters=self.counters | {"began": self.began, "exit_code": self.exit_code},
        )


class Roster:
    """Every session of the run."""

    def __init__(
        self,
        stored: Iterable[StoredSession] = (),
        *,
        lease: float,
        now: float,
        relay_lease: float | None = None,
        duplicate_gate: bool = True,
    ) -> None:
        self.lease = lease
        self.relay_lease = lease if relay_lease is None else max(lease, relay_lease)
        self.duplicates = 0
        self.gaps = 0
        self._gate = duplicate_gate
        self.has_own = False
        """Whether a worker spoke here itself, and not through a relay."""
        self._oldest: dict[str, int] = {}
        """Of each launch the lowest restart count of a session: no HELLO with that, or less, ends any."""
        self.sessions = {
            s.id: Session(
                id=s.id,
                next=s.next,
                stored=s.next,
                state=s.state,
                heard=now,  # a lease begins afresh when intake starts
                hello=dict(s.hello),
                offered=s.counters.get("offered", 0),
                dropped=dict(s.counters.get("dropped", {})),
                began=s.counters.get("began", 0.0),
                exit_code=s.counters.get("exit_code"),
                values_refused=s.counters.get("values_refused", 0),
            )
            for s in stored
        }
        for session in self.sessions.values():
            self._date(session)

    @property
    def live(self) -> list[Session]:
        """Workers that may speak."""
        return [session for session in self._speaking if session.is_worker]

    @property
    def awaited(self) -> list[Session]:
        """Those, and what sends the bytes of their media: while there are any, the run goes on."""
        return [session for session in self._speaking if session.is_worker or session.is_lane]

    @property
    def workers(self) -> list[Session]:
        """Every session of a rank."""
        return [session for session in self.sessions.values() if session.is_worker]

    @property
    def _speaking(self) -> list[Session]:
        return [session for session in self.sessions.values() if session.state == "live"]

    def owner(self, session: bytes) -> str | None:
        """The name of the client that a session belongs to; "" for one of this node, None if it is not known."""
        known = self.sessions.get(session)
        return None if known is None else str(known.hello.get("peer", ""))

    def wanted(self, session: Session) -> int:
        """What a session shall send from: what is committed. Without the gate nobody remembers."""
        return session.stored if self._gate else session.next

    def hello(self, hello: Hello, now: float, *, peer: str = "") -> Entry:
        """A session begins or comes back. A first unacknowledged record above what is stored moves it up.

        It belongs to `peer`, who it proved to be, from the first time on.
        """
        session = self.sessions.setdefault(hello.session, Session(id=hello.session, began=now))
        session.next = max(session.next, hello.first) if self._gate else hello.first
        session.stored = max(session.stored, hello.first)
        session.state, session.heard, session.more = "live", now, hello.more
        owner = session.hello.get("peer", "") or (peer if not session.hello else "")
        session.hello = ({"peer": owner} if owner else {}) | {
            name: getattr(hello, name)
            for name in (
                "rank",
                "world",
                "local_rank",
                "node",
                "pid",
                "launch",
                "attempt",
                "client",
                "role",
                "beside",
                "relay",
                "pids",
            )
        }
        self._date(session)
        self._count(session, hello)
        return Entry.of_event(
            EntryKind.HELLO,
            hello.session,
            first=hello.first,
            received=now,
            more=hello.more,
            settings=dict(hello.settings),
            **session.hello,
            **session.counters,
        )

    def frame(self, frame: Frame, now: float) -> Verdict:
        """Judge a frame; one that is taken must be committed."""
        session = self.sessions.get(frame.session)
        if session is None:
            return Verdict.STRANGER
        session.heard = now
        if frame.first > session.next:
            self.gaps += 1
            return Verdict.GAP
        if frame.first < session.next and self._gate:
            self.duplicates += 1
            return Verdict.DUPLICATE
        session.next, session.state, session.more = frame.end, "live", frame.more
        return Verdict.TAKE

    def take(self, frames: Iterable[Wrapped], now: float, *, route: bytes, routes: Mapping[bytes, bytes]) -> int:
        """Take the first of these frames, as long as each is simply what is wanted next; returns how many.

        Simply: by the route on which its session said HELLO, of one that is live, and sends no blobs.
        """
        taken = 0
        for id_, first, records, more, _, _ in frames:
            session = self.sessions.get(id_)
            if session is None or session.next != first or session.state != "live" or session.is_lane:
                break
            if routes.get(id_) != route:
                break
            session.next, session.heard, session.more = first + records, now, more
            taken += 1
        return taken

    def hold(self, id_: bytes, now: float) -> Entry | None:
        """A session was told to keep what it has: patience runs against it, as room comes of rows that leave."""
        session = self.sessions[id_]
        session.heard = now
        if not session.more:
            return None
        session.more = False
        return Entry.of_event(EntryKind.COUNTERS, id_, received=now, more=False, **session.counters)

    def take_back(self, entries: Iterable[Entry]) -> list[Entry]:
        """The disk had no room: frames will come again; what happened to sessions is returned, to be written."""
        entries = list(entries)
        for entry in entries:
            for said in entry.said():
                session = self.sessions[said.session]
                session.next = min(session.next, said.first)
        return [
            replace(entry, first=min(entry.first, self.sessions[entry.session].next))
            if entry.kind is EntryKind.LEASE
            else entry
            for entry in entries
            if entry.kind not in (*SAID, EntryKind.ENVELOPE)
        ]

    def heartbeat(self, status: Status, now: float) -> Entry | None:
        """Note a heartbeat; drops that are new, and having caught up without a frame, are worth an entry."""
        session = self.sessions.get(status.session)
        if session is None:
            return None
        session.heard = now
        if session.state == "lease" and not session.relay:  # its relay would greet for it
            session.state = "live"
        before = (session.more, dict(session.dropped))
        session.more = status.more
        self._count(session, status)
        if before == (session.more, session.dropped):
            return None
        return Entry.of_event(EntryKind.COUNTERS, session.id, received=now, more=session.more, **session.counters)

    def bye(self, bye: Bye, now: float) -> tuple[Verdict, Entry | None]:
        """A session's last word, taken only once all that it sent is committed."""
        session = self.sessions.get(bye.session)
        if session is None:
            return Verdict.STRANGER, None
        session.heard = now
        if session.state == "bye":
            return Verdict.DUPLICATE, None
        if bye.first > session.stored:
            return Verdict.GAP, None
        self._count(session, bye)
        if bye.lost:
            return Verdict.TAKE, self._end(session, now)
        session.state, session.exit_code = "bye", bye.exit_code
        entry = Entry.of_event(
            EntryKind.BYE,
            bye.session,
            first=bye.first,
            received=now,
            exit_code=bye.exit_code,
            **session.counters,
        )
        return Verdict.TAKE, entry

    def expire(self, now: float) -> list[Entry]:
        """The leases that ended by `now`."""
        before = now - self.lease  # the shorter one: nearly all were heard of since
        silent = [it for it in self.sessions.values() if it.heard <= before and it.state == "live"]
        return [self._end(it, now) for it in silent if now >= it.heard + self._lease_of(it)]

    def _lease_of(self, session: Session) -> float:
        return self.relay_lease if session.relay or session.is_relay else self.lease

    @property
    def relays(self) -> list[Session]:
        """The daemons that pass on what others say."""
        return [session for session in self.sessions.values() if session.is_relay]

    def behind(self, relay: Session) -> list[Session]:
        """Those that may speak through a relay."""
        id_ = relay.id.hex()
        return [it for it in self.sessions.values() if it.state == "live" and it.hello.get("relay") == id_]

    def excuse(self, seconds: float) -> None:
        """Nobody listened for so long: what was said meanwhile is still to be heard."""
        for session in self._speaking:
            session.heard += seconds
            session.more = True

    def lose(self, session: bytes, now: float) -> list[Entry]:
        """The process of a session is known to be gone: nobody need wait for its lease to end."""
        return [self._end(one, now) for one in self.awaited if one.id == session]

    @property
    def exit_code(self) -> int:
        """What the run comes to by its workers: 0 if each rank's own process said BYE with 0, in its last attempt.

        Else what the first of them said that did not, and 1 for one that ended without a word. A process that a
        rank forked and left behind says nothing of the training.
        """
        newest: dict[str, int] = {}
        for session in self.workers:
            launch, attempt = session.hello.get("launch", ""), session.hello.get("attempt", 0)
            newest[launch] = max(newest.get(launch, 0), attempt)
        own: dict[tuple[str, int], Session] = {}
        for session in sorted(self.workers, key=lambda one: one.began):
            launch, rank = session.hello.get("launch", ""), session.hello.get("rank", 0)
            if session.hello.get("attempt", 0) == newest[launch]:
                own.setdefault((launch, rank), session)
        codes = [one.exit_code or 0 if one.state == "bye" else LOST for one in own.values()]
        return next((code for code in codes if code), 0)

    @property
    def is_full_world(self) -> bool:
        """Whether every rank of every launch that spoke was there."""
        ranks: dict[str, set[int]] = {}
        world: dict[str, int] = {}
        for session in self.workers:
            launch = session.hello.get("launch", "")
            ranks.setdefault(launch, set()).add(session.hello.get("rank", 0))
            world[launch] = max(world.get(launch, 1), session.hello.get("world", 1))
        return all(len(ranks[launch]) >= world[launch] for launch in ranks)

    def end_all(self, now: float) -> list[Entry]:
        """The command ended, and with it every lease."""
        return [self._end(session, now) for session in self._speaking]

    def supersede(self, hello: Hello, now: float) -> list[Entry]:
        """The sessions that end because their launch was started again."""
        if hello.attempt <= self._oldest.get(hello.launch, hello.attempt):
            return []
        return [
            self._end(session, now)
            for session in self.awaited
            if session.hello.get("launch") == hello.launch and session.hello.get("attempt", 0) < hello.attempt
        ]

    def _date(self, session: Session) -> None:
        self.has_own = self.has_own or (session.is_worker and not session.relay)
        launch, attempt = session.hello.get("launch", ""), session.hello.get("attempt", 0)
        self._oldest[launch] = min(self._oldest.get(launch, attempt), attempt)

    def _end(self, session: Session, now: float) -> Entry:
        session.state = "lease"
        return Entry.of_event(EntryKind.LEASE, session.id, first=session.next, received=now, **session.counters)

    def _count(self, session: Session, said: Hello | Status | Bye) -> None:
        session.offered = max(session.offered, said.offered)
        session.values_refused = max(session.values_refused, said.values_refused)
        for reason, count in said.dropped.items():
            session.dropped[reason] = max(session.dropped.get(reason, 0), count)
