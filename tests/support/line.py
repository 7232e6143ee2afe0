"""Delivery without its processes, files and clock: the same stages, driven in the same order.

A `Disk` is all that outlives a `Line`: the row log as bytes, and the rows that the run holds for good. A line is
killed by forgetting it; the next one on the same disk goes on where the disk says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from sidestepd.assemble import Assembler
from sidestepd.match import Event, Matcher
from sidestepd.order import ReorderBuffer
from sidestepd.resolve import Closed, Folded, Lost, Resolver
from sidestepd.rowlog import pack_positions
from sidestepd.rows import Bundle, Checkpoint, Definition, Latest, Row
from sidestepd.rules import Rules
from sidestepd.settlement import Settlement
from sidestepd.spool import Entry, EntryKind

READ_LIMIT = 500
READY_STRIDE_S = 0.02


@dataclass(kw_only=True)
class Disk:
    """What a crash leaves: the tables of the row log, packed, and the run's durable rows."""

    rows: dict[int, tuple[bytes, bytes, str]] = field(default_factory=dict)
    definitions: dict[str, bytes] = field(default_factory=dict)
    latest: dict[str, bytes] = field(default_factory=dict)
    marks: bytes = b""
    counts: bytes = msgpack.packb({})
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    held: list[Row] = field(default_factory=list)
    """The rows that the run holds for good."""
    duplicates: int = 0
    """Rows that were written although the run held them."""

    def row(self, step: int) -> tuple[Row, str]:
        """A remembered row and its fate."""
        content, positions, fate = self.rows[step]
        return Row.unpack(content, positions), fate


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the stages are set up."""

    patience: float = 5.0
    max_wait: float = 60.0
    capacity: int = 10_000
    window: int = 1000


class Died(Exception):
    """A line came to the place where it was to die; `line` is what is left of it."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line


