"""The outbox: what was said and is not yet known to be on the daemon's disk.

    offer ─▶ queue ─▶ cut ─▶ window (sent, unacknowledged) ─▶ acknowledged

- bounded in bytes, queue and window together; what does not fit is dropped and counted, the newest first
- a frame never changes once cut: sent again, it is the same bytes under the same sequences
- sequences count records, from 0, without holes: what is dropped never had one
- offered == acknowledged + pending + dropped, at any moment and seen from any thread

`offer` may be called from any thread, everything else from one. There is no lock: each change of a counter is
one statement that calls nothing, and the interpreter lets another thread in only at a call or a jump.
`log()` does inline what `offer` does, on `room` and `queue`: threads that call it at once may overdraw the room
by one record each.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from enum import StrEnum

from sidestep.wire import MAX_FRAME_BYTES, MAX_FRAME_RECORDS, Frame, checksum

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
    AFTER_FINISH = "after_finish"
    REFUSED = "refused"
    """The daemon said a final no: another protocol, another run, or the run is over."""
    INTERNAL = "internal"
    """A mistake in sidestep itself."""


class Outbox:
    """Records of one session on their way out.

    `room` is the bytes still free, `idle` is true while the sender sleeps and wants to be woken.
    """

    __slots__ = (
        "_acknowledged",
        "_cut",
        "_dropped",
        "_held",
        "_next",
        "_session",
        "_window",
        "credit",
        "idle",
        "queue",
        "room",
        "shut",
    )  # fmt: skip

    def __init__(self, session: bytes, limit: int = DEFAULT_BYTES) -> None:
        self._session = session
        self.queue: deque[bytes] = deque()
        self._window: deque[Frame] = deque()
        self._next = 0  # index in the window of the frame to send next
        self._held = 0  # bytes in the window
        self._cut = 0  # sequence after the last record cut
        self._acknowledged = 0
        self._dropped: dict[str, int] = {}
        self.credit = MAX_FRAME_BYTES
        self.room = limit
        self.idle = False
        self.shut: DropReason | None = None

    def offer(self, record: bytes) -> bool:
        """Take a packed record if there is room for it; the caller counts it if not."""
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
        self.drop(reason, self._cut - self._acknowledged)
        self._cut = self._acknowledged
        self._window.clear()
        self._next = self._held = 0
        while self.queue:
            self.drop(reason)
            self.queue.popleft()

    def next_frame(self) -> Frame | None:
        """The frame to send now, within the credit: one to send again, or one cut from the queue."""
        if self._next == len(self._window) and not self._cut_frame():
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
        return self._acknowledged > before

    def rewind(self) -> None:
        """Send again all that is unacknowledged."""
        self._next = 0

    @property
    def acknowledged(self) -> int:
        """Records known to be on the daemon's disk: the first unacknowledged sequence."""
        return self._acknowledged

    @property
    def end(self) -> int:
        """The sequence that the next record offered will get."""
        return self._cut + len(self.queue)

    @property
    def pending(self) -> int:
        """Records taken and not acknowledged."""
        return self._cut - self._acknowledged + len(self.queue)

    @property
    def dropped(self) -> dict[str, int]:
        """Records given up, by reason."""
        return dict(self._dropped)

    @property
    def offered(self) -> int:
        """Records that anybody tried to send."""
        return self.end + sum(self.dropped.values())

    @property
    def queued(self) -> int:
        """Records not yet cut into a frame."""
        return len(self.queue)

    @property
    def outstanding(self) -> bool:
        """Whether a frame was sent and is not acknowledged."""
        return self._next > 0

    @property
    def more(self) -> bool:
        """Whether more waits behind what was handed out last."""
        return self._next < len(self._window) or bool(self.queue)

    def _cut_frame(self) -> bool:
        """Move what fits from the queue into a new frame of the window."""
        if len(self._window) >= MAX_WINDOW_FRAMES:
            return False
        limit = min(MAX_FRAME_BYTES, self.credit - self._held) if self._window else MAX_FRAME_BYTES
        queue, first, size = self.queue, self._cut, 0
        records: list[bytes] = []
        while queue and len(records) < MAX_FRAME_RECORDS:
            size += len(queue[0])
            if size > limit:
                break
            self._cut += 1
            records.append(queue.popleft())
        if not records:
            return False
        body = b"".join(records)
        self._held += len(body)
        self._window.append(
            Frame(session=self._session, first=first, count=len(records), body=body, crc=checksum(body))
        )
        return True
