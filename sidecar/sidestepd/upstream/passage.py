"""The frames of one session on their way up.

To a `Dialogue` it is an outbox; what fills it is the spool.

- a frame stays until the daemon above has it: only then is its entry settled
- where the daemon above stands is its own word: what it has already is passed over, whatever was read here
- records that a relay has lost are a hole in its frames. It is stepped over when nothing before it is under way;
  the daemon above is told by HELLO, and counts them
- no socket, no file and no clock here
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sidestep.outbox import MAX_WINDOW_FRAMES, DropReason
from sidestep.wire import MAX_FRAME_BYTES, Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """A frame that was read, of `size` bytes; `load` gives it, or None if it is there no more."""

    first: int
    count: int
    size: int
    load: Callable[[], Frame | None]

    @property
    def end(self) -> int:
        """The sequence after its last record."""
        return self.first + self.count


class Passage:
    """One session's frames, and its counters as its worker told them last."""

    def __init__(self, session: bytes, *, behind: Callable[[], bool] = lambda: False) -> None:
        """`behind` tells whether there is more to be read of anybody."""
        self.session = session
        self.credit = MAX_FRAME_BYTES
        self.offered = 0
        self.dropped: dict[str, int] = {}
        self.values_refused = 0
        self.said_more = False
        """Its worker has not caught up itself."""
        self.lost = 0
        """Records that were not here to be sent. The daemon above counts them too."""
        self.abandoned = False
        """The daemon above takes nothing more of it."""
        self.held = 0
        """Bytes of the frames that are kept here."""
        self._behind = behind
        self._frames: deque[Carried] = deque()
        self._next = 0
        self._sent = 0  # bytes of the frames before `_next`
        self._acknowledged = self._end = 0

    # From the spool

    def add(self, frame: Carried) -> None:
        """Take in a frame; one that is above already is passed over."""
        if frame.end > self._acknowledged and not self.abandoned:
            self._frames.append(frame)
            self.held += frame.size
        self._end = max(self._end, frame.end)

    def reach(self, end: int) -> None:
        """The session's records go up to `end`, whether or not they are here."""
        self._end = max(self._end, end)

    def count(self, said: Mapping[str, Any]) -> None:
        """Take in counters; they only grow."""
        self.offered = max(self.offered, said.get("offered", 0))
        self.values_refused = max(self.values_refused, said.get("values_refused", 0))
        for reason, count in said.get("dropped", {}).items():
            self.dropped[reason] = max(self.dropped.get(reason, 0), count)

    # To the daemon above

    def next_frame(self) -> Frame | None:
        """The frame to send now, within the credit."""
        while self._next < len(self._frames):
            carried = self._frames[self._next]
            if self._next and not self._fits(carried):
                return None
            if not self._next and carried.first > self._acknowledged:
                self._step_over(carried.first)
            frame = carried.load()
            if frame is not None:
                self._next += 1
                self._sent += carried.size
                return replace(frame, more=frame.more or self.more)
            if self._next:
                return None  # what is before it must be acknowledged first
            self._drop_first()
            self._step_over(carried.end)
        return None

    def _fits(self, carried: Carried) -> bool:
        contiguous = carried.first == self._frames[self._next - 1].end
        return contiguous and self._next < MAX_WINDOW_FRAMES and self._sent + carried.size <= self.credit

    def _step_over(self, end: int) -> None:
        self.lost += end - self._acknowledged
        self._acknowledged = end  # what is sent next is a gap to the daemon above, which is told by HELLO

    def step_over_the_rest(self) -> bool:
        """If the last records are missing, there is no frame to tell it: whether that is so, and was noted."""
        if self._frames or self._acknowledged >= self._end:
            return False
        self._step_over(self._end)
        return True

    def ack(self, first: int) -> bool:
        """Everything below `first` is on the disk of the daemon above; whether that is news."""
        before = self._acknowledged
        while self._frames and self._frames[0].end <= first:
            size = self._drop_first()
            if self._next:
                self._next -= 1
                self._sent -= size
        self._acknowledged = max(self._acknowledged, first)
        self._end = max(self._end, first)
        return self._acknowledged > before

    def _drop_first(self) -> int:
        size = self._frames.popleft().size
        self.held -= size
        return size

    def rewind(self) -> None:
        """Send again all that is unacknowledged."""
        self._next = self._sent = 0

    def abandon(self, reason: DropReason) -> None:  # noqa: ARG002 - it stays in the spool, whatever the reason
        """The daemon above takes nothing more of it: what is here stays where it is."""
        self.abandoned = True
        self.rewind()
        self._frames.clear()
        self.held = 0

    # How it stands

    @property
    def acknowledged(self) -> int:
        """The first sequence that the daemon above is not known to have."""
        return self._acknowledged

    @property
    def end(self) -> int:
        """The sequence after the last record that was read."""
        return self._end

    @property
    def pending(self) -> int:
        """Records that were read, and are not known to be above."""
        return self._end - self._acknowledged

    @property
    def outstanding(self) -> bool:
        """Whether a frame was sent and is not acknowledged."""
        return self._next > 0

    @property
    def more(self) -> bool:
        """Whether more waits behind what was handed out last."""
        return self._next < len(self._frames) or self.said_more or self._behind()
