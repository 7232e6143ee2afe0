"""The outbox: what was said and is not yet known to be on the daemon's disk.

    offer ─▶ queue ─▶ cut ─▶ window (sent, unacknowledged) ─▶ acknowledged
                       └───▶ shelf, while memory is short ──▶ window

- memory is bounded in bytes, queue and window together; when more than half of it is in use, frames are put onto
  the shelf (the spill file), if there is one; what still does not fit is dropped and counted, the newest first
- a frame never changes once cut: sent again, or read back from the shelf, it is the same bytes under the same
  sequences
- the shelf holds all that is unacknowledged up to some sequence, without a hole: it makes sense by itself
- sequences count records, from 0, without holes: what is dropped never had one
- a record may wait in the queue for values of a device. Nothing behind it is cut before it, until it is overtaken
- offered == acknowledged + pending + dropped, at any moment and seen from any thread

`offer` may be called from any thread, everything else from one. There is no lock: each change of a counter is
one statement that calls nothing, and the interpreter lets another thread in only at a call or a jump.
`log()` does inline what `offer` does, on `room` and `queue`: threads that call it at once may overdraw the room
by one record each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf
from typing import Any, Protocol

from sidestep.wire import MAX_FRAME_BYTES, MAX_FRAME_RECORDS, MAX_RECORD_BYTES, Frame, checksum

DEFAULT_BYTES = 64 * 1024 * 1024
MAX_WINDOW_FRAMES = 32
"""Fewer than a socket queues: one that takes no more has lost its peer, or its peer stands still."""
_SHUT = -(2**62)


class DropReason(StrEnum):
    """Why a record was given up."""

    UNSUPPORTED = "unsupported"
    """It was no dict of names and values."""
    BAD_STEP = "bad_step"
    TOO_LARGE = "too_large"
    OUTBOX_FULL = "outbox_full"
    """The daemon was away, or slower than the worker, for longer than the outbox lasts."""
    SPILL_FULL = "spill_full"
    """The same, and the spill file holds as much as it may."""
    SPILL_FAILED = "spill_failed"
    """The same, and the spill file can not be written: the disk is full, read-only or broken."""
    AFTER_FINISH = "after_finish"
    REFUSED = "refused"
    """The daemon said a final no: another protocol, another run, or the run is over."""
    NO_SENDER = "no_sender"
    """The process could not have a sender: it has no descriptor or no thread left."""
    OUTPUT = "output"
    """The program prints more than is kept of it."""
    INTERNAL = "internal"
    """A mistake in sidestep itself."""


class Unready(Protocol):
    """A record that waits for values. Its length is at least what it will have."""

    @property
    def since(self) -> float:
        """When it was offered."""

    def __len__(self) -> int: ...

    def ready(self) -> bool:
        """Whether all its values are there."""

    def pack(self) -> bytes:
        """The record, with the values that are there."""

    def give_up(self) -> None:
        """It is not wanted any more."""


class Shelf(Protocol):
    """Keeps frames outside of memory."""

    why: DropReason
    """Why it takes no more, when it does not."""

    def put(self, frame: Frame) -> int | None:
        """Keep a frame; where it lies now, or None if it is not taken."""

    def get(self, place: int) -> Frame | None:
        """The frame that lies there, or None if it is not what was put."""

    def clear(self) -> None:
        """Forget all: it is on the daemon's disk, or given up."""


@dataclass(slots=True, kw_only=True)
class Shelved:
    """A frame that is not in the window yet: on the shelf at `place`, or still in memory as `frame`."""

    first: int
    count: int
    size: int
    place: int = -1
    frame: Frame | None = None

    @property
    def end(self) -> int:
        """The sequence after its last record."""
        return self.first + self.count


