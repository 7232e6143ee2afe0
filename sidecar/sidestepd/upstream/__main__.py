"""The forwarder: reads a relay's spool, and says above what stands in it.

    python -m sidestepd.upstream RUN_DIR --parent PID

- it knows nothing that is not in the spool or in its own `delivery.db`: killed anywhere, it goes on from both
- an entry is settled when its records are on the disk of the daemon above; only then may intake delete it
- metrics and the bytes of media have a connection each; the wait for one is no wait for the other
- like delivery it holds a lock, dies with intake, and is started again by it
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import zmq

from sidestep.errors import SettingsError
from sidestep.settings import WorkerSettings
from sidestep.whereabouts import Whereabouts
from sidestep.wire import LANES, Frame, Refuse
from sidestepd.behind import begin, end
from sidestepd.clock import Clock
from sidestepd.crashpoints import crash_point
from sidestepd.entries import Entry, EntryKind
from sidestepd.errors import ExitCode, Fatal, Trouble
from sidestepd.listening import UpstreamOptions
from sidestepd.processes import write_json
from sidestepd.rowlog import RowLog
from sidestepd.rows import Checkpoint
from sidestepd.rundir import BLOBS as BLOBS_FOLDER
from sidestepd.rundir import UPSTREAM, RunFile
from sidestepd.spool import SpoolReader
from sidestepd.upstream.legs import Legs, Settling, Upper
from sidestepd.upstream.link import Link
from sidestepd.upstream.media import FrameFiles
from sidestepd.upstream.passage import Carried

logger = logging.getLogger("sidestepd.upstream")

READ_LIMIT = 500
"""Entries taken from the spool at once."""
WINDOW_BYTES = 8 * 1024 * 1024
"""Frames in memory: read, and not known to be above."""
SETTLE_S = 0.5
TELL_S = 1.0
ASK_EARLY_S, ASK_S = 2.0, 30.0
"""How often it is asked what the run is called, before and after it has an address in the browser."""
PROMPT_S = 0.5
"""A frame that is sent on within this, beyond what all are gathered for, was not held up here."""
LOOK_S = 2.0
"""While nobody answers, how often it is looked where the daemon above is."""
AWAY_S = 5.0
"""When nobody answers above for so long, it is said."""
NICENESS = 5
"""Less than delivery's: it does little, and others wait for what comes of it."""


@dataclass(slots=True)
class Road:
    """A connection, and the sessions that speak on it. `connect` makes one to where the daemon above is by now."""

    legs: Legs
    connect: Callable[[Link | None], Link | None]
    link: Link | None = None
    up: bool = False
    look_at: float = 0.0

    def turn(self, now: float, spool_now: float) -> None:
        """Hear what has come, say what there is to say."""
        if now >= self.look_at and not (self.up and self.link and not self.link.barred):
            self._look(now)
        if self.link is None:
            return
        for message in self.link.receive():
            if isinstance(message, Refuse):
                self._refused(message, self.link)
            self.legs.hear(message, now)
        self.link.look()
        if self.link.connected and self.link.send(self.legs.say(now, spool_now)):
            self.up = True
        elif self.up:
            self._interrupted()

    def _look(self, now: float) -> None:
        before = self.link
        self.look_at, self.link = now + LOOK_S, self.connect(before)
        if self.up and self.link is not before:
            self._interrupted()

    def _interrupted(self) -> None:
        self.up = False
        self.legs.interrupted()

    def _refused(self, refuse: Refuse, link: Link) -> None:
        if refuse.code == "version":
            raise Fatal(refuse.message, trouble=Trouble(refuse.message, lasting=True))
        if refuse.code == "key" and refuse.session == self.legs.relay:  # all that is said here, not one leg
            link.barred = refuse.message or "it does not know our key"


@dataclass(slots=True)
class Told:
    """What was said of how it stands, so that it is said once."""

    at: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)
    upstream: Mapping[str, Any] = field(default_factory=dict)
    trouble: Trouble | None = None
    open_since: float | None = None
    away_since: float = field(default_factory=time.monotonic)


