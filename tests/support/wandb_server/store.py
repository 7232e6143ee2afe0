"""What the server knows of runs, in a SQLite file: it outlives the server's process as well as its clients.

- a file of a run is a list of lines; a chunk sets the lines from its offset on, so a chunk sent again changes
  nothing, and one that says something else in an old place replaces what was there
- a chunk that would leave a gap is a breach of the protocol
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (
    entity TEXT, project TEXT, name TEXT, doc TEXT NOT NULL, PRIMARY KEY (entity, project, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS line (
    run TEXT, file TEXT, number INTEGER, content TEXT NOT NULL, PRIMARY KEY (run, file, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS artifact (n INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, doc TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS breach (what TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tally (name TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
"""
HISTORY, EVENTS, SUMMARY, OUTPUT = "wandb-history.jsonl", "wandb-events.jsonl", "wandb-summary.json", "output.log"
ALERTS = "alerts"
"""No file of wandb's: what people were told of a run, a line each."""


class Breach(Exception):
    """A client said what no client may."""


class Store:
    """All runs. For several threads."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.executescript(_SCHEMA)
        self._lock = threading.RLock()

    # Runs

    def run(self, entity: str, project: str, name: str) -> dict[str, Any] | None:
        """What was upserted of a run."""
        with self._lock:
            row = self._db.execute(
                "SELECT doc FROM run WHERE (entity, project, name) = (?, ?, ?)", (entity, project, name)
            ).fetchone()
        return None if row is None else dict(json.loads(row[0]))

    def upsert(self, entity: str, project: str, name: str, values: Mapping[str, Any]) -> bool:
        """Set what is given of a run; True if there was none."""
        with self._lock, self._db:
            known = self.run(entity, project, name)
            doc = (known or {}) | {key: value for key, value in values.items() if value is not None}
            self._db.execute(
                "INSERT OR REPLACE INTO run VALUES (?, ?, ?, ?)", (entity, project, name, json.dumps(doc))
            )
        return known is None

    # Files of lines

    def put(self, run: str, file: str, offset: int, lines: Sequence[str]) -> None:
        """Set lines from `offset` on; raises Breach where that leaves a gap."""
        with self._lock, self._db:
            held = self.count(run, file)
            if offset > held:
                raise Breach(f"{run}: {file} has {held} lines, and is given line {offset}")
            again = list(self.lines(run, file, offset))[: len(lines)]
            self.tally("lines said again", len(again))
            self.tally("lines said otherwise", sum(map(_differ, again, lines)))
            self._db.executemany(
                "INSERT OR REPLACE INTO line VALUES (?, ?, ?, ?)",
                ((run, file, number, line) for number, line in enumerate(lines, offset)),
            )

    def replace(self, run: str, file: str, lines: Sequence[str]) -> None:
        """A file that is replaced as a whole."""
        with self._lock, self._db:
            self._db.execute("DELETE FROM line WHERE (run, file) = (?, ?)", (run, file))
            self._db.executemany(
                "INSERT INTO line VALUES (?, ?, ?, ?)",
                ((run, file, number, line) for number, line in enumerate(lines)),
            )

    def count(self, run: str, file: str) -> int:
        """How many lines a file has."""
        query = "SELECT count(*) FROM line WHERE (run, file) = (?, ?)"
        with self._lock:
            return int(self._db.execute(query, (run, file)).fetchone()[0])

    def lines(self, run: str, file: str, after: int = 0) -> list[str]:
        """The lines of a file, from a number on."""
        query = "SELECT content FROM line WHERE (run, file) = (?, ?) AND number >= ? ORDER BY number"
        with self._lock:
            return [row[0] for row in self._db.execute(query, (run, file, after)).fetchall()]

    # Artifacts

    def put_artifact(self, id_: str, doc: Mapping[str, Any]) -> None:
        """Set what is known of a version."""
        query = "INSERT INTO artifact (id, doc) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET doc = excluded.doc"
        with self._lock, self._db:
            self._db.execute(query, (id_, json.dumps(doc)))

    def artifacts(self) -> list[dict[str, Any]]:
        """Every version, in the order in which they were created."""
        with self._lock:
            rows = self._db.execute("SELECT doc FROM artifact ORDER BY n").fetchall()
        return [dict(json.loads(doc)) for (doc,) in rows]

    # What tests want to know

    def breach(self, what: str) -> None:
        """Write down what a client did wrong, or what this server does not know."""
        with self._lock, self._db:
            self._db.execute("INSERT INTO breach VALUES (?)", (what,))

    def breaches(self) -> list[str]:
        """All of it."""
        with self._lock:
            return [row[0] for row in self._db.execute("SELECT what FROM breach").fetchall()]

    def tally(self, name: str, count: int = 1) -> None:
        """Count something that happened."""
        with self._lock, self._db:
            self._db.execute(
                "INSERT INTO tally VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET count = count + ?",
                (name, count, count),
            )

    def tallies(self) -> dict[str, int]:
        """What happened how often."""
        with self._lock:
            return dict(self._db.execute("SELECT name, count FROM tally").fetchall())

    def runs(self) -> list[dict[str, Any]]:
        """Every run, with its names."""
        with self._lock:
            rows = self._db.execute("SELECT entity, project, name, doc FROM run").fetchall()
        return [{"entity": e, "project": p, "name": n, **json.loads(doc)} for e, p, n, doc in rows]


def _differ(one: str, other: str) -> bool:
    """Whether two lines of history differ in more than the time since their core began."""
    first, second = json.loads(one), json.loads(other)
    return {**first, "_runtime": 0} != {**second, "_runtime": 0}
