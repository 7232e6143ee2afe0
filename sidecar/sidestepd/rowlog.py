"""The row log: which rows were decided, and what must outlive the frames they came from.

Written before the sink is: after any crash the rows that the run does not hold are sent again word for word,
and only records that are in no row are put in order again. Together with the spool this is all of delivery's
memory.

- one writer: delivery. Intake and `sidestep status` read
- a row, its `_step`, its positions and the marks of what was released go into one commit
- `cursor` is an entry of the spool before which everything is settled; `fold` is what reading up to there
  had taught. Entries above it are read again after a crash, those up to it may be deleted
- every row of a table has a crc, its seal, which does not cover `fate`: what is not as it was written is damage
- opening always succeeds: a damaged file is moved to `quarantine/`, and of what can still be read is kept what is
  good without the rest; `recovery.py` learns the rest from the run and the spool
- a row is forgotten when it is confirmed, lies wholly before the cursor, and has left the window in which
  late values look for it

Tables of `delivery.db`:
    row(step, content, positions, newest, records, fate, seal)  fate: 'sent', 'confirmed', or why it was rejected
    definition(name, body, seal)                                names that wandb was told of
    latest(name, body, seal)                                    the newest value of each name: the run's summary
    dead(entry, seq, reason)                                    what could not be read
    artifact(id, name, signature, fate, seal)                   fate: 'sent', 'delivered', or why it is not there
    alert(cause, title, text, level, time, over, through, seal) what people were told, and what was read by then
    meta(key, value, seal)     'cursor', 'fold', 'marks', 'bookmark', 'base', 'ledger', 'recover', 'state', ...
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from sidestepd.entries import Unreadable
from sidestepd.errors import SpoolDamaged, SpoolFull
from sidestepd.rows import Alert, Checkpoint, Dead, Definition, Latest, Position, Row
from sidestepd.salvage import complete
from sidestepd.spool import damage_mark, is_damage, is_full, keeps_from_opening

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS row (
    step INTEGER PRIMARY KEY, content BLOB NOT NULL, positions BLOB NOT NULL, newest INTEGER NOT NULL,
    records INTEGER NOT NULL, fate TEXT NOT NULL, seal INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS definition (
    name TEXT PRIMARY KEY, body BLOB NOT NULL, seal INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS latest (name TEXT PRIMARY KEY, body BLOB NOT NULL, seal INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dead (
    entry INTEGER NOT NULL, seq INTEGER NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (entry, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS artifact (
    n INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, name TEXT NOT NULL, signature TEXT NOT NULL,
    seal INTEGER NOT NULL, fate TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS alert (
    id INTEGER PRIMARY KEY, cause TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL, level TEXT NOT NULL,
    time REAL NOT NULL, over INTEGER NOT NULL, through INTEGER NOT NULL, seal INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value, seal INTEGER NOT NULL) WITHOUT ROWID;
"""
_ALERTS = "SELECT cause, title, text, level, time, over FROM alert ORDER BY id"
_COLUMNS = "cause, title, text, level, time, over, through, seal"
_WARN = f"INSERT INTO alert ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_ARTIFACT = (
    "INSERT INTO artifact (id, name, signature, seal, fate) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT (id) DO UPDATE SET fate = excluded.fate"
)
SENT, CONFIRMED = "sent", "confirmed"


