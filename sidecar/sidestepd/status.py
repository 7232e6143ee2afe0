"""How a run stands, living or finished: read from its files, asking nobody and writing nothing.

The ledger is counted from both ends. What was offered is the workers' word, what became of it is delivery's,
and what is pending is counted in the spool and in the workers; that the two sides agree is the promise that
nothing was lost without a count.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sidestep.errors import SettingsError
from sidestep.wire import WORKER
from sidestepd import placement
from sidestepd.errors import SpoolDamaged
from sidestepd.processes import Lock, read_json
from sidestepd.room import CLOSED_MARK
from sidestepd.rowlog import RowLogReader
from sidestepd.rows import Alert
from sidestepd.rundir import BLOBS, DEATHS, TROUBLE, UPSTREAM, RunFile
from sidestepd.spool import SpoolReader, StoredSession

_TRIES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What became of every record. `rejected` and `dropped` are by reason.

    `pending` is on its way, in a worker or in the spool; `unknown` was offered by a worker that ended without
    a word, and never came. `values_refused` counts no records but values, which workers left out of theirs, or
    delivery when the run had as many names as it may.
    """

    offered: int = 0
    delivered: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    pending: int = 0
    unknown: int = 0
    values_refused: int = 0

    @property
    def balances(self) -> bool:
        """Whether every record that was offered is accounted for."""
        given_up = sum(self.rejected.values()) + sum(self.dropped.values())
        return self.offered == self.delivered + given_up + self.pending + self.unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionReport:
    """One life of one worker. `state` is "live", "bye", or "lost" for one that ended without a word."""

    rank: int
    node: str
    pid: int
    state: str
    offered: int
    acknowledged: int
    dropped: Mapping[str, int]
    values_refused: int = 0
    role: str = WORKER

    @property
    def missing(self) -> int:
        """Records that were offered, not dropped, and have not come."""
        return self.offered - sum(self.dropped.values()) - self.acknowledged


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything a user asks of a run. `state` is "running", "finished" or "interrupted"."""

    run: RunFile
    state: str
    rows: int
    last_step: int | None
    late_rows: int
    forced: int
    conflicts: int
    unmatched: tuple[str, ...]
    sessions: tuple[SessionReport, ...]
    ledger: Ledger
    spool_bytes: int
    media: Mapping[str, Any] = field(default_factory=dict)
    """How many media were `delivered` and are `waiting`, were `left_out` by reason, and the `bytes` that wait."""
    artifacts: Mapping[str, Any] = field(default_factory=dict)
    """Likewise of artifacts, and of calls of `save`; `unchanged` were the same as the version before them."""
    full: bool = False
    """No room is left: workers keep what they have."""
    spool_damaged: bool = False
    """What is told of workers is then what delivery had read of them; the next start salvages the spool."""
    trouble: str = ""
    """Why nothing reaches the sink, as far as that is known."""
    lasting: bool = False
    """Whether the trouble takes a person to heal it."""
    alerts: tuple[Alert, ...] = ()
    """What people were told, in this order."""
    upstream: Mapping[str, Any] = field(default_factory=dict)
    """Of a relay: the `address` of the daemon above, whether it is `connected`, how much is to go there."""

    @property
    def troubles(self) -> list[Alert]:
        """The alerts whose causes last, or were never seen to end."""
        open_: dict[str, Alert] = {}
        for alert in self.alerts:
            open_.pop(alert.cause, None)
            if not alert.over:
                open_[alert.cause] = alert
        return list(open_.values())

    @property
    def ranks(self) -> int:
        """How many ranks spoke."""
        return len({session.rank for session in self.sessions if session.role == WORKER})

    @property
    def lost_sessions(self) -> int:
        """How many workers ended without a word."""
        return sum(session.state == "lost" and session.role == WORKER for session in self.sessions)

    def to_json(self) -> dict[str, Any]:
        """As plain values, with the sums that the fields leave to the reader."""
        values = asdict(self) | {"ranks": self.ranks, "lost_sessions": self.lost_sessions}
        values["ledger"]["balances"] = self.ledger.balances
        del values["run"]["state"]  # as its supervisor left it; `state` is how it is
        return values


def report(run_dir: Path) -> Report:
    """Read a run directory. Raises SettingsError if it is none, or can not be read."""
    home = placement.home(run_dir)
    rowlog = RowLogReader(home / placement.ROW_LOG)
    run = RunFile.read(run_dir).with_what_wandb_made_of_it(read_json(run_dir / "about.json"))
    if run.exit_code is None:  # a run that closed itself has nobody to write that into run.json
        run = replace(run, exit_code=rowlog.meta("exit_code"))
    # In this order: what delivery had read by then is in the spool, or was and is counted as settled.
    state, told = _state(run, run_dir, rowlog), rowlog.meta("ledger", {})
    trouble = {} if state == "finished" else read_json(run_dir / TROUBLE) or read_json(run_dir / DEATHS)
    try:
        stored, unread = _spooled(home / placement.SPOOL, after=told.get("read_through", 0))
        damaged, found = False, [_session(one, state) for one in stored]
    except SpoolDamaged:
        damaged, found, unread = True, [_as_told(one) for one in told.get("sessions", {}).values()], 0
    sessions = tuple(sorted(found, key=lambda one: one.rank))
    return Report(
        run=run,
        state=state,
        rows=told.get("rows", 0),
        last_step=told.get("last_step") if told.get("rows") else None,
        late_rows=told.get("late_rows", 0),
        forced=told.get("forced", 0),
        conflicts=told.get("conflicts", 0),
        unmatched=tuple(told.get("unmatched", ())),
        sessions=sessions,
        ledger=_ledger(sessions, told, unread),
        media=_media(told, run_dir),
        artifacts={"delivered": 0, "unchanged": 0, "waiting": 0, "left_out": {}, **told.get("artifacts", {})},
        spool_bytes=sum(path.stat().st_size for path in home.glob("spool.db*")),
        full=state == "running" and (home / CLOSED_MARK).exists(),
        alerts=tuple(rowlog.alerts()),
        spool_damaged=damaged,
        upstream=_upstream(run_dir, state),
        trouble=str(trouble.get("what", "")),
        lasting=bool(trouble.get("lasting", False)),
    )


def losses(found: Report) -> str:
    """What was lost, in one phrase; "" if nothing was."""
    ledger, silent = found.ledger, found.lost_sessions
    parts = [f"{count} dropped ({reason})" for reason, count in sorted(ledger.dropped.items()) if count]
    parts += [f"{count} rejected ({reason})" for reason, count in sorted(ledger.rejected.items()) if count]
    if silent:
        who = f"{silent} worker{'s' if silent > 1 else ''} that ended without a word"
        parts.append(f"{f'{ledger.unknown} and ' if ledger.unknown else ''}whatever else {who} had not sent")
    left_out = found.media.get("left_out", {})
    parts += [f"{count} media left out ({reason})" for reason, count in sorted(left_out.items()) if count]
    left_out = found.artifacts.get("left_out", {})
    parts += [f"{count} artifacts left out ({reason})" for reason, count in sorted(left_out.items()) if count]
    parts += [f"{ledger.values_refused} values that can not be logged"] if ledger.values_refused else []
    if not (ledger.balances or found.spool_damaged):
        parts.append("and the ledger does not balance, which is a defect: please report it")
    return ", ".join(parts)


def _media(told: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    folder = run_dir / BLOBS
    sizes = (path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.is_dir() else ()
    return {
        "delivered": 0,
        "waiting": 0,
        "left_out": {},
        **told.get("media", {}),
        "bytes": _sum_while_there(sizes),
    }


def _upstream(run_dir: Path, state: str) -> dict[str, Any]:
    found = read_json(run_dir / UPSTREAM)
    return found and found | {"connected": found.get("connected", False) and state == "running"}


def _sum_while_there(sizes: Iterable[int]) -> int:
    try:
        return sum(sizes)
    except FileNotFoundError:  # delivery is done with one of them
        return 0


def _state(run: RunFile, run_dir: Path, rowlog: RowLogReader) -> str:
    if rowlog.meta("state") == "closed":
        return "finished"
    locks = [run_dir / "intake.lock", Path(run.address.removeprefix("ipc://") + ".lock")]
    return "interrupted" if all(map(Lock.is_free, locks)) else "running"


def _spooled(path: Path, *, after: int) -> tuple[list[StoredSession], int]:
    """The sessions, and how many records lie above entry `after`: of one and the same moment."""
    if not path.exists():
        return [], 0
    try:
        reader = SpoolReader(path)
    except sqlite3.OperationalError as error:
        raise _unreadable(path, error) from error
    try:
        for _ in range(_TRIES):
            sessions, records = reader.sessions(), reader.records_after(after)
            if sessions == reader.sessions():
                break
        return sessions, records
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):  # it is only just being made
            raise _unreadable(path, error) from error
        return [], 0
    finally:
        reader.close()


def _unreadable(path: Path, error: sqlite3.OperationalError) -> SettingsError:
    if "no such column" in str(error):
        return SettingsError(f"{path.parent} was made by another version of sidestep, which alone can read it")
    return SettingsError(f"{path} can not be read now: {error}")


def _session(stored: StoredSession, state: str) -> SessionReport:
    dropped: dict[str, int] = dict(stored.counters.get("dropped", {}))
    ended = "lost" if stored.state == "lease" or state == "finished" else stored.state
    return SessionReport(
        rank=stored.hello.get("rank", 0),
        node=stored.hello.get("node", ""),
        pid=stored.hello.get("pid", 0),
        state="bye" if stored.state == "bye" else ended,
        # A heartbeat is older than the frames that came after it.
        offered=max(stored.counters.get("offered", 0), stored.next + sum(dropped.values())),
        acknowledged=stored.next,
        dropped=dropped,
        values_refused=stored.counters.get("values_refused", 0),
        role=stored.hello.get("role", WORKER),
    )


def _as_told(session: Mapping[str, Any]) -> SessionReport:
    """A session as delivery knows it, where the spool can not be asked."""
    dropped: dict[str, int] = dict(session["dropped"])
    ended = session["ended"]
    return SessionReport(
        rank=session["rank"],
        node=session["node"],
        pid=0,
        state="live" if not ended else "bye" if session["final"] is not None else "lost",
        offered=max(session["offered"], session["acknowledged"] + sum(dropped.values())),
        acknowledged=session["acknowledged"],
        dropped=dropped,
    )


def _ledger(sessions: Iterable[SessionReport], told: Mapping[str, Any], unread: int) -> Ledger:
    by_workers = _sum(session.dropped for session in sessions)
    unread -= told.get("settled_beyond", 0)  # delivery was started again, and has yet to read those once more
    unreadable = Counter(told.get("dropped", {}))
    unreadable -= _sum(session["dropped"] for session in told.get("sessions", {}).values())
    return Ledger(
        offered=sum(session.offered for session in sessions),
        delivered=told.get("delivered", 0),
        rejected=dict(told.get("rejected", {})),
        dropped=dict(by_workers + unreadable),
        pending=told.get("unsettled", 0) + unread + sum(s.missing for s in sessions if s.state != "lost"),
        unknown=sum(session.missing for session in sessions if session.state == "lost"),
        values_refused=told.get("values_refused", 0) + sum(session.values_refused for session in sessions),
    )


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total
