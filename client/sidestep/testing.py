"""For tests: a recorder for your own, and a daemon in memory for those of sidestep.

    from sidestep.testing import record

    with record() as logged:
        train(steps=3)                    # calls sidestep.init() and log(), as ever
    assert [0, 1, 2] == logged["step"]
    assert logged["loss"][-1] < logged["loss"][0]

needs no daemon, no thread and no file, and raises what a training run would count and say. As a fixture:

    @pytest.fixture
    def logged():
        with record() as recorder:
            yield recorder

`FakeDaemon` speaks the real wire over a real socket, and keeps what it is told in memory:

    with FakeDaemon() as daemon:
        run = sidestep.init(...)          # with SIDESTEP_ADDRESS=daemon.address
        run.log({"loss": 1.0})
        run.flush()
        assert [{"loss": 1.0}] == [record.data for record in daemon.records]

It can be made to fail in the ways a daemon fails: frozen (its socket is not read), deaf to acknowledging, gone,
and back again with its memory or without.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any

import zmq

from sidestep import _current
from sidestep.errors import RemoteProtocolError, UnsupportedValue
from sidestep.media.base import BLOB, Buffer, Ref
from sidestep.outbox import Outbox
from sidestep.wire import (
    BLOBS,
    Ack,
    Bye,
    Frame,
    Hello,
    Kind,
    Message,
    Record,
    Refuse,
    RunInfo,
    Status,
    Undecodable,
    Welcome,
    decode,
    decode_records,
    encode,
)

CREDIT = 4 * 1024 * 1024
POLL_MS = 5
DEVICE_S = 10.0
"""How long a recorder waits for a value that was logged on a device."""


class Recorder:
    """What was logged, as soon as it was. `records` holds all of it, in its order."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.exit_codes: list[int | None] = []
        """How each finished run ended; None where nobody said."""
        self.blobs: dict[tuple[bytes, int], bytes] = {}
        """The bytes of media, by session and number, as the refs in records name them."""
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> list[Any]:
        """Every value logged under a name, which begins with that of its stage; KeyError if there is none."""
        values = [values[name] for _, values in self._logged() if name in values]
        if not values:
            raise KeyError(name)
        return values

    def __contains__(self, name: str) -> bool:
        """Whether anything was logged under a name."""
        return any(name in values for _, values in self._logged())

    @property
    def names(self) -> list[str]:
        """Every name that something was logged under."""
        return sorted({name for _, values in self._logged() for name in values})

    def steps(self, name: str) -> list[int | None]:
        """The step of each value that was logged under a name."""
        return [step for step, values in self._logged() if name in values]

    @property
    def config(self) -> dict[str, Any]:
        """What the runs were configured with."""
        return self._of(Kind.CONFIG)

    @property
    def summary(self) -> dict[str, Any]:
        """What was put into the summary; the last values of metrics are added by the daemon."""
        return self._of(Kind.SUMMARY)

    @property
    def artifacts(self) -> list[Mapping[str, Any]]:
        """What was logged as artifacts, one for each call: `name`, `type`, `aliases`, `metadata`, ..."""
        said = (record.data for record in self.records if record.kind is Kind.ARTIFACT)
        return [data["artifact"] for data in said if data.get("artifact")]

    @property
    def definitions(self) -> dict[str, Mapping[str, Any]]:
        """What was declared of metrics, by name or pattern."""
        return {record.data["name"]: record.data for record in self.records if record.kind is Kind.DEFINE}

    def take(self, outbox: Outbox) -> None:
        """Take what is in an outbox, waiting for what comes from a device. From any thread, and meanwhile."""
        until = monotonic() + DEVICE_S
        with self._lock:
            while frame := outbox.next_frame() or _next_from_a_device(outbox, until):
                found = decode_records(frame.body, frame.count)
                for record in found:
                    if isinstance(record, Record) and record.kind is Kind.BLOB:
                        of = frame.session, record.data["id"]
                        self.blobs[of] = self.blobs.get(of, b"") + record.data.get("bytes", b"")
                    elif isinstance(record, Record):
                        self.records.append(record)
                outbox.ack(frame.end)

    def _logged(self) -> list[tuple[int | None, Mapping[str, Any]]]:
        return [
            (
                record.step,
                {f"{record.stage}/{name}" if record.stage else name: it for name, it in record.data.items()},
            )
            for record in list(self.records)
            if record.kind in (Kind.LOG, Kind.COUNTED)
        ]

    def _of(self, kind: Kind) -> dict[str, Any]:
        return {name: it for record in self.records if record.kind is kind for name, it in record.data.items()}


def _next_from_a_device(outbox: Outbox, until: float) -> Frame | None:
    """The frame that waits for values of a device, without them if they do not come; None if none waits."""
    while outbox.queued:
        if monotonic() > until:
            outbox.settle()
        if (frame := outbox.next_frame()) is not None:
            return frame
        sleep(0.001)
    return None


