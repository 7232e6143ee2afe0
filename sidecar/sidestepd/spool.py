"""The spool: what was acknowledged, on disk, in the order it came.

- one writer: intake, with one connection, used by one thread at a time; everyone else reads
- one commit holds frames together with the next sequence of their sessions: neither is there without the other.
  Frames say it themselves. A session's own row is written when something happened to it, and before its frames are
  deleted; whoever reads adds what the frames above `noted` say
- frames that came together are one entry, of as many ids: whoever reads gets them one by one
- an entry's id grows for ever and is never used again, not after a full drain, not after a salvage, not when
  the file was lost
- what is read is what was written: SQLite's own check does not see flipped bits, so every row has a crc
- opening always succeeds: a damaged file is moved to `quarantine/` and what can still be read is kept
- whoever finds damage leaves a mark for the next start; a full or failing disk is no damage
- a full disk is said as SpoolFull, nothing of the commit is there, and it may be tried again; any other error of
  the disk is for the process to die of, and is never retried

Tables of `spool.db`:
    entry(id, kind, session, first, count, more, crc, received, seal, body)   frames, and what happened to sessions
    session(id, next, state, heard, hello, counters, seal)                    as of the newest commit
    meta(key, value)                                'opened': the file takes writes. 'noted': up to this id the
                                                    rows of sessions have all that frames say of them
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sidestepd.entries import (
    ENTRY_COLUMNS,
    HEAD_BYTES,
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
    moved_row,
    session_of,
    session_row,
)
from sidestepd.errors import SpoolDamaged, SpoolError, SpoolFull
from sidestepd.salvage import HIGHEST_ID, SALVAGE_STRIDE, complete, salvage

__all__ = [
    "SALVAGE_STRIDE",
    "Entry",
    "EntryKind",
    "Spool",
    "SpoolReader",
    "StoredSession",
    "damage_mark",
    "is_damage",
    "is_full",
    "keeps_from_opening",
]

logger = logging.getLogger(__name__)

SHRINK_PAGES = 4096
"""Given back to the disk at once."""
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_NO_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)
"""What the machine lacks; anything else that keeps a spool from opening is wrong with the file."""


class Spool:
    """The writer's side."""

    def __init__(self, path: Path, *, above: int = 0, quota: int = 0) -> None:
        """Open or make the spool at `path`, salvaging it if need be; ids of a new one start far above `above`.

        `quota` is how many bytes the file may have, 0 for any number. Raises SpoolFull or SpoolError for what the
        machine lacks.
        """
        self.path = path
        was_salvaged = complete(path)
        try:
            self._db = _open(path)
        except (sqlite3.DatabaseError, ValueError) as error:
            if not (path.is_dir() or keeps_from_opening(error, path)):
                if is_full(error):
                    raise SpoolFull(f"{path}: {error}") from error
                raise SpoolError(f"can not open {path}: {error}") from error
            logger.error("%s", SpoolDamaged(path, error))
            salvage(path, above=above)
            self._db, was_salvaged = _open(path, marked=True), True
        damage_mark(path).unlink(missing_ok=True)
        self.salvaged: int = self._one("SELECT count(*) FROM entry") if was_salvaged else 0
        self._last: int = self._one("SELECT max(seq) FROM sqlite_sequence") or 0
        if self._last < above:
            self._last = above + SALVAGE_STRIDE
        self._ahead = _ends(self._db)
        """Where sessions stand by frames that their rows may not know of yet."""
        self.noted: int = self._one("SELECT value FROM meta WHERE key = 'noted'") or 0
        """Up to which id the rows of sessions have all that frames say."""
        self._page = int(self._one("PRAGMA page_size"))
        if quota:
            self._db.execute(f"PRAGMA max_page_count = {max(1, quota // self._page)}")

    def commit(self, entries: Iterable[Entry], sessions: Iterable[StoredSession] = ()) -> int:
        """Write entries and sessions together, durably; returns the last id. Nothing is written on an error.

        To those of whom nothing is told but frames nothing happened: they may be left out of `sessions`.
        """
        last, rows, ends = self._last, [], []
        for entry in entries:
            last += entry.ids
            rows.append(entry_row(entry, last))
            ends += entry.ends()
        sessions = list(sessions)
        with self._writing():
            self._db.executemany(f"INSERT {PUT_ENTRY}", rows)
            self._db.executemany(f"INSERT OR REPLACE {PUT_SESSION}", map(session_row, sessions))
        self._last = last
        self._ahead.update(ends)
        for session in sessions:
            self._ahead.pop(session.id, None)
        return last

    def delete_through(self, last: int, *, note: bool = False) -> int:
        """Delete every entry up to and including id `last`, but for a CLOSE; returns how many went.

        Of frames that came together none goes before the last of them. The rows of sessions are written with it,
        which costs, where frames above `noted` go, or `note` says so.
        """
        note = bool(self._ahead) and (note or last > self.noted)
        with self._writing():
            gone = self._db.execute(
                "DELETE FROM entry WHERE id <= ? AND kind != ?", (last, EntryKind.CLOSE)
            ).rowcount
            if note:
                self._note()  # after it, so that there is room
        if note:
            self._ahead, self.noted = {}, self._last
        return gone

    def _note(self) -> None:
        query = f"SELECT {SESSION_COLUMNS} FROM session WHERE id = ?"
        rows = ((self._db.execute(query, (id_,)).fetchone(), end) for id_, end in self._ahead.items())
        try:
            moved = [moved_row(row, end) for row, end in rows if row is not None]
        except Unreadable as error:
            raise _damaged(self.path, error) from error
        self._db.executemany(f"INSERT OR REPLACE {PUT_SESSION}", moved)
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('noted', ?)", (self._last,))

    def sessions(self) -> list[StoredSession]:
        """Every session that ever spoke."""
        return _sessions(self._db)

    def latest(self) -> float:
        """The newest spool time in the spool, 0 if there is none."""
        newest = "SELECT received FROM entry ORDER BY id DESC LIMIT 1"
        return max(self._one(newest) or 0.0, self._one("SELECT max(heard) FROM session") or 0.0)

    def has_close(self) -> bool:
        """Whether the run was told to finish; that is never forgotten."""
        return bool(self._one("SELECT count(*) FROM entry WHERE kind = ?", EntryKind.CLOSE))

    def used_bytes(self) -> int:
        """How much lies in the spool; pages that will be used again are not counted."""
        return self._page * int(self._one("PRAGMA page_count") - self._one("PRAGMA freelist_count"))

    def shrink(self) -> None:
        """Give back to the disk what was deleted, a piece at a time: that too takes room in the log."""
        if not self._one("PRAGMA freelist_count"):
            return
        with self._writing():
            # not execute(), which takes one step: this pragma takes one for each page
            self._db.executescript(f"PRAGMA incremental_vacuum({SHRINK_PAGES})")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Fold the write-ahead log into the file and let go of it."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction."""
        try:
            with self._db:
                yield
        except sqlite3.DatabaseError as error:
            if is_full(error):
                raise SpoolFull(f"{self.path}: {error}") from error
            if is_damage(error):
                raise _damaged(self.path, error) from error
            raise

    def _one(self, query: str, *arguments: Any) -> Any:
        row = self._db.execute(query, arguments).fetchone()
        return row[0] if row else None


