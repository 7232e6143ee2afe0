"""What lies in the spool: frames as they came, what happened to sessions, and where each session stands.

- a frame's body is kept as received, with the crc it came with: one that does not match is `whole` no more, and
  its records are counted as corrupt
- everything else has a crc of its own, the seal: what was flipped there can not even be counted, so it is
  `Unreadable`, and that is damage of the file
- values and rows of the tables, no file and no clock
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgpack

from sidestep.wire import Frame, checksum

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

_SEALED = struct.Struct("!QBQIBId")


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
        """Whether the body is what was received."""
        return checksum(self.body) == self.crc


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
    fields = (session.id, session.next, session.state, session.heard, hello, counters)
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
