"""The blob lane: how the bytes of media leave a worker, beside its records and never before them.

    add(bytes) ─▶ what waits ─▶ feeder ─▶ a session of its own ─▶ daemon
    add_file(path) ─▶ courier, a process of its own, which does the same (courier.py)

- whoever logs pays one copy at most, and nothing for `bytes`; all else is the feeder's, a thread that sleeps while
  there is nothing to do
- it has a session, an outbox and a socket of its own, made when the first blob is logged: metrics never wait
  behind a blob
- memory is bounded: what finds no room is refused, and the value with it. Beyond the half of it pieces may go into
  the spill; what is in a file already never does
- a file is opened at once and read later, no faster than a bound. One that was changed by then is torn: that is
  said, and no piece of it is shown as if it were whole
- what a record that was given up refers to is given up too
- what did not leave before the end is said exactly, here and in the run
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from time import monotonic, time
from typing import TYPE_CHECKING, Any

import msgpack

from sidestep.errors import UnsupportedValue
from sidestep.media.base import BLOB, Buffer, Ref, refs_in
from sidestep.notices import say
from sidestep.outbox import DropReason
from sidestep.snapshot import Opened, Torn, reopen, signature, take
from sidestep.wire import MAX_CHUNK_BYTES, Kind

if TYPE_CHECKING:
    from sidestep.courier import Courier
    from sidestep.session import Session

DEFAULT_BYTES = 256 * 1024 * 1024
FILE_BYTES_PER_S = 128 * 1024 * 1024
OUTBOX_BYTES = 16 * 1024 * 1024
"""Pieces under way, beside what waits."""
CALM = 0.4
"""As full is the outbox kept: below that nothing of it is spilled."""
PRESSED = 0.5
"""When so much of the memory is in use, the outbox is filled to its brim, and so the spill."""
LOOK_S = 0.01
"""How often the feeder looks for room."""
BURST_S = 0.05
"""So much of the bound on files may come at once after a pause."""


@dataclass(slots=True, kw_only=True)
class Waiting:
    """A blob that has not left: its pieces, or a file that is open."""

    number: int
    size: int
    pieces: tuple[bytes | memoryview, ...] = ()
    opened: Opened | None = None
    """A file instead of pieces."""
    crc: int = 0
    sha256: Any = None
    sent: int = 0
    unwanted: bool = False
    """The record that refers to it was given up."""

    @property
    def held(self) -> int:
        """Bytes of memory."""
        return 0 if self.opened is not None else self.size

    @property
    def path(self) -> str:
        """The file's, if it is one."""
        return self.opened.path if self.opened is not None else ""

    def read(self) -> Iterator[bytes | memoryview]:
        """Its bytes, a piece at a time. Raises OSError, and Torn for a file that is not what it was."""
        if self.opened is None:
            yield from _in_chunks(self.pieces)
            return
        reopen(self.opened)
        file = self.opened.file
        assert file is not None
        while self.sent < self.size:
            piece = os.pread(file, min(MAX_CHUNK_BYTES, self.size - self.sent), self.sent)
            if not piece:
                raise Torn
            yield piece
        if signature(os.fstat(file)) != self.opened.was:
            raise Torn

    def take_in(self, piece: bytes | memoryview) -> None:
        """A piece was sent."""
        self.crc = zlib.crc32(piece, self.crc)
        if self.sha256 is not None:
            self.sha256.update(piece)
        self.sent += len(piece)

    def close(self) -> None:
        """Let go of the file."""
        if self.opened is not None:
            self.opened.close()


@dataclass(slots=True)
class Left:
    """What a lane did not get rid of."""

    blobs: int = 0
    bytes: int = 0
    files: list[str] = field(default_factory=list)


