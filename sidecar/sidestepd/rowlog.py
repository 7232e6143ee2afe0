"""The row log: which rows were decided, and what must outlive the frames they came from.

Written before the sink is: after any crash the rows that the run does not hold are sent again word for word,
and only records that are in no row are put in order again. Together with the spool this is all of delivery's
memory.

- one writer: delivery. Intake and `sidestep status` read
- a row, its `_step`, its positions and the marks of what was released go into one commit
- `cursor` is an entry of the spool before which everything is settled; `fold` is what reading up to there
  had taught. Entries above it are read again after a crash, those up to it may be deleted
- a row is forgotten when it is confirmed, lies wholly before the cursor, and has left the window in which
  late values look for it

Tables of `delivery.db`:
    row(step, content, positions, newest, records, fate)  fate: 'sent', 'confirmed', or why it was rejected
    definition(name, body)                                names that wandb was told of
    latest(name, body)                                    the newest value of each name: the run's summary
    dead(entry, seq, reason)                              what could not be read
    alert(cause, title, text, level, time, over, through) what people were told, and what was read by then
    meta(key, value)     'cursor', 'fold', 'marks', 'bookmark', 'ledger', 'state', 'exit_code'
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from sidestepd.rows import Alert, Checkpoint, Dead, Definition, Latest, Position, Row

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS row (
    step INTEGER PRIMARY KEY, content BLOB NOT NULL, positions BLOB NOT NULL, newest INTEGER NOT NULL,
    records INTEGER NOT NULL, fate TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS definition (name TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS latest (name TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dead (
    entry INTEGER NOT NULL, seq INTEGER NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (entry, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS alert (
    id INTEGER PRIMARY KEY, cause TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL, level TEXT NOT NULL,
    time REAL NOT NULL, over INTEGER NOT NULL, through INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""
_ALERTS = "SELECT cause, title, text, level, time, over FROM alert ORDER BY id"
SENT, CONFIRMED = "sent", "confirmed"


class RowLog:
    """The writer's side."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(_SCHEMA)

    def append(
        self, rows: Sequence[Row], *, marks: Mapping[str, Any], definitions: Iterable[Definition] = ()
    ) -> None:
        """Decide rows: after this they are in the run, now or after the next start."""
        with self._db:
            self._db.executemany("INSERT INTO row VALUES (?, ?, ?, ?, ?, ?)", map(_row_columns, rows))
            self._db.executemany(
                "INSERT OR REPLACE INTO definition VALUES (?, ?)",
                ((definition.name, definition.pack()) for definition in definitions),
            )
            self._set("marks", msgpack.packb(marks))

    def settle(
        self,
        *,
        confirmed: Iterable[int] = (),
        rejected: Iterable[tuple[int, str]] = (),
        dead: Iterable[Dead] = (),
        latest: Mapping[str, Latest] | None = None,
        checkpoint: Checkpoint | None = None,
        keep_above: int | None = None,
        **meta: Any,
    ) -> None:
        """Write down fates, and with them whatever else is due. `meta` values are packed."""
        with self._db:
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
                "INSERT OR REPLACE INTO latest VALUES (?, ?)",
                ((name, value.pack()) for name, value in (latest or {}).items()),
            )
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

    def warn(self, alerts: Iterable[Alert], *, through: int) -> None:
        """Write down what people are about to be told; `through` is the entry that was read last."""
        with self._db:
            self._db.executemany(
                "INSERT INTO alert (cause, title, text, level, time, over, through) VALUES (?, ?, ?, ?, ?, ?, ?)",
                ((it.cause, it.title, it.text, it.level, it.time, it.over, through) for it in alerts),
            )

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

    def _set(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

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
        return int(self._one("SELECT value FROM meta WHERE key = 'cursor'") or 0)

    def newest(self) -> int:
        """The newest entry of the spool that anything here speaks of."""
        read_through = self.meta("ledger", {}).get("read_through", 0)
        in_rows = self._one("SELECT max(newest) FROM row") or 0
        return max(self.cursor(), int(read_through), int(in_rows))

    def meta(self, key: str, default: Any = None) -> Any:
        """A packed value that delivery wrote: 'ledger', 'state', 'exit_code', ..."""
        raw = self._one("SELECT value FROM meta WHERE key = ?", key)
        return default if raw is None else msgpack.unpackb(raw, strict_map_key=False)

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
        db = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
        try:
            return db.execute(query, arguments).fetchall()
        except sqlite3.DatabaseError as error:
            if "no such table" not in str(error):
                logger.warning("%s can not be read: %s", self.path, error)
            return []
        finally:
            db.close()


def _alert(cause: str, title: str, text: str, level: str, time: float, over: int) -> Alert:
    return Alert(cause=cause, title=title, text=text, level=level, time=time, over=bool(over))


def _row_columns(row: Row) -> tuple[Any, ...]:
    newest = max((position.entry for position in row.positions), default=0)
    return (row.step, row.pack(), pack_positions(row.positions), newest, len(row.positions), SENT)


def pack_positions(positions: Iterable[Position]) -> bytes:
    """Positions as bytes."""
    return bytes(msgpack.packb([(position.entry, position.seq) for position in positions]))
