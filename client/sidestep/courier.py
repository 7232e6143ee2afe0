"""The courier: a process beside a worker that sends its files, and goes on when the worker has ended.

    take(file) ─▶ descriptor over a socket ─▶ courier process: a lane, a session of its own ─▶ daemon

- whoever logs a file opens it and no more; reading, hashing and sending cost another process, which gives way to
  the training
- the descriptor is what is sent: a file that is renamed, replaced or deleted meanwhile is the one that was logged
- the numbers that stand for files are given here, so that a record can name them before the courier has them
- the courier ends when its worker has closed the socket, or is gone, and the daemon has everything; or when the
  daemon took nothing for `GIVE_UP_S`. What it could not send is told to the worker while there is one, and to the
  run
- a forked child has none of it, and makes its own
"""

from __future__ import annotations

import os
import select
import signal
import socket as sockets
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgpack

from sidestep.errors import UnsupportedValue
from sidestep.lane import OUTBOX_BYTES, Lane, Waiting, waiting_file
from sidestep.media.base import BLOB, Ref
from sidestep.notices import say
from sidestep.snapshot import Opened
from sidestep.wire import FILES

if TYPE_CHECKING:
    from sidestep.session import Session

LOOK_S = 0.05
"""How often either side looks what has become of the other's files."""
GIVE_UP_S = 600.0
LAST_S = 25.0
"""What is left of its time when it is told to end by SIGTERM."""
NICENESS = 10
MOST_BYTES = 16 * 1024
"""Of one message between the two."""
MOST_WAITING = 100_000
"""Files that may wait at once."""


