"""Attacks on the way from entries to rows: any arrival order, any outage, any crash.

The stages are driven as delivery drives them. `Chaos` does anything at all, and asks for what must hold anyway:
nothing lost, nothing twice, no `_step` back. test_lockstep_properties.py asks for more of a training.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sidestep.wire import Kind, Undecodable, decode_records
from sidestepd.order import ReorderBuffer
from sidestepd.resolve import Booted, Heard, Joined, Left
from sidestepd.rows import MAIN_AXIS, Bundle, Part, Position
from sidestepd.spool import EntryKind
from tests.support.builders import Tape, config, counted, define, log
from tests.support.line import Disk, Line, Options
from tests.support.sound_rows import (
    assert_rows_are_sound,
)


class Witness(ReorderBuffer):
    """A reorder buffer that is watched: it keeps its own simple account of who holds what, and checks each row."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.live: dict[bytes, tuple[float, bool]] = {}
        self.worlds: dict[str, tuple[int, set[int], float | None]] = {}
        self.launch_of: dict[bytes, str] = {}
        self.reached: dict[tuple[bytes, str], int] = {}
        self.holds: set[tuple[bytes, str]] = set()
        self.said: dict[tuple[str, int], float] = {}
        self.first: dict[str, float] = {}
        self.left: dict[str, int] = {}
        self.own: set[bytes] = set()
        """Who has rows of its own: nobody waits for it where it has said nothing."""

    def hear(self, said: Joined | Left | Heard | Booted | Part, now: float) -> None:
        super().hear(said, now)
        match said:
            case Joined():
                joined, _ = self.live.get(said.session, (now, False))
                self.live[said.session] = (joined, said.more)
                self.launch_of[said.session] = said.launch
                world, ranks, spoke = self.worlds.get(said.launch, (said.world, set(), None))
                self.worlds[said.launch] = (world, ranks | {said.rank}, spoke)
            case Heard():
                joined, _ = self.live.get(said.session, (now, False))
                self.live[said.session] = (joined, said.more)
            case Left():
                self.live.pop(said.session, None)
                self.own.discard(said.session)
                self.holds = {(s, a) for s, a in self.holds if s != said.session}
                self.reached = {key: step for key, step in self.reached.items() if key[0] != said.session}
                self.launch_of.pop(said.session, None)
            case Booted():
                self.live = {session: (joined, True) for session, (joined, _) in self.live.items()}
                self.worlds = {
                    n: (w, ranks, None if spoke is None else now) for n, (w, ranks, spoke) in self.worlds.items()
                }
            case Part():
                self._witness_part(said, now)

    def _witness_part(self, said: Part, now: float) -> None:
        key = (said.session, said.axis)
        self.live.setdefault(said.session, (now, False))
        launch = self.launch_of.get(said.session)
        if launch and self.worlds[launch][2] is None:
            self.worlds[launch] = (*self.worlds[launch][:2], now)
        if said.apart:
            self.own.add(said.session)
            return
        self.reached[key] = max(said.step, self.reached.get(key, -1))
        self.first.setdefault(said.axis, now)
        self.said.setdefault((said.axis, said.step), now)
        if said.step > self.left.get(said.axis, -1):
            self.holds.add(key)

    def ready(self, now: float) -> list[Bundle]:
        bundles = super().ready(now)
        for bundle in bundles:
            if not bundle.late and not bundle.apart:
                self._witness_bundle(bundle, now)
        return bundles

    def _witness_bundle(self, bundle: Bundle, now: float) -> None:
        axis, step = bundle.axis, bundle.step
        assert step > self.left.get(axis, -1)
        self.left[axis] = step
        match bundle.cause:
            case "passed":
                assert not self._gathering(now)
                assert all(self._moved_past(session, axis, step, now) for session in self.live)
            case "patience":
                assert now >= self.said[axis, step] + self.patience
                assert not any(self._catching_up(session, axis, step) for session in self.live)
                self.holds = {(s, a) for s, a in self.holds if a != axis or self.reached[s, a] >= step}
            case "forced":
                assert self.waiting >= self.capacity

    def _gathering(self, now: float) -> bool:
        return any(
            len(ranks) < world and spoke is not None and now < spoke + self.patience
            for world, ranks, spoke in self.worlds.values()
        )

    def _moved_past(self, session: bytes, axis: str, step: int, now: float) -> bool:
        if (session, axis) in self.holds:
            return self.reached[session, axis] > step
        if (session, axis) in self.reached or session in self.own:
            return True  # it let patience run out, or need not be waited for
        joined, more = self.live[session]
        return not more and now >= max(joined, self.first[axis]) + self.patience

    def _catching_up(self, session: bytes, axis: str, step: int) -> bool:
        spoke = session in self.own or (session, axis) in self.reached
        holds = (session, axis) in self.holds or not spoke
        return self.live[session][1] and holds and self.reached.get((session, axis), -1) <= step


