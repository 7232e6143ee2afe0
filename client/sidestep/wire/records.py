"""Records: one thing a worker said, packed at once and read back within bounds.

A record is a msgpack array `[kind, time, step, data]`, and a fifth entry names the stage when it has one.

- packing is the snapshot: nothing of the caller's is kept
- decoding never raises: what is no record comes back as `Undecodable`, one for each that was announced
- a record that can not be read takes no other with it, as long as it can be told where it ends
- what `encode_record` lets out, `decode_records` lets in
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from math import isfinite
from typing import Any

from sidestep.errors import LocalProtocolError
from sidestep.wire.limits import END_OF_SEQUENCES, MAX_NAME_CHARS, MAX_RECORD_BYTES
from sidestep.wire.plain import all_scalar, dump, ends, is_plain, load


class Kind(IntEnum):
    """What was said."""

    LOG = 1
    """Metrics at a step that the worker named."""
    COUNTED = 2
    """Metrics whose step is the session's own count, on from the base of its launch."""
    CONFIG = 3
    SUMMARY = 4
    DEFINE = 5
    SAMPLES = 6
    """What was read of the machine at that time. It has no step and moves none."""
    ALERT = 7
    """Something that people should hear of now."""
    BLOB = 8
    """Bytes that belong to media in other records: a piece of them, or that they are complete."""
    NAMED = 9
    """What the run shall be called from now on: `name`, `notes`, `tags`; or that it is about to be `preempted`."""
    OUTPUT = 10
    """Lines that the program printed."""
    PROGRAM = 11
    """What the program is: facts of it, or one file that belongs to it."""
    ARTIFACT = 12
    """Files of a version of an artifact, or of the run itself; their bytes travel as BLOBs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One thing a worker said.

    `time` is seconds since the epoch in the worker, `step` is None for the kinds that have none, `data` maps
    names to plain values (None, bool, int, float, str, bytes, and lists and dicts of these).
    """

    kind: Kind
    time: float
    step: int | None
    data: Mapping[str, Any]
    stage: str | None = None


@dataclass(frozen=True, slots=True)
class Undecodable:
    """A record that was announced and can not be read.

    `reason` is one of: malformed (no msgpack, or not all there), miscounted (the frame holds more than it
    announced), size, shape, time, step, stage, name, value.
    """

    reason: str


def decode_records(body: bytes, count: int) -> list[Record | Undecodable]:
    """Read the `count` records of a frame's body; the list always has `count` entries."""
    found = ends(body, count)
    if len(found) == count and found[-1:] != [len(body)]:
        return [Undecodable("miscounted")] * count
    known: set[str] = set()
    records = [_decode(body[start:end], known) for start, end in pairwise([0, *found])]
    return records + [Undecodable("malformed")] * (count - len(records))


def encode_record(record: Record) -> bytes:
    """Pack a record, or raise LocalProtocolError. Not the hot path of `log()`: this one checks everything."""
    parts = [int(record.kind), record.time, record.step, dict(record.data)]
    try:
        packed = dump(parts if record.stage is None else [*parts, record.stage])
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"a record that can not be packed: {error!r:.80}") from error
    decoded = _decode(packed, set())
    if isinstance(decoded, Undecodable):
        raise LocalProtocolError(f"a record that no daemon would take: its {decoded.reason}")
    return packed


def _decode(packed: bytes, known: set[str]) -> Record | Undecodable:
    if len(packed) > MAX_RECORD_BYTES:
        return Undecodable("size")
    try:
        parts = load(packed)
    except ValueError:
        return Undecodable("malformed")
    if type(parts) is not list or len(parts) not in (4, 5):
        return Undecodable("shape")
    kind, time, step, data = parts[:4]
    if type(kind) is not int or kind not in _KINDS or type(data) is not dict:
        return Undecodable("shape")
    record = Record(
        kind=_KINDS[kind], time=time, step=step, data=data, stage=parts[4] if len(parts) == 5 else None
    )
    fault = _fault(record, known)
    return record if fault is None else Undecodable(fault)


def _fault(record: Record, known: set[str]) -> str | None:
    """What is wrong with the contents of a record; `known` gathers the names that have been looked at."""
    if type(record.time) is not float or not isfinite(record.time):
        return "time"
    if not _is_step(record.step, record.kind):
        return "step"
    if record.stage is not None and not _is_name(record.stage):
        return "stage"
    names, values = record.data.keys(), record.data.values()
    if not names <= known:
        if not all(map(_is_name, names)):
            return "name"
        known.update(names)
    if not all_scalar(values) and not all(map(is_plain, values)):
        return "value"
    return None


def _is_step(step: object, kind: Kind) -> bool:
    if kind is Kind.LOG or kind is Kind.COUNTED:
        return type(step) is int and -END_OF_SEQUENCES < step < END_OF_SEQUENCES
    return step is None


def _is_name(name: object) -> bool:
    return isinstance(name, str) and len(name) <= MAX_NAME_CHARS


_KINDS = {int(kind): kind for kind in Kind}
