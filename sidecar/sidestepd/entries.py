"""What lies in the spool: frames as they came, what happened to sessions, and where each session stands.

- a frame's body is kept as received, with the crc it came with: one that does not match is `whole` no more, and
  its records are counted as corrupt
- everything else has a crc of its own, the seal: what was flipped there can not even be counted, so it is
  `Unreadable`, and that is damage of the file
- frames that came together may be one entry, which takes as many ids as it has frames: `frames` gives them as if
  each had come by itself. First in its body stands what precedes each frame on the wire, which its crc is of; then
  the bodies, in that order
- values and rows of the tables, no file and no clock
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgpack

from sidestep.wire import Frame, Wrapped, checksum
from sidestep.wire.envelope import HEAD
from sidestep.wire.header import Flags

SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind INTEGER NOT NULL, session BLOB NOT NULL, first INTEGER NOT NULL, count INTEGER NOT NULL,
    more INTEGER NOT NULL, crc INTEGER NOT NULL, received REAL NOT NULL, seal INTEGER NOT NULL,
    body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS session (
    id BLOB PRIMARY KEY, next INTEGER NOT NULL, state TEXT NOT NULL, heard REAL NOT NULL,
    hello BLOB NOT NULL, counters BLOB NOT NULL, seal INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""
ENTRY_COLUMNS = "id, kind, session, first, count, more, crc, received, seal, body"
PUT_ENTRY = f"INTO entry ({ENTRY_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
SESSION_COLUMNS = "id, next, state, heard, hello, counters, seal"
PUT_SESSION = f"INTO session ({SESSION_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"

HEAD_BYTES = HEAD.size
"""How much of an envelope's body is about each of its frames."""
_SEALED = struct.Struct("!QBQIBId")
_MORE = int(Flags.MORE)


class Unreadable(ValueError):
    """A row is not what was written."""


class EntryKind(IntEnum):
    """What an entry of the spool says."""

    FRAME = 1
    HELLO = 2
    """A session began, or came back; `first` is its first unacknowledged sequence."""
    BYE = 3
    """A session ended well; `first` is the sequence after its last record."""
    LEASE = 4
    """A session was not heard of for a lease; `first` is the sequence after what came of it."""
    COUNTERS = 5
    """A session's counters of drops changed."""
    BOOT = 6
    """Intake started; no session has been heard of since."""
    CLOSE = 7
    """The run shall be finished; nothing comes after."""
    ENVELOPE = 12
    """Frames that came together: `first` is how many, `count` how many records are in all of them."""
    BLOBS = 11
    """Records of a session that sends blobs: their bytes are in files; `facts` say which blobs are complete."""
    VITAL = 10
    """What a session does not say itself: its process is "quiet", "heard" again, or "gone", and since when."""


