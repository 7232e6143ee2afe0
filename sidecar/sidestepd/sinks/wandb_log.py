"""Read `.wandb` files: what wandb-core has written of a run, also while it is still writing.

A file is the seven bytes of `HEADER`, then blocks of 32 KiB in LevelDB's log format. A record is one FULL
chunk, or FIRST, MIDDLE ... and LAST; each chunk carries its own crc. What is guaranteed:

- a record is returned whole, as it was written, in its order and once, or not at all
- nothing inside a file makes reading raise: a damaged chunk is counted, the rest of its block is skipped (the
  length of a damaged chunk can not be trusted), and every later block is read
- the end of the file is not damage: a chunk that is not all there, or a record without its LAST chunk, is not
  yet there, and a later `read()` returns it once it is; neither is a rest of zeros with nothing behind it
- `offset` never lies inside a record: whoever goes on from it gets just the records not returned before

wandb 0.31 ships no reader. Its schema, `wandb.proto`, is imported only by what needs it.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
BLOCK = 32 * 1024
"""Counted from the start of the file, header included."""
CHUNK = struct.Struct("<IHB")
"""Before each chunk's data: its crc, its length, its type."""
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_DAMAGED, _ZEROS = -1, -2
_BEGINS = frozenset({_FULL, _FIRST})
_ENDS = frozenset({_FULL, _LAST})
_SEEDS = {kind: zlib.crc32(bytes([kind])) for kind in (_FULL, _FIRST, _MIDDLE, _LAST)}
"""A chunk's crc goes on from that of its type: a flipped type is as damaged as flipped data."""
_STARTED = re.compile(r"run-(\d{8}_\d{6})-")

_Chunk = tuple[int, int, int, bytes]
"""Where it starts, where the next one starts, its type, its data."""
_Record: TypeAlias = Any
_HistoryRecord: TypeAlias = Any
"""Messages of `wandb.proto`, which ships no types."""


class LogReader:
    """The payloads of one file, from `offset` on. Not for several threads."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.offset = offset
        """Just after the last whole record, or the damage behind it; a later reader may go on from here."""
        self._path = path
        self._settled = 0
        self._tail = 0

    @property
    def damaged(self) -> int:
        """Chunks skipped so far, because their crc, length or place in the sequence was wrong."""
        return self._settled + self._tail

    def read(self) -> Iterator[bytes]:
        """Whole payloads from `offset` to the end of the file as it is now; `offset` moves with each."""
        self._tail = 0
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            if self._past_header(file):
                yield from self._join(self._chunks(file))

    def skip(self, chunks: int, *, to: int) -> None:
        """Count chunks as damaged and leave them behind."""
        self._settled += chunks
        self.offset = to

    def _past_header(self, file: BinaryIO) -> bool:
        if self.offset >= len(HEADER):
            return True
        header = file.read(len(HEADER))
        if len(header) < len(HEADER):
            return False
        self.skip(int(header != HEADER), to=len(HEADER))
        return True

    def _join(self, chunks: Iterator[_Chunk]) -> Iterator[bytes]:
        parts: list[bytes] = []
        for start, end, kind, data in chunks:
            if kind in _BEGINS and parts:  # the record before was never finished
                self.skip(len(parts), to=start)
                parts = []
            elif kind not in _BEGINS and (kind == _DAMAGED or not parts):
                self.skip(len(parts) + 1, to=end)
                parts = []
                continue
            parts.append(data)
            if kind in _ENDS:
                self.offset = end
                yield b"".join(parts)
                parts = []

    def _chunks(self, file: BinaryIO) -> Iterator[_Chunk]:
        file.seek(self.offset)
        start, zeros_from = self.offset, None
        while block := file.read(BLOCK - start % BLOCK):
            finished = (start + len(block)) % BLOCK == 0
            for at, end, kind, data in _split(block, finished):
                if kind == _ZEROS:
                    zeros_from = start + at if zeros_from is None else zeros_from
                    continue
                if zeros_from is not None:
                    yield zeros_from, start, _DAMAGED, b""
                    zeros_from = None
                if kind == _DAMAGED and not finished:
                    self._tail = 1  # counted for good when the block is finished
                    return
                yield start + at, start + end, kind, data
            if not finished:
                return
            start += len(block)


def _split(block: bytes, finished: bool) -> Iterator[_Chunk]:
    """Take a block apart, up to what is damaged, empty, or, in an unfinished one, torn."""
    at, size = 0, len(block)
    while size - at >= CHUNK.size:
        crc, length, kind = CHUNK.unpack_from(block, at)
        end = at + CHUNK.size + length
        data = block[at + CHUNK.size : end]
        if end > size or kind not in _SEEDS or zlib.crc32(data, _SEEDS[kind]) != crc:
            if kind == 0 and not block[at:].strip(b"\0"):
                yield at, size, _ZEROS, b""
            elif finished or end < size:
                yield at, size, _DAMAGED, b""
            return
        yield at, end, kind, data
        at = end


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryRow:
    """One row of a run's history; nested names are joined by dots; `_step` and `_timestamp` are values."""

    step: int
    values: Mapping[str, Any]