class Outbox:
    """Records of one session on their way out.

    `room` is the bytes still free, `idle` is true while the sender sleeps and wants to be woken, `full` is the
    reason with which a record is given up that finds no room. `values_refused` counts values that were left out.
    """

    __slots__ = (
        "_acknowledged",
        "_aside",
        "_cut",
        "_dropped",
        "_held",
        "_kept",
        "_limit",
        "_lost",
        "_next",
        "_offered_before",
        "_overtaken",
        "_session",
        "_share",
        "_shelf",
        "_shelved",
        "_window",
        "credit",
        "full",
        "idle",
        "queue",
        "room",
        "shut",
        "values_refused",
    )  # fmt: skip

    def __init__(self, session: bytes, limit: int = DEFAULT_BYTES, shelf: Shelf | None = None) -> None:
        self._session = session
        self._limit = limit
        self._share = limit if shelf is None else max(limit // 4, MAX_RECORD_BYTES)
        self._shelf = shelf
        self.queue: deque[bytes | Unready] = deque()
        self._aside: deque[Unready] = deque()  # overtaken, and still to come
        self._overtaken = 0  # how many those are
        self._window: deque[Frame] = deque()
        self._shelved: deque[Shelved] = deque()  # behind the window, before the queue
        self._next = 0  # index in the window of the frame to send next
        self._held = 0  # bytes in the window
        self._cut = 0  # sequence after the last record cut
        self._kept = 0  # sequence after the last record on the shelf; 0 while that is empty
        self._acknowledged = 0
        self._lost = 0
        self._dropped: dict[str, int] = {}
        self._offered_before = 0
        self.values_refused = 0
        self.credit = MAX_FRAME_BYTES
        self.room = limit
        self.full = DropReason.OUTBOX_FULL
        self.idle = False
        self.shut: DropReason | None = None

    @classmethod
    def of_shelf(
        cls,
        session: bytes,
        shelf: Shelf,
        frames: Iterable[Shelved],
        *,
        first: int,
        offered: int,
        dropped: Mapping[str, int],
        values_refused: int,
    ) -> Outbox:
        """What a session left on its shelf, from sequence `first` on, with its counters. Nothing is added."""
        box = cls(session, shelf=shelf)
        box._shelved.extend(frames)
        box._acknowledged = box._shelved[0].first if box._shelved else first
        box._cut = box._kept = box._shelved[-1].end if box._shelved else first
        box._dropped.update(dropped)
        box._offered_before, box.values_refused = offered, values_refused
        return box

    def offer(self, record: bytes | Unready) -> bool:
        """Take a record if there is room for it; the caller counts it if not."""
        size = len(record)
        self.room -= size
        if self.room < 0:
            self.room += size
            return False
        self.queue.append(record)
        return True

    def drop(self, reason: DropReason, count: int = 1) -> None:
        """Count records that were given up."""
        counts, name = self._dropped, reason.value
        counts.setdefault(name, 0)
        counts[name] += count

    def close(self, reason: DropReason) -> None:
        """Take nothing more; what is inside may still leave."""
        if self.shut is None:
            self.shut = reason
            self.room += _SHUT

    def abandon(self, reason: DropReason) -> None:
        """Give up all that is not acknowledged."""
        self.close(reason)
        self._give_up(self._acknowledged, reason)
        self._shelved.clear()
        self._clear_shelf()

    # To the socket

    def next_frame(self) -> Frame | None:
        """The frame to send now, within the credit: one to send again, from the shelf, or cut from the queue."""
        if self._next == len(self._window) and not (self._fetch() if self._shelved else self._cut_frame()):
            return None
        frame = self._window[self._next]
        self._next += 1
        return replace(frame, more=self.more)

    def ack(self, first: int) -> bool:
        """Everything below `first` is on the daemon's disk; whether that is news."""
        before = self._acknowledged
        while self._window and self._window[0].end <= first:
            frame = self._window.popleft()
            size = len(frame.body)
            self._acknowledged = frame.end
            self._held -= size
            self.room += size
            self._next = max(self._next - 1, 0)
        while not self._window and self._shelved and self._shelved[0].end <= first:
            shelved = self._shelved.popleft()
            self._acknowledged = shelved.end
            if shelved.frame is not None:
                self.room += shelved.size
        if self._acknowledged >= self._kept > 0:
            self._clear_shelf()
        return self._acknowledged > before

    def rewind(self) -> None:
        """Send again all that is unacknowledged."""
        self._next = 0

    # What waits for a device

    def overtake(self, before: float) -> int:
        """Let others pass a record at the head that was said before a time and is not ready; how many it was."""
        count = 0
        while (
            self.queue
            and not isinstance(head := self.queue[0], bytes)
            and head.since < before
            and not head.ready()
        ):
            self._overtaken += 1
            self.queue.popleft()
            self._aside.append(head)
            count += 1
        return count

    def join(self, before: float) -> int:
        """Have what was overtaken leave once it is ready, or without its values if it was said before a time.

        Returns how many left without.
        """
        count = 0
        for _ in range(len(self._aside)):
            record = self._aside.popleft()
            if not (ready := record.ready()) and record.since >= before:
                self._aside.append(record)
                continue
            count += not ready
            packed = record.pack()
            self.room += len(record) - len(packed)
            self._overtaken -= 1
            self.queue.appendleft(packed)
        return count

    def settle(self) -> int:
        """Wait for no device any more: what is not ready leaves without its values. How many records those are."""
        count = self.join(inf)
        for index, record in enumerate(self.queue.copy()):
            if not isinstance(record, bytes):
                count += not record.ready()
                self._pack(index, record)
        return count

    def _pack(self, index: int, record: Unready) -> None:
        """Put what a record has become where it stands; only what is put behind comes from other threads."""
        packed = record.pack()
        self.room += len(record) - len(packed)
        self.queue[index] = packed

    # To the shelf

    @property
    def in_use(self) -> float:
        """The share of the memory that is taken."""
        free = self.room if self.shut is None else self.room - _SHUT
        return 1 - free / self._limit if self._limit else 0.0

    def shelve(self) -> bool:
        """Put the oldest frame that is not there onto the shelf. False if there is none, or it takes no more."""
        frame = self._next_to_shelve()
        if frame is None or self._shelf is None:
            return False
        place = self._shelf.put(frame)
        if place is None:
            self.full = self._shelf.why
            return False
        self.full = DropReason.OUTBOX_FULL
        self._kept = frame.end
        if self._shelved and self._shelved[-1].frame is frame:
            self._shelved[-1].place, self._shelved[-1].frame = place, None
            self.room += len(frame.body)
        return True

    def keep_what_is_shelved(self, reason: DropReason) -> None:
        """The process ends: what did not get onto the shelf is given up, if anything did."""
        if self._kept:
            self._give_up(self._kept, reason)

    def _next_to_shelve(self) -> Frame | None:
        """The window first, so that the shelf makes sense without it; then what waits behind."""
        frame = next((frame for frame in self._window if frame.first >= self._kept), None)
        if frame is None and self._shelved:
            frame = self._shelved[-1].frame
        if frame is None and (frame := self._cut_from_queue(min(MAX_FRAME_BYTES, self._share))) is not None:
            shelved = Shelved(first=frame.first, count=frame.count, size=len(frame.body), frame=frame)
            self._shelved.append(shelved)
        return frame

    def _fetch(self) -> bool:
        """Move the next frame from the shelf into the window, if it may be sent."""
        while self._shelved and len(self._window) < MAX_WINDOW_FRAMES:
            head = self._shelved[0]
            if self._window and head.size > min(self.credit, self._share) - self._held:
                return False
            frame = head.frame or self._read_back(head)
            if frame is None and self._window:
                return False  # what is before it must be acknowledged first
            self._shelved.popleft()
            if frame is not None:
                if head.frame is None:
                    self.room -= head.size
                self._held += head.size
                self._window.append(frame)
                return True
            self._lost += head.count
            self._acknowledged = head.end  # HELLO will say so, and the daemon counts what is missing
        if not self._window and self._acknowledged >= self._kept > 0:
            self._clear_shelf()
        return False

    def _read_back(self, shelved: Shelved) -> Frame | None:
        frame = self._shelf.get(shelved.place) if self._shelf is not None else None
        if frame is None or (frame.session, frame.first, frame.count) != (
            self._session, shelved.first, shelved.count,
        ):  # fmt: skip
            return None
        return frame

    def _clear_shelf(self) -> None:
        self._kept = 0
        self.full = DropReason.OUTBOX_FULL
        if self._shelf is not None:
            self._shelf.clear()

    def _give_up(self, end: int, reason: DropReason) -> None:
        """Count everything from the sequence `end` on as dropped."""
        if count := self._cut - end:
            self.drop(reason, count)
        self._cut = end
        while self._window and self._window[-1].end > end:
            self._held -= len(self._window.pop().body)
        while self._shelved and self._shelved[-1].end > end:
            self._shelved.pop()
        self._next = min(self._next, len(self._window))
        while self._aside:
            self.drop(reason)
            self._overtaken -= 1
            self._aside.popleft().give_up()
        while self.queue:
            self.drop(reason)
            record = self.queue.popleft()
            if not isinstance(record, bytes):
                record.give_up()

    # The ledger

    @property
    def acknowledged(self) -> int:
        """Records known to be on the daemon's disk: the first unacknowledged sequence."""
        return self._acknowledged

    @property
    def lost(self) -> int:
        """Of the acknowledged: those that could not be read back from the shelf. The daemon counts them."""
        return self._lost

    @property
    def shelved(self) -> int:
        """Unacknowledged records that are on the shelf."""
        return max(self._kept - self._acknowledged, 0)

    @property
    def end(self) -> int:
        """The sequence that the next record offered will get."""
        return self._cut + self._overtaken + len(self.queue)

    @property
    def pending(self) -> int:
        """Records taken and not acknowledged."""
        return self._cut - self._acknowledged + self._overtaken + len(self.queue)

    @property
    def dropped(self) -> dict[str, int]:
        """Records given up, by reason."""
        return dict(self._dropped)

    @property
    def offered(self) -> int:
        """Records that anybody tried to send; at least as many as were told of before."""
        return max(self.end + sum(self.dropped.values()), self._offered_before)

    @property
    def queued(self) -> int:
        """Records not yet cut into a frame."""
        return self._overtaken + len(self.queue)

    @property
    def outstanding(self) -> bool:
        """Whether a frame was sent and is not acknowledged."""
        return self._next > 0

    @property
    def more(self) -> bool:
        """Whether more waits behind what was handed out last."""
        return self._next < len(self._window) or bool(self._shelved) or bool(self.queue)

    def _cut_frame(self) -> bool:
        """Move what fits from the queue into a new frame of the window."""
        if len(self._window) >= MAX_WINDOW_FRAMES:
            return False
        most = min(MAX_FRAME_BYTES, self._share)
        frame = self._cut_from_queue(
            min(most, min(self.credit, self._share) - self._held) if self._window else most
        )
        if frame is None:
            return False
        self._held += len(frame.body)
        self._window.append(frame)
        return True

    def _arrived(self, head: Any) -> bool:
        """Whether the head of the queue is packed, or could be."""
        if not head.ready():
            return False
        self._pack(0, head)
        return True

    def _cut_from_queue(self, limit: int) -> Frame | None:
        """A frame of what fits into `limit` bytes, from the front of the queue."""
        queue, first, size = self.queue, self._cut, 0
        records: list[bytes] = []
        while queue and len(records) < MAX_FRAME_RECORDS:
            record = queue[0]
            if type(record) is not bytes:
                if not self._arrived(record):
                    break
                continue
            size += len(record)
            if size > limit:
                break
            self._cut += 1
            queue.popleft()
            records.append(record)
        if not records:
            return None
        body = b"".join(records)
        return Frame(session=self._session, first=first, count=len(records), body=body, crc=checksum(body))