class Lane:
    """The blobs of one process, and of one session. A forked child makes its own."""

    def __init__(
        self,
        session: Callable[[], Session],
        *,
        limit: int,
        inline: Callable[[], bool] = lambda: False,
        courier: Callable[[], Courier | None] = lambda: None,
        file_bytes_per_s: int = 0,
    ) -> None:
        """`session` makes the session that blobs go through; `inline`: without a thread, for a test's recorder.

        `courier` makes who sends files; without one they are sent here, at `file_bytes_per_s` where that is given.
        """
        self._new_session = session
        self._new_courier = courier
        self._session: Session | None = None
        self._limit = limit
        self._inline = inline
        self._rate = file_bytes_per_s
        self.on_left: Callable[[Waiting], None] = lambda _: None
        """Told of each blob that is in the outbox, or of which nothing more will come."""
        self.on_trouble: Callable[[str, str], None] | None = None
        """Told in the place of the user which file can not be sent, and why."""
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
        self._courier: Courier | None = None
        self._not_before = 0.0

    # What `pack` of a kind uses

    def add(self, data: Buffer | tuple[Buffer, ...], *, hashed: bool = False) -> Ref:
        """Take bytes, or pieces of them, along; see `media.base.Blobs`. `hashed`: with their SHA-256."""
        pieces = tuple(map(_kept, data if isinstance(data, tuple) else (data,)))
        sha256 = _sha256() if hashed else None
        return self._add(Waiting(number=0, size=sum(map(len, pieces)), pieces=pieces, sha256=sha256))

    def add_file(self, path: str | os.PathLike[str]) -> Ref:
        """Open a file now, to be read later; see `media.base.Blobs`."""
        return self.add_opened(take(path))

    def add_opened(self, opened: Opened) -> Ref:
        """The same for a file that was taken before; it is closed here."""
        if not self._inline():
            with self._lock:
                if self._courier is None or self._courier.is_gone:
                    self._courier = self._new_courier()
                if self._courier is not None:
                    self._added += 1
                    return self._courier.send(opened)
        blob = waiting_file(opened)
        try:
            return self._add(blob)
        except UnsupportedValue:
            blob.close()
            raise

    def give_up(self, value: Any) -> None:
        """A record was given up: so is what it refers to."""
        unwanted: set[tuple[Any, Any]] = {(ref.get("of"), ref.get("id")) for ref in refs_in(value)}
        if not unwanted:
            return
        with self._lock:
            session, courier = self._session, self._courier
            for of, number in unwanted:
                if session is not None and of == session.id:
                    waiting = next((it for it in self._waiting if it.number == number), None)
                    if waiting is not None:
                        waiting.unwanted = True
                    else:
                        self._say_failed(number, "dropped")
                elif courier is not None and of == courier.id:
                    courier.give_up(number)

    def take_over(self, blob: Waiting, session: Session) -> None:
        """Send a blob that somebody else took and numbered, through a session that is there: a courier's."""
        self._session = session
        with self._lock:
            self._waiting.append(blob)
            self._next = blob.number + 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._feed, name="sidestep-blobs", daemon=True)
                self._thread.start()
        self._bell.set()

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
        under_way = 1 if session is not None and session.outbox.pending else 0
        return len(self._waiting) + under_way + (self._courier.pending if self._courier is not None else 0)

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
        sent = self._session is None or self._session.flush(max(deadline - monotonic(), 0.0))
        return (self._courier is None or self._courier.flush(max(deadline - monotonic(), 0.0))) and sent

    def finish(self, timeout: float, exit_code: int | None) -> None:
        """Let leave what can in `timeout` seconds, and say what did not."""
        deadline = monotonic() + timeout
        if self._session is None or self._session.dormant:
            self._finish_courier(timeout)
            return
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
        self._finish_courier(max(deadline - monotonic(), 0.0))

    def _finish_courier(self, timeout: float) -> None:
        if self._courier is not None:
            self._courier.finish(timeout)

    def settle_in(self, timeout: float) -> None:
        """Before this process says its last word: see that who sends its files is known to the daemon."""
        if self._courier is not None:
            self._courier.wait_until_welcome(timeout)

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
        if self._courier is not None:
            self._courier.forked()
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
            if not done and not blob.unwanted:
                self._give_up()
                return
            self._forget_first()
            if blob.unwanted:  # asked last: from now on whoever gives it up says so
                self._say_dropped(blob, "dropped")
            self.on_left(blob)

    def _send(self, blob: Waiting) -> bool:
        """All pieces of a blob, and its end; False if time ran out, or it is not wanted any more."""
        for piece in blob.read():
            if blob.unwanted or not self._offer({"id": blob.number, "at": blob.sent, "bytes": piece}, blob):
                return False
            blob.take_in(piece)
            if blob.opened is not None and self._rate:
                self._hold_back(len(piece))
        if blob.unwanted:
            return False
        end: dict[str, object] = {"id": blob.number, "size": blob.sent, "crc": blob.crc}
        if blob.sha256 is not None:
            end["sha256"] = blob.sha256.digest()
        return self._offer(end, blob)

    def _hold_back(self, size: int) -> None:
        """Send files no faster than the bound."""
        now = monotonic()
        self._not_before = max(self._not_before, now - BURST_S) + size / self._rate
        if (early := self._not_before - now) > LOOK_S:
            self._bell.wait(early)
            self._bell.clear()

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
        if pressed and blob.opened is None:
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
        blob = self._waiting[0]
        self._forget_first()
        self._say_dropped(blob, reason)
        self.on_left(blob)

    def _say_dropped(self, blob: Waiting, reason: str) -> None:
        self._failed[reason] += 1
        self._say_failed(blob.number, reason)

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
        if self.on_trouble is not None:
            self.on_trouble(blob.path, text)
        else:
            self._session.notices.once(("blob", blob.path), text)


def lane_of(session: Session) -> Lane:
    """The lane beside a session. Nothing is made before the first blob."""

    def beside() -> Session:
        return session.twin(replace(session.settings, outbox_bytes=OUTBOX_BYTES))

    def courier() -> Courier | None:
        if not session.is_sent or session.settings.address is None:
            return None
        from sidestep.courier import Courier  # only who sends files needs it

        session.awake()
        return Courier(session)

    return Lane(
        beside,
        limit=session.settings.blob_bytes,
        inline=lambda: session.inline,
        courier=courier,
        file_bytes_per_s=session.settings.file_bytes_per_s,
    )


def waiting_file(opened: Opened, number: int = 0) -> Waiting:
    """A file as a blob."""
    return Waiting(number=number, size=opened.size, opened=opened, sha256=_sha256())


def _in_chunks(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes in records of some size: thousands of small pieces are no thousands of records."""
    gathered, size = list[bytes | memoryview](), 0
    for piece in pieces:
        for start in range(0, len(piece), MAX_CHUNK_BYTES):
            part = piece[start : start + MAX_CHUNK_BYTES]
            if size + len(part) > MAX_CHUNK_BYTES:
                yield b"".join(gathered) if len(gathered) > 1 else gathered[0]
                gathered, size = [], 0
            gathered.append(part)
            size += len(part)
    if gathered:
        yield b"".join(gathered) if len(gathered) > 1 else gathered[0]


def _sha256() -> Any:
    import hashlib  # with it OpenSSL is loaded

    return hashlib.sha256()


def _kept(data: Buffer) -> memoryview:
    """Bytes that nobody changes: themselves, or a copy."""
    if type(data) is bytes:
        return memoryview(data)
    view = memoryview(data)
    return memoryview(bytes(view) if view.contiguous else view.tobytes())