class Courier:
    """The worker's side. Its process is started with the first file."""

    def __init__(self, session: Session) -> None:
        self.id = os.urandom(16)
        self._session = session
        self._lock = threading.Lock()
        self._next = 0
        self._queue: deque[tuple[dict[str, Any], Opened | None]] = deque()
        self._there: dict[int, tuple[str, int]] = {}
        """Path and size of each file that the daemon is not known to have."""
        self._bell = threading.Event()
        self._welcome = threading.Event()
        self._owner = os.getpid()
        self._finishing = False
        self._socket: sockets.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.is_gone = False
        """It sends nothing any more: another one is needed."""
        self._thread = threading.Thread(target=self._run, name="sidestep-files", daemon=True)
        self._thread.start()

    # What the lane uses

    def send(self, opened: Opened) -> Ref:
        """Have a file sent; returns what stands for it. It is closed here."""
        with self._lock:
            if self.is_gone or len(self._there) >= MOST_WAITING:
                opened.close()
                raise UnsupportedValue(f"{len(self._there)} files wait to be sent, and more are not taken")
            number, self._next = self._next, self._next + 1
            self._there[number] = opened.path, opened.size
            said = {"id": number, "path": opened.path, "size": opened.size, "was": list(opened.was)}
            self._queue.append((said, opened))
        self._bell.set()
        return {BLOB: {"of": self.id, "id": number, "size": opened.size}}

    def give_up(self, number: int) -> None:
        """A file is not wanted any more."""
        self._queue.append(({"unwanted": number}, None))
        self._bell.set()

    @property
    def pending(self) -> int:
        """Files that the daemon is not known to have."""
        return len(self._there)

    def flush(self, timeout: float) -> bool:
        """Wait until the daemon has the files that were taken so far."""
        last, deadline = self._next, monotonic() + timeout
        while min(self._there.copy(), default=last) < last:
            if monotonic() >= deadline or self.is_gone:
                return False
            threading.Event().wait(LOOK_S / 2)
        return True

    def wait_until_welcome(self, timeout: float) -> None:
        """Until the daemon knows of it: then the run is kept open for it."""
        if not self.is_gone and self._there:
            self._welcome.wait(timeout)

    def finish(self, timeout: float) -> None:
        """No more files come: wait a little, and say what goes on without this process."""
        self._finishing = True
        self._bell.set()
        self._thread.join(timeout)
        if left := list(self._there.values()):
            size = sum(size for _, size in left)
            if self.is_gone or self._process is None or not self._welcome.is_set():
                names = ", ".join(path for path, _ in left[:5])
                say(f"{len(left)} files ({size} bytes) did not leave this process and are not in the run: {names}")
            else:
                on = f"process {self._process.pid} sends them"
                say(f"{len(left)} files ({size} bytes) are still on their way: {on}")

    def forked(self) -> None:
        """In a child: the socket is the parent's, and open here it would keep the courier waiting."""
        self.is_gone = True
        if self._socket is not None:
            self._socket.close()
        for _, opened in list(self._queue):
            if opened is not None:
                opened.close()

    # The thread

    def _run(self) -> None:
        try:
            self._socket = self._begin()
            self._serve(self._socket)
        except Exception as error:  # noqa: BLE001 - a thread's head: the training is none the worse for it
            if os.getpid() == self._owner:
                self._fail(f"{type(error).__name__}: {error}")
        finally:
            if os.getpid() == self._owner and self._socket is not None:
                self._socket.close()

    def _begin(self) -> sockets.socket:
        """Start the process. What it writes goes nowhere: it may live longer than who reads the training's."""
        ours, its = sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                # -P: what lies in the directory of the training shall not be imported.
                [sys.executable, "-P", "-m", "sidestep.courier"],
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        session = self._session
        settings = replace(
            session.settings, autostart=False, when_full="drop", outbox_bytes=OUTBOX_BYTES, strict=False
        )
        hello = {
            "id": self.id,
            "beside": session.id,
            "settings": {it.name: getattr(settings, it.name) for it in fields(settings)},
            "identity": asdict(session.identity),
        }
        ours.sendmsg([msgpack.packb(hello)])
        ours.setblocking(False)
        return ours

    def _serve(self, socket: sockets.socket) -> None:
        """Until it has ended, or had everything when it was told that no more comes."""
        said_all = False
        poll = select.poll()
        poll.register(socket, select.POLLIN)
        while True:
            blocked = self._send_queued(socket)
            if self._finishing and not self._queue:
                if not self._there:
                    return None
                if not said_all:
                    said_all = True
                    socket.shutdown(sockets.SHUT_WR)
            if not self._there and not self._queue:
                self._bell.wait()
            elif not blocked:
                self._bell.wait(LOOK_S)
            self._bell.clear()
            if poll.poll(0 if self._queue else int(LOOK_S * 1000)):
                if not (answer := socket.recv(MOST_BYTES)):
                    return self._fail("it ended") if self._there else None
                self._hear(msgpack.unpackb(answer))

    def _send_queued(self, socket: sockets.socket) -> bool:
        """Hand over what waits; whether something has to wait on."""
        while self._queue:
            said, opened = self._queue[0]
            files = [opened.file] if opened is not None and opened.file is not None else []
            try:
                sockets.send_fds(socket, [msgpack.packb(said | {"open": bool(files)})], files)
            except (BlockingIOError, InterruptedError):
                return True
            self._queue.popleft()
            if opened is not None:
                opened.close()
        return False

    def _hear(self, said: Mapping[str, Any]) -> None:
        if said.get("welcome"):
            self._welcome.set()
        for number in said.get("there", ()):
            self._there.pop(number, None)
        if text := said.get("text"):
            self._session.notices.once(("file", said.get("path")), str(text))

    def _fail(self, why: str) -> None:
        self.is_gone = True
        self._welcome.set()
        with self._lock:
            for _, opened in self._queue:
                if opened is not None:
                    opened.close()
            self._queue.clear()
        if self._there:
            self._session.notices.once("courier", f"{len(self._there)} files could not be sent: {why}")


# In the process of its own


