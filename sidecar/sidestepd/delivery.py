"""Delivery: read the spool, put rows in order, write them down, write them out, and see them confirmed.

    read ─▶ resolve ─▶ match ─▶ media ─▶ order ─▶ assemble ─▶ row log ─▶ sink ─▶ confirmed ─▶ cursor
                                                                            intake deletes up to there ◀─┘

- it knows nothing that is not in the spool or its own row log: killed anywhere, it goes on from both
- a row is in the row log before the sink sees it; after a crash the rows that the run lacks are sent again
  word for word, and only records that are in no row are ordered again
- behind a backlog rows are gathered for commits of about `batch_rows`, as each waits for the disk
- it is the only process that imports wandb, holds its own lock, and dies with intake
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack

from sidestepd.assemble import Assembler
from sidestepd.behind import begin, end
from sidestepd.beside import Beside
from sidestepd.clock import Clock
from sidestepd.config import Config
from sidestepd.crashpoints import crash_point
from sidestepd.entries import SAID
from sidestepd.errors import ExitCode, Fatal, Retry, Trouble
from sidestepd.facts import wait_for_facts
from sidestepd.match import Event, Matcher
from sidestepd.media import Media
from sidestepd.order import ReorderBuffer
from sidestepd.processes import read_json, write_json
from sidestepd.quota import Names
from sidestepd.recovery import Recovery
from sidestepd.resolve import Closed, Folded, LaneEnded, Lost, Resolver
from sidestepd.resume import resume
from sidestepd.rowlog import RowLog
from sidestepd.rows import Blob, Bundle, Definition, Described, Logged, Part, Printed, Raised, Row, Sampled
from sidestepd.rules import Rule, Rules, Source, operations
from sidestepd.rundir import ARTIFACTS, BLOBS
from sidestepd.samples import Samples, first_ranks
from sidestepd.settlement import Settlement
from sidestepd.show import Shower
from sidestepd.sinks import Confirmed, LeftOut, RunFacts, Sink, load, make_sink, patiently, write_all
from sidestepd.spool import Entry, EntryKind, SpoolReader
from sidestepd.storing import Storing
from sidestepd.telling import Telling
from sidestepd.watch import Watch

logger = logging.getLogger("sidestepd.delivery")

READ_LIMIT = 500
"""Entries taken from the spool at once."""
SNAPSHOT_BYTES = 256 * 1024
"""While catching up, a place up to which the spool may be deleted is noted this often."""
READY_STRIDE_S = 0.02
"""While catching up, how far spool time may move before rows are let go."""
NICENESS = 10
"""Delivery and its wandb-core give way to the training: the spool waits, a training step does not."""
ARTIFACT_S = 600.0
"""How long checking and hashing one artifact may take at the run's end."""
CLOSE_DEADLINE_S = 30.0
"""How long the last rows may take to be confirmed after the run was finished."""


