"""Many sessions from few processes: what so many ranks mean to one daemon over tcp with keys, or to its relays.

    python -m tests.benchmarks.sessions [--sessions 1024] [--rate 10] [--scalars 10] [--seconds 30] [--processes 4]
                                        [--plain] [--only-intake] [--relays N | --compare N]
    python -m tests.benchmarks.sessions --address tcp://... --address tcp://... --key-file client.key

- each session is a DEALER socket of its own, and speaks the wire with the client's own outbox and dialogue:
  credit, acknowledgements, heartbeats, resending and BYE are those of a worker
- without an address a daemon is started here, with keys; with `--relays N` that many relays in front of it, each
  of which serves its share of the sessions; with `--compare N` first without relays and then with so many
- judged, exit code 1 if one fails: nothing is dropped, all that was offered is acknowledged and in the run
- told: the time from `log()` to the acknowledgement, what each process of the daemon used of CPU and memory while
  the load lasted, and how much less CPU the head needed behind relays, beside the goal for that
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import zmq

from sidestep.dialogue import Dialogue, Phase
from sidestep.endpoint import Endpoint, KeyFile, endpoints
from sidestep.outbox import Outbox
from sidestep.sender import OPTIONS, connect
from sidestep.wire import Hello, Kind, RunInfo, decode, encode
from sidestep.wire.plain import dump
from sidestepd import status
from sidestepd.addresses import BOUND
from sidestepd.keygen import make_keys
from sidestepd.processes import read_json
from tests.benchmarks.measuring import BUSY, Judgement, busy_elsewhere, machine
from tests.support.daemons import ServedRun, freeze
from tests.support.waiting import eventually

TURN_S = 0.01
"""How often sessions are looked at: what is told of the time to an acknowledgement is no finer."""
START_S, END_S, DRAINED_S = 60.0, 120.0, 900.0
LISTEN = "tcp://127.0.0.1:0"
RELAYS_SAVE = 4.0
"""The goal: how many times less CPU the head's intake needs for the same load behind relays. At 1,024 sessions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is said, and by how many."""

    sessions: int
    rate: float
    scalars: int
    seconds: float
    processes: int

    @property
    def steps(self) -> int:
        """How many records one session says, each at a step of its own."""
        return round(self.rate * self.seconds)

    @property
    def records(self) -> int:
        """Of all sessions."""
        return self.sessions * self.steps


class Speaker:
    """One session: offers records at its rate, and remembers when each was offered until it is acknowledged."""

    def __init__(self, context: zmq.Context[Any], endpoint: Endpoint, rank: int, load: Load) -> None:
        self.id, self.rank, self._load = os.urandom(16), rank, load
        self.outbox = Outbox(self.id)
        hello = Hello(session=self.id, rank=rank, world=load.sessions, launch="load", node=f"n{rank // 8}", pid=1)
        self.dialogue = Dialogue(self.outbox, hello, jitter=random.random)
        self.socket = context.socket(zmq.DEALER)
        for option, value in OPTIONS.items():
            self.socket.set(option, value)
        connect(self.socket, endpoint)
        self.step = 0
        self.waits: list[float] = []
        self._offered: deque[tuple[int, float]] = deque()
        self._say_at = self._look_at = 0.0

    def offer(self, now: float) -> None:
        """One more record."""
        values = {f"train/metric_{at}": self.step + at + 0.25 for at in range(self._load.scalars)}
        assert self.outbox.offer(dump([int(Kind.LOG), time.time(), self.step, values]))
        self.step += 1
        self._offered.append((self.outbox.end, now))

    def turn(self) -> None:
        """Hear and say what there is to: as often as the daemon asks for, and look for answers meanwhile."""
        now = time.monotonic()
        if now >= self._look_at:
            self._hear(now)
        if now < self._say_at:
            return
        self._say_at = now + self.dialogue.flush_interval_s
        if not self.socket.get(zmq.EVENTS) & zmq.POLLOUT:
            self.dialogue.interrupted()
            return
        try:
            while (message := self.dialogue.say(now)) is not None:
                self.socket.send_multipart(encode(message), zmq.NOBLOCK)
        except zmq.Again:  # as the sender has it
            self.outbox.rewind()
        self._look_at = now + TURN_S

    def _hear(self, now: float) -> None:
        while self.socket.get(zmq.EVENTS) & zmq.POLLIN:
            self.dialogue.hear(decode(self.socket.recv_multipart(zmq.NOBLOCK)), now)
        while self._offered and self._offered[0][0] <= self.outbox.acknowledged:
            self.waits.append(now - self._offered.popleft()[1])
        if not self.outbox.outstanding and self.dialogue.phase is Phase.OPEN:
            self._look_at = self._say_at  # nothing is expected


