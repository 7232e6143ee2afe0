"""The blob lane: how the bytes of media leave a worker, beside its records and never before them.

    add(bytes), add_file(path) ─▶ what waits ─▶ feeder ─▶ a session of its own ─▶ daemon

- whoever logs pays one copy at most, and nothing for `bytes`; all else is the feeder's, a thread that sleeps while
  there is nothing to do
- it has a session, an outbox and a socket of its own, made when the first blob is logged: metrics never wait
  behind a blob
- memory is bounded: what finds no room is refused, and the value with it. Beyond the half of it pieces may go into
  the spill; what is in a file already never does
- a file is opened at once and read later. One that was changed by then is torn: that is said, and no piece of it
  is shown as if it were whole
- what did not leave before the end is said exactly, here and in the run
"""

from __future__ import annotations

import os
import stat
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from time import monotonic, time
from typing import TYPE_CHECKING

import msgpack

from sidestep.errors import UnsupportedValue
from sidestep.media.base import BLOB, Buffer, Ref
from sidestep.notices import say
from sidestep.outbox import DropReason
from sidestep.wire import MAX_CHUNK_BYTES, Kind

if TYPE_CHECKING:
    from sidestep.session import Session

DEFAULT_BYTES = 256 * 1024 * 1024
OUTBOX_BYTES = 16 * 1024 * 1024
"""Pieces under way, beside what waits."""
CALM = 0.4
"""As full is the outbox kept: below that nothing of it is spilled."""
PRESSED = 0.5
"""When so much of the memory is in use, the outbox is filled to its brim, and so the spill."""
LOOK_S = 0.01
"""How often the feeder looks for room."""


