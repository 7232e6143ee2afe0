"""Spools to be looked at, filled, damaged, and short of room."""

from __future__ import annotations

import resource
import sqlite3
from dataclasses import replace
from pathlib import Path

from sidestep.wire import Frame, Wrapped, Wrapper, checksum, contents, encode
from sidestepd.spool import Entry, EntryKind, Spool, SpoolReader, StoredSession

ALICE, BOB = b"a" * 16, b"b" * 16
EVERYTHING = 1_000_000


def frame(first: int, *, session: bytes = ALICE, count: int = 10, size: int = 300, received: float = 0.0) -> Entry:
    """A frame whose body can be told from every other frame's."""
    body = b"%s %d " % (session[:1], first) * (size // 4)
    said = Frame(session=session, first=first, count=count, body=body, crc=checksum(body))
    return Entry.of_frame(said, received=received)


def together(*frames: Entry, received: float = 0.0) -> Entry:
    """These as one entry, as they come in an envelope."""
    wrapper = Wrapper()
    for it in frames:
        said = Frame(session=it.session, first=it.first, count=it.count, body=it.body, crc=it.crc, more=it.more)
        wrapper.add(encode(said))
    envelope = wrapper.close()
    wrapped = [it for it in contents(envelope) if isinstance(it, Wrapped)]
    assert len(frames) == len(wrapped)
    return Entry.of_envelope(wrapped, envelope[1], received=received)


def hello(session: bytes = ALICE, **facts: object) -> Entry:
    return Entry.of_event(EntryKind.HELLO, session, received=0.0, **{"rank": 3, "launch": "L", **facts})


def stored(next_: int, *, session: bytes = ALICE) -> StoredSession:
    return StoredSession(id=session, next=next_, hello={"rank": 3, "launch": "L"}, counters={"offered": next_})


def filled(path: Path, frames: int = 200, **shape: int) -> Path:
    """A spool with a HELLO, frames, and where the session stands, closed."""
    spool = Spool(path)
    spool.commit([hello(), *(frame(first, **shape) for first in range(0, 10 * frames, 10))], [stored(10 * frames)])
    spool.close()
    return path


def spoil(path: Path, change: str) -> Path:
    """Change rows behind the spool's back."""
    with sqlite3.connect(path) as db:
        assert db.execute(change).rowcount
    db.close()
    return path


def everything_in(path: Path) -> list[Entry]:
    reader = SpoolReader(path)
    try:
        return reader.read(0, EVERYTHING)
    finally:
        reader.close()


def without_id(entries: list[Entry]) -> list[Entry]:
    return [replace(entry, id=0) for entry in entries]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def offset_of(path: Path, needle: bytes) -> int:
    return path.read_bytes().index(needle)


class small_files:  # noqa: N801 - used like a function
    """Within this, no file of this process grows beyond so many bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