class BlobFolder:
    """Both ends of the way that bytes of media take, in a folder: for tests of one kind of media alone.

    blobs = BlobFolder(tmp_path)
    value = packed(Image(pixels), blobs)      # as the worker does
    image = show(value, blobs)                # as the daemon does
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0

    def add(self, data: Buffer | tuple[Buffer, ...]) -> Ref:
        """Write bytes into a file."""
        content = b"".join(data) if isinstance(data, tuple) else bytes(data)
        path = self.new("")
        path.write_bytes(content)
        return {BLOB: {"id": self._made, "size": len(content), "crc": zlib.crc32(content)}}

    def add_file(self, path: str | os.PathLike[str]) -> Ref:
        """Copy a file."""
        try:
            return self.add(Path(path).read_bytes())
        except OSError as error:
            raise UnsupportedValue(f"{os.fspath(path)!r} can not be read: {error.strerror}") from None

    def path(self, ref: Ref | bytes) -> Path:
        """The file of a ref."""
        if isinstance(ref, bytes):
            ref = self.add(ref)
        return self._folder / str(ref[BLOB]["id"])

    def read(self, ref: Ref | bytes) -> bytes:
        """The bytes of a ref."""
        return ref if isinstance(ref, bytes) else self.path(ref).read_bytes()

    def new(self, suffix: str) -> Path:
        """The next file."""
        self._made += 1
        return self._folder / f"{self._made}{suffix}"


class _Recording:
    """Carries one session's records to a recorder, in the thread that logs them."""

    kept_in: Path | None = None
    run: Mapping[str, Any] = {"id": "recorded", "mode": "offline"}

    def __init__(self, recorder: Recorder, outbox: Outbox, *, is_lane: bool) -> None:
        self._recorder, self._outbox, self._is_lane = recorder, outbox, is_lane

    def start(self) -> None:
        """Have every call wake this."""
        self._outbox.idle = True

    def wake(self) -> None:
        """Take what there is."""
        self._recorder.take(self._outbox)

    def flush(self, timeout: float) -> bool:  # noqa: ARG002 - a carrier's method, as below
        """Nothing is ever left."""
        self.wake()
        return True

    def ask(self, timeout: float) -> Mapping[str, Any]:  # noqa: ARG002
        """What a run without a daemon is."""
        return self.run

    def finish(self, timeout: float, exit_code: int | None) -> bool:  # noqa: ARG002
        """Note how it ended."""
        self.wake()
        if not self._is_lane:
            self._recorder.exit_codes.append(exit_code)
        return True

    def forget(self) -> None:
        """A child's records stay in the child."""


@contextmanager
def record(*, strict: bool = True) -> Iterator[Recorder]:
    """Capture what is logged inside; `strict` raises what a training run would count and say once."""
    recorder = Recorder()

    def _carrier(hello: Hello, outbox: Outbox) -> _Recording:
        return _Recording(recorder, outbox, is_lane=hello.role == BLOBS)

    with _current.carried_by(_carrier, strict=strict):
        yield recorder


@dataclass(slots=True, kw_only=True)
class SessionSeen:
    """What a daemon has of one session."""

    hello: Hello
    next: int = 0
    records: list[Record | Undecodable] = field(default_factory=list)
    bye: Bye | None = None