SAID = (EntryKind.FRAME, EntryKind.BLOBS)
"""The entries that hold records of a session: `count` of them, from the sequence `first` on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the spool.

    A frame has `count` records from sequence `first` on, and `more` when its worker had not caught up.
    `received` is spool time; `body` is a frame's bytes, or for an event msgpack of its `facts`.
    """

    id: int = 0
    kind: EntryKind
    session: bytes = b""
    first: int = 0
    count: int = 0
    more: bool = False
    crc: int = 0
    received: float = 0.0
    body: bytes = b""

    @classmethod
    def of_frame(cls, frame: Frame, *, received: float) -> Entry:
        """A frame as it came."""
        return cls(
            kind=EntryKind.FRAME,
            session=frame.session,
            first=frame.first,
            count=frame.count,
            more=frame.more,
            crc=frame.crc,
            received=received,
            body=frame.body,
        )

    @classmethod
    def of_envelope(cls, frames: Sequence[Wrapped], body: bytes, *, received: float) -> Entry:
        """Some of the frames in the body of an envelope, as they came."""
        heads = b"".join([body[it.start : it.start + HEAD.size] for it in frames])
        bodies = [body[it.start + HEAD.size : it.end] for it in frames]
        return cls(
            kind=EntryKind.ENVELOPE,
            first=len(frames),
            count=sum(it.records for it in frames),
            crc=checksum(heads),
            received=received,
            body=b"".join([heads, *bodies]),
        )

    @classmethod
    def of_event(
        cls,
        kind: EntryKind,
        session: bytes = b"",
        *,
        first: int = 0,
        count: int = 0,
        received: float,
        **facts: Any,
    ) -> Entry:
        """Something that happened to a session or to the run."""
        body = msgpack.packb(facts)
        return cls(
            kind=kind, session=session, first=first, count=count, crc=checksum(body), received=received, body=body
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        """What an event says."""
        facts: Mapping[str, Any] = msgpack.unpackb(self.body)
        return facts

    @property
    def whole(self) -> bool:
        """Whether the body is what was received; of an envelope, what tells its frames apart."""
        return checksum(self._heads if self.kind is EntryKind.ENVELOPE else self.body) == self.crc

    @property
    def _heads(self) -> bytes:
        return self.body[: self.first * HEAD.size]

    @property
    def ids(self) -> int:
        """How many ids it takes; the last of them is its own."""
        return self.first if self.kind is EntryKind.ENVELOPE else 1

    def frames(self) -> Iterator[Entry]:
        """The frames in it, each with an id of its own; nothing else has any."""
        if self.kind is not EntryKind.ENVELOPE:
            yield from (self,) if self.kind is EntryKind.FRAME else ()
            return
        id_, at = self.id - self.first, self.first * HEAD.size
        for size, _, _, _, flags, session, first, count, crc in HEAD.iter_unpack(self._heads):
            id_, body, at = id_ + 1, self.body[at : at + size], at + size
            yield Entry(
                id=id_,
                kind=EntryKind.FRAME,
                session=session,
                first=first,
                count=count,
                more=flags & _MORE != 0,
                crc=crc,
                received=self.received,
                body=body,
            )

    def said(self) -> Iterator[Entry]:
        """The entries of a session with records in them that this one is, or is made of."""
        yield from (self,) if self.kind is EntryKind.BLOBS else self.frames()

    def ends(self) -> list[tuple[bytes, int]]:
        """Of each frame in it the session, and the sequence after its last record."""
        if self.kind is EntryKind.ENVELOPE:
            return [(head[5], head[6] + head[7]) for head in HEAD.iter_unpack(self._heads)]
        return [(self.session, self.first + self.count)] if self.kind is EntryKind.FRAME else []


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSession:
    """A session as of a commit. `state` is "live", "bye" or "lease"; `counters` hold offered and dropped."""

    id: bytes
    next: int
    state: str = "live"
    heard: float = 0.0
    hello: Mapping[str, Any] = field(default_factory=dict)
    counters: Mapping[str, Any] = field(default_factory=dict)


def entry_row(entry: Entry, id_: int) -> tuple[Any, ...]:
    """The row of an entry, to be put under `id_`."""
    fields = (id_, entry.kind, entry.session, entry.first, entry.count, entry.more, entry.crc, entry.received)
    return (*fields, _seal_of_entry(*fields), entry.body)


def entry_of(row: tuple[Any, ...]) -> Entry:
    """An entry from its row. Raises Unreadable."""
    *fields, seal, body = row
    try:
        if _seal_of_entry(*fields) != seal:
            raise Unreadable(f"entry {fields[0]!r:.40} is not what was written")
        id_, kind, session, first, count, more, crc, received = fields
        entry = Entry(
            id=id_,
            kind=EntryKind(kind),
            session=session,
            first=first,
            count=count,
            more=bool(more),
            crc=crc,
            received=received,
            body=body,
        )
        if not entry.whole and entry.kind is not EntryKind.FRAME:
            raise Unreadable(f"event {id_} is not what was written")
    except (struct.error, TypeError, ValueError) as error:
        raise Unreadable(str(error)) from error
    return entry


def _seal_of_entry(
    id_: int, kind: int, session: bytes, first: int, count: int, more: bool, crc: int, received: float
) -> int:
    return zlib.crc32(session, zlib.crc32(_SEALED.pack(id_, kind, first, count, more, crc, received)))


def session_row(session: StoredSession) -> tuple[Any, ...]:
    """The row of a session."""
    hello, counters = msgpack.packb(dict(session.hello)), msgpack.packb(dict(session.counters))
    return _sealed(session.id, session.next, session.state, session.heard, hello, counters)


def moved_row(row: tuple[Any, ...], next_: int) -> tuple[Any, ...]:
    """The row of a session that came to want `next_`, or more. Raises Unreadable."""
    id_, known, *others, seal = row
    if _sealed(*row[:-1])[-1] != seal:
        raise Unreadable(f"session {id_!r:.40} is not what was written")
    return _sealed(id_, max(known, next_), *others)


def _sealed(*fields: Any) -> tuple[Any, ...]:
    return (*fields, zlib.crc32(msgpack.packb(fields)))


def session_of(row: tuple[Any, ...]) -> StoredSession:
    """A session from its row. Raises Unreadable."""
    *fields, seal = row
    try:
        if zlib.crc32(msgpack.packb(fields)) != seal:
            raise Unreadable(f"session {fields[0]!r:.40} is not what was written")
        id_, next_, state, heard, hello, counters = fields
        return StoredSession(
            id=id_,
            next=next_,
            state=state,
            heard=heard,
            hello=msgpack.unpackb(hello),
            counters=msgpack.unpackb(counters),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise Unreadable(str(error)) from error