def records(path: Path, offset: int = 0) -> Iterator[_Record]:
    """Every record in the file now."""
    return _parsed(LogReader(path, offset))


def history(path: Path, offset: int = 0) -> Iterator[HistoryRow]:
    """Every history row in the file now."""
    return (_row(record.history) for record in records(path, offset) if record.HasField("history"))


def alerts(path: Path) -> Iterator[tuple[str, str, str]]:
    """Title, text and level of every alert in the file now."""
    return ((it.alert.title, it.alert.text, it.alert.level) for it in records(path) if it.HasField("alert"))


def nested_history(path: Path) -> Iterator[HistoryRow]:
    """The same, with nested names as dicts in dicts, as they were logged."""
    for record in records(path):
        if record.HasField("history"):
            values: dict[str, Any] = {}
            for item in record.history.item:
                _put(values, item.nested_key or [item.key], json.loads(item.value_json))
            yield HistoryRow(step=_step(record.history), values=values)


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *outer, name = path
    for key in outer:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):  # a name that is a value and a place at once: the value was first
            return
    values[name] = value


def steps_of(reader: LogReader) -> Iterator[int]:
    """The `_step` of each history row that `reader` has not read yet."""
    return (_step(record.history) for record in _parsed(reader) if record.HasField("history"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a file has got: the steps of its rows, the ids of its artifacts, the paths of the run's files."""

    steps: tuple[int, ...]
    artifacts: tuple[str, ...]
    files: frozenset[str]


def told_in(reader: LogReader) -> Told:
    """What `reader` has not read yet."""
    steps: list[int] = []
    artifacts: list[str] = []
    files: set[str] = set()
    for record in _parsed(reader):
        if record.HasField("history"):
            steps.append(_step(record.history))
        elif record.HasField("artifact"):
            artifacts.append(str(record.artifact.client_id))
        elif record.HasField("files"):
            files.update(str(it.path) for it in record.files.files)
    return Told(steps=tuple(steps), artifacts=tuple(artifacts), files=frozenset(files))


def segments(wandb_dir: Path) -> list[Path]:
    """Every run's file in `wandb_dir`, oldest first: by its directory's second, then by its last change."""
    found = [*wandb_dir.glob("offline-run-*/run-*.wandb"), *wandb_dir.glob("run-*/run-*.wandb")]
    return sorted(found, key=lambda path: (_started(path), path.stat().st_mtime_ns, path))


def _started(path: Path) -> str:
    started = _STARTED.search(path.parent.name)
    return started[1] if started else ""


def _parsed(reader: LogReader) -> Iterator[_Record]:
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2 as pb

    for payload in reader.read():
        try:
            record = pb.Record.FromString(payload)  # type: ignore[attr-defined]
        except DecodeError:  # as it was written, and yet no record of this schema
            reader.skip(1, to=reader.offset)
            continue
        yield record


def _row(history: _HistoryRecord) -> HistoryRow:
    values = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
    return HistoryRow(step=_step(history), values=values)


def _step(history: _HistoryRecord) -> int:
    """The step that wandb-core notes beside the items; it is the item `_step` again."""
    return int(history.step.num)
