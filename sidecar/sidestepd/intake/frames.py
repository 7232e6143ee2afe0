"""What a relay does with the bytes of media: each frame of them lies in a file of its own, until it is above.

    FRAME of a session that sends blobs ─▶ blobs/SESSION-FIRST-COUNT-CRC.frame, synced ─▶ an entry ─▶ ACK

- a frame is kept uncut and unread, to be handed on as it came
- files first, then the entry; a frame that comes again is written over itself
- the quota, and who is refused for want of room, are those of a daemon that has a sink
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from sidestep.wire import Frame
from sidestepd.errors import SpoolFull
from sidestepd.intake.blobs import BlobStore, Facts, sync_folder

SUFFIX = ".frame"


class FrameStore(BlobStore):
    """One run's frames of blobs."""

    def write(self, frames: Sequence[Frame]) -> list[Facts]:
        """Put frames into files, and sync those; what each frame's entry shall say. Raises SpoolFull."""
        try:
            for frame in frames:
                _write(self.folder / name_of(frame), frame.body)
            sync_folder(self.folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.closed = True
            raise SpoolFull(f"{self.folder}: {error.strerror}") from error
        return [{"ends": [], "lost": [], "crc": frame.crc, "size": len(frame.body)} for frame in frames]


def name_of(frame: Frame) -> str:
    """What the file of a frame is called; names of one session sort as its frames do."""
    return f"{frame.session.hex()}-{frame.first:020d}-{frame.count}-{frame.crc:08x}{SUFFIX}"


def told_by(name: str) -> tuple[bytes, int, int, int] | None:
    """Session, first sequence, count and crc, from a file's name; None if it is none of ours."""
    if not name.endswith(SUFFIX):
        return None
    try:
        session, first, count, crc = name.removesuffix(SUFFIX).split("-")
        return bytes.fromhex(session), int(first), int(count), int(crc, 16)
    except ValueError:
        return None


def _write(path: Path, body: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        left = memoryview(body)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
