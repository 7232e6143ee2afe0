"""Intake: answer workers, and put what they say on disk. It does nothing else, so that it always answers.

    FRAME ─▶ roster judges ─▶ waits for the group commit ─▶ spool ─▶ ACK

- acknowledged means committed: replies that promise anything leave after the commit
- the commit runs off the event loop, in one thread; a failing disk ends the process, and workers send again
- it never imports wandb: delivery, which does, is a process of its own, kept running from here
- when the process that started it is gone, it serves until its sessions left, then closes the run itself
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import zmq

from sidestep.errors import ProtocolError
from sidestep.wire import (
    MAX_FRAME_BYTES,
    NO_SESSION,
    Ack,
    Bye,
    Frame,
    Hello,
    Message,
    Refuse,
    RunInfo,
    Status,
    VersionError,
    Welcome,
    decode,
    encode,
    session_of,
)
from sidestepd import placement
from sidestepd.clock import Clock, Horizon, SpoolClock
from sidestepd.config import Config
from sidestepd.crashpoints import crash_point
from sidestepd.errors import AlreadyRunning, ExitCode, SpoolDamaged, SpoolError, SpoolFull
from sidestepd.keeper import DeliveryKeeper
from sidestepd.processes import Lock, read_json
from sidestepd.room import RETRY_S, Ballast, Room, open_spool
from sidestepd.roster import Roster, Verdict
from sidestepd.rowlog import RowLogReader
from sidestepd.spool import Entry, EntryKind, Spool, damage_mark

logger = logging.getLogger("sidestepd.intake")

WATCH_INTERVAL_S = 0.1
LOOK_INTERVAL_S = 1.0
"""How often what is settled is deleted, and room is measured."""
FROZEN_S = 1.0
"""A longer pause of this process is not the silence of its workers."""
MOST_AT_ONCE = 256
"""Messages taken from the socket before others get their turn."""
CLOSED_BY_ORPHAN = 1
"""The exit code of a run whose `sidestep run` is gone."""


class Intake:
    """One run's socket, spool and roster."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        spool: Spool,
        roster: Roster,
        keeper: DeliveryKeeper,
        *,
        config: Config,
        run: dict[str, Any],
        run_dir: Path,
        clock: Clock,
        room: Room,
    ) -> None:
        self.socket, self.spool, self.roster, self.keeper, self.room = socket, spool, roster, keeper, room
        self.config, self.run, self.run_dir, self.clock = config, run, run_dir, clock
        self.boot = uuid.uuid4().hex
        self.rowlog = RowLogReader(spool.path.with_name(placement.ROW_LOG))
        self.exit_code: int | None = None
        self.malformed = 0
        self.closing = spool.has_close()
        self._routes: dict[bytes, bytes] = {}
        self._entries: list[Entry] = []
        self._replies: list[tuple[bytes, Message]] = []
        self._touched: set[bytes] = set()
        self._acknowledge: set[bytes] = set()
        self._held: set[bytes] = set()
        """Sessions that were told to keep what they have."""
        self._something = asyncio.Event()
        self._inbox = asyncio.Event()
        self._inbox.set()
        self._writer = ThreadPoolExecutor(1, "spool")
        self._parent = os.getppid()
        self._horizon = Horizon(run_dir / "horizon")
        self._committing = False
        self._awake_at = clock()
        self._cursor = 0

    async def serve(self) -> int:
        """Until the run is complete, or this process is told to stop; returns its exit code."""
        logger.info("boot %s serves %s", self.boot, self.run_dir)
        self._write(Entry.of_event(EntryKind.BOOT, received=self._now(), boot=self.boot))
        loops = [asyncio.create_task(loop()) for loop in (self._receive, self._commit, self._watch)]
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            self._writer.submit(lambda: None).result()  # a commit under way ends before anything else
        if self._entries:
            await self._commit_once()
        return self.exit_code if self.exit_code is not None else ExitCode.SOFTWARE

    def stop(self) -> None:
        """End, resumably."""
        self.exit_code = ExitCode.INTERRUPTED

    # The socket

    async def _receive(self) -> None:
        asyncio.get_running_loop().add_reader(self.socket.fileno(), self._inbox.set)
        while True:
            await self._inbox.wait()
            self._inbox.clear()
            for _ in range(MOST_AT_ONCE):
                try:
                    route, *parts = self.socket.recv_multipart(zmq.DONTWAIT)
                except zmq.Again:
                    break
                self._handle(route, parts)
            else:
                self._inbox.set()
            await asyncio.sleep(0)

    def _handle(self, route: bytes, parts: Sequence[bytes]) -> None:
        try:
            message = decode(parts)
        except ProtocolError as error:
            self.malformed += 1
            other = isinstance(error, VersionError)
            code = "version" if other else "malformed"
            self._refuse(route, session_of(parts), code, str(error), final=other)
            return
        match message:
            case Frame():
                self._on_frame(route, message)
            case Hello():
                self._on_hello(route, message)
            case Status():
                self._on_status(route, message)
            case Bye():
                self._on_bye(route, message)
            case RunInfo():
                self._on_run(route, message)
            case _:
                self._refuse(route, message.session, "malformed", "only a daemon says that")

    def _on_hello(self, route: bytes, hello: Hello) -> None:
        if self.closing:
            self._refuse(route, hello.session, "closed", "the run is being finished", final=True)
            return
        self._write(self.roster.hello(hello, self._now()))
        self._routes[hello.session] = route
        self._touched.add(hello.session)
        session = self.roster.sessions[hello.session]
        welcome = Welcome(
            session=hello.session,
            first=self.roster.wanted(session),
            boot=self.boot,
            credit=self.room.credit(self.config.intake.credit_bytes),
            flush_interval_s=self.config.intake.flush_interval_s,
            heartbeat_s=self.config.intake.heartbeat_s,
            run=self._facts(),
        )
        self._replies.append((route, welcome))

    def _on_frame(self, route: bytes, frame: Frame) -> None:
        if self._is_stranger(route, frame.session):
            return
        now = self._now()
        session = self.roster.sessions[frame.session]
        if frame.first == session.next and not self.room.admit(len(frame.body)):
            self._hold(frame.session)
            return
        match self.roster.frame(frame, now):
            case Verdict.TAKE:
                self._write(Entry.of_frame(frame, received=now))
                self._touched.add(frame.session)
                self._acknowledge.add(frame.session)
            case Verdict.DUPLICATE:
                self._acknowledge.add(frame.session)
                self._something.set()
            case _ if frame.session in self._held:
                self._hold(frame.session)
            case _:
                self._send(route, self._ack(frame.session, gap=True, first=session.next))

    def _on_status(self, route: bytes, status: Status) -> None:
        if status.session == NO_SESSION:
            self._send(route, Status(info=self._report()))
        elif not self._is_stranger(route, status.session):
            if status.session in self._held:
                status = replace(status, more=False)
            entry = self.roster.heartbeat(status, self._now())
            self._touched.add(status.session)
            self._something.set()
            if entry is not None:
                self._write(entry)

    def _on_bye(self, route: bytes, bye: Bye) -> None:
        if self._is_stranger(route, bye.session):
            return
        verdict, entry = self.roster.bye(bye, self._now())
        if verdict is Verdict.GAP:
            session = self.roster.sessions[bye.session]
            self._refuse(route, bye.session, "bye_early", "not everything before this BYE is here")
            self._send(route, self._ack(bye.session, gap=True, first=session.next))
            return
        if entry is not None:
            self._write(entry)
            self._touched.add(bye.session)
        self._replies.append((route, bye))
        self._something.set()

    def _on_run(self, route: bytes, ask: RunInfo) -> None:
        answer = RunInfo(session=ask.session, info=self._facts(), close=ask.close)
        if ask.close is None or ask.session != NO_SESSION:
            self._send(route, answer)
            return
        if not self.closing:
            self._close(ask.close)
        self._replies.append((route, answer))
        self._something.set()

    def _close(self, exit_code: int) -> None:
        """The command ended: who did not say BYE will not speak again."""
        self.closing = True
        for entry in self.roster.end_all(self._now()):
            self._write(entry)
            self._touched.add(entry.session)
        self._write(Entry.of_event(EntryKind.CLOSE, received=self._now(), exit_code=exit_code))

    def _is_stranger(self, route: bytes, session: bytes) -> bool:
        """Refuse who is not known on this connection, or comes after the run was closed."""
        if self.closing:
            self._refuse(route, session, "closed", "the run is being finished", final=True)
            return True
        if self._routes.get(session) == route:
            return False
        self._refuse(route, session, "hello", "say HELLO first")
        return True

    def _ack(self, session: bytes, *, first: int, gap: bool = False) -> Ack:
        credit = self.room.credit(self.config.intake.credit_bytes)
        return Ack(session=session, first=first, gap=gap, credit=credit)

    def _hold(self, session: bytes) -> None:
        """Have a session keep what it has until there is room."""
        self._held.add(session)
        if (entry := self.roster.hold(session, self._now())) is not None:
            self._write(entry)
            self._touched.add(session)
        if session in self._routes:
            self._refuse(self._routes[session], session, "full", "its disk has no room: records wait here")

    def _let_go_on(self) -> None:
        """There is room: who was told to wait sends again from what is wanted."""
        held, self._held = self._held, set()
        for id_ in held & self._routes.keys():
            self._send(self._routes[id_], self._ack(id_, first=self.roster.sessions[id_].next, gap=True))

    def _refuse(self, route: bytes, session: bytes, code: str, message: str, *, final: bool = False) -> None:
        self._send(route, Refuse(session=session, code=code, message=message, final=final))

    def _send(self, route: bytes, message: Message) -> None:
        """Answer, or forget it: whoever is gone asks again."""
        try:
            self.socket.send_multipart([route, *encode(message)], zmq.DONTWAIT)
        except zmq.ZMQError:
            logger.debug("a peer is gone before its answer")
        self._inbox.set()  # the descriptor tells of changes only, and sending may have taken the last one

    # The spool

    def _write(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._something.set()

    async def _commit(self) -> None:
        while True:
            await self._something.wait()
            self._something.clear()
            await asyncio.sleep(self.config.intake.commit_interval_s)
            if not await self._commit_once():
                await asyncio.sleep(RETRY_S)

    async def _commit_once(self) -> bool:
        """Write what came in one transaction, then make good on it; False if the disk has no room for it."""
        now = self._now()
        entries, self._entries = self._entries, []
        replies, self._replies = self._replies, []
        touched, self._touched = self._touched, set()
        acknowledge, self._acknowledge = self._acknowledge, set()
        sessions = [self.roster.sessions[id_].as_stored() for id_ in touched]
        if entries or sessions:
            crash_point("intake.commit")
            self._committing = True
            try:
                await self._in_writer(self.spool.commit, entries, sessions)
            except SpoolFull as error:
                self._ran_out(error, entries)
                self._replies[:0], self._touched, self._acknowledge = (
                    replies, self._touched | touched, self._acknowledge | acknowledge
                )  # fmt: skip
                return False
            finally:
                self._committing = False
            self._horizon.move(now)
            crash_point("intake.committed")
        for session in sessions:
            self.roster.sessions[session.id].stored = session.next
        for id_ in acknowledge:
            if id_ in self._routes:
                self._send(self._routes[id_], self._ack(id_, first=self.roster.sessions[id_].stored))
        for route, message in replies:
            self._send(route, message)
        return True

    def _ran_out(self, why: SpoolFull, entries: list[Entry]) -> None:
        """Frames are left to their workers; what happened to sessions is tried again."""
        self.room.ran_out(why)
        entries = [*entries, *self._entries]
        self._entries = self.roster.take_back(entries)
        for id_ in dict.fromkeys(entry.session for entry in entries if entry.kind is EntryKind.FRAME):
            self._hold(id_)
        self._something.set()

    async def _make_room(self) -> None:
        """Drop what delivery calls settled, and see how much may be taken."""
        cursor = self.rowlog.cursor()
        try:
            if cursor > self._cursor:
                await self._in_writer(self.spool.delete_through, cursor)
                self._cursor = cursor
            taken = self.room.taken
            await self._in_writer(self.room.look)
            self.room.taken -= taken
        except SpoolFull as error:
            self.room.ran_out(error)
        if not self.room.closed:
            self._let_go_on()

    async def _in_writer(self, act: Callable[..., Any], *arguments: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writer, act, *arguments)

    # The rest of the daemon

    async def _watch(self) -> None:
        next_look = 0.0
        while self.exit_code is None:
            now = self._now()
            if not self._committing and not self._entries:
                self._horizon.move(now)
            if damage_mark(self.spool.path).exists():
                raise SpoolDamaged(self.spool.path, "delivery can not read it")
            self.keeper.tend(time.monotonic())
            for entry in self.roster.expire(self._now()):
                logger.warning("session %s was not heard of for its lease", entry.session.hex()[:8])
                self._write(entry)
                self._touched.add(entry.session)
            if self.keeper.done:
                self.exit_code = ExitCode.COMPLETE
            if os.getppid() != self._parent and not self.closing and not self.roster.live:
                logger.warning("whoever started this daemon is gone, and so are its workers: closing the run")
                self._close(CLOSED_BY_ORPHAN)
            if time.monotonic() >= next_look:
                await self._make_room()
                next_look = time.monotonic() + LOOK_INTERVAL_S
            await asyncio.sleep(WATCH_INTERVAL_S)

    def _now(self) -> float:
        """The time: the only way to read it here, so that no entry is from after a pause that nobody noticed.

        If this process stood still until now, it is as after a start: nobody was heard of, and all may have more.
        The spool says so before anything that comes later.
        """
        now = self.clock()
        pause, self._awake_at = now - self._awake_at, now
        if pause > FROZEN_S:
            logger.warning("this process stood still for %.1f s", pause)
            self.roster.excuse(pause)
            self.keeper.excuse(time.monotonic())
            self._write(Entry.of_event(EntryKind.BOOT, received=now, boot=self.boot))
        return now

    def _facts(self) -> dict[str, Any]:
        """What a worker may know of the run."""
        about = read_json(self.run_dir / "about.json")
        facts = {name: self.run.get(name) for name in ("id", "mode", "project", "entity", "name")}
        return _sayable({**facts, **_known(about), "dir": str(self.run_dir)})

    def _report(self) -> dict[str, Any]:
        return {
            "run": self._facts(),
            "boot": self.boot,
            "pid": os.getpid(),
            "closing": self.closing,
            "sessions": len(self.roster.sessions),
            "live": len(self.roster.live),
            "duplicates": self.roster.duplicates,
            "gaps": self.roster.gaps,
            "malformed": self.malformed,
            "salvaged": self.spool.salvaged,
            "room": {**self.room.facts(), "held": len(self._held)},
            "delivery": {"pid": self.keeper.pid, "restarts": self.keeper.restarts},
        }


def _known(about: dict[str, Any]) -> dict[str, Any]:
    return {name: about[name] for name in ("name", "project", "entity", "url") if about.get(name)}


def _sayable(facts: dict[str, Any]) -> dict[str, Any]:
    """A path or an argument may hold bytes that are no text; a message can not."""
    return {
        name: value.encode(errors="replace").decode() if isinstance(value, str) else value
        for name, value in facts.items()
    }


def bind(address: str, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """The ROUTER that workers connect to."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.RCVHWM, 64)
    socket.setsockopt(zmq.SNDHWM, 64)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES + 4096)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
    socket.bind(address)
    return socket


async def serve(run_dir: Path) -> int:
    """Start, serve, and shut down one run's intake."""
    config = Config.from_json((run_dir / "config.json").read_text())
    run = read_json(run_dir / "run.json")
    options = config.spool
    home = placement.settle(run_dir, options.dir)
    above = RowLogReader(home / placement.ROW_LOG).newest()
    ballast = Ballast(home / "spool.ballast", options.ballast_bytes)
    spool = open_spool(lambda: Spool(home / placement.SPOOL, above=above, quota=options.max_bytes), ballast)
    room = Room(spool, ballast, [home, run_dir], quota=options.max_bytes, reserve=options.reserve_bytes)
    clock = SpoolClock.starting_after(spool.latest())
    roster = Roster(
        spool.sessions(),
        lease=config.order.lease_s,
        now=clock(),
        duplicate_gate=config.unsafe.duplicate_gate,
    )
    keeper = DeliveryKeeper(run_dir, stall_s=config.delivery.stall_s, backoff_s=config.delivery.backoff_s)
    context = zmq.Context()
    socket = bind(run["address"], context)
    intake = Intake(socket, spool, roster, keeper, config=config, run=run, run_dir=run_dir, clock=clock, room=room)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, intake.stop)
    try:
        return await intake.serve()
    finally:
        keeper.kill()
        context.destroy(linger=100)
        spool.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The intake process of one run directory."""
    parser = argparse.ArgumentParser(prog="sidestepd.intake", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    run_dir: Path = parser.parse_args(arguments).run_dir
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the command; the run is drained after it
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.umask(0o077)
    lock = Lock(run_dir / "intake.lock")
    try:
        lock.acquire()
        code = asyncio.run(serve(run_dir))
        placement.bring_home(run_dir)
        return code
    except AlreadyRunning as error:
        logger.error("%s", error)
        return ExitCode.ALREADY_RUNNING
    except (sqlite3.Error, SpoolError, OSError):
        logger.exception("the spool's disk failed; this process ends, and workers send again")
        return ExitCode.DISK


if __name__ == "__main__":
    sys.exit(main())