class Line:
    """One life of delivery. `dies_at` is asked at each commit and each row that is written, before and after."""

    def __init__(
        self,
        disk: Disk | None = None,
        options: Options | None = None,
        buffer: Callable[..., ReorderBuffer] = ReorderBuffer,
        dies_at: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.disk, self.options, self._buffer = disk or Disk(), options or Options(), buffer
        self._dies_at = dies_at
        rules = Rules()
        marks = msgpack.unpackb(self.disk.marks) if self.disk.marks else {}
        self.resolver = Resolver(rules)
        self.matcher = Matcher(patience=self.options.patience, capacity=self.options.capacity)
        self.order = buffer(
            patience=self.options.patience, capacity=self.options.capacity, released=marks.get("released", ())
        )
        self.assembler = Assembler(
            rules, patience=self.options.patience, max_wait=self.options.max_wait, window=self.options.window
        )
        self.started = self.read_through = self.disk.checkpoint.cursor
        self.settlement = Settlement(msgpack.unpackb(self.disk.counts), cursor=self.read_through)
        self.exit_code: int | None = None
        self.now = 0.0
        self.decided: list[Row] = []
        """The rows decided in this life."""
        self.written: list[Row] = []
        """The rows that went to the sink and are not confirmed, in order."""
        self._last_ready = 0.0
        self._start(marks)

    def _start(self, marks: dict[str, Any]) -> None:
        if self.disk.checkpoint.fold:
            fold = msgpack.unpackb(self.disk.checkpoint.fold, strict_map_key=False)
            self.resolver.restore(fold["resolver"])
            self.order.restore(fold["order"])
            self._hear(self.matcher.restore(fold["matcher"]))
            self.exit_code = fold["exit_code"]
        if marks:
            self.assembler.restore(marks)
        self.assembler.latest.update({name: Latest.unpack(raw) for name, raw in self.disk.latest.items()})
        self.assembler.defined.update(
            {name: Definition.unpack(raw) for name, raw in self.disk.definitions.items()}
        )
        held, missing = {row.step for row in self.disk.held}, []
        for step in sorted(self.disk.rows):
            row, fate = self.disk.row(step)
            self.assembler.remember(row)
            self.settlement.recall(row, settled=fate != "sent")
            if fate == "sent" and row.step not in held:
                missing.append(row)
        self.settlement.confirm(held)
        self._write(missing)
        self._settle()

    # The loop of delivery

    def read(self, entries: Sequence[Entry], *, clock: float | None = None) -> None:
        """Take all that is in the spool beyond what was read; then it is `clock`, if that is given."""
        behind = [entry for entry in entries if entry.id > self.read_through]
        for start in range(0, len(behind) + 1, READ_LIMIT):
            for entry in behind[start : start + READ_LIMIT]:
                self.take(entry)
                if self.now - self._last_ready >= READY_STRIDE_S:
                    self.let_go()
        if clock is not None:
            self.now = max(self.now, clock)
        self.let_go()

    def take(self, entry: Entry) -> None:
        """Read one entry."""
        self.now = max(self.now, entry.received)
        self.read_through = entry.id
        if kept := self.settlement.passed(entry):
            self.resolver.dead["spool_lost"] -= kept
        if entry.kind is EntryKind.FRAME:
            self.settlement.read(entry)
        for said in self.resolver.read(entry, self.settlement.places_of):
            match said:
                case Lost():
                    self.settlement.lose(said)
                case Folded():
                    self.settlement.settle(said.position.entry)
                case Closed():
                    self.exit_code = said.exit_code
                case _:
                    self._hear(self.matcher.hear(said, self.now))

    def _hear(self, events: Iterable[Event]) -> None:
        for event in events:
            self.order.hear(event, self.now)

    def let_go(self) -> None:
        """Decide the rows that may leave."""
        self._last_ready = self.now
        self._hear(self.matcher.ready(self.now))
        rows = self._assemble(self.order.ready(self.now))
        self._decide([*rows, *self.assembler.ready(self.now)])

    def finish(self) -> None:
        """Everything that waits leaves, and is confirmed."""
        self._hear(self.matcher.flush())
        self._decide([*self._assemble(self.order.flush()), *self.assembler.flush()])
        self.confirm()

    def confirm(self, count: int | None = None) -> None:
        """The run holds the first `count` of what was written, or all; and that is written down."""
        confirmed, self.written = self.written[:count], self.written[len(self.written[:count]) :]
        self.disk.held += confirmed
        self.settlement.confirm([row.step for row in confirmed])
        if self.settlement.newest_snapshot != self.read_through:
            fold = {
                "resolver": self.resolver.state(),
                "matcher": self.matcher.state(),
                "order": self.order.state(),
                "exit_code": self.exit_code,
            }
            self.settlement.snapshot(self.read_through, msgpack.packb(fold))
        self._settle()

    def crash(self, durable: int = 0) -> Line:
        """The next life; of what was written and not confirmed the run holds the first `durable` rows."""
        self.disk.held += self.written[:durable]
        return Line(self.disk, self.options, self._buffer, self._dies_at)

    def _assemble(self, bundles: Iterable[Bundle]) -> list[Row]:
        world = max((session.world for session in self.resolver.sessions.values()), default=1)
        return self.assembler.add(bundles, world=world, now=self.now)

    def _decide(self, rows: Sequence[Row]) -> None:
        definitions = self.assembler.new_definitions(rows)
        if rows:
            self._pass("decide")
            for row in rows:
                assert row.step not in self.disk.rows
                self.disk.rows[row.step] = (row.pack(), pack_positions(row.positions), "sent")
            self.disk.marks = msgpack.packb(self.assembler.marks())
            self.disk.definitions |= {it.name: it.pack() for it in definitions}
            self._pass("decided")
        for row in rows:
            self.settlement.decide(row)
        self.decided += rows
        self._write(rows)

    def _write(self, rows: Iterable[Row]) -> None:
        held = {row.step for row in self.disk.held}
        for row in rows:
            self._pass("write")
            self.disk.duplicates += row.step in held
            self.written.append(row)
            self._pass("written")

    def _pass(self, place: str) -> None:
        if self._dies_at(place):
            raise Died(self)

    def _settle(self) -> None:
        disk = self.disk
        self._pass("settle")
        for step in self.settlement.take_confirmed():
            if step in disk.rows:
                disk.rows[step] = (*disk.rows[step][:2], "confirmed")
        self.settlement.take_dead()
        disk.latest |= {name: latest.pack() for name, latest in self.assembler.take_changed().items()}
        disk.checkpoint = self.settlement.checkpoint() or disk.checkpoint
        disk.counts = msgpack.packb(self.settlement.counts())
        self._forget(self.assembler.last - self.options.window)
        self._pass("settled")

    def _forget(self, keep_above: int) -> None:
        for step in list(self.disk.rows):
            row, fate = self.disk.row(step)
            newest = max(position.entry for position in row.positions)
            if fate != "sent" and step <= keep_above and newest <= self.disk.checkpoint.cursor:
                del self.disk.rows[step]
