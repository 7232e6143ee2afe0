"""Which frames of blobs wait on the disk of a relay, and what of them is above and may go."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sidestep.wire import Frame
from sidestepd.entries import Entry
from sidestepd.intake.frames import name_of, told_by
from sidestepd.upstream.passage import Carried


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    end: int
    count: int


class FrameFiles:
    """The files in one folder, session by session, in their order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[bytes, deque[_File]] = {}

    def list(self, through: Mapping[bytes, int]) -> Iterator[tuple[bytes, Carried]]:
        """The frames that wait, of each session as far as its entries are settled; one beyond may not be whole."""
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            told = told_by(path.name)
            if told is not None and told[1] + told[2] <= through.get(told[0], 0):
                yield told[0], self._add(*told, path, path.stat().st_size)

    def take(self, entry: Entry) -> Carried:
        """The frame that an entry tells of."""
        crc, size = int(entry.facts["crc"]), int(entry.facts["size"])
        frame = Frame(session=entry.session, first=entry.first, count=entry.count, body=b"", crc=crc)
        return self._add(entry.session, entry.first, entry.count, crc, self._folder / name_of(frame), size)

    def _add(self, session: bytes, first: int, count: int, crc: int, path: Path, size: int) -> Carried:
        self._files.setdefault(session, deque()).append(_File(path, first + count, count))
        return Carried(first=first, count=count, size=size, load=partial(_load, session, first, count, crc, path))

    def settle(self, session: bytes, acknowledged: int) -> bool:
        """Everything of a session below this is above; whether a file went."""
        files, gone = self._files.get(session), False
        while files and files[0].end <= acknowledged:
            files.popleft().path.unlink(missing_ok=True)
            gone = True
        return gone

    def waiting(self, through: Mapping[bytes, int]) -> int:
        """Records that are not above, of each session as far as its entries are settled."""
        ends = ((file, through.get(session, 0)) for session, files in self._files.items() for file in files)
        return sum(file.count for file, end in ends if file.end <= end)


def _load(session: bytes, first: int, count: int, crc: int, path: Path) -> Frame | None:
    try:
        frame = Frame(session=session, first=first, count=count, body=path.read_bytes(), crc=crc)
    except OSError:
        return None
    return frame if frame.intact else None