class FakeDaemon:
    """A daemon in a thread. Its state may be looked at from the test, best through `wait_until`."""

    def __init__(self, address: str | None = None, *, run: Mapping[str, Any] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sidestep-")
        self.address = address or f"ipc://{self._folder.name}/daemon.sock"
        self.run = dict(run or {"id": "fake", "mode": "offline", "dir": self._folder.name})
        self.sessions: dict[bytes, SessionSeen] = {}
        self.heard: list[Message] = []
        self.duplicates = 0
        """Frames that came again although they were stored."""
        self.credit = CREDIT
        self.flush_interval_s = 0.005
        self.heartbeat_s = 0.2
        self.sample_interval_s = 0.0
        self.refuse: Refuse | None = None
        """Said to every HELLO instead of WELCOME."""
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._frozen = threading.Event()
        self._standing_still = threading.Event()
        self._acks_to_drop = 0
        self._frames_to_lose = 0

    # What a test does to it

    def start(self) -> None:
        """Bind and serve. The sessions of an earlier life are remembered."""
        self._stopping.clear()
        bound = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(bound,), name="fake-daemon", daemon=True)
        self._thread.start()
        if not bound.wait(5):
            raise TimeoutError(f"nothing could be bound at {self.address}")

    def stop(self) -> None:
        """Go away without a word; what was not read is lost."""
        self._stopping.set()
        self.thaw()
        if self._thread is not None:
            self._thread.join(5)
            self._thread = None

    def restart(self, *, forget: bool = False) -> None:
        """Go away and come back, as after a crash; `forget` also loses what was stored."""
        self.stop()
        if forget:
            self.sessions.clear()
        self.start()

    def freeze(self) -> None:
        """Read nothing and answer nothing, as a stopped process."""
        self._standing_still.clear()
        self._frozen.set()
        self._standing_still.wait(5)

    def thaw(self) -> None:
        """Go on."""
        self._frozen.clear()

    def drop_acks(self, count: int) -> None:
        """Store the next frames without saying so."""
        self._acks_to_drop = count

    def lose_frames(self, count: int) -> None:
        """Neither store nor answer the next frames, so that the one after them is a gap."""
        self._frames_to_lose = count

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stand still for a while."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    # What a test sees

    @property
    def records(self) -> list[Record]:
        """Every record stored, session by session."""
        return [
            record
            for seen in list(self.sessions.values())
            for record in list(seen.records)
            if isinstance(record, Record)
        ]

    def heard_of(self, kind: type[Message]) -> int:
        """How many messages of a kind have come."""
        return sum(isinstance(message, kind) for message in list(self.heard))

    def wait_until(self, condition: Callable[[], object], timeout: float = 10.0) -> None:
        """Wait for something to become true, or raise TimeoutError."""
        deadline = monotonic() + timeout
        while not condition():
            if monotonic() > deadline:
                raise TimeoutError("it did not happen")
            sleep(0.002)

    def __enter__(self) -> FakeDaemon:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self._folder.cleanup()

    # The thread

    def _serve(self, bound: threading.Event) -> None:
        context = zmq.Context()
        socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        socket.linger = 0
        greeted: dict[bytes, bytes] = {}
        boot = secrets.token_hex(4)
        try:
            socket.bind(self.address)
            bound.set()
            while not self._stopping.is_set():
                if self._frozen.is_set():
                    self._standing_still.set()
                    sleep(POLL_MS / 1000)
                elif socket.poll(POLL_MS):
                    peer, *parts = socket.recv_multipart()
                    for answer in self._answers(peer, parts, greeted, boot):
                        socket.send_multipart([peer, *encode(answer)])
        finally:
            context.destroy(linger=0)

    def _answers(self, peer: bytes, parts: list[bytes], greeted: dict[bytes, bytes], boot: str) -> list[Message]:
        try:
            message = decode(parts)
        except RemoteProtocolError as error:
            return [Refuse(code="malformed", message=str(error))]
        self.heard.append(message)
        if isinstance(message, Hello):
            greeted[peer] = message.session
            return [self._hello(message, boot)]
        if greeted.get(peer) != message.session:
            return [Refuse(session=message.session, code="hello", message="who is this?")]
        match message:
            case Frame():
                return self._frame(message)
            case RunInfo():
                return [RunInfo(session=message.session, info=self.run)]
            case Bye():
                return self._bye(message)
            case Status() | _:
                return []

    def _hello(self, hello: Hello, boot: str) -> Message:
        if self.refuse is not None:
            return Refuse(session=hello.session, code=self.refuse.code, message=self.refuse.message, final=True)
        seen = self.sessions.setdefault(hello.session, SessionSeen(hello=hello))
        seen.hello, seen.next = hello, max(seen.next, hello.first)
        return Welcome(
            session=hello.session,
            first=seen.next,
            boot=boot,
            credit=self.credit,
            flush_interval_s=self.flush_interval_s,
            heartbeat_s=self.heartbeat_s,
            sample_interval_s=self.sample_interval_s,
            run=self.run,
        )

    def _frame(self, frame: Frame) -> list[Message]:
        if self._frames_to_lose > 0:
            self._frames_to_lose -= 1
            return []
        seen = self.sessions[frame.session]
        if frame.first == seen.next:
            seen.records.extend(decode_records(frame.body, frame.count))
            seen.next = frame.end
        elif frame.first < seen.next:
            self.duplicates += 1
        if self._acks_to_drop > 0:
            self._acks_to_drop -= 1
            return []
        gap = frame.first > seen.next
        return [Ack(session=frame.session, first=seen.next, gap=gap, credit=self.credit)]

    def _bye(self, bye: Bye) -> list[Message]:
        seen = self.sessions[bye.session]
        if bye.first > seen.next:
            missing = f"{bye.first - seen.next} records are missing"
            return [
                Refuse(session=bye.session, code="bye_early", message=missing),
                Ack(session=bye.session, first=seen.next, gap=True, credit=self.credit),
            ]
        seen.bye = bye
        return [bye]


def environment(daemon: FakeDaemon, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment in which a worker finds this daemon."""
    return {**environ, "SIDESTEP_ADDRESS": daemon.address, "SIDESTEP_RUN_ID": str(daemon.run["id"])}