class Delivery:
    """Everything between the spool and the sink, for one run."""

    def __init__(
        self,
        spool: SpoolReader,
        rowlog: RowLog,
        sink: Sink,
        config: Config,
        *,
        shower: Shower,
        shelf: Path,
        horizon: Clock,
        beat: Callable[[], None],
        wait_for_room: Callable[[], None] = lambda: None,
        troubled: Callable[[Trouble | None], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.spool, self.rowlog, self.sink, self.horizon, self.beat = spool, rowlog, sink, horizon, beat
        self.wait_for_room, self.troubled = wait_for_room, troubled
        self._make_stages(shower, shelf)
        self.checkpoint = rowlog.checkpoint()
        self.read_through = self.checkpoint.cursor
        self.settlement = Settlement(rowlog.meta("counts", {}), cursor=self.read_through)
        self.exit_code: int | None = None
        self.recovery: Recovery | None = None
        """What the run holds and the row log does not know of; None as long as the row log is whole."""
        self.unmatched: list[str] = []
        """Patterns that fitted no metric, known when the run is finished."""
        self._ready: list[Row] = []
        """Rows that are to be written down, and the definitions that go before them."""
        self._definitions: list[Definition] = []
        self._now = 0.0
        self._horizon = 0.0
        self._last_ready = 0.0
        self._last_confirm = 0.0
        self._progress_at = time.monotonic()
        self._watched = False
        self.trouble: Trouble | None = None
        """What is waited for outside of this process."""
        self.telling = Telling(
            sink, rowlog, config, self.resolver, self.assembler, self.samples, self.watch, self.beside
        )

    def _make_stages(self, shower: Shower, shelf: Path) -> None:
        """From the spool's entries to rows, in the order of the line."""
        config, rowlog, order = self.config, self.rowlog, self.config.order
        rules = Rules(
            Rule(pattern=name, reduce=operations(reduce), source=_source(config.source(f"reduce.{name}")))
            for name, reduce in config.reduce.items()
        )
        self.marks: dict[str, Any] = rowlog.meta("marks", {})
        self.resolver = Resolver(rules, Names(config.delivery.max_names))
        self.matcher = Matcher(patience=order.patience_s, capacity=order.capacity_rows)
        self.media = Media(
            shower,
            patience=order.patience_s,
            capacity=order.capacity_rows,
            beat=self.beat,
            told=rowlog.meta("media", {}),
        )
        self.storing = Storing(shelf, shower.folder, self.sink, rowlog, self.media)
        self.order = self.new_buffer()
        self.assembler = Assembler(
            rules,
            patience=order.patience_s,
            max_wait=order.max_wait_s,
            window=order.late_window_rows,
            ranks_reported=config.watch.ranks_reported,
        )
        self.beside = Beside(told=rowlog.meta("beside", None))
        self.samples = Samples(
            history=config.samplers.history,
            interval_s=config.samplers.interval_s,
            samples_metric=config.samplers.samples_metric,
            streamed=rowlog.meta("streamed", None),
        )
        self.watch = Watch(config.watch)

    # Life

    def start(self, run: RunFacts, opened: Callable[[Mapping[str, Any]], None]) -> None:
        """Open the run, say so, and go on where the last life ended."""
        bookmark = self.rowlog.meta("bookmark", {})
        held = patiently(lambda: self.sink.open(run, bookmark), beat=self.beat, kept=self.keep)
        self._tell_trouble(None)
        self.telling.about = lambda: opened({**self.sink.about(), "base": self.rowlog.meta("base", -1)})
        resume(self, held, lambda _: self.telling.about())

    def serve(self) -> None:
        """Until the run is told to finish."""
        while self.exit_code is None:
            self.beat()
            horizon = self._horizon = self.horizon()  # asked before reading
            entries = self.spool.read(self.read_through, READ_LIMIT)
            unmarked = 0
            for entry in entries:
                self.beat()
                self._take(entry)
                unmarked += len(entry.body)
                if unmarked >= SNAPSHOT_BYTES:  # so that a row that waits does not keep all that was read with it
                    self.settlement.snapshot(self.read_through, self._fold())
                    unmarked = 0
                if self._now - self._last_ready >= READY_STRIDE_S:
                    self._let_go()
                    if len(self._ready) >= self.config.delivery.batch_rows:
                        self._decide()
                        self._confirm_if_due()
            if len(entries) < READ_LIMIT:
                self.go_on(self.media.ready(self._now, horizon))
                self._now = max(self._now, horizon)
            self.telling.tell_samples(self._now)
            self.telling.tell_beside()
            self.storing.go_on()
            self._let_go()
            self._decide()
            self.telling.tell_config()
            self._confirm_if_due()
            if not entries and self.exit_code is None:
                time.sleep(self.config.delivery.poll_interval_s)

    def finish(self) -> None:
        """Everything that waits leaves; the run is finished, and seen to be whole."""
        self.hear(self.matcher.flush())
        self.go_on(self.media.flush())
        self.telling.tell_alerts(self._now, through=self.read_through)
        self._make([*self._assemble(self.order.flush()), *self.assembler.flush()])
        self._decide()
        self.telling.tell_config()
        self.telling.tell_summary(self.totals())
        self._finish_artifacts()
        logger.info("finishing the run with exit code %s", self.exit_code)
        patiently(lambda: self.sink.close(self.exit_code or 0), beat=self.beat, kept=self.keep)
        deadline = time.monotonic() + CLOSE_DEADLINE_S
        self._confirm()
        while (self.settlement.unconfirmed or self.storing.artifacts.waiting) and time.monotonic() < deadline:
            self.beat()
            time.sleep(0.05)
            self._confirm()
        if self.settlement.unconfirmed:
            raise Fatal(f"{self.settlement.unconfirmed} rows were not confirmed after the run was finished")
        if self.storing.artifacts.waiting:
            raise Fatal(f"{self.storing.artifacts.waiting} artifacts were not confirmed, likewise")
        self.settlement.snapshot(self.read_through, self._fold())
        self.unmatched = self.resolver.rules.unmatched(self.assembler.defined)
        for pattern in self.unmatched:
            logger.warning("define_metric(%r) matched no metric of the run", pattern)
        if refused := self.resolver.names.refused:
            logger.warning("%d values left out: the run has delivery.max_names names already", refused)
        bookmark = self.rowlog.meta("bookmark", {})
        self.settle(Confirmed(steps=(), bookmark=bookmark), state="closed", exit_code=self.exit_code)
        self.media.close()
        self.storing.close()

    def _finish_artifacts(self) -> None:
        """Those that are whole are in the run before it is finished, however long they take on their way."""
        self.storing.flush()
        waiting, deadline = 0, 0.0
        while now := self.storing.artifacts.versions:
            if now != waiting or self._watched:
                waiting, deadline = now, time.monotonic() + ARTIFACT_S
            if time.monotonic() > deadline:
                raise Fatal(f"none of {now} artifacts was confirmed within {ARTIFACT_S:.0f} s")
            self.beat()
            self.storing.go_on()
            self._confirm()
            time.sleep(0.1)

    # Reading

    def _take(self, entry: Entry) -> None:
        self._now = max(self._now, entry.received)
        self.read_through = entry.id
        if kept := self.settlement.passed(entry):
            # Their frames went down with a spool, and they are counted as lost with it; but the run has them.
            self.resolver.dead["spool_lost"] -= kept
        if entry.kind in SAID:
            self.settlement.read(entry)
        if entry.kind is not EntryKind.BOOT:  # before which nobody listened
            self.watch.poll(self._now)
        self.watch.prompt = not entry.more
        logged = self.read(entry)
        session = self.resolver.sessions.get(entry.session)
        self.watch.read(entry, session.launch if session else "", logged=logged)

    def read(self, entry: Entry) -> bool:
        """Have the stages hear what stands in an entry; whether there is a call of `log()` in it."""
        logged = False
        for said in self.resolver.read(entry, self.settlement.places_of):
            match said:
                case Lost():
                    self.settlement.lose(said)
                case Folded():
                    self.settlement.settle(said.position.entry)
                case Closed():
                    self.exit_code = said.exit_code
                case Sampled():
                    self.samples.meet(first_ranks(self.resolver.sessions.values()))
                    self.samples.hear(said, self._now)
                    self.settlement.settle(said.position.entry)
                case Blob() | LaneEnded():
                    self.media.store(said)
                case Logged():
                    self.storing.hear(said)
                    self.settlement.settle(said.position.entry)
                case Printed() | Described():
                    self.beside.hear(said)
                    self.settlement.settle(said.position.entry)
                case Raised():
                    self.samples.alert(said)
                    self.settlement.settle(said.position.entry)
                case _:
                    logged = logged or isinstance(said, Part)
                    self.hear(self.matcher.hear(said, self._now))
        return logged

    def hear(self, events: Iterable[Event]) -> None:
        """Put what is matched in order, with its media."""
        for event in events:
            if isinstance(event, Part):
                event = self._find(event)
                self.watch.hear(event, self._now)
            self.go_on(self.media.hear(event, self._now))

    def go_on(self, events: Iterable[Event]) -> None:
        """Put in order what waits for no media any more."""
        for event in events:
            self.order.hear(event, self._now)

    def _find(self, part: Part) -> Part:
        """What is said, marked as used if the run turns out to hold it."""
        if self.recovery is None or part.used or not self.recovery.holds(part):
            return part
        self.settlement.find(part.position)
        return replace(part, used=True)

    def new_buffer(self) -> ReorderBuffer:
        """A reorder buffer behind which lies what `marks` say was released."""
        order = self.config.order
        return ReorderBuffer(
            patience=order.patience_s, capacity=order.capacity_rows, released=self.marks.get("released", ())
        )

    # Deciding and writing

    def _let_go(self) -> None:
        self._last_ready = self._now
        self.hear(self.matcher.ready(self._now))
        self.go_on(self.media.ready(self._now, self._horizon))
        self.telling.tell_alerts(self._now, through=self.read_through)
        rows = self._assemble(self.order.ready(self._now))
        self._make([*rows, *self.assembler.ready(self._now)])

    def _assemble(self, bundles: Iterable[Bundle]) -> list[Row]:
        world = max((session.world for session in self.resolver.sessions.values()), default=1)
        bundles = self.watch.annotate(bundles)
        return self.assembler.add(bundles, world=world, now=self._now)

    def _make(self, rows: Sequence[Row]) -> None:
        """Make rows complete; the next `_decide` writes them down, with the state that they leave behind."""
        self._definitions += self.assembler.new_definitions(rows)
        self._ready += self.samples.into(rows)
        self._definitions += self.samples.take_definitions()

    def _decide(self) -> None:
        """Write what is ready down, then out."""
        rows, definitions, size = self._ready, self._definitions, self.config.delivery.batch_rows
        self._ready, self._definitions = [], []
        self.media.note(rows)
        if rows and self.config.unsafe.row_log:
            crash_point("delivery.decide")
            marks = {**self.assembler.marks(), "samples": self.samples.state(), "media": self.media.marks()}
            self.rowlog.append(rows, marks=marks, definitions=definitions)
        if rows:
            crash_point("delivery.decided")
        for row in rows:
            self.settlement.decide(row)
        self.sink.define(definitions)
        for start in range(0, len(rows), size):
            self.write(rows[start : start + size])

    def write(self, rows: Sequence[Row]) -> None:
        """Hand rows that are written down to the sink; what it refuses for good is settled."""
        self.wait_for_room()
        for refused in write_all(self.sink, self.media.shown(rows), beat=self.beat, kept=self.keep):
            step = refused.row.step
            if isinstance(refused, LeftOut):
                self.settlement.leave_out(step, len(refused.names))
                continue
            logger.warning("row %d was rejected: %s", step, refused.reason)
            self.settlement.reject(step, refused.reason)
            self.media.settle([step], rejected=True)
        crash_point("delivery.written")

    # Confirming

    def _confirm_if_due(self) -> None:
        if time.monotonic() - self._last_confirm >= self.config.delivery.confirm_interval_s:
            self._confirm()

    def _confirm(self) -> None:
        confirmed = self.sink.confirm()
        self._watched = confirmed.watched
        self.see_confirmed(confirmed.steps)
        self.storing.see(confirmed)
        self.storing.forget_orphans(self.resolver.sessions, self._now, self.matcher.parts)
        self._tell_trouble(confirmed.trouble)
        self._see_progress(confirmed)
        if self.settlement.newest_snapshot != self.read_through:
            self.settlement.snapshot(self.read_through, self._fold())
        crash_point("delivery.settle")
        self.settle(confirmed)
        self._last_confirm = time.monotonic()

    def see_confirmed(self, steps: Sequence[int]) -> None:
        """The run holds these rows for good."""
        self.settlement.confirm(steps)
        self.media.settle(steps)

    def _see_progress(self, confirmed: Confirmed) -> None:
        """A sink that takes rows for ever and holds none stands still, though this process does not."""
        now, stall_s = time.monotonic(), self.config.delivery.stall_s
        if confirmed.steps or confirmed.watched or not self.settlement.unconfirmed:
            self._progress_at = now
        elif now - self._progress_at > stall_s:
            raise Fatal(f"none of {self.settlement.unconfirmed} rows was confirmed within {stall_s:.0f} s")

    def keep(self, later: Retry) -> None:
        """Something has to be tried again: say what is waited for."""
        self._tell_trouble(later.trouble)

    def _tell_trouble(self, trouble: Trouble | None) -> None:
        """Say once, in the log and to whoever asks for the run's status, what is waited for."""
        if trouble != self.trouble:
            self.trouble = trouble
            logger.warning("waiting: %s", trouble.what) if trouble else logger.info("going on")
            self.troubled(trouble)

    def _fold(self) -> bytes:
        fold: bytes = msgpack.packb(
            {
                "resolver": self.resolver.state(),
                "matcher": self.matcher.state(),
                "media": self.media.state(),
                "artifacts": self.storing.artifacts.state(),
                "order": self.order.state(),
                "watch": self.watch.state(),
                "exit_code": self.exit_code,
            }
        )
        return fold

    def settle(self, confirmed: Confirmed, **meta: Any) -> None:
        """Write fates down, and whatever else is due."""
        settlement = self.settlement
        checkpoint = settlement.checkpoint()
        if (
            self.recovery is not None
            and checkpoint
            and checkpoint.cursor >= self.rowlog.meta("recover", {})["through"]
        ):
            self.recovery, meta = None, {**meta, "recover": None}
        self.rowlog.settle(
            confirmed=settlement.take_confirmed(),
            rejected=settlement.take_rejected(),
            dead=settlement.take_dead(),
            latest=self.assembler.take_changed(),
            checkpoint=checkpoint,
            keep_above=self.assembler.last - self.config.order.late_window_rows,
            bookmark=confirmed.bookmark,
            counts=settlement.counts(),
            ledger=self.ledger(),
            media=self.media.settled(),
            artifacts=self.storing.artifacts.take_fates(),
            **meta,
        )
        crash_point("delivery.settled")
        self.storing.clean()
        self.media.clean()

    def totals(self) -> dict[str, int]:
        """What the run's summary says of the whole of it."""
        return {
            "sidestep/rows": self.settlement.rows + self.settlement.unconfirmed,
            "sidestep/late_rows": self.assembler.late_rows,
            "sidestep/late_values": self.assembler.late_values,
            "sidestep/conflicts": self.assembler.conflicts,
            "sidestep/forced_rows": self.assembler.forced_rows,
            "sidestep/dropped": sum(self.ledger()["dropped"].values()),
        }

    def ledger(self) -> dict[str, Any]:
        """What became of the records that were read, and what is known of those that were not."""
        dropped = Counter(self.resolver.dead)
        for session in self.resolver.sessions.values():
            dropped.update(session.dropped)
        return {
            "delivered": self.settlement.delivered + self.resolver.folded,
            "rejected": dict(self.settlement.rejected),
            "dropped": dict(dropped),
            "unsettled": self.settlement.unsettled,
            "read_through": self.read_through,
            "settled_beyond": self.settlement.settled_beyond(self.read_through),
            "rows": self.settlement.rows,
            "last_step": self.assembler.last,
            "late_rows": self.assembler.late_rows,
            "forced": self.assembler.forced_rows,
            "conflicts": self.assembler.conflicts,
            "waiting": self.matcher.waiting + self.media.held + self.order.waiting + self.assembler.waiting,
            "unmatched": self.unmatched,
            "values_refused": self.resolver.names.refused
            + self.settlement.values_refused
            + len(self.telling.refused),
            "media": self.media.ledger(),
            "artifacts": self.storing.artifacts.ledger(),
            "sessions": {
                id_.hex(): {
                    "rank": s.rank, "node": s.node, "ended": s.ended, "offered": s.offered,
                    "dropped": s.dropped, "acknowledged": s.next, "final": s.final, "lost": s.lost,
                }
                for id_, s in self.resolver.sessions.items()
            },
        }  # fmt: skip


def _source(given: str) -> Source:
    """Where a reduction was given: an option, or a file."""
    return Source.COMMAND_LINE if given.startswith("-") else Source.FILE


def main(arguments: Sequence[str] | None = None) -> int:
    """The delivery process of one run directory."""
    behind = begin("sidestepd.delivery", __doc__.splitlines()[0], arguments, niceness=NICENESS)
    if behind.is_done:
        return ExitCode.COMPLETE
    directory, config = behind.directory, behind.config
    run = read_json(directory / "run.json") | {"dir": str(directory)}
    load(config.sink.kind)  # importing wandb takes its time, best while workers import theirs
    facts = wait_for_facts(behind.spool, behind.rowlog, run, config, behind.beat)
    sink = make_sink(config.sink.kind, facts.mode)
    delivery = Delivery(
        behind.spool,
        behind.rowlog,
        sink,
        config,
        shower=Shower(directory / BLOBS, sink.show, threads=config.delivery.media_threads),
        shelf=directory / ARTIFACTS,
        horizon=behind.horizon,
        beat=behind.beat,
        wait_for_room=behind.patience.wait_for_room,
        troubled=behind.troubled,
    )
    with behind.told():
        delivery.start(facts, lambda about: write_json(directory / "about.json", about))
        delivery.serve()
        delivery.finish()
    return ExitCode.COMPLETE


if __name__ == "__main__":
    end(main, logger)