class Forwarder:
    """Everything between a relay's spool and the daemon above, for one run."""

    def __init__(
        self,
        spool: SpoolReader,
        rowlog: RowLog,
        run: RunFile,
        *,
        above: UpstreamOptions,
        horizon: Clock,
        beat: Callable[[], None],
        poll_interval_s: float,
        gather_s: float,
        troubled: Callable[[Trouble | None], None],
    ) -> None:
        self.spool, self.rowlog, self.run = spool, rowlog, run
        self.whereabouts = Whereabouts(_as_a_worker(above), say=self._can_not_look)
        self.address = ""
        """Where the daemon above was looked for last."""
        self.horizon, self.beat, self.troubled = horizon, beat, troubled
        self.run_dir = Path(run.dir)
        self.exit_code: int | None = None
        """That of the run, once it is told to finish."""
        self.files = FrameFiles(self.run_dir / BLOBS_FOLDER)
        checkpoint = rowlog.checkpoint()
        totals = rowlog.meta("totals", {})
        self.settling = Settling(
            checkpoint.cursor, delivered=totals.get("delivered", 0), refused=totals.get("refused", 0)
        )
        self.read_through = checkpoint.cursor
        self._lost_before = totals.get("lost", 0)
        self._poll_ms, self._gather_s = int(poll_interval_s * 1000), gather_s
        self._behind, self._dirty = True, False
        self._settle_at = self._ask_at = self._read_at = 0.0
        self._told = Told()
        self._words = self._no_way = ""
        """Why the daemon above would not speak to us, and why we can not even try."""
        self._context = zmq.Context()
        relay = self.session = relay_of(run)
        upper = Upper(
            relay=relay,
            node=os.uname().nodename,
            pid=os.getppid(),
            run=run.id if run.named else None,
            turn=run.turn,
        )
        self.metrics, self.media = (
            Road(Legs(upper, jitter=random.random, behind=self._is_behind), self._connect) for _ in range(2)
        )
        self._restore(rowlog.meta("sessions", {}))
        self.metrics.legs.run = rowlog.meta("above", {})
        self.metrics.legs.introduce()

    def _is_behind(self) -> bool:
        return self._behind

    def _connect(self, link: Link | None) -> Link | None:
        """A link to where the daemon above is said to be; the one that there is, if nothing speaks against it."""
        if link is not None and link.failure is not None:
            self.whereabouts.failed()
        if link is not None and link.words:
            self._words = f"the daemon at {link.endpoint} {link.words}"
        self._no_way = ""
        endpoint = self.whereabouts.look()
        if endpoint is None:
            return link
        self.address = endpoint.address
        if link is not None and not link.words and link.endpoint == endpoint:
            return link
        if link is not None:
            link.shut()
        try:
            return Link(self._context, endpoint, self.session)
        except SettingsError as error:
            self._can_not_look(str(error))
            return None

    def _can_not_look(self, why: str) -> None:
        self._no_way = why

    def _restore(self, state: Mapping[bytes, Mapping[str, Any]]) -> None:
        media = {id_: facts for id_, facts in state.items() if facts["hello"].get("role") in LANES}
        self.metrics.legs.restore({id_: facts for id_, facts in state.items() if id_ not in media})
        self.media.legs.restore(media)
        self.settling.media = {id_: facts["through"] for id_, facts in media.items()}
        for session, carried in self.files.list(self.settling.media):
            ending = self.media.legs.leg(session).ending
            self.media.legs.carry(session, carried, more=False)
            self.media.legs.leg(session).ending = ending

    # Its life

    def serve(self) -> None:
        """Until the run is told to finish, and everything of it is above."""
        while not self._complete():
            self.beat()
            spool_now = self.horizon()
            now = time.monotonic()
            if self.metrics.legs.held < WINDOW_BYTES and (self._behind or now >= self._read_at):
                self._read(now)
            for road in (self.metrics, self.media):
                road.turn(now, spool_now)
            self._settle_files()
            self._dirty = self.settling.look(self.metrics.legs) or self._dirty
            if self._dirty and now >= self._settle_at:
                self._settle(now)
            if now >= self._told.at + TELL_S:
                self._tell(now)
            if not self._behind or self.metrics.legs.held >= WINDOW_BYTES:
                self._wait(now)

    def _complete(self) -> bool:
        if self.exit_code is None or self._behind or self.settling.waiting:
            return False
        if not (self.metrics.legs.all_over and self.media.legs.all_over):
            return False
        self.metrics.legs.leave(self.exit_code)
        return self.metrics.legs.left

    def finish(self) -> None:
        """Write down that all of it is above."""
        now = time.monotonic()
        self._settle(now, state="closed", exit_code=self.exit_code)
        self._tell(now)
        self.troubled(None)

    def shut(self) -> None:
        """Let go of the sockets."""
        self._context.destroy(linger=200)

    def _wait(self, now: float) -> None:
        due = min((road.legs.due(now) for road in (self.metrics, self.media) if road.up), default=1.0)
        poller = zmq.Poller()
        for road in (self.metrics, self.media):
            if road.link is not None:
                poller.register(road.link.socket, zmq.POLLIN)
        poller.poll(max(1, min(self._poll_ms, int(due * 1000))))

    # Reading

    def _read(self, now: float) -> None:
        """What there is; more is gathered before it is read, but what comes after a pause is not held up.

        Not for the same time each: so some frames of every minute are not held up either, and by those the clocks
        of nodes are compared.
        """
        entries = self.spool.read(self.read_through, READ_LIMIT)
        for entry in entries:
            self._take(entry)
            self.read_through = entry.id
        self._behind = len(entries) == READ_LIMIT
        if entries:
            self._read_at = now + self._gather_s * (0.75 + 0.5 * random.random())

    def _take(self, entry: Entry) -> None:
        match entry.kind:
            case EntryKind.FRAME:
                self.metrics.legs.carry(entry.session, self._carried(entry), more=entry.more)
            case EntryKind.BLOBS:
                self.media.legs.carry(entry.session, self.files.take(entry), more=False)
            case EntryKind.BOOT:
                self.metrics.legs.boot()
            case EntryKind.CLOSE:
                self.exit_code = int(entry.facts.get("exit_code", 0))
            case _:
                self._legs_of(entry).read(entry)
        self.settling.wait(entry)

    def _carried(self, entry: Entry) -> Carried:
        return _carried(entry, self.horizon, PROMPT_S + self._gather_s)

    def _legs_of(self, entry: Entry) -> Legs:
        is_media = entry.session in self.media.legs.legs or (
            entry.kind is EntryKind.HELLO and entry.facts.get("role") in LANES
        )
        return self.media.legs if is_media else self.metrics.legs

    # Settling

    def _settle_files(self) -> None:
        for session, leg in self.media.legs.legs.items():
            self._dirty = self.files.settle(session, leg.passage.acknowledged) or self._dirty

    def _settle(self, now: float, **meta: Any) -> None:
        crash_point("upstream.settle")
        self.rowlog.settle(
            checkpoint=Checkpoint(cursor=self.settling.cursor, fold=b""),
            sessions={**self.metrics.legs.state(), **self._state_of_media()},
            above=self.metrics.legs.run,
            totals={
                "delivered": self.settling.delivered,
                "refused": self.settling.refused,
                "lost": self._lost,
            },
            ledger=self.ledger(),
            **meta,
        )
        crash_point("upstream.settled")
        self._settle_at, self._dirty = now + SETTLE_S, False

    def _state_of_media(self) -> dict[bytes, dict[str, Any]]:
        state, through = self.media.legs.state(), self.settling.media
        return {session: {**facts, "through": through.get(session, 0)} for session, facts in state.items()}

    @property
    def _lost(self) -> int:
        lost: int = self._lost_before + self.metrics.legs.lost + self.media.legs.lost
        return lost

    def ledger(self) -> dict[str, Any]:
        """What became of the records up to the cursor; all above it is pending."""
        here = Counter({"spool_lost": self._lost, "refused": self.settling.refused})
        sessions = {}
        for legs in (self.metrics.legs, self.media.legs):
            for id_, leg in legs.legs.items():
                if id_ != legs.relay:
                    sessions[id_.hex()] = _of_session(leg)
                    here.update(leg.passage.dropped)
        waiting = self.files.waiting(self.settling.media)
        return {
            "delivered": self.settling.delivered - waiting,
            "rejected": {},
            "dropped": {reason: count for reason, count in here.items() if count},
            "unsettled": waiting,
            "read_through": self.settling.cursor,
            "settled_beyond": 0,
            "waiting": 0,
            "late_rows": 0,
            "sessions": sessions,
        }

    # Telling

    def _tell(self, now: float) -> None:
        """Say how it stands, to intake and to `sidestep status`."""
        self._told.at = now
        if now >= self._ask_at:
            self._ask_at = now + (ASK_S if self.metrics.legs.run.get("url") else ASK_EARLY_S)
            self.metrics.legs.ask()
        refused = self.metrics.legs.refused or self.media.legs.refused
        is_open = self.metrics.up and self.metrics.legs.open
        if is_open:
            self._told.away_since, self._words = now, ""
        upstream = {
            "address": self.address,
            "connected": is_open,
            "behind": self.metrics.legs.pending,
            "media": self.files.waiting(self.settling.media),
            **self.metrics.legs.intervals,
        }
        if upstream != self._told.upstream:
            self._told.upstream = upstream
            write_json(self.run_dir / UPSTREAM, upstream)
        about = {name: value for name, value in self.metrics.legs.run.items() if name != "dir"}
        if about and about != self._told.about:
            self._told.about = about
            write_json(self.run_dir / "about.json", about)
        self._tell_trouble(refused, away_s=now - self._told.away_since)

    def _tell_trouble(self, refused: Refuse | None, *, away_s: float) -> None:
        trouble = None
        if refused is not None:
            what = f"the daemon at {self.address} takes no more of this run: {refused.message or refused.code}"
            trouble = Trouble(what, lasting=True)
        elif away_s > AWAY_S and (self.metrics.legs.pending or not self.metrics.legs.run):
            where = f"no daemon answers at {self.address}" if self.address else "no daemon above is known yet"
            trouble = Trouble(self._no_way or self._words or where)
        if trouble != self._told.trouble:
            self._told.trouble = trouble
            logger.warning("waiting: %s", trouble.what) if trouble else logger.info("going on")
            self.troubled(trouble)


