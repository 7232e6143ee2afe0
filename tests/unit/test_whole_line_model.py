"""The whole line against a model of it: real outboxes and dialogues, a real roster and spool, every stage behind.

Processes die between any two commits and any two messages, and again while they recover; messages, answers,
a whole spool and any entry of one are lost. The model knows only what was said and what was acknowledged.

- what was acknowledged, and not lost with a spool, is in exactly one row at its axis; nothing is in two
- `_step` never goes back, whatever happened
- every record that the daemon took is delivered, folded, or counted as lost
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sidestep.dialogue import Dialogue, Phase
from sidestep.outbox import Outbox
from sidestep.wire import Ack, Bye, Frame, Hello, Message, Status, Welcome
from sidestepd.entries import Entry, EntryKind
from sidestepd.roster import Roster, Verdict
from sidestepd.rows import MAIN_AXIS, PROCESS
from sidestepd.spool import Spool, SpoolReader, damage_mark
from tests.support.builders import config, counted, define, log, session_id
from tests.support.line import Died, Disk, Line, Options

LEASE_S = 60.0
CREDIT = 1 << 20
PLACES = ("decide", "decided", "write", "written", "settle", "settled")
COMMITS = ("commit", "committed")
STAGES = (None, "eval")


class Killed(Exception):
    """Intake came to the place where it was to die."""


class Worker:
    """One life of one rank: what it said, by sequence."""

    def __init__(self, number: int, rank: int, world: int, restarts: int) -> None:
        self.id, self.number, self.rank = session_id(number), number, rank
        self.outbox = Outbox(self.id, 1 << 20)
        hello = Hello(session=self.id, first=0, rank=rank, world=world, launch="L", attempt=restarts)
        self.dialogue = Dialogue(self.outbox, hello, jitter=lambda: 0.5)
        self.inbox: list[Message] = []
        self.names: list[tuple[str, str] | None] = []
        """For each record its unique name and its axis; None for what is in no row."""
        self.own: Counter[str | None] = Counter()
        self.alive = True


class Intake:
    """Intake without its socket: the same roster and spool, driven in the same order."""

    def __init__(self, spool: Spool, now: float, boot: str) -> None:
        self.spool, self.boot = spool, boot
        self.roster = Roster(spool.sessions(), lease=LEASE_S, now=now)
        self.entries = [Entry.of_event(EntryKind.BOOT, received=now, boot=boot)]
        self.touched: set[bytes] = set()
        self.known: set[bytes] = set()
        """Sessions that said HELLO on their connection."""
        self.answers: list[tuple[bytes, Message]] = []
        """What is said once the spool has committed."""

    def take(self, message: Message, now: float) -> None:
        """A message of a worker."""
        session: bytes = message.session
        if isinstance(message, Hello):
            ended = self.roster.supersede(message, now)
            self.entries += [*ended, self.roster.hello(message, now)]
            self.touched |= {session, *(entry.session for entry in ended)}
            self.known.add(session)
            wanted = self.roster.wanted(self.roster.sessions[session])
            self.answers.append((session, Welcome(session=session, first=wanted, boot=self.boot, credit=CREDIT)))
        elif session not in self.known:
            return  # a real one is told to say HELLO; here it finds out by itself
        elif isinstance(message, Frame):
            self._take_frame(message, now)
        elif isinstance(message, Bye):
            self._take_bye(message, now)
        elif isinstance(message, Status) and (entry := self.roster.heartbeat(message, now)):
            self.entries.append(entry)
            self.touched.add(session)

    def _take_frame(self, frame: Frame, now: float) -> None:
        verdict = self.roster.frame(frame, now)
        if verdict is Verdict.TAKE:
            self.entries.append(Entry.of_frame(frame, received=now))
        self.touched.add(frame.session)

    def _take_bye(self, bye: Bye, now: float) -> None:
        verdict, entry = self.roster.bye(bye, now)
        if entry is not None:
            self.entries.append(entry)
            self.touched.add(bye.session)
        if verdict in (Verdict.TAKE, Verdict.DUPLICATE):
            self.answers.append((bye.session, Bye(session=bye.session, first=bye.first)))

    def commit(self, dies_at: str | None) -> list[tuple[bytes, Message]]:
        """Write what came; the answers that may be said now."""
        if dies_at == "commit":
            raise Killed
        sessions = [self.roster.sessions[id_].as_stored() for id_ in self.touched]
        self.spool.commit(self.entries, sessions)
        if dies_at == "committed":
            raise Killed
        for session in sessions:
            self.roster.sessions[session.id].stored = session.next
        acks: list[tuple[bytes, Message]] = [
            (id_, Ack(session=id_, first=self.roster.sessions[id_].stored, credit=CREDIT)) for id_ in self.touched
        ]
        answers, self.answers = self.answers, []
        self.entries, self.touched = [], set()
        return acks + answers


class WholeLine(RuleBasedStateMachine):
    """Anything may happen to anybody, at any time."""

    @initialize(
        world=st.integers(1, 3),
        capacity=st.sampled_from([1, 3, 10_000]),
        window=st.sampled_from([0, 2, 1000]),
        patience=st.sampled_from([0.5, 5.0]),
    )
    def begin(self, world: int, capacity: int, window: int, patience: float) -> None:
        self.directory = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.now, self.world, self.restarts, self.boots, self.spools = 1000.0, world, 0, 0, 0
        self.workers: list[Worker] = []
        self.at = 0
        """The step that the training has come to."""
        self.at_risk: set[str] = set()
        """Names that lay in a spool that was lost, and were in no row then."""
        self.dying: tuple[str, int] | None = None
        self.disk = Disk()
        self.line = Line(
            self.disk, Options(patience=patience, capacity=capacity, window=window), dies_at=self.dies
        )
        self.start_intake()
        for rank in range(world):
            self.start(rank)

    # What the world is made of

    def start(self, rank: int) -> None:
        self.workers.append(Worker(len(self.workers) + 1, rank, self.world, self.restarts))

    def start_intake(self) -> None:
        self.boots += 1
        newest = max(
            [self.line.read_through, *(p.entry for row in self.decided() for p in row.positions)], default=0
        )
        self.spool = Spool(self.directory / f"spool{self.spools}.db", above=newest)
        self.reader = SpoolReader(self.spool.path)
        self.now = max(self.now, self.spool.latest())
        self.intake = Intake(self.spool, self.now, str(self.boots))

    def decided(self) -> list[Any]:
        return [self.disk.row(step)[0] for step in self.disk.rows]

    def dies(self, place: str) -> bool:
        """Whether delivery dies at a place, which is once, the given number of times after it was said."""
        if self.dying is None or self.dying[0] != place:
            return False
        self.dying = (place, self.dying[1] - 1)
        if self.dying[1] >= 0:
            return False
        self.dying = None
        return True

    def living(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.alive and worker.dialogue.phase is not Phase.OVER]

    def pick(self, which: int) -> Worker | None:
        alive = self.living()
        return alive[which % len(alive)] if alive else None

    # Workers

    @rule(which=st.integers(0, 5), step=st.integers(0, 12), how=st.integers(0, 3), count=st.integers(1, 4))
    def say(self, which: int, step: int, how: int, count: int) -> None:
        worker = self.pick(which)
        if worker is None or worker.dialogue.leaving:
            return
        for more in range(count):
            stage = STAGES[how % 2]
            name = f"n{worker.number}_{len(worker.names)}"
            data = {"loss": 1.0, name: 1} if how < 3 else {"loss": float(worker.rank)}
            if how >= 2:
                record = counted(worker.own[stage], data, stage=stage)
                worker.own[stage] += 1
            else:
                record = log(step + more, data, stage=stage)
            assert worker.outbox.offer(record)
            prefix = f"{stage}/" if stage else ""
            axis = f"{stage}/step" if stage else MAIN_AXIS
            worker.names.append((prefix + name, axis) if how < 3 else None)

    @rule(which=st.integers(0, 5), what=st.integers(0, 2))
    def declare(self, which: int, what: int) -> None:
        worker = self.pick(which)
        if worker is not None and not worker.dialogue.leaving:
            worker.outbox.offer([config(lr=0.1), define("loss", reduce="sum"), define("")][what])
            worker.names.append(None)

    @rule(which=st.integers(0, 5), count=st.integers(1, 4), arrives=st.sampled_from([True, True, True, False]))
    def send(self, which: int, count: int, arrives: bool) -> None:
        """Some messages leave a worker, and arrive or do not: then the connection is gone, as ZeroMQ says."""
        worker = self.pick(which)
        for _ in range(count):
            message = worker.dialogue.say(self.now) if worker else None
            if message is None:
                return
            if arrives:
                self.intake.take(message, self.now)
        if not arrives and worker:
            worker.dialogue.interrupted()

    @rule(which=st.integers(0, 5), arrives=st.sampled_from([True, True, False]))
    def hear(self, which: int, arrives: bool) -> None:
        worker = self.pick(which)
        if worker is not None:
            for message in worker.inbox if arrives else ():
                worker.dialogue.hear(message, self.now)
            worker.inbox.clear()

    def leave(self, which: int) -> None:
        worker = self.pick(which)
        if worker is not None:
            worker.dialogue.leave(0)

    def die(self, which: int, again: bool) -> None:
        """A worker dies without a word; another may take its rank."""
        worker = self.pick(which)
        if worker is not None:
            worker.alive = False
            if again:
                self.start(worker.rank)

    def restart(self) -> None:
        """The launcher starts all ranks again."""
        self.restarts += 1
        for worker in self.workers:
            worker.alive = False
        for rank in range(self.world):
            self.start(rank)

    # Everybody at once: what mostly happens

    @rule(
        rounds=st.integers(1, 4),
        steps=st.integers(1, 3),
        implicit=st.booleans(),
        stage=st.booleans(),
        follows=st.booleans(),
        place=st.sampled_from((None, *PLACES)),
        after=st.integers(0, 6),
    )
    def train(
        self, rounds: int, steps: int, implicit: bool, stage: bool, follows: bool, place: str | None, after: int
    ) -> None:
        """Every rank says the next steps of a training and is heard; delivery may follow, and may die of it."""
        if place is not None:
            self.dying = (place, after)
        for _ in range(rounds):
            self.at += steps
            for which, _ in enumerate(self.living()):
                self.say(which, self.at - steps, 2 * implicit + stage, steps)
            self.exchange()
            if follows:
                self.follow()

    @rule()
    def exchange(self) -> None:
        """Everyone sends and hears until nothing is left to say."""
        for _ in range(3):
            for worker in self.living():
                while (message := worker.dialogue.say(self.now)) is not None:
                    self.intake.take(message, self.now)
            self.commit(None)
            for which, _ in enumerate(self.living()):
                self.hear(which, True)
        self.now += 0.2

    @rule()
    def follow(self) -> None:
        """Delivery reads and confirms all that there is."""
        while entries := self.reader.read(self.line.read_through, 500):
            self.deliver(lambda: self.line.read(entries))
        self.deliver(lambda: self.line.read([], clock=self.now))
        self.deliver(lambda: self.line.confirm(None))

    @rule(
        what=st.sampled_from(
            ["leave", "die", "fork", "replace", "restart", "lose_intake", "lose_intake", "lose_spool", "salvage"]
        ),
        which=st.integers(0, 5),
    )
    def misfortune(self, what: str, which: int) -> None:
        """Somebody leaves, dies, is started again, or loses what it had."""
        match what:
            case "leave":
                self.leave(which)
            case "die" | "replace":
                self.die(which, what == "replace")
            case "fork" if (parent := self.pick(which)) is not None:
                self.start(parent.rank)
            case "restart":
                self.restart()
            case "lose_intake":
                self.lose_intake()
            case "lose_spool" if self.spools < 1:
                self.lose_spool()
            case "salvage":
                self.salvage(which)

    # Intake

    @rule(dies_at=st.sampled_from([None, None, None, *COMMITS]))
    def commit(self, dies_at: str | None) -> None:
        try:
            answers = self.intake.commit(dies_at)
        except Killed:
            self.lose_intake()
            return
        for session, message in answers:
            for worker in self.workers:
                if worker.id == session:
                    worker.inbox.append(message)

    def lose_intake(self) -> None:
        """It is killed, and starts again; connections break, and what was not committed is gone."""
        self.spool.close()
        self.start_intake()
        for worker in self.workers:
            worker.inbox.clear()
            worker.dialogue.interrupted()

    def lose_spool(self) -> None:
        """Its disk is replaced by an empty one; delivery's own survives."""
        in_rows = self.in_rows()
        for worker in self.workers:
            stored = self.intake.roster.sessions.get(worker.id)
            for seq, name in enumerate(worker.names):
                if (
                    stored
                    and seq < max(stored.next, worker.outbox.acknowledged)
                    and name
                    and name[0] not in in_rows
                ):
                    self.at_risk.add(name[0])
        self.spool.close()
        self.spools += 1
        self.come_back()

    def salvage(self, which: int) -> None:
        """An entry of the spool can not be read any more, whatever it is, and the rest is saved."""
        there = list(self.reader.read(0, 1000))
        self.spool.close()
        self.reader.close()
        if there:
            lost = there[which * len(there) // 6]
            with sqlite3.connect(self.spool.path) as database:
                database.execute("DELETE FROM entry WHERE id = ?", (lost.id,))
            database.close()
            said = next((it.names for it in self.workers if it.id == lost.session), [])
            names = {name[0] for name in said[lost.first : lost.first + lost.count] if name}
            self.at_risk |= names - self.in_rows()
        damage_mark(self.spool.path).touch()
        self.come_back()
        assert self.spool.salvaged > 0 or len(there) < 2

    def in_rows(self) -> set[str]:
        held = {name for row in self.disk.held for name in row.values}
        return held | {name for row in self.decided() for name in row.values}

    def come_back(self) -> None:
        """Intake starts over what is left, and with it delivery, which it ends with itself."""
        self.revive(self.line)
        self.start_intake()
        for worker in self.workers:
            worker.inbox.clear()
            worker.dialogue.interrupted()

    @rule()
    def delete_settled(self) -> None:
        self.spool.delete_through(self.disk.checkpoint.cursor)

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.intake.entries += (ended := self.intake.roster.expire(self.now))
        self.intake.touched |= {entry.session for entry in ended}

    # Delivery

    @rule(limit=st.sampled_from([1, 3, 500]), caught_up=st.booleans())
    def read(self, limit: int, caught_up: bool) -> None:
        entries = self.reader.read(self.line.read_through, limit)
        self.deliver(lambda: self.line.read(entries, clock=self.now if caught_up and not entries else None))

    @rule(count=st.integers(0, 5))
    def confirm(self, count: int) -> None:
        self.deliver(lambda: self.line.confirm(count))

    @rule(place=st.sampled_from(PLACES), after=st.integers(0, 3))
    def kill_delivery_soon(self, place: str, after: int) -> None:
        self.dying = (place, after)

    @rule(durable=st.integers(0, 3))
    def kill_delivery(self, durable: int) -> None:
        self.deliver(lambda: setattr(self, "line", self.line.crash(durable)))

    def deliver(self, act: Any) -> None:
        """Do it; who dies of it is started again, as often as it takes."""
        try:
            act()
        except Died as died:
            self.revive(died.line)

    def revive(self, dead: Line) -> None:
        while True:
            try:
                self.line = dead.crash(durable=len(dead.written) // 2)
                return
            except Died as again:
                dead = again.line

    # What must hold

    @invariant()
    def steps_never_go_back(self) -> None:
        steps = [row.step for row in self.line.disk.held]

        assert sorted(set(steps)) == steps
        assert 0 == self.line.disk.duplicates

    def teardown(self) -> None:
        if not hasattr(self, "workers"):
            return
        self.dying = None
        self.drain()
        self.everything_is_in_one_row()
        self.every_record_is_accounted_for()
        self.spool.close()
        shutil.rmtree(self.directory)

    def drain(self) -> None:
        """Everyone that lives says all, and leaves."""
        for worker in self.workers:
            worker.dialogue.leave(0)
        for _ in range(200):
            waiting = [it for it in self.workers if it.alive and it.dialogue.phase is not Phase.OVER]
            if not waiting:
                break
            for worker in waiting:
                while (message := worker.dialogue.say(self.now)) is not None:
                    self.intake.take(message, self.now)
            self.commit(None)
            for index in range(len(self.workers)):
                self.hear(index, True)
            self.now += 1.0
        assert [] == [it for it in self.workers if it.alive and it.dialogue.phase is not Phase.OVER]
        self.intake.entries += self.intake.roster.end_all(self.now)
        self.commit(None)
        while entries := self.reader.read(self.line.read_through, 500):
            self.line.read(entries)
        self.line.finish()

    def everything_is_in_one_row(self) -> None:
        holders = Counter(name for row in self.line.disk.held for name in row.values)
        places = {name: row.places for row in self.line.disk.held for name in row.values}
        for worker in self.workers:
            for seq, said in enumerate(worker.names):
                if said is None:
                    continue
                name, axis = said
                assert holders[name] <= 1
                if seq < worker.outbox.acknowledged and name not in self.at_risk:
                    assert 1 == holders[name]
                if holders[name]:
                    assert axis in places[name]
        for row in self.line.disk.held:
            if PROCESS in row.values:
                said = {name.rpartition("_")[0] for name in row.values if name.rpartition("/")[2][0] == "n"}
                assert len(said) < 2

    def every_record_is_accounted_for(self) -> None:
        line = self.line
        taken = sum(session.next for session in line.resolver.sessions.values())

        assert taken == line.settlement.delivered + line.resolver.folded + line.resolver.dead.total()
        assert 0 == line.settlement.unsettled


WholeLine.TestCase.settings = settings(stateful_step_count=60)
TestWholeLine = WholeLine.TestCase


class TestWhatTheModelFound:
    """Each failure that it ever had, step by step."""

    def test_a_frame_whose_place_salvage_gives_to_a_hello_is_not_lost_and_delivered_both(self):
        line = WholeLine()
        line.begin(world=1, capacity=1, window=0, patience=0.5)
        train = {"after": 0, "implicit": False, "place": None, "stage": False}
        line.train(rounds=2, steps=2, follows=True, **train)  # of the second frame one record is in a row
        line.delete_settled()
        line.train(rounds=1, steps=1, follows=False, **train)

        line.misfortune(what="salvage", which=0)

        assert EntryKind.HELLO is line.reader.read(0, 1)[0].kind
        line.teardown()
