"""Builders of what flows from stage to stage: records, entries, parts, bundles, rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sidestep.wire import WORKER, Kind, Record, checksum, encode_record
from sidestepd.rows import MAIN_AXIS, Bundle, Call, Cause, Part, Position, Row
from sidestepd.spool import Entry, EntryKind

_sequences = itertools.count()


def session_id(number: int) -> bytes:
    """The id of the `number`-th session."""
    return number.to_bytes(16, "big")


# Records


def log(step: int, data: Mapping[str, Any] | None = None, *, stage: str | None = None, time: float = 1.0) -> bytes:
    """What `run.log(data, step=step)` says."""
    return _record(Kind.LOG, step, {"loss": 0.5} if data is None else data, stage, time)


def counted(count: int, data: Mapping[str, Any] | None = None, *, stage: str | None = None) -> bytes:
    """What the `count`-th `run.log(data)` says."""
    return _record(Kind.COUNTED, count, {"loss": 0.5} if data is None else data, stage, 1.0)


def config(**data: Any) -> bytes:
    """What `run.config.update(data)` says."""
    return _record(Kind.CONFIG, None, data, None, 1.0)


def summary(data: Mapping[str, Any], *, stage: str | None = None, time: float = 1.0) -> bytes:
    """What `run.summary.update(data)` says."""
    return _record(Kind.SUMMARY, None, data, stage, time)


def define(name: Any, *, stage: str | None = None, **attributes: Any) -> bytes:
    """What `run.define_metric(name, ...)` says."""
    return _record(Kind.DEFINE, None, {"name": name, **attributes}, stage, 1.0)


def named(**data: Any) -> bytes:
    """What `run.name = ...` and its like say."""
    return _record(Kind.NAMED, None, data, None, 1.0)


def samples(values: Any, *, time: float = 1.0, **more: Any) -> bytes:
    """What was read of a machine."""
    return _record(Kind.SAMPLES, None, {"values": values, **more}, None, time)


def alert(title: Any, text: str = "x", level: str = "WARN") -> bytes:
    """What people should hear of."""
    return _record(Kind.ALERT, None, {"title": title, "text": text, "level": level}, None, 1.0)


def _record(kind: Kind, step: int | None, data: Mapping[str, Any], stage: str | None, time: float) -> bytes:
    return encode_record(Record(kind=kind, time=time, step=step, data=data, stage=stage))


# Entries


@dataclass(kw_only=True)
class Tape:
    """A spool being written: each method appends an entry at the time `now` and returns it."""

    now: float = 0.0
    entries: list[Entry] = field(default_factory=list)
    next: dict[int, int] = field(default_factory=dict)
    """The sequence of each session's next record."""

    def hello(
        self, session: int, *, rank: int | None = None, world: int = 1, launch: str = "L", more: bool = False,
        first: int | None = None, offered: int = 0, dropped: Mapping[str, int] | None = None, attempt: int = 0,
        role: str = WORKER,
    ) -> Entry:  # fmt: skip
        """A session begins or comes back; by default its number is its rank. It is the process of that number."""
        first = self.next.setdefault(session, 0) if first is None else first
        self.next[session] = max(first, self.next.get(session, 0))
        rank = session if rank is None else rank
        facts = {
            "rank": rank, "world": world, "node": "n0", "launch": launch, "attempt": attempt, "more": more,
            "role": role, "pid": session,
        }  # fmt: skip
        return self._event(EntryKind.HELLO, session, first, **facts, offered=offered, dropped=dropped or {})

    def say(self, session: int, *records: bytes, more: bool = False) -> Entry:
        """A frame; bytes that are no record count as one record each."""
        first = self.next.setdefault(session, 0)
        self.next[session] = first + len(records)
        body = b"".join(records)
        return self._append(
            Entry(
                kind=EntryKind.FRAME, session=session_id(session), first=first, count=len(records), more=more,
                crc=checksum(body), received=self.now, body=body,
            )
        )  # fmt: skip

    def bye(self, session: int, *, offered: int = 0) -> Entry:
        """A session ends well."""
        return self._event(
            EntryKind.BYE, session, self.next.get(session, 0), exit_code=0, offered=offered, dropped={}
        )

    def lease(self, session: int) -> Entry:
        """A session was not heard of for a lease."""
        return self._event(EntryKind.LEASE, session, 0, offered=0, dropped={})

    def counters(self, session: int, **facts: Any) -> Entry:
        """A session's heartbeat said something new."""
        return self._event(EntryKind.COUNTERS, session, 0, **facts)

    def vital(self, session: int, state: str, since: float) -> Entry:
        """Intake saw something of a session's process: "quiet", "heard" or "gone"."""
        return self._event(EntryKind.VITAL, session, self.next.get(session, 0), state=state, since=since)

    def boot(self) -> Entry:
        """Intake started."""
        return self._append(Entry.of_event(EntryKind.BOOT, received=self.now, boot="b"))

    def close(self, exit_code: int = 0) -> Entry:
        """The run shall be finished."""
        return self._append(Entry.of_event(EntryKind.CLOSE, received=self.now, exit_code=exit_code))

    def _event(self, kind: EntryKind, session: int, first: int, **facts: Any) -> Entry:
        return self._append(Entry.of_event(kind, session_id(session), first=first, received=self.now, **facts))

    def _append(self, entry: Entry) -> Entry:
        self.entries.append(replace(entry, id=len(self.entries) + 1))
        return self.entries[-1]


def corrupted(entry: Entry) -> Entry:
    """The same with one bit of its body flipped."""
    return replace(entry, body=bytes([entry.body[0] ^ 1]) + entry.body[1:])


# Parts, bundles, rows


def part(
    step: int = 0,
    data: Mapping[str, Any] | None = None,
    *,
    rank: int = 0,
    session: int | None = None,
    axis: str = MAIN_AXIS,
    time: float = 1.0,
    attempt: int = 0,
    used: bool = False,
    own: int | None = None,
    moves: bool = True,
    position: Position | None = None,
    apart: str = "",
) -> Part:
    """What one rank said in one call; its session has its rank's number. `own` counts a call without a step."""
    values = {"loss": 0.5} if data is None else data
    return Part(
        position=position or Position(1, next(_sequences)),
        session=session_id(rank if session is None else session),
        rank=rank,
        axis=axis,
        step=step,
        time=time,
        values=values,
        attempt=attempt,
        used=used,
        call=None if own is None else Call(own, frozenset(values)),
        moves=moves,
        apart=apart,
    )


def bundle(
    step: int = 0, *datas: Mapping[str, Any], axis: str = MAIN_AXIS, cause: Cause = "passed", time: float = 1.0,
    attempt: int = 0,
) -> Bundle:  # fmt: skip
    """One step's row before it is reduced: what rank 0, rank 1, ... said."""
    parts = [
        part(step, data, rank=rank, axis=axis, time=time) for rank, data in enumerate(datas or [{"loss": 0.5}])
    ]
    return Bundle(axis=axis, attempt=attempt, step=step, parts=tuple(parts), cause=cause)


def row(
    step: int = 0,
    values: Mapping[str, Any] | None = None,
    *,
    places: Mapping[str, int] | None = None,
    positions: Sequence[tuple[int, int]] = ((1, 0),),
    late: bool = False,
    restore: Mapping[str, Any] | None = None,
) -> Row:
    """A decided row, by default of the main axis."""
    return Row(
        step=step,
        time=1.0,
        values={MAIN_AXIS: step, "loss": 0.5} if values is None else values,
        places={MAIN_AXIS: step} if places is None else places,
        positions=tuple(Position(*position) for position in positions),
        late=late,
        restore=restore or {},
    )
