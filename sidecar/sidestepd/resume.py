"""How delivery goes on where its last life ended.

- the state as of the checkpoint is restored; what lies behind it in the spool is read again by the loop
- rows that were decided and that the run lacks are sent again word for word
- a row log that knows less than the run or the spool show has lost something: `recovery.py` says what then
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgpack

from sidestepd.entries import Entry, EntryKind
from sidestepd.recovery import Recovery, settled_before
from sidestepd.rowlog import SENT
from sidestepd.rows import Row
from sidestepd.sinks import Confirmed, patiently
from sidestepd.spool import SALVAGE_STRIDE, StoredSession

if TYPE_CHECKING:
    from sidestepd.delivery import Delivery

logger = logging.getLogger("sidestepd.delivery")


def resume(line: Delivery, held: Confirmed, opened: Callable[[int], None]) -> None:
    """Take up the state of the last life, and send again what the run lacks of it.

    `held` is what the run holds; `opened` is told the last step of what it held before we came, -1 for nothing.
    """
    base = _base(line, held)
    opened(base)
    if line.config.unsafe.row_log and _knows_less_than(line, held, base):
        _learn_from_the_run(line, held)
    line.media.recall(line.rowlog, line.marks)
    line.storing.see(held)
    if line.checkpoint.fold:
        fold = msgpack.unpackb(line.checkpoint.fold, strict_map_key=False)
        line.resolver.restore(fold["resolver"])
        line.order.restore(fold["order"])
        line.go_on(line.media.restore(fold))
        line.storing.restore(fold)
        line.hear(line.matcher.restore(fold["matcher"]))
        line.watch.restore(fold["watch"])
        line.exit_code = fold["exit_code"]
    if line.marks:
        line.assembler.restore(line.marks)
        if "samples" in line.marks:
            line.samples.restore(line.marks["samples"])
    line.watch.take_up(*line.rowlog.alerts())
    line.assembler.latest.update(line.rowlog.latest())
    _begin_behind(line, base)
    if line.recovery is not None:
        _count_anew(line, line.recovery)
    _replay_declarations(line)
    _resend(line, held)


def _base(line: Delivery, held: Confirmed) -> int:
    """The last step of what the run held when it was opened for the first time; -1 if that was nothing."""
    base: int | None = line.rowlog.meta("base", None)
    if base is None:
        base = held.steps[-1] if held.steps else -1
        line.rowlog.settle(base=base)
    return base


def _begin_behind(line: Delivery, base: int) -> None:
    """Go on behind what was there before us."""
    if base >= 0 and not line.checkpoint.fold:
        line.resolver.begin_behind(base)
    line.assembler.last = max(line.assembler.last, base)


# What is done when the row log lost something


def _knows_less_than(line: Delivery, held: Confirmed, base: int) -> bool:
    """Whether the row log lost something: it says so, or the run or the spool shows it."""
    if line.rowlog.meta("recover", None) is not None:
        return True
    if isinstance(held.steps, range):  # which names steps that no row has
        more = bool(held.steps) and held.steps[-1] > max(base, line.marks.get("last", -1))
    else:
        more = not {row.step for row, _ in line.rowlog.rows()}.issuperset(held.steps)
    front = line.spool.front() or 0
    skipped = front - line.checkpoint.cursor - 1
    return more or 0 < skipped < SALVAGE_STRIDE


def _learn_from_the_run(line: Delivery, held: Confirmed) -> None:
    known = {row.step for row, _ in line.rowlog.rows()}
    base = line.rowlog.meta("base", -1)  # up to there it is none of ours
    rows = patiently(lambda: list(line.sink.history()), beat=line.beat, kept=line.keep)
    line.recovery = Recovery(row for row in rows if row[0] > base and row[0] not in known)
    logger.error(
        "%s lost something: %d rows of the run are not in it; the run and the spool are taken as the truth",
        line.rowlog.path,
        line.recovery.rows,
    )
    through = max((line.rowlog.meta("recover", None) or {}).get("through", 0), line.spool.newest())
    line.rowlog.settle(recover={"through": through})
    last = held.steps[-1] if held.steps else -1  # a server may hold rows that no file here has
    line.marks = line.recovery.over(line.marks or line.assembler.marks(), last=last)
    line.order = line.new_buffer()


def _count_anew(line: Delivery, recovery: Recovery) -> None:
    """Introduce the sessions of frames that are gone, and count what lay in those."""
    stored, firsts = line.spool.sessions(), line.spool.firsts()
    was_lost = line.spool.front() == 1 or any(line.spool.path.parent.glob("quarantine/spool-*"))
    if not was_lost:  # then whatever is missing at its front was settled, and deleted
        for one in stored:
            _introduce(line, one, firsts.get(one.id, one.next))
    resolver, front = line.resolver, line.spool.front() or line.spool.newest() + 1
    kept = {one.id: resolver.sessions[one.id].next for one in stored if one.id in resolver.sessions}
    rows = [(row, fate != SENT) for row, fate in line.rowlog.rows()]
    given_up = resolver.folded + sum(resolver.dead.values()) + sum(line.settlement.rejected.values())
    line.settlement.delivered, gone = settled_before(
        kept, rows, cursor=line.checkpoint.cursor, front=front, given_up=given_up
    )
    line.settlement.rows = recovery.rows + sum(fate for _, fate in rows)
    resolver.dead["spool_lost"] += gone  # the loop will find them
    resolver.see_released(recovery.reached)


def _introduce(line: Delivery, stored: StoredSession, first: int) -> None:
    """A session, as if everything below `first` had been read of it."""
    if stored.id not in line.resolver.sessions:
        facts = {**stored.hello, **stored.counters}
        line.read(Entry.of_event(EntryKind.HELLO, stored.id, received=0.0, **facts))
    session = line.resolver.sessions[stored.id]
    session.next = max(session.next, first)
    if stored.state != "live" and first == stored.next:
        end = EntryKind.BYE if stored.state == "bye" else EntryKind.LEASE
        line.read(Entry.of_event(end, stored.id, first=first, received=0.0, **stored.counters))


# Saying it again


def _replay_declarations(line: Delivery) -> None:
    definitions = line.rowlog.definitions()
    line.assembler.defined.update({definition.name: definition for definition in definitions})
    line.sink.define(definitions)
    line.sink.summary(line.assembler.newest())
    line.telling.tell_config()


def _resend(line: Delivery, held: Confirmed) -> None:
    """Confirm the rows that the run holds, and write the others verbatim."""
    missing: list[Row] = []
    there: list[Row] = []
    steps = held.steps if isinstance(held.steps, range) else frozenset(held.steps)
    for row, fate in line.rowlog.rows():
        line.assembler.remember(row)
        line.settlement.recall(row, settled=fate != SENT)
        if fate == SENT:
            line.media.note([row])
            (there if row.step in steps else missing).append(row)
    line.see_confirmed([row.step for row in there])
    if missing:
        logger.info("sending %d rows again, from step %d on", len(missing), missing[0].step)
    line.write(missing)
    line.settle(held)