def _as_a_worker(options: UpstreamOptions) -> WorkerSettings:
    """What a worker that looks for its daemon there would be told."""
    return WorkerSettings(
        address=options.address,
        context=None if options.context is None else str(options.context),
        key_file=None if options.key_file is None else str(options.key_file),
    )


def relay_of(run: RunFile) -> bytes:
    """The session of the relay of a run: the same in all its lives."""
    return hashlib.blake2b(f"{run.dir}\0{run.created}\0{os.uname().nodename}".encode(), digest_size=16).digest()


def _carried(entry: Entry, now: Clock, prompt_s: float) -> Carried:
    """A frame; one that has lain here says so by MORE: how long it took tells nothing of clocks."""
    frame = Frame(
        session=entry.session,
        first=entry.first,
        count=entry.count,
        body=entry.body,
        crc=entry.crc,
        more=entry.more,
    )

    def load() -> Frame:
        return replace(frame, more=True) if now() - entry.received > prompt_s else frame

    return Carried(first=entry.first, count=entry.count, size=len(entry.body), load=load)


def _of_session(leg: Any) -> dict[str, Any]:
    passage = leg.passage
    return {
        "rank": leg.hello.get("rank", 0),
        "node": leg.hello.get("node", ""),
        "ended": None if leg.ending is None else "lease" if leg.ending["lost"] else "bye",
        "offered": passage.offered,
        "dropped": dict(passage.dropped),
        "acknowledged": passage.end,
        "final": passage.end if leg.ending is not None and not leg.ending["lost"] else None,
        "lost": passage.lost,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The forwarder of one run directory."""
    behind = begin("sidestepd.upstream", __doc__.splitlines()[0], arguments, niceness=NICENESS)
    if behind.is_done:
        return ExitCode.COMPLETE
    run = RunFile.read(behind.directory)
    forwarder = Forwarder(
        behind.spool,
        behind.rowlog,
        run.at(behind.directory, run.address),
        above=behind.config.upstream,
        horizon=behind.horizon,
        beat=behind.beat,
        poll_interval_s=behind.config.delivery.poll_interval_s,
        gather_s=behind.config.upstream.gather_s,
        troubled=behind.troubled,
    )
    try:
        with behind.told():
            forwarder.serve()
            forwarder.finish()
    finally:
        forwarder.shut()
    return ExitCode.COMPLETE


if __name__ == "__main__":
    end(main, logger)