@dataclass(slots=True, kw_only=True)
class Waiting:
    """A blob that has not left: its pieces, or a file that is open."""

    number: int
    size: int
    pieces: tuple[bytes | memoryview, ...] = ()
    file: int | None = None
    path: str = ""
    was: tuple[int, ...] = ()
    """What the file was when it was opened."""
    crc: int = 0
    sent: int = 0

    @property
    def held(self) -> int:
        """Bytes of memory."""
        return 0 if self.file is not None else self.size

    def read(self) -> Iterator[bytes | memoryview]:
        """Its bytes, a piece at a time. Raises OSError, and Torn for a file that is not what it was."""
        if self.file is None:
            for piece in self.pieces:
                for start in range(0, len(piece), MAX_CHUNK_BYTES):
                    yield piece[start : start + MAX_CHUNK_BYTES]
            return
        while self.sent < self.size:
            piece = os.pread(self.file, min(MAX_CHUNK_BYTES, self.size - self.sent), self.sent)
            if not piece:
                raise Torn
            yield piece
        if _signature(os.fstat(self.file)) != self.was:
            raise Torn

    def close(self) -> None:
        """Let go of the file."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


class Torn(Exception):
    """A file was changed after it was logged."""


@dataclass(slots=True)
class Left:
    """What a lane did not get rid of."""

    blobs: int = 0
    bytes: int = 0
    files: list[str] = field(default_factory=list)


class Lane:
    """The blobs of one process, and of one session. A forked child makes its own."""

    def __init__(
        self, session: Callable[[], Session], *, limit: int, inline: Callable[[], bool] = lambda: False
    ) -> None:
        """`session` makes the session that blobs go through; `inline`: without a thread, for a test's recorder."""
        self._new_session = session
        self._session: Session | None = None
        self._limit = limit
        self._inline = inline
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Waiting] = deque()
        self._held = 0
        self._next = 0
        self._added = 0
        self._failed: Counter[str] = Counter()
        self._bell = threading.Event()
        self._thread: threading.Thread | None = None
        self._leave_by: float | None = None
        self._given_up = False

    # What `pack` of a kind uses

    def add(self, data: Buffer | tuple[Buffer, ...]) -> Ref:
        """Take bytes, or pieces of them, along; see `media.base.Blobs`."""
        pieces = tuple(map(_kept, data if isinstance(data, tuple) else (data,)))
        return self._add(Waiting(number=0, size=sum(map(len, pieces)), pieces=pieces))

    def add_file(self, path: str | os.PathLike[str]) -> Ref:
        """Open a file now, to be read later; see `media.base.Blobs`."""
        name = os.path.abspath(os.fspath(path))  # noqa: PTH100 - a Path costs its import
        try:
            file = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(file)
        except OSError as error:
            raise UnsupportedValue(f"{name!r:.200} can not be read: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            os.close(file)
            raise UnsupportedValue(f"{name!r:.200} is no file")
        blob = Waiting(number=0, size=status.st_size, file=file, path=name, was=_signature(status))
        try:
            return self._add(blob)
        except UnsupportedValue:
            blob.close()
            raise

    def _add(self, blob: Waiting) -> Ref:
        with self._lock:
            if self._held + blob.held > self._limit:
                raise UnsupportedValue(
                    f"its {blob.size} bytes find no room: {self._held} of {self._limit} bytes of media still wait "
                    "for the daemon (SIDESTEP_BLOB_BYTES is the bound)"
                )
            if self._session is None:
                self._session = self._new_session()
            session = self._session
            session.awake()
            if session.outbox.shut is not None:
                raise UnsupportedValue("this process sends no more media")
            blob.number, self._next = self._next, self._next + 1
            self._added += 1
            self._held += blob.held
            self._waiting.append(blob)
            if not self._inline() and self._thread is None:
                self._thread = threading.Thread(target=self._feed, name="sidestep-blobs", daemon=True)
                self._thread.start()
        if self._inline():
            self._drain()
        else:
            self._bell.set()
        return {BLOB: {"of": session.id, "id": blob.number, "size": blob.size}}

    # How it stands

    @property
    def pending(self) -> int:
        """Blobs that are not on the daemon's disk, at least: all those under way count as one."""
        session = self._session
        return len(self._waiting) + (1 if session is not None and session.outbox.pending else 0)

    @property
    def added(self) -> int:
        """Blobs that were taken in this process."""
        return self._added

    def flush(self, timeout: float) -> bool:
        """Wait until the daemon has on its disk what was added so far."""
        deadline, last = monotonic() + timeout, self._next
        while self._waiting and self._waiting[0].number < last:
            if monotonic() >= deadline:
                return False
            threading.Event().wait(LOOK_S)
        return self._session is None or self._session.flush(max(deadline - monotonic(), 0.0))

    def finish(self, timeout: float, exit_code: int | None) -> None:
        """Let leave what can in `timeout` seconds, and say what did not."""
        if self._session is None or self._session.dormant:
            return
        deadline = monotonic() + timeout
        self.hurry(deadline - timeout / 4)
        if self._thread is not None:
            self._thread.join(max(deadline - timeout / 4 - monotonic(), 0.05) + LOOK_S * 10)
        self._session.finish(max(deadline - monotonic(), 0.1), exit_code)
        if (left := self._left()).blobs:
            files = (
                f": {', '.join(left.files[:5])}{' and others' if len(left.files) > 5 else ''}"
                if left.files
                else ""
            )
            say(
                f"{left.blobs} media or files ({left.bytes} bytes) did not leave this process in time "
                f"and are not in the run{files}"
            )

    def hurry(self, leave_by: float) -> None:
        """The process ends: the feeder shall be done by then, and may fill the spill."""
        self._leave_by = leave_by
        self._bell.set()

    def forked(self) -> None:
        """In a child: what waits is the parent's. Its files' descriptors are copies, and closed."""
        for blob in self._waiting:
            try:
                blob.close()
            except OSError:
                pass
        self._begin()

    def _left(self) -> Left:
        blobs = list(self._waiting)
        return Left(
            blobs=len(blobs),
            bytes=sum(it.size - it.sent for it in blobs),
            files=[it.path for it in blobs if it.path],
        )

    # The feeder

    def _feed(self) -> None:
        while not self._given_up:
            try:
                self._drain()
            except Exception as error:  # noqa: BLE001 - a thread's head: the next blob must leave whatever this one did
                if self._session is not None:
                    self._session.notices.once("lane", f"media could not be sent: {error!r:.200}")
                self._drop_first("internal")
            if self._leave_by is not None and not self._waiting:
                return
            self._bell.wait(None if self._leave_by is None else LOOK_S)
            self._bell.clear()

    def _drain(self) -> None:
        """Offer all that waits to the outbox, as there is room."""
        while self._waiting:
            blob = self._waiting[0]
            try:
                done = self._send(blob)
            except Torn:
                self._say_torn(blob)
                self._drop_first("torn")
                continue
            except OSError as error:
                self._notify(blob, f"{blob.path!r:.200} can not be read: {error.strerror}")
                self._drop_first("unreadable")
                continue
            if not done:
                self._give_up()
                return
            self._forget_first()

    def _send(self, blob: Waiting) -> bool:
        """All pieces of a blob, and its end; False if time ran out."""
        for piece in blob.read():
            if not self._offer({"id": blob.number, "at": blob.sent, "bytes": piece}, blob):
                return False
            blob.crc = zlib.crc32(piece, blob.crc)
            blob.sent += len(piece)
        return self._offer({"id": blob.number, "size": blob.sent, "crc": blob.crc}, blob)

    def _offer(self, data: dict[str, object], blob: Waiting) -> bool:
        """Put a record into the outbox when there is room; False if there was none in time."""
        assert self._session is not None
        record = msgpack.packb((int(Kind.BLOB), time(), None, data))
        outbox = self._session.outbox
        while not self._has_room(blob) or not outbox.offer(record):
            if (self._leave_by is not None and monotonic() >= self._leave_by) or outbox.shut is not None:
                return False
            self._bell.wait(LOOK_S)
            self._bell.clear()
        if outbox.idle:
            self._session.wake()
        return True

    def _has_room(self, blob: Waiting) -> bool:
        """Whether the outbox shall take more: up to its brim, which spills, only when pressed, and of no file."""
        assert self._session is not None
        outbox = self._session.outbox
        pressed = self._leave_by is not None or self._held > PRESSED * self._limit
        if pressed and blob.file is None:
            return True
        return outbox.in_use < CALM and not outbox.shelved

    def _forget_first(self) -> None:
        with self._lock:
            blob = self._waiting.popleft()
            self._held -= blob.held
        blob.close()

    def _drop_first(self, reason: str) -> None:
        """Say in the run that a blob will never be whole."""
        if not self._waiting:
            return
        number = self._waiting[0].number
        self._forget_first()
        self._failed[reason] += 1
        self._say_failed(number, reason)

    def _say_failed(self, number: int, reason: str) -> None:
        assert self._session is not None
        record = msgpack.packb((int(Kind.BLOB), time(), None, {"id": number, "failed": reason}))
        if not self._session.outbox.offer(record):
            self._session.outbox.drop(DropReason.OUTBOX_FULL)

    def _give_up(self) -> None:
        """Time ran out: what is left stays here, and the run is told so."""
        self._given_up = True
        for blob in self._waiting:
            self._say_failed(blob.number, "not_sent")

    def _say_torn(self, blob: Waiting) -> None:
        self._notify(blob, f"{blob.path!r:.200} was changed while it was being sent, and is not logged")

    def _notify(self, blob: Waiting, text: str) -> None:
        assert self._session is not None
        self._failed["files"] += 1
        self._session.notices.once(("blob", blob.path), text)


def lane_of(session: Session) -> Lane:
    """The lane beside a session. Nothing is made before the first blob."""

    def beside() -> Session:
        return session.twin(replace(session.settings, outbox_bytes=OUTBOX_BYTES))

    return Lane(beside, limit=session.settings.blob_bytes, inline=lambda: session.inline)


def _kept(data: Buffer) -> memoryview:
    """Bytes that nobody changes: themselves, or a copy."""
    if type(data) is bytes:
        return memoryview(data)
    view = memoryview(data)
    return memoryview(bytes(view) if view.contiguous else view.tobytes())


def _signature(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to. One that takes its place under its name is another file."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