class _Carried:
    """What became of the files that were handed over, as far as it is not told yet."""

    def __init__(self, lane: Lane, session: Session) -> None:
        self.lane, self.session = lane, session
        self.under_way: deque[tuple[int, int]] = deque()
        """The number of each file that left, and the sequence behind its end."""
        self.moved_at = monotonic()
        self._acknowledged = -1

    def left(self, blob: Waiting) -> None:
        """All of a file, or that it will never be whole, is in the outbox."""
        self.under_way.append((blob.number, self.session.outbox.end))

    def arrived(self) -> list[int]:
        """The files that came to the daemon's disk since this was asked last."""
        acknowledged, found = self.session.outbox.acknowledged, []
        if acknowledged != self._acknowledged:
            self._acknowledged, self.moved_at = acknowledged, monotonic()
        while self.under_way and self.under_way[0][1] <= acknowledged:
            found.append(self.under_way.popleft()[0])
        return found

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return not self.lane.pending


def main() -> None:
    """Send the files that come through the socket at standard input, until there are no more."""
    os.nice(NICENESS)
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # they are for the training
    told_to_end: list[float] = []
    signal.signal(signal.SIGTERM, lambda *_: told_to_end.append(monotonic()))
    os.chdir("/")
    socket = sockets.socket(fileno=os.dup(0))
    session = _session_of(msgpack.unpackb(socket.recv(1 << 18)))
    notices: deque[tuple[str, str]] = deque()
    lane = Lane(lambda: session, limit=1 << 62, file_bytes_per_s=session.settings.file_bytes_per_s)
    carried = _Carried(lane, session)
    lane.on_left = carried.left
    lane.on_trouble = lambda path, text: notices.append((path, text))
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    welcome, over = False, False
    while not (over and carried.is_done):
        if not over and poll.poll(int(LOOK_S * 1000)):
            over = not _take(socket, lane, session)
        elif over:
            select.select([], [], [], LOOK_S)
        answer: dict[str, Any] = {"there": arrived} if (arrived := carried.arrived()[:1000]) else {}
        if not welcome and session.sender is not None and session.sender.run:
            answer["welcome"] = welcome = True
        if notices:
            answer["path"], answer["text"] = notices.popleft()
        _tell(socket, answer)
        last = carried.moved_at + GIVE_UP_S if over else None
        if told_to_end:
            last = told_to_end[0] + LAST_S
        if session.outbox.shut is not None or (last is not None and monotonic() > last):
            break
    lane.finish(5.0, 0)


def _take(socket: sockets.socket, lane: Lane, session: Session) -> bool:
    """Take what the worker says; False if it has said all."""
    try:
        message, descriptors, _, _ = sockets.recv_fds(socket, MOST_BYTES, 4)
    except OSError:
        return False
    if not message:
        return False
    said = msgpack.unpackb(message)
    if "unwanted" in said:
        lane.give_up({BLOB: {"of": session.id, "id": said["unwanted"]}})
        return True
    opened = Opened(
        path=said["path"],
        size=said["size"],
        was=tuple(said["was"]),
        file=descriptors[0] if said["open"] and descriptors else None,
    )
    lane.take_over(waiting_file(opened, said["id"]), session)
    return True


def _session_of(said: Mapping[str, Any]) -> Session:
    from sidestep.notices import Notices
    from sidestep.ranks import Identity
    from sidestep.session import Session
    from sidestep.settings import WorkerSettings

    return Session(
        settings=WorkerSettings(**said["settings"]),
        identity=replace(Identity(**said["identity"]), pid=os.getpid()),
        keywords={},
        notices=Notices(),
        role=FILES,
        beside=said["beside"],
        own_id=said["id"],
    )


def _tell(socket: sockets.socket, answer: Mapping[str, Any]) -> None:
    """Say something to the worker, if there is one that listens."""
    if answer:
        try:
            socket.send(msgpack.packb(answer), sockets.MSG_DONTWAIT)
        except OSError:
            pass


if __name__ == "__main__":
    main()