def speak(endpoint: Endpoint, ranks: Sequence[int], load: Load, ready: Any, go: Any, results: Any) -> None:
    """The sessions of one process, from HELLO to BYE."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with zmq.Context(io_threads=1) as context:
        context.set(zmq.MAX_SOCKETS, len(ranks) + 8)
        speakers = [Speaker(context, endpoint, rank, load) for rank in ranks]
        _until(speakers, lambda one: one.dialogue.phase is Phase.OPEN, START_S)
        ready.release()
        go.wait()
        began, total = time.monotonic(), load.steps
        offsets = [random.random() / load.rate for _ in speakers]
        behind = 0.0
        while any(one.step < total for one in speakers):
            now = time.monotonic()
            for one, offset in zip(speakers, offsets, strict=True):
                while one.step < total and now >= (due := began + offset + one.step / load.rate):
                    behind = max(behind, now - due)
                    one.offer(due)
            for one in speakers:
                one.turn()
            time.sleep(max(0.0, now + TURN_S - time.monotonic()))
        ended = time.monotonic()
        for one in speakers:
            one.dialogue.leave(0)
        _until(speakers, lambda one: one.dialogue.phase is Phase.OVER, END_S)
        results.put(
            {
                "waits": sorted(wait for one in speakers for wait in one.waits),
                "pending": sum(one.outbox.pending for one in speakers),
                "dropped": sum(sum(one.outbox.dropped.values()) for one in speakers),
                "reconnects": sum(one.dialogue.reconnects for one in speakers),
                "seconds": ended - began,
                "behind": behind,
                "cpu": time.process_time(),
            }
        )
        for one in speakers:
            one.socket.close(linger=0)


def _until(speakers: Sequence[Speaker], done: Any, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not all(map(done, speakers)) and time.monotonic() < deadline:
        for one in speakers:
            one.turn()
        time.sleep(TURN_S)


def run_load(
    places: Sequence[Endpoint], load: Load, watch: Callable[[], Sequence[psutil.Process]]
) -> dict[str, Any]:
    """Have the load said, divided evenly among the endpoints, and see what the watched processes use meanwhile."""
    ctx = multiprocessing.get_context("spawn")
    ready, go, results = ctx.Semaphore(0), ctx.Event(), ctx.Queue()
    count = max(load.processes, len(places))
    share = ceil(load.sessions / count)
    workers = [
        ctx.Process(
            target=speak,
            args=(
                places[n % len(places)],
                range(n * share, min((n + 1) * share, load.sessions)),
                load,
                ready,
                go,
                results,
            ),
        )
        for n in range(count)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        assert ready.acquire(timeout=START_S + 30), "the sessions were not welcomed"
    watched = watch()  # now that workers are there, deliveries are too
    before = {process.pid: _used(process) for process in watched}
    busy = busy_elsewhere()
    go.set()
    said = [results.get(timeout=load.seconds + END_S + 60) for _ in workers]
    used = {process.name: _used(it) - before[it.pid] for it in watched for process in [_Named(it)]}
    for worker in workers:
        worker.join()
    waits = sorted(wait for one in said for wait in one["waits"])
    return {
        "records": load.records,
        "steps": load.steps,
        "acknowledged": len(waits),
        "pending": sum(one["pending"] for one in said),
        "dropped": sum(one["dropped"] for one in said),
        "reconnects": sum(one["reconnects"] for one in said),
        "seconds": max(one["seconds"] for one in said),
        "generator_behind_s": max(one["behind"] for one in said),
        "generator_cpu_s": sum(one["cpu"] for one in said),
        "ack_ms": {str(q): 1000 * waits[min(int(len(waits) * q), len(waits) - 1)] for q in (0.5, 0.9, 0.99, 1.0)},
        "cpu_s": used,
        "rss_mb": {_Named(it).name: it.memory_info().rss / 1e6 for it in watched},
        "busy_elsewhere": busy,
    }


class _Named:
    """What a process of the daemon is called here."""

    def __init__(self, process: psutil.Process) -> None:
        words = [word for word in process.cmdline() if word.startswith("sidestepd.")]
        self.name = f"{words[0] if words else process.name()} {process.pid}"


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


class Head:
    """A daemon with keys, of which this process makes the clients."""

    def __init__(self, base: Path, *, plain: bool, sink: str, **options: Any) -> None:
        base.mkdir()
        self._keys = base / "keys"
        make_keys(self._keys)
        keys = {"listen__key_file": str(self._keys / "server.key"), "listen__clients": str(self._keys / "clients")}
        self.run = ServedRun(
            base, sink=sink, listen__tcp=LISTEN, order__patience_s=5.0, delivery__stall_s=3600.0,
            **({} if plain else keys), **options,
        )  # fmt: skip
        self._plain = plain

    def start(self) -> None:
        """Have it serve."""
        self.run.start()
        self.address = str(read_json(self.run.run_dir / BOUND)[LISTEN])

    @property
    def key_file(self) -> Path:
        """What a client needs."""
        return self._keys / "client.key"

    @property
    def endpoint(self) -> Endpoint:
        """Where a client finds it."""
        return endpoints(self.address, None if self._plain else KeyFile.read(self.key_file))[0]

    def spent(self) -> dict[str, float]:
        """What its intake used so far, and how many messages it took."""
        assert self.run.process is not None
        said = self.run.status()
        spent = {name: float(said[name]) for name in ("messages", "transfers")}
        return {"intake_cpu_s": _used(psutil.Process(self.run.process.pid)), **spent}

    def processes(self) -> list[psutil.Process]:
        """Intake and what it has started."""
        assert self.run.process is not None
        intake = psutil.Process(self.run.process.pid)
        return [intake, *intake.children(recursive=True)]


@contextmanager
def daemons(base: Path, relays: int, *, plain: bool) -> Iterator[tuple[Head, list[Head]]]:
    """The head, and what its workers speak to: its relays, if there shall be any."""
    with ExitStack() as stack:
        head = Head(base / "head", plain=plain, sink="jsonl")
        stack.enter_context(head.run)
        head.start()
        doors = []
        for number in range(relays):
            upstream = {"upstream__address": head.address}
            if not plain:
                upstream["upstream__key_file"] = str(head.key_file)
            relay = Head(base / f"relay{number}", plain=plain, sink="upstream", **upstream)
            stack.enter_context(relay.run)
            relay.start()
            doors.append(relay)
        yield head, doors


def finished(run: ServedRun) -> int:
    """Have a run finished, however long that takes; returns the exit code of its intake."""
    with run.tool() as tool:
        eventually(lambda: tool.ask(RunInfo(close=0), RunInfo).close is not None, DRAINED_S, run.log)
    return run.wait(DRAINED_S)


def in_the_run(run: ServedRun) -> dict[str, Any]:
    """What became of it behind the acknowledgement."""
    began, code = time.monotonic(), finished(run)
    ledger = status.report(run.run_dir).ledger
    return {
        "drain_s": time.monotonic() - began,
        "exit_code": code,
        "delivered": ledger.delivered,
        "balances": ledger.balances,
        "rows": len(run.rows()),
    }


def measured(load: Load, options: argparse.Namespace, relays: int) -> dict[str, Any]:
    """The figures of one load, by a daemon that is started for it."""
    figures: dict[str, Any] = {"relays": relays}
    with (
        tempfile.TemporaryDirectory(prefix="sidestep-sessions-") as base,
        daemons(Path(base), relays, plain=options.plain) as (head, doors),
    ):
        before: dict[str, float] = {}

        def watch() -> list[psutil.Process]:
            eventually(lambda: head.run.status()["sessions"] == load.sessions, START_S, head.run.log)
            if options.only_intake:
                freeze(head.run.delivery())
            figures["head"] = [_Named(process).name for process in head.processes()]
            before.update(head.spent())
            return [process for one in (head, *doors) for process in one.processes()]

        figures |= run_load([one.endpoint for one in doors or [head]], load, watch)
        figures["relays_exit_codes"] = [finished(door.run) for door in doors]
        figures["head_spent"] = {name: it - before[name] for name, it in head.spent().items()}
        if not options.only_intake:
            figures |= in_the_run(head.run)
    return figures


def judged(figures: dict[str, Any]) -> list[Judgement]:
    """What must hold of any load, whatever the machine does besides."""
    through = f" through {figures['relays']} relays" if figures.get("relays") else ""
    records, kept = figures["records"], figures["acknowledged"]
    judgements = [
        Judgement(
            claim=f"nothing is dropped{through}", measured=f"{figures['dropped']}", holds=figures["dropped"] == 0
        ),
        Judgement(
            claim=f"all that was offered is acknowledged{through}",
            measured=f"{kept} of {records}, {figures['pending']} wait",
            holds=(kept, figures["pending"]) == (records, 0),
        ),
    ]
    if "delivered" in figures:
        codes = [figures["exit_code"], *figures["relays_exit_codes"]]
        whole = figures["delivered"] == records and figures["balances"] and figures["rows"] >= figures["steps"]
        judgements.append(
            Judgement(
                claim=f"all of it is in the run, and the ledger balances{through}",
                measured=f"{figures['delivered']} in {figures['rows']} rows, exit codes {codes}",
                holds=whole and not any(codes),
            )
        )
    return judgements


def told(direct: dict[str, Any], relayed: dict[str, Any]) -> str:
    """How much relays saved: no claim, since with few sessions, or on a busy machine, it is another figure."""
    before, after = (it["head_spent"]["intake_cpu_s"] for it in (direct, relayed))
    busy = max(it["busy_elsewhere"] for it in (direct, relayed))
    noise = f"; others used {100 * busy:.0f} % of the CPUs" if busy > BUSY else ""
    return (
        f"told   intake of the head, direct and through {relayed['relays']} relays: {before:.2f} s and "
        f"{after:.2f} s of CPU, {before / max(after, 0.01):.1f} times less "
        f"(goal: {RELAYS_SAVE:g}, at 1,024 sessions{noise})"
    )


def main() -> int:
    """Measure, print, judge; the exit code is 1 if a claim fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=10.0, help="records a second of each session")
    parser.add_argument("--scalars", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--relays", type=int, default=0)
    parser.add_argument("--compare", type=int, metavar="N", help="without relays, then with so many")
    parser.add_argument("--plain", action="store_true", help="without keys, to see what those cost")
    parser.add_argument("--only-intake", action="store_true", help="with delivery stopped where it is")
    parser.add_argument("--address", action="append", default=[], help="of daemons that are there already")
    parser.add_argument("--key-file", type=Path)
    parser.add_argument("--json", type=Path, help="where the figures go too")
    options = parser.parse_args()
    if options.compare is not None and (options.address or options.relays or options.compare < 1):
        parser.error("--compare starts daemons of its own: without relays, then with one or more")
    load = Load(
        sessions=options.sessions,
        rate=options.rate,
        scalars=options.scalars,
        seconds=options.seconds,
        processes=options.processes,
    )
    if options.address:
        keys = KeyFile.read(options.key_file) if options.key_file else None
        parts = [run_load([endpoints(address, keys)[0] for address in options.address], load, list)]
    else:
        ways = [options.relays] if options.compare is None else [0, options.compare]
        parts = [measured(load, options, relays) for relays in ways]
    text = json.dumps({"machine": machine(), "load": vars(options), "parts": parts}, indent=2, default=str)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    judgements = [judgement for part in parts for judgement in judged(part)]
    print(*judgements, *([told(*parts)] if options.compare else []), sep="\n")
    return 0 if all(judgement.holds for judgement in judgements) else 1


if __name__ == "__main__":
    sys.exit(main())
