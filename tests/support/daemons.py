"""A real intake on a directory of its own, and what a test wants of it: start, kill, freeze, ask, read the run.

A `RawWorker` speaks the wire protocol message by message, right or wrong, which a real worker never would.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil
import zmq

from sidestep.endpoint import Endpoint
from sidestep.sender import connect
from sidestep.wire import (
    NO_SESSION,
    Ack,
    Bye,
    Frame,
    Hello,
    Kind,
    Message,
    Record,
    RunInfo,
    Status,
    Welcome,
    checksum,
    decode,
    encode,
    encode_record,
)
from sidestepd import placement, rundir, status
from sidestepd.config import Config
from sidestepd.processes import read_json
from sidestepd.rowlog import RowLogReader
from sidestepd.rundir import RunFile
from sidestepd.sinks import wandb_log
from sidestepd.spool import SpoolReader
from tests.support.ledgers import assert_balances
from tests.support.waiting import eventually

M = TypeVar("M", bound=Message)
DEADLINE_S = 60.0
"""Other things run on this machine too."""


@dataclass(frozen=True, slots=True)
class HeldRow:
    """A row that the run holds."""

    step: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StreamedSample:
    """What the stream holds of one moment on one node."""

    time: float
    node: str
    values: Mapping[str, float]


def _streamed(stats: Any) -> StreamedSample:
    pairs = [(item.key.partition("/l:"), json.loads(item.value_json)) for item in stats.item]
    return StreamedSample(
        time=stats.timestamp.seconds + stats.timestamp.nanos / 1e9,
        node=pairs[0][0][2],
        values={name: value for (name, _, _), value in pairs},
    )


class ServedRun:
    """A run directory, and the intake process that serves it while it is started.

    `sink` is its kind; other options are named `section__option`.
    """

    def __init__(
        self, base: Path, *, sink: str = "jsonl", environment: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        self.environment = dict(environment or {})
        overrides = {name.replace("__", "."): value for name, value in options.items()}
        quick = {"order.patience_s": 1.0, "delivery.confirm_interval_s": 0.2, "delivery.backoff_s": 0.5}
        quick["samplers.enabled"] = False  # what is sampled has tests of its own
        config = Config.load(
            environ={},
            overrides={**quick, "sink.kind": sink, "run.dir": str(base), "run.id": "tested", **overrides},
        )
        self.sink = sink
        self.run_dir = rundir.new_run_dir(config, now=time.time())
        self.address = rundir.private_address(self.run_dir)
        rundir.lay_out(self.run_dir, config, RunFile.of(config, self.run_dir, self.address))
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._workers: list[RawWorker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.leave()
        self.kill()
        Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)
        is_handed_on = (
            self.run_dir.parent.name == rundir.RELAYS and not self.run_dir.exists()
        )  # the daemon above has it
        if kind is None and not is_handed_on:
            assert_balances(self.run_dir)

    # Its life

    def start(self, *, crash_at: str | None = None, ready: bool = True) -> Self:
        """Start intake; `crash_at` names the crash point at which it, or its delivery, dies."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SIDESTEP_", "WANDB_"))}
        environment |= self.environment
        if crash_at:
            environment["SIDESTEP_CRASH_AT"] = crash_at
        self.starts += 1
        with (self.run_dir / "logs" / "intake.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sidestepd.intake", str(self.run_dir)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if ready:
            self.status()
        return self

    def wait(self, timeout: float = DEADLINE_S) -> int:
        """Its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"intake does not end:\n{self.log()}") from None

    def stop(self) -> int:
        """SIGTERM."""
        assert self.process is not None
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, and everything that it started goes with it."""
        if self.process is not None and self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
            _end(children)
        if core := self._core():
            _end([core])

    def finish(self, exit_code: int = 0) -> int:
        """Have the run finished; returns the exit code of intake."""
        with self.tool() as tool:
            question = RunInfo(close=exit_code)  # asked again while the samplers have their last word
            eventually(lambda: tool.ask(question, RunInfo).close is not None, DEADLINE_S, self.log)
        return self.wait()

    @contextlib.contextmanager
    def kept_alive(self, *, crash_at: str | None = None) -> Iterator[list[int]]:
        """Start intake whenever it has died, as `sidestep run` does; gives the exit codes of those that did."""
        codes: list[int] = []
        over = threading.Event()

        def tend() -> None:
            while not over.wait(0.02):
                assert self.process is not None
                if (code := self.process.poll()) is not None and code != 0:
                    codes.append(code)
                    self.start(crash_at=crash_at, ready=False)

        if self.process is None:
            self.start(crash_at=crash_at, ready=False)
        thread = threading.Thread(target=tend, name="supervisor")
        thread.start()
        try:
            yield codes
        finally:
            over.set()
            thread.join()

    # Who is there

    def worker(self, rank: int = 0, **facts: Any) -> RawWorker:
        """A new session, not yet introduced."""
        worker = RawWorker(self.address, rank=rank, **facts)
        self._workers.append(worker)
        return worker

    @contextlib.contextmanager
    def tool(self) -> Iterator[RawWorker]:
        """A connection that is no worker's."""
        tool = RawWorker(self.address, session=NO_SESSION)
        try:
            yield tool
        finally:
            tool.leave()

    def status(self) -> Mapping[str, Any]:
        """What intake reports of itself, once it answers."""
        with self.tool() as tool:
            deadline = time.monotonic() + DEADLINE_S
            while time.monotonic() < deadline:
                assert self.process is not None
                assert self.process.poll() is None, f"intake ended with {self.process.poll()}:\n{self.log()}"
                tool.say(Status())
                answer = tool.listen(0.5)
                if isinstance(answer, Status):
                    return answer.info
        raise AssertionError(f"intake does not answer:\n{self.log()}")

    def samplers(self, *, other_than: int | None = None) -> psutil.Process:
        """The samplers' process; another one than the pid `other_than`."""

        def found() -> psutil.Process | None:
            pid = self.status()["samplers"]["pid"]
            with contextlib.suppress(psutil.NoSuchProcess):
                return None if pid in (None, other_than) else psutil.Process(pid)
            return None

        return eventually(found, DEADLINE_S, lambda: f"no samplers:\n{self.log()}")

    def failures_of_samplers(self) -> int | None:
        """How often they failed by themselves, by their log; None if they were never started."""
        log = self.run_dir / "logs" / "samplers.log"
        return log.read_text().count("Traceback") if log.exists() else None

    def stream(self) -> list[StreamedSample]:
        """Every sample in the run's stream of system metrics, by the sink's names."""
        if self.sink == "jsonl":
            lines = [line for line in _lines(self.run_dir) if "system" in line]
            return [StreamedSample(line["_timestamp"], line["node"], line["system"]) for line in lines]
        found = []
        for path in wandb_log.segments(self.run_dir / "wandb"):
            for record in wandb_log.records(path):
                if record.HasField("stats"):
                    found.append(_streamed(record.stats))
        return found

    def alerts(self) -> list[str]:
        """The titles of all alerts."""
        if self.sink == "jsonl":
            return [line["alert"]["title"] for line in _lines(self.run_dir) if "alert" in line]
        return [
            record.alert.title
            for path in wandb_log.segments(self.run_dir / "wandb")
            for record in wandb_log.records(path)
            if record.HasField("alert")
        ]

    def delivery(self, *, other_than: int | None = None) -> psutil.Process:
        """Delivery, when it has opened the run; another one than the pid `other_than`."""

        def found() -> psutil.Process | None:
            pid = self.status()["delivery"]["pid"]
            if pid in (None, other_than) or not self._opened_by(pid):
                return None
            with contextlib.suppress(psutil.NoSuchProcess):
                return psutil.Process(pid)
            return None

        return eventually(found, DEADLINE_S, lambda: f"no delivery:\n{self.log()}")

    def core(self, *, other_than: int | None = None) -> psutil.Process:
        """The wandb-core of the run, when there is one; another one than the pid `other_than`."""

        def found() -> psutil.Process | None:
            core = self._core()
            return core if core is not None and core.pid != other_than else None

        return eventually(found, DEADLINE_S, lambda: f"no wandb-core:\n{self.log()}")

    def _core(self) -> psutil.Process | None:
        recorded = read_json(self.run_dir / "about.json").get("core")
        if not recorded:
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(recorded["pid"])
            if abs(process.create_time() - recorded["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def _opened_by(self, pid: int) -> bool:
        """Whether this delivery has told what it opened."""
        about = self.run_dir / "about.json"
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            return about.stat().st_mtime >= psutil.Process(pid).create_time()
        return False

    # What is on the disk

    def rows(self) -> list[HeldRow]:
        """Every row that the run holds: over all segments, in their order."""
        if self.sink == "jsonl":
            return read_jsonl(self.run_dir)
        segments = wandb_log.segments(self.run_dir / "wandb")
        return [HeldRow(row.step, row.values) for path in segments for row in wandb_log.history(path)]

    @property
    def home(self) -> Path:
        """Where its databases are."""
        return placement.home(self.run_dir)

    def steps(self) -> list[int]:
        """The `_step` of each row."""
        return [row.step for row in self.rows()]

    def exit_codes(self) -> list[int]:
        """Every exit code with which the run was finished."""
        if self.sink == "jsonl":
            return [line["exit_code"] for line in _lines(self.run_dir) if "exit_code" in line]
        found = []
        for path in wandb_log.segments(self.run_dir / "wandb"):
            found += [it.exit.exit_code for it in wandb_log.records(path) if it.HasField("exit")]
        return found

    def told(self) -> Mapping[str, Any]:
        """What delivery said of its work last."""
        ledger: Mapping[str, Any] = RowLogReader(self.home / "delivery.db").meta("ledger", {})
        return ledger

    def ledger(self) -> status.Ledger:
        """What became of every record."""
        return status.report(self.run_dir).ledger

    def frames(self) -> int:
        """How many records lie in the spool."""
        reader = SpoolReader(self.home / "spool.db")
        try:
            return reader.records_after(0)
        finally:
            reader.close()

    def log(self) -> str:
        """The end of what the processes wrote."""
        texts = []
        for name in ("intake.log", "delivery.log", "samplers.log"):
            path = self.run_dir / "logs" / name
            if path.exists():
                texts.append(f"--- {name}\n{path.read_text()[-3000:]}")
        return "\n".join(texts)


Serve = Callable[..., ServedRun]
"""Makes a `ServedRun` and starts it."""


def assert_run_whole(served: ServedRun, steps: Sequence[int], *, per_step: int = 1) -> None:
    """Every step once, in order, and the ledger knows of every record."""
    assert list(steps) == served.steps()
    ledger = served.ledger()
    assert (len(steps) * per_step, 0) == (ledger.delivered, ledger.pending)
    assert ledger.balances


class RawWorker:
    """One connection of one session."""

    def __init__(
        self, address: str | Endpoint, *, rank: int = 0, session: bytes | None = None, **facts: Any
    ) -> None:
        self.session = os.urandom(16) if session is None else session
        self.next = 0
        self._facts = {"rank": rank, "world": 1, "launch": "L", "node": "here", "pid": os.getpid(), **facts}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        connect(self._socket, Endpoint(address=address) if isinstance(address, str) else address)

    def leave(self) -> None:
        """Without a word."""
        self._context.destroy(linger=0)

    def say(self, message: Message) -> None:
        """Send a message."""
        self.send(encode(message))

    def send(self, parts: Sequence[bytes]) -> None:
        """Send anything."""
        self._socket.send_multipart(parts)

    def listen(self, timeout: float = DEADLINE_S) -> Message | None:
        """The next answer, or None if there is none in time."""
        if not self._socket.poll(timeout * 1000):
            return None
        return decode(self._socket.recv_multipart())

    def receive(self) -> list[bytes]:
        """The next answer as it comes."""
        assert self._socket.poll(DEADLINE_S * 1000), "no answer came"
        return self._socket.recv_multipart()

    def hear(self, kind: type[M]) -> M:
        """The next answer, which must be of this kind."""
        answer = self.listen()
        assert isinstance(answer, kind), f"{kind.__name__} expected, heard {answer}"
        return answer

    def ask(self, message: Message, kind: type[M]) -> M:
        """Send a message again and again, until the first answer of this kind."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            self.say(message)
            waited = time.monotonic() + 1.0
            while (left := waited - time.monotonic()) > 0:
                answer = self.listen(left)
                if isinstance(answer, kind):
                    return answer
        raise AssertionError(f"no {kind.__name__} came")

    def hello(self, **said: Any) -> Welcome:
        """Introduce the session; it goes on from where the daemon wants it."""
        self.say(Hello(session=self.session, first=said.pop("first", self.next), **self._facts, **said))
        welcome = self.hear(Welcome)
        self.next = welcome.first
        return welcome

    def frame(self, *steps: int, first: int | None = None, records: Sequence[bytes] = ()) -> Frame:
        """A frame of one `log()` at each step, or of `records`, to be sent next."""
        packed = [*(logged(step, loss=float(step)) for step in steps), *records]
        body = b"".join(packed)
        start = self.next if first is None else first
        return Frame(session=self.session, first=start, count=len(packed), body=body, crc=checksum(body))

    def log(self, *steps: int, records: Sequence[bytes] = ()) -> Ack:
        """Send a frame and wait for its acknowledgement."""
        frame = self.frame(*steps, records=records)
        self.say(frame)
        ack = self.hear(Ack)
        assert ack.first >= frame.end, f"{ack} for a frame that ends at {frame.end}"
        self.next = frame.end
        return ack

    def bye(self, exit_code: int | None = None) -> Bye:
        """Say that this was all."""
        self.say(Bye(session=self.session, first=self.next, offered=self.next, exit_code=exit_code))
        return self.hear(Bye)


def logged(step: int, **values: Any) -> bytes:
    """The record of a `log()`."""
    return encode_record(Record(kind=Kind.LOG, time=time.time(), step=step, data=values))


def freeze(process: psutil.Process) -> None:
    """SIGSTOP, and see it stopped."""
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: process.status() == psutil.STATUS_STOPPED, DEADLINE_S, f"{process} goes on")


def killed(process: psutil.Process) -> psutil.Process:
    """SIGKILL, and see it gone."""
    process.kill()
    see_gone(process)
    return process


def see_gone(process: psutil.Process) -> None:
    """Wait until a process is no more, or a zombie."""
    eventually(
        lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE,
        DEADLINE_S,
        f"{process} lives",
    )


def _end(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            see_gone(process)


def read_jsonl(run_dir: Path) -> list[HeldRow]:
    """The rows of the jsonl sink."""
    return [HeldRow(line["_step"], line) for line in _lines(run_dir) if "_step" in line]


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "rows.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [json.loads(line) for line in whole.splitlines()]
