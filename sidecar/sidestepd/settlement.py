"""Which records are settled, and so which part of the spool may be deleted.

A record is settled when its row is confirmed or rejected, when it became part of the state that outlives
frames, or when it can not be read. Frames are deleted from the front only: up to the newest snapshot before
which everything is settled. So the state as of that snapshot, and the frames behind it, are all there is to know.

- `unsettled` counts what was read and has no fate yet; it is counted by frames, not derived from the fates
- no I/O here: what must be written down is taken from here and committed by delivery
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush
from typing import Any

from sidestepd.entries import SAID, Entry
from sidestepd.resolve import Lost
from sidestepd.rows import Checkpoint, Dead, Position, Row

MOST_SNAPSHOTS = 64


class Settlement:
    """The fates of records and rows."""

    def __init__(self, counts: Mapping[str, Any], cursor: int = 0) -> None:
        self.delivered: int = counts.get("delivered", 0)
        """Records in rows that the run holds for good."""
        self.rows: int = counts.get("rows", 0)
        self.rejected: Counter[str] = Counter(counts.get("rejected", {}))
        self.values_refused: int = counts.get("values_refused", 0)
        """Values without which the sink took rows up to `_refused_through`, which a crash may have sent again."""
        self._refused_through: int = counts.get("refused_through", -1)
        self.newest_snapshot = cursor
        """The entry as of which the newest snapshot was made."""
        self._cursor = cursor
        self._remaining: dict[int, int] = {}
        self._rows: dict[int, tuple[Position, ...]] = {}
        self._decided_before: dict[Position, bool] = {}
        """Positions in rows of an earlier life whose frames are still to be read again; True: settled."""
        self._places: dict[Position, Mapping[str, int]] = {}
        self._confirmed: list[int] = []
        self._refused: list[tuple[int, str]] = []
        self._dead: list[Dead] = []
        self._snapshots: deque[Checkpoint] = deque()
        self._awaited: list[int] = []
        """A heap of the frames in which `_decided_before` lie, once for each record."""

    @property
    def unsettled(self) -> int:
        """Records that were read and have no fate yet."""
        return sum(self._remaining.values())

    def settled_beyond(self, entry: int) -> int:
        """Records with a fate that lie in frames behind an entry, which are still to be read again."""
        if not self._awaited:
            return 0
        return sum(settled and position.entry > entry for position, settled in self._decided_before.items())

    @property
    def unconfirmed(self) -> int:
        """Rows that were decided and are not known to be in the run."""
        return len(self._rows)

    # Frames

    def read(self, frame: Entry) -> None:
        """A frame was taken from the spool."""
        self._remaining[frame.id] = frame.count
        if not self._decided_before:
            return
        for seq in range(frame.first, frame.first + frame.count):
            if self._decided_before.get(Position(frame.id, seq)):
                self.settle(frame.id)

    def settle(self, entry: int, count: int = 1) -> None:
        """`count` records of a frame have their fate."""
        if entry in self._remaining:
            self._remaining[entry] -= count
            if self._remaining[entry] <= 0:
                del self._remaining[entry]

    def find(self, position: Position) -> None:
        """A record turned out to be in the run already."""
        self.delivered += 1
        self.settle(position.entry)

    def lose(self, lost: Lost) -> None:
        """Records can not be read; those that lay in another spool are in no frame."""
        first = lost.position.seq
        if lost.in_frame:
            self.settle(lost.position.entry, lost.count)
        shown = range(first, first + min(lost.count, 100))  # the count is in the ledger, the list is for people
        self._dead.extend(Dead(entry=lost.position.entry, seq=seq, reason=lost.reason) for seq in shown)

    def passed(self, entry: Entry) -> int:
        """An entry was reached; how many records of earlier rows lay in frames that are gone from before it.

        Or from its own place: what salvage says of a session that lost its HELLO stands where a frame stood.
        """
        gone, is_frame = 0, entry.kind in SAID
        while self._awaited and self._awaited[0] <= entry.id:
            gone += heappop(self._awaited) < entry.id or not is_frame
        return gone

    def places_of(self, position: Position) -> Mapping[str, int] | None:
        """The places of the row of an earlier life that holds the record; None: no row does."""
        return self._places.get(position)

    # Rows

    def recall(self, row: Row, *, settled: bool) -> None:
        """A row of an earlier life, before its frames are read again."""
        for position in row.positions:
            if position.entry > self._cursor:
                self._decided_before[position] = settled
                self._places[position] = row.places
                heappush(self._awaited, position.entry)
        if not settled:
            self._rows[row.step] = row.positions

    def decide(self, row: Row) -> None:
        """A row is written down."""
        self._rows[row.step] = row.positions

    def confirm(self, steps: Iterable[int]) -> None:
        """The run holds these rows for good."""
        for step in steps:
            positions = self._rows.pop(step, None)
            if positions is not None:
                self.delivered += len(positions)
                self.rows += 1
                self._confirmed.append(step)
                self._settle_row(positions)

    def reject(self, step: int, reason: str) -> None:
        """The sink refused a row for good."""
        positions = self._rows.pop(step, ())
        self.rejected[reason] += len(positions)
        self._refused.append((step, f"rejected: {reason}"))
        self._settle_row(positions)

    def leave_out(self, step: int, values: int) -> None:
        """The sink took a row without so many of its values."""
        if step > self._refused_through:
            self._refused_through = step
            self.values_refused += values

    def _settle_row(self, positions: Iterable[Position]) -> None:
        for position in positions:
            if position in self._decided_before:
                self._decided_before[position] = True
            self.settle(position.entry)

    # What is to be written down

    def snapshot(self, read_through: int, fold: bytes) -> None:
        """What reading up to an entry had taught; it becomes a checkpoint when all before it is settled."""
        self.newest_snapshot = read_through
        self._snapshots.append(Checkpoint(cursor=read_through, fold=fold))
        if len(self._snapshots) > MOST_SNAPSHOTS:
            self._snapshots = deque(list(self._snapshots)[::2])  # the newest stays

    def checkpoint(self) -> Checkpoint | None:
        """The newest snapshot before which everything is settled, if there is a new one."""
        oldest = next(iter(self._remaining), None)
        newest = None
        while self._snapshots and (oldest is None or self._snapshots[0].cursor < oldest):
            newest = self._snapshots.popleft()
        return newest

    def counts(self) -> dict[str, Any]:
        """The counters that outlive this process, as plain values."""
        return {
            "delivered": self.delivered,
            "rows": self.rows,
            "rejected": dict(self.rejected),
            "values_refused": self.values_refused,
            "refused_through": self._refused_through,
        }

    def take_confirmed(self) -> list[int]:
        """Steps confirmed since this was asked last."""
        taken, self._confirmed = self._confirmed, []
        return taken

    def take_rejected(self) -> list[tuple[int, str]]:
        """Steps rejected since this was asked last, each with its reason."""
        taken, self._refused = self._refused, []
        return taken

    def take_dead(self) -> list[Dead]:
        """Records found unreadable since this was asked last."""
        taken, self._dead = self._dead, []
        return taken
