"""Make of media what the sink takes, in threads beside delivery, which goes on meanwhile.

- bytes are checked against what their worker said of them before anything looks at them
- what is bad is told as one word for the ledger and a line in the log, and never ends anything here
- what was made is kept until its row is written; a row of an earlier life is made anew
- files that are encoded on the way live in a folder of their own, until their row is confirmed or the process ends
"""

from __future__ import annotations

import logging
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from sidestep.media.base import BLOB, Ref
from sidestepd.gather import Job, key_of
from sidestepd.intake.blobs import name_of
from sidestepd.packed import BlobId, blobs_in, has_media
from sidestepd.rows import Row

logger = logging.getLogger(__name__)

SHOWN = "shown"
"""The folder of what is encoded, beside the blobs."""
WAIT_S = 0.05
_READ_BYTES = 1024 * 1024

Make = Callable[[Any, "BlobFiles"], Any]
"""What a sink makes of a value that is media, or has some in it. Raises ValueError, in words, if it is bad."""


class Corrupt(ValueError):
    """Bytes are not what their worker said they were."""


class BlobFiles:
    """What `show` of a kind of media sees: the files of its bytes, and room for files of its own."""

    def __init__(self, folder: Path, scratch: Path, facts: Mapping[BlobId, tuple[int, int]]) -> None:
        """`facts` are size and crc of the blobs that were not checked before."""
        self._folder, self._scratch, self._facts = folder, scratch, dict(facts)
        self._count = count()

    def path(self, ref: Ref | bytes) -> Path:
        """The file of a ref, checked; or one that is made of bytes."""
        if isinstance(ref, bytes):
            path = self.new("")
            path.write_bytes(ref)
            return path
        of = next(iter(blobs_in(ref)), None)
        if of is None:
            raise Corrupt(f"{ref.get(BLOB)!s:.80} stands for no bytes")
        path = self._folder / name_of(*of)
        if of in self._facts:
            _check(path, *self._facts.pop(of))
        return path

    def read(self, ref: Ref | bytes) -> bytes:
        """What a ref stands for."""
        return ref if isinstance(ref, bytes) else self.path(ref).read_bytes()

    def new(self, suffix: str) -> Path:
        """A file to encode into."""
        self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._scratch / f"{next(self._count)}{suffix}"


class Shower:
    """The threads, what they are at, and what they made."""

    def __init__(self, folder: Path, make: Make, *, threads: int, scratch: Path | None = None) -> None:
        """`folder` has the blobs. With a `scratch` elsewhere it is another's memory: nothing in it is changed."""
        self.folder, self._make, self._keep = folder, make, scratch is not None
        self._scratch = scratch or folder / SHOWN
        if not self._keep:
            shutil.rmtree(self._scratch, ignore_errors=True)  # of the last life
        self._pool = ThreadPoolExecutor(threads, "show")
        self._jobs: dict[bytes, Future[Any]] = {}
        self._untold: set[bytes] = set()
        self._folders: dict[bytes, Path] = {}
        self._by_step: dict[int, list[Path]] = {}
        self._number = count()
        self._done = threading.Event()

    def submit(self, job: Job) -> None:
        """Begin, or where a value of the same content is shown already, have that told once more."""
        self._untold.add(job.key)
        if job.key in self._jobs:
            self._done.set()
        else:
            scratch = self._folders[job.key] = self._scratch / str(next(self._number))
            files = BlobFiles(self.folder, scratch, job.blobs)
            future = self._jobs[job.key] = self._pool.submit(self._make, job.value, files)
            future.add_done_callback(lambda _: self._done.set())

    def poll(self) -> list[tuple[bytes, str]]:
        """What was shown since this was asked last, and why not, in a word, where that is so."""
        self._done.clear()
        finished = [key for key in self._untold if key not in self._jobs or self._jobs[key].done()]
        self._untold.difference_update(finished)
        return [
            (key, self._why(key) if key in self._jobs else "") for key in finished
        ]  # one that is gone was shown

    def wait(self) -> None:
        """A moment, or until something is shown."""
        self._done.wait(WAIT_S)

    def _why(self, key: bytes) -> str:
        error = self._jobs[key].exception()
        if error is None:
            return ""
        self._drop(key)
        logger.warning("media can not be shown: %s: %.500s", type(error).__name__, error)
        if isinstance(error, Corrupt):
            return "corrupt"
        return "bad" if isinstance(error, ValueError) else "failed"

    def _drop(self, key: bytes) -> None:
        self._jobs.pop(key, None)
        if (scratch := self._folders.pop(key, None)) is not None:
            shutil.rmtree(scratch, ignore_errors=True)

    def into(self, row: Row, *, beat: Callable[[], None]) -> Row:
        """A row with what the sink takes for the media in it; what can not be shown any more is left out."""
        media = {
            name: value for name, value in row.values.items() if type(value) in (dict, list) and has_media(value)
        }
        if not media:
            return row
        values = dict(row.values)
        for name, value in media.items():
            key = key_of(value)
            asked = key in self._untold
            self.submit(Job(key=key, value=value, blobs={}))
            while not self._jobs[key].done():
                beat()
                self.wait()
            try:
                values[name] = self._jobs[key].result()
            except Exception as error:  # noqa: BLE001 - a library's own code may raise anything, and the row goes on
                logger.warning("%.80r can not be shown in row %d: %s", name, row.step, error)
                del values[name]
            if (scratch := self._folders.pop(key, None)) is not None:
                self._by_step.setdefault(row.step, []).append(scratch)
            self._jobs.pop(key)
            if not asked:
                self._untold.discard(key)
        return replace(row, values=values)

    def settle(self, step: int) -> None:
        """The run holds this row."""
        for scratch in self._by_step.pop(step, ()):
            shutil.rmtree(scratch, ignore_errors=True)

    def there(self) -> set[BlobId]:
        """The blobs that have files, whole or not."""
        found = set()
        for path in self.folder.glob("*-*"):
            session, _, number = path.name.partition("-")
            if len(session) == 32 and number.isdecimal():
                found.add((bytes.fromhex(session), int(number)))
        return found

    def remove(self, blobs: Iterable[BlobId]) -> None:
        """Nobody needs these any more."""
        if not self._keep:
            for of in blobs:
                (self.folder / name_of(*of)).unlink(missing_ok=True)

    def close(self) -> None:
        """The run is over: nothing here is needed any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self.remove(self.there())


def _check(path: Path, size: int, crc: int) -> None:
    """Raise Corrupt unless the file holds what was sent."""
    found, seen = 0, 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                found, seen = zlib.crc32(piece, found), seen + len(piece)
    except FileNotFoundError:
        if size:
            raise Corrupt("its bytes are gone") from None
        path.touch(mode=0o600)
    if (seen, found) != (size, crc):
        raise Corrupt(f"{seen} of {size} bytes are there, or they are not what was sent")
