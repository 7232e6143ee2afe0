"""Cells of tables: plain values, times, arrays and media, all rows in one blob.

    rows ── packed ──▶ [[1, "a", None], ...] with what is not plain beside it: [[row, column], kind, facts]
                   └─▶ one blob for the rows, one for the bytes of all media in them

- what a cell can not be is refused with its row and column, and the cell is empty
- times travel as text; numbers stay what they are, whatever library they came from
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sidestep import convert
from sidestep.errors import UnsupportedValue
from sidestep.media import arrays
from sidestep.media.base import BLOB, Blobs, Buffer, Files, Media, Ref
from sidestep.media.implicit import media_of
from sidestep.media.value import Content, plain_content, refuse, unpacked

PART = "_part"
"""Like `BLOB`, of bytes that are a part of a blob."""
FILES_AT_ONCE = 1 << 28
"""Media of a table beyond this many bytes travel in blobs of their own."""

Place = list[int]
"""Row, column, and the entry of a list in a cell."""


class Gathered:
    """Blobs that become one: thousands of small images in a table are no thousands of transfers."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, data: Buffer | tuple[Buffer, ...]) -> Ref:
        """Take bytes along with the others."""
        if self._size > FILES_AT_ONCE:
            return self._blobs.add(data)
        piece = b"".join(data) if isinstance(data, tuple) else bytes(data)
        at, self._size = self._size, self._size + len(piece)
        self._pieces.append(piece)
        return {PART: [at, len(piece)]}

    def add_file(self, path: Any) -> Ref:
        """A file travels by itself: it is read in the background."""
        return self._blobs.add_file(path)

    def handed_over(self) -> Ref | bytes:
        """What stands for all that was added."""
        return self._blobs.add(tuple(self._pieces)) if self._pieces else b""


class Parts:
    """The files of what `Gathered` has made one, in the daemon."""

    def __init__(self, whole: Ref | bytes, files: Files) -> None:
        self._whole = whole
        self._files = files
        self._content: bytes | None = None

    def path(self, ref: Ref | bytes) -> Path:
        """A file with what a ref stands for."""
        if not isinstance(ref, bytes) and PART not in ref:
            return self._files.path(ref)
        path = self._files.new("")
        path.write_bytes(self.read(ref))
        return path

    def read(self, ref: Ref | bytes) -> bytes:
        """What a ref stands for."""
        if isinstance(ref, bytes) or PART not in ref:
            return self._files.read(ref)
        if self._content is None:
            self._content = self._files.read(self._whole)
        at, size = ref[PART]
        if not 0 <= at <= at + size <= len(self._content):
            raise ValueError("a cell names bytes that its table does not have")
        return self._content[at : at + size]

    def new(self, suffix: str) -> Path:
        """As `Files.new`."""
        return self._files.new(suffix)


def packed(rows: Sequence[Sequence[Any]], blobs: Blobs) -> dict[str, Any]:
    """The facts of rows."""
    gathered = Gathered(blobs)
    others: list[list[Any]] = []
    plain = [
        [_cell(value, [at, column], gathered, others) for column, value in enumerate(row)]
        for at, row in enumerate(rows)
    ]
    return {
        "rows": plain_content([plain, others]).handed_to(blobs),
        "content": gathered.handed_over(),
        "files": [facts for _, _, facts in others for facts in _blobs_in(facts)],
    }


def shown(facts: Mapping[str, Any], files: Files) -> list[list[Any]]:
    """The rows again, with wandb's media in them."""
    from sidestep import media

    rows, others = unpacked(files.read(facts["rows"]))
    parts = Parts(facts["content"], files)
    for place, kind, found in others:
        value: Any
        if kind == "array":
            value = arrays.numpy_of(found, parts)
        elif kind == "time":
            value = _time(found)
        else:
            value = media.show({media.MARK: kind, "facts": found}, parts)
            value = value.to_json() if kind == "histogram" else value  # which wandb has no cell for
        _put(rows, place, value)
    return rows  # type: ignore[no-any-return]


def _cell(value: Any, place: Place, blobs: Gathered, others: list[list[Any]]) -> Any:
    kind = type(value)
    if kind is float or kind is bool or value is None or (kind is str and value.isascii()):
        return value
    try:
        if isinstance(value, list | tuple) and any(isinstance(it, Media) or _is_foreign(it) for it in value):
            return [_cell(it, [*place, at], blobs, others) for at, it in enumerate(value)]
        if (found := _other(value, blobs)) is not None:
            others.append([place, *found])
            return None
        return convert.plain(value)
    except UnsupportedValue as error:
        refuse(f"cell in row {place[0]}, column {place[1]}", type(value), str(error))
        return None


def _other(value: Any, blobs: Blobs) -> list[Any] | None:
    """Kind and facts of what is not plain."""
    if isinstance(value, datetime.date):
        text = value.isoformat()
        return None if text == "NaT" else ["time", {"at": text}]
    if arrays.is_array(value) and len(value.shape) > 0:
        facts = arrays.taken(value)
        data: Content = facts["data"]
        return ["array", facts | {"data": data.handed_to(blobs)}]
    medium = media_of(value)
    return None if medium is None else [medium.kind, medium.pack(blobs)]


def _is_foreign(value: Any) -> bool:
    return media_of(value) is not None


def _blobs_in(facts: Any) -> Iterator[Ref]:
    """Refs to blobs of their own: a row waits for those that its facts name, and does not look into blobs."""
    if isinstance(facts, Mapping):
        if BLOB in facts and len(facts) == 1:
            yield dict(facts)
        else:
            for item in facts.values():
                yield from _blobs_in(item)
    elif isinstance(facts, list):
        for item in facts:
            yield from _blobs_in(item)


def _time(facts: Mapping[str, Any]) -> datetime.date:
    text = str(facts["at"])
    return datetime.datetime.fromisoformat(text) if "T" in text else datetime.date.fromisoformat(text)


def _put(rows: list[Any], place: Place, value: Any) -> None:
    *way, last = place
    for at in way:
        rows = rows[at]
    rows[last] = value
