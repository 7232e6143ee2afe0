"""Many workers in one process, on the wire: what a real worker would send, without the training around it.

Frames are made beforehand where the rate is what is measured. Each session keeps to its credit, sends again from
where it is told to, and says BYE when all it said is acknowledged.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import zmq

from sidestep.wire import Ack, Bye, Frame, Hello, Kind, Refuse, Welcome, checksum, decode, encode
from sidestep.wire.plain import dump

NAMES = tuple(f"train/metric_{number}" for number in range(10))


def record(step: int, salt: float = 0.0) -> bytes:
    """What `run.log()` of ten scalars says."""
    return dump(
        [int(Kind.LOG), time.time(), step, {name: step + salt + at for at, name in enumerate(NAMES)}, None][:4]
    )


@dataclass(slots=True)
class Speaker:
    """One session and its connection. `queue`: frames to be sent, cut already."""

    socket: zmq.Socket[bytes]
    rank: int
    id: bytes = field(default_factory=lambda: os.urandom(16))
    queue: deque[Frame] = field(default_factory=deque)
    window: deque[Frame] = field(default_factory=deque)
    sent: int = 0
    """Frames of the window that were sent."""
    credit: int = 0
    end: int = 0
    """The sequence after the last record cut."""
    held: bool = False
    over: bool = False

    def cut(self, packed: Sequence[bytes]) -> None:
        """Have records sent as one frame."""
        body = b"".join(packed)
        frame = Frame(session=self.id, first=self.end, count=len(packed), body=body, crc=checksum(body))
        self.end = frame.end
        self.queue.append(frame)

    @property
    def pending(self) -> int:
        """Frames that are not acknowledged."""
        return len(self.queue) + len(self.window)

    def send(self) -> None:
        """What the credit allows."""
        while not self.held:
            if self.sent < len(self.window):
                frame = self.window[self.sent]
            elif self.queue and (not self.window or self._under_way() + len(self.queue[0].body) <= self.credit):
                frame = self.queue.popleft()
                self.window.append(frame)
            else:
                return
            self.sent += 1
            self.socket.send_multipart(encode(frame), copy=False)

    def _under_way(self) -> int:
        return sum(len(frame.body) for frame in self.window)

    def hear(self) -> None:
        """All answers that are there."""
        while True:
            try:
                answer = decode(self.socket.recv_multipart(zmq.DONTWAIT))
            except zmq.Again:
                return
            match answer:
                case Welcome():
                    self.credit = answer.credit
                case Ack():
                    self._acknowledged(answer)
                case Refuse(code="full"):
                    self.held = True
                case Bye():
                    self.over = True
                case _:
                    raise AssertionError(f"heard {answer}")

    def _acknowledged(self, ack: Ack) -> None:
        self.credit = ack.credit
        while self.window and self.window[0].end <= ack.first:
            self.window.popleft()
            self.sent = max(0, self.sent - 1)
        if ack.gap:
            self.sent, self.held = 0, False


class Load:
    """`sessions` workers of one launch."""

    def __init__(self, address: str, sessions: int) -> None:
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self.speakers = [self._speaker(address, rank) for rank in range(sessions)]

    def _speaker(self, address: str, rank: int) -> Speaker:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        self._poller.register(socket, zmq.POLLIN)
        return Speaker(socket, rank)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)

    def hello(self) -> None:
        """Introduce every session, and wait until all are welcome."""
        for one in self.speakers:
            facts = {"rank": one.rank, "world": len(self.speakers), "launch": "load", "node": "here"}
            one.socket.send_multipart(encode(Hello(session=one.id, pid=os.getpid(), **facts)))
        self.until(lambda: all(one.credit for one in self.speakers))

    def until(self, done: Callable[[], bool], *, deadline_s: float = 600.0) -> None:
        """Serve all connections until `done`."""
        deadline = time.monotonic() + deadline_s
        while not done():
            assert time.monotonic() < deadline, "the daemon does not answer in time"
            self.turn(20)

    def turn(self, wait_ms: int) -> None:
        """Send what may be sent, hear what there is to be heard, for at most `wait_ms`."""
        for one in self.speakers:
            one.send()
        ready = dict(self._poller.poll(wait_ms))
        for one in self.speakers:
            if one.socket in ready:
                one.hear()

    def drain(self) -> None:
        """Until everything is acknowledged."""
        self.until(lambda: not any(one.pending for one in self.speakers))

    def bye(self) -> None:
        """Everybody leaves, once everything is acknowledged."""
        self.drain()
        for one in self.speakers:
            one.socket.send_multipart(encode(Bye(session=one.id, first=one.end, offered=one.end)))
        self.until(lambda: all(one.over for one in self.speakers))

    def say_at(
        self, rate: float, seconds: float, *, every_s: float = 0.1, meanwhile: Callable[[], None] = lambda: None
    ) -> int:
        """Each session says so many records in a second, for so long; returns the steps that were said."""
        began, step = time.monotonic(), 0
        while (spent := time.monotonic() - began) < seconds:
            due = int(min(spent, seconds) * rate)
            if due > step:
                for one in self.speakers:
                    one.cut([record(at, one.rank) for at in range(step, due)])
                step = due
            meanwhile()
            left = every_s - (time.monotonic() - began - spent)
            self.turn(max(1, int(left * 1000)))
        return step