class SpoolReader:
    """A reader's side: short transactions, no locks, sees what is committed.

    Whatever is asked, SpoolDamaged is raised, and the file marked for it, when the answer is not what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)

    def read(self, after: int, limit: int) -> list[Entry]:
        """The next `limit` entries with an id above `after`."""
        query = f"SELECT {ENTRY_COLUMNS} FROM entry WHERE id > ? ORDER BY id LIMIT ?"
        found: list[Entry] = []
        with self._reading(), closing(self._db.execute(query, (after, limit))) as rows:
            for row in rows:  # one by one: what came together may be more than was asked for
                entry = entry_of(row)
                together = entry.kind is EntryKind.ENVELOPE
                found += (it for it in entry.frames() if it.id > after) if together else (entry,)
                if len(found) >= limit:
                    break
        return found[:limit]

    def first(self, *kinds: EntryKind) -> Entry | None:
        """The oldest entry of these kinds."""
        marks = ", ".join("?" * len(kinds))
        query = f"SELECT {ENTRY_COLUMNS} FROM entry WHERE kind IN ({marks}) ORDER BY id LIMIT 1"
        with self._reading():
            row = self._db.execute(query, kinds).fetchone()
            return entry_of(row) if row else None

    def records_after(self, after: int) -> int:
        """How many records lie in frames above id `after`."""
        query = "SELECT coalesce(sum(count), 0) FROM entry WHERE id > ? AND kind IN (?, ?, ?)"
        with self._reading(), self._at_once():
            found = int(self._db.execute(query, (after, *SAID, EntryKind.ENVELOPE)).fetchone()[0])
            where = "id = (SELECT min(id) FROM entry WHERE id > ?) AND kind = ?"
            first = next(_heads(self._db, where, after, EntryKind.ENVELOPE), None)
        return found - sum(it.count for it in first.frames() if it.id <= after) if first else found

    def received_after(self, after: int) -> float | None:
        """When the oldest entry above id `after` came, if there is one."""
        with self._reading():
            row = self._db.execute(
                "SELECT received FROM entry WHERE id > ? ORDER BY id LIMIT 1", (after,)
            ).fetchone()
            return None if row is None else float(row[0])

    def newest(self) -> int:
        """The id of the newest entry, 0 if there is none."""
        with self._reading():
            return int(self._db.execute("SELECT coalesce(max(id), 0) FROM entry").fetchone()[0])

    def front(self) -> int | None:
        """The id of the oldest entry, None if there is none. A CLOSE does not count: it is never deleted."""
        query = "SELECT id, kind, first FROM entry WHERE kind != ? ORDER BY id LIMIT 1"
        with self._reading():
            row = self._db.execute(query, (EntryKind.CLOSE,)).fetchone()
        return None if row is None else int(row[0] - row[2] + 1 if row[1] == EntryKind.ENVELOPE else row[0])

    def firsts(self) -> dict[bytes, int]:
        """The first sequence of each session that lies in a frame here."""
        query = "SELECT session, min(first) FROM entry WHERE kind IN (?, ?) GROUP BY session"
        with self._reading(), self._at_once():
            found = {bytes(session): int(first) for session, first in self._db.execute(query, SAID)}
            for entry in _heads(self._db, "kind = ?", EntryKind.ENVELOPE):
                for it in entry.frames():
                    found[it.session] = min(found.get(it.session, it.first), it.first)
            return found

    def sessions(self) -> list[StoredSession]:
        """Every session that ever spoke, as of the newest commit."""
        with self._reading(), self._at_once():
            return _sessions(self._db)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    @contextmanager
    def _at_once(self) -> Iterator[None]:
        """All that is read within is of one moment."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("ROLLBACK")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, ValueError) as error:
            if not isinstance(error, sqlite3.DatabaseError) or _code(error) in _DAMAGE:
                raise _damaged(self.path, error) from error
            raise