class RowLog:
    """The writer's side."""

    def __init__(self, path: Path, *, when_full: Callable[[], None] | None = None) -> None:
        """Open or make the row log at `path`, salvaging it if need be.

        `when_full` is called when the disk has no room, before another try; without it SpoolFull is raised.
        """
        self.path = path
        self._when_full = when_full
        complete(path)
        try:
            self._db = _open(path)
        except (sqlite3.DatabaseError, ValueError) as error:
            if not (path.is_dir() or keeps_from_opening(error, path)):
                raise
            logger.error("%s", SpoolDamaged(path, error))
            _salvage(path)
            self._db = _open(path)

    def append(
        self, rows: Sequence[Row], *, marks: Mapping[str, Any], definitions: Iterable[Definition] = ()
    ) -> None:
        """Decide rows: after this they are in the run, now or after the next start."""
        definitions = list(definitions)

        def write() -> None:
            self._db.executemany("INSERT INTO row VALUES (?, ?, ?, ?, ?, ?, ?)", map(_row_columns, rows))
            self._db.executemany(
                "INSERT OR REPLACE INTO definition VALUES (?, ?, ?)",
                (sealed(definition.name, definition.pack()) for definition in definitions),
            )
            self._set("marks", msgpack.packb(marks))

        self._commit(write)

    def settle(
        self,
        *,
        confirmed: Iterable[int] = (),
        rejected: Iterable[tuple[int, str]] = (),
        dead: Iterable[Dead] = (),
        latest: Mapping[str, Latest] | None = None,
        checkpoint: Checkpoint | None = None,
        keep_above: int | None = None,
        artifacts: Iterable[tuple[str, str, str, str]] = (),
        **meta: Any,
    ) -> None:
        """Write down fates, and with them whatever else is due. `meta` values are packed."""
        versions = [(*sealed(id_, name, signature), fate) for id_, name, signature, fate in artifacts]
        confirmed, rejected, dead = list(confirmed), list(rejected), list(dead)

        def write() -> None:
            self._db.executemany(
                "UPDATE row SET fate = 'confirmed' WHERE step = ?", ((step,) for step in confirmed)
            )
            self._db.executemany(
                "UPDATE row SET fate = ? WHERE step = ?", ((reason, step) for step, reason in rejected)
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO dead VALUES (?, ?, ?)", ((d.entry, d.seq, d.reason) for d in dead)
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO latest VALUES (?, ?, ?)",
                (sealed(name, value.pack()) for name, value in (latest or {}).items()),
            )
            self._db.executemany(_ARTIFACT, versions)
            if checkpoint:
                self._set("cursor", checkpoint.cursor)
                self._set("fold", checkpoint.fold)
            for key, value in meta.items():
                self._set(key, msgpack.packb(value))
            if keep_above is not None:
                self._db.execute(
                    "DELETE FROM row WHERE fate != 'sent' AND step <= ? "
                    "AND newest <= (SELECT value FROM meta WHERE key = 'cursor')",
                    (keep_above,),
                )

        self._commit(write)

    def warn(self, alerts: Iterable[Alert], *, through: int, **meta: Any) -> None:
        """Write down what people are about to be told; `through` is the entry that was read last.

        `meta` is packed, and of the same commit.
        """
        rows = [
            sealed(it.cause, it.title, it.text, it.level, float(it.time), int(it.over), through) for it in alerts
        ]

        def write() -> None:
            self._db.executemany(_WARN, rows)
            for key, value in meta.items():
                self._set(key, msgpack.packb(value))

        self._commit(write)

    def alerts(self) -> tuple[list[Alert], int]:
        """What people were told, and the entry up to which was read when they were told last."""
        through = self._db.execute("SELECT max(through) FROM alert").fetchone()[0]
        return [_alert(*row) for row in self._db.execute(_ALERTS)], through or 0

    def rows(self) -> list[tuple[Row, str]]:
        """Every row still remembered, with its fate, in the order of their `_step`."""
        return [
            (Row.unpack(content, positions), fate)
            for content, positions, fate in self._db.execute(
                "SELECT content, positions, fate FROM row ORDER BY step"
            )
        ]

    def artifacts(self) -> list[tuple[str, str, str, str]]:
        """Id, name, signature and fate of every artifact that has one, in the order in which they were sent."""
        return self._db.execute("SELECT id, name, signature, fate FROM artifact ORDER BY n").fetchall()

    def checkpoint(self) -> Checkpoint:
        """Where to read on."""
        return Checkpoint(cursor=self._get("cursor") or 0, fold=self._get("fold") or b"")

    def definitions(self) -> list[Definition]:
        """The names that were defined."""
        return [Definition.unpack(body) for (body,) in self._db.execute("SELECT body FROM definition")]

    def latest(self) -> dict[str, Latest]:
        """The newest value of each name, as of the newest `settle`."""
        return {name: Latest.unpack(body) for name, body in self._db.execute("SELECT name, body FROM latest")}

    def meta(self, key: str, default: Any) -> Any:
        """A value given to `append` or `settle`."""
        raw = self._get(key)
        return default if raw is None else msgpack.unpackb(raw, strict_map_key=False)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def _commit(self, write: Callable[[], object]) -> None:
        """One transaction, which is tried again when it lacked room."""
        while True:
            try:
                with self._db:
                    write()
                return
            except sqlite3.DatabaseError as error:
                if is_damage(error):
                    damage_mark(self.path).touch()
                    raise SpoolDamaged(self.path, error) from error
                if not is_full(error):
                    raise
                if self._when_full is None:
                    raise SpoolFull(f"{self.path}: {error}") from error
            self._when_full()

    def _set(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", sealed(key, value))

    def _get(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None


class RowLogReader:
    """What others may know of delivery: intake (what may be deleted) and `sidestep status`.

    A row log that is not there yet, or can not be read, tells nothing: nothing is settled, nothing deleted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def cursor(self) -> int:
        """The entry of the spool up to which everything is settled."""
        return int(self._meta("cursor") or 0)

    def newest(self) -> int:
        """The newest entry of the spool that anything here speaks of."""
        read_through = self.meta("ledger", {}).get("read_through", 0)
        in_rows = self._one("SELECT max(newest) FROM row") or 0
        return max(self.cursor(), int(read_through), int(in_rows))

    def meta(self, key: str, default: Any = None) -> Any:
        """A packed value that delivery wrote: 'ledger', 'state', 'exit_code', ..."""
        raw = self._meta(key)
        return default if raw is None else msgpack.unpackb(raw, strict_map_key=False)

    def _meta(self, key: str) -> Any:
        for row in self._all("SELECT key, value, seal FROM meta WHERE key = ?", key):
            if is_sealed(row):
                return row[1]
            logger.warning("%s: %s is not what was written", self.path, key)
        return None

    def dead(self) -> dict[str, int]:
        """How many records could not be read, by reason."""
        with_reason = self._all("SELECT reason, count(*) FROM dead GROUP BY reason")
        return {str(reason): int(count) for reason, count in with_reason}

    def alerts(self) -> list[Alert]:
        """What people were told, in this order."""
        return [_alert(*row) for row in self._all(_ALERTS)]

    def _one(self, query: str, *arguments: Any) -> Any:
        rows = self._all(query, *arguments)
        return rows[0][0] if rows else None

    def _all(self, query: str, *arguments: Any) -> list[Any]:
        if not self.path.exists():
            return []
        try:
            with contextlib.closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as db:
                return db.execute(query, arguments).fetchall()
        except sqlite3.DatabaseError as error:
            if "no such table" not in str(error):
                logger.warning("%s can not be read: %s", self.path, error)
            return []


def _alert(cause: str, title: str, text: str, level: str, time: float, over: int) -> Alert:
    return Alert(cause=cause, title=title, text=text, level=level, time=time, over=bool(over))


def _row_columns(row: Row) -> tuple[Any, ...]:
    newest = max((position.entry for position in row.positions), default=0)
    fields = (row.step, row.pack(), pack_positions(row.positions), newest, len(row.positions))
    return (*fields, SENT, _seal(fields))


def sealed(*fields: Any) -> tuple[Any, ...]:
    """Columns, and the crc that shows whether they are still what was written."""
    return (*fields, _seal(fields))


def is_sealed(row: Sequence[Any]) -> bool:
    """Whether columns that end in their seal are what was written."""
    try:
        return bool(_seal(tuple(row[:-1])) == row[-1])
    except (TypeError, ValueError, OverflowError):
        return False


def _seal(fields: tuple[Any, ...]) -> int:
    return zlib.crc32(msgpack.packb(fields))


def pack_positions(positions: Iterable[Position]) -> bytes:
    """Positions as bytes."""
    return bytes(msgpack.packb([(position.entry, position.seq) for position in positions]))


# Opening, and what is kept of a damaged file

_SEALED = {
    "row": "SELECT step, content, positions, newest, records, seal, fate FROM row",
    "definition": "SELECT name, body, seal FROM definition",
    "latest": "SELECT name, body, seal FROM latest",
    "artifact": "SELECT id, name, signature, seal, fate FROM artifact",
    "alert": f"SELECT {_COLUMNS} FROM alert",
    "meta": "SELECT key, value, seal FROM meta",
}
_BY_ITSELF = frozenset({"run", "base", "state", "exit_code"})
"""What of `meta` is true without the rest."""
_TOGETHER = frozenset({"cursor", "fold"})
"""True if both are there."""


def _open(path: Path) -> sqlite3.Connection:
    """A connection to a row log that was seen to be whole; raises whatever keeps it from that."""
    if damage_mark(path).exists():
        raise Unreadable("it was found so before")
    db = sqlite3.connect(path)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = OFF")
        db.execute("PRAGMA journal_size_limit = 16777216")
        db.executescript(_SCHEMA)
        for table in _SEALED:
            for row in _rows(db, table):
                if row is None:
                    raise Unreadable(f"a row of {table} is not what was written")
        with db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", sealed("opened", 1))
    except BaseException:
        db.close()
        raise
    return db


def _rows(db: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...] | None]:
    """The columns and the seal of each row of a table; None for one that is not what was written."""
    for row in db.execute(_SEALED[table]):
        columns = row[:-1] if table in ("row", "artifact") else row  # their fate is not sealed
        yield columns if is_sealed(columns) else None


def _salvage(path: Path) -> None:
    """Put a new row log in the place of a damaged one, with what of it is good without the rest.

    Rows are not kept: without all of them nobody could say what is in none. The run itself is asked.
    """
    draft = path.with_name(f"{path.name}.salvaging")
    for suffix in ("", "-wal", "-shm", "-journal"):
        draft.with_name(draft.name + suffix).unlink(missing_ok=True)
    meta, definitions, latest = (
        {row[0]: row for row in _readable(path, t)} for t in ("meta", "definition", "latest")
    )
    keep = _BY_ITSELF | (_TOGETHER if meta.keys() >= _TOGETHER else set())
    target = sqlite3.connect(draft)
    try:
        target.executescript(_SCHEMA)
        with target:
            kept = [row for key, row in meta.items() if key in keep]
            kept.append(sealed("recover", msgpack.packb({"rows": False})))
            target.executemany("INSERT INTO meta VALUES (?, ?, ?)", kept)
            target.executemany("INSERT INTO definition VALUES (?, ?, ?)", definitions.values())
            target.executemany("INSERT INTO latest VALUES (?, ?, ?)", latest.values())
    finally:
        target.close()
    draft.rename(path.with_name(f"{path.name}.salvaged"))
    complete(path)
    damage_mark(path).unlink(missing_ok=True)


def _readable(path: Path, table: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a table that can be reached, from both ends, and are what was written."""
    for way in ("", " ORDER BY 1 DESC"):
        try:
            db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
            try:
                yield from (row for row in db.execute(_SEALED[table] + way) if is_sealed(row))
                return
            finally:
                db.close()
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            logger.debug("salvage of %s stopped: %s", table, error)
