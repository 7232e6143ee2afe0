"""One run: judge what its workers say, and put it on disk.

    FRAME ─▶ roster judges ─▶ waits for the group commit ─▶ spool ─▶ ACK

- acknowledged means committed: replies that promise anything leave after the commit
- the bytes of media go into files, in a thread of their own; the commit of metrics never waits for those
- the commit runs off the event loop, in one thread of this run's own; a failing disk ends the process, and
  workers send again
- its delivery, which imports wandb, is a process of its own, kept running from here
- the socket is not seen here: messages are handed in, and answers handed to `send`
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from sidestep.wire import Ack, Acks, Bye, Frame, Hello, Message, Refuse, RunInfo, Status, Welcome, Wrapped, decode
from sidestepd import placement
from sidestepd.clock import Clock, Horizon, SpoolClock
from sidestepd.collect import Collector
from sidestepd.config import Config
from sidestepd.crashpoints import crash_point
from sidestepd.errors import ExitCode, SpoolDamaged, SpoolFull
from sidestepd.exits import Exits, Lifeline, is_here
from sidestepd.intake.blobs import CREDIT_BYTES, BlobStore
from sidestepd.intake.facts import Known, intervals_of, report_of, wished
from sidestepd.intake.frames import FrameStore
from sidestepd.intake.place import RELAYED_S, Deleting, open_room, open_roster
from sidestepd.keeper import DeliveryKeeper
from sidestepd.listen import Listener
from sidestepd.processes import Lock
from sidestepd.relays import Relays
from sidestepd.room import RETRY_S, Room
from sidestepd.roster import Roster, Session, Verdict
from sidestepd.rowlog import RowLogReader
from sidestepd.rundir import BLOBS, DEATHS, TROUBLE, RunFile
from sidestepd.samplers.keeper import SamplersKeeper
from sidestepd.spool import Entry, EntryKind, Spool, damage_mark

logger = logging.getLogger("sidestepd.intake")

WATCH_INTERVAL_S = 0.1
LOOK_INTERVAL_S = 1.0
"""How often what is settled is deleted, and room is measured."""
FROZEN_S = 1.0
"""A longer pause of this process is not the silence of its workers."""

Send = Callable[[bytes, Message | Acks], None]
"""Answers a peer, by the route its message came on; never waits, never raises."""


class Intake:
    """One run's spool and roster."""

    def __init__(
        self,
        spool: Spool,
        roster: Roster,
        keeper: DeliveryKeeper,
        samplers: SamplersKeeper,
        *,
        config: Config,
        run: RunFile,
        clock: Clock,
        room: Room,
        blobs: BlobStore,
        lock: Lock,
        send: Send,
    ) -> None:
        self.spool, self.roster, self.keeper, self.samplers, self.room = spool, roster, keeper, samplers, room
        self.blobs = blobs
        self.config, self.run, self.run_dir, self.clock = config, run, Path(run.dir), clock
        self.boot = uuid.uuid4().hex
        self.rowlog = RowLogReader(spool.path.with_name(placement.ROW_LOG))
        self.collector = Collector(self.run_dir, run.address, run.id)
        self.facts = Known(run, self.run_dir, is_relay=config.is_relay)
        self.exit_code: int | None = None
        self.closing = spool.has_close()
        self._ended_well = False
        self._lock = lock
        self._send = send
        self._routes: dict[bytes, bytes] = {}
        self._entries: list[Entry] = []
        self._replies: list[tuple[bytes, Message]] = []
        self._touched: set[bytes] = set()
        self._acknowledge: set[bytes] = set()
        self._held: set[bytes] = set()
        """Sessions that were told to keep what they have."""
        self._something = asyncio.Event()
        self._soon: asyncio.TimerHandle | None = None
        """Sets it, if nothing else does before."""
        self._blob_frames: list[Frame] = []
        self._some_blobs = asyncio.Event()
        self._writer = ThreadPoolExecutor(1, "spool")
        self._blob_writer = ThreadPoolExecutor(1, "blobs")
        self._horizon = Horizon(self.run_dir / "horizon")
        self._committing = False
        self._awake_at = clock()
        self.went_round_at = time.monotonic()
        """The loop came back from the threads that write; about every second where the disks do."""
        self._deleting = Deleting(spool, room)
        self.listener = Listener(heartbeat_s=config.intake.heartbeat_s)
        self.relays = Relays(roster, heartbeat_s=config.intake.heartbeat_s, patience_s=config.order.patience_s)
        self.exits: Exits | None = None
        self._samplers_are_asked = False

    @classmethod
    def open(cls, run_dir: Path, send: Send) -> Intake:
        """Take up the run that lies in a directory. Raises what the disk, or its lock, has against it."""
        config = Config.from_json((run_dir / "config.json").read_text())
        run = RunFile.read(run_dir)
        lock = Lock(run_dir / "intake.lock")
        lock.acquire()
        for told in (TROUBLE, DEATHS):  # that was then
            (run_dir / told).unlink(missing_ok=True)
        spool, room = open_room(run_dir, config)
        clock = SpoolClock.starting_after(spool.latest())
        roster = open_roster(spool, config, now=clock())
        module = "sidestepd.upstream" if config.is_relay else "sidestepd.delivery"
        keeper = DeliveryKeeper(
            run_dir, module, stall_s=config.delivery.stall_s, backoff_s=config.delivery.backoff_s
        )
        samplers = SamplersKeeper(run_dir, enabled=config.samplers.enabled, backoff_s=config.delivery.backoff_s)
        run = run.at(run_dir, run.address)
        store = FrameStore if config.is_relay else BlobStore
        blobs = store(run_dir / BLOBS, quota=config.spool.blob_quota_bytes, reserve=config.spool.reserve_bytes)
        return cls(
            spool, roster, keeper, samplers,
            config=config, run=run, clock=clock, room=room, blobs=blobs, lock=lock, send=send,
        )  # fmt: skip

    async def serve(self) -> int:
        """Until the run is complete, or told to stop; returns how it ended."""
        logger.info("boot %s serves %s", self.boot, self.run_dir)
        self._write(Entry.of_event(EntryKind.BOOT, received=self._now(), boot=self.boot))
        self.exits = Exits(asyncio.get_running_loop(), self._on_exit)
        for session in self.roster.live:
            self._follow(session)
        loops = [asyncio.create_task(loop()) for loop in (self._commit, self._store, self._watch)]
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            for writer in (self._blob_writer, self._writer):
                writer.submit(lambda: None).result()  # what is under way ends before anything else
        if self._entries:
            await self._commit_once()
        self._ended_well = True
        return self.exit_code if self.exit_code is not None else ExitCode.SOFTWARE

    def stop(self) -> None:
        """End, resumably."""
        if self.exit_code is None:
            self.exit_code = ExitCode.INTERRUPTED

    def shut(self) -> None:
        """Let go of everything: processes, files, the thread. After a good end the databases come home."""
        self.samplers.kill()
        self.keeper.kill()
        self._blob_writer.shutdown()
        self._writer.shutdown()
        self.spool.close()
        if self._ended_well:
            placement.bring_home(self.run_dir)
        self._lock.release()

    # What workers say

    def hear(self, route: bytes, message: Message, peer: str = "") -> None:
        """Take in what a worker of this run said, and `peer` proved to be."""
        match message:
            case Frame():
                self._on_frame(route, message)
            case Hello():
                self._on_hello(route, message, peer)
            case Status():
                self._on_status(route, message)
            case Bye():
                self._on_bye(route, message)
            case RunInfo():
                self._send(route, RunInfo(session=message.session, info=self.facts()))
            case _:
                self._refuse(route, message.session, "malformed", "only a daemon says that")

    def _on_hello(self, route: bytes, hello: Hello, peer: str) -> None:
        if self.closing:
            self._refuse(route, hello.session, "closed", "the run is being finished", final=True)
            return
        for ended in self.roster.supersede(hello, self._now()):
            self._write(ended)
            self._touched.add(ended.session)
        self._write(self.roster.hello(hello, self._now(), peer=peer))
        self._routes[hello.session] = route
        self._touched.add(hello.session)
        session = self.roster.sessions[hello.session]
        if session.is_worker and not session.relay:
            self._ask_samplers(hello)
            self.samplers.stay()
            self._follow(session)
        welcome = Welcome(
            session=hello.session,
            first=self.roster.wanted(session),
            boot=self.boot,
            credit=self._credit(is_lane=session.is_lane),
            heartbeat_s=self.relays.heartbeat_s if session.is_relay else self.config.intake.heartbeat_s,
            **intervals_of(self.config, self.run_dir, hello.world),
            run=self.facts(),
        )
        self._replies.append((route, welcome))

    def _ask_samplers(self, hello: Hello) -> None:
        """What the first worker wishes."""
        if self._samplers_are_asked:
            return
        self._samplers_are_asked = True
        self.samplers.ask(**wished(self.config, hello.settings))

    def _on_frame(self, route: bytes, frame: Frame) -> None:
        if self._is_stranger(route, frame.session):
            return
        now = self._now()
        session = self.roster.sessions[frame.session]
        if session.is_lane:
            self._on_blobs(frame, session)
            return
        if frame.first == session.next and not self.room.admit(len(frame.body)):
            self._hold(frame.session)
            return
        was_live = session.state == "live"
        match self.roster.frame(frame, now):
            case Verdict.TAKE:
                self._write(Entry.of_frame(frame, received=now))
                self._acknowledge.add(frame.session)
                if not was_live:  # else the frame says it all
                    self._touched.add(frame.session)
            case Verdict.DUPLICATE:
                self._acknowledge.add(frame.session)
                self._something.set()
            case _ if frame.session in self._held:
                self._hold(frame.session)
            case _:
                self._send(route, self._ack(frame.session, gap=True, first=session.next))

    def hear_together(self, route: bytes, frames: Sequence[Wrapped], body: bytes) -> None:
        """Take in FRAMEs out of the body of an envelope; one that is not simply wanted next is heard by itself."""
        while frames:
            taken = frames[: self._take(route, frames)]
            if taken:
                self._entries.append(Entry.of_envelope(taken, body, received=self._awake_at))
                self._acknowledge.update(it.session for it in taken)
                self._soon = self._soon or asyncio.get_running_loop().call_later(RELAYED_S, self._something.set)
            for frame in frames[len(taken) : len(taken) + 1]:
                self.hear(route, decode(frame.parts(body)))
            frames = frames[len(taken) + 1 :]

    def _take(self, route: bytes, frames: Sequence[Wrapped]) -> int:
        now, size = self._now(), sum(it.end - it.start for it in frames)
        if self.closing or not self.room.fits(size):
            return 0  # each is told so, or held
        taken = self.roster.take(frames, now, route=route, routes=self._routes)
        self.room.taken += size if taken else 0
        return taken

    def _on_blobs(self, frame: Frame, session: Session) -> None:
        """What is to be stored waits for the thread that does; all of it is judged when its turn comes."""
        session.heard = self._now()
        if frame.first >= session.next and not (self.room.admit(0) and self._admit_blobs(frame, session)):
            self._hold(frame.session)
            return
        self._blob_frames.append(frame)
        self._some_blobs.set()

    def _admit_blobs(self, frame: Frame, session: Session) -> bool:
        if session.is_courier:
            return self.blobs.admit_from_courier(frame.session, len(frame.body))
        return self.blobs.admit(len(frame.body))

    async def _store(self) -> None:
        while True:
            await self._some_blobs.wait()
            self._some_blobs.clear()
            frames, self._blob_frames = self._blob_frames, []
            wanted = {id_: session.next for id_, session in self.roster.sessions.items() if session.is_lane}
            fresh: list[Frame] = []
            for frame in frames:
                if wanted.get(frame.session) == frame.first:
                    wanted[frame.session] = frame.end
                    fresh.append(frame)
            await self._store_some(fresh)
            for frame in frames:
                if frame not in fresh:
                    self._judge(frame, None)

    async def _store_some(self, frames: list[Frame]) -> None:
        """Put bytes into files, and have the next commit say so."""
        if not frames:
            return
        crash_point("intake.blobs")
        try:
            told = await asyncio.get_running_loop().run_in_executor(self._blob_writer, self.blobs.write, frames)
        except SpoolFull as error:
            logger.warning("no room for more media, workers keep what they have: %s", error)
            for id_ in {frame.session for frame in frames}:
                self._hold(id_)
            return
        crash_point("intake.blobs_stored")
        for frame, facts in zip(frames, told, strict=True):
            self._judge(frame, facts)

    def _judge(self, frame: Frame, facts: dict[str, Any] | None) -> None:
        """Take a frame of blobs whose bytes are in files, or say what is wanted instead."""
        if self.closing:
            return
        session, now = self.roster.sessions[frame.session], self._now()
        if facts is not None and frame.first == session.next:
            self.roster.frame(frame, now)
            entry = Entry.of_event(
                EntryKind.BLOBS, frame.session, first=frame.first, count=frame.count, received=now, **facts
            )
            self._write(entry)
            self._touched.add(frame.session)
        elif frame.first > session.next:
            if frame.session in self._routes and frame.session not in self._held:
                self._send(self._routes[frame.session], self._ack(frame.session, gap=True, first=session.next))
            return
        else:
            self.roster.duplicates += 1
        self._acknowledge.add(frame.session)
        self._something.set()

    def _on_status(self, route: bytes, status: Status) -> None:
        if self._is_stranger(route, status.session):
            return
        if status.session in self._held:
            status = replace(status, more=False)
        session, now = self.roster.sessions[status.session], self._now()
        before = (session.state, session.offered, session.values_refused)
        entries = [it for it in (self.roster.heartbeat(status, now), *self.relays.hear(status, now)) if it]
        if entries or before != (session.state, session.offered, session.values_refused):
            self._touched.add(session.id)
            self._something.set()
        self._entries.extend(entries)

    def _on_bye(self, route: bytes, bye: Bye) -> None:
        if not self._has_left(bye.session) and self._is_stranger(route, bye.session):
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
            if self.exits is not None:
                self.exits.forget(bye.session)
        self._replies.append((route, bye))
        self._something.set()

    # Its end

    def close(self, exit_code: int, then: tuple[bytes, Message] | None = None) -> None:
        """Nobody of this run will speak again: finish it. `then` is answered once that is on disk.

        Nothing happens yet while something that ended workers left is still to be collected, while couriers still
        send their files, nor before the samplers have said their last words: who asks is told that it is not done,
        and asks again.
        """
        if not self.closing:
            couriers, now = self._couriers_at_work(), time.monotonic()
            if couriers or self.collector.anything_left(now) or not self.samplers.ended(now):
                if then is not None:
                    files = {"couriers": couriers, "bytes": self.blobs.sent_by_couriers}
                    self._send(then[0], RunInfo(info={**self.facts(), "files": files}))
                return
            self.closing = True
            if self.exits is not None:
                self.exits.look()
            for entry in self.listener.close(self.roster.live, self._now()):
                self._write(entry)
            for entry in self.roster.end_all(self._now()):
                self._write(entry)
                self._touched.add(entry.session)
            self._write(Entry.of_event(EntryKind.CLOSE, received=self._now(), exit_code=exit_code))
        if then is not None:
            self._replies.append(then)
            self._something.set()

    def _couriers_at_work(self) -> int:
        """How many processes still send files of workers; one that died is not waited for."""
        couriers = [it for it in self.roster.awaited if it.is_courier]
        for one in couriers:
            here = not one.relay and is_here(one.hello.get("node", ""), pids=one.hello.get("pids", ""))
            if here and not Lifeline(one.hello.get("pid", 0)).is_alive():
                self.lose(one.id)
        return sum(it.state == "live" for it in couriers)

    def lose(self, session: bytes) -> None:
        """The process of this session is gone: its lease ends now."""
        for entry in self.roster.lose(session, self._now()):
            logger.warning("the process of session %s is gone", session.hex()[:8])
            self._write(entry)
            self._touched.add(session)

    def _follow(self, session: Session) -> None:
        """See the end of a worker's process, if it is on this node."""
        if self.exits is not None and is_here(session.hello.get("node", ""), pids=session.hello.get("pids", "")):
            self.exits.follow(session.id, session.hello.get("pid", 0))

    def _on_exit(self, id_: bytes) -> None:
        self.listener.exited(id_, self._now())

    def _is_stranger(self, route: bytes, session: bytes) -> bool:
        """Refuse who is not known on this connection, or comes after the run was closed."""
        if self.closing:
            self._refuse(route, session, "closed", "the run is being finished", final=True)
            return True
        if self._routes.get(session) == route:
            return False
        self._refuse(route, session, "hello", "say HELLO first")
        return True

    def _has_left(self, session: bytes) -> bool:
        """Whether its last word was heard, and is said again because the answer was late."""
        known = self.roster.sessions.get(session)
        return known is not None and known.state == "bye"

    def _ack(self, session: bytes, *, first: int, gap: bool = False) -> Ack:
        credit = self._credit(is_lane=self.roster.sessions[session].is_lane)
        return Ack(session=session, first=first, gap=gap, credit=credit)

    def _credit(self, *, is_lane: bool) -> int:
        most = self.config.intake.credit_bytes
        return self.room.credit(min(most, CREDIT_BYTES) if is_lane else most)

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
        held = {id_ for id_ in self._held if not self._is_closed_to(self.roster.sessions[id_])}
        self._held -= held
        for id_ in held & self._routes.keys():
            self._send(self._routes[id_], self._ack(id_, first=self.roster.sessions[id_].next, gap=True))

    def _is_closed_to(self, session: Session) -> bool:
        return self.blobs.full if session.is_courier else session.is_lane and self.blobs.closed

    def _refuse(self, route: bytes, session: bytes, code: str, message: str, *, final: bool = False) -> None:
        self._send(route, Refuse(session=session, code=code, message=message, final=final))

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
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        entries, self._entries = self._entries, []
        replies, self._replies = self._replies, []
        touched, self._touched = self._touched, set()
        acknowledge, self._acknowledge = self._acknowledge, set()
        sessions = [self.roster.sessions[id_].as_stored() for id_ in touched]
        reached = {id_: self.roster.sessions[id_].next for id_ in acknowledge}
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
        self._acknowledge_all(reached)
        for route, message in replies:
            self._send(route, message)
        return True

    def _acknowledge_all(self, reached: Mapping[bytes, int]) -> None:
        said: dict[tuple[bytes, bool], list[tuple[bytes, int]]] = {}
        for id_, end in reached.items():
            session = self.roster.sessions[id_]
            session.stored = end
            if id_ in self._routes:
                said.setdefault((self._routes[id_], session.is_lane), []).append((id_, end))
        for (route, is_lane), those in said.items():
            self._send(route, Acks(those, self._credit(is_lane=is_lane)))

    def _ran_out(self, why: SpoolFull, entries: list[Entry]) -> None:
        """Frames are left to their workers; what happened to sessions is tried again."""
        self.room.ran_out(why)
        entries = [*entries, *self._entries]
        self._entries = self.roster.take_back(entries)
        for id_ in dict.fromkeys(said.session for entry in entries for said in entry.said()):
            self._hold(id_)
        self._something.set()

    async def _make_room(self) -> None:
        """Drop what delivery calls settled, and see how much may be taken."""
        try:
            await self._in_writer(self._deleting.through, self.rowlog.cursor(), time.monotonic())
            taken = self.room.taken
            await self._in_writer(self.room.look)
            self.room.taken -= taken
            await asyncio.get_running_loop().run_in_executor(self._blob_writer, self.blobs.look)
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
            if not self.closing and self.roster.has_own:
                self.samplers.tend(time.monotonic())
            for entry in (*self.listener.look(self.roster.live, self._now()), *self.relays.look(self._now())):
                self._write(entry)
            for entry in self.roster.expire(self._now()):
                logger.warning("session %s was not heard of for its lease", entry.session.hex()[:8])
                self._write(entry)
                self._touched.add(entry.session)
            if self.keeper.done:
                self.exit_code = ExitCode.COMPLETE
            self.collector.tend(time.monotonic())
            if time.monotonic() >= next_look:
                await self._make_room()
                self.went_round_at = time.monotonic()
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
            self.listener.restart(pause)
            self.keeper.excuse(time.monotonic())
            self._write(Entry.of_event(EntryKind.BOOT, received=now, boot=self.boot))
        return now

    def report(self) -> dict[str, Any]:
        """How this run is, for a tool that asks."""
        return report_of(self, held=len(self._held))