def damage_mark(path: Path) -> Path:
    """The file whose presence says that the spool was found damaged, for the next start to salvage it."""
    return path.with_name(f"{path.name}.damaged")


def _damaged(path: Path, why: Exception) -> SpoolDamaged:
    damage_mark(path).touch()
    return SpoolDamaged(path, why)


def _code(error: sqlite3.Error) -> int | None:
    """SQLite's own number for what happened, without its details."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file is not what SQLite wrote."""
    return _code(error) in _DAMAGE


def is_full(error: Exception) -> bool:
    """Whether it is room that is missing; the log's index says so in its own way."""
    number = getattr(error, "sqlite_errorcode", None)
    return number is not None and (number & 0xFF == sqlite3.SQLITE_FULL or number == sqlite3.SQLITE_IOERR_SHMSIZE)


def keeps_from_opening(error: Exception, path: Path) -> bool:
    """Whether it is the file that is wrong, and not the machine."""
    if not isinstance(error, sqlite3.Error):
        return True  # a row that is not what was written, or a message in no encoding
    code = _code(error)
    if code == sqlite3.SQLITE_READONLY:  # its header may say so
        return os.access(path, os.W_OK)
    return code not in _NO_DAMAGE


def _open(path: Path, *, marked: bool = False) -> sqlite3.Connection:
    """A connection to a spool that can be walked and written to; raises whatever keeps it from that."""
    if not marked and damage_mark(path).exists():
        raise Unreadable("it was found so before")
    db = sqlite3.connect(path, check_same_thread=False)
    try:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # of a new file; an older one just does not shrink
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = OFF")  # on in many builds: every deletion would be written out as zeros
        db.execute("PRAGMA journal_size_limit = 16777216")
        db.executescript(SCHEMA)
        # of a new file, of one just salvaged, and of one by whose writer the rows of sessions had all
        db.execute("INSERT OR IGNORE INTO meta SELECT 'noted', coalesce(max(id), 0) FROM entry")
        db.commit()
        _walk(db)
    except BaseException:
        db.close()
        raise
    return db


def _walk(db: sqlite3.Connection) -> None:
    """Touch everything that a life begins with, and write, as a trial."""
    db.execute("SELECT max(kind), max(received) FROM entry").fetchone()
    _sessions(db)
    highest = db.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()[0] or 0
    if not isinstance(highest, int) or not 0 <= highest < HIGHEST_ID:
        raise Unreadable(f"ids up to {highest!r:.40} were given")
    db.execute("BEGIN")
    db.execute(f"INSERT {PUT_ENTRY}", entry_row(Entry(kind=EntryKind.BOOT), highest + 1))
    db.rollback()
    with db:
        db.execute("INSERT OR REPLACE INTO meta VALUES ('opened', 1)")


def _sessions(db: sqlite3.Connection) -> list[StoredSession]:
    stored, ends = map(session_of, db.execute(f"SELECT {SESSION_COLUMNS} FROM session")), _ends(db)
    return [replace(it, next=ends[it.id]) if ends.get(it.id, 0) > it.next else it for it in stored]


def _ends(db: sqlite3.Connection) -> dict[bytes, int]:
    """Where sessions stand by the frames that their rows may not know of."""
    noted = db.execute("SELECT value FROM meta WHERE key = 'noted'").fetchone()
    found: dict[bytes, int] = {}
    for entry in _heads(db, "id > ? AND kind IN (?, ?)", *(noted or (0,)), EntryKind.FRAME, EntryKind.ENVELOPE):
        for session, end in entry.ends():
            found[session] = max(found.get(session, 0), end)
    return found


def _heads(db: sqlite3.Connection, where: str, *arguments: Any) -> Iterator[Entry]:
    """Entries without the bodies of their frames. Raises Unreadable."""
    body = f"CASE kind WHEN {EntryKind.ENVELOPE} THEN substr(body, 1, first * {HEAD_BYTES}) ELSE x'' END"
    columns = ENTRY_COLUMNS.removesuffix("body") + body
    return map(entry_of, db.execute(f"SELECT {columns} FROM entry WHERE {where} ORDER BY id", arguments))
