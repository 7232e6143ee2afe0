"""Save what can still be read of a damaged spool, and put the damaged file aside.

- what is whole is kept, wherever it lies: damage is closed in on from both sides, and costs what it touched
- ids go on far above everything that may have been lost
- frames that came together are entries of their own from then on
- a session wants what comes after the last of its frames that is left, or what it was known to want, if that is
  more; one that lost its HELLO says it again
- killed anywhere, it is done again or completed at the next start: the damaged file is moved only when its
  successor is complete, and the successor takes its place last

    spool.db ─read─▶ spool.db.salvaging ─complete─▶ spool.db.salvaged; then spool.db ─▶ quarantine/
                                                    and spool.db.salvaged ─▶ spool.db
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sidestepd.crashpoints import crash_point
from sidestepd.entries import (
    ENTRY_COLUMNS,
    PUT_ENTRY,
    PUT_SESSION,
    SAID,
    SCHEMA,
    SESSION_COLUMNS,
    Entry,
    EntryKind,
    StoredSession,
    Unreadable,
    entry_of,
    entry_row,
    session_of,
    session_row,
)

logger = logging.getLogger(__name__)

SALVAGE_STRIDE = 1_000_000
"""Ids left out after a salvage, so that none that may have been lost is given again."""
HIGHEST_ID = 2**62
MOST_TRIES = 5_000
"""Where so many reads failed, nothing is left to be found."""


def salvage(path: Path, *, above: int) -> None:
    """Replace the damaged spool at `path` by what can be read of it; nobody may have it open."""
    draft = _beside(path, ".salvaging")
    draft.unlink(missing_ok=True)
    _beside(path, ".salvaging-journal").unlink(missing_ok=True)
    name = f"file:{path}?mode=ro" if path.is_file() else ":memory:"  # in a directory there is nothing to be found
    source, target = sqlite3.connect(name, uri=True), sqlite3.connect(draft)
    try:
        target.executescript(SCHEMA)
        with target:
            _copy(source, target, above)
    finally:
        source.close()
        target.close()
    crash_point("spool.salvage")
    draft.rename(_beside(path, ".salvaged"))
    crash_point("spool.salvaged")
    complete(path)


def complete(path: Path) -> bool:
    """Put what was salvaged in place, if there is any; returns whether there was."""
    successor = _beside(path, ".salvaged")
    if not successor.exists():
        return False
    aside = path.parent / "quarantine" / f"{path.stem}-{successor.stat().st_mtime_ns}"
    aside.mkdir(parents=True, exist_ok=True)
    for part in (path, _beside(path, "-wal"), _beside(path, "-shm")):
        if part.exists():
            part.rename(aside / part.name)
        crash_point("spool.quarantine")
    successor.rename(path)
    logger.error("the damaged spool lies in %s", aside)
    return True


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _copy(source: sqlite3.Connection, target: sqlite3.Connection, above: int) -> None:
    highest = _highest_id(source)
    rows = (entry_row(entry, entry.id) for entry in _entries(source, highest))
    target.executemany(f"INSERT OR IGNORE {PUT_ENTRY}", rows)
    sessions = {session.id: session for session in _sessions(source)}
    for session in list(_with_frames(target, sessions)):
        sessions[session.id] = session
    target.executemany(f"INSERT OR REPLACE {PUT_SESSION}", map(session_row, sessions.values()))
    for session in sessions.values():
        _introduce(session, target)
    last = target.execute("SELECT max(id) FROM entry").fetchone()[0] or 0
    floor = max(above, last, 0 if highest == HIGHEST_ID else highest) + SALVAGE_STRIDE
    target.execute("DELETE FROM sqlite_sequence")
    target.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('entry', ?)", (floor,))
    for id_, session in enumerate(sessions.values(), floor + 1):
        _see_off(session, target, id_)
    logger.error("%d sessions and what was left of their frames were salvaged", len(sessions))


def _highest_id(source: sqlite3.Connection) -> int:
    """The highest id that was given, if the file still says so."""
    try:
        row = source.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entry'").fetchone()
        return int(row[0]) if row and 0 < row[0] < HIGHEST_ID else HIGHEST_ID
    except (sqlite3.DatabaseError, ValueError, TypeError):
        return HIGHEST_ID


def _entries(source: sqlite3.Connection, highest: int) -> Iterator[Entry]:
    """Every entry that can be reached, in no order."""
    spans, tries = [(0, highest + 1)], 0
    while spans and tries < MOST_TRIES:
        low, high = spans.pop()
        tries += 1
        below = yield from _walk(source, low, high, "ASC")
        if below is None:
            continue
        upto = yield from _walk(source, below, high, "DESC")
        if upto is not None and upto - below > 2:
            middle = (below + upto) // 2
            spans += [(below, middle + 1), (middle, upto)]


def _walk(source: sqlite3.Connection, low: int, high: int, way: str) -> Generator[Entry, None, int | None]:
    """Entries between two ids, up to the damage; returns the id it came to, or None if there was none."""
    upwards = way == "ASC"
    came_to = low if upwards else high
    query = f"SELECT {ENTRY_COLUMNS} FROM entry WHERE id > ? AND id < ? ORDER BY id {way}"
    try:
        for row in source.execute(query, (low, high)):
            id_ = row[0]
            if not (low < id_ < high and (id_ > came_to) == upwards):
                return came_to  # pages out of order: what they lead to is not trusted
            came_to = id_
            try:
                entry = entry_of(row)
            except Unreadable as error:
                logger.warning("lost: %s", error)
                continue
            if entry.kind is EntryKind.ENVELOPE:
                yield from entry.frames()
            else:
                yield entry
    except (sqlite3.DatabaseError, ValueError, TypeError) as error:
        logger.debug("salvage came to %d: %s", came_to, error)
        return came_to
    return None


def _sessions(source: sqlite3.Connection) -> Iterator[StoredSession]:
    """Every session that can be reached, from both ends."""
    for way in ("ASC", "DESC"):
        try:
            for row in source.execute(f"SELECT {SESSION_COLUMNS} FROM session ORDER BY id {way}"):
                try:
                    yield session_of(row)
                except Unreadable as error:
                    logger.warning("lost: %s", error)
        except (sqlite3.DatabaseError, ValueError) as error:
            logger.warning("salvage of the sessions stopped: %s", error)
        else:
            return


def _with_frames(target: sqlite3.Connection, known: dict[bytes, StoredSession]) -> Iterator[StoredSession]:
    """The sessions of the frames that are left, each wanting what comes after them."""
    for id_, next_ in target.execute(
        "SELECT session, max(first + count) FROM entry WHERE kind IN (?, ?) GROUP BY session", SAID
    ):
        session = known.get(id_) or _from_its_hello(target, id_)
        yield replace(session, next=max(session.next, next_))


def _from_its_hello(target: sqlite3.Connection, id_: bytes) -> StoredSession:
    """A session whose own row was lost."""
    row = target.execute(
        f"SELECT {ENTRY_COLUMNS} FROM entry WHERE session = ? AND kind = ? LIMIT 1", (id_, EntryKind.HELLO)
    ).fetchone()
    facts = dict(entry_of(row).facts) if row else {}
    counters: dict[str, Any] = {name: facts.pop(name) for name in ("offered", "dropped") if name in facts}
    return StoredSession(id=id_, next=0, hello=facts, counters=counters)


def _see_off(session: StoredSession, target: sqlite3.Connection, id_: int) -> None:
    """Say again that a session ended, and how far it came: what was lost before that is counted by it."""
    kind = {"bye": EntryKind.BYE, "lease": EntryKind.LEASE}.get(session.state)
    if kind is not None:
        end = Entry.of_event(kind, session.id, first=session.next, received=session.heard, **session.counters)
        target.execute(f"INSERT {PUT_ENTRY}", entry_row(end, id_))


def _introduce(session: StoredSession, target: sqlite3.Connection) -> None:
    """Say HELLO before the first that is left of a session, in a place that is free; else it was said before."""
    row = target.execute(
        f"SELECT {ENTRY_COLUMNS} FROM entry WHERE session = ? ORDER BY id LIMIT 1", (session.id,)
    ).fetchone()
    if row is None or not session.hello or (first := entry_of(row)).kind is EntryKind.HELLO:
        return
    begins = target.execute(
        "SELECT id FROM entry AS this WHERE id <= ? AND NOT EXISTS (SELECT 1 FROM entry WHERE id = this.id - 1) "
        "ORDER BY id DESC LIMIT 1",
        (first.id,),
    ).fetchone()[0]
    if begins > 1:
        hello = Entry.of_event(EntryKind.HELLO, session.id, received=first.received, **session.hello)
        target.execute(f"INSERT {PUT_ENTRY}", entry_row(hello, begins - 1))