# Anything at all

STAGES = (None, "eval", "eval/deep")


WAYS = ("next", "next", "counted", "repeat", "back")


@dataclass(kw_only=True)
class Worker:
    """A process that logs: its records wait in a queue until they are sent."""

    session: int
    rank: int
    launch: str
    queue: deque[tuple[bytes, tuple[str, int | None] | None]] = field(default_factory=deque)
    steps: Counter[str] = field(default_factory=Counter)
    gone: bool = False
    bases: dict[str, int] = field(default_factory=dict)
    child: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call that was spooled: where its unique name has to appear, and `alone` if nothing else may be there."""

    name: str
    axis: str
    step: int
    alone: bool = False


class Chaos:
    """Workers, a spool and lives of delivery, moved by actions in any order."""

    def __init__(self, options: Options, ranks: int, *, watched: bool) -> None:
        self.tape, self.ranks = Tape(), ranks
        self.line = Line(Disk(), options, buffer=Witness if watched else ReorderBuffer)
        self.workers: list[Worker] = []
        self.calls: dict[Position, Call] = {}
        self.other: set[Position] = set()
        """Positions of records that never come into a row."""
        self.highest: dict[str, int] = {}
        self.bases: dict[str, dict[str, int]] = {}
        self._names = 0
        for rank in range(ranks):
            self.start(rank)

    # Workers

    def start(self, rank: int, launch: str = "L#0") -> None:
        worker = Worker(session=len(self.workers) + 1, rank=rank, launch=launch)
        self.workers.append(worker)
        worker.bases = self.bases.setdefault(launch, {axis: step + 1 for axis, step in self.highest.items()})
        self.greet(worker)

    def fork(self, parent: Worker) -> None:
        """A process that lives begins another session of its rank."""
        self.greet(parent)
        child = Worker(session=len(self.workers) + 1, rank=parent.rank, launch=parent.launch, child=True)
        child.bases = {axis: step + 1 for axis, step in self.highest.items()}
        self.workers.append(child)
        self.greet(child)

    def greet(self, worker: Worker) -> None:
        name = worker.launch.split("#")[0]
        self.tape.hello(worker.session, rank=worker.rank, world=self.ranks, launch=name, more=bool(worker.queue))

    def log(self, worker: Worker, stage: str | None, way: str, by: int) -> None:
        axis = f"{stage}/step" if stage else MAIN_AXIS
        self._names += 1
        name = f"n{self._names}"
        data = {"loss": float(self._names), name: self._names}
        if way == "counted":
            record = counted(worker.steps[axis], data, stage=stage)
            worker.queue.append((record, (axis, worker.steps[axis])))
        else:
            step = max(0, worker.steps[axis] + {"next": 1 + by, "repeat": 0, "back": -by}[way])
            record = log(step, data, stage=stage)
            worker.queue.append((record, (axis, None)))
            worker.steps[axis] = max(step, worker.steps[axis])
        worker.steps[axis] += way == "counted"

    def say_other(self, worker: Worker, what: int) -> None:
        records = [
            config(lr=0.1), define("loss", summary="min"), define("eval/*", step_metric="loss"), define(""),
            b"\xc1", log(2**62),
        ]  # fmt: skip
        worker.queue.append((records[what % len(records)], None))

    def send(self, worker: Worker, count: int) -> None:
        """Cut a frame of the oldest records."""
        if worker.gone or not worker.queue:
            return
        count = min(count, len(worker.queue))
        sent = [worker.queue.popleft() for _ in range(count)]
        entry = self.tape.say(worker.session, *(record for record, _ in sent), more=bool(worker.queue))
        for seq, (record, decoded) in enumerate(
            zip(sent, decode_records(entry.body, count), strict=True), entry.first
        ):
            self._spooled(Position(entry.id, seq), worker, record[1], decoded)

    def _spooled(self, position: Position, worker: Worker, at: tuple[str, int | None] | None, record: Any) -> None:
        if at is None or isinstance(record, Undecodable):
            self.other.add(position)
            return
        axis, _ = at
        is_counted = record.kind is Kind.COUNTED
        step = record.step + (worker.bases.get(axis, 0) if is_counted else 0)
        name = next(name for name in record.data if name != "loss")
        prefix = f"{record.stage}/" if record.stage else ""
        self.highest[axis] = max(step, self.highest.get(axis, step))
        self.calls[position] = Call(name=prefix + name, axis=axis, step=step, alone=worker.child and is_counted)

    def bye(self, worker: Worker) -> None:
        while worker.queue:
            self.send(worker, 3)
        self.tape.bye(worker.session)
        worker.gone = True

    # Actions

    def act(self, action: tuple[Any, ...]) -> None:
        what, who, amount, which = action
        worker = self.workers[who % len(self.workers)]
        if what in ("read", "take", "confirm", "crash"):
            self._act_in_delivery(what, amount, which)
        elif what == "round":
            self._round(amount, which)
        elif what == "wait":
            self.tape.now += amount * self.line.options.patience / 4
        elif what == "boot":
            self.tape.boot()
        elif worker.gone:
            self._come_again(worker)
        else:
            self._act_in_worker(worker, what, amount, which)

    def _act_in_worker(self, worker: Worker, what: str, amount: int, which: int) -> None:
        match what:
            case "log":
                self.log(worker, STAGES[which % 3], WAYS[which % 5], amount)
            case "other":
                self.say_other(worker, which)
            case "send":
                self.send(worker, 1 + amount)
            case "greet":
                self.greet(worker)
            case "lease":
                self.tape.lease(worker.session)
            case "bye":
                self.bye(worker)
            case "fork" if not worker.child:
                self.fork(worker)

    def _act_in_delivery(self, what: str, amount: int, which: int) -> None:
        match what:
            case "read":
                self.line.read(self.tape.entries, clock=self.tape.now if which % 2 else None)
            case "take":
                behind = [entry for entry in self.tape.entries if entry.id > self.line.read_through]
                self.line.read(behind[: 1 + amount])
            case "confirm":
                self.line.confirm(amount)
            case "crash":
                self.line = self.line.crash(durable=amount)

    def _round(self, amount: int, which: int) -> None:
        """Everyone logs, sends and is read."""
        for worker in self.workers:
            if not worker.gone:
                self.log(worker, STAGES[which % 3], WAYS[which % 5], amount % 2)
                self.send(worker, 2 + which % 3)
        self.tape.now += 0.1
        self.line.read(self.tape.entries, clock=self.tape.now)

    def _come_again(self, gone: Worker) -> None:
        """A process of the same rank, if there is none: of the first launch that still takes it, or a new one."""
        if gone.child or any(it.rank == gone.rank and not it.gone for it in self.workers):
            return
        newest = max(int(worker.launch.removeprefix("L#")) for worker in self.workers)
        for number in range(newest + 2):
            done = {it.rank for it in self.workers if it.gone and not it.child and it.launch == f"L#{number}"}
            if gone.rank not in done and len(done) < self.ranks:
                self.start(gone.rank, f"L#{number}")
                return

    def end(self) -> None:
        for worker in self.workers:
            if not worker.gone:
                self.bye(worker)
        self.line.read(self.tape.entries, clock=self.tape.now)
        self.line.finish()

    # What must hold

    def assert_settlement_is_exact(self) -> None:
        settlement, held = self.line.settlement, self.line.disk.held
        done = {position for row in held for position in row.positions}
        read = {
            position for position in self.calls if self.line.started < position.entry <= self.line.read_through
        }

        assert sum(len(row.positions) for row in held) == settlement.delivered
        assert len(read - done) == settlement.unsettled
        assert all(
            position in done for position in self.calls if position.entry <= self.line.disk.checkpoint.cursor
        )

    def assert_everything_is_in_one_row(self) -> None:
        rows = self.line.disk.held
        places = Counter(position for row in rows for position in row.positions)

        assert dict.fromkeys(self.calls, 1) == places
        holders = {name: row for row in rows for name in row.values}
        for position, call in self.calls.items():
            row = holders[call.name]
            assert position in row.positions
            assert call.step == row.places[call.axis]
            if call.alone:
                assert (position,) == row.positions
                assert row.values[call.name] == row.values[f"{call.name.rpartition('n')[0]}loss"]

    def assert_ledger_balances(self) -> None:
        records = sum(entry.count for entry in self.tape.entries if entry.kind is EntryKind.FRAME)
        settlement, resolver = self.line.settlement, self.line.resolver

        assert records == settlement.delivered + resolver.folded + resolver.dead.total()
        assert 0 == settlement.unsettled


def actions(*, crashes: bool) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    often = ["round"] * 4 + ["log"] * 6 + ["send"] * 4 + ["read"] * 3 + ["wait"] * 2 + ["take", "confirm", "other"]
    rarely = ["boot", "greet", "lease", "bye", "bye", "fork", "fork"] + ["crash"] * 3 * crashes
    action = st.tuples(st.sampled_from(often + rarely), st.integers(0, 5), st.integers(0, 5), st.integers(0, 14))
    return st.lists(action, min_size=20, max_size=80)


options = st.builds(
    Options,
    patience=st.sampled_from([0.5, 5.0, 100.0]),
    capacity=st.sampled_from([1, 3, 10_000]),
    window=st.sampled_from([0, 2, 1000]),
)


class TestAnythingAtAll:
    @given(options=options, ranks=st.integers(1, 3), actions=actions(crashes=True))
    def test_every_call_is_in_exactly_one_row_at_its_step(self, options, ranks, actions):
        """Over all lives of delivery together: nothing lost, nothing twice, and the ledger balances."""
        chaos = Chaos(options, ranks, watched=False)

        for action in actions:
            chaos.act(action)
        chaos.end()

        chaos.assert_everything_is_in_one_row()
        chaos.assert_ledger_balances()
        assert 0 == chaos.line.disk.duplicates

    @given(options=options, ranks=st.integers(1, 3), actions=actions(crashes=True))
    def test_rows_are_sound(self, options, ranks, actions):
        """`_step` strictly increases, the shift explains it, and the axis is data in every row."""
        chaos = Chaos(options, ranks, watched=False)

        for action in actions:
            chaos.act(action)
        chaos.end()

        assert_rows_are_sound(chaos.line.disk.held)

    @given(options=options, ranks=st.integers(1, 3), actions=actions(crashes=True))
    def test_settlement_is_exact_after_every_action(self, options, ranks, actions):
        """The cursor never passes a record without a fate, and `unsettled` counts just those."""
        chaos = Chaos(options, ranks, watched=False)

        for action in actions:
            chaos.act(action)

            chaos.assert_settlement_is_exact()

    @given(options=options, ranks=st.integers(1, 3), actions=actions(crashes=False))
    def test_no_row_leaves_before_its_time(self, options, ranks, actions):
        """Each row is checked by a witness when it leaves the buffer."""
        chaos = Chaos(options, ranks, watched=True)

        for action in actions:
            chaos.act(action)
        chaos.end()

    @given(options=options, ranks=st.integers(1, 3), actions=actions(crashes=True))
    def test_nothing_waits_for_ever(self, options, ranks, actions):
        """When time moves on and all are caught up, only a newest row that others may still join is left."""
        chaos = Chaos(options, ranks, watched=False)
        for action in actions:
            chaos.act(action)

        for worker in chaos.workers:
            chaos.send(worker, len(worker.queue))
            if not worker.gone:
                chaos.greet(worker)
        for _ in range(8):
            chaos.tape.now += options.patience / 2
            chaos.line.read(chaos.tape.entries, clock=chaos.tape.now)

        order = chaos.line.order.state()["axes"]
        waiting = chaos.line.order.waiting
        incomplete = [
            name
            for name, _, highest, _, reached, holding, _ in order
            if any(reached[session] < highest for session in holding)
        ]
        assert waiting <= len(incomplete)

        chaos.tape.now += 1000.0
        chaos.line.read(chaos.tape.entries, clock=chaos.tape.now)

        assert 0 == chaos.line.assembler.waiting
