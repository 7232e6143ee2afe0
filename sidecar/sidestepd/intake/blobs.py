"""The bytes of media on disk: pieces as they come, each blob in a file of its own.

    BLOB records ─▶ blobs/SESSION-NUMBER, synced ─▶ an entry of the spool that says so ─▶ ACK

- files first, then the entry: what an entry calls complete is on the disk. A piece that comes again is written
  over itself
- a file's name is made of the session and of a number, never of anything that a worker calls it
- a piece is taken where the file ends, or before: nobody makes a file with a hole in it
- there is a quota for media, and each disk keeps its reserve; only sessions that send blobs are refused for want
  of it
- what couriers send is no part of the quota: ranks whose checkpoints each need the rest of it would wait for one
  another for ever
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sidestep.wire import MAX_CHUNK_BYTES, Frame, Kind, Record, Undecodable, decode_records
from sidestep.wire.limits import END_OF_SEQUENCES
from sidestepd.errors import SpoolFull
from sidestepd.room import free_bytes

CREDIT_BYTES = 2 * 1024 * 1024
"""What a session that sends blobs may have under way: it waits in memory while files are synced."""
REOPEN_AT = 0.8
"""Once full, blobs are taken again when no more than this part of the room is used."""
_FULL = (errno.ENOSPC, errno.EDQUOT)

Facts = dict[str, Any]
"""What an entry says of a frame: `ends` are `[seq, id, size, crc, failed]`, with SHA-256 behind it where that was
said; `lost` are `[seq, reason]`."""


class BlobStore:
    """One run's blobs. `write` and `look` run in another thread, one at a time."""

    def __init__(self, folder: Path, *, quota: int, reserve: int) -> None:
        self.folder, self._quota, self._reserve = folder, quota, reserve
        self._used, self._taken, self._free = 0, 0, reserve + quota
        self._couriers: set[str] = set()
        """What the files of couriers' blobs are called before the number."""
        self._theirs = 0
        self.closed = False
        """No media are taken."""
        self.full = False
        """Nor is anything of couriers."""
        self.sent_by_couriers = 0
        folder.mkdir(mode=0o700, exist_ok=True)
        self.look()

    @property
    def used(self) -> int:
        """Bytes of media in files, as far as it was measured, with what was taken since."""
        return self._used + self._taken

    @property
    def theirs(self) -> int:
        """The same of couriers, as it was measured."""
        return self._theirs

    def look(self) -> None:
        """Measure; delivery deletes what it is done with."""
        taken, used, theirs = self._taken, 0, 0
        for name, size in _sizes(self.folder):
            if name.partition("-")[0] in self._couriers:
                theirs += size
            else:
                used += size
        self._used, self._theirs, self._free = used, theirs, free_bytes(self.folder)
        self._taken -= taken
        if self._share(0) <= REOPEN_AT:
            self.closed = False
        if self._share_of_disk(0) <= REOPEN_AT:
            self.full = False

    def admit(self, size: int) -> bool:
        """Whether a frame of `size` bytes of media may be taken; counts it if so."""
        self.closed = self.closed or self._share(size) > 1
        self._taken += 0 if self.closed else size
        return not self.closed

    def admit_from_courier(self, session: bytes, size: int) -> bool:
        """The same for a courier's."""
        self._couriers.add(session.hex())
        self.full = self.full or self._share_of_disk(size) > 1
        if not self.full:
            self._free -= size
            self.sent_by_couriers += size
        return not self.full

    def _share(self, more: int) -> float:
        """How much of the room would be used."""
        return max((self.used + more) / self._quota, self._share_of_disk(more))

    def _share_of_disk(self, more: int) -> float:
        """All media that are here are still to be written out once more; files are only given another name."""
        free = self._free - self._taken - more
        return (self.used + self._reserve) / max(free, 1)

    def write(self, frames: Sequence[Frame]) -> list[Facts]:
        """Put the pieces in these frames into their files, and sync those; what each frame's entry shall say.

        Raises SpoolFull if there is no room: then nothing was promised, and the same may come again.
        """
        files: dict[Path, int] = {}
        made = False
        try:
            told = []
            for frame in frames:
                facts: Facts = {"ends": [], "lost": []}
                for seq, record in enumerate(decode_records(frame.body, frame.count), frame.first):
                    made = self._take(frame.session, seq, record, facts, files) or made
                told.append(facts)
            for descriptor in files.values():
                os.fsync(descriptor)
            if made:
                sync_folder(self.folder)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self.closed = True
            raise SpoolFull(f"{self.folder}: {error.strerror}") from error
        finally:
            for descriptor in files.values():
                os.close(descriptor)
        return told

    def _take(
        self, session: bytes, seq: int, record: Record | Undecodable, facts: Facts, files: dict[Path, int]
    ) -> bool:
        """Take in one record; whether that made a file."""
        if isinstance(record, Undecodable):
            facts["lost"].append([seq, record.reason])
            return False
        number, piece = record.data.get("id"), record.data.get("bytes")
        if record.kind is not Kind.BLOB or type(number) is not int or not 0 <= number < END_OF_SEQUENCES:
            facts["lost"].append([seq, "blob"])
            return False
        if piece is None:
            facts["ends"].append([seq, number, *_end(record)])
            return False
        path = self.folder / name_of(session, number)
        made = path not in files and not path.exists()
        if path not in files:
            files[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if not _write(files[path], record.data.get("at"), piece):
            facts["lost"].append([seq, "blob"])
        return made


def name_of(session: bytes, number: int) -> str:
    """What the file of a blob is called."""
    return f"{session.hex()}-{number}"


def _end(record: Record) -> tuple[Any, ...]:
    """Size, crc, why it failed, and the SHA-256 if that was said, of a blob of which no more will come."""
    data = record.data
    size, crc, failed = data.get("size"), data.get("crc"), data.get("failed", "")
    if not isinstance(failed, str) or (not failed and (type(size) is not int or type(crc) is not int)):
        return 0, 0, "malformed"
    sha256 = data.get("sha256")
    said = (sha256,) if isinstance(sha256, bytes) and len(sha256) == 32 else ()
    return size or 0, crc or 0, failed[:64], *said


def _write(descriptor: int, at: object, piece: object) -> bool:
    """Write a piece where it belongs, if that is no further than the file's end."""
    if type(at) is not int or not isinstance(piece, bytes) or not 0 < len(piece) <= MAX_CHUNK_BYTES:
        return False
    if not 0 <= at <= os.fstat(descriptor).st_size:
        return False
    left = memoryview(piece)
    while left:
        written = os.pwrite(descriptor, left, at)
        left, at = left[written:], at + written
    return True


def _sizes(folder: Path) -> Iterable[tuple[str, int]]:
    """Names and sizes of the files that are there; delivery may be deleting them."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                yield entry.name, entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                pass


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
